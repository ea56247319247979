"""Section 5 of the paper as functions, and the checks of Section 5 and of A.3's rankings.

    Section 5  Definition 1 class_gap, Lemma 1 preference_gap, Lemma 2 optimum_gap,
               Theorem 1 class_member, Eq. 8 project_reward, Eq. 9 normaliser,
               Proposition 1 uniqueness_gap, Eq. 10 soft_advantage

`python -m experiments.theory` prints one row per claim and draws the frontier of a small world;
`python dpo.py` checks Sections 3 and 4.

P prompts, K completions per prompt. Every completion is enumerated: rewards and log-probs are
(..., K), and a quantity of the prompt is (...). Log-probs and KL are in nats.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# before the slow imports: Ctrl-C meanwhile is then one sentence
from support.runs import main_exit, write_whole, writing

import torch
from torch import Tensor

import dpo
from dpo import BETAS, Row, World, max_gap

# ------------------------------------------------------------------------------ Section 5

def class_gap(r1: Tensor, r2: Tensor) -> Tensor:
    """Definition 1 · r ~ r' ⇔ r(x,y) - r'(x,y) = f(x).

    -> (...): how much r - r' varies over y. It is 0 when r and r' are equivalent.
    """
    return (r1 - r2).amax(-1) - (r1 - r2).amin(-1)


def preference_gap(r1: Tensor, r2: Tensor) -> Tensor:
    """Lemma 1 · r ~ r' ⇒ r and r' induce the same preference distribution.

    -> (...): the largest difference between their Eq. 1, over all pairs of y. The paper states the
    lemma for Plackett-Luce, Eq. 18, of which Eq. 1 is the case K = 2.
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

    -> (..., K): that member, for which π is π_r of Eq. 4. So a language model can represent every
    reward up to what preferences cannot tell: it is secretly a reward model. The theorem assumes
    β > 0 and π_ref(y|x) > 0 for every y, which a softmax over tokens has. Where π_ref(y|x) = 0,
    π_r(y|x) is 0 too, and the result is NaN: no policy tells r(x,y).
    """
    return dpo.implicit_reward(dpo.optimal_policy(ref_logp, rewards, beta), ref_logp, beta)


def project_reward(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 8 · f(r; π_ref, β)(x,y) = r(x,y) - β log Σ_y π_ref(y|x) exp(r(x,y)/β).

    -> (..., K). It subtracts a function of x alone, so the result is in the class of r.
    """
    return rewards - beta * dpo.log_partition(ref_logp, rewards, beta)[..., None]


