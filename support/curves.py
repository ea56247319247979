"""The training curves of a DPO or PPO run, and what all figures share: axis labels, save_figure.

It reads the files of the run, and needs numpy and matplotlib alone.
"""

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from support.points import read_curves
from support.runs import write_whole

KL, REWARD = "KL(π ‖ π_ref), nats per completion", "mean true reward r*, from 0 to 1"


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """Write a PNG or an SVG, by the path's suffix. Equal figures give equal bytes."""
    kind = dict(metadata={"Date": None}) if path.suffix == ".svg" else dict(dpi=dpi)
    with rc_context({"svg.hashsalt": "frontier"}):
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], **kind))
    return path


def training_curves(folder: Path) -> Path:
    """Draw folder/curves.png: reward against KL, and four panels over the steps.

    UserError if the folder holds no DPO or PPO run, or a damaged one.
    """
    run, steps, evals, optimum = read_curves(folder)
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    way, *panels = figure.subplot_mosaic("abc;ade").values()
    method, _, others = run["title"].partition("; ")
    if len(others) < 50:  # a longer list of settings stands in the caption
        method, others = run["title"], ""
    title = f"{method}: {reward_against_kl(way, evals, optimum)}"
    if "beta" in run:
        dpo_panels(panels, steps, evals, run["loss"], run["beta"], run["num_completions"])
    else:
        score = {"ppo": "r_φ", "ppo-gt": "r*"}.get(run["stage"], "reward")
        ppo_panels(panels, steps, score, run["ppo_target"])
    for ax in figure.axes:
        high = ax.get_subplotspec().rowspan.stop - ax.get_subplotspec().rowspan.start
        ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16 / high))
        ax.grid(alpha=0.25)
    name = "/".join(folder.resolve().parts[-2:])
    caption = "; ".join(filter(None, [name, others, "lines without marks are running means over a "
                                      "twentieth of the run"]))
    title, caption = ("\n".join(textwrap.wrap(  # what is not printable cannot be drawn
        "".join(c if c.isprintable() else "_" for c in text), width, break_on_hyphens=False))
        for text, width in ((title, 100), (caption, 210)))
    figure.suptitle(title, fontsize=14, parse_math=False)
    figure.supxlabel(caption, fontsize=8.5, x=0.01, ha="left", parse_math=False)
    return save_figure(figure, folder / "curves.png", dpi=120)


def reward_against_kl(ax, evals: list[dict], optimum: list[dict]) -> str:
    """Draw the evaluations, joined in the order of the steps, and the optimum. Without r*, draw KL
    over the steps. Returns the first and last values as text."""
    first, last = evals[0], evals[-1]
    look = dict(fmt="C0o-", capsize=3, label="samples on held-out prompts")
    step, kl, kl_se, reward, reward_se = ([e[key] for e in evals] for key in (
        "step", "kl", "kl_se", "reward", "reward_se"))
    if last["reward"] is None:
        ax.errorbar(step, kl, kl_se, **look)
        ax.set(title="How far π_θ goes from π_ref", xlabel="step", ylabel=KL, ylim=(0, None))
        return f"KL 0 → {last['kl']:.3g} nats"
    if best := [(p["kl"], p["reward"]) for p in optimum if p["kl"] <= 1.3 * max(kl)]:
        ax.plot(*zip(*best), "k-", lw=3, label="optimum, Eq. 4")
    ax.errorbar(kl, reward, reward_se, kl_se, **look)
    ax.annotate(f"step {last['step']}", (last["kl"], last["reward"]), (-6, 8), ha="right",
                textcoords="offset points", fontsize=9,
                bbox=dict(fc="white", lw=0, pad=0.5, alpha=0.8))
    ax.set(title="The nearer to the optimum, the better", xlabel=KL, ylabel=REWARD,
           xscale="symlog" if max(kl) > 20 else "linear")
    return f"reward {first['reward']:.3f} → {last['reward']:.3f} at KL {last['kl']:.3g} nats"


