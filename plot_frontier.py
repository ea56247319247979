"""Draws Figure 2, the reward-KL frontier, from a frontier.jsonl.

    python plot_frontier.py out/toy/frontier    frontier.png and frontier.svg
    python plot_frontier.py out/toy/dpo         curves.png

Needs numpy and matplotlib alone: it reads what the runs have written. A run's training curves stand
in support/curves.py, the table and all other figures in experiments/table.py and
experiments/figures.py.

n points, m values of KL, F folds of the P prompts.
"""

import argparse
import sys
import textwrap
from pathlib import Path

# before the slow imports: Ctrl-C during them then prints one sentence
from support.runs import UserError, main_exit, reading

import numpy as np
from matplotlib.figure import Figure  # without pyplot: it draws to files and opens no window

from support.curves import KL, REWARD, save_figure, training_curves
from support.points import read_points, setting_value

STYLES = {  # method: label, colour, marker, line; the colours also differ when printed in grey
    "dpo": ("DPO", "#00205c", "o", "-"),
    "plackett-luce": ("Plackett-Luce DPO", "#429fdc", "D", (0, (6, 1.5))),
    "ppo": ("PPO (learned reward)", "#f78b43", "s", "--"),
    "ppo-gt": ("PPO-GT (true reward)", "#a3101f", "^", "-."),
    "unlikelihood": ("Unlikelihood", "#2c7f3a", "v", ":"),
    "preferred-ft": ("Preferred-FT", "#58217f", "P", (0, (1, 1))),
    "best-of-n": ("Best-of-N by r*", "#96775f", "X", (0, (3, 1, 1, 1, 1, 1))),
    "best-of-n-learned": ("Best-of-N by r_φ", "#e0bb3c", "h", (0, (4, 3))),
    "best-of-n-implicit": ("Best-of-N by DPO's r̂", "#a83279", "p", (0, (2, 2))),
    "sft": ("SFT = π_ref", "#000000", "*", "-"),
    "dpo-soft": ("DPO on soft labels", "#a3101f", "^", "-."),
    "dpo-sampled": ("DPO on sampled labels", "#f78b43", "s", "--"),
    "dpo-online": ("online DPO (labels by r*)", "#a3101f", "^", "-."),
    "dpo-self": ("online DPO (labels by its own r̂)", "#f78b43", "s", "--")}
FOLDS = 5  # parts of the prompts: mixtures are chosen on four of them and measured on the fifth


# ------------------------------------------------------------------------------ the points

def kl_range(preset: str) -> tuple[tuple, int, int]:
    """KLs in nats: those of the table, the largest one compared, and the end of the figure."""
    return ((1, 2, 3), 3, 5) if preset == "toy" else ((1, 2, 3, 5, 10), 10, 20)


def series(points: list[dict], method: str) -> list[dict]:
    """A method's points at temperature 1. Only these belong to the frontier."""
    return [p for p in points if p["method"] == method and p["temperature"] == 1]


def reference(points: list[dict]) -> dict:
    """π_ref's own point, where every curve starts. UserError without it."""
    if sft := series(points, "sft"):
        return sft[0]
    raise UserError("the frontier has no point of sft, where every curve starts: run `python "
                    "train.py --stage frontier`")


def reliable_optimum(points: list[dict], method: str = "optimum") -> list[dict]:
    """The points of the optimum (or of score-tilt) with at least 3 effective samples per prompt,
    sorted by KL."""
    return sorted((p for p in series(points, method) if (p["ess"] or 0) >= 3),
                  key=lambda p: p["kl"])


def seed_means(points: list[dict], *keys: str) -> dict[str, np.ndarray]:
    """setting -> (steps, keys): means over seeds, as of a policy whose seed is drawn at random."""
    runs = {}
    for p in sorted(points, key=lambda p: (setting_value(p["setting"]), p["step"])):
        runs.setdefault(p["setting"], {}).setdefault(p["step"], []).append([p[k] for k in keys])
    return {setting: np.array([np.mean(x, 0) for x in steps.values()])
            for setting, steps in runs.items()}


