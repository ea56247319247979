"""The table of a frontier: each method's reward at a KL, with bootstrap intervals, and its cost.

P prompts, n points, R bootstrap replicates, the first of which is the sample itself.
"""

import math

import numpy as np

from plot_frontier import STYLES, caption, envelope, kl_range, reference, reliable_optimum, series

FOLDS = 5  # parts of the prompts
IDEALS = ("optimum", "score-tilt")  # computed from π_ref's samples: no policy is trained


def replicates(points: list[dict], counts, rng) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward (2, F, R, n) in each replicate of a method's n different (setting, step)s.

    They are means over the drawn prompts and seeds. counts (2, F, R, P): how often each prompt was
    drawn, outside and inside a fold. Seeds are drawn here, once for all settings that have the
    same; NaN where a (setting, step) has none of those drawn.
    """
    seeds = {setting: tuple(sorted({p["seed"] for p in points if p["setting"] == setting}))
             for setting in dict.fromkeys(p["setting"] for p in points)}
    drawn = {}  # seeds -> (R, seeds), how often each was drawn
    for own in dict.fromkeys(seeds.values()):
        drawn[own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), counts.shape[2])
        drawn[own][0] = 1
    times = np.stack([drawn[own][:, own.index(p["seed"])]
                      for p in points for own in [seeds[p["setting"]]]], 1)  # (R, points)
    keys = [(p["setting"], p["step"]) for p in points]
    member = np.array([[key == own for own in dict.fromkeys(keys)] for key in keys], float)
    with np.errstate(invalid="ignore"):
        return tuple(times * means(counts, [p[x] for p in points]) @ member / (times @ member)
                     for x in ("kls", "rewards"))


def means(counts, values) -> np.ndarray:
    """Of values (n, P) over the drawn prompts: (..., R, n)."""
    return counts @ np.array(values).T / counts.sum(-1, keepdims=True)


def interval(values) -> tuple[float, float, float] | None:
    """Replicates (R,) -> the sample's value and the ends of its 95 % interval; None for a NaN.

    It leans a little low: a replicate chooses its mixtures by noisier means than the sample's.
    """
    value, ends = float(values[0]), np.percentile(values[1:], (2.5, 97.5))
    return None if math.isnan(value) else (value, *ends.tolist())


def table(points: list[dict], bootstrap: int = 1000, seed: int = 0) -> list[dict]:
    """One row per method, the optimum first: what it has at each KL of the preset, and its cost.

    reward: KL -> (value, low, high) of the best mixture of a method's policies, None past its
    largest KL. For each fifth of the prompts the mixture is chosen on the others and judged on
    this one (cross-fit); the value is the mean of the five. Judged on the prompts that chose it, a
    mixture looks better than it is. The seeds are the same in both, so their luck stays.
    share: KL -> the same for its part of the optimal gain, (r - r_ref) / (r_opt - r_ref).
    The 95 % intervals are over seeds and prompts; shares are paired, as a replicate has the same
    prompts for all methods.
    seconds, samples: sums over runs (one per setting and seed), each at its last point. For the
    optimum and Best-of-N the largest: all their settings share one draw of samples.
    """
    kls = kl_range(points[0]["preset"])[0]
    at, P, rng, rows = np.array(kls, float), len(points[0]["kls"]), np.random.default_rng(seed), []
    F = min(FOLDS, P)
    folds = np.zeros((F, 1 + bootstrap, P))  # the first replicate is the sample itself
    for i, fold in enumerate(folds):
        n = len(range(i, P, F))
        fold[0, i::F] = 1
        fold[1:, i::F] = rng.multinomial(n, np.full(n, 1 / n), bootstrap)
    counts = np.stack([folds.sum(0) - folds, folds])  # outside and inside each fold
    start = means(counts, [reference(points)["rewards"]])[..., 0]  # (2, F, R)
    best = np.full((*start.shape[1:], len(at)), np.nan)  # the optimum's reward
    others = sorted({p["method"] for p in points} - {*STYLES, *IDEALS})
    for method in [*IDEALS, *(m for m in STYLES if m != "sft"), *others]:
        mine = reliable_optimum(points, method) if method in IDEALS else series(points, method)
        if not mine:
            continue
        kl, reward = replicates(mine, counts, rng)
        if method in IDEALS:
            values = np.apply_along_axis(lambda x: np.interp(at, *np.split(x, 2), left=np.nan), -1,
                                         np.concatenate([kl[1], reward[1]], -1))  # (F, R, m)
        else:  # flat: a replicate's last point may fall short of the sample's KL
            chosen_by, judged_by = zip(kl, reward, start)
            values = envelope(*chosen_by[:2], at, chosen_by[2], flat=True, judges=judged_by)
        if method == "optimum":
            best = values
        largest = float(kl[1, :, 0].mean(0).max())
        values[..., at > largest] = np.nan
        gain, best_gain = ((x - start[1, ..., None]).mean(0) for x in (values, best))
        shares = gain / best_gain
        last = {(p["setting"], p["seed"]): p for p in sorted(mine, key=lambda p: p["step"])}
        row = dict(method=method, largest=largest, runs=len(last),
                   seeds=len({p["seed"] for p in mine}),
                   reward=dict(zip(kls, map(interval, values.mean(0).T))),
                   share=dict(zip(kls, map(interval, shares.T))))
        total = max if method.startswith((*IDEALS, "best-of-n")) else sum
        for key in ("seconds", "samples"):
            known = [p[key] for p in last.values() if p[key] is not None]
            row[key] = total(known) if known else None
        rows.append(row)
    return rows


def excesses(points: list[dict]) -> list[tuple[float, dict]]:
    """(excess over the optimum in standard errors, point), largest first, where it is reliable.

    Paired: mean and standard error over prompts of r - r_opt - slope (KL - KL_opt). The optimum is
    the mixture of its two neighbouring points that has the point's KL. The error is that of both.
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
    """The rows in three blocks of Markdown, aligned so that they read as plain text too."""
    kls, ref = kl_range(points[0]["preset"])[0], reference(points)

    def cell(x):
        if isinstance(x, tuple):
            return "{:.3f} ({:.3f}, {:.3f})".format(*x)
        return "-" if x is None else f"{x:,.0f}"

    def block(title, names, cells):
        lines = [["method", *names], *([r["method"], *map(cell, c)] for r, c in zip(rows, cells))]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * w for w in widths])
        return f"{title}:\n\n" + "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)

    at, costs = [f"KL {kl}" for kl in kls], "runs seeds seconds samples".split()
    return "\n\n".join([
        f"{caption(points)}; π_ref's mean true reward {ref['reward']:.3f} ± {ref['reward_se']:.3f}."
        " Mixtures are chosen on four fifths of the prompts and judged on the last. In brackets: "
        "95 % bootstrap intervals over prompts and seeds.",
        block("Mean true reward of a method's best mixture of policies, at a KL in nats", at,
              [r["reward"].values() for r in rows]),
        block("Share of the optimal gain at that KL, (r - r_ref) / (r_opt - r_ref)", at,
              [r["share"].values() for r in rows]),
        block("What all runs of a method took, each counted as if it were alone", costs,
              [[r[c] for c in costs] for r in rows]),
        "\n".join(f"- {note}" for note in notes(points, rows))]) + "\n"


def notes(points: list[dict], rows: list[dict]) -> list[str]:
    """Which methods end before a KL of the table, and whether a point lies above the optimum."""
    best, over = reliable_optimum(points), excesses(points)
    found = [f"{r['method']} has no {'reliable ' * (r['method'] in IDEALS)}point at KL {no[0]} "
             f"or beyond: its largest KL is {r['largest']:.2f}." for r in rows
             if (no := [kl for kl, value in r["reward"].items() if value is None])]
    if not over:
        return [*found, "No point lies where the optimum is reliable: none was compared with it."]
    names = ", ".join(f"{p['method']} {p['setting']} (seed {p['seed']}, step {p['step']}) by "
                      f"{z:.1f}" for z, p in over if z > 3)
    return [*found, f"{len(over)} points lie where the optimum is reliable, KL {best[0]['kl']:.2g} "
            f"to {best[-1]['kl']:.2f}: the largest excess over it is {over[0][0]:.1f} combined "
            f"standard errors; more than 3 above it: {names or 'none'}."]
