"""All figures but Figure 2 and the training curves, and the table beside them.

    python -m experiments.figures out/toy/frontier    what its frontier.jsonl allows, and table.md

Needs numpy and matplotlib alone. `degeneration` and `inspection` draw what lessons.py measures.
"""

import argparse
import sys
from pathlib import Path

# before the slow imports: Ctrl-C meanwhile is then one sentence
from support.runs import main_exit, write_whole

import numpy as np
from matplotlib.figure import Figure

from experiments.table import table, table_text
from plot_frontier import (KL, REWARD, STYLES, finish, frontier, plot_methods, plot_optimum,
                           plot_points, reliable_optimum, save_figure, seed_means, series,
                           weight_panel)
from support.points import read_points, setting_value


def draw_all(path: Path) -> list[Path]:
    """Every figure that a frontier.jsonl, or the one in a folder, allows: their paths.

    Prints the table too, and writes it to table.md. All files lie beside the frontier.jsonl.
    """
    points = read_points(path)
    folder = path if path.is_dir() else path.parent
    text = table_text(points, table(points))
    print(text)
    write_whole(folder / "table.md", lambda file: file.write(text.encode()))
    figures = {draw.__name__: draw(points) for draw in (
        frontier, temperature, dial, online)}
    paths = [save_figure(figure, folder / f"{name}.png")
             for name, figure in figures.items() if figure]
    return [*paths, save_figure(figures["frontier"], folder / "frontier.svg")]


# ------------------------------------------------------------------------------ of the frontier

def temperature(points: list[dict]) -> Figure | None:
    """Win rate against π_ref's samples over the policy's temperature; None if that is always 1."""
    curves = {}
    for p in sorted(points, key=lambda p: p["temperature"]):
        if p["win"] is not None and p["method"] in STYLES:
            curves.setdefault((p["method"], p["setting"], p["seed"], p["step"]), []).append(p)
    curves = {key: c for key, c in curves.items() if any(p["temperature"] != 1 for p in c)}
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    ax = figure.subplots()
    for (method, setting, *_), curve in curves.items():
        label, colour, marker, line = STYLES[method]
        at, win = np.array([(p["temperature"], p["win"]) for p in curve]).T
        ax.errorbar(at, win, np.sqrt(win * (1 - win) / len(curve[0]["rewards"])), color=colour,
                    marker=marker, ls=line, capsize=3, label=label + f", {setting}" * bool(setting))
    ax.axhline(0.5, color="grey", lw=1)
    ax.set(xlabel="sampling temperature of the policy",
           ylabel="share of prompts won against π_ref, by r*")
    return finish(figure, points, "π_ref's samples, on the same prompts, have temperature 1; a tie "
                  "counts as half a win. Bars: ± 1 standard error of a share.") if curves else None


def online(points: list[dict]) -> Figure | None:
    """DPO on the stored groups beside DPO on fresh ones, by r* and by its own r̂. None without
    these."""
    shown = {m: series(points, m) for m in ("dpo", "dpo-online", "dpo-self", "sft")}
    shown = {m: mine for m, mine in shown.items() if mine}
    if not shown.keys() & {"dpo-online", "dpo-self"}:
        return None
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    plot_methods(figure.subplots(), points, shown)
    return finish(figure, points, "Equal numbers of updates. Light: every point, ± 1 standard "
                  "error; lines: upper envelopes of the means over seeds.")


def dial(points: list[dict]) -> Figure | None:
    """Where DPO ends with each kind of label, and the optimum that soft and sampled ones have.

    s scales the rewards in a label's probability: s/β alone sets that optimum. None without such
    labels.
    """
    keys, figure = ("kl", "reward", "kl_se", "reward_se"), Figure((10.5, 6), layout="constrained")
    ends = {m: [dict(zip(keys, run[-1]), value=setting_value(setting))
                for setting, run in seed_means(series(points, m), *keys).items()
                if " rate=" not in setting]  # at the chosen rate alone
            for m in ("dpo", "dpo-sampled", "dpo-soft") if series(points, m)}
    every = sum(ends.values(), [])
    asked = {p["value"] for m, mine in ends.items() if m != "dpo" for p in mine}
    if not asked:
        return None
    ax = figure.subplots()
    rings = {setting_value(p["setting"]): p for p in reliable_optimum(points)}
    limit = plot_optimum(ax, points, every)
    for method, mine in ends.items():
        label, colour, _, _ = STYLES[method]
        shift = {"dpo": (8, 5), "dpo-soft": (-17, -13)}.get(method, (8, -13))
        plot_points(ax, mine, method, ms=7, label=label + ", hard labels" * (method == "dpo"))
        for p in mine:
            if p["kl"] <= limit:
                ax.annotate("β = " * (method == "dpo") + f"{p['value']:g}", (p["kl"], p["reward"]),
                            shift, textcoords="offset points", fontsize=9, color=colour,
                            bbox=dict(fc="white", lw=0, pad=0.5, alpha=0.8))
            if method != "dpo" and (ring := rings.get(p["value"])):
                ax.plot(*zip(*((x["kl"], x["reward"]) for x in (p, ring))), lw=0.9, color=colour)
    at = [(p["kl"], p["reward"]) for value, p in rings.items() if value in asked]
    ax.plot(*np.reshape(at, (-1, 2)).T, "ko", mfc="none", ms=12, label="the optimum at that s/β")
    lost, far = sorted(asked - {*rings}), sum(p["kl"] > limit for p in every)
    return finish(figure, points, "Last points, means over seeds, ± 1 standard error of one run. "
                  "Numbers: s/β, and β where labels are hard." + " No ring at "
                  f"{', '.join(f'{x:g}' for x in lost)}: the optimum is not reliable." * bool(lost)
                  + f" Past KL {limit:g} and not shown: {far}." * bool(far))


