"""JSONL in, figures out: the frontier and its table, training curves, the lessons' figures.

    python plot_frontier.py [out/toy/frontier]      draws what its frontier.jsonl holds
    python plot_frontier.py out/toy/dpo --groups out/toy/groups      draws the curves again

Needs numpy and matplotlib alone. Knows nothing of models: it reads what runs have written.

P prompts, n points, m values of KL, R bootstrap replicates (the first is the sample itself).
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure  # without pyplot: files, never windows

from points import (
    about,
    envelope,
    knob,
    read_points,
    reference,
    scale,
    seed_means,
    series,
    table,
    table_text,
    trusted,
)
from support.runs import UserError, main_exit, os_errors, read_json, read_rows, write_whole

SERIES = {  # name, colour, marker, line; the colours differ in lightness too, for print in grey
    "dpo": ("DPO", "#00205c", "o", "-"),
    "plackett-luce": ("DPO, Plackett-Luce", "#429fdc", "D", (0, (6, 1.5))),
    "ppo": ("PPO, learned reward", "#f78b43", "s", "--"),
    "ppo-gt": ("PPO-GT, true reward", "#a3101f", "^", "-."),
    "unlikelihood": ("Unlikelihood", "#2c7f3a", "v", ":"),
    "preferred-ft": ("Preferred-FT", "#58217f", "P", (0, (1, 1))),
    "best-of-n": ("Best-of-N by r*", "#96775f", "X", (0, (3, 1, 1, 1, 1, 1))),
    "best-of-n-learned": ("Best-of-N by r_φ", "#e0bb3c", "h", (0, (4, 3))),
    "sft": ("SFT = π_ref", "#000000", "*", "-"),
    "dpo-soft": ("DPO, soft labels", "#a3101f", "^", "-."),
    "dpo-sampled": ("DPO, sampled labels", "#f78b43", "s", "--")}
KL, REWARD = "KL(π ‖ π_ref), nats a completion", "mean true reward r*, from 0 to 1"


def training_curves(folder: Path, reference: Path) -> Path:
    """folder/curves.png: six panels over the steps of a dpo run.

    Reads folder/metrics.jsonl and the groups' reference.json. UserError where they are no run of
    dpo's, and where it cannot write.
    """
    rows = read_rows(folder / "metrics.jsonl")
    steps = [r for r in rows if "eval" not in r]
    if not steps or "weight_50" not in steps[0]:
        raise UserError(f"{folder} holds no run of dpo: give the folder of one, or a frontier's")
    evals = [dict(step=0, **read_json(Path(reference))["point"])]
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
    weight_panel(weight, steps)
    line(logps, "logp_chosen", "chosen", color="C2")
    line(logps, "logp_rejected", "rejected", color="C3", ls="--")
    logps.set(title="log-probs of the batch's completions: both may fall",
              ylabel="log π(y|x), nats a completion")
    line(accuracy, "accuracy", "pairs of the batch", color="C0")
    accuracy.set(title="accuracy of the implicit reward", ylabel="share of pairs in order")


def weight_panel(ax, steps: list[dict]) -> None:
    """Quantiles of a batch's importance weights, over the steps."""
    x = [r["step"] for r in steps]
    for low, high, shade in ((5, 95, 0.2), (25, 75, 0.35)):
        ax.fill_between(x, *(smooth([r[f"weight_{p}"] for r in steps]) for p in (low, high)),
                        color="C0", alpha=shade, lw=0, label=f"{low} to {high} % of pairs")
    ax.plot(x, smooth([r["weight_50"] for r in steps]), color="C0", label="median")
    ax.set(title="importance weight of a pair", ylabel="w(m)")


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
    for ax, (key, label, axis) in zip(fig.subplots(2, 4).flat, panels):
        for weight, style, name in (("sigmoid", "o-C0", "DPO: w = σ(-m)"),
                                    ("constant", "s--C3", "w = 1")):
            points = [r for r in rows if r["weight"] == weight and r[key] is not None]
            ax.plot([r["step"] for r in points], [r[key] for r in points], style, ms=4, label=name)
        if not any(r[key] is not None for r in rows):
            ax.text(0.5, 0.5, "not defined on this corpus", ha="center", transform=ax.transAxes)
        ax.set(xlabel="step", ylabel=label, yscale=axis)
        if axis == "linear" and key not in ("logp_chosen", "logp_rejected"):
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
    weight_panel(a, steps)
    a.set(xlabel="step", title="training pairs")
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
    judges = {"r̂": table} | ({"r_φ": table["learned"]} if "learned" in table else {})
    c.set_title("\n".join(f"{name}: accuracy {judge['accuracy']:.3f}, rank correlation "
                          f"{judge['rank_correlation']:.3f}"
                          for name, judge in judges.items()), fontsize=10)
    for ax in (a, b, c):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    write_whole(path, lambda file: fig.savefig(file, dpi=120))


