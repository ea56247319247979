"""One point of the frontier: the true reward of a policy's samples, and their KL to π_ref.

Also the optimum of Eq. 3, which no policy can pass, and what a finished run prints.

B sequences, T tokens, V vocabulary, M scored tokens, P prompts, K completions per prompt.
"""

import math

import numpy as np
import torch

from dpo import completion_mask, kl_divergence, optimal_policy, preference_pairs
from gpt import BLOCK_BYTES, GPT, length_buckets, pad_rows
from plot_frontier import training_curves
from support.runs import read_json, read_text, write_whole


@torch.no_grad()
def sequence_kl(policy: GPT, reference: GPT, idx, prompt_lens, lengths,
                temperature: float = 1.0) -> torch.Tensor:
    """KL(π ‖ π_ref) in nats per completion, two ways, on completions that π sampled.

    idx (B, T), prompt_lens (B,), lengths (B,) -> (3, B) float64 on the CPU:
    kl: the exact KL of each step's distribution over the vocabulary, summed along the completion,
        the decision to end included;
    kl_mc: log π(y|x) - log π_ref(y|x), the one-sample estimate, of the same mean. Near π_ref its
        variance is far larger, and on one sample it is often negative;
    ref_nll: -log π_ref(y|x).
    π is the policy at the `temperature` that it was sampled at (0: all on the token taken);
    π_ref is the reference at 1. With another temperature than the samples' neither is an estimate.
    """
    mask = completion_mask(prompt_lens, lengths, idx.size(1))[:, 1:]
    where = mask.flatten().nonzero()[:, 0]  # (M,); a CPU waits here for its GPU
    sequence = where // mask.size(1)  # (M,) the sequence of each scored token
    hidden = [m.hidden(idx[:, :-1]).flatten(0, 1).index_select(0, where)  # (M, C) each
              for m in (policy, reference)]
    targets = idx[:, 1:].flatten().index_select(0, where)
    out = torch.zeros(3, len(idx), dtype=torch.float64, device=idx.device)
    step = max(1, BLOCK_BYTES[idx.device.type] // (4 * policy.config.vocab_size))
    for i in range(0, len(where), step):
        part = slice(i, i + step)
        at = targets[part, None]
        logits, ref_logits = (m.head(h[part]).float() for m, h in zip((policy, reference), hidden))
        logp = (logits / temperature).log_softmax(-1) if temperature else \
            torch.full_like(logits, -math.inf).scatter(-1, at, 0.0)
        logq = ref_logits.log_softmax(-1)
        ref_logp = logq.gather(-1, at)[:, 0]
        kls = kl_divergence(logp, logq), logp.gather(-1, at)[:, 0] - ref_logp, -ref_logp
        for total, value in zip(out, kls):
            total.index_add_(0, sequence[part], value.double())
    return out.cpu()


def repetition(completions) -> float:
    """Mean share of a completion's trigrams that it has had before: near 1 for a repeated word."""
    def share(ids):
        grams = list(zip(ids, ids[1:], ids[2:]))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return sum(map(share, completions)) / len(completions)


def distinct2(completions) -> float:
    """Distinct bigrams over all bigrams. It falls with the number of samples: compare equals."""
    grams = [g for ids in completions for g in zip(ids, ids[1:])]
    return len(set(grams)) / max(1, len(grams))


def standard_error(x) -> float:
    return float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan


def rounded(x) -> list[float]:
    return [round(value, 4) for value in x.tolist()]


def evaluate(policy: GPT, reference: GPT, prompts, reward, sample, eos: int,
             temperature: float = 1.0, batch_size: int = 128) -> dict:
    """One point: completions of `prompts` by sample(policy, prompts, temperature), judged.

    reward(prompts, completions) -> (P,), or None where there is no r*. Only the toy's has a method
    `grammatical`: the share of sentences in its language.
    Reward in [0, 1]; KL in nats per completion; length in tokens, EOS included; eos: the share of
    completions that ended themselves; ref_ppl: exp of the mean NLL per token under π_ref.
    """
    completions = sample(policy, prompts, temperature)
    device = policy.wte.weight.device
    kls = torch.empty(3, len(prompts), dtype=torch.float64)
    totals = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions)])
    for part in length_buckets(totals, batch_size):
        padded = pad_rows([prompts[i] for i in part], [completions[i] for i in part])
        kls[:, part] = sequence_kl(policy, reference, *(x.to(device) for x in padded),
                                   temperature=temperature)
    lengths = torch.tensor([float(len(c)) for c in completions])
    point = dict(
        kl=float(kls[0].mean()), kl_se=standard_error(kls[0]),
        kl_mc=float(kls[1].mean()), kl_mc_se=standard_error(kls[1]),
        length=float(lengths.mean()), length_se=standard_error(lengths),
        eos=sum(c[-1] == eos for c in completions) / len(completions),
        distinct2=distinct2(completions), repetition=repetition(completions),
        ref_ppl=math.exp(min(700.0, float(kls[2].sum() / lengths.sum()))),
        reward=None, reward_se=None, grammatical=None, temperature=temperature,
        samples=len(prompts), completions=completions, kls=rounded(kls[0]))
    if reward:
        rewards = reward(prompts, completions)
        point |= dict(reward=float(rewards.mean()), reward_se=standard_error(rewards),
                      rewards=rounded(rewards))
    if hasattr(reward, "grammatical"):
        point["grammatical"] = reward.grammatical(prompts, completions)
    return point


