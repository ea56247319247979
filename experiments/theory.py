"""Section 5 of the paper as functions, and the checks of Section 5 and of A.3's rankings.

    Section 5  Definition 1 class_gap, Lemma 1 preference_gap, Lemma 2 optimum_gap,
               Theorem 1 class_member, Eq. 8 project_reward, Eq. 9 normaliser,
               Proposition 1 uniqueness_gap, Eq. 10 soft_advantage

`python -m experiments.theory` prints one row per claim and draws the frontier of a small world;
`python dpo.py` checks Sections 3 and 4.

P prompts, K completions per prompt. Every completion is enumerated: rewards and log-probs have
shape (..., K), and a quantity per prompt has shape (...). Log-probs and KL are in nats.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# before the slow imports: Ctrl-C during them then prints one sentence
from support.runs import main_exit, write_whole, writing

import torch
from torch import Tensor

import dpo
from dpo import BETAS, Row, World, max_gap

# ------------------------------------------------------------------------------ Section 5

def class_gap(r1: Tensor, r2: Tensor) -> Tensor:
    """Definition 1 · r ~ r' ⇔ r(x,y) - r'(x,y) = f(x).

    -> (...): the range of r - r' over y, maximum minus minimum. It is 0 when r ~ r'.
    """
    return (r1 - r2).amax(-1) - (r1 - r2).amin(-1)


def preference_gap(r1: Tensor, r2: Tensor) -> Tensor:
    """Lemma 1 · r ~ r' ⇒ r and r' induce the same preference distribution.

    -> (...): the largest difference between their probabilities of Eq. 1, over all pairs of y. The
    paper states the lemma for Plackett-Luce (Eq. 18). Eq. 1 is its case K = 2.
    """
    p1, p2 = (dpo.preference_probability(r[..., :, None], r[..., None, :]) for r in (r1, r2))
    return (p1 - p2).abs().amax((-2, -1))


def optimum_gap(ref_logp: Tensor, r1: Tensor, r2: Tensor, beta: float) -> Tensor:
    """Lemma 2 · r ~ r' ⇒ Eq. 3 has the same optimal policy under r and r'.

    -> (...): the KL between the two optimal policies.
    """
    best1, best2 = (dpo.optimal_policy(ref_logp, r, beta) for r in (r1, r2))
    return dpo.kl_divergence(best1, best2)


def class_member(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Theorem 1 · every class has a member β log π(y|x)/π_ref(y|x) for some π.

    -> (..., K): that member; its π is π_r of Eq. 4. So a policy can represent every reward up to a
    function of x, and such a function changes no preference: the policy is "secretly a reward
    model". The theorem assumes β > 0 and π_ref(y|x) > 0 for every y. A softmax over tokens gives
    every y a probability above 0. Where π_ref(y|x) = 0, π_r(y|x) is also 0 and the result is NaN:
    no policy can represent r(x,y).
    """
    return dpo.implicit_reward(dpo.optimal_policy(ref_logp, rewards, beta), ref_logp, beta)


