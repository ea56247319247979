"""Checks of exercise 05: the weight is the slope of Eq. 7, and nothing else has a gradient."""

import torch
import torch.nn.functional as F
from grading import committed, losses_and_rewards, near, normal, slope

B, N, BETA = 8, 4, 0.3


def draw(rng):
    """log π_θ (B,) with a gradient, log π_ref (B,), winners (N,), losers (N,)."""
    pairs = torch.randperm(B, generator=rng).view(N, 2)
    pi = 3 * normal(rng, B) - 30
    return pi.requires_grad_(), 3 * normal(rng, B) - 30, pairs[:, 0], pairs[:, 1]


def test_the_prediction_is_a_number(impl):
    said = prediction(impl)
    assert isinstance(said, (int, float)), f"PREDICTION is {said!r}: give the weight as a number"


def test_the_measurement_agrees(impl):
    said, m = float(prediction(impl)), torch.zeros(1, requires_grad=True)
    measured = -slope(-F.logsigmoid(m), m).item()  # autograd on Eq. 7, where every margin is 0
    assert abs(said - measured) < 1e-6, f"you predicted {said:g}, and the weight is " \
        f"{measured:g}: at step 0 π_θ = π_ref, so every margin is 0, whatever β is"


def test_a_pair_in_the_wrong_order_weighs_more(impl, rng):
    m = normal(rng, N).abs()
    assert (impl.sigmoid_weight(-m, BETA) > impl.sigmoid_weight(m, BETA)).all(), \
        "a pair in the right order weighs more than one in the wrong order: is the sign of m right?"


def test_the_weight_is_a_slope(impl, rng):
    m = 3 * normal(rng, N).requires_grad_()
    near(impl.sigmoid_weight(m.detach(), BETA), -slope(-F.logsigmoid(m), m),
         "w must be minus the slope of -log σ(m): β is already in the margin m, and the β before "
         "E does not belong to the weight")


def test_large_margins_do_not_overflow(impl):
    w = impl.sigmoid_weight(torch.tensor([-1000.0, 1000.0]), BETA)
    assert w.isfinite().all(), f"the weight is {w[0]:g} at margin -1000 and {w[1]:g} at margin " \
        "1000: exp overflows, torch.sigmoid does not"


def test_losses_of_pairs_and_rewards_of_completions(impl, rng):
    pi, ref, yw, yl = draw(rng)
    _, rewards = losses_and_rewards(
        impl.weighted_loss(pi, ref, yw, yl, BETA, lambda m, beta: torch.ones_like(m)), N, B)
    near(rewards, BETA * (pi - ref), "the second result is r̂ = β (log π_θ - log π_ref)")


def test_the_weight_sees_the_margin(impl, rng):
    pi, ref, yw, yl = draw(rng)
    seen = []

    def spy(margin, beta):
        seen.append(margin.detach())
        return torch.ones_like(margin)

    impl.weighted_loss(pi, ref, yw, yl, BETA, spy)
    h = (pi - ref).detach()
    near(seen[0], BETA * (h[yw] - h[yl]), "the weight must be called with the margin "
         "m = r̂(y_w) - r̂(y_l), r̂ = β (log π_θ - log π_ref): is π_ref in it?")


def slopes_where_all_are_equally_likely(impl, rng):
    """The gradient in log π(y_w) and in log π(y_l) (N,) each. There a weight that has a gradient by
    mistake does not change the signs."""
    _, ref, yw, yl = draw(rng)
    flat = torch.full((B,), -30.0, dtype=ref.dtype, requires_grad=True)
    losses, _ = impl.weighted_loss(flat, ref, yw, yl, BETA, lambda m, beta: torch.sigmoid(-m))
    gradient = slope(losses, flat)
    return gradient[yw], gradient[yl]


def test_the_winner_is_pushed_up(impl, rng):
    in_winner, _ = slopes_where_all_are_equally_likely(impl, rng)
    assert (in_winner < 0).all(), "a step of gradient descent must raise log π(y_w), and it " \
        "lowers it: is the minus there?"


def test_the_loser_is_pushed_down(impl, rng):
    _, in_loser = slopes_where_all_are_equally_likely(impl, rng)
    assert (in_loser > 0).all(), "a step of gradient descent must lower log π(y_l), and it does " \
        "not: is its term there?"


def test_a_constant_weight_pushes_with_beta(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, _ = impl.weighted_loss(pi, ref, yw, yl, BETA, lambda m, beta: torch.ones_like(m))
    near(slope(losses, pi)[yw], -BETA, "with w = 1 the gradient in every log π(y_w) must be -β: "
         "is β before the weight missing?")


def test_the_weight_has_no_gradient(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, _ = impl.weighted_loss(pi, ref, yw, yl, BETA, lambda m, beta: torch.sigmoid(-m))
    h = pi - ref
    near(slope(losses, pi), slope(-F.logsigmoid(BETA * (h[yw] - h[yl])), pi), "with DPO's weight "
         "the gradient must be that of Eq. 7: w is a factor and has no gradient, detach it")


def prediction(impl):
    return committed(impl, "PREDICTION", "05", "commit the weight of every pair at step 0")
