"""Checks of exercise 02: Eq. 1 is a logistic choice, and Eq. 2 its negative log."""

import torch
from grading import near, normal, same_shape

B, N = 6, 5


def draw(rng):
    """rewards (B,), and N pairs of different completions."""
    pairs = torch.stack([torch.randperm(B, generator=rng)[:2] for _ in range(N)])
    return normal(rng, B), pairs[:, 0], pairs[:, 1]


def test_the_two_probabilities_sum_to_1(impl, rng):
    r1, r2 = normal(rng, 2, N)
    near(impl.preference_probability(r1, r2) + impl.preference_probability(r2, r1), torch.ones(N),
         "p(y₁ ≻ y₂) + p(y₂ ≻ y₁) must be 1: Eq. 1 is a probability, not its log")


def test_only_the_difference_counts(impl, rng):
    r1, r2 = normal(rng, 2, N)
    near(impl.preference_probability(r1 + 3, r2 + 3), impl.preference_probability(r1, r2),
         "the same number added to both rewards must change nothing (Lemma 1): Eq. 1 takes exp of "
         "each reward")


def test_the_better_one_is_likelier(impl, rng):
    r1, r2 = normal(rng, 2, N)
    p = impl.preference_probability(r1, r2)
    assert ((p > 0.5) == (r1 > r2)).all(), "r₁ > r₂ must give p(y₁ ≻ y₂) > 1/2: are r₁ and r₂ " \
        "swapped?"


def test_log_odds_are_the_difference(impl, rng):
    r1, r2 = normal(rng, 2, N)
    p = impl.preference_probability(r1, r2)
    near((p / (1 - p)).log(), r1 - r2, "log p/(1 - p) must be r₁ - r₂: Eq. 1 is the logistic "
         "function of the difference, and no other S-shaped function")


def test_large_rewards_do_not_overflow(impl):
    r1, r2 = torch.tensor([1000.0, -1000.0]), torch.tensor([999.0, -999.0])
    p = impl.preference_probability(r1, r2)
    assert p.isfinite().all(), f"rewards of 1000 and 999 gave {p[0]:g}: exp overflows, " \
        "σ(r₁ - r₂) does not"


def test_one_loss_per_pair(impl, rng):
    same_shape(impl.reward_model_loss(*draw(rng)), (N,),
               "return one loss per pair: the mean is taken later, over all micro-batches at once")


def test_the_loss_is_minus_a_log(impl, rng):
    rewards, yw, yl = draw(rng)
    both = (-impl.reward_model_loss(rewards, yw, yl)).exp() \
        + (-impl.reward_model_loss(rewards, yl, yw)).exp()
    near(both, torch.ones(N), "exp(-L) of a pair and of the reversed pair must sum to 1: L is "
         "minus the log of Eq. 1's probability, is the log missing?")


def test_raising_the_winner_lowers_the_loss(impl, rng):
    rewards, yw, yl = draw(rng)
    before = impl.reward_model_loss(rewards, yw, yl)
    for n in range(N):
        raised = rewards.clone()
        raised[yw[n]] += 1
        assert impl.reward_model_loss(raised, yw, yl)[n] < before[n], \
            "a higher r(y_w) gave a higher loss: are sign or indices swapped?"


def test_a_badly_wrong_pair_has_a_finite_loss(impl):
    loss = impl.reward_model_loss(torch.tensor([-500.0, 500.0]), torch.tensor([0]),
                                  torch.tensor([1]))
    near(loss, torch.tensor([1000.0]), f"a pair that is wrong by 1000 must cost 1000, got "
         f"{loss[0]:g}: log(sigmoid(x)) is log 0 there, logsigmoid(x) is x", 1e-2)
