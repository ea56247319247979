"""The method DPO replaces: Eq. 3 by policy gradient, with a value network and KL control.

A policy samples completions, a reward judges them, a value network says what was to be expected,
and what came out better than that is made likelier. The reward is a callable
(prompts, completions) -> (N,) float32 on the CPU: r* or a learned r_φ, used as it is, so β is in
its units. Knows no text, no files and no stages.

The token is the action: r(x,y) - β log π(y|x)/π_ref(y|x) is cut into tokens, and the score falls
on the last. Log-probs and KL in nats. Dropout must be 0, or a ratio is not 1 before a step.

B sequences, T tokens, N rollouts.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dpo import completion_mask
from gpt import GPT, GPTConfig, alike, pad_rows


class PPOConfig(NamedTuple):
    steps: int  # iterations, the warm-up's too; each samples one completion a prompt
    max_new: int  # tokens a completion at most
    lr: float  # the policy's; in the second half linearly to 0, so that it ends at rest
    value_lr: float = 1e-3  # constant: its targets move as the policy does
    beta: float = 0.1  # Eq. 3's, in units of the reward a nat; with a target, where it starts
    target: float = 0.0  # nats of KL, held by changing beta; 0 keeps beta as it is
    warmup: int = 2  # iterations in which the value network, 0 at first, learns alone
    epochs: int = 2  # passes over an iteration's samples: the clip is for all but the first step
    minibatches: int = 4  # optimizer steps a pass
    clip: float = 0.2  # a token's probability ratio pays up to 1 ± this
    gamma: float = 1.0  # Eq. 3 discounts nothing
    lam: float = 0.95  # of GAE: 1 trusts returns alone, 0 the value network alone
    max_norm: float = 1.0  # of each network's gradient


# ------------------------------------------------------------------------------ the equations


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor,
                  beta: float) -> Tensor:
    """Eq. 3 by tokens · r_t = -β (log π - log π_ref)(y_t | x, y_<t), plus r(x,y) at the last t.

    scores (B,), log-probs (B, T), mask (B, T) true at the tokens of y -> (B, T), 0 elsewhere. A
    row sums to r(x,y) - β log π(y|x)/π_ref(y|x), whose mean over y ~ π is Eq. 3.
    """
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # the EOS, or where max_new cut
    return torch.where(mask, -beta * (logps - ref_logps), 0) + last * scores[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ A_t+1,  δ_t = r_t + γ V_t+1 - V_t,  V = A = 0 after the last token.

    All (B, T) -> advantages and returns A + V, float32, 0 outside the mask. λ = 1 is the return
    less V_t, without bias; λ = 0 is δ_t, of least variance, and as wrong as V.
    """
    rewards, values = (torch.where(mask, x.float(), 0) for x in (rewards, values))
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, after = torch.zeros_like(deltas), 0
    for t in range(deltas.size(1) - 1, -1, -1):
        after = (deltas[:, t] + gamma * lam * after) * mask[:, t]
        advantages[:, t] = after
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """To mean 0 and variance 1 over the mask, 0 elsewhere: a learning rate for any reward."""
    mean = x[mask].mean()
    std = x[mask].std(correction=0)
    return torch.where(mask, (x - mean) / (std + 1e-8), 0)


def clipped_objective(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
                      clip: float) -> tuple[Tensor, Tensor]:
    """L = -Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t),  ρ = π(y_t)/π_old(y_t).

    All (B, T) -> the SUM over the mask, and the number of tokens at which the clip holds: those
    already 1 ± ε from π_old on the side that A_t pushes to. They have no gradient; on the other
    side the push back keeps its own. At ρ = 1 the gradient is that of -Σ A log π.
    """
    ratio = torch.where(mask, logps - old_logps, 0).exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.where(mask, torch.minimum(free, held), 0).sum(), (mask & (held < free)).sum()


GAIN, LEAD, MOST = 0.3, 0.5, 0.5


def next_beta(beta: float, kl: float, last_kl: float, target: float) -> float:
    """log β += GAIN clip(KL/target - 1) + LEAD clip((KL - last KL)/target), each clip to ±MOST.

    More β where KL is above its target or on its way up, by half an iteration at most; at rest
    where KL rests on its target. Ziegler et al. 2019 have the first term alone, with 0.1 and 0.2:
    2 % an iteration, over thousands. We have tens, and KL follows β about five behind: a gain
    large enough for that swings, unless the second term brakes.
    """
    def clip(x):
        return max(-MOST, min(MOST, x))

    return beta * math.exp(GAIN * clip(kl / target - 1) + LEAD * clip((kl - last_kl) / target))


