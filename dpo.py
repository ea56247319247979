"""Sections 3 and 4 of the paper: its equations as functions of log-probs and rewards.

    Section 3  Eq. 1 preference_probability, Eq. 2 reward_model_loss, Eq. 3 objective
    Section 4  Eq. 4 optimal_policy, Eq. 5 implicit_reward, Eq. 6 policy_preference, Eq. 7 dpo_loss,
               its gradient dpo_gradient; other losses by their weight: WEIGHTS, weighted_loss
    Appendix   Eq. 18 ranking_logps, A.3 plackett_luce_loss, C.3 unlikelihood_loss,
               Preferred-FT preferred_ft_loss

`python dpo.py` checks them on worlds so small that every completion can be enumerated. It prints
one row per claim. `python -m experiments.theory` checks Section 5 and A.3. This file knows nothing
about models or text.

B sequences, T tokens, P prompts, G groups, K completions per prompt, N pairs. Log-probs and KL are
in nats. r̂ = β log π_θ/π_ref is the implicit reward, m = r̂(y_w) - r̂(y_l) the margin of a pair.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

# imported first, so that Ctrl-C during the slow imports below prints one sentence
from support.runs import UserError, main_exit

import torch
import torch.nn.functional as F
from torch import Tensor

WeightFn = Callable[[Tensor, float], Tensor]  # (margin (N,), beta) -> (N,)

# ------------------------------------------------------------------------------ notation

def completion_mask(prompt_lens: Tensor, lengths: Tensor, T: int) -> Tensor:
    """The tokens of y: (B,) and (B,) -> (B, T) bool, true where prompt_len <= t < length.

    A length counts prompt and completion. The mask depends on positions and not on token ids,
    because padding may have the id of EOS, and the EOS that ends y belongs to y.
    """
    t = torch.arange(T, device=lengths.device)
    return (t >= prompt_lens[:, None]) & (t < lengths[:, None])


def completion_logps(token_logps: Tensor, prompt_lens: Tensor, lengths: Tensor) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) in nats: (B, T) -> (B,), in float32 or wider.

    token_logps[b, t] is the log-prob of token t given the tokens before it. The result is a sum,
    with the EOS in it. A mean over tokens would make Eq. 7 another loss.
    """
    mask = completion_mask(prompt_lens, lengths, token_logps.size(1))
    dtype = torch.promote_types(token_logps.dtype, torch.float32)
    return token_logps.masked_fill(~mask, 0).sum(-1, dtype=dtype)


def kl_divergence(logp: Tensor, logq: Tensor, dim: int = -1) -> Tensor:
    """KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v)) in nats, over `dim`; a term with p(v) = 0 is 0."""
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0)).sum(dim)


