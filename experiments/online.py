"""Online DPO: π_θ draws fresh groups while it learns. Section 7 leaves this as an open question.

    python train.py --stage online                       r* labels the fresh groups
    python train.py --stage online --online-labels self  π_θ's own r̂ labels them

It is stage dpo with other batches, and with the same number of updates. The first online_start
steps use the stored groups. After them π_θ draws groups for training prompts, and draws new ones
every online_every steps.

P prompts, K completions per prompt.
"""

from collections.abc import Callable

import numpy as np
import torch

import dpo
from data_imdb import gather_groups
from evaluate import report
from experiments.baselines import all_groups
from gpt import GPT
from job import Job, seed_of
from support.runs import Run
from support.settings import Settings
from train import (STAGES, Completions, Stage, dpo_stage, needs, parents_of_groups,
                   preference_batches, score)


class FreshGroups:
    """The groups of the current round. A round is online_every steps.

    A checkpoint holds the completions and their rewards, because π_θ changes after it drew them.
    """

    def __init__(self, job: Job, policy: GPT, stored: Callable):
        self.job, self.policy, self.reference = job, policy, job.load_reference()
        self.stored = stored  # batches(step) of the stored groups
        self.round, self.completions, self.rewards = -1, Completions(), torch.empty(0)
        self.of_round = None  # batches(step) of the round

    def state_dict(self) -> dict:
        return dict(round=self.round, completions=self.completions.state_dict(),
                    rewards=self.rewards)

    def load_state_dict(self, state: dict) -> None:
        self.round, self.rewards = state["round"], state["rewards"]
        self.completions.load_state_dict(state["completions"])

    def __call__(self, step: int):
        """batches(step) for `fit`."""
        if step < self.job.cfg.online_start:
            return self.stored(step)
        number, i = divmod(step - self.job.cfg.online_start, self.job.cfg.online_every)
        if number != self.round:
            self.round, self.of_round = number, None
            self.draw()
        if not self.of_round:  # also after a checkpoint was loaded
            self.prepare()
        return self.of_round(i)

    def seed(self, what: str) -> int:
        return seed_of(self.job.cfg, f"online {self.job.cfg.run_seed} {what}", self.round)

    def prompts(self) -> list[list[int]]:
        """Training prompts in random order, one per group of the round: (P,)."""
        cfg, order = self.job.cfg, np.random.default_rng(self.seed("prompts"))
        picks = np.resize(order.permutation(self.job.split[0]), cfg.online_every * cfg.dpo_batch)
        return [self.job.groups.prompt_ids[i] for i in picks]

    def draw(self) -> None:
        """Draw completions of π_θ and label them: by r*, or by r̂ of the present π_θ."""
        job, prompts = self.job, [p for p in self.prompts() for _ in range(self.job.groups.K)]
        self.completions[:] = job.sample(self.policy, prompts, self.seed("samples"))
        if job.cfg.online_labels == "r*":
            self.rewards = job.reward(prompts, self.completions)
        else:
            logps, ref_logps = (score(job, model, prompts, self.completions)
                                for model in (self.policy, self.reference))
            self.rewards = dpo.implicit_reward(logps, ref_logps, job.cfg.beta)

    def prepare(self) -> None:
        """Make the round's groups, their reference log-probs and the order of its batches."""
        groups = gather_groups(self.prompts(), self.completions, self.rewards.numpy())
        every = range(len(groups.rewards))
        ref_logps = score(self.job, self.reference, *groups.flat(every)).view(-1, groups.K)
        self.of_round = preference_batches(self.job.cfg, groups, ref_logps, [*every])


def online(job: Job, run: Run) -> None:
    """Groups -> π_θ by Eq. 7: first on the stored groups, then on fresh ones."""
    dpo_stage(job, run, FreshGroups)


def online_parents(cfg: Settings) -> list[str]:
    needs(cfg.loss != "pairwise", f"--stage online learns from pairs: leave --loss {cfg.loss} out",
          [])
    needs(cfg.online_start >= cfg.dpo_steps, f"--online-start {cfg.online_start} leaves none of "
          f"{cfg.dpo_steps} steps for fresh groups: give an --online-start below --dpo-steps", [])
    all_groups(cfg, "online", [])
    needs(cfg.online_labels == "r*" and bool(cfg.groups), "--groups names a preference file, and "
          "there is no r* for fresh completions: give --online-labels self", [])
    return needs(cfg.online_labels == "self" and cfg.online_start == 0, "at π_ref every r̂ is 0 "
                 "and labels no pair: give an --online-start above 0",
                 ["groups", *parents_of_groups(cfg)])


STAGES["online"] = Stage(online, online_parents, report=lambda job: report(job, "online"))
