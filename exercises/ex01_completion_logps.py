"""Exercise 01 · What a language model thinks of a completion: logits to log π(y|x).

Equation: log π(y|x) = Σ_t log π(y_t | x, y_<t), over the tokens of y, its EOS included, in nats
Kind:     WRITE
Time:     15 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex01.py -x --seed STUDENT_NUMBER

Every loss of the paper is made of this one number. Below is a slow version that is plainly right:
write the same without a loop. Three things hide in it. The logits at position t are about token
t + 1. The prompt x is given and is not scored; neither is padding. The EOS is scored: that the
text ends here is part of what the model says.

B sequences, T tokens, V vocabulary.
"""

import torch
from torch import Tensor


def log_pi_in_loops(logits: Tensor, idx: Tensor, prompt_lens: Tensor, lengths: Tensor) -> Tensor:
    """The specification: logits (B, T, V), idx (B, T), prompt_lens (B,), lengths (B,) -> (B,).

    `lengths` count the prompt and y, EOS included; what follows is padding.
    """
    out = []
    for b in range(len(idx)):
        total = torch.zeros((), dtype=logits.dtype)
        for t in range(int(prompt_lens[b]), int(lengths[b])):
            probabilities = logits[b, t - 1].softmax(-1)  # of the token after position t - 1
            total = total + probabilities[idx[b, t]].log()
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
