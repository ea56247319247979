"""Exercise 06 · Swap the importance weight for a constant, and see what it was good for.

Equation: ∇L = -β E[w (∇log π(y_w) - ∇log π(y_l))], with w = σ(-m), and with w = 1
Kind:     PREDICT and SWEEP (Section 4: without the weight the model can degenerate)
Time:     20 minutes, while it trains
Machine:  two CPU cores, 3 minutes of training; a GPU for the same on IMDb
Check:    python -m pytest exercises/test_ex06.py --seed STUDENT_NUMBER

The knob is the weight. In this order:
1. Write constant_weight, one line, and commit PREDICTION: of two runs from the same reference,
   data and seed, which ends higher in each of QUANTITIES?
2. Run the pair, and look at out/toy/degenerate/degenerate.png:
       python train.py --preset toy --stage degenerate
   Your own weight, whatever it is, trains and draws its curves with
       python train.py --preset toy --weight exercises/ex06_swap_the_weight.py:constant_weight
3. Write EXPLANATION. Leave a wrong prediction as it is: what counts is the reason that you give.
"""

import json
from pathlib import Path

from torch import Tensor

QUANTITIES = {"kl": "KL(π ‖ π_ref) of samples, nats a completion",
              "ref_ppl": "perplexity of the samples under π_ref",
              "grammatical": "share of sentences that are in the language",
              "logp_chosen": "log π(y_w|x), nats",
              "logp_rejected": "log π(y_l|x), nats"}
ALSO = ("reward", "eos", "repetition")  # shown beside them
QUESTION = "why does the constant weight do this, and what would the mean reward alone have told?"

PREDICTION = None  # {"kl": "dpo" or "constant", ...}: the run in which each ends higher
EXPLANATION = None  # two sentences: QUESTION


def constant_weight(margin: Tensor, beta: float) -> Tensor:
    """The naive loss's weight: margins (N,) and β -> (N,), the same for every pair."""
    raise NotImplementedError("exercise 06: write the constant weight")


def measured(runs: Path) -> dict[str, dict]:
    """The last row of each of the two runs: {"dpo": row, "constant": row}; {} before they exist."""
    path = runs / "degenerate" / "degenerate.json"
    if not path.exists():
        return {}
    rows = sorted(json.loads(path.read_text(encoding="utf-8")), key=lambda row: row["step"])
    names = {"sigmoid": "dpo", "constant": "constant"}
    return {names[row["weight"]]: row for row in rows if row["weight"] in names}
