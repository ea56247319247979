"""Checks of exercise 03: Eq. 7 in index form."""

import math

import torch
import torch.nn.functional as F
from grading import losses_and_rewards, near, normal, slope

B, N, BETA = 8, 4, 0.3


def draw(rng):
    """log π_θ (B,), log π_ref (B,), and N pairs of different completions, in no order."""
    pairs = torch.randperm(B, generator=rng).view(N, 2)
    return normal(rng, B) - 30, normal(rng, B) - 30, pairs[:, 0], pairs[:, 1]


def test_losses_of_pairs_and_rewards_of_completions(impl, rng):
    losses_and_rewards(impl.dpo_loss(*draw(rng), BETA), N, B)


def test_the_reference_is_in_the_loss(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, other = (impl.dpo_loss(pi, x, yw, yl, BETA)[0] for x in (ref, ref + normal(rng, B)))
    assert (losses != other).all(), "another log π_ref gave the same losses: is π_ref in the loss?"


def test_the_reference_costs_log_2(impl, rng):
    _, ref, yw, yl = draw(rng)
    losses, _ = impl.dpo_loss(ref, ref, yw, yl, BETA)
    near(losses[1:], losses[:-1], "π_θ = π_ref must cost log 2 on every pair, and the losses "
         "differ: log π_ref must cancel log π_θ, so subtract first and then multiply by β", 1e-6)
    near(losses, math.log(2), f"π_θ = π_ref must cost log 2 = 0.6931 on every pair, got "
         f"{losses[0]:.4f}: β scales the margin inside σ, not the loss", 1e-6)


def test_pairs_go_by_their_indices(impl, rng):
    pi, ref, yw, yl = draw(rng)
    order = torch.randperm(B, generator=rng)
    place = order.argsort()  # where completion b has gone
    near(impl.dpo_loss(pi[order], ref[order], place[yw], place[yl], BETA)[0],
         impl.dpo_loss(pi, ref, yw, yl, BETA)[0], "the same completions in another order, with the "
         "indices to match, gave other losses: yw_idxs and yl_idxs name the pairs, not halves of "
         "the batch")


def test_only_the_difference_of_log_probs_counts(impl, rng):
    pi, ref, yw, yl = draw(rng)
    near(impl.dpo_loss(pi + 3, ref, yw, yl, BETA)[0], impl.dpo_loss(pi, ref, yw, yl, BETA)[0],
         "3 added to every log π_θ changed the losses, but it must cancel as Z(x) does: h is the "
         "difference log π_θ - log π_ref, neither a quotient of the two nor its exp")


def test_raising_the_winner_lowers_the_loss(impl, rng):
    pi, ref, yw, yl = draw(rng)
    before, _ = impl.dpo_loss(pi, ref, yw, yl, BETA)
    for n in range(N):
        raised = pi.clone()
        raised[yw[n]] += 1
        assert impl.dpo_loss(raised, ref, yw, yl, BETA)[0][n] < before[n], \
            "a higher log π(y_w) gave a higher loss: are sign or indices swapped?"


def test_beta_multiplies_the_margin(impl, rng):
    pi, ref, yw, yl = draw(rng)
    near(impl.dpo_loss(pi, ref, yw, yl, 2 * BETA)[0],
         impl.dpo_loss(ref + 2 * (pi - ref), ref, yw, yl, BETA)[0],
         "2β with h must cost as much as β with 2h: is β missing from the margin?")


def test_rewards_are_those_of_the_loss(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, rewards = impl.dpo_loss(pi, ref, yw, yl, BETA)
    assert ((rewards > 0) == (pi > ref)).all(), "a completion that π_θ makes likelier than π_ref " \
        "must have a reward above 0: r̂ = β (log π_θ - log π_ref), is the sign right?"
    near(losses, -F.logsigmoid(rewards[yw] - rewards[yl]), "Eq. 2 with the rewards that you return "
         "must be your loss: r̂ = β (log π_θ - log π_ref), is β in the rewards?", 1e-6)


def test_losses_have_a_gradient_and_rewards_have_none(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, rewards = impl.dpo_loss(pi.requires_grad_(), ref, yw, yl, BETA)
    assert losses.requires_grad, "the losses have no gradient: detach the rewards that you " \
        "return, not what the loss is made of"
    assert not rewards.requires_grad, "the rewards carry a gradient: detach them, because a " \
        "logged tensor with a gradient keeps the whole graph in memory"


def test_winner_and_loser_are_pushed_equally(impl, rng):
    pi, ref, yw, yl = draw(rng)
    losses, _ = impl.dpo_loss(pi.requires_grad_(), ref, yw, yl, BETA)
    gradient = slope(losses, pi)
    near(gradient[yw], -gradient[yl], f"the gradient is {gradient[yw[0]]:.3f} in log π(y_w) and "
         f"{gradient[yl[0]]:.3f} in log π(y_l): they must be equal in size and opposite in sign, "
         "is one of the two detached?")


def test_a_badly_wrong_pair_has_a_finite_loss(impl):
    pi, ref = torch.tensor([-5000.0, -10.0]), torch.tensor([-10.0, -10.0])
    losses, _ = impl.dpo_loss(pi, ref, torch.tensor([0]), torch.tensor([1]), 1.0)
    near(losses, torch.tensor([4990.0]), f"a pair that is wrong by 4990 nats must cost 4990, got "
         f"{losses[0]:g}: sigmoid(x) is 0 there, so its log is -inf, or the log of the small "
         "number that you added; logsigmoid(x) is x", 1e-2)
