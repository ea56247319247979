"""What the device does with the preset imdb: one JSON object, and flags for a run that fits.

    PYTHONPATH=. python tests/gpu/bench.py --json FILE --flags FILE [--budget 440] [--device cpu]

Run it in the repository's root; on a CPU, where everything is tiny, only to try this file.

B sequences, T tokens, V vocabulary, M scored tokens, P prompts, K completions per prompt.
"""

import argparse
import functools
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import MemoryRun, job_on, random_groups

import train
from experiments.ppo import PPO, PPOConfig
from gpt import GPT, GPTConfig
from job import matmul_rate
from reward import ModelReward, RewardModel, label_loss

parser = argparse.ArgumentParser()
parser.add_argument("--json", default="bench.json")
parser.add_argument("--flags", default="flags")
parser.add_argument("--budget", type=float, default=440, help="seconds for the main run")
parser.add_argument("--limit", type=float, default=100, help="seconds: no new row after them")
parser.add_argument("--device", default="cuda")
parser.add_argument("--only", default="", help="rows, with commas between; default: all but the "
                    "last, whose compiling takes a minute")
args = parser.parse_args()
job, big, began = job_on(args.device, precision="bf16"), args.device == "cuda", time.time()
device, B, T, P = job.device, *((128, 256, 200) if big else (8, 32, 24))
config = GPTConfig(50257, T, 8, 8, 512) if big else GPTConfig(301, T, 2, 2, 16)
V, rng, MANY = config.vocab_size, np.random.default_rng(0), 2048 if big else 8
out = dict(device=torch.cuda.get_device_name() if big else "cpu", torch=torch.__version__)
longest = 64 if big else 8
groups = random_groups(rng, V, P, longest // 2, longest)
many = [groups.prompt_ids[i % P] for i in range(MANY)]


def sync() -> None:
    if big:
        torch.cuda.synchronize()


def timed(work, n: int = 20, warm: int = 3) -> float:
    """The median of n calls, in seconds, after `warm` that do not count."""
    seconds = []
    for _ in range(warm + (n if big else 2)):
        sync()
        started = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm:])


def new_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**vars(config) | dict(dropout=dropout))).to(device)


