"""Several processes as one run, as torchrun starts them: what is mine, and what all have together.

A process started alone is rank 0 of a world of 1: then nothing here does anything. Each rank runs
the same program on its share of the micro-batches and samples; rank 0 alone prints and writes.
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
    """The environment variable that torchrun has set; `alone` without torchrun."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


RANK, WORLD = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
LOCAL_RANK = from_torchrun("LOCAL_RANK", 0)  # the number of its GPU


@functools.cache
def store() -> Any:
    """torchrun's store of keys and values, which all ranks reach."""
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", RANK, WORLD)))[0]


def start(cuda: bool) -> None:
    """Joins the other ranks, of which rank 0 alone prints. A rank ends when torchrun is killed."""
    if WORLD == 1:
        return
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # the others wait as long as rank 0 may take to download or to encode
    dist.init_process_group(backend, timeout=timedelta(hours=12), world_size=WORLD, rank=RANK,
                            store=store())
    if RANK:
        sys.stdout = open(os.devnull, "w", errors="replace")
    end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """From now on this process ends when the process with this id, its parent, is killed."""
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
    """This rank's parts: every WORLD-th, from RANK on."""
    return parts[RANK::WORLD]


def together(done: list[Any]) -> list[Any]:
    """What all ranks have made of their shares, in the order of the parts. Tensors in it must be on
    the CPU."""
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
    """Until every rank is here."""
    together([])


@contextmanager
def rank_0_first() -> Iterator[None]:
    """A block that makes files where they are missing: the other ranks then find them."""
    if RANK:
        wait()
    yield
    if not RANK:
        wait()


def first_to_fail() -> bool:
    """Whether no other rank has failed before, so that this one says why."""
    try:
        return WORLD == 1 or store().add("failed", 1) == 1
    except Exception:  # torchrun is gone, and its store with it
        return True
