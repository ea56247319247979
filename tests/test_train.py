"""Laws of train.py: the loop equals the textbook's formulas, for any division of a batch and any
number of stops; DPO starts at π_θ = π_ref; all numbers in a stage's files can be computed again."""

import copy
import functools
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (CLOCK, CTRL_C, KILL, SENTENCE, TINY, Waits, command, folder, in_child,
                      refused, same, stopped, stopped_and_finished, without_clock)

import data_imdb
import dpo
import train
from data_imdb import Groups, Tokens
from gpt import GPT, GPTConfig, pad_rows
from job import Job, seed_of
from reward import ToyReward
from support import hf_gpt2, toy_reviews
from support.runs import (Run, UserError, file_hash, json_hash, load_tensors, main_exit,
                          read_json, read_rows)
from support.settings import OTHER_LOSSES, Settings, settings_of
from train import lm_loss, preference_batches, score, starts_at_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
V, N_CTX, EOT = 20, 24, 19
CFG = replace(Settings(), device="cpu", precision="fp32", n_ctx=N_CTX, save_secs=math.inf,
              dpo_batch=7, beta=0.5)


def make_model(dropout=0.0, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(V, N_CTX, 1, 2, 8, dropout)).to(dtype)
    with torch.no_grad():  # larger than the first weights, so that samples differ
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def reviews(n=60):
    rng = np.random.default_rng(0)
    parts = [[EOT, *rng.integers(0, V - 1, rng.integers(3, 30))] for _ in range(n)]
    return Tokens(np.array([*itertools.chain(*parts), EOT], np.uint16),
                  np.cumsum([0, *map(len, parts)]))


def make_groups(P=23, K=4, ties=True):
    """Completions of 1 to 14 tokens; rewards from 0 to 1, two of them often equal."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(0, V, rng.integers(low, high)).tolist()

    rewards = np.argsort(rng.random((P, K)), axis=1)
    if ties:
        rewards = np.concatenate([rewards[:, :2] + K, rng.integers(0, 3, (P, K - 2))], axis=1)
    return Groups([[EOT, *ids(1, 8)] for _ in range(P)],
                  [[ids(1, 15) for _ in range(K)] for _ in range(P)],
                  (rewards / 8).astype(np.float32), True)


def problem(kind, model, cfg=CFG, noise=0.0, groups=None):
    """batches and loss_fn of a small task, "lm" or "dpo", and other arguments for `fit`."""
    if kind == "lm":
        return data_imdb.lm_batches(reviews(), N_CTX, 12, cfg.sft_accum, 1), lm_loss, dict(
            steps=6, lr=1e-2, warmup=2, weight_decay=0.1)
    groups = groups or make_groups()
    P, reference = len(groups.rewards), copy.deepcopy(model).float().eval()
    ref_logps = score(Job("toy", cfg, []), reference, *groups.flat(range(P)))
    ref_logps += noise * torch.randn(len(ref_logps), generator=torch.Generator().manual_seed(1))
    return (preference_batches(cfg, groups, ref_logps.view(P, -1), list(range(P))),
            train.preference_loss(cfg), dict(
                steps=6, lr=1e-3, warmup=2, schedule="linear", optimizer="rmsprop",
                unit="groups" if cfg.loss == "plackett-luce" else "pairs"))


def trained(path, kind, model, cfg=CFG, noise=0.0, groups=None, wrap=lambda batches: batches,
            stage=None, **changes):
    """Trains `model` with `fit` in `path`, where a run may go on. Returns the metrics."""
    batches, loss_fn, options = problem(kind, model, cfg, noise, groups)
    with Run(path, {}, {}, about=dict(stage=stage or {"lm": "sft"}.get(kind, kind))) as run:
        train.fit(Job("toy", cfg, []), run, model, wrap(batches),
                  changes.pop("loss_fn", loss_fn), **options | changes)
        return run.metrics()


def stops_at(step):
    def wrap(batches):
        def stopping(i):
            if i == step:
                raise KeyboardInterrupt
            return batches(i)
        return stopping
    return wrap


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------ the loop


def by_hand(model, batches, loss_fn, rates, optimizer, weight_decay, grad_clip):
    """The formulas of Adam and RMSprop, on the mean over all terms of a step."""
    params = list(model.parameters())
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for t, lr in enumerate(rates, 1):
        (micro_batch,), n = batches(t - 1)
        loss, _ = loss_fn(model, {k: torch.as_tensor(x) for k, x in micro_batch.items()})
        grads = torch.autograd.grad(loss / n, params)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for p, g, a, b in zip(params, grads, m, v):
            g = g * min(1, grad_clip / norm)
            if optimizer == "adamw":
                a.mul_(0.9).add_(0.1 * g), b.mul_(0.95).add_(0.05 * g**2)
                step = a / (1 - 0.9**t) / ((b / (1 - 0.95**t)).sqrt() + 1e-8)
                step += weight_decay * p.detach() * (p.dim() == 2)
            else:
                b.mul_(0.99).add_(0.01 * g**2)
                step = g / (b.sqrt() + 1e-8)
            p.data -= lr * step


COSINE = [0.05 + 0.95 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]


@pytest.mark.parametrize("kind, optimizer, schedule, factors", [
    ("lm", "adamw", "cosine", COSINE), ("lm", "rmsprop", "constant", [1, 1, 1, 1]),
    ("dpo", "rmsprop", "linear", [1, 3 / 4, 2 / 4, 1 / 4])])
def test_fit_is_the_optimizer_s_formula_on_the_mean_of_all_terms(
        tmp_path, kind, optimizer, schedule, factors):
    """With warm-up, clipping, weight decay of matrices only, and micro-batches of unequal size."""
    one, many = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    batches, loss_fn, _ = problem(kind, one)
    rates = [0.02 * f for f in (1 / 2, 1, *factors)]
    rows = trained(tmp_path, kind, many, replace(CFG, sft_accum=5, dpo_accum=3), lr=0.02,
                   optimizer=optimizer, schedule=schedule, weight_decay=0.1, grad_clip=0.3)
    by_hand(one, batches, loss_fn, rates, optimizer, 0.1, 0.3)
    assert [r["lr"] for r in rows] == pytest.approx(rates, rel=1e-5)
    assert max(r["grad_norm"] for r in rows) > 0.3, "nothing was clipped, so nothing is shown"
    assert (weights(one) - weights(make_model())).abs().max() > 1e-2, "nothing was learned"
    assert torch.allclose(weights(one), weights(many), atol=1e-6)


@pytest.mark.parametrize("accum", [2, 99])
@pytest.mark.parametrize("kind, loss", [("lm", "pairwise"), ("dpo", "pairwise"),
                                        ("dpo", "plackett-luce"), ("dpo", "unlikelihood")])
def test_accumulation_equals_one_large_batch(tmp_path, kind, loss, accum):
    """The weights and the logs are equal."""
    models, logs = [], []
    for parts in 1, accum:
        models.append(make_model(dtype=torch.float64))
        cfg = replace(CFG, loss=loss, sft_accum=parts, dpo_accum=parts)
        logs.append(without_clock(trained(tmp_path / f"{parts}", kind, models[-1], cfg, noise=0.5)))
    one, many = map(weights, models)
    assert (one - weights(make_model())).abs().max() > 1e-3, "nothing was learned"
    assert torch.allclose(one, many, atol=1e-6), f"off by {(one - many).abs().max():.1e}"
    for row, other in zip(*logs, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["lm", "dpo"])
def test_half_precision_follows_float32(tmp_path, kind, precision):
    """In the loss, and in the norm of the gradient without the scaler's factor."""
    full, half = (trained(tmp_path / p, kind, make_model(), replace(CFG, precision=p), steps=12,
                          grad_clip=0.3) for p in ("fp32", precision))
    assert full[-1]["loss"] < full[0]["loss"], "float32 itself has learned nothing"
    for key, tolerance in ("loss", 0.02), ("grad_norm", 0.1):
        assert [r[key] for r in half] == pytest.approx(
            [r[key] for r in full], rel=tolerance * (1 if precision == "fp16" else 3)), key


