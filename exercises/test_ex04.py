"""Checks of exercise 04: the tilted policy is the optimum, and its reward can be recovered."""

import torch
from grading import near, normal

P, K, BETA = 3, 4, 0.5


def draw(rng):
    """log π_ref (P, K), rewards (P, K)."""
    return normal(rng, P, K).log_softmax(-1), normal(rng, P, K)


def test_the_policy_sums_to_1(impl, rng):
    ref, r = draw(rng)
    near(impl.optimal_policy(ref, r, BETA).exp().sum(-1), torch.ones(P),
         "exp of the result must sum to 1 over the responses of a prompt: return log π_r, and "
         "divide by Z(x)")


def test_equal_rewards_leave_the_reference(impl, rng):
    ref, _ = draw(rng)
    near(impl.optimal_policy(ref, torch.ones(P, K, dtype=ref.dtype), BETA), ref,
         "equal rewards must give π_ref itself: Eq. 4 multiplies π_ref, is π_ref there?")


def test_beta_divides_the_reward(impl, rng):
    ref, r = draw(rng)
    near(impl.optimal_policy(ref, r, 1e6), ref, "at β = 1e6 a nat of KL costs so much that π_r "
         "must be π_ref: the reward is divided by β, not multiplied", 1e-4)
    best = impl.optimal_policy(ref, r, 1e-3).argmax(-1)
    assert (best == r.argmax(-1)).all(), "at β = 0.001 KL costs almost nothing, so the response " \
        "with the highest reward must be the likeliest: is the sign of r right?"


def test_beta_is_the_price_of_kl(impl, rng):
    ref, r = draw(rng)
    pi = normal(rng, P, K).log_softmax(-1)
    near(impl.objective(pi, ref, r, 1e-12), (pi.exp() * r).sum(-1), "at β = 0 Eq. 3 is the mean "
         "reward under π: β multiplies the KL, is it there?")
    assert (impl.objective(pi, ref, r, 2.0) < impl.objective(pi, ref, r, 1.0)).all(), \
        "a higher β must lower Eq. 3's value: the KL is subtracted from the reward"


def test_the_policy_weighs_the_kl(impl, rng):
    ref, r = draw(rng)
    sure = torch.full_like(ref, -60.0)
    sure[:, 0] = 0  # all on the first response
    near(impl.objective(sure, ref, r, BETA), r[:, 0] + BETA * ref[:, 0], "a π that always gives y "
         "must have the value r(y) + β log π_ref(y): KL(π ‖ π_ref) weighs the log-ratio by π, are "
         "the two reversed?")


def test_no_policy_is_better(impl, rng):
    ref, r = draw(rng)
    top = impl.objective(impl.optimal_policy(ref, r, BETA), ref, r, BETA)
    near(top, BETA * (ref + r / BETA).logsumexp(-1), "the highest value of Eq. 3 is β log Z(x), "
         "and your π_r is below it: the exponent is r/β, with r exactly as it is given")


def test_the_policy_gives_its_reward_back(impl, rng):
    ref, r = draw(rng)
    pi = (ref + r / BETA).log_softmax(-1)
    found = impl.implicit_reward(pi, ref, BETA)
    near((found - r).amax(-1), (found - r).amin(-1), "without log Z, Eq. 5 must give r up to one "
         "number per prompt: β (log π_r - log π_ref), is β there?")


def test_log_z_gives_the_level(impl, rng):
    ref, r = draw(rng)
    pi, log_z = (ref + r / BETA).log_softmax(-1), (ref + r / BETA).logsumexp(-1, keepdim=True)
    near(impl.implicit_reward(pi, ref, BETA, log_z), r, "with log Z(x), Eq. 5 must give r itself: "
         "its last term is β log Z(x)")
