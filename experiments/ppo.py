"""PPO, the method that DPO replaces: Eq. 3 by policy gradient, with a value network and KL control.

In each iteration the policy samples completions, and a reward (r* or a learned r_φ) scores them. A
value network predicts the return from each token on. Tokens whose return is higher than predicted
become more likely.

Each token is one action. r(x,y) - β log π(y|x)/π_ref(y|x) is split over the tokens of y: every
token gets its own part of the KL penalty, and the last token also gets the score r(x,y). Dropout
must be 0. Otherwise the probability ratio is not 1 before the first step.

B sequences, T tokens, N rollouts. Log-probs and KL are in nats.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dpo import completion_mask
from evaluate import report
from experiments.baselines import learned_reward, needs_true_reward
from gpt import GPT, length_buckets, pad_rows
from job import Job, seed_of
from reward import RewardModel
from support.runs import Run, read_json
from support.settings import Settings
from train import (STAGES, Stage, evaluate_policy, finish_method, needs, parents_of_groups,
                   resumable)


class PPOConfig(NamedTuple):
    steps: int  # iterations, warm-up included
    lr: float  # of the policy; it falls linearly towards 0 over the second half
    value_lr: float = 1e-3  # of the value network; constant, as its targets change with the policy
    beta: float = 0.1  # β of Eq. 3, in units of reward per nat; with a target, its first value
    target: float = 0.0  # the KL in nats that β is adapted to reach; 0: β is constant
    warmup: int = 2  # iterations in which only the value network learns
    epochs: int = 2  # passes over an iteration's samples
    minibatches: int = 4  # optimizer steps per pass
    clip: float = 0.2  # ε: the objective rewards no probability ratio beyond 1 ± ε
    gamma: float = 1.0  # the discount γ; Eq. 3 has none
    lam: float = 0.95  # λ of GAE: 1 uses the whole return, 0 one step and the next value
    max_norm: float = 1.0  # the largest norm of each network's gradient


# ------------------------------------------------------------------------------ the equations

def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor,
                  beta: float) -> Tensor:
    """Eq. 3 by tokens · r_t = -β (log π - log π_ref)(y_t | x, y_<t), plus r(x,y) at the last t.

    scores (B,), log-probs (B, T), mask (B, T) true at the tokens of y -> (B, T), 0 elsewhere. A
    row sums to r(x,y) - β log π(y|x)/π_ref(y|x), whose mean over y ~ π is Eq. 3.
    """
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return torch.where(mask, -beta * (logps - ref_logps), 0) + last * scores[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ A_t+1,  δ_t = r_t + γ V_t+1 - V_t,  V = A = 0 after the last token.

    All (B, T) -> advantages A and returns A + V, float32, 0 outside the mask. λ = 1 gives the
    return minus V_t, which has no bias. λ = 0 gives δ_t, which has the least variance but a bias
    from the errors of V.
    """
    rewards, values = (torch.where(mask, x.float(), 0) for x in (rewards, values))
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, advantage = torch.zeros_like(deltas), 0
    for t in range(deltas.size(1) - 1, -1, -1):
        advantage = (deltas[:, t] + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and variance 1 over the mask, 0 elsewhere. One rate then fits any reward."""
    std, mean = torch.std_mean(x[mask], correction=0)
    return torch.where(mask, (x - mean) / (std + 1e-8), 0)


def clipped_objective(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
                      clip: float) -> tuple[Tensor, Tensor]:
    """L = -Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t),  ρ = π(y_t)/π_old(y_t).

    All (B, T) -> the SUM over the mask, and the number of clipped tokens. A token is clipped when
    its ratio has moved from 1 by more than ε in the direction of A_t. It then has no gradient. A
    token that moved against A_t is never clipped. At ρ = 1 the gradient is that of -Σ A log π.
    """
    ratio = torch.where(mask, logps - old_logps, 0).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -torch.where(mask, torch.minimum(free, clipped), 0).sum()
    return loss, (mask & (clipped < free)).sum()


GAIN, BRAKE, LIMIT = 0.3, 0.5, 0.5


def adaptive_kl_beta(beta: float, kl: float, last_kl: float, target: float) -> float:
    """log β += GAIN clip(KL/target - 1) + BRAKE clip((KL - last KL)/target), each clip to ±LIMIT.

    β grows when KL is above its target or rising, by a factor of 1.5 per iteration at most. Ziegler
    et al. (2019) use the first term alone, with gain 0.1 and limit 0.2: 2 % per iteration at most,
    over thousands of iterations. We have tens, so our gain must be larger. KL reacts to β only
    about five iterations later, so a large gain makes KL oscillate. The second term prevents it.
    """
    above, rise = (max(-LIMIT, min(LIMIT, x)) for x in (kl / target - 1, (kl - last_kl) / target))
    return beta * math.exp(GAIN * above + BRAKE * rise)


class ValueModel(RewardModel):
    """V(x, y_<t): a GPT's body with a scalar head at every position. At first all values are 0."""

    def forward(self, idx):
        """idx (B, T) -> (B, T) float32: the value before each token is drawn, and 0 in column 0."""
        hidden = self.body.hidden(idx[:, :-1])
        with torch.autocast(idx.device.type, enabled=False):  # bf16 has only 3 digits
            return F.pad(self.score(hidden.float())[..., 0], (1, 0))


