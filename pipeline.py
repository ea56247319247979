"""What depends on what: the stages of `train.py --stage`, each built after its parents.

    reviews → sft → groups → dpo → inspect        r* (reward) judges the groups
                           dpo twice → degenerate
                           unlikelihood, preferred-ft
                           rm → ppo, best-of-n    r_φ; ppo-gt has r* in its place
                           all of them → frontier

A finished stage is found, an unfinished one goes on, a changed parent is refused (runs.py).
"""

import functools
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import dpo
import frontier
import lessons
import methods
import stages
from stages import OTHER_LOSSES, SETTINGS_OF, Context, report_method
from support.runs import Run, UserError, file_hash
from support.settings import Settings, belonging, check, parse
from train import STOP, Interrupted


class Stage(NamedTuple):
    make: Callable[[Context, Run], None]
    final: str = "model.pt"  # its last file, which marks it finished
    report: Callable[[Context], None] | None = None
    # the runs that it compares, made by a callback: (ctx, make_all) -> their folders' hashes
    compares: Callable[[Context, Callable], dict[str, str]] | None = None


STAGES = {
    "sft": Stage(stages.sft),
    "reward": Stage(stages.reward, report=stages.report_reward),
    "chosen": Stage(stages.chosen),
    "groups": Stage(stages.groups, "ref_logps.pt"),
    "dpo": Stage(stages.dpo_stage, report=functools.partial(report_method, stage="dpo")),
    "inspect": Stage(lessons.inspect_stage, "inspect.json", lessons.report_inspect),
    "degenerate": Stage(lessons.degenerate, "degenerate.json", lessons.report_degenerate,
                        lambda ctx, make: make([("dpo", s) for s in lessons.twins(ctx.s)])),
    "unlikelihood": Stage(stages.dpo_stage, report=functools.partial(
        report_method, stage="unlikelihood")),
    "preferred-ft": Stage(stages.dpo_stage, report=functools.partial(
        report_method, stage="preferred-ft")),
    "rm": Stage(methods.rm, report=methods.report_rm),
    "ppo": Stage(methods.ppo, report=functools.partial(report_method, stage="ppo")),
    "ppo-gt": Stage(methods.ppo_gt, report=functools.partial(report_method, stage="ppo-gt")),
    "best-of-n": Stage(methods.best_of_n, "samples.pt", methods.report_best_of_n),
    "frontier": Stage(frontier.frontier, "frontier.jsonl", frontier.report_frontier,
                      frontier.sweep),
}


def parents(stage: str, s: Settings) -> list[str]:
    """The stages whose files a stage reads."""
    if stage == "groups" and s.groups:
        return [] if s.reference else ["chosen"]
    if stage == "groups":
        return ["sft"] + (["reward"] if s.corpus == "imdb" and s.reward == "auto" else [])
    if stage == "chosen":
        return [] if s.init else ["sft"]
    if stage == "inspect":
        return ["dpo", "groups"]
    if stage in ("ppo", "best-of-n"):
        return ["groups", "rm"] + parents("groups", s)
    if stage in ("dpo", "degenerate", "rm", "ppo-gt", "frontier", *OTHER_LOSSES):
        return ["groups"] + parents("groups", s)
    return {"sft": [], "reward": ["sft"]}[stage]


def build(ctx: Context, stage: str, wanted: str) -> str:
    """Make a stage and, before it, the parents that are not there; the hash of its last file."""
    folder = ctx.folder(stage)
    if folder in ctx.built:
        return ctx.built[folder]
    run, spec = planned(ctx, stage, wanted), STAGES[stage]
    if run.finished:
        print(f"{stage}: found in {run.folder}")
    else:
        needed = "" if stage == wanted else f", which {wanted} needs"
        print(f"{stage}: making {run.folder}{needed}")
        began = time.perf_counter()
        if stage in ("dpo", *OTHER_LOSSES) and ctx.s.dpo_module:
            dpo.use_module(ctx.s.dpo_module)  # only now: the parents are nobody's exercise
        with run:
            spec.make(ctx, run)
        print(f"{stage}: done in {time.perf_counter() - began:.1f} s{outcome(run)}")
        if stage != wanted and spec.report:
            spec.report(ctx)
    ctx.built[folder] = file_hash(run.path(spec.final))
    return ctx.built[folder]


@contextmanager
def fits(stage: str):
    """A GPU's want of memory becomes a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{stage}, or what it needs, does not fit the GPU: give a smaller model or "
                        "--max-new, to sft and dpo a higher --sft-accum and --dpo-accum, to a "
                        "frontier --jobs 1") from None


def planned(ctx: Context, stage: str, wanted: str) -> Run:
    """The stage's run, its parents made: its identity is its settings and their hashes."""
    s, spec = ctx.s, STAGES[stage]
    if stage == "reward" and s.corpus == "toy":
        raise UserError("r* of the toy corpus is exact: there is nothing to train; go on with "
                        "--stage groups or --stage dpo")
    if stage == "chosen" and not s.groups:
        raise UserError("--stage chosen fine-tunes π_ref for a preference file: give --groups FILE")
    if stage in ("best-of-n", "frontier", "ppo-gt") and s.groups:
        raise UserError(f"--stage {stage} needs r*, and a preference file has none: leave --groups "
                        "out")
    if stage == "frontier" and s.dpo_module:
        raise UserError("--dpo-module would replace dpo.py's functions for every method of the "
                        "frontier: give it to --stage dpo")
    hashes = {p: build(ctx, p, wanted) for p in parents(stage, s)}
    if spec.compares:
        hashes |= spec.compares(ctx, functools.partial(make_all, ctx))
    if stage in ("groups", "chosen") and s.groups:
        hashes[s.groups] = file_hash(s.groups)
    if stage == "groups" and s.reference:
        hashes[s.reference] = weights_hash(s.reference)
        if not hashes[s.reference]:
            raise UserError(f"--reference {s.reference} is no run and no Hugging Face folder")
    if stage in ("sft", "chosen") and s.init:  # "": a name, whose weights do not change
        hashes[s.init] = weights_hash(s.init)
    if stage in ("dpo", *OTHER_LOSSES):  # a user's code is as much a parent as a checkpoint
        files = [s.dpo_module, s.weight.rpartition(":")[0]]
        hashes |= {path: file_hash(path) for path in files if path}
    hashes["data"] = ctx.data.identity
    about = dict(command=ctx.command, preset=ctx.preset, device=device_name(ctx.device),
                 threads=torch.get_num_threads(), torch=torch.__version__,
                 python=platform.python_version(), started=time.strftime("%Y-%m-%d %H:%M:%S"))
    return Run(ctx.folder(stage), belonging(s, SETTINGS_OF[stage]), hashes, spec.final, about)


