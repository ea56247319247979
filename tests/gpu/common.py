"""Shared by test_device.py and bench.py: a job without a corpus, a run without a folder, groups."""

from dataclasses import replace
from pathlib import Path

from data_imdb import Groups
from job import Job
from support.settings import PRESETS


def job_on(device: str, **changes) -> Job:
    """A job of the preset imdb on this device. Only job.data would read the corpus."""
    return Job("imdb", replace(PRESETS["imdb"], device=device, **changes), [])


def random_groups(rng, vocab_size: int, n: int, shortest: int, longest: int) -> Groups:
    """n prompts of 3 to 9 random tokens, each with 4 completions of random lengths and rewards."""
    def ids(low, high):
        return rng.integers(0, vocab_size, rng.integers(low, high + 1)).tolist()

    return Groups([ids(3, 9) for _ in range(n)],
                  [[ids(shortest, longest) for _ in range(4)] for _ in range(n)],
                  rng.random((n, 4), dtype="float32"), True)


class MemoryRun:
    """A run for train.fit that keeps its rows and its last checkpoint in memory."""

    def __init__(self, stage: str = "dpo"):
        self.about, self.folder, self.rows, self.state = dict(stage=stage), Path(stage), [], {}
        self.log = self.rows.append

    def load_checkpoint(self, parts: dict, steps: int) -> int:
        for name, part in parts.items() if self.state else ():
            part.load_state_dict(self.state[name])
        return self.state.get("step", 0)

    def checkpoint(self, state: dict) -> None:
        self.state = state