def envelope(kl, reward, at, start, flat: bool = False, judges=None) -> np.ndarray:
    """The best mean reward that mixtures of π_ref and the policies have at given KLs, in nats.

    kl, reward (..., n): the policies, NaN where one is missing; at (m,) or (..., m): the KLs;
    start (...): π_ref's reward. Returns (..., m): the upper concave hull, constant after its
    maximum. Unless `flat`, it is NaN past the largest KL, where nothing was measured.
    Mixtures reach the hull: choose one of two policies at random for each prompt. The mean reward
    lies on the straight line between the two points. The KL is convex, so it is not larger there.
    The hull of noisy points is too high, because it is a maximum over noise. judges: kl, reward and
    start of the same policies on other prompts. Then kl and reward choose the mixtures, and judges
    measure them without this bias. If a mixture has another KL on those prompts, its reward is
    corrected to `at` along the slope of the hull.
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
    while True:  # from π_ref, go to the point of steepest rise, until no point is higher
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


def means(counts, values) -> np.ndarray:
    """Means of values (n, P) over the prompts, weighted by counts (..., P) -> (..., n)."""
    return counts @ np.asarray(values).T / counts.sum(-1, keepdims=True)


def fold_counts(P: int, bootstrap: int = 0, rng=None) -> np.ndarray:
    """How often each prompt counts outside and inside each fold: (2, F, 1 + bootstrap, P).

    Replicate 0 is the sample itself. In the others `rng` draws each fold's prompts again.
    """
    F = min(FOLDS, P)
    folds = np.zeros((F, 1 + bootstrap, P))
    for i, fold in enumerate(folds):
        n = len(range(i, P, F))
        fold[0, i::F] = 1
        if bootstrap:
            fold[1:, i::F] = rng.multinomial(n, np.full(n, 1 / n), bootstrap)
    return np.stack([folds.sum(0) - folds, folds])


def cross_fit(kl, reward, start, at, ideal: bool) -> np.ndarray:
    """The gain over π_ref at KLs `at` (m,): of a method's best mixtures, or (ideal) of its points.

    kl, reward (2, F, ..., n), start (2, F, ...): means outside and inside each fold. Mixtures are
    chosen outside a fold and measured inside it. Returns (..., m), means over folds.
    """
    if ideal:
        values = np.apply_along_axis(lambda x: np.interp(at, *np.split(x, 2), left=np.nan), -1,
                                     np.concatenate([kl[1], reward[1]], -1))  # (F, ..., m)
    else:  # flat: outside a fold the largest KL may be below `at`
        values = envelope(kl[0], reward[0], at, start[0], flat=True,
                          judges=(kl[1], reward[1], start[1]))
    return (values - start[1][..., None]).mean(0)


# ------------------------------------------------------------------------------ Figure 2

def frontier(points: list[dict]) -> Figure:
    """Figure 2. On the left reward against KL: the points and the envelope of each method, and the
    optimum. On the right each method's share of the optimal gain, and the points of all trained
    policies, also at larger KLs."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    shown = {m: mine for m in STYLES if not m.startswith("dpo-") and (mine := series(points, m))}
    ax, share, far = figure.subplot_mosaic("AB;AC", width_ratios=(3, 2)).values()
    limit = plot_methods(ax, points, shown)
    ax.set_title("Reward against KL: the higher at the same KL, the better")
    plot_shares(share, points, shown)
    for method, mine in shown.items():
        if method != "sft" and not method.startswith("best-of-n"):
            plot_points(far, [p for p in mine if p["kl"] > 0.1], method, ms=4, label=None)
    for setting, steps in seed_means(shown.get("dpo", []), "kl", "reward").items():
        if steps[-1, 0] > limit and " rate=" not in setting:  # among them the paper's 0.05 and 0.1
            far.annotate(f"β = {setting_value(setting):g}", steps[-1], (steps[-1, 0], 0.22),
                         textcoords=("data", "axes fraction"), rotation=90, ha="center", va="top",
                         fontsize=8, color=STYLES["dpo"][1], arrowprops=dict(
                             arrowstyle="-", lw=0.6, color=STYLES["dpo"][1]))
    if best := [p for p in reliable_optimum(points) if p["kl"] > 0.1]:
        far.plot(*([p[key] for p in best] for key in ("kl", "reward")), "k-", lw=3)
    far.axvline(limit, color="grey", lw=1, ls=":", label="where the left panel ends")
    far.set(xscale="log", xlabel=KL, ylabel=REWARD, title="All trained policies, also at large KL")
    return finish(figure, sum(shown.values(), []), "Faint: every evaluation, ± 1 standard error. "
                  "Lines: the best mixtures of a method's policies, means over seeds. The share's "
                  "mixtures are chosen on four fifths of the prompts and judged on the rest (95 % "
                  "intervals: table.md). Best-of-N is drawn at KL log N - (N-1)/N, an upper bound.")