def test_an_overflow_of_fp16_skips_the_step_and_lowers_the_scale(tmp_path):
    """The scale is in the checkpoint: a run that was stopped goes on with the lower one."""
    before, cfg = [], replace(CFG, precision="fp16", save_secs=0)

    def overflowing(model, micro_batch):
        before.append(weights(model))
        loss, log = lm_loss(model, micro_batch)
        if len(before) == 2:  # the loss is finite, its gradient is not
            loss.register_hook(lambda slope: slope * math.inf)
        return loss, log

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "lm", make_model(), cfg, loss_fn=overflowing, wrap=stops_at(3))
    rows = trained(tmp_path, "lm", make_model(), cfg, loss_fn=overflowing)
    assert [r["grad_norm"] is None for r in rows] == [False, True] + [False] * 4
    assert torch.equal(before[1], before[2]), "the step with the overflow was taken"
    assert load_tensors(tmp_path / "resume.pt")["scaler"]["scale"] == 2**15, "half of 2**16"


@pytest.mark.parametrize("kind, optimizer, precision", [
    ("lm", "adamw", "fp32"), ("lm", "rmsprop", "bf16"), ("lm", "adamw", "fp16"),
    ("dpo", "rmsprop", "fp32")])
def test_a_run_stopped_at_any_step_ends_bit_for_bit_the_same(tmp_path, kind, optimizer, precision):
    """Dropout's draws depend on the step only. Steps after the last checkpoint are done again."""
    cfg = replace(CFG, precision=precision, sft_accum=2, dpo_accum=2)
    options, whole = dict(steps=8, optimizer=optimizer), make_model(0.2)
    rows = trained(tmp_path / "whole", kind, whole, cfg, **options)
    for step, save_secs in ((0, 0), (1, math.inf), (1, 0), (2, 0), (4, math.inf), (5, 0), (7, 0)):
        with pytest.raises(KeyboardInterrupt):  # a new process has the initial weights
            trained(tmp_path / "cut", kind, make_model(0.2), replace(cfg, save_secs=save_secs),
                    wrap=stops_at(step), **options)
    model = make_model(0.2)
    again = trained(tmp_path / "cut", kind, model, cfg, **options)
    assert torch.equal(weights(whole), weights(model)), "the weights differ after stops"
    assert without_clock(again) == without_clock(rows), "metrics.jsonl differs after stops"
    assert [r["step"] for r in again] == list(range(8))


def test_checkpoints_come_by_the_clock_and_at_the_end(tmp_path, monkeypatch):
    saved, clock = [], iter(range(0, 1000, 4))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Run, "checkpoint", lambda self, state: saved.append(state["step"]))
    trained(tmp_path, "lm", make_model(), replace(CFG, save_secs=10.0), steps=11)
    assert saved == [3, 6, 9, 11], "a step takes four seconds here"


@pytest.mark.parametrize("stage, flag, bad", [
    ("sft", "--sft-lr", "loss"), ("chosen", "--sft-lr", "gradient"),
    ("reward", "--reward-lr", "loss"), ("dpo", "--dpo-lr", "gradient")])
def test_a_number_that_is_not_finite_ends_the_run_and_leaves_its_checkpoint(
        tmp_path, stage, flag, bad):
    steps, cfg, good, never = [], replace(CFG, save_secs=0), make_model(), make_model()

    def diverging(model, micro_batch):
        steps.append(0)
        loss, log = lm_loss(model, micro_batch)
        if len(steps) == 4 and bad == "gradient":
            loss.register_hook(lambda slope: slope * math.inf)
        return (loss * math.nan if len(steps) == 4 and bad == "loss" else loss), log

    with pytest.raises(train.Diverged, match=rf"^{stage}: .*step 3;.* of step 3;.*{flag},.*fp32$"):
        trained(tmp_path, "lm", make_model(), cfg, stage=stage, loss_fn=diverging)
    trained(tmp_path, "lm", good, stage=stage)  # it goes on from the checkpoint
    trained(tmp_path / "never", "lm", never, stage=stage)
    assert torch.equal(weights(good), weights(never)), "the bad step reached the checkpoint"
    with pytest.raises(train.Diverged, match="step 0; nothing was saved"):
        trained(tmp_path / "first", "lm", make_model(), cfg, stage=stage,
                loss_fn=lambda model, x: (lm_loss(model, x)[0] * math.inf, {}))


# ------------------------------------------------------------------------------ what is logged


def test_every_step_logs_these_numbers(tmp_path):
    for row in (rows := trained(tmp_path, "dpo", make_model())):
        quantiles = [f"weight_{p}" for p in (5, 25, 50, 75, 95)]
        assert row.keys() == {
            "step", "loss", "accuracy", "margin", "margin_abs", "reward_chosen", "reward_rejected",
            "logp_chosen", "logp_rejected", "weight", *quantiles, "grad_norm", "lr",
            "tokens_per_s", "pairs_per_s", "mfu", "seconds"}
        assert all(map(math.isfinite, row.values()))
        assert [row[q] for q in quantiles] == sorted(row[q] for q in quantiles)
        apart = row["reward_chosen"] - row["reward_rejected"]
        assert row["margin"] == pytest.approx(apart, abs=1e-4)
        assert row["margin_abs"] >= abs(row["margin"]) - 1e-6
        assert min(row[k] for k in CLOCK if k in row) > 0
    assert [r["step"] for r in rows] == list(range(6))
    assert "targets_per_s" in trained(tmp_path / "lm", "lm", make_model())[0]


@pytest.mark.parametrize("kind, precision, most", [
    ("lm", "fp32", 2), ("dpo", "fp32", 2), ("dpo", "bf16", 2), ("dpo", "fp16", 3)])
def test_a_step_waits_for_a_gpu(tmp_path, kind, precision, most):
    """It waits for the number of scored tokens, for the row to log, and in fp16 for the scaler."""
    cfg = replace(CFG, precision=precision)

    def waits(steps):
        model = make_model()
        batches, loss_fn, options = problem(kind, model, cfg)
        (micro_batch,), n = batches(0)
        fixed = [micro_batch | dict(lengths=np.asarray(micro_batch["lengths"]))], n
        with Run(tmp_path / str(steps), {}, {}, about=dict(stage="dpo")) as run, Waits() as found:
            train.fit(Job("toy", cfg, []), run, model, lambda step: fixed, loss_fn,
                      **options | dict(steps=steps))
        return len(found)

    waits(1)  # the first call also measures the speed of the machine
    assert waits(4) - waits(3) == most


def test_summary_is_means_and_quantiles():
    x = torch.linspace(0, 1, 101)[torch.randperm(101)]
    parts = [dict(weight=part, other=part.double()) for part in (x[:30], x[30:])]
    got = train.summary(train.to_arrays(parts))
    assert float(got["other"]) == pytest.approx(0.5) == pytest.approx(float(got["weight"]))
    for p in (5, 25, 50, 75, 95):
        assert float(got[f"weight_{p}"]) == pytest.approx(p / 100, abs=1e-6)


