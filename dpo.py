"""The paper's equations as pure functions of log-probs and rewards, in the paper's order.

    Section 3  Eq. 1 preference_probability, Eq. 2 reward_model_loss, Eq. 3 objective
    Section 4  Eq. 4 optimal_policy, Eq. 5 implicit_reward, Eq. 6 policy_preference, Eq. 7 dpo_loss,
               its gradient dpo_gradient; other weights: WEIGHTS, weighted_loss, inspect_pairs
    Section 5  Definition 1 class_gap, Lemma 1 preference_gap, Lemma 2 optimum_gap,
               Theorem 1 class_member, Eq. 8 project_reward, Eq. 9 normaliser,
               Proposition 1 uniqueness_gap, Eq. 10 soft_advantage
    Appendix   Eq. 18 ranking_logps, A.3 plackett_luce_loss, C.3 unlikelihood_loss,
               Preferred-FT preferred_ft_loss

`python dpo.py` solves small worlds by enumeration and prints each equation with its residual.
Knows no model and no text. Log-probs and KL in nats; r̂ = β log π_θ/π_ref; m = r̂(y_w) - r̂(y_l).

B completions of a batch, T tokens, P prompts, G groups, K completions a prompt, N pairs.
"""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.runs import UserError, main_exit

WeightFn = Callable[[Tensor, float], Tensor]  # (margin (N,), beta) -> (N,)

# ------------------------------------------------------------------------------ notation


def completion_mask(prompt_lens: Tensor, lengths: Tensor, T: int) -> Tensor:
    """The tokens of y: (B,) and (B,) -> (B, T) bool, true where prompt_len <= t < length.

    `lengths` count prompt and completion. By position, not by value: padding may be the EOS
    token, and the EOS that ends y belongs to y.
    """
    t = torch.arange(T, device=lengths.device)
    return (t >= prompt_lens[:, None]) & (t < lengths[:, None])


def completion_logps(token_logps: Tensor, prompt_lens: Tensor, lengths: Tensor) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) in nats: (B, T) -> (B,), in float32 or wider.

    A sum, EOS included: a mean over tokens would be another loss than Eq. 7. token_logps[b, t] is
    the log-prob of token t given those before it.
    """
    mask = completion_mask(prompt_lens, lengths, token_logps.size(1))
    dtype = torch.promote_types(token_logps.dtype, torch.float32)
    return token_logps.masked_fill(~mask, 0).sum(-1, dtype=dtype)


def preference_pairs(rewards: Tensor) -> tuple[Tensor, Tensor, int]:
    """All ordered pairs inside each group: rewards (G, K) -> yw_idxs (N,), yl_idxs (N,), ties.

    The indices are into the flattened G*K completions. A tie has no winner: dropped and counted.
    UserError for K = 1 and for a reward that is not finite.
    """
    G, K = rewards.shape
    if K < 2:
        raise UserError(f"a preference needs two completions of a prompt, got K = {K}")
    if not rewards.isfinite().all():
        raise UserError("a reward is not finite and has no place in an order: check the groups")
    g, w, l = (rewards[:, :, None] > rewards[:, None, :]).nonzero(as_tuple=True)
    return g * K + w, g * K + l, G * K * (K - 1) // 2 - len(g)


def kl_divergence(logp: Tensor, logq: Tensor, dim: int = -1) -> Tensor:
    """KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v)) in nats, over `dim`; 0 where p(v) = 0."""
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0)).sum(dim)


def margins(rewards: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """m = r(x,y_w) - r(x,y_l): rewards (B,) -> (N,). UserError without a pair."""
    need_pairs(yw_idxs, yl_idxs)
    return rewards[yw_idxs] - rewards[yl_idxs]


def need_pairs(yw_idxs: Tensor, yl_idxs: Tensor) -> None:
    if len(yw_idxs) != len(yl_idxs) or len(yw_idxs) == 0:
        raise UserError(f"got {len(yw_idxs)} winners and {len(yl_idxs)} losers, wanted one pair or "
                        "more: are all rewards within each group equal?")


# ------------------------------------------------------------------------------ Section 3


def preference_probability(r1: Tensor, r2: Tensor) -> Tensor:
    """Eq. 1 · p*(y₁ ≻ y₂ | x) = exp r*(x,y₁) / (exp r*(x,y₁) + exp r*(x,y₂)).

    Any equal shapes. It is σ(r₁ - r₂), and computed so: exp overflows, σ does not.
    """
    return torch.sigmoid(r1 - r2)


def reward_model_loss(rewards: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Eq. 2 · L_R(r_φ) = -E log σ(r_φ(x,y_w) - r_φ(x,y_l)).

    rewards (B,) -> (N,), one loss a pair. It sees differences only: r_φ is free up to f(x).
    """
    return -F.logsigmoid(margins(rewards, yw_idxs, yl_idxs))