def optimal_frontier(rewards, betas, tilt=None) -> list[dict]:
    """Eq. 4's π_r for each beta, from samples of π_ref alone: rewards (P, K), K per prompt.

    tilt (P, K): another reward, for which π_r is taken; the rewards then only judge it.

    Self-normalised reweighting: w, exp(r / β) over its prompt's sum, stands for π_r, with 1 / K for
    π_ref. Then reward = Σ w r and KL = Σ w log(K w), means over prompts, one β for all. No policy
    lies above what it estimates, so it also tests the KL estimator. `ess` is the effective number
    of samples per prompt: K at β = ∞, 1 when one sample has all the weight. Where it is small the
    estimate is poor: the KL cannot pass log K.
    """
    P, K = rewards.shape
    rewards = rewards.double()
    uniform = torch.full_like(rewards, -math.log(K))
    curve = []
    for beta in betas:
        logw = optimal_policy(uniform, rewards if tilt is None else tilt.double(), beta)  # (P, K)
        w = logw.exp()
        r, kl = (w * rewards).sum(-1), kl_divergence(logw, uniform)
        curve.append(dict(beta=beta, reward=float(r.mean()), reward_se=standard_error(r),
                          kl=float(kl.mean()), kl_se=standard_error(kl),
                          ess=float((1 / w.square().sum(-1)).mean()),
                          rewards=rounded(r), kls=rounded(kl)))
    return curve


BETAS = [1e9, *np.geomspace(20, 0.01, 40)]  # the first makes π_ref itself


def jackknife_optimum(rewards, betas=BETAS, tilt=None) -> list[dict]:
    """optimal_frontier of (P, K) without its bias of order 1/K, by the jackknife: prompt by prompt,
    twice the whole's estimate less the mean of its two halves'. Without it Best-of-N near N = K
    lies above the curve."""
    whole, *halves = (optimal_frontier(rewards[:, part], betas, None if tilt is None else
                                       tilt[:, part])
                      for part in (slice(None), slice(0, None, 2), slice(1, None, 2)))
    for point, one, other in zip(whole, *halves):
        for mean, each in (("reward", "rewards"), ("kl", "kls")):
            x, a, b = torch.tensor([p[each] for p in (point, one, other)], dtype=torch.float64)
            values = 2 * x - (a + b) / 2  # (P,)
            point |= {mean: float(values.mean()), mean + "_se": standard_error(values),
                      each: rounded(values)}
    return whole


def optimal_reward(curve: list[dict], kl: float) -> float | None:
    """The curve's reward at `kl`, between its points with ess >= 2; None outside them. On the toy
    two draws of 32 samples per prompt lay 0.003 above and below 64 samples at KL 2.8."""
    points = sorted((p["kl"], p["reward"]) for p in curve if p["ess"] >= 2)
    for (a, ra), (b, rb) in zip(points, points[1:]):
        if a <= kl <= b:
            return ra + (rb - ra) * (kl - a) / (b - a) if b > a else ra
    return None


def pairwise_accuracy(a, b):
    """1 where a > b, 1/2 where they are equal, of any equal shapes."""
    return (a > b) + 0.5 * (a == b)


