"""The stages of what DPO is compared with: a learned reward, PPO on it and on r*, Best-of-N.

Unlikelihood and Preferred-FT differ from DPO by their loss alone, and share its stage (stages.py).
Each stage is (Context, Run), as there.

P prompts, K completions a prompt, N pairs.
"""

import math
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import dpo
from evaluate import in_order, rank_correlation
from gpt import GPT, by_length, pad_rows
from ppo import PPO, PPOConfig
from reward import ModelReward, RewardModel
from stages import (
    Context,
    completions_of,
    finish_method,
    finish_policy,
    judged,
    sample_all,
    save_json,
    without_texts,
    write_samples,
)
from support.runs import Run, load_tensors, read_json, save_tensors
from train import STOP, Diverged, Interrupted, Optim, autocast, diverged, draw_seed, fit, restoring

# ------------------------------------------------------------------------------ r_φ


def rm(ctx: Context, run: Run) -> None:
    """Groups -> r_φ by Eq. 2: π_ref's body with a scalar head, the best of its checkpoints kept.

    Its mean over all compared reference samples is taken to 0. (The paper's mean of 0 for every
    prompt needs several samples of each; a shift by f(x) changes no preference and no optimum of
    Eq. 3.) `report.json` has the best checkpoint's accuracy: a maximum, hence a little high.
    """
    s, made = ctx.s, ctx.groups
    train, held = ctx.split
    model = RewardModel.from_gpt(ctx.reference, ctx.reference.config.n_ctx).to(ctx.device)
    steps = max(1, len(train) // s.rm_batch)  # an epoch's

    def batches(step: int):
        order = np.random.default_rng(draw_seed(s.seed, "rm", step // steps)).permutation(train)
        picks = order[step % steps * s.rm_batch :][: s.rm_batch]
        micros = []
        for part in np.array_split(picks, min(ctx.parts(1), len(picks))):
            idx, _, lengths = pad_rows(*completions_of(made, part))
            yw_idxs, yl_idxs, _ = dpo.preference_pairs(torch.from_numpy(made.rewards[part]))
            micros.append(dict(idx=idx, lengths=lengths, yw_idxs=yw_idxs, yl_idxs=yl_idxs))
        return micros, sum(len(micro["yw_idxs"]) for micro in micros)

    def loss(model, micro):
        lengths = micro["lengths"]
        scores = by_length(lambda idx, rows: model(idx, lengths[rows]), micro["idx"], lengths)
        losses = dpo.reward_model_loss(scores, micro["yw_idxs"], micro["yl_idxs"])
        margin = dpo.margins(scores.detach(), micro["yw_idxs"], micro["yl_idxs"])
        return losses.sum(), dict(accuracy=(margin > 0).float(), margin=margin)

    def evaluation(model) -> dict:
        report = on_pairs(ctx, model, held)
        kept = load_tensors(run.path("best.pt")) if run.path("best.pt").exists() else {}
        if report["accuracy"] > kept.get("accuracy", -1):
            save_tensors(run.path("best.pt"), report | dict(model=model.state_dict()))
        return report

    o = Optim(s.rm_epochs * steps, s.rm_lr, steps // 5, "cosine", "adamw")
    fit(run, "rm", model, batches, loss, o, replace(s, eval_every=max(1, steps // 2)), "pairs",
        evaluation=evaluation)
    kept = load_tensors(run.path("best.pt"))
    model.load_state_dict(kept.pop("model"))
    everything = completions_of(made, range(len(made.prompt_ids)))
    scores = ModelReward(model, ctx.data.eot, learned=True)(*everything)
    with torch.no_grad():
        model.score.bias -= scores.mean().to(model.score.bias.device)
    save_json(run.path("report.json"), kept | dict(sd=float(scores.std())))
    run.finish(model.saved())
    run.path("best.pt").unlink(missing_ok=True)


def on_pairs(ctx: Context, model: RewardModel, picks) -> dict:
    """Of held-out groups: the share of pairs in r*'s order, and the rank correlation with r*."""
    made = ctx.groups
    r = torch.from_numpy(made.rewards[picks])
    scores = ModelReward(model, ctx.data.eot, learned=True)(*completions_of(made, picks))
    yw, yl, _ = dpo.preference_pairs(r)
    return dict(accuracy=float(in_order(scores[yw], scores[yl]).mean()),
                rank_correlation=rank_correlation(scores.view(r.shape), r))


def report_rm(ctx: Context) -> None:
    report = read_json(ctx.folder("rm") / "report.json")
    print(f"r_φ: {report['accuracy']:.1%} of held-out pairs in order, rank correlation within a "
          f"prompt {report['rank_correlation']:.3f}; mean 0, sd {report['sd']:.2f} over π_ref's "
          "samples")


def learned_reward(ctx: Context) -> ModelReward:
    model = RewardModel.load(ctx.folder("rm") / "model.pt").to(ctx.device)
    return ModelReward(model, ctx.data.eot, learned=True)


# ------------------------------------------------------------------------------ PPO


def ppo(ctx: Context, run: Run) -> None:
    """r_φ -> π_θ by Eq. 3."""
    report = read_json(ctx.folder("rm") / "report.json")
    train_ppo(ctx, run, "ppo", learned_reward(ctx), report["sd"])


def ppo_gt(ctx: Context, run: Run) -> None:
    """r* -> π_θ by Eq. 3: what PPO could do were its reward right."""
    train_ppo(ctx, run, "ppo-gt", ctx.reward, float(ctx.groups.rewards.std()))


def train_ppo(ctx: Context, run: Run, stage: str, reward, sd: float) -> None:
    """Eq. 3 by policy gradient from the prompts that DPO learns from; saved as `fit` saves.

    sd: the reward's over π_ref's samples, so that one β serves rewards of any scale."""
    s, reference, before, (train, _) = ctx.s, ctx.reference, ctx.before, ctx.split
    prompts = [ctx.groups.prompt_ids[i] for i in train]
    policy = GPT(reference.config).to(ctx.device)
    policy.load_state_dict(reference.state_dict())
    config = PPOConfig(steps=s.ppo_steps, lr=s.ppo_lr, value_lr=s.ppo_value_lr,
                       beta=s.ppo_beta * sd, target=s.ppo_target, max_new=s.max_new)
    method = PPO(policy, reference, reward, ctx.data.eot, config, rows=ctx.rows(),
                 context=lambda: autocast(ctx.device, s.precision), fp16=s.precision == "fp16")
    start, saved_at, saved, point = 0, time.monotonic(), None, {}
    if state := run.resume():
        with restoring(run):
            method.load(state["ppo"])
        start = saved = state["step"]
        if start < s.ppo_steps:
            print(f"  {stage}: going on at iteration {start} of {s.ppo_steps}")
    every = s.eval_every or -(-s.ppo_steps // 4)
    bar = tqdm(range(start, s.ppo_steps), stage, initial=start, total=s.ppo_steps, unit="iteration",
               disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for step in bar:
        began = time.perf_counter()
        seed = draw_seed(s.seed, f"{stage} {s.run_seed}", step)
        picks = np.random.default_rng(seed).choice(len(prompts), s.ppo_rollouts)
        row = method.step(step, [prompts[i] for i in picks], seed)
        if not all(map(math.isfinite, row.values())):
            raise Diverged(diverged(run, stage, step, saved))
        row |= dict(seconds=time.perf_counter() - began, samples=method.samples,
                    forwards=method.forwards + method.samples * (stage == "ppo"))  # r_φ's own
        if stage == "ppo" and not s.groups:  # over-optimisation: the two part
            row["true_reward"] = float(ctx.reward(*method.last).mean())
        run.log(dict(step=step) | {k: float(f"{v:.6g}") if math.isfinite(v) else None
                                   for k, v in row.items()})
        bar.set_postfix(reward=f"{row['reward']:.3f}", kl=f"{row['kl']:.2f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == s.ppo_steps:
            point = judged(ctx, policy, reference, before, reward)
            run.log(dict(step=step, eval=without_texts(point)))
        if time.monotonic() - saved_at >= s.save_secs or STOP or step + 1 == s.ppo_steps:
            run.checkpoint(dict(step=step + 1, ppo=method.state()))
            saved_at, saved = time.monotonic(), step + 1
        if STOP:
            raise Interrupted(f"{stage} is saved at iteration {step + 1} of {s.ppo_steps}")
    finish_method(ctx, run, before, point or judged(ctx, policy, reference, before, reward))
    finish_policy(ctx, run, policy)


# ------------------------------------------------------------------------------ Best-of-N


def best_of_n(ctx: Context, run: Run) -> None:
    """Many samples of π_ref on each test prompt, judged by r* and by r_φ: (P, K) each.

    samples.txt shows the best of 16 by r_φ."""
    s, before = ctx.s, ctx.before
    prompts = [p for p in before["prompts"] for _ in range(s.best_of)]
    samples = sample_all(ctx, run, ctx.reference, prompts, "best-of-n")
    shape = len(before["prompts"]), s.best_of
    rewards = ctx.reward(prompts, samples).view(shape)
    learned = learned_reward(ctx)(prompts, samples).view(shape)
    best = learned[:, :16].argmax(1).tolist()
    write_samples(ctx, run, before, dict(
        completions=[samples[i * s.best_of + k] for i, k in enumerate(best)],
        rewards=[float(r[k]) for r, k in zip(rewards, best)]))
    run.finish(dict(rewards=rewards, learned=learned))


def expected_best(scores, rewards, N: int):
    """E[r* of the best of N by `scores`], over all choices of N of a prompt's K samples.

    scores, rewards (P, K) -> (P,). The sample with k - 1 below it is the best of N draws without
    replacement with probability C(k - 1, N - 1) / C(K, N): no draw is wasted, unlike groups of N.
    """
    K = scores.size(1)
    order = scores.argsort(dim=1, stable=True)
    weights = torch.tensor([math.comb(k, N - 1) / math.comb(K, N) for k in range(K)])
    return (rewards.gather(1, order).double() * weights).sum(1)


def best_of_kl(N: int) -> float:
    """log N - (N - 1) / N nats: KL of Best-of-N to π_ref where no two samples tie, else a bound."""
    return math.log(N) - (N - 1) / N


def report_best_of_n(ctx: Context) -> None:
    state, K = load_tensors(ctx.folder("best-of-n") / "samples.pt"), ctx.s.best_of
    print("Best-of-N: KL at most, mean r* of the best by r*, and by r_φ")
    for N in (n for n in (1, 4, 16, 64) if n <= K):
        best, learned = (float(expected_best(state[key], state["rewards"], N).mean())
                         for key in ("rewards", "learned"))
        print(f"  N {N:<4} {best_of_kl(N):.2f} nats   {best:.3f}   {learned:.3f}")
