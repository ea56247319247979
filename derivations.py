"""The derivation checks: finite worlds solved by enumeration, one row an equation.

`python dpo.py` runs `main`: what each equation, lemma or theorem claims, its residual, pass or
fail. Every function under test is dpo.py's own, called by its name there.

P prompts, K completions a prompt (all there are), N pairs (all there are); float64, nats.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import dpo
from support.runs import os_errors, write_whole

Row = tuple[str, str, float, float | None]  # equation, claim, residual, tolerance (None: no claim)
BETAS = 0.1, 0.5, 1.0, 5.0


class World:
    """P prompts with K completions each: all of them, and all their pairs (i, j), in float64."""

    def __init__(self, P: int = 3, K: int = 16, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.ref, self.r = self.draw(P, K).log_softmax(-1), self.draw(P, K)  # log π_ref, r*
        pairs = torch.combinations(torch.arange(K)) + K * torch.arange(P)[:, None, None]
        self.i, self.j = pairs.flatten(0, 1).T  # (N,) each, into the flattened P*K
        self.p = dpo.preference_probability(self.r.flatten()[self.i], self.r.flatten()[self.j])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def solve(self, beta: float, p: Tensor, mass: Tensor) -> Tensor:
        """log π (P, K) that minimises Eq. 7: pairs of frequency mass (N,), y_i preferred by p."""
        def loss(logits):
            logp = logits.log_softmax(-1).flatten()
            return mass @ dpo.soft_dpo_loss(logp, self.ref.flatten(), self.i, self.j, p, beta)[0]
        return minimise(loss, self.ref).log_softmax(-1)


def minimise(loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    x = torch.zeros_like(like, requires_grad=True)
    lbfgs = torch.optim.LBFGS([x], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16,
                              history_size=20, line_search_fn="strong_wolfe")

    def closure():
        x.grad = None
        value = loss(x)
        value.backward()
        return value

    lbfgs.step(closure)
    return x.detach()


def gap(a: Tensor, b: Tensor | float = 0.0) -> float:
    return float((a - b).detach().abs().max())


def section3_rows(world: World) -> Iterator[Row]:
    ref, r, p, i, j = world.ref, world.r, world.p, world.i, world.j
    e1, e2 = r.flatten()[i].exp(), r.flatten()[j].exp()
    yield "Eq. 1", "exp r₁ / (exp r₁ + exp r₂) is σ(r₁ - r₂)", gap(e1 / (e1 + e2), p), 1e-12
    fitted = minimise(lambda x: (p * dpo.reward_model_loss(x.flatten(), i, j)
                                 + (1 - p) * dpo.reward_model_loss(x.flatten(), j, i)).mean(), r)
    yield "Eq. 2", "its minimiser on Eq. 1's p* is r* + f(x)", gap(dpo.class_gap(fitted, r)), 1e-6
    pi, identity, above = (3 * world.draw(1000, *r.shape)).log_softmax(-1), [], []
    for beta in BETAS:
        best, value = dpo.optimal_policy(ref, r, beta), dpo.objective(pi, ref, r, beta)
        bound = beta * (dpo.log_partition(ref, r, beta) - dpo.kl_divergence(pi, best))
        identity.append(gap(value, bound))
        above.append(float((value - dpo.objective(best, ref, r, beta)).max()))
    yield "Eq. 3", "is β log Z(x) - β KL(π‖π_r), 1000 random π (A.1)", max(identity), 1e-12
    yield "Eq. 3", "hence no π is above π_r: largest difference", max(above), 0.0


def section4_rows(world: World) -> Iterator[Row]:
    ref, r, p, i, j, beta = world.ref, world.r, world.p, world.i, world.j, 0.5
    best, log_z = dpo.optimal_policy(ref, r, beta), dpo.log_partition(ref, r, beta)[:, None]
    pi, flat = world.draw(*r.shape).log_softmax(-1).flatten(), ref.flatten()
    yield "Eq. 4", "π_r sums to 1", gap(best.exp().sum(-1), 1), 1e-12
    yield "Eq. 5", "inverts Eq. 4", gap(dpo.implicit_reward(best, ref, beta, log_z), r), 1e-12
    same = dpo.policy_preference(best.flatten(), flat, i, j, beta)
    yield "Eq. 6", "is Eq. 1 at π_r, for every pair", gap(same, p), 1e-12
    scaled = dpo.policy_preference((best + log_z).flatten(), flat, i, j, beta)
    yield "Eq. 6", "Z(x) cancels: π_r Z(x) gives the same", gap(scaled, p), 1e-12
    losses, _ = dpo.dpo_loss(pi, flat, i, j, beta)
    secretly = dpo.reward_model_loss(dpo.implicit_reward(pi, flat, beta), i, j)
    yield "Eq. 7", "is Eq. 2 with Eq. 5 for r_φ", gap(losses, secretly), 1e-12
    start, _ = dpo.dpo_loss(flat, flat, i, j, beta)
    yield "Eq. 7", "starts at log 2, where π_θ = π_ref", gap(start, math.log(2)), 1e-12
    theta = pi.clone().requires_grad_()
    logps = theta.view_as(r).log_softmax(-1).flatten()
    _, (by_hand,) = dpo.inspect_pairs(logps, flat, i, j, beta, [theta])
    auto, = torch.autograd.grad(dpo.dpo_loss(logps, flat, i, j, beta)[0].mean(), theta)
    yield "Section 4", "the gradient by hand is autograd's of Eq. 7", gap(by_hand, auto), 1e-12
    m = world.draw(1000).requires_grad_()
    wrong = [torch.autograd.grad(w.f(m, beta).sum(), m)[0] + w(m, beta)
             for w in dpo.WEIGHTS.values()]
    yield "Section 4", "w = -f'(m) for each of WEIGHTS", gap(torch.stack(wrong)), 1e-12


def optimum_rows(world: World, found: list[tuple[float, Tensor]]) -> Iterator[Row]:
    """Where Eq. 7 leads. Appends (β, log π) of each policy found on population preferences."""
    ref, r, p = world.ref, world.r, world.p
    by_ref = (ref.flatten()[world.i] + ref.flatten()[world.j]).softmax(0)
    for name, mass in ("uniform", torch.full_like(p, 1 / len(p))), ("from π_ref", by_ref):
        solved = [(beta, world.solve(beta, p, mass)) for beta in BETAS]
        kls = [dpo.kl_divergence(dpo.optimal_policy(ref, r, beta), logp) for beta, logp in solved]
        found += solved
        yield "Eq. 7", f"its minimum on p* is π_r: KL, 4 β, pairs {name}", max(map(gap, kls)), 1e-10
    small, errors = World(1, 8), []
    N, target = len(small.p), dpo.optimal_policy(small.ref, small.r, 1.0)
    sizes = torch.tensor([1e3, 1e4, 1e5, 1e6], dtype=torch.float64)
    for n in sizes:  # pairs with labels drawn from Eq. 1, ten times over
        count = torch.full((10, N), float(n // N), dtype=torch.float64)
        labels = torch.binomial(count, small.p.expand(10, N), small.generator) / count
        solved = torch.cat([small.solve(1.0, p, torch.full_like(p, 1 / N)) for p in labels])
        errors.append(dpo.kl_divergence(target, solved).mean())
    x, y = sizes.log() - sizes.log().mean(), torch.stack(errors).log()
    slope = float(x @ y / (x @ x))
    yield "Eq. 7", f"on n sampled pairs KL falls as 1/n: slope {slope:.2f}", abs(slope + 1), 0.15
    yw, yl, _ = dpo.preference_pairs(r)
    further = [(ref + t * r).log_softmax(-1).flatten() for t in (1, 10, 100, 1e3, 1e4, 1e5)]
    hard = [gap(dpo.dpo_loss(logp, ref.flatten(), yw, yl, 1.0)[0])
            for logp in further]  # every t > 0 orders every pair rightly
    falls = all(a > b for a, b in zip(hard, hard[1:]))
    yield "Eq. 7", "labels without noise: falls to 0 as π runs off, no optimum", \
        hard[-1] if falls else math.nan, 1e-9


def section5_rows(world: World) -> Iterator[Row]:
    ref, r, beta = world.ref, world.r, 0.5
    f = 5 * world.draw(len(r), 1)
    member, projected = dpo.class_member(ref, r, beta), dpo.project_reward(ref, r, beta)
    yield "Definition 1", "r + f(x) is in r's class", gap(dpo.class_gap(r, r + f)), 1e-12
    yield "Lemma 1", "r + f(x) has r's preferences", gap(dpo.preference_gap(r, r + f)), 1e-12
    optima = gap(dpo.optimum_gap(ref, r, r + f, beta))
    yield "Lemma 2", "r + f(x) has r's optimum: KL", optima, 1e-12
    yield "Theorem 1", "β log π_r/π_ref is in r's class", gap(dpo.class_gap(member, r)), 1e-12
    yield "Eq. 8", "the projection is in r's class", gap(dpo.class_gap(projected, r)), 1e-12
    yield "Eq. 8", "and is Theorem 1's member", gap(projected, member), 1e-12
    yield "Eq. 9", "holds for the projection", gap(dpo.normaliser(ref, projected, beta), 1), 1e-12
    unique = dpo.uniqueness_gap(ref, r, r + f, beta)
    yield "Proposition 1", "r and r + f(x) have the same projection", gap(unique), 1e-12
    off = beta * dpo.normaliser(ref, projected + f, beta).log()
    yield "Proposition 1", "off it by f(x), Eq. 9's sum is exp(f(x)/β)", gap(off, f[:, 0]), 1e-12

    theta = world.draw(*r.shape).requires_grad_()
    auto, = torch.autograd.grad(dpo.objective(theta.log_softmax(-1), ref, r, beta).sum(), theta)
    pi, soft = theta.detach().log_softmax(-1), beta * dpo.log_partition(ref, r, beta)[:, None]
    one = torch.ones_like(soft)
    values = {"no baseline": (0 * soft, one),
              "one sample": (dpo.soft_advantage(pi, ref, r, beta, 0), pi.exp()),
              "learned value": (soft + world.draw(len(r), 1) / 4, one),  # off by some noise
              "soft value": (soft, one)}
    moments = {name: policy_gradient(world, beta, pi, *v) for name, v in values.items()}
    worst = max(gap(mean, auto) for mean, _ in moments.values())
    yield "Eq. 10", "4 baselines, one mean policy gradient: that of Eq. 3", worst, 1e-12
    _, variance = policy_gradient(world, beta, dpo.optimal_policy(ref, r, beta), soft, one)
    yield "Eq. 10", "with the soft value its variance is 0 at π_r", gap(variance), 1e-12
    for name, (_, variance) in moments.items():
        yield "Eq. 10", f"variance at another π, {name}", float(variance.mean()), None


def policy_gradient(world: World, beta: float, logp: Tensor, value: Tensor,
                    chance: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 10's gradient in the logits from one y ~ π: its mean (P, K) and total variance (P,).

    The baseline is value (P, S) with probability chance (P, S). Every case is enumerated.
    """
    ref, r, pi = world.ref[:, None], world.r[:, None], logp.exp()[:, None]  # (P, 1, K)
    signal = dpo.soft_advantage(logp[:, None], ref, r, beta, value[..., None])  # (P, S, K)
    score = torch.eye(pi.size(-1)) - pi  # (P, y, K): ∇log π(y)
    joint = chance[..., None] * pi  # (P, S, K)
    mean = torch.einsum("psy,pyk->pk", joint * signal, score)
    square = torch.einsum("psy,pyk->p", joint * signal**2, score**2)
    return mean, square - (mean**2).sum(-1)


