"""Checks of exercise 05: the weight is the slope of Eq. 7, and nothing else has a gradient."""

import torch
import torch.nn.functional as F
from grading import committed, near, normal

B, N, BETA = 8, 4, 0.3


def draw(rng):
    """log π_θ (B,) with a gradient, log π_ref (B,), winners (N,), losers (N,)."""
    pairs = torch.randperm(B, generator=rng).view(N, 2)
    pi = 3 * normal(rng, B) - 30
    return pi.requires_grad_(), 3 * normal(rng, B) - 30, pairs[:, 0], pairs[:, 1]


def slope(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


def test_the_weight_at_step_0(impl):
    said = committed(impl, "PREDICTION", "05", "commit the weight of every pair at step 0")
    m = torch.zeros(1, requires_grad=True)
    measured = -slope(-F.logsigmoid(m), m).item()  # autograd on Eq. 7, where every margin is 0
    assert abs(said - measured) < 1e-6, f"you said {said}, measured {measured:g}: at step 0 " \
        "π_θ = π_ref, every margin is 0, whatever β"


def test_a_pair_in_disorder_weighs_more(impl, rng):
    m = normal(rng, N).abs()
    assert (impl.sigmoid_weight(-m, BETA) > impl.sigmoid_weight(m, BETA)).all(), \
        "a pair in the right order weighs more than one in the wrong order: is the sign of m right?"


def test_the_weight_is_a_slope(impl, rng):
    m = 3 * normal(rng, N).requires_grad_()
    near(impl.sigmoid_weight(m.detach(), BETA), -slope(-F.logsigmoid(m), m),
         "w must be minus the slope of -log σ(m): the margin m has β in it already, and the β "
         "before E is not the weight's")


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


def test_the_winner_is_pushed_up(impl, rng):
    pi, ref, yw, yl = draw(rng)
    flat = torch.full_like(pi, -30.0).requires_grad_()
    losses, _ = impl.weighted_loss(flat, ref, yw, yl, BETA, lambda m, beta: torch.sigmoid(-m))
    assert (slope(losses, flat)[yw] < 0).all(), "a step downhill must raise log π(y_w): it " \
        "lowers it, is the minus there?"


def test_a_constant_weight_pushes_with_beta(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, _ = impl.weighted_loss(pi, ref, yw, yl, BETA, lambda m, beta: torch.ones_like(m))
    near(slope(losses, pi)[yw], -BETA, "with w = 1 every pair must push log π(y_w) with β: "
         "is β before the weight missing?")


def test_the_weight_has_no_gradient(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, _ = impl.weighted_loss(pi, ref, yw, yl, BETA, lambda m, beta: torch.sigmoid(-m))
    h = pi - ref
    near(slope(losses, pi), slope(-F.logsigmoid(BETA * (h[yw] - h[yl])), pi), "with DPO's weight "
         "the gradient must be Eq. 7's: w is a number that multiplies, detach it")
