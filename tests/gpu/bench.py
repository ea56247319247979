"""Measures the device at the presets' sizes. Writes a JSON object, and flags for a main run that
fits into the time budget.

    PYTHONPATH=. python tests/gpu/bench.py --json FILE --flags FILE [--budget 440] [--device cpu]

Run it in the repository's root. On a CPU everything is tiny, only to try this file. The rows run in
the order of this file, the most important first, and none starts after the limit. If it is run
again with the same FILE, it goes on with the missing rows.

B sequences, T tokens, V vocabulary, M scored tokens, P prompts, K completions per prompt.
"""

import argparse
import copy
import functools
import gc
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import MemoryRun, job_on, random_groups

import dpo
import train
from experiments.ppo import PPO, PPOConfig
from gpt import GPT, GPTConfig
from job import matmul_rate
from reward import ModelReward, RewardModel, label_loss
from support import hf_gpt2
from support.settings import PRESETS

parser = argparse.ArgumentParser()
parser.add_argument("--json", default="bench.json")
parser.add_argument("--flags", default="flags")
parser.add_argument("--budget", type=float, default=440, help="seconds for the main run")
parser.add_argument("--limit", type=float, default=100, help="seconds after which no row starts")
parser.add_argument("--device", default="cuda")
parser.add_argument("--only", default="", help="rows, with commas between them; default: all, on a "
                    "CPU without the compiled ones, which take minutes")
args = parser.parse_args()
job, big, began = job_on(args.device, precision="bf16"), args.device == "cuda", time.time()
fp16 = job_on(args.device, precision="fp16")
device, P, longest, MANY = job.device, *((200, 64, 2048) if big else (24, 8, 8))
V, rng = 50257 if big else 301, np.random.default_rng(0)
made = Path(args.json)
out = json.loads(made.read_text()) if made.exists() else dict(
    device=torch.cuda.get_device_name() if big else "cpu", torch=torch.__version__)
groups = random_groups(rng, V, P, longest // 2, longest)
many = [groups.prompt_ids[i % P] for i in range(MANY)]
ESTIMATE_GB = {"imdb": 10, "gpt2": 31, "gpt2-large": 48}  # of SFT, calculated without a GPU


def sync() -> None:
    if big:
        torch.cuda.synchronize()


def timed(work, n: int = 20, warm: int = 3) -> float:
    """The median time of n calls in seconds. `warm` calls before do not count."""
    seconds = []
    for _ in range(warm + (n if big else 2)):
        sync()
        started = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm:])


def new_model(dropout: float = 0.0, preset: str = "imdb") -> GPT:
    """The preset's GPT with random weights."""
    c = PRESETS[preset]
    sizes = (c.n_ctx, c.n_layer, c.n_head, c.n_embd) if big else (32, 2, 2, 16)
    torch.manual_seed(0)
    with device:  # a CPU would take seconds for the weights of gpt2-large
        return GPT(GPTConfig(V, *sizes, dropout))


