"""Correctness on the device, each check by itself: PASS or FAIL with its numbers.

    PYTHONPATH=. python tests/gpu/checks.py [--device cpu]

Run it in the repository's root; on a CPU only to try this file. Exit code: how many checks failed.

B sequences, T tokens, V vocabulary, C channels, P prompts, K completions per prompt.
"""

import argparse
import functools
import sys
import time
import traceback
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import MemoryRun, job_on, random_groups

import train
from dpo import completion_mask
from evaluate import sequence_kl
from experiments.ppo import PPO, PPOConfig
from gpt import GPT, GPTConfig, HeadLogps, pad_rows
from reward import ModelReward, RewardModel

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda")
device = torch.device(parser.parse_args().device)
big, HALF = device.type == "cuda", ("bf16", "fp16")
jobs = {precision: job_on(device.type, precision=precision) for precision in ("fp32", *HALF)}
config = GPTConfig(50257, 128, 8, 8, 512) if big else GPTConfig(301, 128, 1, 2, 16)
V, C, P, K = config.vocab_size, config.n_embd, 24 if big else 12, 4
torch.manual_seed(0)
base = GPT(config).eval()
with torch.no_grad():  # logits of a trained model's size, and weights far from their start
    base.wte.weight.mul_(3)
groups = random_groups(np.random.default_rng(0), V, P, *((20, 64) if big else (5, 12)))
prompts = groups.prompt_ids
flat = groups.flat(range(P))  # prompts and completions, P*K of each
few = [x[:16] for x in pad_rows(*flat)]  # idx (B, T), prompt_lens (B,), lengths (B,)
mask = completion_mask(few[1], few[2], few[0].size(1))


def base_on(device) -> GPT:
    model = GPT(config).to(device).eval()
    model.load_state_dict(base.state_dict())
    return model


def few_logps(model, precision="fp32"):
    device = model.wte.weight.device
    with jobs[precision].autocast():
        return model.token_logps(few[0].to(device), mask.to(device))


def few_grads(model, precision="fp32"):
    grads = torch.autograd.grad(few_logps(model, precision).sum(), list(model.parameters()))
    return torch.cat([g.flatten().float().cpu() for g in grads])


def fit_dpo(job, run, model, steps, lr=1e-6, ref_logps=torch.zeros(P, K), optimizer="rmsprop",
            **settings):
    batches = train.preference_batches(job.cfg, groups, ref_logps, list(range(P)))
    train.fit(job, run, model, batches, train.preference_loss(job.cfg), steps=steps, lr=lr,
              warmup=0, schedule="constant", optimizer=optimizer, **settings)


CHECKS, failed = [], []


@CHECKS.append
def token_logps_as_on_the_cpu():
    model, out = base_on(device), {}
    with torch.no_grad():
        truth = few_logps(base_on("cpu").double()).float()
        for name, precision, products, limit in (
                ("fp32", "fp32", "highest", 1e-3), ("tf32", "fp32", "high", 0.05),
                ("bf16", "bf16", "high", 0.3), ("fp16", "fp16", "high", 0.05)):
            torch.set_float32_matmul_precision(products)
            off = (few_logps(model, precision).cpu() - truth)[mask]
            out[name] = f"{off.abs().max():.2g} max, {off.mean():+.1g} mean, {off.std():.2g} sd"
            assert off.abs().max() < limit and abs(off.mean()) < limit / 5, (name, out)
    return out


@CHECKS.append
def gradients_point_where_the_cpu_s_do():
    truth, model, out = few_grads(base_on("cpu")), base_on(device), {}
    for precision in jobs:
        out[precision] = float(F.cosine_similarity(few_grads(model, precision), truth, dim=0))
        assert out[precision] > 0.999, out
    return out


@CHECKS.append
def head_against_cross_entropy_in_float64():
    h = torch.randn(300, C, device=device, requires_grad=True)
    w = torch.randn(V, C, device=device).mul_(0.1).requires_grad_()
    targets, weights = torch.randint(V, (300,), device=device), torch.rand(300, device=device)
    want = -F.cross_entropy(h.double() @ w.double().t(), targets, reduction="none")
    want = want, *torch.autograd.grad((want * weights).sum(), (h, w))
    out = {}
    for precision, job in jobs.items():
        with job.autocast():
            got = HeadLogps.apply(h, w, targets, True)
        got = got, *torch.autograd.grad((got * weights).sum(), (h, w))
        out[precision] = [float(((a - b).norm() / b.norm()).detach()) for a, b in zip(got, want)]
        assert max(out[precision]) < (0.02 if precision in HALF else 2e-3), out
    return out


@CHECKS.append
def dpo_starts_at_log_2():
    out = {}
    for precision, job in jobs.items():
        model, run = base_on(device), MemoryRun()
        ref_logps = train.score(job, model, *flat).view(P, K)
        fit_dpo(job, run, model, 1, ref_logps=ref_logps,
                check=train.starts_at_reference(job.cfg, K))
        out[precision] = run.rows[0]["margin_abs"] / job.cfg.beta
    return f"margin_abs / beta (0.2 allowed in half precision): {out}"


