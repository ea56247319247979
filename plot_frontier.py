"""JSONL in, figures out: Figure 2 (the reward-KL frontier), and the training curves of a DPO run.

    python plot_frontier.py out/toy/frontier                       frontier.png and frontier.svg
    python plot_frontier.py out/toy/dpo --groups out/toy/groups    curves.png

Needs numpy and matplotlib alone: it reads what the runs have written. The table and all other
figures stand in experiments/table.py and experiments/figures.py.

n points, m values of KL.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

# before the slow imports: Ctrl-C meanwhile is then one sentence
from support.runs import UserError, main_exit, reading, write_whole

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure  # without pyplot: it draws to files and opens no window

from support.points import read_curves, read_points, setting_value

STYLES = {  # method: label, colour, marker, line; the colours differ in grey print too
    "dpo": ("DPO", "#00205c", "o", "-"),
    "plackett-luce": ("DPO, Plackett-Luce", "#429fdc", "D", (0, (6, 1.5))),
    "ppo": ("PPO, learned reward", "#f78b43", "s", "--"),
    "ppo-gt": ("PPO-GT, true reward", "#a3101f", "^", "-."),
    "unlikelihood": ("Unlikelihood", "#2c7f3a", "v", ":"),
    "preferred-ft": ("Preferred-FT", "#58217f", "P", (0, (1, 1))),
    "best-of-n": ("Best-of-N by r*", "#96775f", "X", (0, (3, 1, 1, 1, 1, 1))),
    "best-of-n-learned": ("Best-of-N by r_φ", "#e0bb3c", "h", (0, (4, 3))),
    "best-of-n-implicit": ("Best-of-N by DPO's r̂", "#a83279", "p", (0, (2, 2))),
    "sft": ("SFT = π_ref", "#000000", "*", "-"),
    "dpo-soft": ("DPO, soft labels", "#a3101f", "^", "-."),
    "dpo-sampled": ("DPO, sampled labels", "#f78b43", "s", "--"),
    "dpo-online": ("online DPO, labels by r*", "#a3101f", "^", "-."),
    "dpo-self": ("online DPO, labels by its own r̂", "#f78b43", "s", "--")}
KL, REWARD = "KL(π ‖ π_ref), nats per completion", "mean true reward r*, from 0 to 1"


# ------------------------------------------------------------------------------ the points

def kl_range(preset: str) -> tuple[tuple, int, int]:
    """In nats: the table's KLs, the KL up to which methods are compared, the figure's end."""
    return ((1, 2, 3), 3, 5) if preset == "toy" else ((1, 2, 3, 5, 10), 10, 20)


def series(points: list[dict], method: str) -> list[dict]:
    """A method's points at temperature 1, which make the frontier."""
    return [p for p in points if p["method"] == method and p["temperature"] == 1]


def reference(points: list[dict]) -> dict:
    """π_ref's own point, where every curve starts. UserError without it."""
    if sft := series(points, "sft"):
        return sft[0]
    raise UserError("the frontier has no point of sft, where every curve starts: run `python "
                    "train.py --stage frontier`")


def reliable_optimum(points: list[dict], method: str = "optimum") -> list[dict]:
    """The points that rest on at least 3 effective samples per prompt, by KL: of the optimum, or of
    score-tilt."""
    return sorted((p for p in series(points, method) if (p["ess"] or 0) >= 3),
                  key=lambda p: p["kl"])


def seed_means(points: list[dict], *keys: str) -> dict[str, np.ndarray]:
    """setting -> (steps, keys), means over seeds: those of a policy drawn at random among them."""
    runs = {}
    for p in sorted(points, key=lambda p: (setting_value(p["setting"]), p["step"])):
        runs.setdefault(p["setting"], {}).setdefault(p["step"], []).append([p[k] for k in keys])
    return {setting: np.array([np.mean(x, 0) for x in steps.values()])
            for setting, steps in runs.items()}