def test_evaluations_are_logged_and_leave_training_as_it_was(tmp_path):
    def evaluation(model):
        torch.rand(7)  # must not change the dropout of the next step
        model.eval()
        return {"score": 1}

    plain, evaluated = make_model(0.2), make_model(0.2)
    trained(tmp_path / "a", "lm", plain, steps=10)
    rows = trained(tmp_path / "b", "lm", evaluated, steps=10, evaluation=evaluation,
                   evaluate_every=4)
    assert [r["step"] for r in rows if "eval" in r] == [3, 7, 9], "every fourth, and the last"
    assert torch.equal(weights(plain), weights(evaluated)), "an evaluation has changed the training"
    rows = trained(tmp_path / "c", "lm", make_model(), steps=40, evaluation=evaluation)
    assert [r["step"] for r in rows if "eval" in r] == [9, 19, 29, 39], "by default four in all"


def test_compile_serves_training_and_not_sampling(tmp_path, monkeypatch):
    """torch traces the model, but does not generate code, which would take a minute."""
    calls, model, plain = [], make_model(), make_model()

    def backend(graph, inputs):
        return lambda *args: (calls.append(0), graph(*args))[1]

    def evaluation(model):
        trained_by, _ = len(calls), model.sample([[EOT]], 2, EOT, 0)
        return dict(trained=trained_by, sampled=len(calls) - trained_by)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    rows = trained(tmp_path / "a", "dpo", model, replace(CFG, compile=True), steps=3,
                   evaluation=evaluation)
    evals = [r["eval"] for r in rows if "eval" in r]
    assert evals == [dict(trained=2 * n, sampled=0) for n in (1, 2, 3)], "hidden and head"
    trained(tmp_path / "b", "dpo", plain, steps=3)
    assert torch.allclose(weights(model), weights(plain), atol=1e-5)


# ------------------------------------------------------------------------------ the start of DPO


START = [("pairwise", w) for w in dpo.WEIGHTS] + [("plackett-luce", "sigmoid")]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("loss, weight", START)
def test_eq07_starts_at_log2_and_a_ranking_at_log_k_factorial(tmp_path, loss, weight, ties):
    cfg = replace(CFG, loss=loss, weight=weight)
    row = trained(tmp_path, "dpo", make_model(), cfg, groups=make_groups(ties=ties), steps=1,
                  check=starts_at_reference(cfg, 4))[0]
    assert row["margin_abs"] == pytest.approx(0, abs=1e-4)
    if loss == "plackett-luce":
        assert row["loss"] == pytest.approx(math.log(24), abs=1e-4) or \
            (ties and row["loss"] < math.log(24))
    elif weight == "sigmoid":
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["weight_5"] == pytest.approx(0.5, abs=1e-4) == \
            pytest.approx(row["weight_95"], abs=1e-4)


@pytest.mark.parametrize("cause", ["another reference", "half precision too", "dropout"])
@pytest.mark.parametrize("loss, weight", START)
def test_a_wrong_start_is_caught_before_the_first_step(tmp_path, loss, weight, cause):
    cfg = replace(CFG, loss=loss, weight=weight, precision="bf16" if "half" in cause else "fp32")
    model, start = make_model(0.3 if cause == "dropout" else 0.0), weights(make_model())
    with pytest.raises(UserError, match="0.6931.*dropout is on.*another model.*another reference"):
        trained(tmp_path, "dpo", model, cfg, noise=0.8 * (cause != "dropout"),
                groups=make_groups(ties=False), check=starts_at_reference(cfg, 4))
    assert torch.equal(weights(model), start) and not (tmp_path / "resume.pt").exists()


def test_the_start_is_checked_once(tmp_path):
    rows, cfg = [], replace(CFG, save_secs=0)
    for step in 2, 5:
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, "dpo", make_model(), cfg, check=rows.append, wrap=stops_at(step))
    assert len(rows) == 1 and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ------------------------------------------------------------------------------ batches, losses


def plain_logps(model, prompts, completions):
    """log π(y|x) of one completion at a time, without batches, masks and padding."""
    logps = []
    for prompt, completion in zip(prompts, completions):
        ids = torch.tensor([prompt + completion])
        logp = model(ids[:, :-1])[0].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        logps.append(logp[len(prompt) - 1 :].sum())
    return torch.stack(logps)


