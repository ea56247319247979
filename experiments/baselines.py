"""Baselines besides PPO: the learned reward model r_φ (Eq. 2), and Best-of-N sampling.

Unlikelihood and Preferred-FT differ from DPO in their loss alone; they stand in train.py.

P prompts, K samples per prompt, N pairs, or the N of Best-of-N.
"""

import math

import numpy as np
import torch

import dpo
from evaluate import held_out_measures, rank_correlation, table, write_samples
from gpt import pad_rows
from job import Job, seed_of
from reward import ModelReward, RewardModel
from support import ranks
from support.runs import Run, load_tensors, read_json, save_json, save_tensors
from support.settings import Settings
from train import (STAGES, Completions, Stage, fit, needs, parents_of_groups, sample_all,
                   split_picks)

# ------------------------------------------------------------------------------ r_φ

def rm(job: Job, run: Run) -> None:
    """Groups -> r_φ by Eq. 2: π_ref's body with a scalar head.

    The checkpoint with the best accuracy on held-out pairs is kept. report.json holds this
    accuracy. It is a maximum over checkpoints, and therefore a little too high. At the end r_φ is
    shifted by a constant, so that its mean over the groups' completions is 0. (The paper makes the
    mean 0 for every prompt. A shift by f(x) changes no preference and no optimum of Eq. 3.)
    """
    cfg, groups, (train, held), best = job.cfg, job.groups, job.split, run.path("best.pt")
    reference = job.load_reference()
    model = RewardModel.from_gpt(reference, reference.config.n_ctx).to(job.device)
    steps = max(1, len(train) // cfg.rm_batch)  # per epoch

    def evaluation(model) -> dict:
        scores, r = score_groups(job, model, held), torch.from_numpy(groups.rewards[held])
        accuracy = held_out_measures(scores.flatten(), 0, r)["accuracy"]  # r_φ has no reference
        measures = dict(accuracy=accuracy, rank_correlation=rank_correlation(scores, r),
                        sd=float(scores.std()))  # not finite if r_φ has diverged
        if not best.exists() or accuracy > load_tensors(best)["accuracy"]:
            save_tensors(best, measures | dict(model=model.state_dict()))
        return measures

    fit(job, run, model, pair_batches(job, steps), pair_loss, steps=cfg.rm_epochs * steps,
        lr=cfg.rm_lr, warmup=steps // 5, evaluate_every=max(1, steps // 2), evaluation=evaluation,
        unit="pairs")
    ranks.wait()  # for best.pt, which rank 0 writes
    measures = load_tensors(best)
    model.load_state_dict(measures.pop("model"))
    scores = score_groups(job, model, range(len(groups.prompt_ids)))
    with torch.no_grad():
        model.score.bias -= scores.mean().to(job.device)
    save_json(run.path("report.json"), measures | dict(sd=float(scores.std())))
    run.finish(model.checkpoint())
    best.unlink(missing_ok=True)


def pair_batches(job: Job, steps: int):
    """batches(step) for `fit`: rm_batch training groups. Each epoch of `steps` has a new order."""
    cfg, groups = job.cfg, job.groups

    def batches(step: int):
        rng = np.random.default_rng(seed_of(cfg, "rm", step // steps))
        picks = rng.permutation(job.split[0])[step % steps * cfg.rm_batch :][: cfg.rm_batch]
        micro_batches = []
        for part in split_picks(picks):
            idx, _, lengths = pad_rows(*groups.flat(part))
            yw, yl, _ = dpo.preference_pairs(torch.from_numpy(groups.rewards[part]))
            micro_batches.append(dict(idx=idx, lengths=lengths, yw_idxs=yw, yl_idxs=yl))
        return micro_batches, sum(len(m["yw_idxs"]) for m in micro_batches)

    return batches


def pair_loss(model, micro_batch):
    """Eq. 2, summed over pairs."""
    yw_idxs, yl_idxs = micro_batch["yw_idxs"], micro_batch["yl_idxs"]
    scores = model(micro_batch["idx"], micro_batch["lengths"])
    loss = dpo.reward_model_loss(scores, yw_idxs, yl_idxs).sum()
    margin = dpo.margins(scores.detach(), yw_idxs, yl_idxs)
    return loss, dict(accuracy=(margin > 0).float(), margin=margin)


def score_groups(job: Job, model: RewardModel, picks) -> torch.Tensor:
    """r_φ of these groups' completions: (G, K)."""
    scores = ModelReward(model, job.data.eot, learned=True)(*job.groups.flat(picks))
    return scores.view(-1, job.groups.K)


def report_rm(job: Job) -> None:
    report = read_json(job.folder("rm") / "report.json")
    print(f"r_φ orders {report['accuracy']:.1%} of held-out pairs correctly; rank correlation "
          f"within a prompt {report['rank_correlation']:.3f};\nover π_ref's samples mean 0, "
          f"standard deviation {report['sd']:.2f}")


def learned_reward(job: Job) -> ModelReward:
    """r_φ of the finished stage rm."""
    model = RewardModel.load(job.folder("rm") / "model.pt").to(job.device)
    return ModelReward(model, job.data.eot, learned=True)


# ------------------------------------------------------------------------------ Best-of-N

KEPT = 32  # completions per prompt that samples.pt keeps

def best_of_n(job: Job, run: Run) -> None:
    """Draw K samples of π_ref per test prompt and score them by r* and by r_φ.

    samples.pt holds rewards (P, K): r*; learned (P, K): r_φ; completions: the first KEPT of each
    prompt, which r̂ scores later; valid (validation prompts, optimum_samples): r* of π_ref's
    samples for the validation prompts. samples.txt shows, for each prompt, the best by r_φ of the
    first KEPT.
    """
    K, cfg, reference_eval = job.cfg.best_of, job.cfg, job.reference_eval
    prompts = [p for p in reference_eval["prompts"] for _ in range(K)]
    valid = [p for p in reference_eval["valid"] for _ in range(cfg.optimum_samples)]
    samples = sample_all(job, run, job.load_reference(), prompts + valid, "best-of-n")
    rewards = job.reward(prompts + valid, samples)
    rewards, valid = rewards[: len(prompts)].view(-1, K), rewards[len(prompts) :]
    learned = learned_reward(job)(prompts, samples[: len(prompts)]).view(-1, K)
    best = learned[:, :KEPT].argmax(1).tolist()
    write_samples(job, run, dict(
        completions=[samples[i * K + k] for i, k in enumerate(best)],
        rewards=[float(r[k]) for r, k in zip(rewards, best)]))
    first = Completions(samples[i + k] for i in range(0, len(prompts), K)
                        for k in range(min(K, KEPT)))
    run.finish(dict(rewards=rewards, learned=learned, completions=first.state_dict(),
                    valid=valid.view(-1, cfg.optimum_samples)))


def expected_best(scores, rewards, N: int):
    """The expected reward of Best-of-N by `scores`: its mean over all choices of N of K samples.

    scores, rewards (P, K) -> (P,). Number the samples by score from 0, the lowest. Of N samples
    drawn without replacement, sample k is the best with probability C(k, N - 1) / C(K, N).
    """
    K, order = scores.size(1), scores.argsort(dim=1, stable=True)
    weights = torch.tensor([math.comb(k, N - 1) / math.comb(K, N) for k in range(K)])
    return (rewards.gather(1, order).double() * weights).sum(1)


def best_of_kl(N: int) -> float:
    """log N - (N - 1) / N: the KL of Best-of-N to π_ref in nats. With ties it is an upper bound."""
    return math.log(N) - (N - 1) / N


def report_best_of_n(job: Job) -> None:
    state, points = load_tensors(job.folder("best-of-n") / "samples.pt"), {}
    for N in (n for n in (1, 4, 16, 64) if n <= job.cfg.best_of):
        points[f"best of {N}"] = dict(kl=best_of_kl(N)) | {
            by: float(expected_best(state[by], state["rewards"], N).mean())
            for by in ("rewards", "learned")}
    print("\n" + table(points, {
        "KL, nats": ("kl", 2, "an upper bound"),
        "by r*": ("rewards", 3, "mean r* of the sample that r* chooses"),
        "by r_φ": ("learned", 3, "mean r* of the one that r_φ chooses")}))


# ------------------------------------------------------------------------------ the stages

def needs_true_reward(cfg: Settings, stage: str, *parents: str) -> list[str]:
    return needs(bool(cfg.groups), f"--stage {stage} needs r*, but a preference file has none: "
                 "leave --groups out", ["groups", *parents, *parents_of_groups(cfg)])


def all_groups(cfg: Settings, stage: str, parents: list[str]) -> list[str]:
    needs(cfg.label_noise > 0, "--label-noise works only with --stage dpo; --stage "
          f"{stage} also learns from true labels: leave --label-noise out", [])
    return needs(cfg.train_prompts > 0, "--train-prompts works only with --stage dpo; --stage "
                 f"{stage} uses all groups: leave --train-prompts out", parents)


STAGES["rm"] = Stage(rm, lambda cfg: ["groups", *parents_of_groups(cfg)], report=report_rm)
STAGES["best-of-n"] = Stage(best_of_n, lambda cfg: needs_true_reward(cfg, "best-of-n", "rm"),
                            "samples.pt", report_best_of_n)
