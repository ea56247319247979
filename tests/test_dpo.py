"""Laws of dpo.py, named after the paper: `pytest -v -k eq07` shows Eq. 7 working.

The oracles are loops over single pairs, torch's autograd, and enumeration. The model is a GPT of a
few thousand parameters in float64, untrained, with weights so large that its output is not uniform.
"""

import itertools
import math
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import in_child

import dpo
from gpt import GPT, GPTConfig, pad_rows
from support.runs import UserError

SOURCE = Path(dpo.__file__)
EQUATIONS = dict(re.findall(  # "Eq. 7" -> "dpo_loss", from the contents in the file's docstring
    r"(Eq\. \d+|A\.3|C\.3|Preferred-FT)\s+(\w+)", dpo.__doc__)) | {"Section 4": "dpo_gradient"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
EOS, G, K, BETA = 0, 2, 4, 0.3


def near(a, b, message, tolerance=1e-12):
    worst = float((torch.as_tensor(a) - b).detach().abs().max())
    assert worst <= tolerance, f"{message} (off by {worst:.2e})"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_gpt(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=23, n_ctx=12, n_layer=2, n_head=2, n_embd=16)).double()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


class Batch:
    """G groups of K completions of unequal lengths, their rewards and pairs, and two models.

    B = 8 completions and N = 12 pairs: the two differ, so that neither can stand for the other.
    """

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        tokens = [torch.randint(1, 23, (n,), generator=rng).tolist()
                  for n in (2, 4, 3, 6, 1, 5, 2, 7)]
        prompts = [p for p in ([EOS, 5], [EOS, 7, 8]) for _ in range(K)]
        self.rows = pad_rows(prompts, [t + [EOS] for t in tokens], fill=EOS)
        self.rewards = randn(G, K)
        self.yw, self.yl, _ = dpo.preference_pairs(self.rewards)
        self.policy = small_gpt(0)
        with torch.no_grad():
            self.pi, self.ref = self.score(self.policy), self.score(small_gpt(1))

    def score(self, model):
        idx, prompt_lens, lengths = self.rows
        mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
        return dpo.completion_logps(model.token_logps(idx, mask), prompt_lens, lengths)

    def gradient(self, loss):
        """The gradient of loss(log-probs) in the policy's parameters, flat."""
        parts = torch.autograd.grad(loss(self.score(self.policy)), list(self.policy.parameters()))
        return torch.cat([part.flatten() for part in parts])


@pytest.fixture(scope="module")
def batch():
    return Batch()


@pytest.fixture
def world():
    return dpo.World()


# --- Notation: log π(y|x), pairs, KL ---

def test_notation_log_pi_is_the_sum_over_completion_tokens_eos_included(batch):
    idx, prompt_lens, lengths = batch.rows
    table = batch.policy(idx).log_softmax(-1)
    for b, got in enumerate(batch.score(batch.policy)):
        want = sum(table[b, t - 1, idx[b, t]] for t in range(prompt_lens[b], lengths[b]))
        near(got, want, f"row {b}: sum over y, the prompt left out, the last EOS in")
    mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
    assert mask.sum(1).tolist() == (lengths - prompt_lens).tolist(), "one true per token of y"
    assert not mask[:, 0].any(), "nothing predicts a first token"


def test_notation_log_pi_does_not_see_prompt_padding_or_what_follows_eos():
    logps, lens, lengths = randn(2, 6), torch.tensor([2, 1]), torch.tensor([4, 6])
    want = dpo.completion_logps(logps, lens, lengths)
    spoiled = logps.clone()
    spoiled[0, :2], spoiled[0, 4:], spoiled[1, 0] = math.nan, -math.inf, 9.0
    near(dpo.completion_logps(spoiled, lens, lengths), want, "only tokens of y may count", 0)
    wider = F.pad(logps, (0, 5), value=math.nan)
    near(dpo.completion_logps(wider, lens, lengths), want, "more padding, the same log π", 0)


def test_notation_log_pi_is_added_up_in_float32():
    logps = torch.full((1, 1025), -1.0, dtype=torch.bfloat16)
    got = dpo.completion_logps(logps, torch.tensor([1]), torch.tensor([1025]))
    assert got.dtype == torch.float32 and got.item() == -1024, "bfloat16 cannot count to 1024"
    assert dpo.completion_logps(randn(1, 3), *torch.tensor([[1], [3]])).dtype == torch.float64