def envelope(kl, reward, at, start, flat: bool = False, judges=None) -> np.ndarray:
    """The best mean reward that mixtures of π_ref and some policies have at given KLs, in nats.

    kl, reward (..., n): the policies, NaN where one is missing; at (m,) or (..., m): the KLs;
    start (...): π_ref's reward -> (..., m), the upper concave hull, flat after its top. It is NaN
    past the largest KL, where nothing was measured, unless `flat`.
    Let a coin choose between two policies for each prompt: the reward lies on the straight line
    between theirs, and the KL, being convex, is no larger than there. So mixtures reach the hull.
    The hull of noisy points lies too high, as every maximum does. judges: kl, reward, start of the
    same policies on other prompts. Then the mixtures are chosen by the former and judged by these,
    without that bias; if a mixture has another KL there, its reward goes along the hull to `at`.
    """
    def with_reference(kl, reward, start):  # two (..., n + 1)
        kl, reward = np.asarray(kl, float), np.asarray(reward, float)
        zero = np.zeros(kl.shape[:-1] + (1,))
        return (np.concatenate([zero, kl], -1),
                np.concatenate([zero + np.asarray(start)[..., None], reward], -1))

    def of(x, i):
        return np.take_along_axis(x, i, -1)

    kl, reward = with_reference(kl, reward, start)
    kl_there, reward_there = with_reference(*judges) if judges else (kl, reward)
    at, i = np.asarray(at, float), np.zeros(kl.shape[:-1] + (1,), int)  # i: π_ref, at first
    height = np.full(np.broadcast_shapes(kl.shape[:-1] + (1,), at.shape), np.nan)
    while True:  # from π_ref to the point of steepest rise, and on from there until none rises
        with np.errstate(divide="ignore", invalid="ignore"):
            k, r = of(kl, i), of(reward, i)
            slopes = np.where((kl > k) & (reward > r), (reward - r) / (kl - k), 0)  # (..., n + 1)
            slope = slopes.max(-1, keepdims=True)
            best = np.where(slope > 0, slopes.argmax(-1)[..., None], i)
            t = np.where(slope > 0, (at - k) / (of(kl, best) - k), 0)  # best's share of the mixture
        there = [of(x, i) + t * (of(x, best) - of(x, i)) for x in (kl_there, reward_there)]
        height = np.where(at >= k, there[1] + slope * (at - there[0]), height)
        if not slope.any():
            past = at > np.nanmax(kl, -1, keepdims=True)
            return np.where(past & (not flat), np.nan, height)
        i = best


# ------------------------------------------------------------------------------ Figure 2

def frontier(points: list[dict]) -> Figure:
    """Figure 2: reward against KL, each method's points and envelope, the optimum above them. On
    the right every trained policy's point, also those past the KLs of the left."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    shown = {m: mine for m in STYLES if not m.startswith("dpo-") and (mine := series(points, m))}
    ax, far = figure.subplots(1, 2, width_ratios=(2, 1))
    limit = plot_methods(ax, points, shown)
    for method, mine in shown.items():
        if method != "sft" and not method.startswith("best-of-n"):
            plot_points(far, [p for p in mine if p["kl"] > 0.1], method, ms=4, label=None)
    for setting, steps in seed_means(shown.get("dpo", []), "kl", "reward").items():
        if steps[-1, 0] > limit and " rate=" not in setting:  # where DPO's small βs end, among them the paper's 0.05 and 0.1
            far.annotate(f"β = {setting_value(setting):g}", steps[-1], (0, -15), ha="center",
                         fontsize=8, textcoords="offset points", color=STYLES["dpo"][1],
                         bbox=dict(fc="white", lw=0, pad=0.5, alpha=0.8))
    if best := [p for p in reliable_optimum(points) if p["kl"] > 0.1]:
        far.plot(*([p[key] for p in best] for key in ("kl", "reward")), "k-", lw=3)
    far.axvline(limit, color="grey", lw=1, ls=":")
    far.set(xscale="log", xlabel=KL, ylabel=REWARD, title="trained policies, also far out")
    return finish(figure, points, "Light: every point, ± 1 standard error; lines: upper envelopes "
                  "of the means over seeds. Best-of-N stands at log N - (N-1)/N, a bound on its "
                  "KL.")


def plot_methods(ax, points: list[dict], shown: dict[str, list[dict]]) -> float:
    """The optimum, and of each method its points and their envelope -> the KL where the axes
    end."""
    start, limit = reference(points)["reward"], plot_optimum(ax, points, sum(shown.values(), []))
    for method, mine in shown.items():
        if method == "sft":
            plot_points(ax, mine, method, ms=13, zorder=4)
            continue
        label, colour, marker, line = STYLES[method]
        plot_points(ax, mine, method, ms=4, alpha=0.3, label=None)
        kl, reward = np.concatenate(list(seed_means(mine, "kl", "reward").values())).T
        on = kl[reward >= envelope(kl, reward, kl, start) - 1e-9]
        at = np.unique([0, *on[on < limit], min(limit, kl.max())])
        ax.plot(at, envelope(kl, reward, at, start), color=colour, ls=line, lw=1.8, ms=6,
                marker=marker, markevery=np.flatnonzero(np.isin(at, on)).tolist(), label=label)
    return limit


def plot_points(ax, points: list[dict], method: str, **style) -> None:
    """A method's points, with standard errors in both directions."""
    label, colour, marker, _ = STYLES[method]
    x, y, dy, dx = ([p[key] for p in points] for key in ("kl", "reward", "reward_se", "kl_se"))
    ax.errorbar(x, y, dy, dx, fmt=marker, color=colour, elinewidth=0.8,
                **dict(label=label) | style)


