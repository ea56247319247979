"""Exercise 06 · Replace the importance weight by a constant, and see what the weight is for.

Equation: ∇L = -β E[w (∇log π(y_w) - ∇log π(y_l))], with w = σ(-m), and with w = 1
Kind:     WRITE, PREDICT and SWEEP (Section 4: without the weight the model can degenerate)
Time:     20 minutes (an estimate), while it trains
Machine:  two CPU cores; nine runs of about 50 CPU seconds each
Check:    python -m pytest exercises/test_ex06.py --tb=short --seed STUDENT_NUMBER

Only the weight differs between the two runs. In this order:
1. Write constant_weight, one line, and commit PREDICTION: the two runs have the same reference,
   data and seed; in which of them does each of QUANTITIES end higher?
2. Train both, and look at out/toy/degenerate/degenerate.png:
       python train.py --preset toy --stage degenerate
   Your own weight, whatever it is, trains with
       python train.py --preset toy --weight exercises/ex06_swap_the_weight.py:constant_weight
3. Write EXPLANATION. Leave a wrong prediction as it is: the marks are for the reason that you give.
"""

import json
from pathlib import Path

from torch import Tensor

QUANTITIES = {"kl": "KL(π ‖ π_ref) of samples, nats per completion",
              "ref_ppl": "perplexity of the samples under π_ref",
              "grammatical": "share of sentences that are in the language",
              "logp_chosen": "log π(y_w|x), nats",
              "logp_rejected": "log π(y_l|x), nats"}
ALSO = ("reward", "eos", "repetition")  # printed beside them, not predicted
QUESTION = "why does the constant weight do this, and would the mean reward alone have shown it?"

PREDICTION = None  # {"kl": "dpo" or "constant", ...}: the run in which each ends higher
EXPLANATION = None  # two sentences: QUESTION


def constant_weight(margin: Tensor, beta: float) -> Tensor:
    """The weight of the naive loss: margins (N,) and β -> (N,), the same for every pair."""
    raise NotImplementedError("exercise 06: write the constant weight")


def measured(runs: Path) -> dict[str, dict]:
    """The last row of two runs with one seed: {"dpo": row, "constant": row}; {} before they exist.
    """
    path = runs / "degenerate" / "degenerate.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))  # of a run in the order of its steps
    names = {"sigmoid": "dpo", "constant": "constant"}
    return {names[row["weight"]]: row for row in rows
            if row["weight"] in names and row["seed"] == rows[0]["seed"]}
