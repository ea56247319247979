"""The points of a frontier.jsonl: read, compared by their upper envelopes, and put in a table.

Needs numpy alone. Knows nothing of models, and draws nothing (plot_frontier.py).

P prompts, n points, m values of KL, R bootstrap replicates (the first is the sample itself).
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from support.runs import UserError, os_errors

KEYS = ("preset model method setting seed step temperature reward reward_se kl kl_se kl_mc "
        "kl_mc_se length eos distinct2 repetition grammatical ref_ppl reward_learned win ess "
        "seconds samples forwards rewards kls").split()  # of every line of frontier.jsonl
METHODS = ("dpo", "plackett-luce", "ppo", "ppo-gt", "unlikelihood", "preferred-ft", "best-of-n",
           "best-of-n-learned", "dpo-soft", "dpo-sampled")  # in the table's order


def read_points(path: Path) -> list[dict]:
    """The points of a frontier.jsonl, in its order.

    A line that is no point, or has another preset or number of prompts than most, is skipped; one
    sentence on stderr counts and names them. UserError without the file, or without any point.
    """
    remedy = "run `python train.py --stage frontier`"
    with os_errors("read", path):
        if not path.exists():
            raise UserError(f"there is no {path}: {remedy}")
        lines = path.read_bytes().splitlines()
    points = {i: p for i, line in enumerate(lines, 1) if (p := point_of(line))}
    kinds = {i: (p["preset"], len(p["rewards"])) for i, p in points.items()}
    usual = Counter(kinds.values()).most_common(1)
    kept = {i: p for i, p in points.items() if kinds[i] == usual[0][0]}
    if skipped := [str(i) for i in range(1, len(lines) + 1) if i not in kept]:
        s, no = ("", "is no point") if len(skipped) == 1 else ("s", "are no points")
        print(f"skipped {len(skipped)} line{s} of {path} that {no}: line{s} {', '.join(skipped)}",
              file=sys.stderr)
    if not kept:
        raise UserError(f"{path} holds no point: delete it and {remedy}")
    return list(kept.values())


def point_of(line: bytes) -> dict | None:
    """The point that a line holds; None where it is not JSON, lacks a key, or has no number."""
    try:
        point = json.loads(line)
        numbers = [point[key] for key in ("kl", "kl_se", "reward", "reward_se", "temperature")]
        numbers += [*point["rewards"], *point["kls"], knob(point["setting"])]
        numbers += [point["seed"], point["step"], *(point[key] or 0 for key in (
            "kl_mc", "reward_learned", "win", "ess", "seconds", "samples", "forwards"))]
        whole = point.keys() >= set(KEYS) and all(map(math.isfinite, numbers)) and \
            all(isinstance(point[key], str) for key in ("preset", "model", "method")) and \
            len(point["rewards"]) == len(point["kls"]) > 1
        return point if whole else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def scale(preset: str) -> tuple[tuple, int, int]:
    """In nats: the KLs of the table, the top of the compared range, the end of the figure."""
    return ((1, 2, 3), 3, 5) if preset == "toy" else ((1, 2, 3, 5, 10), 10, 20)


def knob(setting: str) -> float:
    """0.1 of "beta=0.1"; 0 of a method that has no setting."""
    return float(setting.partition("=")[2] or 0)


def series(points: list[dict], method: str) -> list[dict]:
    """A method's points on the frontier: those of temperature 1."""
    return [p for p in points if p["method"] == method and p["temperature"] == 1]


def reference(points: list[dict]) -> dict:
    """π_ref's own point, where every curve starts."""
    if sft := series(points, "sft"):
        return sft[0]
    raise UserError("the frontier has no point of sft, where every curve starts: run `python "
                    "train.py --stage frontier`")


def trusted(points: list[dict]) -> list[dict]:
    """The optimum's points that rest on at least 3 effective samples a prompt, by KL."""
    return sorted((p for p in series(points, "optimum") if (p["ess"] or 0) >= 3),
                  key=lambda p: p["kl"])


def seed_means(points: list[dict], *keys: str) -> dict[str, np.ndarray]:
    """setting -> (steps, keys), means over seeds: what a coin among them has, as in envelope."""
    runs = {}
    for p in sorted(points, key=lambda p: (knob(p["setting"]), p["step"])):
        runs.setdefault(p["setting"], {}).setdefault(p["step"], []).append([p[k] for k in keys])
    return {setting: np.array([np.mean(x, 0) for x in steps.values()])
            for setting, steps in runs.items()}