def test_a_pass_has_every_group_once_and_the_next_has_another_order():
    groups, picked = make_groups(23), []
    logps = torch.arange(23 * 4.0).view(23, 4)  # shows which completions are used
    learned = [i for i in range(23) if i % 5]
    batches, again = (preference_batches(CFG, groups, logps, learned) for _ in range(2))
    for step in range(36):  # 14 passes of 18 groups, in batches of 7
        micro_batches, n = batches(step)
        rows = torch.cat([m["ref_logps"] for m in micro_batches]).view(-1, 4)
        assert n == sum(len(m["yw_idxs"]) for m in micro_batches) and len(rows) == 7
        picked += (rows[:, 0] // 4).int().tolist()
    for i in range(0, len(picked), 18):
        assert sorted(picked[i : i + 18]) == learned, "a group twice in a pass"
    assert picked[:18] != picked[18:36], "the order is the same"
    assert torch.equal(batches(4)[0][0]["idx"], again(4)[0][0]["idx"])
    ranking = replace(CFG, loss="plackett-luce", dpo_accum=9)
    micro_batches, n = preference_batches(ranking, groups, logps, learned)(0)
    assert len(micro_batches) == n == 7, "a ranking is one term"


def labels(step=0, **changes):
    """The pairs of a pass, of 200 groups in one batch: reward gaps (N,), p (N,), N, (y_w, y_l)."""
    groups = make_groups(200)
    (m,), n = preference_batches(replace(CFG, dpo_batch=200, **changes), groups,
                                 torch.zeros(200, 4), list(range(200)))(step)
    pairs = list(zip(m["yw_idxs"].tolist(), m["yl_idxs"].tolist()))
    ids, r = m["idx"].tolist(), m["rewards"].flatten()
    gap = torch.tensor([r[w] - r[l] for w, l in pairs])
    return gap, m["p"], n, sorted((ids[w], ids[l]) for w, l in pairs)


def test_eq01_labels_are_drawn_once_and_by_the_label_scale():
    """Sampled and soft labels have all pairs, also ties. Hard labels have the ordered pairs."""
    gap, p, n, _ = labels(labels="hard")
    assert (gap > 0).all() and (p == 1).all() and n < 1200
    for scale in 1.0, 10.0:
        gap, p, n, _ = labels(labels="soft", label_scale=scale)
        assert n == 1200 and (gap >= 0).all() and torch.allclose(p, (scale * gap).sigmoid())
        drawn, ones, n, won = labels(labels="sampled", label_scale=scale)
        right = float((drawn > 0).sum() / (drawn != 0).sum())
        assert right == pytest.approx(float(p[gap > 0].mean()), abs=0.04)
        assert n == 1200 and (ones == 1).all()
    assert labels(5, labels="sampled")[3] == won, "drawn again in a later pass"
    assert labels(labels="sampled", run_seed=1)[3] != won


def test_label_noise_flips_its_share_of_the_pairs_and_in_every_pass_the_same():
    gap, p, n, won = labels(label_noise=0.2)
    true = labels()
    assert n == true[2] and (p == 1).all()
    assert float((gap < 0).float().mean()) == pytest.approx(0.2, abs=0.04)
    unordered = [{frozenset(map(tuple, pair)) for pair in pairs} for pairs in (won, true[3])]
    assert unordered[0] == unordered[1], "no pair more or less"
    assert labels(5, label_noise=0.2)[3] == won, "drawn again in a later pass"
    assert labels(label_noise=0.2, run_seed=1)[3] != won


def test_sampled_labels_are_the_same_whether_or_not_label_noise_is_drawn():
    """They are the first uniforms of the generator; flips, too rare here to occur, are the next."""
    cfg, groups = replace(CFG, labels="sampled", dpo_batch=200), make_groups(200)
    uniforms = torch.rand(200, 6, generator=torch.Generator().manual_seed(
        seed_of(cfg, "dpo", "labels")))
    for noise in (0.0, 1e-9):
        (m,), _ = preference_batches(replace(cfg, label_noise=noise), groups,
                                     torch.arange(200.0)[:, None].expand(200, 4),
                                     list(range(200)))(0)
        order = m["ref_logps"].view(200, 4)[:, 0].long()
        yw, yl, _ = dpo.label_pairs(torch.from_numpy(groups.rewards)[order], "sampled",
                                    cfg.label_scale, uniforms[order])
        assert torch.equal(m["yw_idxs"], yw) and torch.equal(m["yl_idxs"], yl), noise


@pytest.mark.parametrize("loss, labels", [
    ("pairwise", "hard"), ("pairwise", "soft"), ("pairwise", "sampled"), ("plackett-luce", "hard"),
    ("unlikelihood", "hard"), ("preferred-ft", "hard")])
def test_every_loss_equals_its_formula_on_one_completion_at_a_time(loss, labels):
    cfg = replace(CFG, loss=loss, labels=labels, alpha=0.3, beta=0.7, label_scale=4.0)
    model, groups = make_model(), make_groups(7, ties=loss != "plackett-luce")
    batches, loss_fn, _ = problem("dpo", model, cfg, noise=2.0, groups=groups)
    (m,), n = batches(0)
    total, log = loss_fn(model, m)
    order = [groups.prompt_ids.index(row[:p]) for row, p in zip(
        m["idx"].tolist()[::4], m["prompt_lens"].tolist()[::4])]
    assert sorted(order) == list(range(7)) and len(m["idx"]) == 28, "each completion once"
    logps, r = plain_logps(model, *groups.flat(order)).tolist(), groups.rewards[order].flatten()
    h = [0.7 * (a - b) for a, b in zip(logps, m["ref_logps"].tolist())]
    pairs = [(w, l) for w in range(28) for l in range(28) if w // 4 == l // 4 and r[w] > r[l]]
    if labels != "hard":  # pairs are drawn, or have ties
        pairs = list(zip(m["yw_idxs"].tolist(), m["yl_idxs"].tolist()))
    margins = torch.tensor([h[w] - h[l] for w, l in pairs])
    wrong, right = np.logaddexp(0, -margins.numpy()), np.logaddexp(0, margins.numpy())
    p = 1 / (1 + np.exp([-4 * (r[w] - r[l]) for w, l in pairs]))
    ranks = [sorted(range(4 * g, 4 * g + 4), key=lambda i: -r[i]) for g in range(7)]
    terms = {
        "unlikelihood": [0.3 * logps[l] - logps[w] for w, l in pairs],
        "preferred-ft": [-logps[w] for w, _ in pairs],
        "plackett-luce": [sum(np.logaddexp.reduce([h[i] for i in rank[k:]]) - h[rank[k]]
                              for k in range(3)) for rank in ranks],
        "pairwise": p * wrong + (1 - p) * right if labels == "soft" else wrong}[loss]
    assert len(terms) == n and total.item() == pytest.approx(sum(terms), rel=1e-4)
    assert torch.allclose(log["margin"].sort()[0], margins.sort()[0], atol=1e-4)
    assert log["accuracy"].sum() == (margins > 0).sum()
    if loss in OTHER_LOSSES:
        assert (log["weight"] == 1).all(), "all pairs are pushed equally"


@pytest.mark.parametrize("weight", dpo.WEIGHTS)
def test_sec4_every_weight_has_its_gradient(weight):
    cfg, model = replace(CFG, weight=weight, beta=0.7), make_model()
    batches, loss_fn, _ = problem("dpo", model, cfg, noise=2.0)
    (m,), _ = batches(0)
    total, log = loss_fn(model, m)
    w = dpo.WEIGHTS[weight](log["margin"], 0.7)
    logps = train.sequence_logps(model, m["idx"], m["prompt_lens"], m["lengths"])
    by_hand = (-0.7 * w * (logps[m["yw_idxs"]] - logps[m["yl_idxs"]])).sum()
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (total, by_hand))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)
    assert torch.equal(log["weight"], w)