def plot_optimum(ax, points: list[dict], shown: list[dict]) -> float:
    """The optimum, hatched above, in axes that fit it and `shown` -> the KL where they end."""
    end = kl_range(points[0]["preset"])[2]
    limit = min(end, 1.05 * max(p["kl"] for p in shown) or end)
    if best := [p for p in reliable_optimum(points) if p["kl"] <= limit]:
        kl, reward = ([p[key] for p in best] for key in ("kl", "reward"))
        ax.plot(kl, reward, "k-", lw=3, label="optimum, Eq. 4")
        ax.fill_between(kl, reward, 2, hatch="///", facecolor="#f6f6f6", edgecolor="#d0d0d0", lw=0,
                        label="above it: out of reach")
    if tilt := [p for p in reliable_optimum(points, "score-tilt") if p["kl"] <= limit]:
        ax.plot(*([p[key] for p in tilt] for key in ("kl", "reward")), "k--", lw=1.2,
                label="tilt by the score, logit r*")
    rewards = [p["reward"] for p in shown if p["kl"] <= limit] or [p["reward"] for p in shown]
    low, high = min(rewards), max(rewards + [p["reward"] for p in best])
    pad = 0.06 * (high - low) + 0.005
    ax.set(xlim=(-0.015 * limit, limit), ylim=(low - pad, high + pad), xlabel=KL, ylabel=REWARD)
    return limit


def finish(figure: Figure, points: list[dict], text: str) -> Figure:
    """Adds grids, a legend beside the axes, and below them the caption and `text`."""
    for ax in figure.axes:
        ax.grid(alpha=0.25 * bool(ax.get_xlabel()))  # an axis on the right has no x label
    if not figure.axes[0].get_legend():
        figure.legend(loc="outside right upper", fontsize=9, handlelength=3.6)
    lines = textwrap.wrap(f"{caption(points)}. {text}", int(13 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize=8.5, x=0.01, ha="left")
    return figure


def caption(points: list[dict]) -> str:
    """The experiment in one line: preset, model, the trained methods' seeds, test prompts.
    A seed changes the order of the batches, or the rollouts; π_ref and the pairs stay."""
    p, methods = points[0], {}  # seeds -> the methods that have them
    for method in STYLES:
        seeds = ", ".join(map(str, sorted({x["seed"] for x in series(points, method)})))
        if seeds and method != "sft" and not method.startswith("best-of-n"):
            methods.setdefault(seeds, []).append(method)
    usual = max(methods, key=lambda seeds: len(methods[seeds]), default="0")
    others = "".join(f" ({', '.join(names)}: {seeds})" for seeds, names in methods.items()
                     if seeds != usual)
    return (f"Preset {p['preset']}, {p['model']}; seed{'s' * (',' in usual)} {usual}{others}, of "
            f"batch order and rollouts alone (one π_ref, one set of pairs); {len(p['rewards'])} "
            "test prompts")


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """Writes a PNG or an SVG, as the path's ending says. Equal figures give equal bytes."""
    kind = dict(metadata={"Date": None}) if path.suffix == ".svg" else dict(dpi=dpi)
    with rc_context({"svg.hashsalt": "frontier"}):
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], **kind))
    return path


# ------------------------------------------------------------------------------ training curves

BATCH_PANELS = [  # title, y label, (logged key, label, style) of each line
    ("loss", "nats per pair (or per ranking)", [("loss", "training", "C0-")]),
    ("implicit rewards", "r̂ = β log π/π_ref, units of reward",
     [("margin", "margin m, chosen - rejected", "C0-."), ("reward_chosen", "chosen", "C2-"),
      ("reward_rejected", "rejected", "C3--")]),
    ("log-probs of the batch's completions: both may fall", "log π(y|x), nats per completion",
     [("logp_chosen", "chosen", "C2-"), ("logp_rejected", "rejected", "C3--")]),
    ("accuracy of the implicit reward", "share of pairs in order",
     [("accuracy", "pairs of the batch", "C0-")])]
