"""One point of the frontier: a policy's mean true reward r* and its KL to π_ref.

Also the optimum of Eq. 3, which no policy can exceed, and what a finished run prints.

B sequences, T tokens, V vocabulary, M scored tokens, P prompts, K completions per prompt.
"""

import math
import shlex
import textwrap

import numpy as np
import torch

from dpo import completion_mask, kl_divergence, optimal_policy, preference_pairs
from gpt import BLOCK_BYTES, GPT, length_buckets, pad_rows
from support.curves import training_curves
from support.runs import read_json, read_text, write_whole
from support.settings import STAGE


@torch.no_grad()
def sequence_kl(policy: GPT, reference: GPT, idx, prompt_lens, lengths,
                temperature: float = 1.0) -> torch.Tensor:
    """KL(π ‖ π_ref) in nats per completion, estimated in two ways from completions of π.

    idx (B, T), prompt_lens (B,), lengths (B,) -> (3, B) float64 on the CPU:
    kl: at each step the exact KL over the vocabulary, summed over the steps of the completion. The
        step that draws EOS counts too;
    kl_mc: log π(y|x) - log π_ref(y|x), the one-sample estimate. It has the same mean. Near π_ref
        its variance is far larger, and one sample often gives a negative number;
    ref_nll: -log π_ref(y|x).
    `temperature` must be that of the samples, otherwise kl and kl_mc estimate nothing. π is the
    policy at this temperature; at 0, all probability is on the sampled token. π_ref has
    temperature 1.
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
    """The share of a completion's trigrams that occur earlier in it, averaged over completions.

    It is near 1 for one word repeated many times.
    """
    def share(ids):
        grams = list(zip(ids, ids[1:], ids[2:]))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return sum(map(share, completions)) / len(completions)


def distinct2(completions) -> float:
    """The number of distinct bigrams over that of all bigrams.

    It falls as samples are added, so compare only equal numbers of samples.
    """
    grams = [g for ids in completions for g in zip(ids, ids[1:])]
    return len(set(grams)) / max(1, len(grams))


def standard_error(x) -> float:
    return float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan


def rounded(x) -> list[float]:
    return [round(value, 4) for value in x.tolist()]


def evaluate(policy: GPT, reference: GPT, prompts, reward, sample, eos: int,
             temperature: float = 1.0, batch_size: int = 128) -> dict:
    """One point of the frontier: sample one completion per prompt and measure all of them.

    sample(policy, prompts, temperature) -> completions. reward(prompts, completions) -> (P,) in
    [0, 1]; None where there is no r*. Only the toy corpus's reward has a method `grammatical`: the
    share of sentences that its grammar can produce.
    KL is in nats per completion, length in tokens with EOS; eos: the share of completions that end
    with EOS; ref_ppl: exp of the mean NLL per token under π_ref.
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
    """Reward and KL of Eq. 4's π_r for each β, estimated from π_ref's samples: rewards (P, K).

    tilt (P, K): a second reward. π_r is then the optimum for `tilt`, and `rewards` only measure it.

    Self-normalised importance weights: under π_ref each of a prompt's K samples has weight 1/K,
    under π_r it has w = exp(r/β) / Σ exp(r/β). Then reward = Σ w r and KL = Σ w log(K w), averaged
    over prompts with one β for all. No policy lies above the true curve, so a point far above the
    estimate shows an error in a KL. `ess` is the effective number of samples per prompt, 1/Σ w²: K
    at β = ∞, and 1 when one sample has all the weight. Where it is small the estimate is poor,
    because the estimated KL cannot exceed log K.
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


BETAS = [1e9, *np.geomspace(20, 0.01, 40)]  # at the first, π_r is π_ref


def jackknife_optimum(rewards, betas=BETAS, tilt=None) -> list[dict]:
    """optimal_frontier of rewards (P, K), corrected by the jackknife for its bias of order 1/K.

    For each prompt: twice the estimate from all samples minus the mean of the estimates from two
    halves of them. Without this correction, Best-of-N with N near K lies above the curve.
    """
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
    """The curve's reward at `kl`, interpolated between its points with ess >= 2; None outside them.

    Its accuracy on the toy at KL 2.8: of two estimates from 32 samples per prompt, one was 0.003
    above and one 0.003 below an estimate from 64 samples.
    """
    points = sorted((p["kl"], p["reward"]) for p in curve if p["ess"] >= 2)
    for (a, ra), (b, rb) in zip(points, points[1:]):
        if a <= kl <= b:
            return ra + (rb - ra) * (kl - a) / (b - a) if b > a else ra
    return None


def pairwise_accuracy(a, b):
    """1 where a > b, 1/2 where a = b, 0 where a < b: two of one shape -> that shape."""
    return (a > b) + 0.5 * (a == b)


def held_out_measures(logps, ref_logps, rewards) -> dict:
    """On all pairs of some groups: the shares of pairs that the implicit reward and log π order as
    r* does, and the mean log π of y_w and of y_l. Log-probs (G*K,), rewards (G, K)."""
    yw, yl, _ = preference_pairs(rewards)
    h = logps - ref_logps
    return dict(accuracy=float(pairwise_accuracy(h[yw], h[yl]).mean()),
                logp_accuracy=float(pairwise_accuracy(logps[yw], logps[yl]).mean()),
                logp_chosen=float(logps[yw].mean()), logp_rejected=float(logps[yl].mean()))


def rank_correlation(implicit, rewards) -> float:
    """Spearman's rank correlation within each prompt, averaged over prompts: two (P, K) -> [-1, 1].

    Equal values get the mean of their ranks. r̂ is defined only up to f(x), so its order between
    prompts means nothing.
    """
    def ranks(x):
        return pairwise_accuracy(x[:, :, None], x[:, None, :]).sum(-1)

    a, b = (ranks(x) - ranks(x).mean(-1, keepdim=True) for x in (implicit, rewards))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)).mean())


def correlation(implicit, rewards) -> float:
    """Pearson's correlation of the deviations from each prompt's mean: two (P, K) -> [-1, 1].

    Near π_ref, to second order, it is a policy's share of the optimal gain at its KL. There, with
    h = log π/π_ref, the gain is Cov(h, r) and the KL is Var(h)/2: the part of h that is not linear
    in r adds KL and no reward. Far from π_ref the correlation and the share differ.
    """
    a, b = (x - x.mean(-1, keepdim=True) for x in (implicit, rewards))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))


# ------------------------------------------------------------------------------ what a run prints

def one_line(enc, ids) -> str:
    """The text of token ids without <|endoftext|>. A line break is written as ⏎."""
    return "⏎".join(enc.decode([t for t in ids if t != enc.eot_token]).splitlines())


def write_samples(job, run, point: dict, n: int = 24) -> None:
    """Write samples.txt: completions of the same prompts by π_ref and π_θ, from the same uniforms.

    Each prompt has three lines and an empty one.
    """
    enc, lines = job.data.enc, []
    for i, prompt in enumerate(job.reference_eval["prompts"][:n]):
        lines.append(f"prompt:  {one_line(enc, prompt)}")
        for name, of in (("before", job.reference_eval["point"]), ("after", point)):
            ids = of["completions"][i]
            worth = f"{of['rewards'][i]:.2f}" if "rewards" in of else "-"
            end = "" if ids[-1] == enc.eot_token else " …"
            lines.append(f"{name + ':':<8} r* {worth} |{one_line(enc, ids)}{end}")
        lines.append("")
    write_whole(run.path("samples.txt"), lambda file: file.write("\n".join(lines).encode()))


def read_samples(path) -> list[list[str]]:
    """The lines of each prompt in a file of samples."""
    return [block.split("\n") for block in read_text(path).strip("\n").split("\n\n")]


COLUMNS = {  # title: a point's key, digits, meaning
    "reward r*": ("reward", 3, "mean true reward of the samples, from 0 to 1"),
    "KL, nats": ("kl", 3, "KL(π ‖ π_ref) per completion"),
    "length": ("length", 1, "tokens per completion"),
    "ended": ("eos", 3, "share of completions that end before the limit"),
    "repeated": ("repetition", 3, "share of trigrams that occur earlier in the text"),
    "grammatical": ("grammatical", 3, "share of sentences that the corpus's grammar can make"),
    "accuracy": ("accuracy", 3, "share of held-out pairs that the implicit reward ranks correctly")}


def plus_minus(value: float, se: float | None, digits: int) -> str:
    """A number and its standard error, if it has one: "0.904 ±0.006". Never "-0.000"."""
    return f"{round(value, digits) + 0:.{digits}f}" + (f" ±{se:.{digits}f}" if se else "")


def table(points: dict[str, dict], columns: dict[str, tuple] = COLUMNS) -> str:
    """A row per point with standard errors, then the meaning of the columns. A cell is empty if the
    point has no such measure, and "-" if it could not be estimated. A column without any value is
    left out."""
    columns = {title: column for title, column in columns.items()
               if any(point.get(column[0]) is not None for point in points.values())}
    rows = [["", *columns]]
    for name, point in points.items():
        rows.append([name])
        for key, digits, _ in columns.values():
            value = point.get(key)
            rows[-1].append("-" * (key in point) if value is None else
                            plus_minus(value, point.get(key + "_se"), digits))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0] + row[0].count("\u0302")),  # r̂'s hat has no width
                        *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    meanings = "; ".join(f"{title}: {meaning}" for title, (*_, meaning) in columns.items())
    return "\n".join([*lines, *textwrap.wrap(meanings + ".", 100, break_on_hyphens=False)])


def report(job, stage: str) -> None:
    """Print a finished run's table, four samples, files, and what to run next; draw its curves."""
    folder, reference_eval = job.folder(stage), job.reference_eval
    before, after = reference_eval["point"], read_json(folder / "result.json")
    optimum = reference_eval["optimum"]  # empty for a preference file
    best = optimal_reward(optimum, after["kl"])
    points = {"π_ref": before, "π_θ": after}
    if optimum:
        points["optimum at that KL"] = dict(reward=best, kl=after["kl"])
    title = f"π_θ: {job.title(stage)}; {after['samples']} held-out prompts, ± one standard error"
    print("", *textwrap.wrap(title, 100, break_on_hyphens=False), table(points), sep="\n")
    if optimum:
        print("The optimum is the largest reward that any policy can have at that KL (Eq. 4).")
    one_sample = plus_minus(after["kl_mc"], after["kl_mc_se"], 3)
    print(f"The one-sample estimate of KL is {one_sample}.\n")
    print("\n\n".join(map("\n".join, read_samples(folder / "samples.txt")[:4])) + "\n")
    look = "KL, π_θ's distance from π_ref"
    last = max((p["kl"] for p in optimum if p["ess"] >= 2), default=0)
    if best is not None and best - before["reward"] > 3 * before["reward_se"]:  # else it is noise
        share = (after["reward"] - before["reward"]) / (best - before["reward"])
        look = f"reward: π_θ has {share:.0%} of the gain that is possible at its KL"
    elif optimum and after["kl"] > last:
        look = f"KL: above {last:.2f} the optimum cannot be estimated, so its reward is \"-\""
    kept = "grammatical" if after["grammatical"] is not None else "repeated"
    print(f"Look first at {look}.\nThen compare the column \"{kept}\" with that of π_ref, and look "
          "at the curves.")
    print(f"samples: {folder / 'samples.txt'}")
    if not (folder / "curves.png").exists():  # drawn here: a sweep's runs need none
        training_curves(folder)
    print(f"curves:  {folder / 'curves.png'}")
    command, flags = STAGE.parse_known_args(job.command)
    runs = {"dpo": "DPO, to compare"}
    if stage == "dpo":
        runs = {"inspect": "which pairs were pushed, and how hard"}
        if (job.cfg.loss, job.cfg.labels) == ("pairwise", "hard"):  # degenerate refuses others
            runs["degenerate"] = "what happens without DPO's weight, and without π_ref"
    for name, why in runs.items() if command.stage == stage else ():  # not of a stage's parents
        print(f"next:    {shlex.join(['python', 'train.py', '--stage', name, *flags])}  # {why}")