def smooth(values: list[float]) -> np.ndarray:
    """A running mean over a twentieth of the run, shorter at its ends; a short run as it is."""
    kernel = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


# ------------------------------------------------------------------------------ the frontier

def draw_frontier(path: Path) -> list[Path]:
    """Every figure that a frontier.jsonl, or the folder that holds it, allows, and its table,
    printed and in table.md, all beside it. UserError where it cannot read or write."""
    path = path / "frontier.jsonl" if path.is_dir() else path
    points = read_points(path)
    text = table_text(points, table(points))
    print(text)
    write_whole(path.parent / "table.md", lambda file: file.write(text.encode()))
    figures = {draw.__name__: draw(points) for draw in (
        frontier, temperature, overoptimisation, dial)}
    pictures = {f"{name}.png": figure for name, figure in figures.items() if figure}
    pictures["frontier.svg"] = figures["frontier"]
    for name, figure in pictures.items():
        kind = dict(format="svg", metadata={"Date": None}) if name.endswith("svg") else \
            dict(format="png", dpi=130)
        with rc_context({"svg.hashsalt": "frontier"}):  # the same points give the same bytes
            write_whole(path.parent / name, lambda file: figure.savefig(file, **kind))
    return [path.parent / name for name in pictures]


def bars(ax, points: list[dict], method: str, **look) -> None:
    """A series' points, with standard errors in both directions."""
    label, colour, marker, _ = SERIES[method]
    x, y, dy, dx = ([p[key] for p in points] for key in ("kl", "reward", "reward_se", "kl_se"))
    ax.errorbar(x, y, dy, dx, fmt=marker, color=colour, elinewidth=0.8, **dict(label=label) | look)


def bound(ax, points: list[dict], shown: list[dict]) -> float:
    """The optimum, the hatched region above it, and axes for `shown` and it -> where KL ends."""
    end = scale(points[0]["preset"])[2]
    limit = min(end, 1.05 * max(p["kl"] for p in shown) or end)
    if best := [p for p in trusted(points) if p["kl"] <= limit]:
        kl, reward = ([p[key] for p in best] for key in ("kl", "reward"))
        ax.plot(kl, reward, "k-", lw=3, label="optimum, Eq. 4")
        ax.fill_between(kl, reward, 2, hatch="///", facecolor="#f6f6f6", edgecolor="#d0d0d0", lw=0,
                        label="above it: out of reach")
    rewards = [p["reward"] for p in shown if p["kl"] <= limit] or [p["reward"] for p in shown]
    low, high = min(rewards), max(rewards + [p["reward"] for p in best])
    pad = 0.06 * (high - low) + 0.005
    ax.set(xlim=(-0.015 * limit, limit), ylim=(low - pad, high + pad), xlabel=KL, ylabel=REWARD)
    return limit