def appendix_rows(world: World) -> Iterator[Row]:
    pi, ref, r, beta = world.draw(24), world.draw(24), world.draw(12, 2), 0.5
    yw, yl, _ = dpo.preference_pairs(r)
    ranked, _, _ = dpo.plackett_luce_loss(pi, ref, r, beta)
    yield "Eq. 18", "is Eq. 7 at K = 2", gap(ranked, dpo.dpo_loss(pi, ref, yw, yl, beta)[0]), 1e-12
    orders = torch.tensor(list(itertools.permutations(range(4))))  # (4!, 4)
    total = dpo.ranking_logps(world.draw(1, 4).expand(24, 4), orders)[0].exp().sum()
    yield "Eq. 18", "the 4! orders of 4 sum to 1", gap(total, 1), 1e-12
    start, _, _ = dpo.plackett_luce_loss(ref, ref, world.draw(6, 4), beta)
    yield "A.3", "starts at log 4!, where π_θ = π_ref", gap(start, math.log(24)), 1e-12
    pi.requires_grad_()
    naive, _ = dpo.weighted_loss(pi, ref, yw, yl, beta, dpo.WEIGHTS["constant"])
    slopes = [torch.autograd.grad(loss.sum(), pi)[0]
              for loss in (naive / beta, dpo.unlikelihood_loss(pi, yw, yl, 1.0))]
    yield "C.3", "at α = 1 its gradient is the constant weight's over β", gap(*slopes), 1e-12
    none = dpo.unlikelihood_loss(pi, yw, yl, 0.0)
    yield "Preferred-FT", "is C.3 at α = 0", gap(none, dpo.preferred_ft_loss(pi, yw)), 1e-12