def fit_rates(model, batches, loss_fn, steps: int, job=job, **settings) -> dict:
    """Medians of train.fit's own log, and the wall time per step with everything between."""
    run = MemoryRun()
    sync()
    started = time.perf_counter()
    train.fit(job, run, model, batches, loss_fn, steps=steps, **settings)
    sync()
    wall, rows = (time.perf_counter() - started) / steps, run.rows[len(run.rows) // 3:]
    median = {k: statistics.median(r[k] for r in rows) for k in ("seconds", "mfu", "tokens_per_s")}
    return dict(ms=1e3 * median.pop("seconds"), wall_ms=1e3 * wall, **median,
                first_s=run.rows[0]["seconds"])


def lm_batches(step: int):
    lengths = rng.integers(T // 2, T + 1, B) if big else np.full(B, T)
    lengths[0] = T
    real = np.arange(T + 1) <= lengths[:, None]
    idx = np.where(real, rng.integers(0, V, (B, T + 1)), 0)
    return [dict(idx=idx, mask=real & (np.arange(T + 1) > 0), lengths=lengths + 1)], \
        int(lengths.sum())


SFT = dict(batches=lm_batches, loss_fn=train.lm_loss, lr=1e-3, warmup=4, weight_decay=0.1)
DPO = dict(batches=train.preference_batches(job.cfg, groups, torch.zeros(P, 4), list(range(P))),
           loss_fn=train.preference_loss(job.cfg), lr=1e-6, warmup=4, schedule="linear",
           optimizer="rmsprop")
ROWS = []


@ROWS.append
def peak():
    n = 8192 if big else 64
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product = timed(lambda: a @ a, 50, 30)
    vector = torch.randn(2**28 if big else 2**10, device=device)
    copy = timed(lambda: vector.clone(), 20)
    return dict(tflops=2 * n**3 / product / 1e12, by_fit=matmul_rate(device, "bf16") / 1e12,
                copy_TB_s=8 * vector.numel() / copy / 1e12)


@ROWS.append
def head_products():
    """TFLOP/s of the head's three products, V as it is and as a multiple of 64."""
    found, M, C = {}, 23_442 if big else 50, config.n_embd
    h = torch.randn(M, C, device=device, dtype=torch.bfloat16)
    for columns in (V, -(-V // 64) * 64):
        w = torch.randn(columns, C, device=device, dtype=torch.bfloat16)
        g = torch.randn(M, columns, device=device, dtype=torch.bfloat16)
        flops = 2 * M * columns * C / 1e12
        found[columns] = dict(forward=flops / timed(lambda: h @ w.t(), 10),
                              dh=flops / timed(lambda: g @ w, 10),
                              dw=flops / timed(lambda: g.t() @ h, 10))
    return found


@ROWS.append
def sft():
    return fit_rates(new_model(0.1), steps=40 if big else 3, **SFT)


@ROWS.append
def dpo_step():
    model = new_model()
    found = fit_rates(model, steps=80 if big else 3, **DPO)
    if big:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            fit_rates(model, steps=3, **DPO)
            torch.cuda.set_sync_debug_mode("default")
        found["syncs_in_3_steps"] = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught})
        found["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


@ROWS.append
def sampling():
    """Completions per second, by how many are sampled at once."""
    model, found = new_model().eval(), {}
    for n in ((job.batch_size(), 2048) if big else (4,)):
        with job.autocast():
            model.sample(many[:64], 8, -1, 0, batch_size=n)
            sync()
            started = time.perf_counter()
            model.sample(many, 64 if big else 8, -1, 0, batch_size=n)
        found[n] = MANY / (time.perf_counter() - started)
    return found


@ROWS.append
def judge():
    """Completions per second, by how many are scored at once."""
    model, completions = RewardModel.from_gpt(new_model(), T).to(device), \
        [groups.completion_ids[i % P][0] for i in range(MANY)]
    return {n: MANY / timed(functools.partial(
        ModelReward(model, V - 1, batch_size=n), many, completions), 3, 1)
        for n in ((256, 1024) if big else (4,))}


@ROWS.append
def reward_step():
    n, n_ctx, crop = (64, 512, 72) if big else (4, T, 8)

    def batches(step):
        made = []
        for most in (n_ctx, crop):
            made.append(dict(idx=rng.integers(0, V, (n, most)),
                             lengths=rng.integers(most // 2, most + 1, n),
                             labels=rng.integers(0, 2, n).astype(np.float32)))
        return made, 2 * n

    return fit_rates(RewardModel.from_gpt(new_model(), n_ctx, 0.1).to(device), batches, label_loss,
                     20 if big else 2, lr=1e-4, warmup=2, weight_decay=0.1)


@ROWS.append
def ppo_iteration():
    def sample(model, prompts, seed):
        with job.autocast():
            return model.sample(prompts, longest, V - 1, seed, batch_size=job.batch_size())

    ppo = PPO(new_model(), new_model(), lambda _, c: torch.rand(len(c)), sample, V - 1,
              PPOConfig(4, 1e-6, warmup=0), job.autocast, job.batch_size())
    seconds = []
    for i in range(3 if big else 1):
        sync()
        started = time.perf_counter()
        ppo.step(i, many[:1024], 0)
        seconds.append(time.perf_counter() - started)
    return dict(s=min(seconds), first_s=seconds[0])


@ROWS.append
def profile():
    """Where the GPU's and the CPU's time goes in three steps of each kind: a table in a file."""
    activity = torch.profiler.ProfilerActivity
    for name, model, stage in (("sft", new_model(0.1), SFT), ("dpo", new_model(), DPO)):
        with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * big) as seen:
            train.fit(job, MemoryRun(), model, steps=3, **stage)
        key = "self_device_time_total" if big else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70)
        Path(args.json.replace(".json", f"-{name}.txt")).write_text(table)
    return "written"


@ROWS.append
def sft_compiled():
    return fit_rates(new_model(0.1), steps=30 if big else 2,
                     job=job_on(args.device, precision="bf16", compile=True), **SFT)


def measured(row: str, key, otherwise: float) -> float:
    return out[row][key] if isinstance(out.get(row), dict) else otherwise


def main_run_flags() -> dict:
    """Settings of a main run that fits: a quarter of the budget for SFT's steps, a twentieth for
    r*'s, a twentieth for the samples of the groups and of the optimum (32,768 for that one)."""
    sft_ms, reward_ms = measured("sft", "wall_ms", 50), measured("reward_step", "wall_ms", 35)
    per_s = measured("sampling", job.batch_size() if big else 4, 3000)
    sft_steps = max(300, int(min(6000, 0.25 * args.budget * 1e3 / sft_ms)) // 100 * 100)
    reward_steps = int(min(1500, 0.05 * args.budget * 1e3 / reward_ms)) // 50 * 50
    prompts = int(min(25_000, max(2_000, (0.05 * args.budget * per_s - 32_768) / 4)))
    return dict(sft_steps=sft_steps, sft_warmup=max(50, sft_steps // 20),
                reward_steps=max(200, reward_steps), prompts=prompts // 500 * 500)


wanted = args.only.split(",") if args.only else [row.__name__ for row in ROWS[:-1]]
for row in ROWS:
    if row.__name__ in wanted and time.time() - began < args.limit:
        try:
            out[row.__name__] = row()
        except Exception as e:
            out[row.__name__] = f"{type(e).__name__}: {e}"
            torch.cuda.empty_cache() if big else None
        print(f"{row.__name__} ({time.time() - began:.0f} s): {out[row.__name__]}", flush=True)
        Path(args.json).write_text(json.dumps(out, indent=1, default=str))
flags = main_run_flags() if isinstance(out.get("sft"), dict) else {}
text = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
Path(args.flags).write_text(text)
print("flags:", text)