def make_all(ctx: Context, wanted: list[tuple[str, Settings]], jobs: int = 1,
             done: Callable | None = None) -> dict[str, str]:
    """Build stages whose parents are there, `jobs` at once: the hashes of those that were made.

    done(stage, settings, error, found) hears of each as it ends: error is None or what the user
    can put right, and no run stops another unless `done` raises. Without it the error is raised.
    """
    runs = {(stage, settings): planned(ctx.beside(settings), stage, stage)
            for stage, settings in wanted}
    finished = [job for job, run in runs.items() if run.finished]
    missing, hashes = [job for job in runs if job not in finished], {}

    def ends(stage, settings, error=None, found=False):
        if isinstance(error, Interrupted) or error and not done:
            raise error
        if done:
            done(stage, settings, error, found)
        if not error:
            run = runs[stage, settings]
            hashes[run.folder.name] = file_hash(run.path(run.final))

    for stage, settings in finished:
        ends(stage, settings, found=True)
    if jobs == 1:
        for stage, settings in missing:
            ends(stage, settings, make_one(ctx.preset, settings, stage, ctx.command, bool(done)))
        return hashes
    with ProcessPoolExecutor(min(jobs, len(missing)) or 1, multiprocessing.get_context("spawn"),
                             worker_starts) as pool:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker's, until it has started
        futures = {pool.submit(make_one, ctx.preset, settings, stage, ctx.command, True):
                   (stage, settings) for stage, settings in missing}
        signal.signal(signal.SIGINT, heard)
        try:
            for future in as_completed(futures):
                ends(*futures[future], future.result())
        except BrokenProcessPool:
            raise UserError("a run was killed from outside, for want of memory perhaps: give a "
                            "lower --jobs; the same command goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return hashes


def make_one(preset: str, settings: Settings, stage: str, command: list[str],
             quiet: bool) -> UserError | Interrupted | None:
    """One run, in this process. What stops it is given back: exceptions cross processes badly."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        if quiet:  # a bar of the whole is drawn elsewhere
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        if settings.threads:
            torch.set_num_threads(settings.threads)
        try:
            with fits(stage):
                build(Context(preset, settings, command), stage, stage)
        except (UserError, Interrupted) as error:
            return error


def worker_starts() -> None:
    """Ctrl-C saves here too, and a worker whose parent was killed does not live on."""
    signal.signal(signal.SIGINT, stop)
    threading.Thread(daemon=True, target=lambda: (multiprocessing.parent_process().join(),
                                                  os._exit(1))).start()


def weights_hash(folder: str) -> str:
    """The hash of the weights in a run or a Hugging Face folder, "" where there are none."""
    for name in ("model.pt", "model.safetensors", "pytorch_model.bin"):
        if (path := Path(folder) / name).exists():
            return file_hash(path)
    return ""


def outcome(run: Run) -> str:
    """What a stage's last metrics say, in a few words."""
    losses = [r["eval"]["loss"] for r in run.metrics() if "loss" in r.get("eval", ())]
    return f"; validation loss {losses[-1]:.3f} nats/token" if losses else ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU"


def main(argv=None) -> int:
    began = time.perf_counter()
    STOP.clear()
    stage, preset, reason, settings = parse(argv, STAGES, torch.cuda.is_available())
    if stage in OTHER_LOSSES:
        settings = replace(settings, loss=stage)
        check(settings)
    if settings.dpo_module:
        dpo.own_functions(settings.dpo_module)
    dpo.load_weight(settings.weight)  # bad ones are refused before hours of parents
    if settings.groups:
        file_hash(settings.groups)
    print(f"preset {preset} ({reason}); stage {stage}", flush=True)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ctx = Context(preset, settings, sys.argv[1:] if argv is None else list(argv))
    previous = signal.signal(signal.SIGINT, stop)
    try:
        with fits(stage):
            build(ctx, stage, stage)
        if STAGES[stage].report:
            STAGES[stage].report(ctx)
    except Interrupted as e:
        print(f"\nstopped: {e}; the same command goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped at once; the same command goes on from the last checkpoint",
              file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, previous)
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def stop(signum, frame):
    if STOP:
        raise KeyboardInterrupt  # asked twice: at once
    STOP.append(True)
    print("\nstopping after this step; Ctrl-C again to stop at once", file=sys.stderr)
