"""The choice of each method's learning rate.

Four rates are tried at one setting of the method. The rate that reaches the largest share of the
optimal gain on validation prompts is chosen. sweep.py makes the runs.
"""

import numpy as np


def candidates(cfg, methods: dict) -> list[tuple[str, str, float]]:
    """(method, setting, rate): four rates per method, at its central setting."""
    return [(name, m.central, float(f"{getattr(cfg, m.rate) * x:.3g}"))
            for name, m in methods.items() for x in m.multiples]


def share(points: list[dict], optimum: list[dict], low: float, top: float) -> float:
    """A run's share of the optimal gain at its KL, on the validation prompts.

    optimum: jackknife_optimum of π_ref's samples for these prompts. Its first point is π_ref. Past
    its last point, where r* is near its maximum, the last reward is used. The result is the mean
    over the points in the second half of the run, where the rate has decayed, with a KL from `low`
    to `top`. (Nearer to π_ref every method has a high share, so a rate that is too small would
    win.) If there is no such point, the result is minus the distance of the last KL from this
    range. Then the nearest run is chosen.
    """
    kl, best = zip(*sorted((p["kl"], p["reward"]) for p in optimum))
    shares = [(p["valid_reward"] - best[0]) / (np.interp(p["valid_kl"], kl, best) - best[0])
              for p in points[len(points) // 2 :] if low <= p["valid_kl"] <= top]
    last = points[-1]["valid_kl"]
    return float(np.mean(shares)) if shares else -max(low - last, last - top)


def rate_table(shares: dict[tuple[str, str, float], float | None]) -> list[dict]:
    """Every candidate with its share (None: it diverged), and whether it was chosen."""
    known = {c: value for c, value in shares.items() if value is not None}
    best = [max((c for c in known if c[0] == method), key=known.get)
            for method in {c[0] for c in known}]
    return [dict(method=c[0], setting=c[1], rate=c[2], share=value, chosen=c in best)
            for c, value in shares.items()]


def chosen_rates(table: list[dict]) -> dict[str, float]:
    """method -> the chosen rate. A method is left out if all its candidates diverged."""
    return {row["method"]: row["rate"] for row in table if row["chosen"]}


def report_rates(table: list[dict]) -> None:
    for row in (row for row in table if row["chosen"]):
        tried = [other["rate"] for other in table if other["method"] == row["method"]]
        edge = ", at the edge of the tried rates" * (row["rate"] in (min(tried), max(tried)))
        gain = f"{row['share']:.3f} of the optimal gain on validation prompts" \
            if row["share"] >= 0 else "no rate ended at the compared KLs, this one ended nearest"
        print(f"  {row['method']:<14} learning rate {row['rate']:g} (tried: "
              f"{', '.join(f'{rate:g}' for rate in tried)}): {gain}{edge}")
