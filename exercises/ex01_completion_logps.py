"""Exercise 01 · From logits to log π(y|x), the log-probability of a completion.

Equation: log π(y|x) = Σ_t log π(y_t | x, y_<t), over the tokens of y, its EOS included, in nats
Kind:     WRITE
Time:     15 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex01.py -x --tb=short --seed STUDENT_NUMBER

Every loss of the paper is a function of this number. The function below computes it with two loops,
so that it is easy to check. Write the same without a loop. Three details matter. The logits at
position t predict token t + 1. The prompt x is given, so it is not scored; padding is not scored
either. The EOS is scored, because the model also predicts where the text ends.

B sequences, T tokens, V vocabulary.
"""

import torch
from torch import Tensor


def log_pi_in_loops(logits: Tensor, idx: Tensor, prompt_lens: Tensor, lengths: Tensor) -> Tensor:
    """The specification: logits (B, T, V), idx (B, T), prompt_lens (B,), lengths (B,) -> (B,).

    `lengths` count the prompt and y, EOS included. The tokens after them are padding.
    """
    out = []
    for b in range(len(idx)):
        total = torch.zeros((), dtype=logits.dtype)
        for t in range(int(prompt_lens[b]), int(lengths[b])):
            logp = logits[b, t - 1].log_softmax(-1)  # (V,), of the token after position t - 1
            total = total + logp[idx[b, t]]
        out.append(total)
    return torch.stack(out)


def logits_to_token_logps(logits: Tensor, idx: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B, T): [b, t] is log π(idx[b, t] | idx[b, :t]).

    Column 0 is 0: nothing predicts a first token.
    """
    raise NotImplementedError("exercise 01: write logits_to_token_logps")


def completion_logps(token_logps: Tensor, prompt_lens: Tensor, lengths: Tensor) -> Tensor:
    """(B, T), (B,), (B,) -> log π(y|x) (B,): the sum over prompt_len <= t < length."""
    raise NotImplementedError("exercise 01: write completion_logps")
