"""Checks of exercise 11: the orders sum to 1, and K = 2 gives Eq. 7."""

import itertools
import math

import torch
import torch.nn.functional as F
from grading import near, normal, same_shape

G, K, BETA = 5, 4, 0.3


def test_all_orders_sum_to_1(impl, rng):
    orders = torch.tensor(list(itertools.permutations(range(K))))  # (K!, K)
    logp, _ = impl.ranking_logps(normal(rng, 1, K).expand(len(orders), K), orders)
    near(logp.exp().sum(), 1.0, "the probabilities of the 4! orders must sum to 1: the sum in "
         "the denominator runs over j ≥ k, k itself included")


def test_the_best_comes_first(impl, rng):
    scores, rewards = normal(rng, G, K), normal(rng, G, K)
    raised = scores + F.one_hot(rewards.argmax(1), K)
    before, after = (impl.ranking_logps(s, rewards)[0] for s in (scores, raised))
    assert (after > before).all(), \
        "a higher score of the best completion made the ranking less likely: best first"


def test_scores_may_be_large(impl, rng):
    rewards = normal(rng, G, K)
    logp, _ = impl.ranking_logps(1000 + normal(rng, G, K), rewards)
    assert logp.isfinite().all(), "scores near 1000 gave a log p that is not finite: logsumexp, " \
        "not log of a sum of exp"


def test_tied_completions_leave(impl, rng):
    scores, rewards = normal(rng, G, K), normal(rng, G, K)
    rewards[:, -1] = rewards[:, 0]
    logp, tied = impl.ranking_logps(scores, rewards)
    wanted, _ = impl.ranking_logps(scores[:, 1:-1], rewards[:, 1:-1])
    near(logp, wanted, "completions of equal reward must leave the ranking: log p must be that of "
         "the others alone")
    assert tied[:, [0, -1]].all() and not tied[:, 1:-1].any(), \
        "`tied` must be true for completions of equal reward and for no others"


def test_the_reference_costs_log_of_K_factorial(impl, rng):
    ref, rewards = normal(rng, G * K) - 30, normal(rng, G, K)
    losses, _, _ = impl.plackett_luce_loss(ref, ref, rewards, BETA)
    near(losses, math.log(24), "π_θ = π_ref must cost log 4! on every group: is π_ref in the loss?")


def test_two_completions_are_eq_7(impl, rng):
    pi, ref, rewards = normal(rng, 2 * G), normal(rng, 2 * G), normal(rng, G, 2)
    losses, r_hat, _ = impl.plackett_luce_loss(pi, ref, rewards, BETA)
    h, first = (pi - ref).view(G, 2), rewards[:, 0] > rewards[:, 1]
    margin = (h[:, 0] - h[:, 1]) * torch.where(first, 1, -1)
    near(losses, -F.logsigmoid(BETA * margin), "with two completions it must be Eq. 7: is β in r̂?")
    near(r_hat, BETA * (pi - ref), "r̂ = β (log π_θ - log π_ref), one per completion")


def test_groups_without_an_order_are_skipped(impl, rng):
    pi, ref, rewards = normal(rng, G * K), normal(rng, G * K), normal(rng, G, K)
    rewards[0, 1:] = rewards[0, 0]  # 4 tied, none left
    rewards[1, 2:] = rewards[1, 2]  # 2 tied, two left
    rewards[2, 1:] = rewards[2, 1]  # 3 tied, one left: no order
    losses, _, counts = impl.plackett_luce_loss(pi, ref, rewards, BETA)
    same_shape(losses, (G - 2,), "a group with fewer than two completions left must be skipped: "
               "a loss of 0 for it would count in the mean")
    assert counts == dict(tied=9, skipped=2), f"the counts are {counts}: 9 completions are tied, " \
        "2 groups are skipped"
