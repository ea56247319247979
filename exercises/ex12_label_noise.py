"""Exercise 12 · Wrong labels: what noise in the preferences does to DPO.

Equation: E L = -(1 - P) log σ(m) - P log σ(-m), the mean of Eq. 7 if a label is wrong at rate P
Kind:     WRITE, PREDICT and SWEEP (Eq. 7; cDPO)
Time:     25 minutes (an estimate)
Machine:  two CPU cores; four runs of about 55 CPU seconds each
Check:    python -m pytest exercises/test_ex12.py --tb=short --seed STUDENT_NUMBER

With --label-noise P, each training pair has y_w and y_l exchanged with probability P. The held-out
pairs and r*, which judge the model, keep the truth. cDPO's loss is the one above, with P = 0.1, for
every pair. In this order:
1. Write best_margin. Then commit PREDICTION: the names in RUNS in the order of their KL(π ‖ π_ref)
   after training, all at the same β.
2. Train them, then print what each reached:
       python train.py --preset toy --stage dpo --beta 0.5 --dpo-steps 300
       python train.py --preset toy --stage dpo --beta 0.5 --dpo-steps 300 --weight cdpo
       python train.py --preset toy --stage dpo --beta 0.5 --dpo-steps 300 --label-noise 0.2
       python train.py --preset toy --beta 0.5 --dpo-steps 300 --label-noise 0.2 --weight cdpo
       python exercises/ex12_label_noise.py
3. Write EXPLANATION. Leave a wrong prediction as it is: the marks are for the reason that you give.
"""

import json
from pathlib import Path

RUNS = {"true labels": "dpo-beta0.5-dpo_steps300",  # name -> folder
        "true labels, cDPO": "dpo-cdpo-beta0.5-dpo_steps300",
        "noise": "dpo-beta0.5-dpo_steps300-label_noise0.2",
        "noise, cDPO": "dpo-cdpo-beta0.5-dpo_steps300-label_noise0.2"}
QUESTION = "why does noise lower KL and reward at the same β, and what does cDPO change?"

PREDICTION = None  # the names in RUNS in a list, from the least KL to the most
EXPLANATION = None  # two sentences: QUESTION


def best_margin(noise: float) -> float:
    """The margin m at which E L is least, for a rate P of wrong labels above 0."""
    raise NotImplementedError("exercise 12: write the margin")


def measured(runs: Path) -> dict[str, dict]:
    """name -> result.json, of the finished RUNS."""
    return {name: json.loads((runs / folder / "result.json").read_text(encoding="utf-8"))
            for name, folder in RUNS.items() if (runs / folder / "result.json").exists()}


def main() -> None:
    points = measured(Path(__file__).parent.parent / "out" / "toy")
    if PREDICTION is None:
        raise SystemExit("exercise 12: PREDICTION is None: commit the order first")
    if missing := [name for name in RUNS if name not in points]:
        raise SystemExit(f"exercise 12: not trained yet: {'; '.join(missing)}")
    for name, p in points.items():
        print(f"{name:<18} KL {p['kl']:.2f} ±{p['kl_se']:.2f} nats   "
              f"reward {p['reward']:.3f} ±{p['reward_se']:.3f}")


if __name__ == "__main__":
    main()