def envelope(kl, reward, at, start, flat: bool = False) -> np.ndarray:
    """The best mean reward that mixtures of some policies and π_ref have at KLs `at`, in nats.

    kl, reward (..., n), a policy each (NaN: not there); at (m,) or (..., m); start (...), the
    reward of π_ref -> (..., m): the upper concave hull, flat after its top. NaN past the largest
    KL, where nothing was measured, unless `flat`. Why a hull is honest: a coin that picks one of
    two policies for each prompt has the reward on the straight line between them, at a KL no
    larger (KL is convex). Over noisy points it lies a little high, as any maximum does.
    """
    kl, reward, at = np.asarray(kl, float), np.asarray(reward, float), np.asarray(at, float)
    k = np.zeros(kl.shape[:-1] + (1,))
    r = k + np.asarray(start)[..., None]
    past = at > np.nanmax(kl, -1, keepdims=True)
    height = np.where(past & (not flat), np.nan, np.inf)
    while True:  # from π_ref always on to the point of steepest rise, until none rises
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.where((kl > k) & (reward > r), (reward - r) / (kl - k), 0)  # (..., n)
        best = slopes.argmax(-1)[..., None]
        slope = np.take_along_axis(slopes, best, -1)
        height = np.minimum(height, r + slope * (at - k))  # a concave hull is below all its lines
        if not slope.any():
            return height
        k, r = (np.where(slope > 0, np.take_along_axis(x, best, -1), old)
                for x, old in ((kl, k), (reward, r)))


def area(kl, reward, top: float, start) -> np.ndarray:
    """The envelope's mean height above π_ref's reward for KL from 0 to top. Shapes as there.

    Past the last point it goes on flat: a policy of lower KL can always be kept.
    """
    ends = np.zeros(np.shape(kl)[:-1] + (1,))
    at = np.sort(np.clip(np.nan_to_num(np.concatenate([ends, kl, ends + top], -1)), 0, top), -1)
    gain = envelope(kl, reward, at, start, flat=True) - np.asarray(start)[..., None]
    return np.trapezoid(gain, at, axis=-1) / top  # exact: it bends at points alone


# ------------------------------------------------------------------------------ its table


