"""JSONL in, figures out: training curves, the lessons' figures. The frontier will be drawn here.

    python plot_frontier.py out/toy/dpo --groups out/toy/groups      draws the curves again

Needs numpy and matplotlib alone. Knows nothing of models: it reads what runs have written.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: files, never windows

from runs import main_exit, os_errors, write_whole


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def training_curves(folder: Path, reference: Path) -> Path:
    """folder/curves.png: six panels over the steps of a dpo run.

    Reads folder/metrics.jsonl and the groups' reference.json. UserError where it cannot write.
    """
    rows = read_rows(folder / "metrics.jsonl")
    steps = [r for r in rows if "eval" not in r]
    evals = [dict(step=0, **json.loads(Path(reference).read_text())["point"])]
    evals += [dict(step=r["step"] + 1, **r["eval"]) for r in rows if "eval" in r]
    fig = Figure(figsize=(13, 7.5), layout="constrained")
    axes = fig.subplots(2, 3)
    batch_panels(axes.flat[:5], steps)
    tested = [e for e in evals if e.get("accuracy") is not None]
    axes[1, 1].plot([e["step"] for e in tested], [e["accuracy"] for e in tested], "ko", ms=5,
                    label="held-out pairs")
    held_out_panel(axes[1, 2], evals)
    for ax in axes.flat:
        ax.set(xlabel="step")
        ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        ax.grid(alpha=0.25)
    name = "/".join(folder.resolve().parts[-2:])
    name = name if len(name) <= 70 else name[:69] + "…"
    fig.suptitle(f"{name}: lines without marks are running means over a "
                 "twentieth of the run")
    write_whole(folder / "curves.png", lambda file: fig.savefig(file, dpi=120))
    return folder / "curves.png"


def batch_panels(axes, steps: list[dict]) -> None:
    """What every step has logged: loss, r̂, weight, log π, accuracy."""
    loss, implicit, weight, logps, accuracy = axes
    x = [r["step"] for r in steps]

    def line(ax, key, label, **style):
        ax.plot(x, smooth([r[key] for r in steps]), label=label, **style)

    start = steps[0]["loss"]
    line(loss, "loss", "training", color="C0")
    loss.axhline(start, color="grey", ls=":",
                 label=f"where π = π_ref: {start:.4f} (Eq. 7: log 2)")
    loss.set(title="loss", ylabel="nats a pair (or a ranking)")
    line(implicit, "margin", "margin m, chosen - rejected", color="C0", ls="-.")
    line(implicit, "reward_chosen", "chosen", color="C2")
    line(implicit, "reward_rejected", "rejected", color="C3", ls="--")
    implicit.set(title="implicit rewards", ylabel="r̂ = β log π/π_ref, units of reward")
    for low, high, shade in ((5, 95, 0.2), (25, 75, 0.35)):
        weight.fill_between(x, *(smooth([r[f"weight_{p}"] for r in steps]) for p in (low, high)),
                            color="C0", alpha=shade, lw=0, label=f"{low} to {high} % of pairs")
    line(weight, "weight_50", "median", color="C0")
    weight.set(title="importance weight of a pair", ylabel="w(m)")
    line(logps, "logp_chosen", "chosen", color="C2")
    line(logps, "logp_rejected", "rejected", color="C3", ls="--")
    logps.set(title="log-probs of the batch's completions: both may fall",
              ylabel="log π(y|x), nats a completion")
    line(accuracy, "accuracy", "pairs of the batch", color="C0")
    accuracy.set(title="accuracy of the implicit reward", ylabel="share of pairs in order")


def held_out_panel(ax, evals: list[dict]) -> None:
    """KL, and on an axis of its own r* where there is one, with standard errors."""
    at = [e["step"] for e in evals]

    def points(ax, key, fmt, **style):
        return ax.errorbar(at, [e[key] for e in evals], [e[key + "_se"] for e in evals], fmt=fmt,
                           ms=5, capsize=3, **style)

    points(ax, "kl", "s--", color="C1", label="KL (left)")
    ax.set(title="samples on held-out prompts, ± standard error",
           ylabel="KL(π ‖ π_ref), nats a completion", ylim=(0, None))
    if evals[0]["reward"] is not None:
        twin = ax.twinx()
        points(twin, "reward", "o-", color="C0")
        twin.set(ylabel="mean true reward r*, from 0 to 1", ylim=(0, 1))
        ax.errorbar([], [], [], fmt="o-", ms=5, color="C0", label="reward r* (right)")


def degeneration(rows: list[dict], path: Path) -> None:
    """Eight panels over the steps of DPO and its constant-weight twin, to `path`.

    rows: dicts of weight, step and what the panels show; None where there is no such measure.
    """
    panels = [("kl", "KL(π ‖ π_ref), nats a completion", "symlog"),
              ("ref_ppl", "perplexity under π_ref", "log"),
              ("logp_chosen", "log π(y_w), nats a completion", "linear"),
              ("logp_rejected", "log π(y_l), nats a completion", "linear"),
              ("repetition", "repeated trigrams, share", "linear"),
              ("eos", "completions that end, share", "linear"),
              ("grammatical", "grammatical sentences, share", "linear"),
              ("reward", "mean true reward r*", "linear")]
    fig = Figure(figsize=(14, 6.8), layout="constrained")
    for ax, (key, label, scale) in zip(fig.subplots(2, 4).flat, panels):
        for weight, style, name in (("sigmoid", "o-C0", "DPO: w = σ(-m)"),
                                    ("constant", "s--C3", "w = 1")):
            points = [r for r in rows if r["weight"] == weight and r[key] is not None]
            ax.plot([r["step"] for r in points], [r[key] for r in points], style, ms=4, label=name)
        ax.set(xlabel="step", ylabel=label, yscale=scale)
        if scale == "linear" and key not in ("logp_chosen", "logp_rejected"):
            ax.set_ylim(-0.03, 1.03)
        ax.grid(alpha=0.25)
    handles, names = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=2)
    write_whole(path, lambda file: fig.savefig(file, dpi=120))


def inspection(table: dict, metrics: list[dict], path: Path) -> None:
    """Three panels to `path`: the weight over training, the weight and the implicit margin of
    held-out pairs against their true reward gap. table: inspect.json; metrics: the dpo run's."""
    steps, pairs = [r for r in metrics if "eval" not in r], table["pairs"]
    fig = Figure(figsize=(14, 4.4), layout="constrained")
    a, b, c = fig.subplots(1, 3)
    x = [r["step"] for r in steps]
    for low, high, shade in ((5, 95, 0.2), (25, 75, 0.35)):
        a.fill_between(x, *(smooth([r[f"weight_{p}"] for r in steps]) for p in (low, high)),
                       color="C0", alpha=shade, lw=0, label=f"{low} to {high} % of pairs")
    a.plot(x, smooth([r["weight_50"] for r in steps]), color="C0", label="median")
    a.set(xlabel="step", ylabel="importance weight w", title="training pairs")
    gap = [p["reward_gap"] for p in pairs]
    for ax, key, label in ((b, "weight", "importance weight w"),
                           (c, "margin", "implicit margin m = r̂(y_w) - r̂(y_l)")):
        wrong = [p["margin"] < 0 for p in pairs]
        for is_wrong, style, name in ((False, "oC0", "in r*'s order"), (True, "xC3", "not")):
            at = [i for i, w in enumerate(wrong) if w == is_wrong]
            ax.plot([gap[i] for i in at], [pairs[i][key] for i in at], style, ms=5, alpha=0.7,
                    label=name)
        ax.set(xlabel="true reward gap r*(y_w) - r*(y_l)", ylabel=label)
    b.set_title(f"{len(pairs)} held-out pairs after {table['step']} steps")
    c.set_title(f"accuracy {table['accuracy']:.3f}, rank correlation within a prompt "
                f"{table['rank_correlation']:.3f}", fontsize=10)
    for ax in (a, b, c):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    write_whole(path, lambda file: fig.savefig(file, dpi=120))


def smooth(values: list[float]) -> np.ndarray:
    """A running mean over a twentieth of the run, shorter at its ends; a short run as it is."""
    kernel = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a dpo run's curves.png again.")
    parser.add_argument("run", nargs="?", type=Path, default=Path("out/toy/dpo"))
    parser.add_argument("--groups", type=Path, default=Path("out/toy/groups"),
                        help="the groups that it learnt from (default: %(default)s)")
    args = parser.parse_args(argv)
    with os_errors("read", args.run):
        print(training_curves(args.run, args.groups / "reference.json"))


if __name__ == "__main__":
    sys.exit(main_exit(main))
