"""Section 5.2 on text: the variance of the GPT's own policy gradient under several baselines b(x).

A completion y ~ π(y|x) gives one sample of the gradient of Eq. 3:

    g = (r(x,y) - b(x) - β log π(y|x)/π_ref(y|x)) ∇log π(y|x)

The mean of g is the same for every b(x), but its total variance E|g|² - |E g|² is not. Eq. 10 uses
the soft value β log E_π_ref exp(r/β) as b(x). experiments/theory.py enumerates a small world. Here
π is a GPT: first π_ref, where training begins, then the finished dpo policy, which is near an
optimum.

P prompts, K completions of π per prompt, R of π_ref, S values of a baseline.
"""

import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import dpo
from evaluate import standard_error
from experiments.baselines import needs_true_reward
from experiments.theory import soft_advantage
from gpt import GPT, pad_rows
from job import Job, seed_of
from plot_frontier import STYLES
from support.curves import save_figure
from support.runs import Run, UserError, read_json
from train import STAGES, Stage, score, sequence_logps

PROMPTS, SAMPLES, REFERENCE_SAMPLES = 64, 16, 64  # P, K, R: about half a minute on the toy


# ------------------------------------------------------------------------------ the estimators

def fitted_beta(rewards: Tensor, log_ratios: Tensor) -> float:
    """β = Cov(r, h) / Var(h) within a prompt, h = log π(y|x)/π_ref(y|x): two (P, K) -> β.

    At an optimum of Eq. 3, h = r/β - log Z(x), and the result is the β of that optimum. For another
    policy it is the β with which r - β h varies least. It is not the --beta of DPO, because hard
    labels do not show the scale of r*.
    """
    r, h = (x - x.mean(-1, keepdim=True) for x in (rewards, log_ratios))
    return float((r * h).sum() / (h * h).sum())