def draw_frontier(world: World, found: list[tuple[float, Tensor]], path: Path) -> None:
    """Reward against KL of Eq. 4's π_r as β runs, and of the policies that Eq. 7 led to."""
    from matplotlib.figure import Figure  # without pyplot: files, never windows

    def point(logp):
        reward = (logp.exp() * world.r).sum(-1).mean()
        return float(dpo.kl_divergence(logp, world.ref).mean()), float(reward)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curve = [point(dpo.optimal_policy(world.ref, world.r, float(b)))
             for b in torch.logspace(-1.7, 2, 200)]
    axes.plot(*zip(*curve), color="grey", label="π_r of Eq. 4, every β")
    for beta, marker in zip(BETAS, "osD^"):
        axes.plot(*zip(*[point(logp) for b, logp in found if b == beta]), marker, fillstyle="none",
                  ms=9, ls="", label=f"minimum of Eq. 7, β = {beta:g}")
    axes.set(xlabel="KL(π ‖ π_ref), nats a completion", ylabel="mean reward E_π r(x,y), units of r",
             title=f"{len(world.r)} prompts, {world.r.size(1)} completions each, enumerated")
    axes.legend()
    axes.grid(alpha=0.25)
    with os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, dpi=120))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one row an equation; 1 if any fails."""
    parser = argparse.ArgumentParser(description="Check each of the paper's equations.")
    parser.add_argument("--out", type=Path, default=Path("out/dpo_tabular_frontier.png"),
                        help="the figure (default: %(default)s)")
    args = parser.parse_args(argv)
    started, world, found, failed = time.perf_counter(), World(), [], 0
    print(f"{'':<14}{'claim':<62}{'residual':>9}{'tolerance':>11}")
    for name, claim, residual, tolerance in itertools.chain(
            section3_rows(world), section4_rows(world), optimum_rows(world, found),
            section5_rows(world), appendix_rows(world)):
        if tolerance is None:
            print(f"{name:<14}{claim:<62}{residual:>9.3f}{'':>11}  no order claimed")
            continue
        verdict = "pass" if residual <= tolerance else "FAIL"  # NaN fails
        failed += verdict == "FAIL"
        print(f"{name:<14}{claim:<62}{residual:>9.1e}{tolerance:>11.2g}  {verdict}")
    draw_frontier(world, found, args.out)
    print(f"{failed} failed; {time.perf_counter() - started:.1f} s; the figure: {args.out}")
    return int(failed > 0)