class ValueModel(nn.Module):
    """V(x, y_<t): a GPT's body with a scalar head at every position."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.body = GPT(GPTConfig(**vars(gpt.config) | {"dropout": 0.0}))
        self.body.load_state_dict(gpt.state_dict())
        self.score = nn.Linear(gpt.config.n_embd, 1)
        nn.init.zeros_(self.score.weight)  # expects 0 of everything
        nn.init.zeros_(self.score.bias)

    def forward(self, idx):
        """idx (B, T) -> (B, T) float32: [b, t] is what is expected before token t is drawn, from
        the hidden state at t - 1. Column 0 is 0."""
        hidden = self.body.hidden(idx[:, :-1])
        with torch.autocast(idx.device.type, enabled=False):  # a bf16 value has 3 digits
            return F.pad(self.score(hidden.float())[..., 0], (1, 0))


# ------------------------------------------------------------------------------ the algorithm


LOGGED = "policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "value_grad_norm"


class PPO:
    """Trains `policy` in place; never changes `reference`. Both lie on one device.

    reward(prompts, completions) -> (N,) float32; context() is the autocast to run in, and fp16
    says that it is float16, whose gradients need scaling; `rows` sequences run at once.
    samples: completions drawn so far. forwards: sequences passed through π, π_ref or V so far, a
    drawn one once; the reward's own are not among them. last: (prompts, completions) of the last
    step, for another judge.
    """

    def __init__(self, policy: GPT, reference: GPT, reward: Callable, eos: int, config: PPOConfig,
                 context: Callable = nullcontext, fp16: bool = False, rows: int = 512):
        assert policy is not reference, "π_ref must stay as it is: give the policy a copy"
        device = policy.wte.weight.device
        self.policy, self.reference = policy.eval(), reference.eval()
        self.value = ValueModel(reference).to(device).eval()
        self.reward, self.eos, self.config = reward, eos, config
        self.context, self.rows = context, rows
        self.optimizer = torch.optim.Adam(
            [dict(params=m.parameters()) for m in (self.policy, self.value)],
            betas=(0.9, 0.95), fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.beta, self.kl = config.beta, 0.0  # the next step's; the last one's
        self.samples, self.forwards, self.last = 0, 0, ([], [])

    def state(self) -> dict:
        """For a checkpoint: whoever loads it goes on bit for bit."""
        return dict(policy=self.policy.state_dict(), value=self.value.state_dict(),
                    optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                    beta=self.beta, kl=self.kl, samples=self.samples, forwards=self.forwards)

    def load(self, state: dict) -> None:
        for name in ("policy", "value", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("beta", "kl", "samples", "forwards"):
            setattr(self, name, state[name])

    def step(self, step: int, prompts: list[list[int]], seed: int) -> dict[str, float]:
        """Iteration `step` of config.steps: sample, judge, learn, set the next β. What to log.

        All randomness is a function of (seed, step). kl: the mean of log π(y|x)/π_ref(y|x);
        reward: the mean score; entropy: the mean of -log π a token. These, length, eos and
        explained_variance are of the samples, before any network learns from them; beta is the
        one it learns with. The rest are means over the optimizer steps, of which approx_kl is
        KL(π_old ‖ π) a token; in the warm-up the policy's mean nothing.
        A loss or gradient that is not finite ends the iteration before it is applied, and stands
        in the row: the caller must look. In fp16 the scaler skips such a gradient, logged as 0.
        """
        c, luck = self.config, torch.Generator()
        luck.manual_seed((1_000_003 * seed + step) % 2**63)  # a stage's seed may have 48 bits
        draw = int(torch.randint(2**62, (), generator=luck))
        with self.context():
            completions = self.policy.sample(prompts, c.max_new, self.eos, draw, rows=self.rows)
        scores = self.reward(prompts, completions)
        idx, mask, lengths, (logps, ref_logps, values) = self.look(prompts, completions)
        rewards = token_rewards(scores.to(logps), logps, ref_logps, mask, self.beta)
        advantages, returns = gae(rewards, values, mask, c.gamma, c.lam)
        tokens, seen = int(mask.sum()), returns[mask]
        row = dict(
            kl=float((logps - ref_logps).sum(1).mean()), reward=float(scores.mean()),
            beta=self.beta, entropy=float(-logps.sum() / tokens), length=tokens / len(prompts),
            eos=sum(ids[-1] == self.eos for ids in completions) / len(prompts),
            explained_variance=float(1 - (seen - values[mask]).var(correction=0)
                                     / seen.var(correction=0).clamp(min=1e-8)))
        rollouts = idx, mask, logps, whiten(advantages, mask), returns
        row |= self.learn(step, rollouts, lengths, luck)
        self.last = prompts, completions
        if c.target and step >= c.warmup:
            self.beta = next_beta(self.beta, row["kl"], self.kl, c.target)
        self.kl = row["kl"]
        return row

    @torch.no_grad()
    def look(self, prompts, completions):
        """idx (N, T), mask (N, T), lengths (N,), and log π, log π_ref, V: (3, N, T), 0 outside
        the mask. log π comes by the path of training: a ratio must start at 1."""
        idx, prompt_lens, lengths = pad_rows(prompts, completions)
        mask = completion_mask(prompt_lens, lengths, idx.size(1))
        out = torch.zeros(3, *idx.shape)
        idx, mask, out = (x.to(self.policy.wte.weight.device) for x in (idx, mask, out))
        for part in lengths.argsort().split(self.rows):
            i, m = cut((idx, mask), part, lengths)
            with self.context():
                looks = (self.policy.token_logps(i, m), self.reference.token_logps(i, m),
                         self.value(i) * m)
            for whole, some in zip(out, looks):
                whole[part.to(whole.device), : i.size(1)] = some.float()
        self.samples += len(prompts)
        self.forwards += 4 * len(prompts)
        return idx, mask, lengths, out

    def learn(self, step: int, rollouts, lengths: Tensor, luck) -> dict[str, float]:
        """epochs * minibatches optimizer steps on an iteration's samples: their mean log."""
        c, logs, n = self.config, [], min(self.config.minibatches, len(lengths))
        decay = min(1, 2 * (c.steps - step) / max(1, c.steps - c.warmup))
        for group, lr in zip(self.optimizer.param_groups, (c.lr * decay, c.value_lr)):
            group["lr"] = lr
        for _ in range(c.epochs):
            for part in torch.randperm(len(lengths), generator=luck).tensor_split(n):
                logs.append(self.update(rollouts, lengths, part, step < c.warmup))
                if not all(map(math.isfinite, logs[-1].values())):
                    return logs[-1]
        return {key: sum(log[key] for log in logs) / len(logs) for key in logs[0]}

    def update(self, rollouts, lengths: Tensor, part: Tensor, warmup: bool) -> dict[str, float]:
        """One optimizer step on the samples `part`, unless its loss or gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        n = int(rollouts[1][part.to(rollouts[1].device)].sum())  # tokens
        total = torch.zeros(4, device=rollouts[0].device)
        # with a graph of two networks, which takes far more than a sampler's cache
        for rows in alike(lengths[part], rollouts[0].device, max(1, self.rows // 8)):
            some = part[rows]
            idx, mask, old_logps, advantages, returns = cut(rollouts, some, lengths)
            with self.context():
                values = self.value(idx)
                logps = old_logps if warmup else self.policy.token_logps(idx, mask)
            value_loss = 0.5 * (values - returns)[mask].square().sum()
            loss, clipped = clipped_objective(logps, old_logps, advantages, mask, self.config.clip)
            self.scaler.scale((loss + value_loss) / n).backward()
            log_ratio = (logps - old_logps).detach()[mask]
            total += torch.stack([loss.detach(), value_loss.detach(), clipped,
                                  (log_ratio.exp() - 1 - log_ratio).sum()])
        self.scaler.unscale_(self.optimizer)
        norms = [nn.utils.clip_grad_norm_(m.parameters(), self.config.max_norm)
                 for m in (self.policy, self.value)]
        overflow = self.scaler.is_enabled() and not all(norm.isfinite() for norm in norms)
        norms = torch.stack([norm.to(total) for norm in norms])  # on the CPU where no grad is
        row = dict(zip(LOGGED, torch.cat([total / n, norms]).tolist()))
        if overflow:  # this step is skipped, and the next one scaled less
            row |= dict(grad_norm=0.0, value_grad_norm=0.0)
        if all(map(math.isfinite, row.values())):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.forwards += len(part) * (1 if warmup else 2)
        return row


def cut(tensors, rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """Those rows of (N, T) tensors, without the padding that only longer ones need."""
    T = int(lengths[rows].max())
    return [x[rows.to(x.device), :T] for x in tensors]
