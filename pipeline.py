"""What depends on what: the stages of `train.py --stage`, each built after its parents.

    reviews → sft → groups → dpo → inspect        r* (reward) judges the groups
                           dpo twice → degenerate

A finished stage is found, an unfinished one goes on, a changed parent is refused (runs.py).
"""

import platform
import signal
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import dpo
import lessons
import stages
from presets import Settings, belonging, parse
from runs import Run, UserError, file_hash
from stages import SETTINGS_OF, Context
from train import STOP, Interrupted


class Stage(NamedTuple):
    make: Callable[[Context, Run], None]
    final: str = "model.pt"  # its last file, which marks it finished
    report: Callable[[Context], None] | None = None
    variants: Callable[[Settings], list[Settings]] | None = None  # of dpo, that it compares


STAGES = {
    "sft": Stage(stages.sft),
    "reward": Stage(stages.reward, report=stages.report_reward),
    "chosen": Stage(stages.chosen),
    "groups": Stage(stages.groups, "ref_logps.pt"),
    "dpo": Stage(stages.dpo_stage, report=stages.report_dpo),
    "inspect": Stage(lessons.inspect_stage, "inspect.json", lessons.report_inspect),
    "degenerate": Stage(lessons.degenerate, "degenerate.json", lessons.report_degenerate,
                        lessons.twins),
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
    if stage in ("dpo", "degenerate"):
        return ["groups"] + parents("groups", s)
    return {"sft": [], "reward": ["sft"]}[stage]


def build(ctx: Context, stage: str, wanted: str) -> str:
    """Make a stage and, before it, the parents that are not there; the hash of its last file."""
    folder = ctx.folder(stage)
    if folder in ctx.built:
        return ctx.built[folder]
    s = ctx.s
    if stage == "reward" and s.corpus == "toy":
        raise UserError("r* of the toy corpus is exact: there is nothing to train; go on with "
                        "--stage groups or --stage dpo")
    if stage == "chosen" and not s.groups:
        raise UserError("--stage chosen fine-tunes π_ref for a preference file: give --groups FILE")
    hashes = {p: build(ctx, p, wanted) for p in parents(stage, s)}
    for variant in STAGES[stage].variants(s) if STAGES[stage].variants else []:
        other = Context(ctx.preset, variant, ctx.command)
        other.built, other.data = ctx.built, ctx.data
        hashes[other.folder("dpo").name] = build(other, "dpo", wanted)
    if stage in ("groups", "chosen") and s.groups:
        hashes[s.groups] = file_hash(s.groups)
    if stage == "groups" and s.reference:
        hashes[s.reference] = weights_hash(s.reference)
        if not hashes[s.reference]:
            raise UserError(f"--reference {s.reference} is no run and no Hugging Face folder")
    if stage in ("sft", "chosen") and s.init:  # "": a name, whose weights do not change
        hashes[s.init] = weights_hash(s.init)
    if stage == "dpo":  # a user's code is as much a parent as a checkpoint
        files = [s.dpo_module, s.weight.rpartition(":")[0]]
        hashes |= {path: file_hash(path) for path in files if path}
        if s.dpo_module:  # only now: the parents are nobody's exercise
            dpo.use_module(s.dpo_module)
    hashes["data"] = ctx.data.identity
    settings, spec = belonging(s, SETTINGS_OF[stage]), STAGES[stage]
    about = dict(command=ctx.command, preset=ctx.preset, device=device_name(ctx.device),
                 threads=torch.get_num_threads(), torch=torch.__version__,
                 python=platform.python_version(), started=time.strftime("%Y-%m-%d %H:%M:%S"))
    run = Run(folder, settings, hashes, spec.final, about)
    if run.finished:
        print(f"{stage}: found in {run.folder}")
    else:
        needed = "" if stage == wanted else f", which {wanted} needs"
        print(f"{stage}: making {run.folder}{needed}")
        began = time.perf_counter()
        with run:
            spec.make(ctx, run)
        print(f"{stage}: done in {time.perf_counter() - began:.1f} s{outcome(run)}")
        if stage != wanted and spec.report:
            spec.report(ctx)
    ctx.built[folder] = file_hash(run.path(spec.final))
    return ctx.built[folder]


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
    if settings.dpo_module:
        dpo.own_functions(settings.dpo_module)
    dpo.load_weight(settings.weight)  # bad ones are refused before hours of parents
    print(f"preset {preset} ({reason}); stage {stage}", flush=True)
    ctx = Context(preset, settings, sys.argv[1:] if argv is None else list(argv))
    previous = signal.signal(signal.SIGINT, stop)
    try:
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