def test_notation_pairs_are_all_and_only_the_ordered_pairs_of_each_group():
    rewards = torch.tensor([[0.3, 0.1, 0.3, 0.9], [1.0, 1.0, 1.0, 1.0], [0.0, 0.4, 0.2, 0.1]])
    yw, yl, ties = dpo.preference_pairs(rewards)
    want = {(4 * g + i, 4 * g + j) for g in range(3) for i in range(4) for j in range(4)
            if rewards[g, i] > rewards[g, j]}
    got = list(zip(yw.tolist(), yl.tolist()))
    assert set(got) == want and len(got) == len(want), "every ordered pair once, the winner first"
    assert ties == 1 + 6, "a tie has no winner: dropped and counted"
    assert (yw // 4 == yl // 4).all(), "a pair never crosses groups: its prompts would differ"
    rescaled = dpo.preference_pairs(rewards.exp() * 5)
    assert torch.equal(rescaled[0], yw), "labels depend on the order of rewards alone"


def test_notation_kl_is_zero_at_itself_positive_elsewhere_and_knows_zeros():
    p, q = randn(5, 7).log_softmax(-1), randn(5, 7, seed=1).log_softmax(-1)
    near(dpo.kl_divergence(p, p), 0.0, "KL(p ‖ p) is 0")
    assert (dpo.kl_divergence(p, q) > 0).all(), "KL is positive between different p and q"
    near(dpo.kl_divergence(p, q), torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (p, q))), "torch.distributions agrees")
    near(dpo.kl_divergence(p.T, q.T, dim=0), dpo.kl_divergence(p, q), "dim names the axis")
    point = torch.tensor([0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    kl = dpo.kl_divergence(point, half)
    near(kl, math.log(2), "0 log 0 is 0")
    assert torch.autograd.grad(kl, point)[0].isfinite().all(), "and its gradient is no NaN"
    assert dpo.kl_divergence(half, point) == math.inf, "no mass where p has some: infinite"


# --- Section 3 ---

def test_eq01_is_a_probability_and_its_complement_is_the_swapped_pair():
    r1, r2 = 5 * randn(99), 5 * randn(99, seed=1)
    p = dpo.preference_probability(r1, r2)
    near(p + dpo.preference_probability(r2, r1), 1.0, "p(y₁ ≻ y₂) + p(y₂ ≻ y₁) = 1")
    near(p, r1.exp() / (r1.exp() + r2.exp()), "Eq. 1 as the paper writes it")
    assert ((r1 > r2) == (p > 0.5)).all(), "the larger reward is preferred"
    far = dpo.preference_probability(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]))
    assert far.tolist() == [1.0, 0.0], "float32 rewards of 1e4 do not overflow"


def test_eq01_hard_labels_are_the_ordered_pairs():
    rewards = torch.tensor([[0.5, 0.5, 0.1, 0.9], [0.1, 0.2, 0.3, 0.4]])
    yw, yl, p = dpo.label_pairs(rewards, "hard", 3.0, None)
    want_w, want_l, ties = dpo.preference_pairs(rewards)
    assert torch.equal(yw, want_w) and torch.equal(yl, want_l) and ties == 1
    assert p.dtype == rewards.dtype and (p == 1).all() and p.shape == yw.shape


def test_eq01_soft_labels_are_its_probabilities_and_a_tie_is_half_a_label_each_way():
    rewards = randn(50, 4).float()
    rewards[0] = torch.tensor([0.5, 0.5, 0.1, 0.9])
    yw, yl, p = dpo.label_pairs(rewards, "soft", 3.0, None)
    pairs = {frozenset(pair) for pair in zip(yw.tolist(), yl.tolist())}
    want = {frozenset((4 * g + i, 4 * g + j))
            for g in range(50) for i in range(4) for j in range(i)}
    assert pairs == want and len(yw) == len(want) == 6 * 50, "every pair once, ties too"
    r = rewards.flatten()
    assert (r[yw] >= r[yl]).all(), "y_w has the higher reward"
    near(p, dpo.preference_probability(3 * r[yw], 3 * r[yl]), "p is Eq. 1 with scale·r", 1e-6)
    assert p[(r[yw] == r[yl])].tolist() == [0.5]