# ------------------------------------------------------------------------------ of the lessons

def degeneration(rows: list[dict], path: Path) -> None:
    """Eight panels over the steps of DPO, of the same loss with constant weight, and of the same
    without π_ref, to `path`.

    rows: dicts of weight, step and what the panels show; None where there is no such measure.
    """
    panels = [("kl", KL, "symlog"), ("ref_ppl", "perplexity under π_ref", "log"),
              ("logp_chosen", "log π(y_w), nats per completion", "linear"),
              ("logp_rejected", "log π(y_l), nats per completion", "linear"),
              ("repetition", "repeated trigrams, share", "linear"),
              ("eos", "completions that end, share", "linear"),
              ("grammatical", "grammatical sentences, share", "linear"),
              ("reward", "mean true reward r*", "linear")]
    weights = [look for look in (("sigmoid", "o-C0", "DPO: w = σ(-m)"),
                                 ("constant", "s--C3", "w = 1"),
                                 ("reference-free", "^-.C2", "no π_ref in the loss"))
               if look[0] in {row["weight"] for row in rows}]
    figure = Figure(figsize=(14, 6.8), layout="constrained")
    for ax, (key, label, axis) in zip(figure.subplots(2, 4).flat, panels):
        for weight, style, name in weights:
            points = [r for r in rows if r["weight"] == weight and r[key] is not None]
            ax.plot([r["step"] for r in points], [r[key] for r in points], style, ms=4, label=name)
        if not any(r[key] is not None for r in rows):
            ax.text(0.5, 0.5, "not defined on this corpus", ha="center", transform=ax.transAxes)
        ax.set(xlabel="step", ylabel=label, yscale=axis)
        if axis == "linear" and key not in ("logp_chosen", "logp_rejected"):
            ax.set_ylim(-0.03, 1.03)
        ax.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save_figure(figure, path, dpi=120)


def overoptimisation(rows: list[dict], optimum: list[dict], path: Path) -> None:
    """True and implicit reward over the steps, and true reward over KL, of DPO on fewer and more
    preferences, to `path`. optimum: points of Eq. 4's."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    true, implicit, plane = figure.subplots(1, 3)
    for name, style in zip(dict.fromkeys(row["run"] for row in rows), ("o-C3", "s--C1", "^-.C0")):
        step, reward, error, r_hat, kl = np.array(
            [[row[key] for key in ("step", "reward", "reward_se", "implicit", "kl")]
             for row in rows if row["run"] == name]).T
        true.errorbar(step, reward, error, fmt=style, ms=4, capsize=2, label=name)
        implicit.plot(step, r_hat, style, ms=4)
        plane.plot(kl, reward, style, ms=4)
    if best := sorted((p["kl"], p["reward"]) for p in optimum if p["ess"] >= 3):
        plane.plot(*zip(*best), "k-", lw=2.5, label="optimum, Eq. 4", zorder=0)
    true.set(title="what is wanted: r*", xlabel="step", ylabel=REWARD)
    implicit.set(title="what is trained: r̂", xlabel="step", yscale="symlog",
                 ylabel="mean r̂ = β log π/π_ref of own samples")
    plane.set(title="r* over KL", xlabel=KL, ylabel=REWARD, xscale="symlog", xlim=(0, None))
    for ax in (true, implicit, plane):
        ax.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=4)
    save_figure(figure, path, dpi=120)


def inspection(inspected: dict, metrics: list[dict], path: Path) -> None:
    """To `path`: the weight over training, and of held-out pairs weight and margin over r*'s gap.

    inspected: what inspect.json holds; metrics: the rows of the dpo run's metrics.jsonl.
    """
    pairs = inspected["pairs"]
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    a, b, c = figure.subplots(1, 3)
    weight_panel(a, [r for r in metrics if "eval" not in r])
    a.set(xlabel="step", title="training pairs")
    for ax, key, label in ((b, "weight", "importance weight w"),
                           (c, "margin", "implicit margin m = r̂(y_w) - r̂(y_l)")):
        for wrong, style, name in ((False, "oC0", "in the order of r*"),
                                   (True, "xC3", "in the wrong order")):
            some = [(p["reward_gap"], p[key]) for p in pairs if (p["margin"] < 0) == wrong]
            ax.plot(*np.reshape(some, (-1, 2)).T, style, ms=5, alpha=0.7, label=name)
        ax.set(xlabel="true reward gap r*(y_w) - r*(y_l)", ylabel=label)
    b.set_title(f"{len(pairs)} held-out pairs after {inspected['step']} steps")
    c.set_title("\n".join(
        f"{name}: accuracy {x['accuracy']:.3f}, rank correlation {x['rank_correlation']:.3f}"
        for name, x in (("r̂", inspected), ("r_φ", inspected.get("learned"))) if x), fontsize=10)
    for ax in (a, b, c):
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    save_figure(figure, path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description="Draw all "
                                     "figures of a frontier, print its table, write table.md.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("out/toy/frontier"),
                        help="a frontier.jsonl, or its folder (default: %(default)s)")
    print(*draw_all(parser.parse_args(argv).path), sep="\n")


if __name__ == "__main__":
    sys.exit(main_exit(main))