def test_scores_do_not_depend_on_the_batch():
    model, texts = make_model().eval(), make_groups().flat(range(23))
    few = Job("toy", replace(CFG, max_new_tokens=300_000), [])
    assert few.batch_size(model) // 8 == 3, "three at a time"
    whole = score(Job("toy", CFG, []), model, *texts)
    assert torch.allclose(whole, plain_logps(model, *texts), atol=1e-4)
    assert torch.allclose(whole, score(few, model, *texts), atol=1e-4)
    order = np.random.default_rng(0).permutation(92)
    shuffled = score(few, model, *([x[i] for i in order] for x in texts))
    assert torch.allclose(shuffled, whole[order], atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_scores_are_rounded_as_in_training(precision):
    """Then π_θ and π_ref differ by what was learned, and not by rounding."""
    model, texts = make_model(), make_groups().flat(range(23))
    job = Job("toy", replace(CFG, precision=precision), [])
    scores = score(job, model, *texts)
    assert (scores - score(Job("toy", CFG, []), model, *texts)).abs().max() > 1e-3
    with job.autocast():
        assert torch.allclose(scores, train.sequence_logps(model, *pad_rows(*texts)), atol=1e-3)


# ------------------------------------------------------------------------------ the stages


def made(job, path, stage, groups=None, **settings):
    """Makes a stage in `path` with other settings. Returns the weights of its policy."""
    job = job.beside(replace(job.cfg, **settings))
    if groups:
        job.groups = groups
    with Run(path, {}, {}, about=job.about(stage)) as run:
        train.STAGES[stage].make(job, run)
    return weights(GPT.load(path / "model.pt"))


FEW = {"sft": dict(sft_steps=3, sft_warmup=1),
       "dpo": dict(dpo_steps=3, dpo_warmup=1, dpo_lr=0.01, eval_every=9)}
OTHERS = {
    "sft": [dict(sft_steps=4), dict(sft_batch=15), dict(sft_lr=0.01), dict(sft_warmup=0),
            dict(sft_decay=0.5), dict(dropout=0.2)],
    "dpo": [dict(beta=0.1), dict(weight="constant"), dict(loss="plackett-luce"), dict(run_seed=1),
            dict(labels="sampled"), dict(labels="soft"), dict(labels="soft", label_scale=3.0),
            dict(loss="unlikelihood"), dict(loss="unlikelihood", alpha=0.9), dict(dpo_steps=4),
            dict(dpo_batch=4), dict(dpo_optimizer="adamw"), dict(dpo_schedule="constant"),
            dict(dpo_lr=0.02), dict(dpo_warmup=2), dict(grad_clip=0.0), dict(train_prompts=9),
            dict(loss="reference-free"), dict(label_noise=0.3)]}


@pytest.mark.parametrize("stage", OTHERS)
def test_no_setting_is_ignored(job, tmp_path, stage):
    """Each setting of a stage changes its weights. Settings of the group "run" do not."""
    names = settings_of(job.cfg, ("sft",) if stage == "sft" else ("method", "dpo")).keys()
    tried = {name for other in OTHERS[stage] for name in other}
    assert names - tried <= {"dpo_module", "eval_every", "valid_samples"}, "a setting is not tried"
    results = [made(job, tmp_path / str(i), stage, **FEW[stage] | other)
               for i, other in enumerate([{}, dict(save_secs=0, eval_every=1), *OTHERS[stage]])]
    assert torch.equal(*results[:2])
    for (i, a), (j, b) in itertools.combinations(enumerate(results[1:]), 2):
        assert not torch.equal(a, b), (OTHERS[stage][i - 1], OTHERS[stage][j - 1])


FILES = {
    "sft": {"config.json", "metrics.jsonl", "model.pt", "bpe.tiktoken"},
    "groups": {"config.json", "groups.jsonl", "ref_logps.pt", "reference.json"},
    "dpo": {"config.json", "metrics.jsonl", "model.pt", "bpe.tiktoken", "result.json",
            "samples.txt", "curves.png"}}


@pytest.mark.parametrize("stage", FILES)
def test_a_stage_leaves_its_files_and_says_what_was_run(chain, stage):
    run = folder(chain.out, stage)
    assert {f.name for f in run.iterdir()} - {".lock"} == FILES[stage]
    config = read_json(run / "config.json")
    assert config["settings"]["n_embd"] == 16 and config["settings"]["precision"] == "fp32"
    assert ("beta" in config["settings"]) == (stage == "dpo"), "a later stage's setting"
    assert not {"out", "data", "threads"} & config["settings"].keys(), "they decide no result"
    assert config["about"]["command"][: len(TINY)] == TINY and config["about"]["preset"] == "toy"
    assert config["about"]["torch"] == torch.__version__ and config["about"]["threads"] == 1
    parents = {"sft": [], "groups": ["sft"], "dpo": ["sft", "groups"]}[stage]
    read = dict(sft=["model.pt", "bpe.tiktoken"],
                groups=["ref_logps.pt", "groups.jsonl", "reference.json"])
    assert config["parents"] == {"data": config["parents"]["data"]} | {parent: json_hash({
        name: file_hash(folder(chain.out, parent) / name) for name in read[parent]})
        for parent in parents}


def test_sft_validates_on_reviews_that_it_has_not_seen(chain, job):
    """The loss in nats per token equals that of a plain loop over the reviews, and it falls."""
    model, tokens = job.policy("sft").eval(), job.data.tokens["valid"]
    starts, lengths = tokens.windows(48)
    rows = [tokens.stream[a : a + n + 1].tolist() for a, n in zip(starts, lengths)]
    with torch.no_grad():
        nll = -plain_logps(model, [row[:1] for row in rows], [row[1:] for row in rows]).sum()
    metrics = read_rows(folder(chain.out, "sft") / "metrics.jsonl")
    losses = [r["eval"]["loss"] for r in metrics if "eval" in r]
    assert losses[-1] == pytest.approx(float(nll) / lengths.sum(), rel=1e-4)
    assert losses[-1] < losses[0] and f"validation loss {losses[-1]:.3f} nats per" in chain.text


def test_init_starts_from_a_hugging_face_folder(job, tmp_path):
    """After one step at a rate of almost 0 the weights are those of the folder."""
    hf_gpt2.save(job.policy("sft"), tmp_path / "hf")
    one = made(job, tmp_path / "out", "sft", init=str(tmp_path / "hf"), sft_steps=1, sft_lr=1e-12)
    assert torch.allclose(one, weights(job.policy("sft")), atol=1e-9)


def test_groups_the_optimum_and_the_evaluations_each_have_their_own_prompts(job, tmp_path, capsys):
    """They come from the train, test and validation reviews, and none is in two sets. Some of the
    250 training prompts occur in test reviews too: these test prompts are drawn again."""
    job = job.beside(replace(job.cfg, prompts=250, eval_prompts=40, num_completions=2,
                             max_new_tokens=8))
    asked, judge = [], ToyReward(job.data.enc)
    job.reward = lambda *texts: (asked.append(texts), judge(*texts))[1]
    with Run(tmp_path, {}, {}, "ref_logps.pt", job.about("groups")) as run:
        train.groups(job, run)
    info = read_json(tmp_path / "reference.json")
    (prompts, samples), (evaluated, own) = asked
    sets = dict(train=set(map(tuple, prompts[:500])), test=set(map(tuple, info["prompts"])),
                valid=set(map(tuple, info["valid"])))
    for split, drawn in sets.items():
        prefixes = {tuple(x[:k].tolist()) for x in job.data.tokens[split] for k in range(3, 10)}
        assert drawn <= prefixes, f"not all are prompts of {split} reviews"
    assert not any(a & b for a, b in itertools.combinations(sets.values(), 2))
    redrawn = info["notes"]["evaluation prompts drawn again"]
    assert redrawn > 0, "this shows nothing"
    assert f"; {redrawn} test prompts also occurred in training and were drawn again" in \
        capsys.readouterr().out
    rewards = judge(prompts, samples)
    kept = [i for i in range(250) if rewards[2 * i] != rewards[2 * i + 1]]
    groups = data_imdb.read_groups(tmp_path / "groups.jsonl", job.data.enc, 48)
    assert info["notes"]["equal rewards"] == 250 - len(kept) > 0
    assert groups.flat(range(len(kept))) == tuple(
        [x[i] for k in kept for i in (2 * k, 2 * k + 1)] for x in (prompts, samples))
    assert groups.rewards == pytest.approx(rewards[:500].view(-1, 2)[kept].numpy(), abs=1e-6)
    assert prompts[500:] == [p for p in info["prompts"] for _ in range(4)]
    assert info["optimum"][0]["reward"] == pytest.approx(float(rewards[500:].mean()), abs=1e-4)
    assert info["optimum"][0]["kl"] == pytest.approx(0, abs=1e-6), "at β = 1e9 it is π_ref"
    assert evaluated == info["prompts"]
    assert info["point"]["reward"] == pytest.approx(float(judge(evaluated, own).mean()), abs=1e-6)


def test_every_chunk_of_samples_has_its_own_draws(job, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 4)
    prompts, policy = job.groups.prompt_ids[:1] * 12, job.policy("sft")
    with Run(tmp_path, {}, {}) as run:
        ids = train.sample_all(job, run, policy, prompts, "groups")
    assert len(set(map(str, ids))) == 12


def test_reference_log_probs_are_those_of_the_reference(job):
    with torch.no_grad():
        plain = plain_logps(job.policy("sft").eval(), *job.groups.flat(range(len(job.ref_logps))))
    assert torch.allclose(job.ref_logps.flatten(), plain, atol=1e-3)
    assert job.reference_eval["point"]["kl"] == pytest.approx(0, abs=1e-6)


def test_held_out_groups_are_measured_and_never_trained_on(job, tmp_path):
    learned, held = job.split
    settings = FEW["dpo"] | dict(dpo_steps=len(learned) // 5 + 1)  # a whole pass
    policies, accuracies = [], []
    for name, reversed_ in ("unchanged", []), ("held", held), ("learned", learned[-1:]):
        groups = copy.deepcopy(job.groups)  # with the order of some groups reversed
        groups.rewards[reversed_] = 1 - groups.rewards[reversed_]
        policies.append(made(job, tmp_path / name, "dpo", groups, **settings))
        accuracies.append(read_json(tmp_path / name / "result.json")["accuracy"])
    assert torch.equal(*policies[:2]), "held-out groups were learned"
    assert not torch.equal(*policies[1:])
    assert accuracies[1] == pytest.approx(1 - accuracies[0]) != accuracies[0]


def test_groups_without_a_ranking_are_left_out_of_plackett_luce(job, tmp_path, capsys):
    groups, (learned, _) = copy.deepcopy(job.groups), job.split
    settings = FEW["dpo"] | dict(loss="plackett-luce", dpo_batch=1)
    groups.rewards[:] = [1, 1, 0, 0]
    with pytest.raises(UserError, match="nothing to rank"):
        made(job, tmp_path / "none", "dpo", groups, **settings)
    groups.rewards[learned[0]] = [3, 2, 1, 0]
    made(job, tmp_path / "one", "dpo", groups, **settings)
    n = len(learned)
    assert f"{n - 1} of {n} groups are skipped" in capsys.readouterr().out


@pytest.mark.parametrize("stage, shown", [("unlikelihood", "Unlikelihood, α 0.5"),
                                          ("preferred-ft", "Preferred-FT")])
def test_dpo_with_another_loss_is_a_stage_of_its_own(chain, copied, stage, shown):
    out = copied("sft", "groups")
    result = command("--stage", stage, *TINY, "--dpo-steps", 1, "--out", out, "--data", chain.data)
    assert result.code == 0 and result.out.count("found in") == 2, result.err
    assert f"\nπ_θ: {shown}; " in result.out
    assert "next:    python train.py --stage dpo --preset toy" in result.out, "DPO, to compare"
    assert read_json(folder(out, stage) / "config.json")["settings"]["loss"] == stage


def test_the_result_is_the_last_evaluation_and_can_be_computed_again(chain, job):
    run, prompts, held = folder(chain.out, "dpo"), job.reference_eval["prompts"], job.split[1]
    result, rows = read_json(run / "result.json"), read_rows(run / "metrics.jsonl")
    assert [r["eval"] for r in rows if "eval" in r][-1] == result
    policy, reference = job.policy("dpo"), job.policy("sft")
    again = train.without_texts(job.evaluate(policy, reference, prompts))
    with torch.no_grad():
        logps = plain_logps(policy, *job.groups.flat(held)).view(-1, 4)
    pairs = [(g, w, l) for g, r in enumerate(job.groups.rewards[held])
             for w in range(4) for l in range(4) if r[w] > r[l]]
    h = logps - job.ref_logps[held]
    again |= dict(
        accuracy=np.mean([float(h[g, w] > h[g, l]) for g, w, l in pairs]),
        logp_accuracy=np.mean([float(logps[g, w] > logps[g, l]) for g, w, l in pairs]),
        logp_chosen=np.mean([float(logps[g, w]) for g, w, _ in pairs]),
        logp_rejected=np.mean([float(logps[g, l]) for g, _, l in pairs]))
    assert again.keys() == result.keys()
    for key in again.keys() - {"seconds"}:
        assert again[key] == pytest.approx(result[key], abs=1e-4), key


def test_validation_prompts_are_sampled_as_often_as_asked(job):
    policy, reference = job.policy("dpo"), job.policy("sft")
    job.cfg = replace(job.cfg, valid_samples=3)
    point = train.evaluate_policy(job, policy, reference)
    valid = job.evaluate(policy, reference, 3 * job.reference_eval["valid"])
    assert valid["samples"] == 3 * 8
    assert (point["valid_reward"], point["valid_kl"]) == (valid["reward"], valid["kl"])


def test_reference_free_is_eq07_with_a_constant_reference_and_starts_elsewhere(job):
    cfg = replace(job.cfg, loss="reference-free", beta=0.3)
    batches = train.preference_batches(cfg, job.groups, job.ref_logps, job.split[0])
    (micro_batch,), n = batches(0)
    micro_batch = train.to_device(micro_batch, job.device)
    policy = job.policy("sft")
    loss, log = train.preference_loss(cfg)(policy, micro_batch)
    logps = train.sequence_logps(policy, *(micro_batch[k] for k in (
        "idx", "prompt_lens", "lengths"))).detach()
    gap = logps[micro_batch["yw_idxs"]] - logps[micro_batch["yl_idxs"]]
    wanted = -torch.nn.functional.logsigmoid(0.3 * gap).sum()
    assert float(loss.detach()) == pytest.approx(float(wanted))
    torch.testing.assert_close(log["weight"], torch.sigmoid(-0.3 * gap))
    assert train.starts_at_reference(cfg, 4) is None, "its first loss is not log 2"


def test_train_prompts_leaves_the_later_groups_out(job, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "preference_batches",
                        lambda cfg, groups, ref_logps, some: seen.append(some))
    monkeypatch.setattr(train, "fit", lambda *a, **k: None)
    monkeypatch.setattr(train, "finish_method", lambda *a: None)
    for n in (7, 0):
        job.cfg = replace(job.cfg, train_prompts=n)
        train.dpo_stage(job, None)
    assert seen == [job.split[0][:7], job.split[0]]


def test_the_chain_in_half_precision_starts_at_its_reference(chain, tmp_path):
    result = command(*TINY, "--precision", "bf16", "--dpo-steps", 1, "--out", tmp_path, "--data",
                     chain.data)
    assert result.code == 0, result.err
    assert read_rows(folder(tmp_path, "dpo") / "metrics.jsonl")[0]["margin_abs"] < 0.05
    assert read_json(folder(tmp_path, "sft") / "config.json")["settings"]["precision"] == "bf16"


# ------------------------------------------------------------------------------ the command


def test_a_finished_stage_is_found_and_nothing_is_written(chain):
    files = {path: path.stat().st_mtime_ns for path in chain.out.rglob("*") if path.is_file()}
    for extra in [], ["--precision", "fp32", "--save-secs", 0, "--dpo-accum", 2]:
        result = command(*TINY, *extra, "--out", chain.out, "--data", chain.data)
        assert result.code == 0 and "making" not in result.out, result.err
        assert re.findall(r"^(\w+): found in", result.out, re.M) == ["sft", "groups", "dpo"]
        table = chain.text[chain.text.index("reward r*") : chain.text.index("samples: ")]
        assert table in result.out, "another table"
    assert files == {path: path.stat().st_mtime_ns for path in chain.out.rglob("*")
                     if path.is_file()}, "a file was written again"
    assert chain.text.startswith("preset toy (--preset); stage dpo, which does not use --")
    assert re.findall(r"^(\w+): making", chain.text, re.M) == ["sft", "groups", "dpo"]


# ------------------------------------------------------------------------------ killed, Ctrl-C


def test_stopped_while_the_corpus_is_built_and_in_sft(chain, tmp_path):
    argv = [*TINY, "--stage", "sft", "--out", tmp_path / "out", "--data", tmp_path / "data"]
    stopped_and_finished(
        argv, (KILL, "torn", "bpe.tiktoken"), (CTRL_C, "torn", "train.npy"),
        (KILL, "torn", "about.json"), (KILL, "log"), (CTRL_C, "log", "", 2),
        (KILL, "torn", "resume.pt", 3), (KILL, "log", "", 4), (CTRL_C, "torn", "resume.pt"),
        (KILL, "after", "resume.pt", 2), (KILL, "torn", "model.pt"))
    same(folder(tmp_path / "out", "sft"), folder(chain.out, "sft"))
    argv += ["--sft-steps", 2]
    stopped(argv, KILL, "after", "model.pt")  # model.pt is the last file, so it is finished
    assert "found in" in command(*argv).out
    assert len(list((tmp_path / "out").rglob("bpe.tiktoken"))) == 2


def test_stopped_while_sampling(chain, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 40)  # 5 chunks of 40 completions
    argv, out = [*TINY, "--stage", "groups", "--data", chain.data, "--out"], copied("sft")
    shutil.copytree(out, tmp_path / "whole")
    assert command(*argv, tmp_path / "whole").code == 0
    stopped_and_finished(
        [*argv, out], (KILL, "sample", "", 40), (KILL, "torn", "resume.pt", 2),
        (CTRL_C, "sample", "", 30), (KILL, "after", "resume.pt"), (KILL, "torn", "reference.json"),
        (CTRL_C, "torn", "groups.jsonl"), (KILL, "torn", "ref_logps.pt"))
    same(folder(out, "groups"), folder(tmp_path / "whole", "groups"))


def test_stopped_in_dpo(chain, copied):
    out = copied("sft", "groups")
    stopped_and_finished(
        [*TINY, "--data", chain.data, "--out", out], (KILL, "log"), (KILL, "torn", "resume.pt", 2),
        (CTRL_C, "log", "", 3), (KILL, "after", "resume.pt", 2), (CTRL_C, "sample"),
        (KILL, "sample", "", 9), (KILL, "torn", "result.json"), (KILL, "torn", "model.pt"))
    same(folder(out, "dpo"), folder(chain.out, "dpo"))
    argv = [*TINY, "--dpo-steps", 1, "--data", chain.data, "--out", out]
    stopped(argv, KILL, "after", "model.pt")
    assert command(*argv).code == 0, "the table of a finished run cannot be printed"


def test_killed_at_random_moments_the_chain_is_that_of_a_run_never_stopped(chain, tmp_path):
    """The signal of a timer can come at any moment, also inside a C function."""
    rng, codes = np.random.default_rng(0), []

    def work():
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0, 0.1 + 0.1 * len(codes)))
        return main_exit(lambda: train.main([*TINY, "--save-secs", "0", "--data",
                                             str(tmp_path / "data"), "--out", str(tmp_path)]))

    while not codes or codes[-1] == -signal.SIGALRM:
        codes.append(in_child(work)[0])
        rng.uniform()  # the number that the child has drawn
    assert codes[-1] == 0 and len(codes) > 3, f"it ended with {codes}"
    for stage in "sft", "groups", "dpo":
        same(folder(tmp_path, stage), folder(chain.out, stage))