def replicates(points: list[dict], counts, rng) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward (R, n) of a method's (setting, step)s in each replicate, means over seeds.

    counts (R, P): how often each prompt was drawn. A setting's seeds are drawn again too, together
    with other settings of the same seeds; NaN where none of a point's seeds was drawn.
    """
    seeds, drawn = {}, {}
    for p in points:
        seeds.setdefault(p["setting"], set()).add(p["seed"])
    of = [tuple(sorted(seeds[p["setting"]])) for p in points]
    for key in dict.fromkeys(of):
        drawn[key] = rng.multinomial(len(key), np.full(len(key), 1 / len(key)), len(counts))
        drawn[key][0] = 1
    times = np.stack([drawn[key][:, key.index(p["seed"])] for key, p in zip(of, points)], 1)
    keys = [(p["setting"], p["step"]) for p in points]
    member = np.array([[key == group for group in dict.fromkeys(keys)] for key in keys], float)
    with np.errstate(invalid="ignore"):
        return tuple(times * (counts @ np.array([p[x] for p in points]).T / len(counts[0]))
                     @ member / (times @ member) for x in ("kls", "rewards"))


def interval(values) -> tuple[float, float, float] | None:
    """Replicates (R,) -> the sample's own value and its 95 % interval; None for a NaN.

    2 value - quantile: a maximum's replicates lie above the sample's as that does above the truth,
    so the quantiles themselves would be too high twice over.
    """
    value = float(values[0])
    return None if math.isnan(value) else \
        (value, *(2 * value - np.percentile(values[1:], (97.5, 2.5))).tolist())


def table(points: list[dict], bootstrap: int = 1000, seed: int = 0) -> list[dict]:
    """A row a method, the optimum first: what it has at each KL of the preset, and what it cost.

    reward: KL -> (value, low, high) on its envelope, None past its largest KL. share, alike: of
    the optimum's gain there, (r - r_ref) / (r_opt - r_ref). area alike. Intervals: 95 %, over
    seeds and prompts, the same prompts for all methods, so that shares are paired.
    seconds, samples, forwards: sums over runs (a setting and a seed), each at its last point; the
    largest of the optimum's and Best-of-N's, whose settings share one draw of samples.
    """
    kls, top, _ = scale(points[0]["preset"])
    at, P, rng, rows = np.array(kls, float), len(points[0]["kls"]), np.random.default_rng(seed), []
    counts = np.vstack([np.ones(P), rng.multinomial(P, np.full(P, 1 / P), bootstrap)])
    start = counts @ reference(points)["rewards"] / P  # (R,)
    best = np.full((len(counts), len(at)), np.nan)  # the optimum's reward there
    others = sorted({p["method"] for p in points} - {*METHODS, "sft", "optimum"})
    for method in ["optimum", *METHODS, *others]:
        mine = trusted(points) if method == "optimum" else series(points, method)
        if not mine:
            continue
        kl, reward = replicates(mine, counts, rng)
        if method == "optimum":
            best = values = np.array([np.interp(at, *x, left=np.nan) for x in zip(kl, reward)])
        else:  # flat: in a replicate the last point may fall short of its KL in the sample
            values = envelope(kl, reward, at, start, flat=True)
        values[:, at > kl[0].max()] = np.nan
        shares = (values - start[:, None]) / (best - start[:, None])
        last = {(p["setting"], p["seed"]): p for p in sorted(mine, key=lambda p: p["step"])}
        row = dict(method=method, largest=float(kl[0].max()), runs=len(last),
                   seeds=len({p["seed"] for p in mine}),
                   reward=dict(zip(kls, map(interval, values.T))),
                   share=dict(zip(kls, map(interval, shares.T))),
                   area=interval(area(kl, reward, top, start)))
        for key in ("seconds", "samples", "forwards"):
            known = [p[key] for p in last.values() if p[key] is not None]
            total = max if method == "optimum" or method.startswith("best-of-n") else sum
            row[key] = total(known) if known else None
        rows.append(row)
    return rows


def excesses(points: list[dict]) -> list[tuple[float, dict]]:
    """(excess over the optimum in standard errors, point), largest first, where it is trusted.

    Paired: the mean and the spread over prompts of r - r_opt - slope (KL - KL_opt), with the
    optimum on the line between its two points around the point's KL: the error is that of both.
    """
    best, found = trusted(points), []
    k, r = (np.array([p[key] for p in best]) for key in ("kls", "rewards"))  # (n, P) each
    edges = np.array([x.mean() for x in k])
    for p in points:
        kl = np.mean(p["kls"])
        i = np.searchsorted(edges, kl)
        if p["method"] not in ("optimum", "sft") and p["temperature"] == 1 and 0 < i < len(best):
            width = edges[i] - edges[i - 1]
            k_opt, r_opt = (x[i - 1] + (kl - edges[i - 1]) / width * (x[i] - x[i - 1])
                            for x in (k, r))
            d = p["rewards"] - r_opt - (r[i] - r[i - 1]).mean() / width * (p["kls"] - k_opt)  # (P,)
            found.append((d.mean() / max(d.std(ddof=1) / math.sqrt(len(d)), 1e-9), p))
    return sorted(found, key=lambda x: -x[0])


def table_text(points: list[dict], rows: list[dict]) -> str:
    """The rows in three blocks of Markdown, aligned so that they read as plain text too."""
    kls, top, _ = scale(points[0]["preset"])
    ref, best, over = reference(points), trusted(points), excesses(points)

    def cell(x):
        return "-" if x is None else "{:.3f} ({:.3f}, {:.3f})".format(*x) \
            if isinstance(x, tuple) else f"{x:,.0f}"

    def block(title, names, cells):
        lines = [["method", *names], *([r["method"], *map(cell, c)] for r, c in zip(rows, cells))]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * w for w in widths])
        return f"{title}:\n\n" + "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)

    at, costs = [f"KL {kl}" for kl in kls], "area runs seeds seconds samples forwards".split()
    notes = [f"{r['method']} has no {'trusted ' * (r['method'] == 'optimum')}point at KL {no[0]} "
             f"or beyond: its largest KL is {r['largest']:.2f}." for r in rows
             if (no := [kl for kl in kls if r["reward"][kl] is None])]
    names = ", ".join(f"{p['method']} {p['setting']} (seed {p['seed']}, step {p['step']}) by "
                      f"{z:.1f}" for z, p in over if z > 3)
    notes.append(f"{len(over)} points lie where the optimum is trusted, KL {best[0]['kl']:.2g} to "
                 f"{best[-1]['kl']:.2f}: the largest excess over it is {over[0][0]:.1f} combined "
                 f"standard errors; more than 3 above it: {names or 'none'}." if over else
                 "No point lies where the optimum is trusted: nothing was held against it.")
    return "\n\n".join([
        f"{about(points)}; π_ref's mean true reward {ref['reward']:.3f} ± {ref['reward_se']:.3f}."
        " In brackets: 95 % bootstrap intervals over prompts and seeds.",
        *(block(title, at, [r[key].values() for r in rows]) for key, title in (
            ("reward", "Mean true reward on a method's upper envelope, at a KL in nats"),
            ("share", "Share of the optimal gain at that KL, (r - r_ref) / (r_opt - r_ref)"))),
        block(f"Area, the envelope's mean height above π_ref for KL from 0 to {top}, and what all "
              "runs of a method took, each as if it were alone", costs,
              [[r[c] for c in costs] for r in rows]),
        "\n".join(f"- {note}" for note in notes)]) + "\n"


def about(points: list[dict]) -> str:
    """Which experiment this is, for captions."""
    p, seeds = points[0], {}  # of the methods that are trained
    for method in METHODS:
        if "best-of-n" not in method and (mine := series(points, method)):
            of = ", ".join(map(str, sorted({x["seed"] for x in mine})))
            seeds.setdefault(of, []).append(method)
    usual = max(seeds, key=lambda of: len(seeds[of]), default="0")
    others = "".join(f" ({', '.join(names)}: {of})" for of, names in seeds.items() if of != usual)
    return (f"Preset {p['preset']}, {p['model']}; seed{'s' * (',' in usual)} {usual}{others}; "
            f"{len(p['rewards'])} test prompts")
