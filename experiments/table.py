"""The table of a frontier: each method's reward at given KLs, with intervals, and its cost.

F folds of the P prompts, n points, m KLs, R bootstrap replicates. Replicate 0 is the sample itself.
"""

import math
import textwrap

import numpy as np

from plot_frontier import (STYLES, caption, cross_fit, fold_counts, kl_range, means, reference,
                           reliable_optimum, series)

IDEALS = ("optimum", "score-tilt")  # computed from π_ref's samples: no policy is trained


def replicates(points: list[dict], counts, rng) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward of a method's n (setting, step) pairs in each replicate: two (2, F, R, n).

    They are means over the drawn prompts and seeds. counts (2, F, R, P): how often each prompt was
    drawn, outside and inside each fold. Seeds are drawn here. Settings with the same seeds share
    one draw. NaN where no drawn seed has this (setting, step).
    """
    seeds = {setting: tuple(sorted({p["seed"] for p in points if p["setting"] == setting}))
             for setting in dict.fromkeys(p["setting"] for p in points)}
    drawn = {}  # seeds -> (R, seeds), how often each was drawn
    for group in dict.fromkeys(seeds.values()):
        n = len(group)
        drawn[group] = rng.multinomial(n, np.full(n, 1 / n), counts.shape[2])
        drawn[group][0] = 1
    times = np.stack([drawn[group][:, group.index(p["seed"])]
                      for p in points for group in [seeds[p["setting"]]]], 1)  # (R, points)
    keys = [(p["setting"], p["step"]) for p in points]
    member = np.array([[key == column for column in dict.fromkeys(keys)] for key in keys], float)
    with np.errstate(invalid="ignore"):
        return tuple(times * means(counts, [p[x] for p in points]) @ member / (times @ member)
                     for x in ("kls", "rewards"))


def interval(values) -> tuple[float, float, float] | None:
    """Replicates (R,) -> the sample's value and the ends of its 95 % interval. None if it is NaN.

    The interval is a little too low: a replicate chooses its mixtures by noisier means than the
    sample does.
    """
    value, ends = float(values[0]), np.percentile(values[1:], (2.5, 97.5))
    return None if math.isnan(value) else (value, *ends.tolist())


def table(points: list[dict], bootstrap: int = 1000, seed: int = 0) -> list[dict]:
    """One row per method, the optimum first: its reward at each KL of the preset, and its cost.

    reward: KL -> (value, low, high) of the best mixture of a method's policies. None past its
    largest KL. The mixture is cross-fitted: for each fifth of the prompts it is chosen on the other
    four fifths and measured on this one, and the value is the mean of the five. Measured on the
    prompts that chose it, a mixture would look better than it is. Choice and measurement use the
    same seeds, so the value keeps what a seed gained by chance.
    share: KL -> the same for the share of the optimal gain, (r - r_ref) / (r_opt - r_ref).
    The 95 % intervals are over seeds and prompts. Shares are paired: in one replicate all methods
    have the same prompts.
    seconds, samples: sums over runs (one per setting and seed), each at its last point. For the
    optimum and Best-of-N they are maxima, because all settings share one draw of samples.
    """
    kls = kl_range(points[0]["preset"])[0]
    at, P, rng, rows = np.array(kls, float), len(points[0]["kls"]), np.random.default_rng(seed), []
    counts = fold_counts(P, bootstrap, rng)
    start = means(counts, [reference(points)["rewards"]])[..., 0]  # (2, F, R)
    best = np.full((1 + bootstrap, len(at)), np.nan)  # the optimum's gain
    others = sorted({p["method"] for p in points} - {*STYLES, *IDEALS})
    for method in [*IDEALS, *(m for m in STYLES if m != "sft"), *others]:
        mine = reliable_optimum(points, method) if method in IDEALS else series(points, method)
        if not mine:
            continue
        kl, reward = replicates(mine, counts, rng)
        gain = cross_fit(kl, reward, start, at, method in IDEALS)  # (R, m)
        largest = float(kl[1, :, 0].mean(0).max())
        gain[:, at > largest] = np.nan
        if method == "optimum":
            best = gain
        last = {(p["setting"], p["seed"]): p for p in sorted(mine, key=lambda p: p["step"])}
        row = dict(method=method, largest=largest, runs=len(last),
                   seeds=len({p["seed"] for p in mine}),
                   reward=dict(zip(kls, map(interval, (gain + start[1].mean(0)[:, None]).T))),
                   share=dict(zip(kls, map(interval, (gain / best).T))))
        total = max if method.startswith((*IDEALS, "best-of-n")) else sum
        for key in ("seconds", "samples"):
            known = [p[key] for p in last.values() if p[key] is not None]
            row[key] = total(known) if known else None
        rows.append(row)
    return rows


def excesses(points: list[dict]) -> list[tuple[float, dict]]:
    """(excess over the optimum in standard errors, point), largest first.

    Only points at KLs where the optimum is reliable. For each prompt the excess is r - r_opt -
    slope (KL - KL_opt), where r_opt and KL_opt interpolate the optimum at the point's mean KL. Its
    mean over prompts is divided by its standard error, which covers the errors of both policies.
    """
    best, found = reliable_optimum(points), []
    k, r = (np.array([p[key] for p in best]) for key in ("kls", "rewards"))  # (n, P) each
    edges = np.array([x.mean() for x in k])
    for p in points:
        kl = np.mean(p["kls"])
        i = np.searchsorted(edges, kl)
        if p["method"] not in (*IDEALS, "sft") and p["temperature"] == 1 and 0 < i < len(best):
            width = edges[i] - edges[i - 1]
            k_opt, r_opt = (x[i - 1] + (kl - edges[i - 1]) / width * (x[i] - x[i - 1])
                            for x in (k, r))
            d = p["rewards"] - r_opt - (r[i] - r[i - 1]).mean() / width * (p["kls"] - k_opt)  # (P,)
            found.append((d.mean() / max(d.std(ddof=1) / math.sqrt(len(d)), 1e-9), p))
    return sorted(found, key=lambda x: -x[0])


def table_text(points: list[dict], rows: list[dict]) -> str:
    """The rows as Markdown of at most 100 columns, aligned so that it reads as plain text too."""
    kls, ref = kl_range(points[0]["preset"])[0], reference(points)

    def cell(x):
        if isinstance(x, tuple):
            return "{:.3f} ({:.3f}, {:.3f})".format(*x)
        return "-" if x is None else f"{x:,.0f}"

    def block(title, columns):
        lines = [*zip(["method", *(r["method"] for r in rows)],
                      *([name, *map(cell, x)] for name, x in columns.items()))]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * w for w in widths])
        return f"{title}:\n\n" + "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)

    def by_kl(title, key):  # KLs that a method reaches, at most three in a block
        at = [kl for kl in kls if any(r[key][kl] for r in rows)]
        return [block(name, {f"KL {kl}": [r[key][kl] for r in rows] for kl in part})
                for name, part in ((title, at[:3]), (f"{title}, continued", at[3:])) if part]

    def wrapped(text, **options):
        return textwrap.fill(text, 100, break_on_hyphens=False, **options)

    return "\n\n".join([
        wrapped(f"{caption(points)} π_ref's mean true reward {ref['reward']:.3f} ± "
                f"{ref['reward_se']:.3f}. A mixture is chosen on four fifths of the prompts and "
                "measured on the other fifth. In brackets: 95 % bootstrap intervals over prompts "
                "and seeds."),
        *by_kl("Mean true reward of a method's best mixture of policies, at a KL in nats",
               "reward"),
        *by_kl("Share of the optimal gain at that KL, (r - r_ref) / (r_opt - r_ref)", "share"),
        block("Cost of all runs of a method, each counted as if it were the only run",
              {c: [r[c] for r in rows] for c in "runs seeds seconds samples".split()}),
        "\n".join(wrapped(f"- {note}", subsequent_indent="  ")
                  for note in notes(points, rows))]) + "\n"


def notes(points: list[dict], rows: list[dict]) -> list[str]:
    """Which methods do not reach a KL of the table, and whether a point lies above the optimum."""
    best, over = reliable_optimum(points), excesses(points)
    found = [f"{r['method']} has no {'reliable ' * (r['method'] in IDEALS)}point at KL {no[0]} "
             f"or beyond: its largest KL is {r['largest']:.2f}." for r in rows
             if (no := [kl for kl, value in r["reward"].items() if value is None])]
    if not over:
        return [*found, "No point lies where the optimum is reliable: none was compared with it."]
    names = ", ".join(f"{p['method']} {p['setting']} (seed {p['seed']}, step {p['step']}) by "
                      f"{z:.1f}" for z, p in over if z > 3)
    return [*found, f"{len(over)} points lie where the optimum is reliable, KL {best[0]['kl']:.2g} "
            f"to {best[-1]['kl']:.2f}. The largest excess over it is {over[0][0]:.1f} combined "
            f"standard errors. Points more than 3 standard errors above it: {names or 'none'}."]
