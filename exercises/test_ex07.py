"""Checks of exercise 07: all ordered pairs of a prompt, once each, and the ties counted."""

import torch
from ex07_preference_pairs import pairs_in_loops
from grading import lines_run

G, K = 7, 4  # G > K: an index of another order is then seen in every pair


def draw(rng, tied=False, K=K):
    """rewards (G, K) without a tie, or with one in each group."""
    rewards = torch.rand(G, K, generator=rng)
    if tied:
        rewards[:, -1] = rewards[:, 0]
    return rewards


def pairs(impl, rewards) -> list[tuple[int, int]]:
    yw, yl, _ = impl.preference_pairs(rewards)
    return list(zip(yw.tolist(), yl.tolist()))


def test_indices_run_through_all_groups(impl, rng):
    found = pairs(impl, draw(rng))
    assert not all(w % G == l % G for w, l in found), "your indices are k*G + g, group by group " \
        "within a column: completion k of group g is g*K + k, row by row"
    used = {i for pair in found for i in pair}
    assert used <= set(range(G * K)) and {i // K for i in used} == set(range(G)), \
        f"{G} groups of {K}, and the indices run from {min(used)} to {max(used)}: completion k " \
        "of group g is g*K + k"


def test_pairs_stay_within_a_prompt(impl, rng):
    assert all(w // K == l // K for w, l in pairs(impl, draw(rng))), \
        "a pair joins completions of two prompts: Z(x) cancels only within one"


def test_nothing_is_paired_with_itself(impl, rng):
    assert all(w != l for w, l in pairs(impl, draw(rng))), \
        "a completion is paired with itself: is there >= in place of >?"


def test_the_better_one_comes_first(impl, rng):
    rewards = draw(rng)
    assert all(rewards.flatten()[w] >= rewards.flatten()[l] for w, l in pairs(impl, rewards)), \
        "a y_w has less reward than its y_l: the better one comes first"


def test_a_tie_has_no_winner(impl, rng):
    rewards = draw(rng, tied=True)
    assert all(rewards.flatten()[w] != rewards.flatten()[l] for w, l in pairs(impl, rewards)), \
        "a pair of equal rewards was kept: a tie has no winner"


def test_no_pair_comes_twice(impl, rng):
    found = pairs(impl, draw(rng))
    assert len(set(found)) == len(found), "a pair is listed twice, so it would count double"


def test_four_completions_give_six_pairs(impl, rng):
    found = pairs(impl, draw(rng))
    assert len(found) == 6 * G, "4 completions without a tie give 6 pairs per prompt, got " \
        f"{len(found) / G:g}: best against worst is only one of them"


def test_any_number_of_completions(impl, rng):
    rewards = draw(rng, K=5)
    assert sorted(pairs(impl, rewards)) == sorted(pairs_in_loops(rewards.tolist())[0]), \
        "with 5 completions per prompt the pairs are wrong: K is rewards.size(1), not always 4"


def test_close_rewards_are_no_tie(impl, rng):
    close = 0.5 + 3e-7 * torch.rand(G, K, generator=rng).argsort(1)
    found = pairs(impl, close)
    assert len(found) == 6 * G, "rewards that differ by 0.0000003 gave " \
        f"{len(found) / G:g} pairs per prompt in place of 6: only equal rewards are a tie, so " \
        "compare without a tolerance"


def test_a_tie_leaves_the_other_pairs(impl, rng):
    found = pairs(impl, draw(rng, tied=True))
    assert len(found) == 5 * G, "a group with one tie has 5 other pairs, got " \
        f"{len(found) / G:g}: leave out the tied pair, not its group"


def test_ties_are_counted_once(impl, rng):
    rewards = draw(rng, tied=True)
    *_, ties = impl.preference_pairs(rewards)
    assert ties == G, f"got {ties} ties in {G} groups with one tie each: count an unordered pair " \
        "once, and no completion with itself"


def test_no_loop_over_the_groups(impl, rng):
    rewards = draw(rng, tied=True)
    assert sorted(pairs(impl, rewards)) == sorted(pairs_in_loops(rewards.tolist())[0]), \
        "the pairs differ from those of pairs_in_loops"
    more, fewer = (lines_run(impl.preference_pairs, r) for r in (rewards.repeat(2, 1), rewards))
    assert more == fewer, "twice as many groups ran more lines of Python: there is a loop over them"