DIES = """
import os, signal
calls = []

def weight(margin, beta):
    calls.append(0)
    if len(calls) == int(os.environ.get("DIES", 0)):
        os.kill(os.getpid(), signal.SIGINT)
    return (-margin).sigmoid()
"""


@pytest.fixture
def strangers(tmp_path):
    """A working folder whose files have the names of modules; none of them may be imported."""
    (tmp_path / "cwd").mkdir()
    for name in "gpt", "experiments", "json":
        (tmp_path / f"cwd/{name}.py").write_text("raise SystemExit('a stranger was imported')")
    yield tmp_path / "cwd"
    assert len(list((tmp_path / "cwd").iterdir())) == 3, "a file was written here"


def test_the_real_command_interrupted_from_any_folder(chain, copied, tmp_path, strangers):
    """Ctrl-C comes in the middle of a step, from inside a user's --weight."""
    (tmp_path / "w.py").write_text(DIES)
    argv = [*TINY, "--weight", f"{tmp_path / 'w.py'}:weight", "--data", chain.data, "--out"]
    out = copied("sft", "groups")
    shutil.copytree(out, tmp_path / "whole")
    result = subprocess.run(
        [sys.executable, train.__file__, *map(str, argv), out, "--save-secs", "0"], cwd=strangers,
        env={**os.environ, "DIES": "5"}, text=True, capture_output=True, timeout=300,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert result.returncode == 130 and result.stderr.strip() == SENTENCE, result.stderr
    assert result.stdout.count("found in") == 2
    resumed = command(*argv, out)
    assert "going on at step" in resumed.out and command(*argv, tmp_path / "whole").code == 0
    same(folder(out, "dpo"), folder(tmp_path / "whole", "dpo"))


def test_our_own_error_beside_a_student_s_module_keeps_its_traceback(chain, copied, tmp_path,
                                                                    monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def implicit_reward(pi_logps, ref_logps, beta, log_z=0.0):\n"
        "    return beta * (pi_logps - ref_logps + log_z)\n")
    monkeypatch.setattr(train, "held_out_measures", lambda *args: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        command(*TINY, "--dpo-module", tmp_path / "mine.py", "--data", chain.data, "--out",
                copied("sft", "groups"))


def test_a_stage_of_experiments_is_handed_over_from_any_folder(strangers, monkeypatch):
    """PPO refuses fp16 before any work. The command runs in a fork, which has imported torch, and
    replaces itself by `python -m experiments`."""
    def work():
        os.chdir(strangers)
        monkeypatch.setattr(sys, "argv", [train.__file__, "--stage", "ppo", "--precision", "fp16"])
        runpy.run_path(train.__file__, run_name="__main__")

    code, text = in_child(work)
    assert code == 2 and re.search("^error: .*fp16.*$", text, re.M), text
    assert "Traceback" not in text and "stranger" not in text, text


# ------------------------------------------------------------------------------ preference files


def pairs_file(path, n=30, hh=False):
    """A preference file in words of the toy corpus: praise is chosen, and blame is rejected."""
    rows = []
    for i in range(n):
        prompt = f"\n\nHuman: {i}?\n\nAssistant:" if hh else f"the plot of film {i}"
        good, bad = f" was {('superb', 'witty')[i % 2]}.", " was dull, I fear."
        rows.append({"chosen": prompt + good, "rejected": prompt + bad} if hh else
                    {"prompt": prompt, "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_preference_file_from_start_to_end(chain, copied, tmp_path):
    """π_ref is first fine-tuned on the chosen completions. A tenth of the prompts is held out. The
    table has no reward, as there is no r*. A group that is longer than the context is left out and
    counted."""
    path, out = pairs_file(tmp_path / "my.jsonl"), copied("sft")
    with open(path, "a") as file:
        file.write(json.dumps({"prompt": "x", "chosen": "a " * 60, "rejected": "b"}) + "\n")
    argv = [*TINY, "--sft-batch", 8, "--groups", path, "--data", chain.data, "--out"]
    result = stopped_and_finished([*argv, out], (KILL, "log"), (KILL, "torn", "groups.jsonl"))
    assert command(*argv, tmp_path / "whole").code == 0
    for stage in "chosen", "groups", "dpo":
        same(folder(out, stage), folder(tmp_path / "whole", stage))
    (head,) = [x for x in result.out.splitlines() if "KL, nats  " in x]
    assert "reward" not in head and "accuracy" in head and "\noptimum" not in result.out
    (line,) = [x for x in result.out.splitlines() if x.startswith("  groups: 30 prompts")]
    assert line.endswith("with 2 completions each; left out: 1 (longer than 48 tokens)")
    text = (folder(out, "dpo") / "samples.txt").read_text()
    assert "r* - |" in text and text.count("prompt:") == 3, "3 of 30 prompts are held out"
    info = read_json(folder(out, "groups") / "reference.json")
    assert info["notes"] == {"longer than 48 tokens": 1} and info["optimum"] == []
    assert info["point"]["reward"] is None
    pairs_file(path, 29)
    refused(command(*argv, out), path, "has changed since")


def test_stage_chosen_raises_the_log_prob_of_chosen_completions(job, tmp_path):
    """It makes one pass over 36 prompts, 4 per step, at a tenth of SFT's learning rate."""
    start, path = job.policy("sft"), tmp_path / "out"
    hf_gpt2.save(start, tmp_path / "hf")
    groups = data_imdb.read_groups(pairs_file(tmp_path / "my.jsonl", 40), job.data.enc, 48)
    made(job, path, "chosen", groups, init=str(tmp_path / "hf"), sft_lr=0.5, sft_warmup=0,
         sft_batch=4)
    rates = [row["lr"] for row in read_rows(path / "metrics.jsonl")]
    assert len(rates) == 9 and rates[0] == pytest.approx(0.05)
    before, after = (score(job, model, *groups.flat(range(40))).view(40, 2)  # the chosen first
                     for model in (start, GPT.load(path / "model.pt")))
    chosen, rejected = (after - before).mean(0)
    assert chosen > rejected + 1, "in nats per completion"


def test_hh_with_a_users_reference(chain, job, tmp_path):
    """A run and a Hugging Face folder with the same weights are the same π_ref, and no SFT is made.
    Two of three prompts are held out, so that standard errors are not NaN, which is not JSON."""
    path, logps = pairs_file(tmp_path / "hh.jsonl", 3, hh=True), []
    hf_gpt2.save(job.policy("sft"), tmp_path / "hf")
    for reference, file in (folder(chain.out, "sft"), "model.pt"), (tmp_path / "hf",
                                                                    "model.safetensors"):
        out = tmp_path / file
        result = command(*TINY, "--groups", path, "--reference", reference, "--data", chain.data,
                         "--out", out, "--dpo-steps", 2)
        assert result.code == 0, result.err
        assert re.findall(r"^(\w+): making", result.out, re.M) == ["groups", "dpo"]
        run = folder(out, "groups")
        logps.append(load_tensors(run / "ref_logps.pt")["ref_logps"])
        parents = read_json(run / "config.json")["parents"]
        assert parents[str(reference / file)] == file_hash(reference / file)
        row = json.loads((run / "groups.jsonl").read_text().splitlines()[0])
        assert row["prompt"] == "\n\nHuman: 0?\n\nAssistant:"
        assert "NaN" not in (folder(out, "dpo") / "result.json").read_text()
    assert torch.allclose(*logps, atol=1e-5)


def test_preferences_that_changed_are_other_parents_although_their_log_probs_are_equal(
        chain, tmp_path):
    """The user does what the sentence says: deletes the groups and makes them again."""
    path, out = pairs_file(tmp_path / "my.jsonl", 12), tmp_path / "out"
    argv = [*TINY, "--groups", path, "--reference", folder(chain.out, "sft"), "--data", chain.data,
            "--out", out, "--dpo-steps", 2]
    assert command(*argv).code == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | dict(
        prompt=row["prompt"], completions=[row["chosen"], row["rejected"]], rewards=[0, 1]))
        .replace('"chosen"', '"x"').replace('"rejected"', '"y"') + "\n" for row in rows))
    refused(command(*argv), "my.jsonl has changed since", "delete")
    before = load_tensors(folder(out, "groups") / "ref_logps.pt")["ref_logps"]
    shutil.rmtree(folder(out, "groups"))
    refused(command(*argv), "groups has changed since", "dpo", "delete")
    assert torch.equal(before, load_tensors(folder(out, "groups") / "ref_logps.pt")["ref_logps"])
    shutil.rmtree(folder(out, "dpo"))
    assert command(*argv).code == 0


def test_groups_made_again_are_the_same_parent(chain, copied):
    out = copied("sft", "groups", "dpo")
    shutil.rmtree(folder(out, "groups"))
    result = command(*TINY, "--out", out, "--data", chain.data)
    assert result.code == 0 and "groups: making" in result.out and "dpo: found" in result.out


# ------------------------------------------------------------------------------ imdb


IMDB = ("--preset imdb --device cpu --threads 1 --vocab 600 --n-layer 1 --n-head 2 --n-embd 16 "
        "--n-ctx 64 --sft-steps 3 --sft-batch 8 --sft-warmup 1 --reward-steps 4 --reward-batch 4 "
        "--reward-ctx 40 --max-new-tokens 24 --prompts 30 --eval-prompts 8 --valid-prompts 8 "
        "--optimum-samples 4 --dpo-steps 3 --dpo-warmup 1 --dpo-batch 5").split()


@pytest.fixture(scope="module")
def imdb(tmp_path_factory):
    """A small archive with the real one's layout and with toy reviews. The counts are adapted."""
    base = tmp_path_factory.mktemp("imdb")
    few = {key: (split, label, 40) for key, (split, label, _) in data_imdb.FOLDERS.items()}
    texts = list(dict.fromkeys(toy_reviews.reviews(900, 5)))
    pools = {1: [t for t in texts if toy_reviews.sentiment(t) > 0.5],
             0: [t for t in texts if toy_reviews.sentiment(t) < 0.5]}
    with tarfile.open(base / "aclImdb.tar.gz", "w:gz") as archive:
        for key, (_, label, n) in few.items():
            for i in range(n):
                pool = pools[i % 2 if label is None else label]
                member = tarfile.TarInfo(f"aclImdb/{key}/{i}_{9 if label else 2}.txt")
                content = (pool.pop() + "<br />" + pool.pop()).encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_imdb, "FOLDERS", few)
        patch.setenv("IMDB_PATH", str(base / "aclImdb.tar.gz"))
        seen, batches = [], train.label_batches
        patch.setattr(train, "label_batches", lambda *a: seen.append(batches(*a)) or seen[-1])
        result = command(*IMDB, "--out", base / "out", "--data", base / "data")
        assert result.code == 0, result.err
        yield SimpleNamespace(out=base / "out", data=base / "data", text=result.out, seen=seen)


