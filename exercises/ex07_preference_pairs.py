"""Exercise 07 · Four completions of a prompt give six pairs.

Equation: {(y_w, y_l) : r*(x,y_w) > r*(x,y_l)}, all of them within each prompt (App. C.1)
Kind:     WRITE
Time:     20 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex07.py -x --tb=short --seed STUDENT_NUMBER

The function below makes the pairs with loops; write the same without a loop. Four completions have
six unordered pairs, and the reward orders each. Completions of different prompts are never
compared, because Z(x) would not cancel. Two equal rewards are a tie: it has no winner, so that pair
is left out and counted.

G groups, one per prompt; K completions in each; N pairs.
"""

from torch import Tensor


def pairs_in_loops(rewards: list[list[float]]) -> tuple[list[tuple[int, int]], int]:
    """The specification: rewards, G lists of K -> [(winner, loser), ...] and the number of ties.

    The indices count all G*K completions: completion k of group g has index g*K + k.
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
    """rewards (G, K) -> yw_idxs (N,), yl_idxs (N,), ties; the pairs in any order."""
    raise NotImplementedError("exercise 07: write the pairs")