def fit_rates(model, batches, loss_fn, steps: int, job=job, **settings) -> dict:
    """Medians of train.fit's log, the wall time per step without the first step, and the peak
    memory."""
    run = MemoryRun()
    gc.collect()  # frees the model of the last row
    if big:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sync()
    started = time.perf_counter()
    train.fit(job, run, model, batches, loss_fn, steps=steps, **settings)
    sync()
    wall, first = time.perf_counter() - started, run.rows[0]["seconds"]
    median = {k: statistics.median(row[k] for row in run.rows[steps // 3:])
              for k in ("seconds", "mfu", "tokens_per_s")}
    memory = torch.cuda.max_memory_allocated() / 1e9 if big else None
    return dict(ms=1e3 * median.pop("seconds"), wall_ms=1e3 * (wall - first) / (steps - 1),
                **median, first_s=first, peak_GB=memory)


def sft_settings(preset: str) -> dict:
    """Arguments for train.fit: batches of the preset's size, with one window of the full context.
    """
    c = PRESETS[preset]
    B, T = (c.sft_batch // c.sft_accum, c.n_ctx) if big else (4, 32)

    def micro_batch() -> dict:
        lengths = rng.integers(T // 2, T + 1, B)
        lengths[0] = T
        real = np.arange(T + 1) <= lengths[:, None]
        idx = np.where(real, rng.integers(0, V, (B, T + 1)), 0)
        return dict(idx=idx, mask=real & (np.arange(T + 1) > 0), lengths=lengths + 1)

    def batches(step: int):
        micro_batches = [micro_batch() for _ in range(c.sft_accum)]
        return micro_batches, sum(int(m["mask"].sum()) for m in micro_batches)

    return dict(batches=batches, loss_fn=train.lm_loss, lr=1e-4, warmup=4, weight_decay=0.1)


SFT = sft_settings("imdb")
DPO = dict(batches=train.preference_batches(job.cfg, groups, torch.zeros(P, 4), list(range(P))),
           loss_fn=train.preference_loss(job.cfg), lr=1e-6, warmup=4, schedule="linear",
           optimizer="rmsprop")
PAIRS = 6 * job.cfg.dpo_batch  # per step


def dpo_rates(model, steps: int, job=job) -> dict:
    found = fit_rates(model, steps=steps, job=job, **DPO)
    return found | dict(pairs_per_s=1e3 * PAIRS / found["wall_ms"])


ROWS = []


@ROWS.append
def peak():
    n = 8192 if big else 64
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product = timed(lambda: a @ a, 50, 30)
    vector = torch.randn(2**28 if big else 2**10, device=device)
    copying = timed(lambda: vector.clone(), 20)
    return dict(tflops=2 * n**3 / product / 1e12, by_fit=matmul_rate(device, "bf16") / 1e12,
                copy_TB_s=8 * vector.numel() / copying / 1e12)


@ROWS.append
def sft():
    return fit_rates(new_model(0.1), steps=40 if big else 3, **SFT) | dict(
        estimate_GB=ESTIMATE_GB["imdb"])


@ROWS.append
def reward_step():
    n, n_ctx, crop = (64, 512, 72) if big else (4, 32, 8)

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
def sampling():
    """Completions per second, by the number that is sampled at once."""
    model, found = new_model().eval(), {}
    for n in ((512, MANY) if big else (4,)):
        with job.autocast():
            model.sample(many[:64], 8, -1, 0, batch_size=n)
            sync()
            started = time.perf_counter()
            model.sample(many, longest, -1, 0, batch_size=n)
        found[str(n)] = MANY / (time.perf_counter() - started)
    return found


@ROWS.append
def dpo_step():
    model = new_model()
    found = dpo_rates(model, 80 if big else 3)
    if big:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            fit_rates(model, steps=3, **DPO)
            torch.cuda.set_sync_debug_mode("default")
        found["syncs_in_3_steps"] = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught})
    return found


@ROWS.append
def profile():
    """Per step: operations, kernels, the GPU's busy time, and the time of a step without profiler.
    If the busy time is much shorter, the GPU waits for launches. Tables are written to files."""
    activity, found = torch.profiler.ProfilerActivity, {}

    def profiled(model, settings, steps: int):
        with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * big) as seen:
            train.fit(job, MemoryRun(), model, steps=steps, **settings)
        events = [e for e in seen.events() if not e.is_user_annotation]
        kernels = [e.time_range.elapsed_us() for e in events if e.device_type.name == "CUDA"]
        operations = [e for e in events if e.name.startswith("aten::") and not (
            e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]
        return seen, np.array([len(operations), len(kernels), sum(kernels) / 1e3])

    for name, model, settings in (("dpo_step", new_model(), DPO), ("sft", new_model(0.1), SFT)):
        _, once = profiled(model, settings, 1)  # one step, and the work that fit does once
        seen, more = profiled(model, settings, 3)
        found[name] = dict(zip(("operations", "kernels", "gpu_ms"), ((more - once) / 2).tolist()),
                           step_ms=measured(name, "ms", None))
        key = "self_device_time_total" if big else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70)
        Path(args.json.replace(".json", f"-{name}.txt")).write_text(table)
    return found


def steps_of(preset: str) -> dict:
    """Steps of SFT and DPO at the preset's sizes: their time and memory, and the estimate."""
    return dict(
        sft=fit_rates(new_model(PRESETS[preset].dropout, preset), steps=3, **sft_settings(preset)),
        estimate_GB=ESTIMATE_GB[preset], dpo=dpo_rates(new_model(0.0, preset), 3))


@ROWS.append
def gpt2_large():
    return steps_of("gpt2-large")


@ROWS.append
def gpt2():
    return steps_of("gpt2")


def peer_of(model: GPT, folder: str):
    """transformers' GPT2LMHeadModel with our weights, through files in this folder."""
    from transformers import AutoModelForCausalLM

    hf_gpt2.save(model, Path(folder))
    return AutoModelForCausalLM.from_pretrained(folder).to(device)


@ROWS.append
def generate():
    """New tokens per second of our sampler and of `generate` with weights in bf16, by batch size.
    Prompts have 8 tokens and no completion ends early, so that there is no padding."""
    ours, found = new_model().eval(), {}
    with tempfile.TemporaryDirectory() as folder:
        peer = peer_of(ours, folder).to(torch.bfloat16).eval()
    for n in ((128, MANY) if big else (4,)):
        prompts = torch.randint(V, (n, 8), device=device)
        seconds = timed(lambda: peer.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
            max_new_tokens=longest, eos_token_id=None, pad_token_id=0), 1, 1)
        with job.autocast():
            our_seconds = timed(lambda: ours.sample(prompts.tolist(), longest, -1, 0, batch_size=n),
                                1, 1)
        found[n] = dict(ours=n * longest / our_seconds, generate=n * longest / seconds)
    return found


