"""All figures except Figure 2 and the training curves. `draw_all` also writes the table.

    python -m experiments.figures out/toy/frontier    every figure of frontier.jsonl, and table.md

Needs numpy and matplotlib alone. `degeneration`, `overoptimisation` and `inspection` draw what
lessons.py measures.
"""

import argparse
import sys
import textwrap
from pathlib import Path

# before the slow imports: Ctrl-C during them then prints one sentence
from support.runs import main_exit, write_whole

import numpy as np
from matplotlib.figure import Figure

from experiments.table import table, table_text
from plot_frontier import (STYLES, finish, frontier, plot_methods, plot_points, reliable_optimum,
                           seed_means, series)
from support.curves import KL, REWARD, plot_weights, save_figure
from support.points import read_points, setting_value


def draw_all(path: Path) -> list[Path]:
    """Draw every figure that a frontier.jsonl, or the one in a folder, allows -> their paths.

    Also prints the table and writes it to table.md. All files are put beside the frontier.jsonl.
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
    """Win rate against π_ref's samples over the policy's temperature. None if that is always 1."""
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
        error = np.sqrt(win * (1 - win) / len(curve[0]["rewards"]))
        if method == "sft":
            error[at == 1] = 0  # equal policies: 1/2 by construction, not measured
        ax.errorbar(at, win, error, color=colour, marker=marker, ls=line, capsize=3,
                    label=label + f", {setting}" * bool(setting))
    ax.axhline(0.5, color="grey", lw=1, label="as good as π_ref at temperature 1")
    ax.axvline(1, color="grey", lw=1, ls=":", label="temperature 1")
    ax.set(xlabel="sampling temperature of the policy",
           xticks=sorted({p["temperature"] for curve in curves.values() for p in curve}),
           ylabel="share of prompts won against π_ref, by r*",
           title="Do the policies still win at other sampling temperatures?")
    return finish(figure, sum(curves.values(), []), "π_ref's samples, on the same prompts, always "
                  "have temperature 1; a tie counts as half a win. Bars: ± 1 standard error of a "
                  "share; π_ref against itself is 1/2 by construction.") if curves else None


def online(points: list[dict]) -> Figure | None:
    """DPO on the stored groups, and online DPO with labels by r* and by its own r̂. None without an
    online run."""
    shown = {m: series(points, m) for m in ("dpo", "dpo-online", "dpo-self", "sft")}
    shown = {m: mine for m, mine in shown.items() if mine}
    if not shown.keys() & {"dpo-online", "dpo-self"}:
        return None
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    ax = figure.subplots()
    plot_methods(ax, points, shown)
    ax.set_title("Do fresh preferences, on the policy's own samples, help DPO?")
    return finish(figure, sum(shown.values(), []), "All runs have equal numbers of updates; an "
                  "online run spends its first third on the stored pairs, as DPO does. Faint: "
                  "every evaluation, ± 1 standard error. Lines: the best mixtures of a method's "
                  "policies, means over seeds.")


def dial(points: list[dict]) -> Figure | None:
    """The last points of DPO on each kind of label, and the optimum for soft and sampled labels.

    s scales the rewards in a label's probability, Eq. 1. This optimum depends on s/β alone. None
    without soft or sampled labels.
    """
    keys, figure = ("kl", "reward", "kl_se", "reward_se"), Figure((10.5, 6), layout="constrained")
    shown = {m: [p for p in series(points, m) if " rate=" not in p["setting"]]  # the chosen rate
             for m in ("dpo", "dpo-sampled", "dpo-soft")}
    ends = {m: [dict(zip(keys, run[-1]), value=setting_value(setting))
                for setting, run in seed_means(mine, *keys).items()]
            for m, mine in shown.items() if mine}
    every = sum(ends.values(), [])
    asked = {p["value"] for m, mine in ends.items() if m != "dpo" for p in mine}
    if not asked:
        return None
    ax = figure.subplots()
    optimum = reliable_optimum(points)
    rings = {v: p for p in optimum if (v := setting_value(p["setting"])) in asked}
    if best := [p for p in optimum if p["kl"] > min(x["kl"] for x in every) / 3]:
        ax.plot(*([p[key] for p in best] for key in ("kl", "reward")), "k-", lw=3,
                label="optimum, Eq. 4")

    def label(p, text, colour, shift, **style):
        ax.annotate(text, (p["kl"], p["reward"]), shift, textcoords="offset points", fontsize=9,
                    color=colour, bbox=dict(fc="white", lw=0, pad=0.5, alpha=0.8), **style)

    for method, mine in ends.items():
        name, colour, _, _ = STYLES[method]
        plot_points(ax, mine, method, ms=7, label=name + " on hard labels" * (method == "dpo"))
        for p in mine:
            if method == "dpo":
                label(p, f"β = {p['value']:g}", colour, (8, -13))
            elif ring := rings.get(p["value"]):
                ax.plot(*zip(*((x["kl"], x["reward"]) for x in (p, ring))), lw=0.9, color=colour)
            else:
                label(p, f"s/β = {p['value']:g}", colour, (8, 5))
    for value, p in rings.items():
        label(p, f"s/β = {value:g}", "k", (-8, 8), ha="right")
    ax.plot(*np.reshape([(p["kl"], p["reward"]) for p in rings.values()], (-1, 2)).T, "ko",
            mfc="none", ms=12, label="the optimum at that s/β")
    ax.margins(x=0.12)
    ax.set(xscale="log", xlabel=KL, ylabel=REWARD,
           title="Each line joins the end of training to the optimum of its labels")
    lost = ", ".join(f"{x:g}" for x in sorted(asked - {*rings}))
    return finish(figure, sum(shown.values(), []), "Last evaluations, means over seeds, ± 1 "
                  "standard error of one run. s scales r* in a label's probability; hard labels "
                  "have no such optimum." + f" No ring at s/β {lost}: the optimum is not reliable "
                  "there." * bool(lost))


# ------------------------------------------------------------------------------ of the lessons

LOSSES = {"sigmoid": ("DPO", "C0", "-"), "constant": ("w = 1", "C3", "--"),
          "reference-free": ("no π_ref", "C2", "-.")}  # label, colour, line


def loss_label(name: str) -> str:
    """The label of a loss of the ablation. For a weight FILE.py:f it is "w = f"."""
    return LOSSES[name][0] if name in LOSSES else f"w = {name.rpartition(':')[2]}"


def times_dpo(rows: list[dict], name: str, key: str) -> str:
    """A loss's last value over DPO's, smallest and largest of the seeds: "90 to 216"."""
    last = {(row["weight"], row["seed"]): row[key] for row in rows}
    ratios = [x / last["sigmoid", seed] for (weight, seed), x in last.items() if weight == name]
    return " to ".join(dict.fromkeys(f"{x:,.{int(x < 10)}f}" for x in (min(ratios), max(ratios))))


def degeneration(rows: list[dict], texts: list[str], path: Path) -> None:
    """Draw to `path` four panels over the steps, with one line per loss and seed. Below them stand
    one prompt and one completion per loss.

    rows: dicts of weight, seed, step and measures; a measure that does not exist is None. texts:
    the prompt and the completions, each after its label.
    """
    panels = {"ref_ppl": ("Perplexity of the samples", "under π_ref, per token"),
              "grammatical": ("Grammatical sentences", "share"),
              "logp_chosen": ("Log-prob of chosen completions", "log π(y_w), nats per completion"),
              "reward": ("True reward of the samples", REWARD),
              "repetition": ("Repeated trigrams", "share"), "eos": ("Samples that end", "share")}
    names = list(dict.fromkeys(row["weight"] for row in rows))
    looks = {loss_label(name): LOSSES.get(name, ("", "C1", ":"))[1:] for name in names}
    figure = Figure(figsize=(15, 7), layout="constrained")
    *axes, strip = figure.subplot_mosaic("abcd;tttt", height_ratios=(3, 1)).values()
    for ax, key in zip(axes, (key for key in panels if rows[0][key] is not None)):
        runs = {}
        for row in rows:
            run = loss_label(row["weight"]), row["seed"]
            runs.setdefault(run, []).append((row["step"], row[key]))
        for (label, _), points in runs.items():
            colour, line = looks[label]
            ax.plot(*zip(*points), color=colour, ls=line, lw=1.2, marker="o", ms=2.5, label=label)
        title, ylabel = panels[key]
        ax.set(title=title, xlabel="step", ylabel=ylabel)
        ax.grid(alpha=0.25)
    axes[0].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    one_each = dict(zip(labels, handles))
    axes[0].legend(one_each.values(), one_each.keys())
    strip.axis("off")
    at, texts = 1.0, [textwrap.wrap(text, 200, max_lines=2, placeholder=" …") for text in texts]
    for lines in texts:
        colour, _ = looks.get(lines[0].partition(":")[0], ("k", ""))
        strip.text(0, at, "\n".join(lines), color=colour, va="top", fontsize=9, parse_math=False)
        at -= len(lines) / sum(map(len, texts))
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"Without DPO's weight (w = 1) the same loss ends at {times_dpo(rows, 'constant', 'kl')} "
        f"times DPO's KL and {times_dpo(rows, 'constant', 'ref_ppl')} times its perplexity "
        f"({seeds} seed{'s' * (seeds > 1)})", fontsize=14)
    save_figure(figure, path, dpi=120)


def overoptimisation(rows: list[dict], optimum: list[dict], path: Path) -> None:
    """Draw to `path`, for DPO on few and on many preferences: true and implicit reward over the
    steps, and true reward over KL. optimum: points of Eq. 4's optimum."""
    figure = Figure(figsize=(14, 5), layout="constrained")
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
    true.set(title="what is wanted: true reward r*", xlabel="step", ylabel=REWARD)
    implicit.set(title="what is trained: implicit reward r̂", xlabel="step",
                 ylabel="mean r̂ = β log π/π_ref of own samples")
    plane.set(title="what it costs: KL", xlabel=KL, ylabel=REWARD, xscale="symlog", xlim=(0, None))
    plane.xaxis.set_major_formatter("{x:g}")
    for ax in (true, implicit, plane):
        ax.grid(alpha=0.25)
    figure.suptitle("Over-optimisation: r̂, which is trained, can rise while r*, which is wanted, "
                    "does not")
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(figure, path, dpi=120)