# ------------------------------------------------------------------------------ the algorithm

LOGGED = "policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "value_grad_norm"


class PPO:
    """Trains `policy` in place and never changes `reference`. Both are on one device.

    reward(prompts, completions) -> (N,) float32 on the CPU; β is in units of this reward per nat.
    sample(model, prompts, seed) -> completions. autocast() is the context of every forward pass.
    A forward pass takes at most `batch_size` sequences. The attribute `last` holds the (prompts,
    completions) of the last step.
    """

    def __init__(self, policy: GPT, reference: GPT, reward: Callable, sample: Callable, eos: int,
                 config: PPOConfig, autocast: Callable = nullcontext, batch_size: int = 512):
        assert policy is not reference, "π_ref must not change: give the policy a copy"
        self.device = policy.wte.weight.device
        self.policy, self.reference = policy.eval(), reference.eval()
        self.value = ValueModel.from_gpt(reference, reference.config.n_ctx).to(self.device).eval()
        self.reward, self.sample, self.eos, self.config = reward, sample, eos, config
        self.autocast, self.batch_size = autocast, batch_size
        self.optimizer = torch.optim.Adam(
            [dict(params=m.parameters()) for m in (self.policy, self.value)], betas=(0.9, 0.95),
            fused=True)
        self.beta, self.kl, self.last = config.beta, 0.0, ([], [])  # kl: of the last step

    def state_dict(self) -> dict:
        return dict(policy=self.policy.state_dict(), value=self.value.state_dict(),
                    optimizer=self.optimizer.state_dict(), beta=self.beta, kl=self.kl)

    def load_state_dict(self, state: dict) -> None:
        for name in ("policy", "value", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.beta, self.kl = state["beta"], state["kl"]

    def step(self, step: int, prompts: list[list[int]], seed: int) -> dict[str, float]:
        """Iteration `step` of config.steps: sample, score, optimize, set the next β. Returns a row.

        All randomness is a function of `seed`: give each iteration another seed. In the row, kl is
        the mean of log π(y|x)/π_ref(y|x), reward the mean score, entropy the mean of -log π per
        token. These, length, eos and explained_variance describe the samples before any network
        learns from them. beta and lr (of the policy) are those of this iteration. The other
        numbers are means over the optimizer steps, which in warm-up change only the value network.
        approx_kl is KL(π_old ‖ π) per token. If a loss is not finite, the row shows it, and the
        networks can no longer be used.
        """
        c, generator = self.config, torch.Generator().manual_seed(seed)
        sample_seed = int(torch.randint(2**62, (), generator=generator))
        completions = self.sample(self.policy, prompts, sample_seed)
        scores = self.reward(prompts, completions)
        idx, mask, lengths, (logps, ref_logps, values) = self.score_rollouts(prompts, completions)
        rewards = token_rewards(scores.to(logps), logps, ref_logps, mask, self.beta)
        advantages, returns = gae(rewards, values, mask, c.gamma, c.lam)
        tokens = sum(map(len, completions))
        error, spread = torch.stack([advantages, returns])[:, mask].var(1, correction=0)
        row = dict(
            kl=float((logps - ref_logps).sum(1).mean()), reward=float(scores.mean()),
            beta=self.beta, entropy=float(-logps.sum() / tokens), length=tokens / len(prompts),
            eos=sum(ids[-1] == self.eos for ids in completions) / len(prompts),
            explained_variance=float(1 - error / spread.clamp(min=1e-8)))  # error: Var(return - V)
        rollouts = idx, mask, logps, whiten(advantages, mask), returns
        row |= self.optimize(step, rollouts, lengths, generator)
        if c.target and step >= c.warmup:
            self.beta = adaptive_kl_beta(self.beta, row["kl"], self.kl, c.target)
        self.kl, self.last = row["kl"], (prompts, completions)
        return row

    @torch.no_grad()
    def score_rollouts(self, prompts, completions):
        """Pad and score N rollouts -> idx (N, T), mask (N, T), lengths (N,), and (3, N, T): log π,
        log π_ref and V, 0 outside the mask."""
        idx, prompt_lens, lengths = pad_rows(prompts, completions)
        mask = completion_mask(prompt_lens, lengths, idx.size(1)).to(self.device)
        idx = idx.to(self.device)
        scores = torch.zeros(3, *idx.shape, device=self.device)
        for rows in length_buckets(lengths, self.batch_size):
            index = without_padding(rows, lengths, self.device)
            i, m = idx[index], mask[index]
            with self.autocast():  # as in `update`, so that every ratio starts at 1
                scores[:, *index] = torch.stack((
                    self.policy.token_logps(i, m), self.reference.token_logps(i, m),
                    self.value(i) * m))
        return idx, mask, lengths, scores

    def optimize(self, step: int, rollouts, lengths: Tensor, generator) -> dict[str, float]:
        """Take epochs * minibatches optimizer steps on an iteration's samples -> means of LOGGED.

        rollouts: idx, mask, log π_old, advantages and returns, (N, T) each; lengths (N,).
        """
        c, logs, n = self.config, [], min(self.config.minibatches, len(lengths))
        decay = min(1, 2 * (c.steps - step) / max(1, c.steps - c.warmup))
        policy_group, value_group = self.optimizer.param_groups
        policy_group["lr"], value_group["lr"] = c.lr * decay, c.value_lr
        for _ in range(c.epochs):
            for part in torch.randperm(len(lengths), generator=generator).tensor_split(n):
                logs.append(self.update(rollouts, lengths, part, step < c.warmup))
        return dict(zip(LOGGED, torch.stack(logs).mean(0).tolist()), lr=c.lr * decay)

    def update(self, rollouts, lengths: Tensor, part: Tensor, warmup: bool) -> Tensor:
        """Take one optimizer step on the samples `part` -> the values of LOGGED."""
        self.optimizer.zero_grad(set_to_none=True)
        n = rollouts[1][part.to(self.device, non_blocking=True)].sum()  # tokens
        sums = torch.zeros(4, device=self.device)
        # the backward pass needs the activations: far more memory per sequence than sampling
        for rows in length_buckets(lengths[part], max(1, self.batch_size // 8)):
            index = without_padding(part[rows], lengths, self.device)
            idx, mask, old_logps, advantages, returns = (x[index] for x in rollouts)
            with self.autocast():
                values = self.value(idx)
                logps = old_logps if warmup else self.policy.token_logps(idx, mask)
            value_loss = 0.5 * torch.where(mask, values - returns, 0).square().sum()
            loss, clipped = clipped_objective(logps, old_logps, advantages, mask, self.config.clip)
            ((loss + value_loss) / n).backward()
            log_ratio = torch.where(mask, logps - old_logps, 0).detach()
            sums += torch.stack([loss.detach(), value_loss.detach(), clipped,
                                 (log_ratio.exp() - 1 - log_ratio).sum()])
        norms = [nn.utils.clip_grad_norm_(m.parameters(), self.config.max_norm)
                 .to(self.device, non_blocking=True) for m in (self.policy, self.value)]
        self.optimizer.step()
        return torch.cat([sums / n, torch.stack(norms)])


def without_padding(rows: Tensor, lengths: Tensor, device: torch.device) -> tuple:
    """Index into (N, T) tensors: these rows, without the columns where all of them are padding."""
    return rows.to(device, non_blocking=True), slice(int(lengths[rows].max()))


# ------------------------------------------------------------------------------ the stages

def ppo(job: Job, run: Run) -> None:
    """r_φ -> π_θ by Eq. 3."""
    train_ppo(job, run, learned_reward(job), read_json(job.folder("rm") / "report.json")["sd"])


def ppo_gt(job: Job, run: Run) -> None:
    """r* -> π_θ by Eq. 3: PPO with the ground-truth reward."""
    train_ppo(job, run, job.reward, float(job.groups.rewards.std()))


def train_ppo(job: Job, run: Run, reward: Callable, sd: float) -> None:
    """PPO on the training prompts of the groups.

    sd: the reward's standard deviation over π_ref's samples. --ppo-beta is in units of sd.
    """
    cfg, stage = job.cfg, run.about["stage"]
    policy, reference = job.load_reference(), job.load_reference()
    prompts = [job.groups.prompt_ids[i] for i in job.split[0]]
    config = PPOConfig(steps=cfg.ppo_steps, lr=cfg.ppo_lr, value_lr=cfg.ppo_value_lr,
                       beta=cfg.ppo_beta * sd, target=cfg.ppo_target)
    method = PPO(policy, reference, reward, job.sample, job.data.eot, config, job.autocast,
                 job.batch_size(policy))

    def step(i: int) -> dict:
        seed = seed_of(cfg, f"{stage} {cfg.run_seed}", i)
        picks = np.random.default_rng(seed).choice(len(prompts), cfg.ppo_rollouts)
        began = time.perf_counter()
        row = method.step(i, [prompts[k] for k in picks], seed)
        row["seconds"] = time.perf_counter() - began  # without the time for true_reward
        if stage == "ppo" and not cfg.groups:  # over-optimisation: reward rises, true_reward falls
            row["true_reward"] = float(job.reward(*method.last).mean())
        return row

    point = resumable(job, run, dict(ppo=method), cfg.ppo_steps, step,
                      lambda: evaluate_policy(job, policy, reference), cfg.eval_every)
    finish_method(job, run, policy, point)


def no_fp16(cfg: Settings, parents: list[str]) -> list[str]:
    return needs(cfg.precision == "fp16", "PPO cannot train in fp16, which --precision auto "
                 "chooses on an old GPU: give --precision bf16 or fp32 to all stages", parents)


STAGES["ppo"] = Stage(ppo, lambda cfg: no_fp16(cfg, ["groups", "rm", *parents_of_groups(cfg)]),
                      report=lambda job: report(job, "ppo"))
STAGES["ppo-gt"] = Stage(ppo_gt, lambda cfg: no_fp16(cfg, needs_true_reward(cfg, "ppo-gt")),
                         report=lambda job: report(job, "ppo-gt"))