def held_out_measures(logps, ref_logps, rewards) -> dict:
    """Over all pairs of some groups: the share that the implicit reward orders as r* does, and the
    mean log π of their members. Log-probs (G*K,), rewards (G, K)."""
    yw, yl, _ = preference_pairs(rewards)
    h = logps - ref_logps
    return dict(accuracy=float(pairwise_accuracy(h[yw], h[yl]).mean()),
                logp_chosen=float(logps[yw].mean()), logp_rejected=float(logps[yl].mean()))


def rank_correlation(implicit, rewards) -> float:
    """Spearman's, within a prompt, averaged over prompts: two (P, K) -> [-1, 1]. Tied ranks are
    averaged. r̂ is free up to f(x), so its order across prompts means nothing."""
    def ranks(x):
        return pairwise_accuracy(x[:, :, None], x[:, None, :]).sum(-1)

    a, b = (ranks(x) - ranks(x).mean(-1, keepdim=True) for x in (implicit, rewards))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)).mean())


def correlation(implicit, rewards) -> float:
    """Pearson's, within a prompt, all prompts together: two (P, K) -> [-1, 1].

    To second order around π_ref it is a policy's share of the optimal gain at its KL: with
    h = log π/π_ref the gain is Cov(h, r) and the KL Var(h)/2, so the part of h that is not linear
    in r costs KL for nothing. Further away the two differ.
    """
    a, b = (x - x.mean(-1, keepdim=True) for x in (implicit, rewards))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))


# ------------------------------------------------------------------------------ what a run prints

def write_samples(job, run, point: dict, n: int = 24) -> None:
    """samples.txt: completions of the same prompts by π_ref and by π_θ, from the same uniforms."""
    enc, eot, lines = job.data.enc, job.data.eot, []
    for i, prompt in enumerate(job.reference_eval["prompts"][:n]):
        lines.append(f"prompt:  {enc.decode(prompt[1:])}")
        for name, of in (("before", job.reference_eval["point"]), ("after", point)):
            ids = of["completions"][i]
            worth = f"{of['rewards'][i]:.2f}" if "rewards" in of else "-"
            text = enc.decode([t for t in ids if t != eot]).replace("\n", " ")
            lines.append(f"{name + ':':<8} r* {worth} |{text}{'' if ids[-1] == eot else ' …'}")
        lines.append("")
    write_whole(run.path("samples.txt"), lambda file: file.write("\n".join(lines).encode()))


COLUMNS = {"reward r*": "reward", "KL, nats": "kl", "length": "length", "ended": "eos",
           "repeated": "repetition", "grammatical": "grammatical", "held-out acc.": "accuracy"}


def report(job, stage: str) -> None:
    """Print the table, four samples and the files of a finished run; draw its curves."""
    folder, reference_eval, cfg = job.folder(stage), job.reference_eval, job.cfg
    after = read_json(folder / "result.json")
    setting = {"unlikelihood": f"α {cfg.alpha:g}", "preferred-ft": "preferred"}.get(
        stage, f"β {cfg.beta:g}")
    if stage in ("ppo", "ppo-gt"):
        setting = f"KL → {cfg.ppo_target:g}" if cfg.ppo_target else f"β {cfg.ppo_beta:g}"
    best = optimal_reward(reference_eval["optimum"], after["kl"])
    print("\n" + " " * 20 + "".join(f"{title:>17}" for title in COLUMNS))
    for name, point in (("π_ref", reference_eval["point"]), (f"π_θ, {setting}", after),
                        ("optimum at that KL", dict(reward=best, kl=after["kl"]))):
        cells = []
        for key in COLUMNS.values():
            value, se = point.get(key), point.get(key + "_se")
            cells.append("-" if value is None else f"{value:.3f}" + (f" ±{se:.3f}" if se else ""))
        print(f"{name:<20}" + "".join(f"{cell:>17}" for cell in cells))
    print(f"on {after['samples']} held-out prompts, ± one standard error; KL is KL(π ‖ π_ref) per "
          f"completion, one-sample estimate {after['kl_mc']:.3f} ±{after['kl_mc_se']:.3f}\n")
    print("\n".join(read_text(folder / "samples.txt").splitlines()[:16]))
    print(f"\nmore samples: {folder / 'samples.txt'}")
    if stage not in ("ppo", "ppo-gt"):
        if not (folder / "curves.png").exists():  # here, since the runs of a sweep need none
            training_curves(folder, job.folder("groups") / "reference.json")
        print(f"curves:       {folder / 'curves.png'}")