def inspection(inspected: dict, metrics: list[dict], path: Path) -> None:
    """Draw to `path` the weights over training, and weight and margin of held-out pairs over their
    gap in r*.

    inspected: what inspect.json holds; metrics: the rows of the dpo run's metrics.jsonl.
    """
    pairs = inspected["pairs"]
    figure = Figure(figsize=(14, 5), layout="constrained")
    a, b, c = figure.subplots(1, 3)
    plot_weights(a, [r for r in metrics if "eval" not in r])
    a.set(xlabel="step", ylabel="importance weight w(m)", title="training pairs")
    for ax, key, label in ((b, "weight", "importance weight w(m)"),
                           (c, "margin", "implicit margin m = r̂(y_w) - r̂(y_l)")):
        for wrong, style, name in ((False, "oC0", "right order, m > 0"),
                                   (True, "xC3", "wrong order, m < 0")):
            some = [(p["reward_gap"], p[key]) for p in pairs if (p["margin"] < 0) == wrong]
            ax.plot(*np.reshape(some, (-1, 2)).T, style, ms=5, alpha=0.7, label=name)
        ax.set(xlabel="true reward gap r*(y_w) - r*(y_l)", ylabel=label)
    for ax, level, text in ((a, 0.5, "1/2 = σ(0), as at π_ref"), (b, 0.5, "1/2 = σ(0)"),
                            (c, 0, "m = 0, as at π_ref")):
        ax.axhline(level, color="k", lw=1, ls=":", label=text)
    b.set_title(f"{len(pairs)} held-out pairs after {inspected['step']} steps")
    c.set_title("\n".join(
        f"{name}: accuracy {x['accuracy']:.3f}, rank correlation {x['rank_correlation']:.3f}"
        for name, x in (("r̂", inspected), ("r_φ", inspected.get("learned"))) if x), fontsize=10)
    figure.suptitle("Section 4: w(m) = σ(-m) pushes pairs in the wrong order hardest, and "
                    "hardly changes pairs that are clearly in order")
    for ax in (a, b, c):
        ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
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