def dpo_panels(axes, steps: list[dict], evals: list[dict], loss: str, beta: float, K: int) -> None:
    """Loss, r̂/β of chosen and rejected completions, importance weight, and accuracy."""
    first, log, weight, accuracy = axes
    for row in steps:  # the loss without π_ref has r̂ = β log π
        row |= dict(gap=row["margin"] / beta, chosen=row["reward_chosen"] / beta,
                    rejected=row["reward_rejected"] / beta)
    unit = "ranking" if loss == "plackett-luce" else "pair"
    plot_steps(first, steps, "Loss", f"nats per {unit}", [("loss", "training", "C0-")])
    start = steps[0]["loss"]
    name, value = {"pairwise": (" = log 2", math.log(2)), "plackett-luce": (
        " = log K!", math.lgamma(K + 1))}.get(loss, ("", math.inf))
    name *= math.isclose(start, value, abs_tol=1e-3)
    first.axhline(start, color="grey", ls=":",
                  label=f"first step, π = π_ref: {round(start, 4) + 0:g}{name}")
    plot_steps(log, steps, "At the end", "r̂/β = log π" + " - log π_ref" * (
        loss != "reference-free") + ", nats", [("gap", "gap", "C0-."), (
            "chosen", "chosen", "C2-"), ("rejected", "rejected", "C3--")])
    plot_weights(weight, steps)
    plot_steps(accuracy, steps, "Pairs that r̂ puts in order", "share of pairs",
               [("accuracy", "pairs of the batch", "C0-")])
    measured = [e for e in evals if e["accuracy"] is not None]
    accuracy.plot([e["step"] for e in measured], [e["accuracy"] for e in measured], "ko", ms=5,
                  label="held-out pairs")


def ppo_panels(axes, steps: list[dict], score: str, target: float) -> None:
    """Reward and KL of the rollouts, explained variance and clipped share, and β."""
    reward, kl, shares, beta = axes
    plot_steps(reward, steps, f"Reward that PPO maximises, {score}", f"mean {score}",
               [("reward", "rollouts", "C0-")])
    plot_steps(kl, steps, "KL of the rollouts", KL, [("kl", "rollouts", "C0-")])
    if target:
        kl.axhline(target, color="grey", ls=":", label="target")
    plot_steps(shares, steps, "At the end", "share (of variance, of tokens)", [
        ("explained_variance", "explained variance", "C0-"), ("clip_fraction", "clipped", "C3--")])
    plot_steps(beta, steps, "β of Eq. 3", "units of reward per nat", [("beta", "β", "C0-")])


def plot_steps(ax, steps: list[dict], title: str, ylabel: str, lines) -> None:
    """Draw logged columns over the steps: lines of (key, label, style). The title names the first
    and the last value of a single line, or the last values of several lines."""
    ends = []
    for key, label, style in lines:
        values = smooth([r[key] for r in steps])
        ax.plot([r["step"] for r in steps], values, style, label=label)
        ends.append(f"{label} {values[-1]:.3g}")
    if len(lines) == 1:
        ends = [f"{values[0]:.3g} → {values[-1]:.3g}"]
    ax.set_title(f"{title}: {', '.join(ends)}", fontsize=10.5)
    ax.set(xlabel="step", ylabel=ylabel)


def plot_weights(ax, steps: list[dict]) -> None:
    """Draw quantiles of the batch's importance weights over the steps."""
    plot_steps(ax, steps, "Median weight of a pair", "importance weight w(m), m = β gap",
               [("weight_50", "median", "C0-")])
    for low, high, shade in ((5, 95, 0.2), (25, 75, 0.35)):
        ax.fill_between([r["step"] for r in steps],
                        *(smooth([r[f"weight_{p}"] for r in steps]) for p in (low, high)),
                        color="C0", alpha=shade, lw=0, label=f"{low} to {high} % of pairs")


def smooth(values: list[float]) -> np.ndarray:
    """A running mean over a twentieth of the run. The window is shorter at both ends."""
    kernel = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