def project_reward(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 8 · f(r; π_ref, β)(x,y) = r(x,y) - β log Σ_y π_ref(y|x) exp(r(x,y)/β).

    -> (..., K). It subtracts a function of x alone, so the result is in the class of r.
    """
    return rewards - beta * dpo.log_partition(ref_logp, rewards, beta)[..., None]


def normaliser(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 9 · Σ_y π_ref(y|x) exp(r(x,y)/β) = 1 for a projected r.

    -> (...): the sum. When it is 1, its terms are the probabilities of a policy, π_r of Eq. 4.
    """
    return dpo.log_partition(ref_logp, rewards, beta).exp()


def uniqueness_gap(ref_logp: Tensor, r1: Tensor, r2: Tensor, beta: float) -> Tensor:
    """Proposition 1 · r ~ r' ⇒ f(r) = f(r'): exactly one member of a class obeys Eq. 9.

    -> (...): the largest difference between the two projections. For a projection plus f(x), the
    sum of Eq. 9 is exp(f(x)/β). It is 1 only where f(x) = 0.
    """
    gap = project_reward(ref_logp, r1, beta) - project_reward(ref_logp, r2, beta)
    return gap.abs().amax(-1)


def soft_advantage(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float,
                   value: float | Tensor) -> Tensor:
    """Eq. 10 · max_π E_π[r_φ(x,y) - β log Σ_y π_ref exp(r_φ/β) - β log π(y|x)/π_ref(y|x)].

    Tensors of one shape -> the bracket. `value` is its middle term, the soft value of π_ref. It
    depends on x alone, so it is a baseline. Another baseline, for example 0, gives the same mean
    policy gradient with another variance.
    """
    return rewards - value - dpo.implicit_reward(pi_logps, ref_logps, beta)


def policy_gradient(world: World, beta: float, logp: Tensor, value: Tensor,
                    probability: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of Eq. 10 in the logits, from one sample y ~ π: its mean (P, K) and its variance
    (P,), summed over the logits.

    The baseline is drawn from S values: value (P, S), probability (P, S). All y and all values are
    enumerated.
    """
    ref, r, pi = world.ref[:, None], world.r[:, None], logp.exp()[:, None]  # (P, 1, K)
    signal = soft_advantage(logp[:, None], ref, r, beta, value[..., None])  # (P, S, K)
    score = torch.eye(pi.size(-1)) - pi  # (P, y, K): ∇log π(y)
    joint = probability[..., None] * pi  # (P, S, K)
    mean = torch.einsum("psy,pyk->pk", joint * signal, score)
    square = torch.einsum("psy,pyk->p", joint * signal**2, score**2)
    return mean, square - (mean**2).sum(-1)


# ------------------------------------------------------------------------------ the checks

ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (4!, 4)


def section5_rows(world: World) -> Iterator[Row]:
    ref, r, beta = world.ref, world.r, 0.5
    f = 5 * world.randn(len(r), 1)
    r2 = r + f
    member, projected = class_member(ref, r, beta), project_reward(ref, r, beta)
    yield "Definition 1", "r + f(x) is in r's class", max_gap(class_gap(r, r2)), 1e-12
    yield "Lemma 1", "r + f(x) has the preferences of r", max_gap(preference_gap(r, r2)), 1e-12
    orders = ORDERS.repeat(len(r), 1)  # (P 4!, 4), of the first 4 y of each prompt
    logp, logp2 = (dpo.ranking_logps(x[:, :4].repeat_interleave(24, 0), orders)[0] for x in (r, r2))
    claim = "r + f(x) has the rankings of r: Eq. 18, all orders of 4 y"
    yield "Lemma 1", claim, max_gap(logp, logp2), 1e-12
    gap = max_gap(optimum_gap(ref, r, r2, beta))
    yield "Lemma 2", "the optimal policies of r and r + f(x) are equal: KL", gap, 1e-12
    yield "Theorem 1", "β log π_r/π_ref is in r's class", max_gap(class_gap(member, r)), 1e-12
    ref0, other = ref.clone(), r.clone()
    ref0[:, 0], other[:, 0] = -math.inf, r[:, 0] + 1
    gap = max_gap(optimum_gap(ref0, r, other, beta))
    yield "Theorem 1", "fails if π_ref(y) = 0: two classes, one optimum: KL", gap, 1e-12
    yield "Eq. 8", "the projection is in r's class", max_gap(class_gap(projected, r)), 1e-12
    yield "Eq. 8", "the projection is Theorem 1's member", max_gap(projected, member), 1e-12
    yield "Eq. 9", "is true for the projection", max_gap(normaliser(ref, projected, beta), 1), 1e-12
    unique = max_gap(uniqueness_gap(ref, r, r2, beta))
    yield "Proposition 1", "r and r + f(x) have the same projection", unique, 1e-12
    gap = max_gap(beta * normaliser(ref, projected + f, beta).log(), f[:, 0])
    yield "Proposition 1", "projection + f(x): Eq. 9's sum is exp(f(x)/β)", gap, 1e-12

    theta = world.randn(*r.shape).requires_grad_()
    auto, = torch.autograd.grad(dpo.objective(theta.log_softmax(-1), ref, r, beta).sum(), theta)
    pi, soft = theta.detach().log_softmax(-1), beta * dpo.log_partition(ref, r, beta)[:, None]
    one = torch.ones_like(soft)
    baselines = {"none": (0 * soft, one),
                 "one sample": (soft_advantage(pi, ref, r, beta, 0), pi.exp()),
                 "learned value": (soft + world.randn(len(r), 1) / 4, one),  # with some error
                 "soft value": (soft, one)}
    moments = {name: policy_gradient(world, beta, pi, *b) for name, b in baselines.items()}
    gap = max_gap(torch.stack([mean for mean, _ in moments.values()]), auto)
    yield "Eq. 10", "with 4 baselines the mean is the gradient of Eq. 3", gap, 1e-12
    _, variance = policy_gradient(world, beta, dpo.optimal_policy(ref, r, beta), soft, one)
    yield "Eq. 10", "at π_r, with the soft value, its variance is 0", max_gap(variance), 1e-12
    for name, (_, variance) in moments.items():
        yield "Eq. 10", f"variance at a random π, baseline: {name}", float(variance.mean()), None


def ranking_rows(world: World) -> Iterator[Row]:
    """Appendix A.3."""
    pi, ref, r, beta = world.randn(24), world.randn(24), world.randn(12, 2), 0.5
    yw, yl, _ = dpo.preference_pairs(r)
    ranked, _, _ = dpo.plackett_luce_loss(pi, ref, r, beta)
    pairwise, _ = dpo.dpo_loss(pi, ref, yw, yl, beta)
    yield "Eq. 18", "with r̂ for r and K = 2 it is Eq. 7", max_gap(ranked, pairwise), 1e-12
    logps, _ = dpo.ranking_logps(world.randn(1, 4).expand(24, 4), ORDERS)
    yield "Eq. 18", "the p(τ) of all 4! orders sum to 1", max_gap(logps.exp().sum(), 1), 1e-12
    start, _, _ = dpo.plackett_luce_loss(ref, ref, world.randn(6, 4), beta)
    yield "A.3", "the loss is log 4! where π_θ = π_ref", max_gap(start, math.log(24)), 1e-12


def draw_frontier(world: World, path: Path) -> None:
    """Draw reward against KL: π_r of Eq. 4 for many β, and the policies that minimise Eq. 7."""
    from matplotlib.figure import Figure  # without pyplot: it writes files and opens no window

    def plot(policies, style, label):
        logps = torch.stack(list(policies))  # (points, P, K)
        kl, rewards = dpo.kl_divergence(logps, world.ref), (logps.exp() * world.r).sum(-1)
        axes.plot(kl.mean(-1), rewards.mean(-1), style, label=label, fillstyle="none", ms=9)

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    best = (dpo.optimal_policy(world.ref, world.r, float(beta))
            for beta in torch.logspace(-1.7, 2, 200))
    plot(best, "grey", "the optimum of Eq. 3, for every β (Eq. 4)")
    for beta, marker in zip(BETAS, "osD^"):
        plot((world.solve(beta, world.p, frequency) for frequency in world.frequencies.values()),
             marker, f"the minimum of DPO's loss (Eq. 7), β = {beta:g}")
    plot([world.ref], "k*", "π_ref")
    axes.set(xlabel="KL(π ‖ π_ref), nats per completion", ylabel="mean reward E_π r(x,y)",
             title="Minimising DPO's loss gives the optimal policy of its β\n(a world of "
                 f"{len(world.r)} prompts with {world.r.size(1)} completions each, all enumerated)")
    axes.legend()
    axes.grid(alpha=0.25)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, dpi=120))


def main(argv: Sequence[str] | None = None) -> int:
    """Check Section 5 and A.3 and draw the figure. The exit code is 1 if a claim fails."""
    parser = argparse.ArgumentParser(description="Check Section 5 and A.3 on small worlds.")
    parser.add_argument("--out", type=Path, default=Path("out/dpo_tabular_frontier.png"),
                        help="the figure (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small, as in dpo.main
    failed = dpo.print_rows(itertools.chain(section5_rows(World()), ranking_rows(World())))
    draw_frontier(World(), args.out)
    print(f"the figure: {args.out}")
    return failed


if __name__ == "__main__":
    sys.exit(main_exit(main))