def finish(figure: Figure, points: list[dict], text: str) -> Figure:
    """Grids, a legend beside the axes, and below them which experiment this is."""
    for ax in figure.axes:
        ax.grid(alpha=0.25 * bool(ax.get_xlabel()))  # a twin has none
    if not figure.axes[0].get_legend():
        figure.legend(loc="outside right upper", fontsize=9, handlelength=3.6)
    lines = textwrap.wrap(f"{about(points)}. {text}", int(13 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize=8.5, x=0.01, ha="left")
    return figure


def frontier(points: list[dict]) -> Figure:
    """Reward against KL: every series of Figure 2, its envelope, and the optimum above them."""
    shown = {m: mine for m in SERIES if not m.startswith("dpo-") and (mine := series(points, m))}
    figure, start, beyond = Figure(figsize=(11, 6.5), layout="constrained"), reference(points), []
    ax = figure.subplots()
    limit = bound(ax, points, sum(shown.values(), []))
    for method, mine in shown.items():
        label, colour, marker, line = SERIES[method]
        if method == "sft":
            bars(ax, mine, method, ms=13, zorder=4)
            continue
        bars(ax, mine, method, ms=4, alpha=0.3, label=None)
        kl, reward = np.concatenate(list(seed_means(mine, "kl", "reward").values())).T
        on = kl[reward >= envelope(kl, reward, kl, start["reward"]) - 1e-9]
        at = np.unique([0, *on[on < limit], min(limit, kl.max())])
        ax.plot(at, envelope(kl, reward, at, start["reward"]), color=colour, ls=line, lw=1.8, ms=6,
                marker=marker, markevery=np.flatnonzero(np.isin(at, on)).tolist(), label=label)
        if far := sum(p["kl"] > limit for p in mine):
            beyond.append(f"{far} of {label}")
    return finish(figure, points, "Light: every point, ± 1 standard error; lines: upper envelopes "
                  "of the means over seeds. Best-of-N stands at log N - (N-1)/N, a bound on its KL."
                  + f" Past KL {limit:g} and not shown: {', '.join(beyond)}." * bool(beyond))


def temperature(points: list[dict]) -> Figure | None:
    """Win rate against π_ref's samples over the temperature that the policy is sampled at."""
    curves = {}
    for p in sorted(points, key=lambda p: p["temperature"]):
        if p["win"] is not None and p["method"] in SERIES:
            curves.setdefault((p["method"], p["setting"], p["seed"], p["step"]), []).append(p)
    curves = {key: c for key, c in curves.items() if any(p["temperature"] != 1 for p in c)}
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    ax = figure.subplots()
    for (method, setting, _, _), curve in curves.items():
        label, colour, marker, line = SERIES[method]
        at, win = np.array([(p["temperature"], p["win"]) for p in curve]).T
        ax.errorbar(at, win, np.sqrt(win * (1 - win) / len(curve[0]["rewards"])), color=colour,
                    marker=marker, ls=line, capsize=3, label=label + f", {setting}" * bool(setting))
    ax.axhline(0.5, color="grey", lw=1)
    ax.set(xlabel="sampling temperature of the policy",
           ylabel="share of prompts won against π_ref, by r*")
    return finish(figure, points, "π_ref's samples, on the same prompts, have temperature 1; ties "
                  "are half won. Bars: ± 1 standard error of a share.") if curves else None


def overoptimisation(points: list[dict]) -> Figure | None:
    """True reward and the one trained by, over √KL: PPO's learned reward, DPO's implicit one."""
    figure, ref = Figure(figsize=(14, 6), layout="constrained"), reference(points)
    kinds = (("ppo", "mean learned reward r_φ", ref["reward_learned"] or 0),
             ("dpo", "mean implicit reward r̂ = β log π/π_ref", 0))
    runs = [seed_means([p for p in series(points, method) if p["reward_learned"] is not None],
                       "kl", "reward", "reward_learned") for method, *_ in kinds]
    for ax, (method, other, zero), lines in zip(figure.subplots(1, 2), kinds, runs):
        twin = ax.twinx()
        for (setting, run), (_, colour, marker, _) in zip(lines.items(), SERIES.values()):
            kl, true, trained = np.vstack([(0, ref["reward"], zero), run]).T
            ax.plot(np.sqrt(kl), true, color=colour, marker=marker, ms=5, label=setting)
            twin.plot(np.sqrt(kl), trained, ":", color=colour, marker=marker, ms=5, mfc="white")
        ax.plot([], [], "ko-", label="true (left)")
        ax.plot([], [], "ko:", mfc="white", label="trained by (right)")
        ax.set(title=SERIES[method][0], xlabel="√KL(π ‖ π_ref), √nats", ylabel=REWARD)
        twin.set_ylabel(other)
        ax.legend(fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return finish(figure, points, "Means over seeds, in the order of steps.") if any(runs) else None


def dial(points: list[dict]) -> Figure | None:
    """Where DPO ends with each kind of label, and the optimum that soft and sampled ones have."""
    keys, figure = ("kl", "reward", "kl_se", "reward_se"), Figure((10.5, 6), layout="constrained")
    ends = {m: [dict(zip(keys, run[-1]), knob=knob(setting))
                for setting, run in seed_means(series(points, m), *keys).items()]
            for m in ("dpo", "dpo-sampled", "dpo-soft") if series(points, m)}
    every = sum(ends.values(), [])
    asked = {p["knob"] for m, mine in ends.items() if m != "dpo" for p in mine}
    if not asked:
        return None
    ax, rings = figure.subplots(), {knob(p["setting"]): p for p in trusted(points)}
    limit = bound(ax, points, every)
    for method, mine in ends.items():
        colour = SERIES[method][1]
        shift = {"dpo": (8, 5), "dpo-soft": (-17, -13)}.get(method, (8, -13))
        bars(ax, mine, method, ms=7, label=SERIES[method][0] + ", hard labels" * (method == "dpo"))
        for p in mine:
            if p["kl"] <= limit:
                ax.annotate("β = " * (method == "dpo") + f"{p['knob']:g}", (p["kl"], p["reward"]),
                            shift, textcoords="offset points", fontsize=9, color=colour,
                            bbox=dict(fc="white", lw=0, pad=0.5, alpha=0.8))
            if method != "dpo" and (ring := rings.get(p["knob"])):
                ax.plot(*zip(*((x["kl"], x["reward"]) for x in (p, ring))), lw=0.9, color=colour)
    at = [(p["kl"], p["reward"]) for x, p in rings.items() if x in asked]
    ax.plot(*np.reshape(at, (-1, 2)).T, "ko", mfc="none", ms=12, label="the optimum at that s/β")
    lost, far = sorted(asked - {*rings}), sum(p["kl"] > limit for p in every)
    return finish(figure, points, "Last points, means over seeds, ± 1 standard error of one run. "
                  "Numbers: s/β, and β where labels are hard." + " No ring at "
                  f"{', '.join(f'{x:g}' for x in lost)}: the optimum is not trusted." * bool(lost)
                  + f" Past KL {limit:g} and not shown: {far}." * bool(far))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a frontier and print its table, or draw a "
                                     "dpo run's curves.png again.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("out/toy/frontier"),
                        help="a frontier.jsonl, its folder, or a dpo run's (default: %(default)s)")
    parser.add_argument("--groups", type=Path, default=Path("out/toy/groups"),
                        help="the groups that the dpo run learnt from (default: %(default)s)")
    args = parser.parse_args(argv)
    with os_errors("read", args.path):
        has = {name: (args.path / name).exists() for name in ("frontier.jsonl", "metrics.jsonl")}
        pictures = [training_curves(args.path, args.groups / "reference.json")] \
            if has["metrics.jsonl"] and not has["frontier.jsonl"] else draw_frontier(args.path)
    print(*pictures, sep="\n")


if __name__ == "__main__":
    sys.exit(main_exit(main))