@ROWS.append
def trl():
    """Pairs per second of TRL's DPOTrainer at its fastest, and ours of the row dpo_step: in bf16,
    with π_ref's log-probs computed before, without gradient checkpointing, equally many pairs."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            sync()
            ends.append(time.perf_counter())

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it holds token ids already

    yw, yl, _ = dpo.preference_pairs(torch.from_numpy(groups.rewards))
    _, completions = groups.flat(range(P))
    rows = [dict(prompt_ids=groups.prompt_ids[w // 4], chosen_ids=completions[w],
                 rejected_ids=completions[l]) for w, l in zip(yw.tolist(), yl.tolist())]
    tokenizer = PreTrainedTokenizerFast(  # only its padding id is used
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), eos_token="<pad>",
        pad_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        policy = peer_of(new_model(), folder)
        config = DPOConfig(
            output_dir=folder, max_steps=24 if big else 3, per_device_train_batch_size=PAIRS,
            bf16=True, use_cpu=not big, beta=job.cfg.beta, learning_rate=1e-6, report_to=[],
            save_strategy="no", disable_tqdm=True, precompute_ref_log_probs=True,
            gradient_checkpointing=False)
        Trainer(policy, copy.deepcopy(policy), args=config, processing_class=tokenizer,
                train_dataset=Dataset.from_list(rows), callbacks=[Clock()]).train()
    return dict(trl=PAIRS / float(np.median(np.diff(ends)[len(ends) // 4:])),
                ours=measured("dpo_step", "pairs_per_s", None))


@ROWS.append
def dpo_fp16():
    return dpo_rates(new_model(), 40 if big else 3, fp16)


@ROWS.append
def sft_fp16():
    return fit_rates(new_model(0.1), steps=20 if big else 3, job=fp16, **SFT)


@ROWS.append
def ppo_iteration():
    def sample(model, prompts, seed):
        with job.autocast():
            return model.sample(prompts, longest, V - 1, seed, batch_size=job.batch_size(model))

    policy = new_model()
    ppo = PPO(policy, new_model(), lambda _, c: torch.rand(len(c)), sample, V - 1,
              PPOConfig(4, 1e-6, warmup=0), job.autocast, job.batch_size(policy))
    seconds = []
    for i in range(3 if big else 1):
        sync()
        started = time.perf_counter()
        ppo.step(i, many[:1024], 0)
        seconds.append(time.perf_counter() - started)
    return dict(s=min(seconds), first_s=seconds[0])


@ROWS.append
def judge():
    """Completions per second, by the number that is scored at once."""
    model, completions = RewardModel.from_gpt(new_model(), 256 if big else 32).to(device), \
        [groups.completion_ids[i % P][0] for i in range(MANY)]
    return {n: MANY / timed(functools.partial(
        ModelReward(model, V - 1, batch_size=n), many, completions), 3, 1)
        for n in ((256, 1024) if big else (4,))}


@ROWS.append
def head_products():
    """TFLOP/s of the head's three products, with V and with V rounded up to a multiple of 64."""
    found, M, C = {}, 23_442 if big else 50, 512 if big else 16
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
def sft_compiled():
    return fit_rates(new_model(0.1), steps=30 if big else 2,
                     job=job_on(args.device, precision="bf16", compile=True), **SFT)


@ROWS.append
def dpo_compiled():
    return dpo_rates(new_model(), 60 if big else 2,
                     job_on(args.device, precision="bf16", compile=True))


def measured(row: str, key, otherwise):
    return out[row][key] if isinstance(out.get(row), dict) else otherwise


def main_run_flags() -> str:
    """Flags of a main run that fits into the budget: a quarter of it for SFT's steps, a twentieth
    for r*'s, a twentieth for samples (of the groups, and 32,768 for the optimum)."""
    sft_ms, reward_ms = measured("sft", "wall_ms", 50), measured("reward_step", "wall_ms", 35)
    per_s = measured("sampling", str(MANY if big else 4), 3000)
    sft_steps = max(300, int(min(6000, 0.25 * args.budget * 1e3 / sft_ms)) // 100 * 100)
    reward_steps = int(min(1500, 0.05 * args.budget * 1e3 / reward_ms)) // 50 * 50
    prompts = int(min(25_000, max(2_000, (0.05 * args.budget * per_s - 32_768) / 4)))
    flags = dict(sft_steps=sft_steps, sft_warmup=max(50, sft_steps // 20),
                 reward_steps=max(200, reward_steps), prompts=prompts // 500 * 500)
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())


for row in ROWS:
    name = row.__name__
    wanted = name in args.only.split(",") if args.only else big or "compiled" not in name
    if wanted and not isinstance(out.get(name), dict) and time.time() - began < args.limit:
        try:
            out[name] = row()
        except Exception as e:
            out[name] = f"{type(e).__name__}: {e}"
        print(f"{name} ({time.time() - began:.0f} s): {out[name]}", flush=True)
        made.write_text(json.dumps(out, indent=1, default=str))
        if isinstance(out.get("sft"), dict):
            Path(args.flags).write_text(main_run_flags())
print("flags:", main_run_flags())
