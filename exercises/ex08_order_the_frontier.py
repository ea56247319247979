"""Exercise 08 · Order the points of the frontier by β, before you draw it.

Equation: max_π E r(x,y) - β KL(π‖π_ref)  (Eq. 3; Section 6.1, Figure 2 left)
Kind:     PREDICT and SWEEP
Time:     15 minutes (an estimate)
Machine:  two CPU cores; four runs, each one minute on idle cores, 90 CPU seconds
Check:    python -m pytest exercises/test_ex08.py --tb=short --seed STUDENT_NUMBER

Only β differs between the runs, and they share one reference and its pairs. In this order:
1. Commit PREDICTION: the BETAS in the order of their KL(π ‖ π_ref) after training.
2. Train them, then draw:
       python train.py --preset toy --stage dpo --beta 0.25
       python train.py --preset toy --stage dpo --beta 0.5
       python train.py --preset toy --stage dpo --beta 1
       python train.py --preset toy --stage dpo --beta 2
       python exercises/ex08_order_the_frontier.py
3. Write EXPLANATION. Leave a wrong prediction as it is: the marks are for the reason that you give.
"""

import json
from pathlib import Path

BETAS = (0.25, 0.5, 1.0, 2.0)
QUESTION = "what does a larger β do to KL and reward, and why does a nat of KL buy less reward " \
           "further from π_ref?"

PREDICTION = None  # the BETAS in a list, from the least KL to the most
EXPLANATION = None  # two sentences: QUESTION


def measured(runs: Path) -> dict[float, dict]:
    """β -> result.json, of the runs that differ from the preset in β alone."""
    points = {}
    for beta in BETAS:
        for folder in (runs / f"dpo-beta{beta}", runs / "dpo"):  # the preset's own β has no suffix
            if (folder / "result.json").exists():
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                if config["settings"]["beta"] == beta:
                    points[beta] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return points


def draw(points: dict[float, dict], path: Path) -> None:
    """Reward against KL, a point per β, with standard errors."""
    from matplotlib.figure import Figure  # without pyplot: files, never windows

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for beta, p in points.items():
        axes.errorbar(p["kl"], p["reward"], p["reward_se"], p["kl_se"], "o", label=f"β = {beta:g}")
    axes.set(xlabel="KL(π ‖ π_ref), nats per completion", ylabel="mean true reward r*")
    axes.legend()
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    runs = Path(__file__).parent.parent / "out" / "toy"
    points = measured(runs)
    if PREDICTION is None:
        raise SystemExit("exercise 08: PREDICTION is None: commit the order first")
    if missing := [beta for beta in BETAS if beta not in points]:
        raise SystemExit(f"exercise 08: not trained yet: --beta {', '.join(map(str, missing))}")
    draw(points, runs / "ex08.png")
    print(f"the figure: {runs / 'ex08.png'}")


if __name__ == "__main__":
    main()