LOGGED = [*(key for *_, lines in BATCH_PANELS for key, *_ in lines),
          *(f"weight_{p}" for p in (5, 25, 50, 75, 95))]  # in every step's row


def training_curves(folder: Path, reference_json: Path) -> Path:
    """folder/curves.png: six panels over the steps of a DPO run.

    reference_json: the groups' file. UserError if the folder holds no such run, or a damaged one.
    """
    steps, evals = read_curves(folder, reference_json, LOGGED)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    loss, implicit, weight, logps, accuracy, held_out = axes = figure.subplots(2, 3).ravel()
    for ax, (title, ylabel, lines) in zip((loss, implicit, logps, accuracy), BATCH_PANELS):
        for key, label, style in lines:
            ax.plot([r["step"] for r in steps], smooth([r[key] for r in steps]), style, label=label)
        ax.set(title=title, ylabel=ylabel)
    start = steps[0]["loss"]
    loss.axhline(start, color="grey", ls=":",
                 label=f"where π = π_ref: {start:.4f} (Eq. 7: log 2)")
    weight_panel(weight, steps)
    measured = [e for e in evals if e["accuracy"] is not None]
    accuracy.plot([e["step"] for e in measured], [e["accuracy"] for e in measured], "ko", ms=5,
                  label="held-out pairs")
    held_out_panel(held_out, evals)
    for ax in axes:
        ax.set(xlabel="step")
        ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        ax.grid(alpha=0.25)
    name = re.sub(r"[^\w ./-]", "_", "/".join(folder.resolve().parts[-2:]))
    name = name if len(name) <= 70 else name[:69] + "…"
    figure.suptitle(f"{name}: lines without marks are running means over a twentieth of the run")
    return save_figure(figure, folder / "curves.png", dpi=120)


def weight_panel(ax, steps: list[dict]) -> None:
    """Quantiles of a batch's importance weights, over the steps."""
    x = [r["step"] for r in steps]
    for low, high, shade in ((5, 95, 0.2), (25, 75, 0.35)):
        ax.fill_between(x, *(smooth([r[f"weight_{p}"] for r in steps]) for p in (low, high)),
                        color="C0", alpha=shade, lw=0, label=f"{low} to {high} % of pairs")
    ax.plot(x, smooth([r["weight_50"] for r in steps]), color="C0", label="median")
    ax.set(title="importance weight of a pair", ylabel="w(m)")


def held_out_panel(ax, evals: list[dict]) -> None:
    """KL and, on an axis of its own, r* where the data has one, both with standard errors."""
    def line(ax, key, style, label=None):
        columns = [[e[x] for e in evals] for x in ("step", key, key + "_se")]
        ax.errorbar(*np.array(columns, float), fmt=style, ms=5, capsize=3, label=label)

    line(ax, "kl", "C1s--", "KL (left)")
    ax.set(title="samples on held-out prompts, ± standard error", ylabel=KL, ylim=(0, None))
    if evals[0]["reward"] is not None:
        right = ax.twinx()
        line(right, "reward", "C0o-")
        right.set(ylabel=REWARD, ylim=(0, 1))
        ax.errorbar([], [], [], fmt="C0o-", ms=5, label="reward r* (right)")


def smooth(values: list[float]) -> np.ndarray:
    """A running mean over a twentieth of the run, shorter at both ends of it."""
    kernel = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw Figure 2 from a frontier's folder, or the training curves of a dpo run.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("out/toy/frontier"),
                        help="a frontier.jsonl, its folder, or a dpo run's (default: %(default)s)")
    parser.add_argument("--groups", type=Path, default=Path("out/toy/groups"),
                        help="the groups that the dpo run learned from (default: %(default)s)")
    args = parser.parse_args(argv)
    with reading(args.path):
        folder = args.path if args.path.is_dir() else args.path.parent
        is_run = (args.path / "metrics.jsonl").is_file() and \
            not (args.path / "frontier.jsonl").exists()  # a sweep logs beside its points
    if is_run:
        print(training_curves(folder, args.groups / "reference.json"))
        return
    figure = frontier(read_points(args.path))
    for name in ("frontier.png", "frontier.svg"):
        print(save_figure(figure, folder / name))
    print(f"for the table and the other figures: python -m experiments.figures {folder}")


if __name__ == "__main__":
    sys.exit(main_exit(main))
