"""Checks of exercise 07: all ordered pairs of a prompt, once each, ties counted."""

import torch
from ex07_preference_pairs import pairs_in_loops
from grading import lines_run

G, K = 5, 4


def draw(rng, tied=False):
    """rewards (G, K) without a tie, or with at least one in each group."""
    rewards = torch.rand(G, K, generator=rng)
    if tied:
        rewards[:, -1] = rewards[:, 0]
    return rewards[torch.randperm(G, generator=rng)]


def pairs(impl, rewards) -> list[tuple[int, int]]:
    yw, yl, _ = impl.preference_pairs(rewards)
    return list(zip(yw.tolist(), yl.tolist()))


def test_indices_run_through_all_groups(impl, rng):
    used = {i for pair in pairs(impl, draw(rng)) for i in pair}
    assert used <= set(range(G * K)) and {i // K for i in used} == set(range(G)), \
        f"{G} groups of {K}, and the indices run from {min(used)} to {max(used)}: completion k " \
        "of group g is g*K + k"


def test_pairs_stay_within_a_prompt(impl, rng):
    assert all(w // K == l // K for w, l in pairs(impl, draw(rng))), \
        "a pair joins completions of two prompts: Z(x) cancels only within one"


def test_nothing_is_paired_with_itself(impl, rng):
    assert all(w != l for w, l in pairs(impl, draw(rng))), \
        "a completion is paired with itself: > where there is >=?"


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
    assert len(set(found)) == len(found), "a pair is listed twice: it would count double"


def test_four_completions_give_six_pairs(impl, rng):
    found = pairs(impl, draw(rng))
    assert len(found) == 6 * G, f"4 completions without a tie give 6 pairs a prompt, got " \
        f"{len(found) / G:g}: best against worst is one of them"


def test_ties_are_counted_once(impl, rng):
    rewards = draw(rng, tied=True)
    *_, ties = impl.preference_pairs(rewards)
    assert ties == pairs_in_loops(rewards.tolist())[1], f"got {ties} ties in {G} groups with one " \
        "each: count an unordered pair once, and nothing with itself"


def test_no_loop_over_the_groups(impl, rng):
    rewards = draw(rng, tied=True)
    assert sorted(pairs(impl, rewards)) == sorted(pairs_in_loops(rewards.tolist())[0]), \
        "not the pairs that pairs_in_loops gives"
    more, fewer = (lines_run(impl.preference_pairs, r) for r in (rewards.repeat(2, 1), rewards))
    assert more == fewer, "twice the groups ran more lines of Python: there is a loop over them"