def objective(logp: Tensor, ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 3 · max_π E_{y~π} r(x,y) - β KL(π(y|x) ‖ π_ref(y|x)).

    Every y enumerated: three (..., K) -> (...). By A.1 it equals β log Z(x) - β KL(π ‖ π_r).
    """
    return (logp.exp() * rewards).sum(-1) - beta * kl_divergence(logp, ref_logp)


# ------------------------------------------------------------------------------ Section 4


def log_partition(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) of Eq. 4, Z(x) = Σ_y π_ref(y|x) exp(r(x,y)/β): two (..., K) -> (...)."""
    return (ref_logp + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 4 · π_r(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x).

    Two (..., K) -> log π_r (..., K). Z sums over every y: hence nobody computes π_r for text.
    """
    return ref_logp + rewards / beta - log_partition(ref_logp, rewards, beta)[..., None]


def implicit_reward(pi_logps: Tensor, ref_logps: Tensor, beta: float,
                    log_z: float | Tensor = 0.0) -> Tensor:
    """Eq. 5 · r(x,y) = β log π_r(y|x)/π_ref(y|x) + β log Z(x).

    Any equal shapes. Without log_z it is r̂, the same up to an f(x). UserError unless β > 0.
    """
    if not beta > 0:
        raise UserError(f"beta must be positive, got {beta}: the paper's is --beta 0.1")
    if pi_logps.shape != ref_logps.shape:
        raise UserError(f"got log-probs of shape {tuple(pi_logps.shape)} under π and of "
                        f"{tuple(ref_logps.shape)} under π_ref: score the same completions")
    return beta * (pi_logps - ref_logps + log_z)


def policy_preference(pi_logps: Tensor, ref_logps: Tensor, y1_idxs: Tensor, y2_idxs: Tensor,
                      beta: float) -> Tensor:
    """Eq. 6 · p*(y₁ ≻ y₂|x) = 1 / (1 + exp(β log π*(y₂)/π_ref(y₂) - β log π*(y₁)/π_ref(y₁))).

    (B,), (B,), (N,), (N,) -> (N,). Eq. 1 with Eq. 5 put in: Z(x) is in both terms and cancels.
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    return preference_probability(rewards[y1_idxs], rewards[y2_idxs])


def dpo_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 7 · L = -log σ(β h(y_w) - β h(y_l)),  h(y) = log π_θ(y|x) - log π_ref(y|x).

    Appendix B's signature: log-probs (B,), one a completion; index vectors (N,) name each pair's
    members. Returns losses (N,) and the detached r̂ = β h (B,). Every completion is scored once,
    however many pairs it is in. At π_θ = π_ref every loss is log 2, whatever the data.
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    losses = -F.logsigmoid(margins(rewards, yw_idxs, yl_idxs))
    return losses, rewards.detach()


def soft_dpo_loss(pi_logps: Tensor, ref_logps: Tensor, y1_idxs: Tensor, y2_idxs: Tensor,
                  p: float | Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The mean of Eq. 7 over labels that prefer y₁ with probability p (N,): p L₁₂ + (1 - p) L₂₁.

    Otherwise as dpo_loss. With Eq. 1's p it is the population loss, and its optimum Eq. 4's π_r.
    With p = 1, labels without noise, it has no finite optimum: any policy that orders every pair
    rightly is bettered by going further the same way.
    """
    losses, rewards = dpo_loss(pi_logps, ref_logps, y1_idxs, y2_idxs, beta)
    swapped, _ = dpo_loss(pi_logps, ref_logps, y2_idxs, y1_idxs, beta)
    return p * losses + (1 - p) * swapped, rewards


def dpo_gradient(weights: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float, B: int) -> Tensor:
    """Section 4 · ∇L = -β E[w (∇log π(y_w) - ∇log π(y_l))],  w = σ(r̂(x,y_l) - r̂(x,y_w)).

    weights (N,) -> (B,), the c of ∇L = Σ_b c_b ∇log π(y_b), where L is the mean over the pairs.
    DPO's weights are WEIGHTS["sigmoid"]: 1/2 at the start, near 0 once a pair is well in order.
    """
    push = beta * weights / len(weights)
    return push.new_zeros(B).index_add(0, yw_idxs, -push).index_add(0, yl_idxs, push)


# ------------------------------------------------------------------------------ losses by weight


class Weight(NamedTuple):
    """An importance weight w(m, β), and the loss f(m, β) that has it: w = -f'(m). (N,) -> (N,).

    ipo: its (h_w - h_l - 1/(2β))², where h_w - h_l = m/β, is f = ((m - 1/2)/β)²: w = (1 - 2m)/β².
    """

    w: WeightFn
    f: WeightFn

    def __call__(self, margin: Tensor, beta: float) -> Tensor:
        return self.w(margin, beta)


CDPO_EPS = 0.1  # the share of labels that cDPO takes to be flipped
EXP_FLOOR = -30.0  # below it the exponential goes on as its tangent, so float32 cannot overflow

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
    """A loss by its weight: shapes as dpo_loss, f(m) as value, Section 4's gradient with w(m).

    "sigmoid" is Eq. 7 itself. The others' gradient is that of -(w β (log π_w - log π_l)), w
    detached. A function from outside WEIGHTS has the value f(m) = -∫₀ᵐ w, by trapezoids.
    The scale trap: Adam and RMSprop divide by the gradient's size, so under them a constant weight
    has none (β 1 and 0.1 take one path when clipping acts at every step or at none). What makes
    it degenerate is not a larger step; it is that satisfied pairs never stop pushing.
    """
    if weight is WEIGHTS["sigmoid"]:
        return dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    rewards = implicit_reward(pi_logps, ref_logps, beta).detach()
    margin = margins(rewards, yw_idxs, yl_idxs)
    surrogate = -(weight(margin, beta).detach() * beta * margins(pi_logps, yw_idxs, yl_idxs))
    if isinstance(weight, Weight):
        value = weight.f(margin, beta)
    else:
        grid = torch.linspace(0, 1, 129).to(margin)  # each pair's own path from 0 to m
        along = weight((margin[:, None] * grid).flatten(), beta).view(len(margin), -1)
        value = -margin * torch.trapezoid(along, grid)
    return value.detach() + (surrogate - surrogate.detach()), rewards


def load_weight(spec: str) -> WeightFn:
    """A name of WEIGHTS, or path/to/file.py:function with (margin (N,), beta) -> (N,).

    UserError for an unknown name, a missing file or function, a wrong signature; and, each time a
    user's function is called, for a wrong shape or a value that is not finite.
    """
    if spec in WEIGHTS:
        return WEIGHTS[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"unknown weight {spec!r}: give one of {', '.join(WEIGHTS)}, or "
                        "path/to/file.py:function")
    module = import_file(path)
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        raise UserError(f"weight {spec!r}: {path} defines no function {name!r}")
    return checked_weight(function, f"{path}:{function.__code__.co_firstlineno} ({name})")


def import_file(path: str):
    """The module in a user's file. UserError where there is none, or its code fails."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # not there, or whatever its code does
        raise UserError(f"cannot import {path}: {error!r}") from error
    return module


def own_functions(path: str) -> dict[str, Callable]:
    """A student's file: the functions in it that have the name of one here.

    UserError for a file that shares none, or has one with another signature.
    """
    module = import_file(path)
    theirs = {name: f for name, f in vars(module).items()
              if inspect.isfunction(f) and f.__globals__ is vars(module)  # its own, not imported
              and inspect.isfunction(globals().get(name))}
    if not theirs:
        raise UserError(f"{path} defines no function of dpo.py: write dpo_loss, say")
    for name, function in theirs.items():
        want, got = (list(inspect.signature(f).parameters) for f in (globals()[name], function))
        if want != got:
            raise UserError(f"{path}:{function.__code__.co_firstlineno}: {name} must take "
                            f"({', '.join(want)}), it takes ({', '.join(got)})")
    return theirs


def use_module(path: str) -> list[str]:
    """The student's functions replace the ones of this file that have their names: the names."""
    theirs = own_functions(path)
    globals().update(theirs)
    return list(theirs)


def checked_weight(function: Callable, where: str) -> WeightFn:
    """A user's weight with its results checked; `where` names it in each UserError."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise UserError(f"{where} must take (margin, beta): {error}") from error

    def weight(margin: Tensor, beta: float) -> Tensor:
        w = function(margin, beta)
        got = tuple(w.shape) if torch.is_tensor(w) else type(w).__name__
        if got != tuple(margin.shape):
            raise UserError(f"{where} must return a tensor of the margin's shape "
                            f"{tuple(margin.shape)}, got {got}")
        wrong = ~w.isfinite()
        if wrong.any():
            raise UserError(f"{where} must return finite weights, got {w[wrong][0]:g} at margin "
                            f"{margin[wrong][0]:g}")
        return w.to(margin)

    return weight


def inspect_pairs(pi_logps: Tensor | Sequence[Tensor], ref_logps: Tensor, yw_idxs: Tensor,
                  yl_idxs: Tensor, beta: float, params: Sequence[Tensor],
                  weight: WeightFn = WEIGHTS["sigmoid"]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Section 4's gradient by hand: a table of (N,) columns, and the mean loss's, shaped as params.

    Columns: reward_w, reward_l, margin, weight; norm_w, norm_l, cosine of ∇log π(y_w) and
    ∇log π(y_l), where near 1 means that what lifts one lifts the other; update, the norm of
    β w (∇log π(y_w) - ∇log π(y_l)). The mean gradient equals autograd's.
    pi_logps: (B,) with its graph, or a list of B scalars each with a graph of its own, cheaper
    since a backward then passes through one sequence. One backward a distinct completion, whose
    gradient is kept until its last pair: list a group's pairs together.
    """
    logps = list(pi_logps)
    rewards = implicit_reward(torch.stack(logps).detach(), ref_logps, beta)
    margin = margins(rewards, yw_idxs, yl_idxs)
    w = weight(margin, beta)
    coefficients = dpo_gradient(w, yw_idxs, yl_idxs, beta, len(logps))
    pairs = list(zip(yw_idxs.tolist(), yl_idxs.tolist()))
    last = {i: n for n, pair in enumerate(pairs) for i in pair}
    grads, rows, mean = {}, [], 0
    for n, pair in enumerate(pairs):
        for i in set(pair) - grads.keys():
            parts = torch.autograd.grad(logps[i], params, retain_graph=True, allow_unused=True,
                                        materialize_grads=True)
            grads[i] = torch.cat([part.flatten() for part in parts])
            mean = mean + coefficients[i] * grads[i]
        up, down = (grads[i] for i in pair)
        rows.append(torch.stack([up.norm(), down.norm(), up @ down, (up - down).norm()]))
        grads = {i: grad for i, grad in grads.items() if last[i] > n}
    norm_w, norm_l, dot, apart = torch.stack(rows).T
    cosine = dot / (norm_w * norm_l).clamp(min=torch.finfo(dot.dtype).tiny)
    columns = dict(reward_w=rewards[yw_idxs], reward_l=rewards[yl_idxs], margin=margin, weight=w,
                   norm_w=norm_w, norm_l=norm_l, cosine=cosine, update=beta * w.abs() * apart)
    return columns, [g.view_as(p) for g, p in zip(mean.split([p.numel() for p in params]), params)]


# ------------------------------------------------------------------------------ Section 5
# Every y enumerated: rewards and log-probs are (..., K), and what is one number a prompt (...).


def class_gap(r1: Tensor, r2: Tensor) -> Tensor:
    """Definition 1 · r ~ r' ⇔ r(x,y) - r'(x,y) = f(x).

    -> (...): how much r - r' varies over y; 0 when they are equivalent.
    """
    return (r1 - r2).amax(-1) - (r1 - r2).amin(-1)


def preference_gap(r1: Tensor, r2: Tensor) -> Tensor:
    """Lemma 1 · r ~ r' ⇒ r and r' induce the same preference distribution.

    -> (...): the largest difference of Eq. 1 over all pairs of y.
    """
    p1, p2 = (preference_probability(r[..., :, None], r[..., None, :]) for r in (r1, r2))
    return (p1 - p2).abs().amax((-2, -1))


def optimum_gap(ref_logp: Tensor, r1: Tensor, r2: Tensor, beta: float) -> Tensor:
    """Lemma 2 · r ~ r' ⇒ Eq. 3 has the same optimal policy under r and r'.

    -> (...): KL between the two optima.
    """
    return kl_divergence(optimal_policy(ref_logp, r1, beta), optimal_policy(ref_logp, r2, beta))


def class_member(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Theorem 1 · every class has a member β log π(y|x)/π_ref(y|x) for some π.

    -> (..., K): that member; the π is Eq. 4's π_r. Hence a language model can stand for every
    reward that preferences can tell apart: it is secretly a reward model.
    """
    return implicit_reward(optimal_policy(ref_logp, rewards, beta), ref_logp, beta)


def project_reward(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 8 · f(r; π_ref, β)(x,y) = r(x,y) - β log Σ_y π_ref(y|x) exp(r(x,y)/β).

    -> (..., K). What is taken away depends on x alone: the class stays.
    """
    return rewards - beta * log_partition(ref_logp, rewards, beta)[..., None]


def normaliser(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 9 · Σ_y π_ref(y|x) exp(r(x,y)/β) = 1 for a projected r.

    -> (...): the sum, whose terms are then themselves a policy, π_r.
    """
    return log_partition(ref_logp, rewards, beta).exp()


def uniqueness_gap(ref_logp: Tensor, r1: Tensor, r2: Tensor, beta: float) -> Tensor:
    """Proposition 1 · r ~ r' ⇒ f(r) = f(r'): exactly one member of a class obeys Eq. 9.

    -> (...). A member further off by f(x) makes Eq. 9's sum exp(f(x)/β), which is 1 only at f = 0.
    """
    gap = project_reward(ref_logp, r1, beta) - project_reward(ref_logp, r2, beta)
    return gap.abs().amax(-1)


def soft_advantage(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float,
                   value: float | Tensor) -> Tensor:
    """Eq. 10 · max_π E_π[r_φ(x,y) - β log Σ_y π_ref exp(r_φ/β) - β log π(y|x)/π_ref(y|x)].

    The bracket, any equal shapes. `value` is its middle term, β log_partition. As that depends on
    x alone, any other baseline, 0 too, leaves the mean policy gradient as it is; not its variance.
    """
    return rewards - value - implicit_reward(pi_logps, ref_logps, beta)


# ------------------------------------------------------------------------------ A.3 and C.3


def ranking_logps(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 18 · p(τ | y₁…y_K, x) = Π_k exp r(x,y_τ(k)) / Σ_{j≥k} exp r(x,y_τ(j)),  best first.

    scores r (G, K), ranked by rewards (G, K) -> log p (G,), tied (G, K) bool. What comes after k
    is what has less reward, so nothing is sorted. Completions of equal reward leave the ranking.
    """
    tied = (rewards[:, :, None] == rewards[:, None, :]).sum(-1) > 1
    rest = (rewards[:, None, :] <= rewards[:, :, None]) & ~tied[:, None, :]  # (G, k, j)
    rest = rest | torch.eye(rewards.size(1), dtype=torch.bool, device=rest.device)  # no empty sum
    denominators = scores[:, None, :].masked_fill(~rest, -math.inf).logsumexp(-1)
    return (scores - denominators).masked_fill(tied, 0).sum(-1), tied


def plackett_luce_loss(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor,
                       beta: float) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A.3 · L = -log p(τ) by Eq. 18 with r̂ for r: DPO from rankings.

    Log-probs (G*K,), rewards (G, K) -> losses (G',), detached r̂ (G*K,), and the counts of "tied"
    completions and of groups "skipped" with under two left. K = 2 is Eq. 7; it starts at log K!.
    """
    implicit = implicit_reward(pi_logps, ref_logps, beta)
    logps, tied = ranking_logps(implicit.view(rewards.shape), rewards)
    losses = -logps[(~tied).sum(-1) >= 2]
    if len(losses) == 0:
        raise UserError(f"none of {len(rewards)} groups has two completions of different rewards, "
                        "ties apart: there is nothing to rank")
    counts = dict(tied=int(tied.sum()), skipped=len(rewards) - len(losses))
    return losses, implicit.detach(), counts


def unlikelihood_loss(pi_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, alpha: float) -> Tensor:
    """C.3 · L = -E[log π(y_w|x) - α log π(y_l|x)].

    (B,) -> (N,). No π_ref, no floor. At α = 1 its gradient is the constant weight's over β.
    """
    need_pairs(yw_idxs, yl_idxs)
    return alpha * pi_logps[yl_idxs] - pi_logps[yw_idxs]


def preferred_ft_loss(pi_logps: Tensor, yw_idxs: Tensor) -> Tensor:
    """Preferred-FT · L = -E log π(y_w|x).

    (B,) -> (N,): a completion counts as often as it wins.
    """
    need_pairs(yw_idxs, yw_idxs)
    return -pi_logps[yw_idxs]


if __name__ == "__main__":
    import derivations  # which imports this file, under its own name

    sys.exit(main_exit(derivations.main))