def all_pairs(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Every unordered pair inside each group once: rewards (G, K) -> (N,), (N,), N = G K(K-1)/2.

    The indices point into the G*K completions of all groups, as in all functions on pairs here.
    """
    G, K = rewards.shape
    pairs = torch.triu_indices(K, K, 1, device=rewards.device)[:, None]  # (2, 1, K(K-1)/2)
    return (pairs + K * torch.arange(G, device=rewards.device)[:, None]).flatten(1).unbind()


def preference_pairs(rewards: Tensor) -> tuple[Tensor, Tensor, int]:
    """The ordered pairs inside each group: rewards (G, K) -> yw_idxs (N,), yl_idxs (N,), ties.

    A pair with equal rewards has no winner: it is dropped and counted in ties. UserError for K = 1
    and for a reward that is not finite.
    """
    G, K = rewards.shape
    if K < 2:
        raise UserError(f"got K = {K}, wanted two completions per prompt or more for a preference")
    if not rewards.isfinite().all():
        raise UserError("a reward is not finite, so pairs have no order: check the groups' rewards")
    g, w, l = (rewards[:, :, None] > rewards[:, None, :]).nonzero(as_tuple=True)
    return g * K + w, g * K + l, G * K * (K - 1) // 2 - len(g)


def margins(rewards: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """m = r(x,y_w) - r(x,y_l): rewards (B,) -> (N,). UserError if there is no pair."""
    need_pairs(yw_idxs, yl_idxs)
    return rewards[yw_idxs] - rewards[yl_idxs]


def need_pairs(yw_idxs: Tensor, yl_idxs: Tensor) -> None:
    if len(yw_idxs) != len(yl_idxs) or len(yw_idxs) == 0:
        raise UserError(f"got {len(yw_idxs)} chosen and {len(yl_idxs)} rejected completions, "
                        "wanted one pair or more: are all rewards within each group equal?")


# ------------------------------------------------------------------------------ Section 3

def preference_probability(r1: Tensor, r2: Tensor) -> Tensor:
    """Eq. 1 · p*(y₁ ≻ y₂ | x) = exp r*(x,y₁) / (exp r*(x,y₁) + exp r*(x,y₂)).

    Two tensors of one shape -> that shape. It is computed as σ(r₁ - r₂), which does not overflow.
    """
    return torch.sigmoid(r1 - r2)


def label_pairs(rewards: Tensor, labels: str, scale: float,
                uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels from true rewards (G, K) -> yw_idxs (N,), yl_idxs (N,), and p(y_w ≻ y_l) (N,).

    hard     y_w has the higher reward, and p = 1; ties are dropped
    sampled  Eq. 1 with rewards scale·r draws y_w, by uniforms (G, K(K-1)/2) in [0, 1); p = 1
    soft     y_w has the higher reward, and p is Eq. 1 with rewards scale·r; a tie has p = 1/2
    """
    if labels == "hard":
        yw_idxs, yl_idxs, _ = preference_pairs(rewards)
        return yw_idxs, yl_idxs, rewards.new_ones(len(yw_idxs))
    first, second = all_pairs(rewards)
    r = scale * rewards.flatten()
    p = preference_probability(r[first], r[second])
    lost = uniforms.flatten() >= p if labels == "sampled" else p < 0.5
    yw_idxs, yl_idxs = torch.where(lost, second, first), torch.where(lost, first, second)
    return yw_idxs, yl_idxs, torch.ones_like(p) if labels == "sampled" else p.maximum(1 - p)


def reward_model_loss(rewards: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Eq. 2 · L_R(r_φ) = -E log σ(r_φ(x,y_w) - r_φ(x,y_l)).

    rewards (B,) -> (N,). Only differences within a prompt appear, so r_φ + f(x) has the same loss.
    """
    return -F.logsigmoid(margins(rewards, yw_idxs, yl_idxs))


def objective(logp: Tensor, ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 3 · max_π E_{y~π} r(x,y) - β KL(π(y|x) ‖ π_ref(y|x)).

    Three (..., K), with every y of a prompt enumerated -> (...). By A.1 its value is
    β log Z(x) - β KL(π ‖ π_r), with Z and π_r of Eq. 4.
    """
    return (logp.exp() * rewards).sum(-1) - beta * kl_divergence(logp, ref_logp)


# ------------------------------------------------------------------------------ Section 4

def log_partition(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) of Eq. 4, Z(x) = Σ_y π_ref(y|x) exp(r(x,y)/β): two (..., K) -> (...)."""
    return (ref_logp + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 4 · π_r(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x).

    Two (..., K) -> log π_r (..., K). Z(x) is a sum over every y; for text there are too many.
    """
    return ref_logp + rewards / beta - log_partition(ref_logp, rewards, beta)[..., None]


def implicit_reward(pi_logps: Tensor, ref_logps: Tensor, beta: float,
                    log_z: float | Tensor = 0.0) -> Tensor:
    """Eq. 5 · r(x,y) = β log π_r(y|x)/π_ref(y|x) + β log Z(x).

    Tensors of one shape -> that shape. Without log_z the result is r̂, which differs from r by a
    function of x alone. It is NaN where π and π_ref are both 0. UserError unless β > 0 and both
    shapes are equal.
    """
    if not beta > 0:
        raise UserError(f"beta must be positive, got {beta}: the paper uses --beta 0.1")
    if pi_logps.shape != ref_logps.shape:
        raise UserError(f"got log-probs of shape {tuple(pi_logps.shape)} under π and of shape "
                        f"{tuple(ref_logps.shape)} under π_ref: score the same completions")
    return beta * (pi_logps - ref_logps + log_z)


def policy_preference(pi_logps: Tensor, ref_logps: Tensor, y1_idxs: Tensor, y2_idxs: Tensor,
                      beta: float) -> Tensor:
    """Eq. 6 · p*(y₁ ≻ y₂|x) = 1 / (1 + exp(β log π*(y₂)/π_ref(y₂) - β log π*(y₁)/π_ref(y₁))).

    Log-probs (B,), indices (N,) -> (N,). It is Eq. 1 with r from Eq. 5: β log Z(x) cancels.
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    return preference_probability(rewards[y1_idxs], rewards[y2_idxs])


def dpo_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 7 · L = -log σ(β h(y_w) - β h(y_l)),  h(y) = log π_θ(y|x) - log π_ref(y|x).

    The arguments are those of Appendix B: log-probs (B,), one per completion, and for each pair the
    indices (N,) of its two completions. Returns losses (N,) and r̂ = β h (B,), detached. A
    completion in many pairs is scored once. At π_θ = π_ref every loss is log 2, on any data.
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    losses = -F.logsigmoid(margins(rewards, yw_idxs, yl_idxs))
    return losses, rewards.detach()


def soft_dpo_loss(pi_logps: Tensor, ref_logps: Tensor, y1_idxs: Tensor, y2_idxs: Tensor,
                  p: float | Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The mean of Eq. 7 over a random label, y₁ ≻ y₂ with probability p: p L₁₂ + (1 - p) L₂₁.

    Shapes as in dpo_loss, p (N,) or one number. With p of Eq. 1 this is the population loss, whose
    minimum is π_r of Eq. 4. With p = 1 (labels without noise) there is no minimum: if a policy
    orders every pair correctly, larger margins always lower the loss.
    """
    losses, rewards = dpo_loss(pi_logps, ref_logps, y1_idxs, y2_idxs, beta)
    swapped, _ = dpo_loss(pi_logps, ref_logps, y2_idxs, y1_idxs, beta)
    return p * losses + (1 - p) * swapped, rewards


def dpo_gradient(weights: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float, B: int) -> Tensor:
    """Section 4 · ∇L = -β E[w (∇log π(y_w) - ∇log π(y_l))],  w = σ(r̂(x,y_l) - r̂(x,y_w)).

    weights (N,) -> c (B,), with ∇L = Σ_b c_b ∇log π(y_b) for the mean loss L over the N pairs.
    DPO's weight is WEIGHTS["sigmoid"]: 1/2 at the start, near 0 for a pair with a large margin.
    """
    push = beta * weights / len(weights)
    return push.new_zeros(B).index_add(0, yw_idxs, -push).index_add(0, yl_idxs, push)


# ------------------------------------------------------------------------------ losses by weight

class Weight(NamedTuple):
    """An importance weight w(m, β) and its loss f(m, β): w = -∂f/∂m, both (N,).

    IPO's loss is (h_w - h_l - 1/(2β))². With h_w - h_l = m/β: f = ((m - 1/2)/β)², w = (1 - 2m)/β².
    """

    w: WeightFn
    f: WeightFn

    def __call__(self, margin: Tensor, beta: float) -> Tensor:
        return self.w(margin, beta)


CDPO_EPS = 0.1  # the share of labels that cDPO assumes to be flipped
EXP_FLOOR = -30.0  # "exponential" is linear below this margin, where exp would overflow float32

WEIGHTS = {
    "sigmoid": Weight(lambda m, beta: torch.sigmoid(-m), lambda m, beta: -F.logsigmoid(m)),  # DPO
    "constant": Weight(lambda m, beta: torch.ones_like(m), lambda m, beta: -m),  # naive, Section 4
    "hinge": Weight(lambda m, beta: (m < 1).to(m), lambda m, beta: F.relu(1 - m)),
    "indicator": Weight(lambda m, beta: (m <= 0).to(m), lambda m, beta: F.relu(-m)),
    "ipo": Weight(lambda m, beta: (1 - 2 * m) / beta**2, lambda m, beta: ((m - 0.5) / beta) ** 2),
    "cdpo": Weight(
        lambda m, beta: (1 - CDPO_EPS) * torch.sigmoid(-m) - CDPO_EPS * torch.sigmoid(m),
        lambda m, beta: -(1 - CDPO_EPS) * F.logsigmoid(m) - CDPO_EPS * F.logsigmoid(-m)),
    "exponential": Weight(
        lambda m, beta: (-m.clamp(min=EXP_FLOOR)).exp(),
        lambda m, beta: (-m.clamp(min=EXP_FLOOR)).exp() * (1 + F.relu(EXP_FLOOR - m))),
}


def weighted_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
                  beta: float, weight: WeightFn) -> tuple[Tensor, Tensor]:
    """The loss of a weight w(m): its value is f(m), its gradient is Section 4's with this w.

    Shapes as in dpo_loss. "sigmoid" is Eq. 7 itself. Every other weight has the gradient of the
    surrogate -w β (log π(y_w) - log π(y_l)), in which w is detached. A weight without f, such as a
    student's function, gets the value -∫₀ᵐ w.
    The scale trap: Adam and RMSprop divide the gradient by its own size, so they cancel the scale
    of a constant weight. β = 1 and β = 0.1 then train in the same way, if the gradient is clipped
    at every step or at none. So a constant weight does not fail because its steps are larger. It
    fails because pairs that are already in order are pushed apart as hard as before.
    """
    if weight is WEIGHTS["sigmoid"]:
        return dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    rewards = implicit_reward(pi_logps, ref_logps, beta).detach()
    margin = margins(rewards, yw_idxs, yl_idxs)
    surrogate = -(weight(margin, beta) * beta * margins(pi_logps, yw_idxs, yl_idxs))
    if isinstance(weight, Weight):
        value = weight.f(margin, beta)
    else:
        grid = torch.linspace(0, 1, 129).to(margin)  # times m: points from 0 to m for each pair
        path = weight((margin[:, None] * grid).flatten(), beta).view(len(margin), -1)  # (N, 129)
        value = -margin * torch.trapezoid(path, grid)
    return value.detach() + (surrogate - surrogate.detach()), rewards


def inspect_pairs(pi_logps: Tensor | Sequence[Tensor], ref_logps: Tensor, yw_idxs: Tensor,
                  yl_idxs: Tensor, beta: float, params: Sequence[Tensor],
                  weight: WeightFn = WEIGHTS["sigmoid"]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The terms of Section 4's gradient for each pair, as columns (N,), and the mean gradient.

    Columns: reward_w, reward_l, margin, weight; norm_w and norm_l, the norms of ∇log π(y_w) and
    ∇log π(y_l), and cosine, the cosine of their angle; update, the norm of
    β w (∇log π(y_w) - ∇log π(y_l)). If a cosine is near 1, raising one log-prob raises the other.
    The mean gradient is a list of tensors with the shapes of params. pi_logps is (B,) with one
    graph, or B scalars with one graph each: then each backward pass runs through one sequence only.
    There is one backward pass per completion. Its gradient is kept until its last pair: list the
    pairs of a group together.
    """
    logps = list(pi_logps)
    rewards = implicit_reward(torch.stack(logps).detach(), ref_logps, beta)
    margin = margins(rewards, yw_idxs, yl_idxs)
    w = weight(margin, beta)
    coefficients = dpo_gradient(w, yw_idxs, yl_idxs, beta, len(logps))
    pairs = list(zip(yw_idxs.tolist(), yl_idxs.tolist()))
    last_pair = {i: n for n, pair in enumerate(pairs) for i in pair}
    grads, rows, mean = {}, [], 0
    for n, pair in enumerate(pairs):
        for i in set(pair) - grads.keys():
            parts = torch.autograd.grad(logps[i], params, retain_graph=True, allow_unused=True,
                                        materialize_grads=True)
            grads[i] = torch.cat([part.flatten() for part in parts])
            mean = mean + coefficients[i] * grads[i]
        grad_w, grad_l = (grads[i] for i in pair)
        rows.append(torch.stack([grad_w.norm(), grad_l.norm(), grad_w @ grad_l,
                                 (grad_w - grad_l).norm()]))
        grads = {i: grad for i, grad in grads.items() if last_pair[i] > n}
    norm_w, norm_l, dot, distance = torch.stack(rows).T
    cosine = dot / (norm_w * norm_l).clamp(min=torch.finfo(dot.dtype).tiny)
    columns = dict(reward_w=rewards[yw_idxs], reward_l=rewards[yl_idxs], margin=margin, weight=w,
                   norm_w=norm_w, norm_l=norm_l, cosine=cosine, update=beta * w.abs() * distance)
    return columns, [g.view_as(p) for g, p in zip(mean.split([p.numel() for p in params]), params)]


# ------------------------------------------------------------------------------ A.3 and C.3

def ranking_logps(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 18 · p(τ | y₁…y_K, x) = Π_k exp r(x,y_τ(k)) / Σ_{j≥k} exp r(x,y_τ(j)),  best first.

    scores r (G, K), true rewards (G, K), which give the order τ -> log p (G,), tied (G, K) bool.
    Completions with equal true rewards have no order, so all of them leave the ranking. No sort is
    needed: the completions from rank k on are those whose reward is not higher than the k-th's.
    """
    tied = (rewards[:, :, None] == rewards[:, None, :]).sum(-1) > 1
    rest = (rewards[:, None, :] <= rewards[:, :, None]) & ~tied[:, None, :]  # (G, k, j)
    rest = rest | torch.eye(rewards.size(1), dtype=torch.bool, device=rest.device)  # and k itself
    denominators = scores[:, None, :].masked_fill(~rest, -math.inf).logsumexp(-1)
    return (scores - denominators).masked_fill(tied, 0).sum(-1), tied


def plackett_luce_loss(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor,
                       beta: float) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A.3 · L = -log p(τ) by Eq. 18 with r̂ for r: DPO from rankings.

    Log-probs (G*K,), true rewards (G, K) -> losses (G',), r̂ (G*K,) detached, and two counts:
    "tied" completions, and "skipped" groups, in which fewer than two are not tied. The loss starts
    at log K!; with K = 2 it is Eq. 7. UserError if every group is skipped.
    """
    implicit = implicit_reward(pi_logps, ref_logps, beta)
    logps, tied = ranking_logps(implicit.view(rewards.shape), rewards)
    losses = -logps[(~tied).sum(-1) >= 2]
    if len(losses) == 0:
        raise UserError(f"got {len(rewards)} groups, each with fewer than two completions without "
                        "a tie: there is nothing to rank")
    return losses, implicit.detach(), dict(tied=int(tied.sum()), skipped=len(rewards) - len(losses))


def unlikelihood_loss(pi_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, alpha: float) -> Tensor:
    """C.3 · L = -E[log π(y_w|x) - α log π(y_l|x)].

    (B,) -> (N,). It has no π_ref and no lower bound. With α = 1, β times its gradient is that of
    the constant weight.
    """
    need_pairs(yw_idxs, yl_idxs)
    return alpha * pi_logps[yl_idxs] - pi_logps[yw_idxs]


def preferred_ft_loss(pi_logps: Tensor, yw_idxs: Tensor) -> Tensor:
    """Preferred-FT · L = -E log π(y_w|x).

    (B,) -> (N,), one loss per pair: a completion counts as often as it is chosen.
    """
    need_pairs(yw_idxs, yw_idxs)
    return -pi_logps[yw_idxs]


# ------------------------------------------------------------------------------ the checks

Row = tuple[str, str, float, float | None]  # equation, claim, residual, tolerance (None: no claim)
BETAS = 0.1, 0.5, 1.0, 5.0


class World:
    """P prompts with K completions each. No other text exists: all is enumerated, in float64.

    ref: log π_ref (P, K). r: r* (P, K). i, j (N,): all pairs. p (N,): Eq. 1 for each pair.
    frequencies: two ways to draw pairs, name -> the probability of each pair (N,).
    """

    def __init__(self, P: int = 3, K: int = 16, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.ref, self.r = self.randn(P, K).log_softmax(-1), self.randn(P, K)
        self.i, self.j = all_pairs(self.r)
        self.p = preference_probability(self.r.flatten()[self.i], self.r.flatten()[self.j])
        ref_logps = self.ref.flatten()
        self.frequencies = {"uniform": torch.full_like(self.p, 1 / len(self.p)),
                            "from π_ref": (ref_logps[self.i] + ref_logps[self.j]).softmax(0)}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def solve(self, beta: float, p: Tensor, frequency: Tensor) -> Tensor:
        """log π (P, K) that minimises Eq. 7, where y_i ≻ y_j with probability p (N,)."""
        def loss(logits):
            logp = logits.log_softmax(-1).flatten()
            return frequency @ soft_dpo_loss(logp, self.ref.flatten(), self.i, self.j, p, beta)[0]
        return minimise(loss, self.ref).log_softmax(-1)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The x (P, K) at which a convex loss is smallest, by Newton's method.

    The loss must be a sum over the rows of x, and must not change when a constant is added to a
    row. This holds for Eq. 2 as a function of rewards, and for Eq. 7 as a function of logits.
    """
    x = start
    for _ in range(10):  # enough for float64: near the minimum each step squares the error
        x = x.detach().requires_grad_()
        slope, = torch.autograd.grad(loss(x), x, create_graph=True)
        curvature = torch.stack([torch.autograd.grad(column.sum(), x, retain_graph=True)[0]
                                 for column in slope.T], -1)  # (P, K, K)
        step, _ = torch.linalg.solve_ex(curvature + 1, slope)  # + 1 makes it invertible
        x = x - step
    return x.detach()


def max_gap(a: Tensor, b: Tensor | float = 0.0) -> float:
    return float((a - b).detach().abs().max())


def section3_rows(world: World) -> Iterator[Row]:
    ref, r, p, i, j = world.ref, world.r, world.p, world.i, world.j
    e1, e2 = r.flatten()[i].exp(), r.flatten()[j].exp()
    yield "Eq. 1", "exp r₁ / (exp r₁ + exp r₂) is σ(r₁ - r₂)", max_gap(e1 / (e1 + e2), p), 1e-12
    fitted = minimise(lambda x: (p * reward_model_loss(x.flatten(), i, j)
                                 + (1 - p) * reward_model_loss(x.flatten(), j, i)).mean(), 0 * r)
    shift = (fitted - r).mean(-1, keepdim=True)
    yield "Eq. 2", "its minimiser on Eq. 1's p* is r* + f(x)", max_gap(fitted - r, shift), 1e-12
    pi, identity, above = (3 * world.randn(1000, *r.shape)).log_softmax(-1), [], []
    for beta in BETAS:
        best, value = optimal_policy(ref, r, beta), objective(pi, ref, r, beta)
        identity.append(value - beta * (log_partition(ref, r, beta) - kl_divergence(pi, best)))
        above.append(value - objective(best, ref, r, beta))
    gap, largest = max_gap(torch.stack(identity)), float(torch.stack(above).max())
    yield "Eq. 3", "is β log Z(x) - β KL(π‖π_r), 1000 random π (A.1)", gap, 1e-12
    yield "Eq. 3", "no random π is above π_r: largest difference", largest, 0.0


def section4_rows(world: World) -> Iterator[Row]:
    ref, r, p, i, j, beta = world.ref, world.r, world.p, world.i, world.j, 0.5
    best, log_z = optimal_policy(ref, r, beta), log_partition(ref, r, beta)[:, None]
    pi, flat = world.randn(*r.shape).log_softmax(-1).flatten(), ref.flatten()
    yield "Eq. 4", "π_r sums to 1", max_gap(best.exp().sum(-1), 1), 1e-12
    yield "Eq. 5", "inverts Eq. 4", max_gap(implicit_reward(best, ref, beta, log_z), r), 1e-12
    for logp, claim in ((best, "is Eq. 1 at π_r, for every pair"),
                        (best + log_z, "Z(x) cancels: π_r Z(x) gives the same")):
        preference = policy_preference(logp.flatten(), flat, i, j, beta)
        yield "Eq. 6", claim, max_gap(preference, p), 1e-12
    losses, _ = dpo_loss(pi, flat, i, j, beta)
    eq2_losses = reward_model_loss(implicit_reward(pi, flat, beta), i, j)
    yield "Eq. 7", "is Eq. 2 with Eq. 5 for r_φ", max_gap(losses, eq2_losses), 1e-12
    start, _ = dpo_loss(flat, flat, i, j, beta)
    yield "Eq. 7", "starts at log 2, where π_θ = π_ref", max_gap(start, math.log(2)), 1e-12
    theta = pi.clone().requires_grad_()
    logps = theta.view_as(r).log_softmax(-1).flatten()
    _, (by_hand,) = inspect_pairs(logps, flat, i, j, beta, [theta])
    auto, = torch.autograd.grad(dpo_loss(logps, flat, i, j, beta)[0].mean(), theta)
    yield "Section 4", "the gradient by hand is autograd's of Eq. 7", max_gap(by_hand, auto), 1e-12
    m = world.randn(1000).requires_grad_()
    wrong = [torch.autograd.grad(weight.f(m, beta).sum(), m)[0] + weight(m, beta)
             for weight in WEIGHTS.values()]
    yield "Section 4", "w = -f'(m) for each of WEIGHTS", max_gap(torch.stack(wrong)), 1e-12


def optimum_rows(world: World) -> Iterator[Row]:
    """Where the minimum of Eq. 7 lies."""
    ref, r = world.ref, world.r
    for name, frequency in world.frequencies.items():
        kls = torch.stack([
            kl_divergence(optimal_policy(ref, r, beta), world.solve(beta, world.p, frequency))
            for beta in BETAS])
        yield "Eq. 7", f"is minimal at π_r on p*: KL at 4 β, pairs {name}", max_gap(kls), 1e-12
    small, errors = World(10, 8), []
    sizes = torch.tensor([1e3, 1e4, 1e5, 1e6], dtype=torch.float64)  # labels per prompt
    for n in sizes:
        per_pair = torch.full_like(small.p, float(n // 28))  # 28 pairs of 8 completions
        labels = torch.binomial(per_pair, small.p, small.generator) / per_pair
        solved = small.solve(1.0, labels, small.frequencies["uniform"])
        errors.append(kl_divergence(optimal_policy(small.ref, small.r, 1.0), solved).mean())
    x = sizes.log() - sizes.log().mean()
    slope = float(x @ torch.stack(errors).log() / (x @ x))
    yield "Eq. 7", f"on n sampled pairs KL falls as 1/n: slope {slope:.2f}", abs(slope + 1), 0.15
    yw, yl, _ = preference_pairs(r)
    hard = []
    for t in (1, 10, 100, 1e3, 1e4, 1e5):  # every t > 0 orders every pair correctly
        logp = (ref + t * r).log_softmax(-1).flatten()
        hard.append(max_gap(dpo_loss(logp, ref.flatten(), yw, yl, 1.0)[0]))
    least = hard[-1] if all(a > b for a, b in zip(hard, hard[1:])) else math.nan
    yield "Eq. 7", "without label noise falls to 0 as margins grow: no optimum", least, 1e-9


def baseline_rows(world: World) -> Iterator[Row]:
    """C.3 and Preferred-FT."""
    pi, ref, beta = world.randn(24).requires_grad_(), world.randn(24), 0.5
    yw, yl, _ = preference_pairs(world.randn(12, 2))
    naive, _ = weighted_loss(pi, ref, yw, yl, beta, WEIGHTS["constant"])
    slopes = [torch.autograd.grad(loss.sum(), pi)[0]
              for loss in (naive / beta, unlikelihood_loss(pi, yw, yl, 1.0))]
    yield "C.3", "at α = 1, β times its gradient is the constant weight's", max_gap(*slopes), 1e-12
    losses = unlikelihood_loss(pi, yw, yl, 0.0)
    yield "Preferred-FT", "is C.3 at α = 0", max_gap(losses, preferred_ft_loss(pi, yw)), 1e-12


def print_rows(rows: Iterable[Row]) -> int:
    """Prints each claim with its residual, tolerance and verdict; returns 1 if any fails, or 0."""
    started, failed = time.perf_counter(), 0
    print(f"{'':<14}{'claim':<60}{'residual':>9}{'tolerance':>11}")
    for equation, claim, residual, tolerance in rows:
        if tolerance is None:
            print(f"{equation:<14}{claim:<60}{residual:>9.3f}  measured, no claim")
            continue
        verdict = "pass" if residual <= tolerance else "FAIL"  # NaN fails
        failed += verdict == "FAIL"
        print(f"{equation:<14}{claim:<60}{residual:>9.1e}{tolerance:>11.2g}  {verdict}")
    print(f"{failed} failed; {time.perf_counter() - started:.1f} s")
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks Sections 3 and 4, C.3 and Preferred-FT on small worlds; exits with 1 if one fails."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    torch.set_num_threads(1)  # the tensors are so small that more threads are slower
    checks = section3_rows, section4_rows, optimum_rows, baseline_rows
    return print_rows(row for check in checks for row in check(World()))


if __name__ == "__main__":
    sys.exit(main_exit(main))
