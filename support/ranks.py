"""One run in several processes, the ranks, which torchrun starts.

Each rank runs the same program on its share of the micro-batches and samples. Only rank 0 prints
and writes. A process without torchrun is rank 0 of 1, and then these functions change nothing.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


def from_torchrun(name: str, alone: int) -> int:
    """The environment variable `name` that torchrun has set; `alone` without torchrun."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


RANK, WORLD = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
LOCAL_RANK = from_torchrun("LOCAL_RANK", 0)  # the number of its GPU


@functools.cache
def store() -> Any:
    """torchrun's store of keys and values, which all ranks share."""
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", RANK, WORLD)))[0]


def start(cuda: bool) -> None:
    """Joins the other ranks. Only rank 0 prints. A rank ends when torchrun is killed."""
    if WORLD == 1:
        return
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # a long timeout: the others wait while rank 0 downloads or encodes
    dist.init_process_group(backend, timeout=timedelta(hours=12), world_size=WORLD, rank=RANK,
                            store=store())
    if RANK:
        sys.stdout = open(os.devnull, "w", errors="replace")
    end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """From now on this process ends when its parent, the process with this id, has ended."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop() -> None:
    if WORLD > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def share(parts: Sequence[Any]) -> Sequence[Any]:
    """This rank's parts: number RANK, and every WORLD-th after it."""
    return parts[RANK::WORLD]


def together(done: list[Any]) -> list[Any]:
    """The results of all ranks, in the order of the parts. `done` has this rank's results, for its
    share of the parts; tensors in it must be on the CPU."""
    if WORLD == 1:
        return done
    import torch.distributed as dist

    shares: list[Any] = [None] * WORLD
    dist.all_gather_object(shares, done)
    return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def add_up(tensors: Sequence[Any]) -> None:
    """Each tensor becomes its sum over the ranks."""
    if WORLD > 1:
        import torch.distributed as dist

        for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
            work.wait()


def wait() -> None:
    """Returns when every rank has called it."""
    together([])


@contextmanager
def rank_0_first() -> Iterator[None]:
    """For a block that makes missing files: rank 0 runs it first, and the others find the files."""
    if RANK:
        wait()
    yield
    if not RANK:
        wait()


def first_to_fail() -> bool:
    """Whether no other rank has failed before. Then this rank prints its error."""
    try:
        return WORLD == 1 or store().add("failed", 1) == 1
    except Exception:  # torchrun is gone, and its store with it
        return True