def plot_shares(ax, points: list[dict], shown: dict[str, list[dict]]) -> None:
    """Draw each method's (r - r_ref) / (r_opt - r_ref), cross-fitted as in the table, at KLs where
    the optimum is reliable. Near KL 0 both gains vanish, so nothing is drawn there."""
    P, best = len(points[0]["kls"]), reliable_optimum(points)
    counts = fold_counts(P)[:, :, 0]  # (2, F, P)
    start = means(counts, [reference(points)["rewards"]])[..., 0]
    at = np.arange(30, 100 * max((p["kl"] for p in best), default=0), 5) / 100

    def gain(mine, ideal=False):
        x = np.concatenate([*seed_means(mine, "kls", "rewards").values()])  # (n, 2, P)
        kl, reward = means(counts, x[:, 0]), means(counts, x[:, 1])
        return np.where(at > x[:, 0].mean(1).max(), np.nan, cross_fit(kl, reward, start, at, ideal))

    largest = gain(best, ideal=True) if best else None
    for method, mine in shown.items():
        if best and method != "sft":
            _, colour, _, line = STYLES[method]
            ax.plot(at, gain(mine) / largest, color=colour, ls=line, lw=1.8)
    ax.axhline(1, color="k", lw=3)
    ax.set(xlabel=KL, ylabel="(r - r_ref) / (r_opt - r_ref)",
           title="Who is ahead: share of the optimal gain")


def plot_methods(ax, points: list[dict], shown: dict[str, list[dict]]) -> float:
    """Draw the optimum, and each method's points and envelope -> the KL at which the axes end."""
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
    """Draw a method's points with standard errors in both directions."""
    label, colour, marker, _ = STYLES[method]
    x, y, dy, dx = ([p[key] for p in points] for key in ("kl", "reward", "reward_se", "kl_se"))
    ax.errorbar(x, y, dy, dx, fmt=marker, color=colour, elinewidth=0.8,
                **dict(label=label) | style)


def plot_optimum(ax, points: list[dict], shown: list[dict]) -> float:
    """Draw the optimum, hatch what is above, fit the axes to `shown` -> the KL where they end."""
    end = kl_range(points[0]["preset"])[2]
    limit = min(end, 1.05 * max((p["kl"] for p in shown if p["kl"] <= end), default=0) or end)
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
    """Add grids, a legend beside the axes, and below them the caption and `text`."""
    for ax in figure.axes:
        ax.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9, handlelength=3.6)
    lines = textwrap.wrap(f"{caption(points)} {text}", int(13 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize=8.5, x=0.01, ha="left")
    return figure


def caption(points: list[dict]) -> str:
    """The experiment that made these points: preset, model, test prompts, seeds by method."""
    p, seeds, same = points[0], {}, {}
    for x in points:
        method = x["method"]
        if method in STYLES and method != "sft" and not method.startswith("best-of-n"):
            name = "learning rates not chosen" if " rate=" in x["setting"] else STYLES[method][0]
            seeds.setdefault(name, set()).add(x["seed"])
    for name, mine in seeds.items():
        same.setdefault(", ".join(map(str, sorted(mine))), []).append(name)
    usual = max(same, key=lambda mine: len(same[mine]), default="")
    others = "".join(f"; {', '.join(names)}: {mine}" for mine, names in same.items()
                     if mine != usual)
    return (f"Preset {p['preset']}, {p['model']}; {len(p['rewards'])} test prompts." + bool(same) *
            f" Seeds: {usual}{others}. A seed sets the order of batches and the rollouts; π_ref and"
            " the pairs are the same in all runs.")


# ------------------------------------------------------------------------------ the command

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw Figure 2 from a frontier's folder, or the training curves of a run.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("out/toy/frontier"),
                        help="a frontier.jsonl, its folder, or the folder of a dpo or ppo run "
                        "(default: %(default)s)")
    args = parser.parse_args(argv)
    with reading(args.path):
        folder = args.path if args.path.is_dir() else args.path.parent
        is_run = (args.path / "metrics.jsonl").is_file() and \
            not (args.path / "frontier.jsonl").exists()  # a frontier's folder holds both files
    if is_run:
        print(training_curves(folder))
        return
    figure = frontier(read_points(args.path))
    for name in ("frontier.png", "frontier.svg"):
        print(save_figure(figure, folder / name))
    print(f"for the table and the other figures: python -m experiments.figures {folder}")


if __name__ == "__main__":
    sys.exit(main_exit(main))