def test_imdb_runs_end_to_end(imdb):
    assert re.findall(r"^(\w+): making", imdb.text, re.M) == ["sft", "reward", "groups", "dpo"]
    rows = read_rows(folder(imdb.out, "groups") / "groups.jsonl")
    assert all(0 <= r <= 1 for row in rows for r in row["rewards"])
    result = read_json(folder(imdb.out, "dpo") / "result.json")
    assert 0 <= result["reward"] <= 1 and result["grammatical"] is None, "IMDb has no grammar"
    parents = read_json(folder(imdb.out, "groups") / "config.json")["parents"]
    assert parents.keys() == {"sft", "reward", "data"}
    tokens = data_imdb.load("imdb", 600, imdb.data, 0, 0).tokens
    assert f"sft: {len(tokens['train']) + len(tokens['unsup'])} reviews" in imdb.text


def test_r_star_of_imdb_reports_how_well_it_judges(imdb):
    result = command(*IMDB, "--stage", "reward", "--out", imdb.out, "--data", imdb.data)
    assert result.code == 0 and "reward: found in" in result.out
    report = read_json(folder(imdb.out, "reward") / "report.json")
    assert report.keys() == {"valid_whole", "valid_crop", "test_whole", "test_crop"}
    for name, row in report.items():
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["calibration_error"] <= 1
        assert f"r* on {name.replace('_', ', ')}: accuracy {row['accuracy']:.3f}" in result.out
    rows = read_rows(folder(imdb.out, "reward") / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "every score starts at 0"
    assert rows[0]["lr"] == pytest.approx(1e-4) and len(rows) == 4
    assert len({str(batch[0]["idx"].tolist()) for batch in imdb.seen}) == 4, "steps repeat reviews"


def test_stopped_in_the_reward_stage(imdb, tmp_path):
    shutil.copytree(folder(imdb.out, "sft"), tmp_path / "imdb" / folder(imdb.out, "sft").name)
    stopped_and_finished(
        [*IMDB, "--stage", "reward", "--data", imdb.data, "--out", tmp_path], (KILL, "log"),
        (CTRL_C, "log", "", 2), (KILL, "torn", "report.json"), (KILL, "torn", "model.pt"))
    same(folder(tmp_path, "reward"), folder(imdb.out, "reward"))