def test_eq01_sampled_labels_are_drawn_from_it_by_the_uniforms():
    rewards = torch.rand(3000, 4, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(3000, 6, generator=torch.Generator().manual_seed(1))
    yw, yl, one = dpo.label_pairs(rewards, "sampled", 3.0, uniforms)
    _, _, p = dpo.label_pairs(rewards, "soft", 3.0, None)
    assert len(yw) == 6 * 3000 and (one == 1).all(), "a sampled label is a label without doubt"
    wins = (rewards.flatten()[yw] > rewards.flatten()[yl]).float().mean()
    near(wins, p.mean(), "the better one wins as often as Eq. 1 says", 3 * 0.5 / len(yw) ** 0.5)
    part, _, _ = dpo.label_pairs(rewards[5:7], "sampled", 3.0, uniforms[5:7])
    assert torch.equal(part, yw[30:42] - 20), "a group's labels depend on its own uniforms alone"


def test_eq01_sampled_labels_have_the_soft_labels_mean_loss():
    n, rewards, pi, ref = 200, randn(2, 3), randn(6), randn(6, seed=1)
    mean = sum(dpo.dpo_loss(pi, ref, *dpo.label_pairs(
        rewards, "sampled", 2.0, torch.full((2, 3), (i + 0.5) / n))[:2], BETA)[0]
        for i in range(n)) / n
    yw, yl, p = dpo.label_pairs(rewards, "soft", 2.0, None)
    soft, _ = dpo.soft_dpo_loss(pi, ref, yw, yl, p, BETA)
    near(mean, soft, "E over labels of Eq. 7 is p L₁₂ + (1 - p) L₂₁", 1e-2)


def test_eq02_is_the_cross_entropy_of_eq01_and_blind_to_a_constant(batch):
    r = randn(G * K)
    losses = dpo.reward_model_loss(r, batch.yw, batch.yl)
    want = -dpo.preference_probability(r[batch.yw], r[batch.yl]).log()
    near(losses, want, "Eq. 2 is -log of Eq. 1")
    near(losses, dpo.reward_model_loss(r + 7, batch.yw, batch.yl), "r + f(x) has the same loss")
    far = dpo.reward_model_loss(torch.tensor([-1e4, 1e4]), torch.tensor([0]), torch.tensor([1]))
    assert far.item() == 2e4, "log(σ) would be -inf here; logsigmoid is not"


def test_eq03_of_every_policy_is_below_its_value_at_pi_r(world):
    best = dpo.optimal_policy(world.ref, world.r, BETA)
    top = dpo.objective(best, world.ref, world.r, BETA)
    near(top, BETA * dpo.log_partition(world.ref, world.r, BETA), "A.1: the optimum is β log Z")
    for scale in (1e-3, 0.1, 3.0):  # from near π_r to far from it
        pi = (best + scale * world.randn(200, *world.r.shape)).log_softmax(-1)
        assert (dpo.objective(pi, world.ref, world.r, BETA) < top).all(), "a policy beat π_r"
    near(dpo.objective(world.ref, world.ref, world.r, BETA),
         (world.ref.exp() * world.r).sum(-1), "at π_ref there is no KL to pay")


def test_eq04_goes_from_the_reference_to_the_best_answer_as_beta_falls(world):
    def pi(beta):
        return dpo.optimal_policy(world.ref, world.r, beta)
    near(pi(BETA).exp().sum(-1), 1.0, "π_r sums to 1")
    near(pi(1e9), world.ref, "β → ∞: π_ref", 1e-8)
    assert torch.equal(pi(1e-3).argmax(-1), world.r.argmax(-1)), "β → 0: all mass on the best y"
    near(pi(1e-3).exp().amax(-1), 1.0, "β → 0: all mass on one y", 1e-3)
    kls = [float(dpo.kl_divergence(pi(b), world.ref).mean()) for b in (0.05, 0.1, 1, 5)]
    assert kls == sorted(kls, reverse=True), f"a larger β ends closer to π_ref, got KL {kls}"
    assert dpo.optimal_policy(world.ref.float(), 1e4 * world.r.float(), 0.1).exp().isfinite().all()


def test_eq05_gives_back_the_reward_that_made_pi_r(world):
    log_z = dpo.log_partition(world.ref, world.r, BETA)[:, None]
    best = dpo.optimal_policy(world.ref, world.r, BETA)
    near(dpo.implicit_reward(best, world.ref, BETA, log_z), world.r, "Eq. 5 inverts Eq. 4")


def test_eq06_at_pi_r_is_eq01_whatever_z(world):
    best = dpo.optimal_policy(world.ref, world.r, BETA) + 3.0  # times e³: Z(x) cancels
    got = dpo.policy_preference(best.flatten(), world.ref.flatten(), world.i, world.j, BETA)
    near(got, world.p, "Eq. 6 at π_r is Eq. 1 at r*")
    h = (best - world.ref).flatten()
    written = 1 / (1 + (BETA * h[world.j] - BETA * h[world.i]).exp())
    near(got, written, "Eq. 6 as the paper writes it")


# --- Eq. 7 ---

@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_eq07_starts_at_log2(batch, beta):
    losses, rewards = dpo.dpo_loss(batch.ref, batch.ref, batch.yw, batch.yl, beta)
    near(losses, math.log(2), "π_θ = π_ref must cost log 2 on every pair: is π_ref in the loss?")
    near(rewards, 0.0, "and every r̂ is 0")


def test_eq07_in_index_form_equals_a_loop_over_pairs(batch):
    pi = batch.pi
    losses, rewards = dpo.dpo_loss(pi, batch.ref, batch.yw, batch.yl, BETA)
    assert losses.shape == batch.yw.shape and rewards.shape == pi.shape, "(N,) and (B,)"
    for n, (w, l) in enumerate(zip(batch.yw.tolist(), batch.yl.tolist())):
        m = BETA * (pi[w] - batch.ref[w]) - BETA * (pi[l] - batch.ref[l])
        near(losses[n], -math.log(1 / (1 + math.exp(-m))), f"pair {n}")
    near(rewards, BETA * (pi - batch.ref), "the rewards are r̂, β included")
    near(losses, dpo.reward_model_loss(rewards, batch.yw, batch.yl), "Eq. 2 with r̂ for r_φ")
    near(losses, -dpo.policy_preference(pi, batch.ref, batch.yw, batch.yl, BETA).log(),
         "-log of Eq. 6")


def test_appendix_b_has_the_same_values(batch):
    """The formulas of the paper's printed code, which subtracts π_ref's log-ratio of a pair from
    π_θ's, in NumPy."""
    pi, ref, yw, yl = (x.detach().numpy() for x in (batch.pi, batch.ref, batch.yw, batch.yl))
    log_ratios = (pi[yw] - pi[yl]) - (ref[yw] - ref[yl])
    losses, rewards = dpo.dpo_loss(batch.pi, batch.ref, batch.yw, batch.yl, BETA)
    near(losses, torch.from_numpy(np.logaddexp(0, -BETA * log_ratios)), "-log σ(β log-ratios)")
    near(rewards, torch.from_numpy(BETA * (pi - ref)), "the rewards of all completions")


def test_eq07_gradient_pushes_the_winner_up_and_stops_at_the_rewards(batch):
    pi = batch.ref.clone().requires_grad_()
    losses, rewards = dpo.dpo_loss(pi, batch.ref, batch.yw[:1], batch.yl[:1], BETA)
    assert not rewards.requires_grad, "Appendix B detaches the rewards"
    grad, = torch.autograd.grad(losses.sum(), pi)
    near(grad[batch.yw[0]], -BETA / 2, "at the start dL/d log π(y_w) = -β/2")
    near(grad[batch.yl[0]], BETA / 2, "at the start dL/d log π(y_l) = +β/2")
    assert grad.count_nonzero() == 2, "a completion outside the pair has no gradient"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq07_and_every_other_loss_stay_finite_at_extreme_log_probs(device, dtype):
    pi = torch.tensor([-1e4, -1.0, 0.0, -1e4], dtype=dtype, device=device, requires_grad=True)
    ref = torch.tensor([-1.0, -1e4, -1e4, 0.0], dtype=dtype, device=device)
    rewards = torch.tensor([[2.0, 1.0], [4.0, 3.0]], device=device)
    yw, yl, _ = dpo.preference_pairs(rewards)
    losses = {name: dpo.weighted_loss(pi, ref, yw, yl, 0.1, weight)[0]
              for name, weight in dpo.WEIGHTS.items()}
    losses["Plackett-Luce"] = dpo.plackett_luce_loss(pi, ref, rewards, 0.1)[0]
    losses["C.3"] = dpo.unlikelihood_loss(pi, yw, yl, 0.5)
    losses["Preferred-FT"] = dpo.preferred_ft_loss(pi, yw)
    for name, loss in losses.items():
        grad, = torch.autograd.grad(loss.sum(), pi)
        assert loss.isfinite().all() and grad.isfinite().all(), f"{name}: {loss}, gradient {grad}"
        assert loss.dtype == dtype and loss.device == pi.device, f"{name} left its dtype or device"


def test_eq07_with_soft_labels_is_its_mean_over_the_label(batch):
    pi = batch.pi.clone().requires_grad_()
    args = pi, batch.ref, batch.yw, batch.yl
    hard, _ = dpo.dpo_loss(*args, BETA)
    near(dpo.soft_dpo_loss(*args, 1.0, BETA)[0], hard, "p = 1 is Eq. 7")
    back, _ = dpo.soft_dpo_loss(pi, batch.ref, batch.yl, batch.yw, 0.0, BETA)
    near(back, hard, "p(y₁ ≻ y₂) = 0 is Eq. 7 on the swapped pair")
    soft, _ = dpo.soft_dpo_loss(*args, 1 - dpo.CDPO_EPS, BETA)
    cdpo, _ = dpo.weighted_loss(*args, BETA, dpo.WEIGHTS["cdpo"])
    near(soft, cdpo, "cDPO is Eq. 7 with labels flipped at the rate ε")
    near(*(torch.autograd.grad(x.sum(), pi)[0] for x in (soft, cdpo)), "and so is its gradient")


def test_eq07_on_population_preferences_is_minimal_at_pi_r_and_on_hard_labels_nowhere(world):
    frequency = world.randn(len(world.p)).exp()  # any will do if every pair occurs
    found = world.solve(0.3, world.p, frequency / frequency.sum())
    kl = dpo.kl_divergence(dpo.optimal_policy(world.ref, world.r, 0.3), found)
    near(kl, 0.0, "the minimum of Eq. 7 is Eq. 4's π_r", 1e-10)
    hard = (world.p > 0.5).double()
    theta = dpo.optimal_policy(world.ref, world.r, 0.3).requires_grad_()
    loss, _ = dpo.soft_dpo_loss(theta.log_softmax(-1).flatten(), world.ref.flatten(), world.i,
                                world.j, hard, 0.3)
    slope = (torch.autograd.grad(loss.mean(), theta)[0] * world.r).sum()
    assert slope < 0, "on labels without noise the loss still falls at π_r, along r"


# --- Section 4: the gradient and its weight ---

@pytest.mark.parametrize("name", dpo.WEIGHTS)
def test_sec4_gradient_of_the_surrogate_is_autograd_of_the_closed_form_on_a_gpt(batch, name):
    weight, seen = dpo.WEIGHTS[name], {}

    def surrogate(pi):
        losses, rewards = dpo.weighted_loss(pi, batch.ref, batch.yw, batch.yl, BETA, weight)
        seen["value"] = losses.detach()
        assert not rewards.requires_grad
        return losses.mean()

    def closed(pi):
        r = BETA * (pi - batch.ref)
        losses = weight.f(r[batch.yw] - r[batch.yl], BETA)
        seen["f(m)"] = losses.detach()
        return losses.mean()

    by_weight, by_autograd = batch.gradient(surrogate), batch.gradient(closed)
    assert by_autograd.norm() > 1e-3, "a gradient of zero would show nothing"
    near(by_weight, by_autograd, f"{name}: the surrogate's gradient is that of f(m)", 1e-6)
    near(seen["value"], seen["f(m)"], f"{name}: the value is f(m), not the surrogate's")


def test_sec4_ipo_is_the_squared_loss_of_its_paper(batch):
    h = batch.pi - batch.ref
    want = (h[batch.yw] - h[batch.yl] - 1 / (2 * BETA)) ** 2
    losses, _ = dpo.weighted_loss(batch.pi, batch.ref, batch.yw, batch.yl, BETA, dpo.WEIGHTS["ipo"])
    near(losses, want, "IPO is (h_w - h_l - 1/(2β))²")


def test_sec4_weights_at_a_tie_and_far_from_it():
    m = torch.tensor([-1e3, 0.0, 1e3], dtype=torch.float64)
    want = {"sigmoid": [1, 0.5, 0], "constant": [1, 1, 1], "hinge": [1, 1, 0],
            "indicator": [1, 1, 0], "cdpo": [0.9, 0.4, -0.1], "ipo": [200100, 100, -199900],
            "exponential": [math.exp(30), 1, 0]}
    assert want.keys() == dpo.WEIGHTS.keys()
    for name, values in want.items():
        got = dpo.WEIGHTS[name](m, 0.1).tolist()
        assert got == pytest.approx(values), f"{name} at m = {m.tolist()}: {got}"


@pytest.mark.parametrize("name", dpo.WEIGHTS)
def test_sec4_weight_is_minus_the_derivative_of_its_loss_and_the_loss_has_no_jump(name):
    m = torch.linspace(-60.01, 60, 1000, dtype=torch.float64).requires_grad_()  # past EXP_FLOOR
    f, w = dpo.WEIGHTS[name].f(m, BETA), dpo.WEIGHTS[name](m, BETA).detach()
    slope, = torch.autograd.grad(f.sum(), m)
    torch.testing.assert_close(-slope, w, rtol=1e-9, atol=1e-12)  # w = -∂f/∂m
    f, m = f.detach(), m.detach()
    assert float(f[0] - f[-1]) == pytest.approx(float(torch.trapezoid(w, m)), 1e-2), "f = -∫ w"


def test_sec4_gradient_by_hand_is_autograd_of_eq07(batch):
    pi = batch.pi.clone().requires_grad_()
    losses, rewards = dpo.dpo_loss(pi, batch.ref, batch.yw, batch.yl, BETA)
    w = torch.sigmoid(rewards[batch.yl] - rewards[batch.yw])
    by_hand = dpo.dpo_gradient(w, batch.yw, batch.yl, BETA, len(pi))
    near(by_hand, torch.autograd.grad(losses.mean(), pi)[0], "c_b is dL/d log π(y_b)")


@pytest.mark.parametrize("name", ["sigmoid", "cdpo"])
def test_sec4_inspection_of_a_gpt_is_autograd_s_for_the_batch_and_for_each_pair(batch, name):
    params, weight, backwards = list(batch.policy.parameters()), dpo.WEIGHTS[name], []
    logps = [batch.score(batch.policy)[b] for b in range(G * K)]  # each has its own graph
    for b, logp in enumerate(logps):
        logp.register_hook(lambda _, b=b: backwards.append(b))
    table, mean = dpo.inspect_pairs(logps, batch.ref, batch.yw, batch.yl, BETA, params, weight)
    assert sorted(backwards) == list(range(G * K)), "one backward per completion, for all its pairs"
    assert [g.shape for g in mean] == [p.shape for p in params]

    def loss(n):
        return lambda pi: dpo.weighted_loss(pi, batch.ref, batch.yw[n], batch.yl[n], BETA,
                                            weight)[0].mean()
    near(torch.cat([g.flatten() for g in mean]), batch.gradient(loss(slice(None))),
         "the mean gradient by hand is autograd's")
    for n, (w, l) in enumerate(zip(batch.yw, batch.yl)):
        up, down = (batch.gradient(lambda pi: pi[i]) for i in (w, l))
        near(table["norm_w"][n], up.norm(), "‖∇log π(y_w)‖")
        near(table["norm_l"][n], down.norm(), "‖∇log π(y_l)‖")
        near(table["cosine"][n], F.cosine_similarity(up, down, 0), "their cosine")
        near(table["update"][n], batch.gradient(loss(slice(n, n + 1))).norm(),
             "the weighted update is the gradient of the pair's own loss")
    near(table["margin"], table["reward_w"] - table["reward_l"], "m = r̂_w - r̂_l")
    near(table["weight"], weight(table["margin"], BETA), "w(m)")


def test_sec4_inspection_takes_one_graph_and_pairs_in_any_order(batch):
    theta = randn(G * K).requires_grad_()
    unused = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    pi, shuffle = theta.log_softmax(-1), torch.randperm(len(batch.yw))
    table, mean = dpo.inspect_pairs(pi, batch.ref, batch.yw, batch.yl, BETA, [theta, unused])
    shuffled, again = dpo.inspect_pairs(pi, batch.ref, batch.yw[shuffle], batch.yl[shuffle], BETA,
                                        [theta, unused])
    for name in table:
        near(table[name][shuffle], shuffled[name], f"{name} follows its pair")
    near(mean[0], again[0], "the mean does not depend on the order")
    losses, _ = dpo.dpo_loss(pi, batch.ref, batch.yw, batch.yl, BETA)
    auto, = torch.autograd.grad(losses.mean(), theta)
    near(mean[0], auto, "and equals autograd's")
    near(mean[1], 0.0, "a parameter that is not used has gradient 0")


def test_sec4_weight_from_outside_has_its_gradient_and_its_integral(batch):
    pi = batch.pi.clone().requires_grad_()
    args = pi, batch.ref, batch.yw, batch.yl, BETA
    losses, _ = dpo.weighted_loss(*args, lambda margin, beta: torch.sigmoid(-margin))
    eq7, _ = dpo.dpo_loss(*args)
    near(losses, eq7 - math.log(2), "f(m) = -∫₀ᵐ w is Eq. 7 minus its value at 0", 1e-4)
    near(*(torch.autograd.grad(x.sum(), pi)[0] for x in (losses, eq7)), "w = σ(-m) is DPO")


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["clip never", "clip always"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_sec4_scale_trap_a_constant_weight_has_no_scale_under_adam(batch, optimizer, clip):
    def train(name, beta):
        model = small_gpt(0)
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        # eps above the rounding noise in gradients that are 0 (key biases), far below the others
        steps = optimizer(model.parameters(), lr=1e-3, eps=1e-11)
        for _ in range(8):
            steps.zero_grad()
            losses, _ = dpo.weighted_loss(batch.score(model), batch.ref, batch.yw, batch.yl, beta,
                                          dpo.WEIGHTS[name])
            losses.mean().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - start

    one, tenth = train("constant", 1.0), train("constant", 0.1)
    assert (one - tenth).norm() < 1e-3 * one.norm(), "constant weight: β must not matter"
    one, tenth = train("sigmoid", 1.0), train("sigmoid", 0.1)
    assert (one - tenth).norm() > 1e-2 * one.norm(), "DPO: β must matter, because margins have it"


# --- Appendix A.3: rankings ---

@pytest.mark.parametrize("K", [2, 3, 5])
def test_eq18_all_orders_sum_to_one(K):
    orders = torch.tensor(list(itertools.permutations(range(K))))
    logps, tied = dpo.ranking_logps(3 * randn(1, K).expand(len(orders), K), orders)
    near(logps.exp().sum(), 1.0, f"the {K}! orders of {K} completions are all there is")
    assert not tied.any()


def test_eq18_equals_the_product_of_the_paper():
    scores, rewards = randn(7, 4), randn(7, 4, seed=1)
    for g, order in enumerate(rewards.argsort(-1, descending=True)):
        s = scores[g, order].exp()
        want = math.prod(float(s[k] / s[k:].sum()) for k in range(4))
        near(dpo.ranking_logps(scores, rewards)[0][g].exp(), want, "Π exp r_k / Σ_{j≥k} exp r_j")


def test_eq18_loss_at_k2_is_eq07_value_and_gradient():
    pi, ref, rewards = randn(20).requires_grad_(), randn(20, seed=1), randn(10, 2, seed=2)
    ranked, hats, counts = dpo.plackett_luce_loss(pi, ref, rewards, BETA)
    losses, also = dpo.dpo_loss(pi, ref, *dpo.preference_pairs(rewards)[:2], BETA)
    near(ranked, losses, "K = 2 is Eq. 7")
    near(*(torch.autograd.grad(x.sum(), pi)[0] for x in (ranked, losses)), "and its gradient")
    near(hats, also, "r̂ of every completion, as dpo_loss returns it")
    assert not hats.requires_grad and counts == {"tied": 0, "skipped": 0}


@pytest.mark.parametrize("K", [2, 3, 4])
def test_eq18_loss_starts_at_log_k_factorial(K):
    losses, _, _ = dpo.plackett_luce_loss(randn(5 * K), randn(5 * K), randn(5, K, seed=1), BETA)
    near(losses, math.lgamma(K + 1), f"at π_θ = π_ref all {K}! orders are equally likely")


def test_eq18_ties_leave_the_ranking_and_groups_under_two_are_skipped():
    rewards = torch.tensor([[0.5, 0.2, 0.5, 0.1], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.9],
                            [0.1, 0.2, 0.3, 0.4]])
    pi, ref = randn(16).requires_grad_(), randn(16, seed=1)
    losses, hats, counts = dpo.plackett_luce_loss(pi, ref, rewards, BETA)
    assert counts == {"tied": 2 + 4 + 3, "skipped": 2}, counts
    assert len(losses) == 2 and hats.shape == (16,)
    pair, _ = dpo.dpo_loss(pi, ref, torch.tensor([1]), torch.tensor([3]), BETA)
    near(losses[0], pair, "what is left of the first group is a pair")
    grad, = torch.autograd.grad(losses.sum(), pi)
    assert grad.isfinite().all() and grad[[0, 2, *range(4, 12)]].count_nonzero() == 0, \
        "a completion outside the ranking has no gradient"


def test_eq18_tied_completions_are_in_no_denominator():
    scores = torch.tensor([[1.0, 5.0, 7.0, 0.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
    logps, tied = dpo.ranking_logps(scores, rewards)
    assert tied.tolist() == [[False, True, True, False]]
    near(logps, -0.313261687518223, "what is left is one pair: log σ(1 - 0) = -log(1 + 1/e)")
    losses, _, _ = dpo.plackett_luce_loss(scores.flatten(), torch.zeros(4).double(), rewards, 1.0)
    near(losses, 0.313261687518223, "and the loss is that of the pair, -log p(τ)")


def test_eq18_loss_does_not_depend_on_how_a_group_is_listed():
    pi, ref, rewards, order = randn(3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2), [2, 0, 3, 1]
    near(dpo.plackett_luce_loss(*(x.flatten() for x in (pi, ref)), rewards, BETA)[0],
         dpo.plackett_luce_loss(*(x[:, order].flatten() for x in (pi, ref)), rewards[:, order],
                                BETA)[0], "the ranking is by reward, not by place")


# --- C.3 and Preferred-FT ---

def test_c3_at_alpha_one_has_the_gradient_of_the_constant_weight_over_beta(batch):
    naive = batch.gradient(lambda pi: dpo.weighted_loss(
        pi, batch.ref, batch.yw, batch.yl, BETA, dpo.WEIGHTS["constant"])[0].mean())
    c3 = batch.gradient(lambda pi: dpo.unlikelihood_loss(pi, batch.yw, batch.yl, 1.0).mean())
    near(naive, BETA * c3, "π_ref is a constant and has no gradient")


def test_c3_raises_chosen_by_one_and_lowers_rejected_by_alpha():
    pi, w, l = torch.tensor([-5.0, -2.0]).requires_grad_(), torch.tensor([0]), torch.tensor([1])
    loss = dpo.unlikelihood_loss(pi, w, l, 0.25)
    assert loss.tolist() == [5.0 - 0.25 * 2.0]
    assert torch.autograd.grad(loss.sum(), pi)[0].tolist() == [-1.0, 0.25]


def test_preferred_ft_is_c3_at_alpha_zero_and_counts_a_completion_as_often_as_it_wins(batch):
    losses = dpo.preferred_ft_loss(batch.pi, batch.yw)
    near(losses, dpo.unlikelihood_loss(batch.pi, batch.yw, batch.yl, 0.0), "C.3 without α's term")
    wins = torch.bincount(batch.yw, minlength=G * K)
    near(losses.sum(), -wins.double() @ batch.pi, "Σ over completions of wins × NLL")


# --- Mistakes ---

PI, NONE, ONE, TWO = torch.zeros(6), *(torch.tensor(x).long() for x in ([], [0], [1, 2]))
MISTAKES = {
    "one completion": ("K = 1", lambda: dpo.preference_pairs(torch.zeros(3, 1))),
    "a reward of nan": ("not finite", lambda: dpo.preference_pairs(PI.view(2, 3) + math.nan)),
    "beta 0": ("beta must be positive, got 0", lambda: dpo.dpo_loss(PI, PI, ONE, TWO[:1], 0.0)),
    "beta nan": ("got nan", lambda: dpo.plackett_luce_loss(PI, PI, PI.view(2, 3), math.nan)),
    "other completions": (r"\(6,\) under π and of shape \(5,\) under π_ref",
                          lambda: dpo.dpo_loss(PI, PI[:5], ONE, ONE, BETA)),
    "Eq. 2 without pairs": ("one pair or more", lambda: dpo.reward_model_loss(PI, NONE, NONE)),
    "Eq. 7 without pairs": ("one pair or more", lambda: dpo.dpo_loss(PI, PI, NONE, NONE, BETA)),
    "pairs of two lengths": ("1 chosen and 2 rej", lambda: dpo.dpo_loss(PI, PI, ONE, TWO, BETA)),
    "a weight without pairs": ("one pair or more", lambda: dpo.weighted_loss(
        PI, PI, NONE, NONE, BETA, torch.sigmoid)),
    "C.3 without pairs": ("one pair or more", lambda: dpo.unlikelihood_loss(PI, NONE, NONE, 1.0)),
    "Preferred-FT without pairs": ("one pair or more", lambda: dpo.preferred_ft_loss(PI, NONE)),
    "only ties": ("nothing to rank", lambda: dpo.plackett_luce_loss(PI, PI, PI.view(2, 3), BETA)),
    "rankings of one": ("nothing to rank",
                        lambda: dpo.plackett_luce_loss(PI, PI, randn(6, 1), BETA)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_no_nan(mistake):
    message, call = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# --- The file and its checks ---

def test_each_equation_opens_one_function_and_has_one_hit():
    source = SOURCE.read_text(encoding="utf-8")
    assert len(EQUATIONS) == 12, f"the contents name {sorted(EQUATIONS)}"
    for equation, name in EQUATIONS.items():
        assert source.count(f'"""{equation} ·') == 1, f"grep {equation!r} must have one hit"
        doc = getattr(dpo, name).__doc__
        assert doc.startswith(f"{equation} · "), f"{name} must open with {equation}"
    assert source.count('"""Eq. 7') == 1
    places = [source.index(f'"""{e} ·') for e in EQUATIONS if e.startswith("Eq.")]
    assert places == sorted(places), "the equations come in the paper's order"


MUTANTS = {  # a plausible wrong form of every equation, and the rows that must notice it
    "Eq. 1": (lambda r1, r2: torch.sigmoid(r2 - r1), dpo.section3_rows),
    "Eq. 2": (lambda r, w, l: -F.logsigmoid(2 * (r[w] - r[l])), dpo.section3_rows),
    "Eq. 3": (lambda p, q, r, b: (p.exp() * r).sum(-1) - dpo.kl_divergence(p, q),
              dpo.section3_rows),
    "Eq. 4": (lambda q, r, b: (q + r * b).log_softmax(-1), dpo.section3_rows),
    "Eq. 5": (lambda p, q, b, z=0.0: p - q + z, dpo.section4_rows),
    "Eq. 6": (lambda p, q, i, j, b: torch.sigmoid(b * (p[i] - p[j])), dpo.section4_rows),
    "Eq. 7": (lambda p, q, w, l, b: (-F.logsigmoid(b * (p[w] - p[l])), b * p), dpo.section4_rows),
    "Section 4": (lambda w, i, j, b, B: torch.zeros(B).double().index_add(0, i, -w / len(w)),
                  dpo.section4_rows),
    "C.3": (lambda p, w, l, a: -p[w] - a * p[l], dpo.baseline_rows),
    "Preferred-FT": (lambda p, w: p[w], dpo.baseline_rows),
}


def test_checks_of_dpo_py_all_pass_and_write_no_file(tmp_path, monkeypatch):
    """Runs `python dpo.py` in a fork, which has imported torch already."""
    def work():
        os.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SOURCE)])
        try:
            runpy.run_path(str(SOURCE), run_name="__main__")
        except SystemExit as end:
            return end.code

    code, out = in_child(work)
    assert code == 0, out
    rows = {line[:14].strip() for line in out.splitlines() if line.endswith("pass")}
    assert rows == MUTANTS.keys(), f"a row for each equation; missing {MUTANTS.keys() - rows}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("equation", MUTANTS)
def test_checks_notice_a_wrong_equation(monkeypatch, equation):
    wrong, rows = MUTANTS[equation]
    monkeypatch.setattr(dpo, EQUATIONS[equation], wrong)
    failed = [claim for _, claim, residual, tolerance in rows(dpo.World())
              if not residual <= tolerance]
    assert failed, f"a wrong {equation} went unnoticed"


def test_checks_exit_with_one_when_an_equation_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(dpo, "unlikelihood_loss", MUTANTS["C.3"][0])
    assert dpo.main([]) == 1
    table = capsys.readouterr().out
    assert table.count("FAIL") == 1 and "1 failed" in table, table


@pytest.mark.parametrize("residual, tolerance, failed", [
    (0.0, 0.0, 0), (1e-13, 1e-12, 0), (9.0, None, 0), (2e-12, 1e-12, 1), (math.nan, 1e-12, 1)])
def test_a_claim_fails_above_its_tolerance_and_when_it_is_nan(residual, tolerance, failed):
    assert dpo.print_rows([("Eq. 0", "a claim", residual, tolerance)]) == failed