def baselines(signal: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """name -> b: (P, S, 1) if b has S equally likely values, (P, 1, K) if b is one per completion.

    signal (P, K): r - β log π/π_ref. reference (P, R): the rewards of π_ref's completions.
    """
    R, K = reference.size(1), signal.size(1)
    soft = beta * dpo.log_partition(torch.full_like(reference, -math.log(R)), reference, beta)
    leave_one_out = (signal.sum(1, keepdim=True) - signal) / (K - 1)
    return {"no baseline": torch.zeros_like(soft)[:, None, None],
            "one π_ref sample": reference[:, :, None],  # like Section 5.2's human completion
            "mean under π_ref": reference.mean(1)[:, None, None],
            "soft value": soft[:, None, None],
            "leave-one-out mean": leave_one_out[:, None]}


def total_variance(signal: Tensor, baseline: Tensor, products: Tensor) -> Tensor:
    """An unbiased estimate of E|g|² - |E g|² over y ~ π and over the values of b: (P,).

    signal (P, K); baseline as `baselines` returns it; products (P, K, K): the inner products of
    ∇log π of the K samples. |E g|² is estimated by the mean of g·g' over two different samples.
    With the leave-one-out mean this estimate of |E g|² is too high by a factor of 1 + 1/(K-1)². On
    the toy that hardly matters: |E g|² is less than a hundredth of E|g|².
    """
    advantage, K = signal[:, None] - baseline, signal.size(1)  # (P, S, K)
    norms = products.diagonal(dim1=1, dim2=2)  # (P, K): |∇log π|²
    square = (advantage**2 * norms[:, None]).mean((1, 2))
    mean = advantage.mean(1)  # mean over b, which does not depend on y
    pairs = torch.einsum("pi,pij,pj->p", mean, products - torch.diag_embed(norms), mean)
    return square - pairs / (K * (K - 1))


def score_gradients(job: Job, model: GPT, prompt, completions) -> list[tuple[Tensor, ...]]:
    """∇log π(y|x) of each completion of a prompt, as one tensor per parameter of the model."""
    grads = []
    for completion in completions:
        padded = (x.to(job.device) for x in pad_rows([prompt], [completion]))
        with job.autocast():
            logp, = sequence_logps(model, *padded)
        grads.append(torch.autograd.grad(logp, list(model.parameters())))
    return grads


def inner_products(grads: list[tuple[Tensor, ...]]) -> Tensor:
    """The inner products of K gradients: (K, K) float64 on the CPU."""
    stacked = (torch.stack(parts).flatten(1) for parts in zip(*grads))  # (K, numbers) each
    return sum(x @ x.T for x in stacked).double().cpu()


# ------------------------------------------------------------------------------ the stage

def variance(job: Job, run: Run) -> None:
    """The variance under each baseline divided by that without one, at π_ref and at the dpo policy.

    variance.json holds β and, per policy, r*, KL and these ratios with standard errors over
    prompts. variance.png draws the ratios.
    """
    prompts, reference = job.reference_eval["prompts"][:PROMPTS], job.load_reference()
    policies, samples, measured = {"π_ref": reference, "DPO": job.policy("dpo")}, {}, {}

    def sample(model: GPT, n: int, name: str):
        """n completions per prompt: prompts and completions (P n), r* (P, n)."""
        repeated = [p for p in prompts for _ in range(n)]
        completions = job.sample(model, repeated, seed_of(job.cfg, name))
        return repeated, completions, job.reward(repeated, completions).view(-1, n).double()

    *_, reference_rewards = sample(reference, REFERENCE_SAMPLES, "variance, baseline")
    for name, policy in policies.items():
        repeated, completions, r = sample(policy, SAMPLES, "variance")
        logps, ref_logps = (score(job, model, repeated, completions).view_as(r).double()
                            for model in (policy, reference))
        samples[name] = completions, logps, ref_logps, r
    _, logps, ref_logps, r = samples["DPO"]
    beta = fitted_beta(r, logps - ref_logps)
    if not beta > 0:
        raise UserError("r* does not rise with log π/π_ref in the dpo policy's own samples, so "
                        "this policy is not near an optimum of Eq. 3: give more --dpo-steps or a "
                        "higher --dpo-lr")
    for name, (completions, logps, ref_logps, r) in samples.items():
        products = torch.stack([
            inner_products(score_gradients(job, policies[name], prompt, completions[i:][:SAMPLES]))
            for prompt, i in zip(prompts, range(0, len(completions), SAMPLES))])
        signal = soft_advantage(logps, ref_logps, r, beta, 0.0)
        variances = {b: total_variance(signal, value, products)  # (P,) each
                     for b, value in baselines(signal, reference_rewards, beta).items()}
        none, ratios = variances["no baseline"], {}
        for b, with_b in variances.items():
            ratio = float(with_b.mean() / none.mean())
            ratios[b] = ratio, standard_error(with_b - ratio * none) / float(none.mean())
        measured[name] = dict(kl=float((logps - ref_logps).mean()), reward=float(r.mean()),
                              ratios=ratios)
    table = dict(beta=beta, prompts=len(prompts), samples=SAMPLES, policies=measured)
    draw(table, run.path("variance.png"))
    run.finish(json.dumps(table).encode())


def draw(table: dict, path: Path) -> None:
    """Draw two bars per baseline, at π_ref and at the dpo policy, with standard errors."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle("Section 5.2: how much variance of the policy gradient does a baseline leave?")
    ax = figure.subplots()
    for shift, name, colour, where in (
            (-0.2, "π_ref", "#b0b0b0", "at π_ref, where training begins"),
            (0.2, "DPO", STYLES["dpo"][1], "at the DPO policy")):
        policy = table["policies"][name]
        ratios, errors = zip(*policy["ratios"].values())
        bars = ax.bar([i + shift for i in range(len(ratios))], ratios, 0.4, yerr=errors, capsize=3,
                      color=colour, ecolor="#707070", label=f"{where} (r* {policy['reward']:.2f}, "
                      f"KL {policy['kl']:.1f} nats)")
        ax.bar_label(bars, [f"{x:.2g}" for x in ratios], padding=2, fontsize=9)
    ax.set(xticks=range(len(ratios)), xticklabels=policy["ratios"], xlabel="baseline b(x)",
           ylabel="variance of the policy gradient,\nrelative to no baseline")
    ax.set_title(f"g = (r* - b(x) - β log π/π_ref) ∇log π,  β = {table['beta']:.2g};  "
                 f"{table['prompts']} prompts, {table['samples']} samples each, ± 1 standard error",
                 fontsize=10)
    ax.margins(y=0.1)
    ax.set_axisbelow(True)
    ax.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)


def report_variance(job: Job) -> None:
    folder = job.folder("variance")
    table = read_json(folder / "variance.json")
    policies = table["policies"]
    print("\nvariance of the policy gradient, relative to no baseline, ± one standard error: "
          f"{table['prompts']} prompts with\n{table['samples']} samples each; β is "
          f"{table['beta']:.3f}, the slope of r* on log π/π_ref in the DPO policy's samples\n")
    print(f"{'baseline b(x)':<20}{'at π_ref':>16}{'at the DPO policy':>20}")
    for b in policies["DPO"]["ratios"]:
        cells = ("{:.3f} ±{:.3f}".format(*policies[name]["ratios"][b]) for name in ("π_ref", "DPO"))
        print("{:<20}{:>16}{:>20}".format(b, *cells))
    print(f"picture: {folder / 'variance.png'}")


STAGES["variance"] = Stage(variance, lambda cfg: needs_true_reward(cfg, "variance", "dpo"),
                           "variance.json", report_variance)
