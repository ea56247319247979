"""Exercise 07 · Four completions of a prompt, six pairs.

Equation: {(y_w, y_l) : r*(x,y_w) > r*(x,y_l)}, all of them within each prompt (App. C.1)
Kind:     WRITE
Time:     20 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex07.py -x --seed STUDENT_NUMBER

The slow version is below; write it without a loop. Four completions have six unordered pairs, and
the reward orders each. Completions of different prompts are never compared: Z(x) would no longer
cancel. A tie has no winner; it is left out and counted.

G groups, one a prompt; K completions in each; N pairs.
"""

from torch import Tensor


def pairs_in_loops(rewards: list[list[float]]) -> tuple[list[tuple[int, int]], int]:
    """The specification: rewards, G lists of K -> [(winner, loser), ...] and the number of ties.

    The indices run through all G*K completions: completion k of group g is g*K + k.
    """
    pairs, ties, K = [], 0, len(rewards[0])
    for g, group in enumerate(rewards):
        for i in range(K):
            for j in range(i + 1, K):
                if group[i] == group[j]:
                    ties += 1
                elif group[i] > group[j]:
                    pairs.append((g * K + i, g * K + j))
                else:
                    pairs.append((g * K + j, g * K + i))
    return pairs, ties


def preference_pairs(rewards: Tensor) -> tuple[Tensor, Tensor, int]:
    """rewards (G, K) -> yw_idxs (N,), yl_idxs (N,), ties. In any order of the pairs."""
    raise NotImplementedError("exercise 07: write the pairs")