def normaliser(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 9 · Σ_y π_ref(y|x) exp(r(x,y)/β) = 1 for a projected r.

    -> (...): the sum. When it is 1 its terms are a policy, which is π_r of Eq. 4.
    """
    return dpo.log_partition(ref_logp, rewards, beta).exp()


def uniqueness_gap(ref_logp: Tensor, r1: Tensor, r2: Tensor, beta: float) -> Tensor:
    """Proposition 1 · r ~ r' ⇒ f(r) = f(r'): exactly one member of a class obeys Eq. 9.

    -> (...): the largest difference of the two projections. A projection plus f(x) has Eq. 9's sum
    exp(f(x)/β), which is 1 only where f(x) = 0.
    """
    gap = project_reward(ref_logp, r1, beta) - project_reward(ref_logp, r2, beta)
    return gap.abs().amax(-1)


def soft_advantage(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float,
                   value: float | Tensor) -> Tensor:
    """Eq. 10 · max_π E_π[r_φ(x,y) - β log Σ_y π_ref exp(r_φ/β) - β log π(y|x)/π_ref(y|x)].

    Any equal shapes -> the bracket. `value` is its middle term, the soft value. It depends on x
    alone: any other baseline, 0 included, gives the same mean policy gradient, of another variance.
    """
    return rewards - value - dpo.implicit_reward(pi_logps, ref_logps, beta)


def policy_gradient(world: World, beta: float, logp: Tensor, value: Tensor,
                    probability: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 10's gradient in the logits from one y ~ π: its mean (P, K) and total variance (P,).

    The baseline is one of S values (P, S), drawn with this probability (P, S). All enumerated.
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
    yield "Lemma 1", "r + f(x) has r's preferences", max_gap(preference_gap(r, r2)), 1e-12
    orders = ORDERS.repeat(len(r), 1)  # (P 4!, 4), of the first 4 y of each prompt
    logp, logp2 = (dpo.ranking_logps(x[:, :4].repeat_interleave(24, 0), orders)[0] for x in (r, r2))
    yield "Lemma 1", "and r's rankings: Eq. 18, all orders of 4 y", max_gap(logp, logp2), 1e-12
    yield "Lemma 2", "r + f(x) has r's optimum: KL", max_gap(optimum_gap(ref, r, r2, beta)), 1e-12
    yield "Theorem 1", "β log π_r/π_ref is in r's class", max_gap(class_gap(member, r)), 1e-12
    never, other = ref.clone(), r.clone()
    never[:, 0], other[:, 0] = -math.inf, r[:, 0] + 1
    gap = max_gap(optimum_gap(never, r, other, beta))
    yield "Theorem 1", "needs π_ref(y) > 0: at 0 two classes have one optimum: KL", gap, 1e-12
    yield "Eq. 8", "the projection is in r's class", max_gap(class_gap(projected, r)), 1e-12
    yield "Eq. 8", "and is Theorem 1's member", max_gap(projected, member), 1e-12
    yield "Eq. 9", "holds for the projection", max_gap(normaliser(ref, projected, beta), 1), 1e-12
    unique = max_gap(uniqueness_gap(ref, r, r2, beta))
    yield "Proposition 1", "r and r + f(x) have the same projection", unique, 1e-12
    off = max_gap(beta * normaliser(ref, projected + f, beta).log(), f[:, 0])
    yield "Proposition 1", "off it by f(x), Eq. 9's sum is exp(f(x)/β)", off, 1e-12

    theta = world.randn(*r.shape).requires_grad_()
    auto, = torch.autograd.grad(dpo.objective(theta.log_softmax(-1), ref, r, beta).sum(), theta)
    pi, soft = theta.detach().log_softmax(-1), beta * dpo.log_partition(ref, r, beta)[:, None]
    one = torch.ones_like(soft)
    baselines = {"no baseline": (0 * soft, one),
                 "one sample": (soft_advantage(pi, ref, r, beta, 0), pi.exp()),
                 "learned value": (soft + world.randn(len(r), 1) / 4, one),  # with some error
                 "soft value": (soft, one)}
    moments = {name: policy_gradient(world, beta, pi, *b) for name, b in baselines.items()}
    gap = max_gap(torch.stack([mean for mean, _ in moments.values()]), auto)
    yield "Eq. 10", "4 baselines, one mean policy gradient: that of Eq. 3", gap, 1e-12
    _, variance = policy_gradient(world, beta, dpo.optimal_policy(ref, r, beta), soft, one)
    yield "Eq. 10", "with the soft value its variance is 0 at π_r", max_gap(variance), 1e-12
    for name, (_, variance) in moments.items():
        yield "Eq. 10", f"variance at another π, {name}", float(variance.mean()), None


def ranking_rows(world: World) -> Iterator[Row]:
    """Appendix A.3."""
    pi, ref, r, beta = world.randn(24), world.randn(24), world.randn(12, 2), 0.5
    yw, yl, _ = dpo.preference_pairs(r)
    ranked, _, _ = dpo.plackett_luce_loss(pi, ref, r, beta)
    pairwise, _ = dpo.dpo_loss(pi, ref, yw, yl, beta)
    yield "Eq. 18", "is Eq. 7 at K = 2", max_gap(ranked, pairwise), 1e-12
    logps, _ = dpo.ranking_logps(world.randn(1, 4).expand(24, 4), ORDERS)
    yield "Eq. 18", "the 4! orders of 4 sum to 1", max_gap(logps.exp().sum(), 1), 1e-12
    start, _, _ = dpo.plackett_luce_loss(ref, ref, world.randn(6, 4), beta)
    yield "A.3", "starts at log 4!, where π_θ = π_ref", max_gap(start, math.log(24)), 1e-12


def draw_frontier(world: World, path: Path) -> None:
    """Reward against KL: π_r of Eq. 4 for many β, and the policies at the minimum of Eq. 7."""
    from matplotlib.figure import Figure  # without pyplot: it writes files and opens no window

    def plot(policies, style, label):
        logps = torch.stack(list(policies))  # (points, P, K)
        kl, rewards = dpo.kl_divergence(logps, world.ref), (logps.exp() * world.r).sum(-1)
        axes.plot(kl.mean(-1), rewards.mean(-1), style, label=label, fillstyle="none", ms=9)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    plot((dpo.optimal_policy(world.ref, world.r, float(beta))
          for beta in torch.logspace(-1.7, 2, 200)), "grey", "π_r of Eq. 4, every β")
    for beta, marker in zip(BETAS, "osD^"):
        plot((world.solve(beta, world.p, frequency) for frequency in world.frequencies.values()),
             marker, f"minimum of Eq. 7, β = {beta:g}")
    axes.set(xlabel="KL(π ‖ π_ref), nats per completion", ylabel="mean reward E_π r(x,y)",
             title=f"{len(world.r)} prompts, {world.r.size(1)} completions each, enumerated")
    axes.legend()
    axes.grid(alpha=0.25)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, dpi=120))


def main(argv: Sequence[str] | None = None) -> int:
    """Checks Section 5 and A.3 and draws the figure; the exit code is 1 if a claim fails."""
    parser = argparse.ArgumentParser(description="Check Section 5 and A.3 on small worlds.")
    parser.add_argument("--out", type=Path, default=Path("out/dpo_tabular_frontier.png"),
                        help="the figure (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in dpo.main
    failed = dpo.print_rows(itertools.chain(section5_rows(World()), ranking_rows(World())))
    draw_frontier(World(), args.out)
    print(f"the figure: {args.out}")
    return failed


if __name__ == "__main__":
    sys.exit(main_exit(main))
