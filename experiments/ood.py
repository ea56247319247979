"""How does DPO generalise out of distribution, compared with an explicit reward model? (Section 7)

There are three sets of held-out prompts on the toy corpus: beginnings of test reviews; beginnings
with titles, names and genres that occur in no review; and beginnings of reviews of restaurants and
hotels. All sets have the same polar words, so r* is exact on all. The DPO model is measured as a
policy and, by r̂ = β log π_θ/π_ref, as a reward model. r_φ was trained on the same pairs.

P prompts, K samples of π_ref per prompt.
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from evaluate import (jackknife_optimum, one_line, optimal_reward, pairwise_accuracy,
                      standard_error, table)
from experiments.baselines import all_groups, expected_best, learned_reward
from job import Job, seed_of
from plot_frontier import STYLES
from support.curves import save_figure
from support.runs import Run, read_json
from support.settings import Settings
from support.toy_reviews import GRAMMAR, UNSEEN, expand
from train import STAGES, Stage, build, needs, parents_of_groups, resumable, score

TEST = "test prompts"
SETS = {TEST: "beginnings of test reviews",
        "unseen words": "titles, names and genres that no review has",
        "another domain": "beginnings of reviews of restaurants and hotels"}
# Per prompt, r̂ and r_φ score SCORED samples of π_ref, the policy draws SAMPLES, and N is BEST in
# Best-of-N. The optimum is estimated from all best_of samples of π_ref, because the KL of the
# estimate cannot exceed the log of their number, and DPO's KL is larger on unseen prompts.
SCORED, SAMPLES, BEST = 16, 4, 8


def unseen_prompts(job: Job, name: str) -> list[list[int]]:
    """Prompts as in App. C.1: <|endoftext|> and the beginning of a review, with words of UNSEEN.

    A prompt is the first 3 to 8 words, where C.1 takes 2 to 8 tokens: nearly every word of the
    corpus is one token, an unseen word is three or four. A prompt is cut if a whole completion
    would not fit the context after it.
    """
    cfg, data, rng = job.cfg, job.data, random.Random(seed_of(job.cfg, "ood", name))
    longest, prompts = max(8, cfg.n_ctx - cfg.max_new_tokens - 1), []
    for _ in job.reference_eval["prompts"]:
        sign = 1 if rng.random() < 0.5 else -1
        opener, _ = expand("opener", sign, rng, set(), GRAMMAR | UNSEEN[name])
        words = (opener[0].upper() + opener[1:]).split()[: 3 + int(6 * rng.random())]
        prompts.append([data.eot, *data.enc.encode_ordinary(" ".join(words))[:longest]])
    return prompts


# ------------------------------------------------------------------------------ the measures

def ordered_pairs(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """For each prompt: the number of pairs of samples that `scores` orders as `rewards` does, and
    the number of pairs with different rewards. Two (P, K) -> two (P,)."""
    better = rewards[:, :, None] > rewards[:, None]  # (P, K, K)
    right = pairwise_accuracy(scores[:, :, None], scores[:, None]) * better
    return right.double().sum((1, 2)), better.double().sum((1, 2))


def share(start, reached, best) -> float:
    """(reached - start) / (best - start), the reached share of a gain. NaN if there is no gain."""
    return float((reached - start) / (best - start)) if best > start else math.nan


def with_error(statistic, *columns: Tensor) -> list[float | None]:
    """statistic(means over prompts), and its standard error by the jackknife over prompts.

    columns (..., P). A result that is not defined is None.
    """
    P = columns[0].size(-1)
    left_out = [(x.sum(-1, keepdim=True) - x) / (P - 1) for x in columns]  # means without prompt p
    values = torch.tensor([statistic(*(x[..., p] for x in left_out)) for p in range(P)])
    both = float(statistic(*(x.mean(-1) for x in columns))), (P - 1) * standard_error(values)
    return [x if math.isfinite(x) else None for x in both]


def measure(job: Job, name: str) -> dict:
    """One seed on one set of prompts: "measure: subject" -> [value, standard error over prompts].

    accuracy: the share of pairs of π_ref's samples that the subject orders as r* does. r*: the mean
    of r* over samples. gain: the gain in r* over π_ref, as a share of the largest possible gain.
    That is the gain of Best-of-N by r* for Best-of-N, and of Eq. 4's optimum at the same KL for
    the policy's samples.
    """
    cfg, enc, reference, policy = job.cfg, job.data.enc, job.load_reference(), job.policy("dpo")
    prompts = job.reference_eval["prompts"] if name == TEST else unseen_prompts(job, name)
    K, scored_each, N = cfg.best_of, min(SCORED, cfg.best_of), min(BEST, cfg.best_of)
    repeated = [p for p in prompts for _ in range(K)]
    samples = job.sample(reference, repeated, seed_of(cfg, "ood", f"{name}, samples"))
    rewards = job.reward(repeated, samples).view(-1, K).double()
    picks = [i + k for i in range(0, len(samples), K) for k in range(scored_each)]
    scored = [repeated[i] for i in picks], [samples[i] for i in picks]
    logps, ref_logps = (score(job, model, *scored) for model in (policy, reference))
    start, r = rewards.mean(1), rewards[:, :scored_each]
    scores = {"r̂": (logps - ref_logps).view_as(r),  # without β, which changes no order
              "r_φ": learned_reward(job)(*scored).view_as(r)}
    best = {by: expected_best(x, r, N) for by, x in [*scores.items(), ("r*", r)]}
    point = job.evaluate(policy, reference, prompts * SAMPLES)
    reached, kl = (torch.tensor(point[key], dtype=torch.float64).view(SAMPLES, -1).mean(0)
                   for key in ("rewards", "kls"))  # (P,)
    curve = jackknife_optimum(rewards)
    optimum = (torch.tensor([p[key] for p in curve], dtype=torch.float64)
               for key in ("kls", "rewards"))  # (betas, P) each

    def optimal_share(start, reached, kl, kls, rewards) -> float:
        points = [dict(kl=float(k), reward=float(x), ess=p["ess"])
                  for p, k, x in zip(curve, kls, rewards)]
        return share(start, reached, optimal_reward(points, kl) or math.nan)

    measures = {f"accuracy: {by}": with_error(lambda right, pairs: float(right / pairs),
                                              *ordered_pairs(x, r)) for by, x in scores.items()}
    measures |= {f"gain: best of {N} by {by}": with_error(share, start, best[by], best["r*"])
                 for by in scores}
    measures["gain: DPO's samples"] = with_error(optimal_share, start, reached, kl, *optimum)
    measures["r*: π_ref's samples"] = with_error(float, start)
    measures |= {f"r*: best of {N} by {by}": with_error(float, x) for by, x in best.items()}
    measures |= {"r*: DPO's samples": with_error(float, reached),
                 "KL: DPO's samples": with_error(float, kl)}
    prompt, completion = (one_line(enc, x[0]) for x in (prompts, point["completions"]))
    return dict(measures=measures, example=f"{prompt}|{completion}")


# ------------------------------------------------------------------------------ the stage

def seed_jobs(job: Job) -> list[Job]:
    """This job, and a job for each further seed."""
    return [job, *(Job(job.preset, replace(job.cfg, seed=job.cfg.seed + i), job.command)
                   for i in range(1, job.cfg.ood_seeds))]


def make_seeds(job: Job) -> dict[str, str]:
    return {f"{stage} of seed {other.cfg.seed}": build(other, stage)
            for other in seed_jobs(job) for stage in ("dpo", "rm")}


def ood(job: Job, run: Run) -> None:
    """The measures of every seed on every set of prompts: ood.json and ood.png."""
    work = [(other, name) for other in seed_jobs(job) for name in SETS]

    def step(i: int) -> dict:
        other, name = work[i]
        return dict(seed=other.cfg.seed, prompts=name, **measure(other, name))

    resumable(job, run, {}, len(work), step)
    rows = [{key: x for key, x in row.items() if key != "seconds"} for row in run.metrics()]
    results = dict(P=len(job.reference_eval["prompts"]), N=min(BEST, job.cfg.best_of), rows=rows)
    draw(results, run.path("ood.png"))
    run.finish(json.dumps(results).encode())


def over_seeds(results: dict, name: str, key: str) -> tuple[float, ...] | None:
    """A measure on one set of prompts: its mean over seeds, the mean's standard error over prompts,
    its lowest and its highest value of a seed. None if a seed has no value."""
    pairs = [row["measures"][key] for row in results["rows"] if row["prompts"] == name]
    if None in sum(pairs, []):
        return None
    values, errors = np.array(pairs).T
    return (values.mean(), np.sqrt((errors**2).sum()) / len(errors), values.min(), values.max())


def draw(results: dict, path: Path) -> None:
    """Draw accuracies, and shares of the possible gain, on each set of prompts."""
    looks = {"r̂": ("r̂ = β log π_θ/π_ref, the reward in the DPO policy", *STYLES["dpo"][1:]),
             "r_φ": ("r_φ, a reward model of the same pairs", *STYLES["ppo"][1:]),
             "samples": ("the DPO policy's own samples", *STYLES["plackett-luce"][1:])}
    panels = {"accuracy": ("share of pairs in the order of r*", "Pairs of π_ref's samples"),
              "gain": ("share of the possible gain in r*",
                       f"Best of {results['N']} by a reward, beside best of {results['N']} by r*;\n"
                       "DPO's own samples, beside the optimum at their KL")}
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for ax, (what, (label, title)) in zip(figure.subplots(1, 2), panels.items()):
        mine = [key for key in results["rows"][0]["measures"] if key.startswith(what)]
        for i, key in enumerate(mine):
            legend, colour, marker, _ = looks[key.split()[-1]]
            rows = [(x + 0.12 * (i - (len(mine) - 1) / 2), *found) for x, name in enumerate(SETS)
                    if (found := over_seeds(results, name, key))]
            x, mean, _, low, high = np.reshape(rows, (-1, 5)).T
            ax.errorbar(x, mean, (mean - low, high - mean), color=colour, marker=marker, ls="",
                        capsize=3, label=legend)
            side = -1 if key.endswith("r̂") else 1
            for at in zip(x, mean):
                ax.annotate(f"{at[1]:.2f}", at, (7 * side, 4), textcoords="offset points",
                            ha="right" if side < 0 else "left", va="bottom", fontsize=9,
                            color=colour, bbox=dict(fc="white", lw=0, pad=0.5, alpha=0.8))
        ax.set(xticks=range(len(SETS)), xticklabels=[*SETS], xlim=(-0.5, len(SETS) - 0.5),
               xlabel="prompts", ylabel=label)
        ax.set_title(title, fontsize=10)
        ax.margins(y=0.15)
        ax.grid(axis="y", alpha=0.25)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  title="Does what DPO has learned hold on prompts unlike its training prompts?",
                  title_fontsize=12)
    figure.supxlabel(f"Seeds: {len(results['rows']) // len(SETS)}, each with its own corpus, "
                     "π_ref, preferences, DPO policy and r_φ; points: means, bars: lowest and "
                     f"highest seed. {results['P']} prompts of each kind per seed.", fontsize=9)
    save_figure(figure, path)


MEASURES = """\
accuracy: share of pairs of π_ref's samples that are in the order of r*; gain: r* minus π_ref's,
divided by the same difference for best of {N} by r*, or (DPO's samples) for the optimum at DPO's
KL; r*: mean over samples; KL: KL(π ‖ π_ref) in nats per completion. ood.png has the range of the
seeds."""


def report_ood(job: Job) -> None:
    folder = job.folder("ood")
    results = read_json(folder / "ood.json")
    first, points = results["rows"][: len(SETS)], {}
    for key in first[0]["measures"]:
        points[key] = {}
        for name in SETS:
            mean, se, *_ = over_seeds(results, name, key) or (None, None)
            points[key] |= {name: mean, name + "_se": se}
    print(f"\nseeds: {len(results['rows']) // len(SETS)}; means, ± one standard error over "
          f"{results['P']} prompts per set and seed")
    print(table(points, {name: (name, 3, meaning) for name, meaning in SETS.items()}),
          MEASURES.format(**results), "", "DPO's first sample on each set, after its prompt:",
          sep="\n")
    print("\n".join(f"  {row['prompts']}: {row['example']}" for row in first))
    print(f"\npicture: {folder / 'ood.png'}")


def parents_of_ood(cfg: Settings) -> list[str]:
    return needs(cfg.corpus != "toy" or bool(cfg.groups), "--stage ood makes its prompts from the "
                 "grammar of the toy corpus, where r* is exact: leave --corpus and --groups out, "
                 "and give --preset toy",
                 all_groups(cfg, "ood", ["dpo", "rm", "groups", *parents_of_groups(cfg)]))


STAGES["ood"] = Stage(ood, parents_of_ood, "ood.json", report_ood, make_seeds)