@CHECKS.append
def fp16_skips_an_overflow_then_learns():
    scale, steps = (2.0**40, 30) if big else (2.0**22, 12)
    overflows = functools.partial(torch.amp.GradScaler, init_scale=scale)
    for optimizer in ("adamw", "rmsprop"):
        run = MemoryRun()
        with mock.patch("torch.amp.GradScaler", overflows):
            fit_dpo(jobs["fp16"], run, base_on(device), steps, optimizer=optimizer)
        norms = [row["grad_norm"] for row in run.rows]
        assert norms[0] is None and norms[-1] is not None, norms
    return f"{norms.count(None)} of {steps} steps skipped, scale {run.state['scaler']['scale']:g}"


@CHECKS.append
def resuming_goes_on():
    ends = []
    for stops in ((6,), (3, 6)):
        run = MemoryRun()
        for steps in stops:
            model = base_on(device)
            fit_dpo(jobs["bf16"], run, model, steps, 1e-5)
        ends.append((run.rows[-1]["loss"], model.wte.weight.detach().cpu()))
    (loss, weight), (resumed, other) = ends
    assert abs(loss - resumed) < 0.02 * abs(loss) + 1e-3, (loss, resumed)
    gap = float((weight - other).abs().max())
    return f"loss {loss:.5f} and {resumed:.5f}, largest difference of a weight {gap:.2g}"


@CHECKS.append
def accumulation_is_one_large_batch():
    grads = []
    for accum in (1, 4):
        model = base_on(device)
        fit_dpo(job_on(device.type, precision="bf16", dpo_accum=accum), MemoryRun(), model, 1,
                grad_clip=0, check=lambda row: grads.append(
                    torch.cat([p.grad.flatten() for p in model.parameters()])))
    off = float((grads[0] - grads[1]).norm() / grads[0].norm())
    assert off < 0.045, off
    return f"relative difference of the gradients {off:.2g}"


@CHECKS.append
def samples_as_on_the_cpu_and_however_batched():
    model, some, out = base_on(device), prompts[:16], {}
    want = base_on("cpu").sample(some, 24, V - 1, 7)
    for precision in ("fp32", "bf16"):
        with jobs[precision].autocast():
            a, b = (model.sample(some, 24, V - 1, 7, batch_size=n) for n in (16, 5))
        out[precision] = dict(cpu=float(np.mean([x == y for x, y in zip(a, want)])),
                              batched=float(np.mean([x == y for x, y in zip(a, b)])),
                              first=float(np.mean([x[0] == y[0] for x, y in zip(a, want)])))
        assert all(len(x) <= 24 and max(x) < V for x in a)
    assert out["fp32"]["first"] >= 0.9, out
    return out


@CHECKS.append
def kl_of_a_policy_to_itself_is_0_and_else_as_on_the_cpu():
    policy, out = base_on("cpu"), {}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p), alpha=0.002)
    want = sequence_kl(policy, base_on("cpu"), *few)[0].mean()
    policy, reference = policy.to(device), base_on(device)
    for precision in ("fp32", "bf16"):
        with jobs[precision].autocast():
            got, zero = (sequence_kl(model, reference, *(x.to(device) for x in few))[0]
                         for model in (policy, reference))
        got, zero = got.mean(), zero.abs().max()
        out[precision] = f"{got:.4f} (cpu {want:.4f}), itself {zero:.1g}"
        assert zero < 1e-6 and abs(got - want) < 0.05 * want + 0.05, out
    return out


@CHECKS.append
def judge_as_on_the_cpu():
    model = RewardModel.from_gpt(base_on("cpu"), 128)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    want = ModelReward(model, V - 1)(*flat)
    got = ModelReward(model.to(device), V - 1)(*flat)
    off = float((want - got).abs().max())
    assert off < 0.02, off
    return f"largest difference {off:.2g}, ties {len(got) - len(got.unique())}"


@CHECKS.append
def ppo_s_ratio_starts_at_1():
    def sample(model, prompts, seed):
        with jobs["bf16"].autocast():
            return model.sample(prompts, 24, V - 1, seed)

    def reward(prompts, completions):
        return torch.tensor([float(len(c)) for c in completions])

    ppo = PPO(base_on(device), base_on(device), reward, sample, V - 1,
              PPOConfig(4, 1e-6, warmup=0), jobs["bf16"].autocast, batch_size=64)
    row = ppo.step(0, prompts, 0)
    assert all(np.isfinite(list(row.values()))) and row["approx_kl"] < 0.05, row
    return f"approx_kl {row['approx_kl']:.2g}, clip_fraction {row['clip_fraction']:.3f}"


began = time.time()
for check in CHECKS:
    started = time.time()
    try:
        found = check()
        print(f"PASS {check.__name__} ({time.time() - started:.1f} s): {found}", flush=True)
    except Exception as e:
        failed.append(check.__name__)
        print(f"FAIL {check.__name__}: {type(e).__name__}: {e}", flush=True)
        traceback.print_exc()
    if big:
        print(f"     peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB so far", flush=True)
print(f"{len(CHECKS) - len(failed)} passed, {len(failed)} failed in {time.time() - began:.0f} s",
      *failed)
sys.exit(len(failed))
