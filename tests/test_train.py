"""Laws of train.py: one large batch however it is cut, one run however it is stopped, and a start
at π_θ = π_ref that is checked."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import dpo
import train
from data_imdb import Groups, Tokens
from gpt import GPT, GPTConfig, pad_rows
from support.runs import Run, UserError
from support.settings import Settings
from train import (
    STOP,
    Interrupted,
    Optim,
    draw_seed,
    fit,
    learning_rate,
    lm_batches,
    lm_loss,
    lm_plan,
    preference_batch,
    preference_batches,
    preference_loss,
    starts_at_reference,
    summary,
)

V, N_CTX, EOT = 20, 24, 19
S = replace(Settings(), precision="fp32", n_ctx=N_CTX, save_secs=math.inf, dpo_batch=7, beta=0.5)
PER_SECOND = ("seconds", "tokens_per_s", "targets_per_s", "pairs_per_s", "groups_per_s", "mfu")


def model(dropout=0.0, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    made = GPT(GPTConfig(V, N_CTX, 1, 2, 8, dropout)).to(dtype)
    with torch.no_grad():  # away from the small weights of a start, so that samples differ
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def reviews(n=60, seed=0):
    rng = np.random.default_rng(seed)
    parts = [np.array([EOT, *rng.integers(0, V - 1, rng.integers(3, 30))], np.uint16)
             for _ in range(n)]
    offsets = np.cumsum([0, *map(len, parts)])
    return Tokens(np.concatenate([*parts, np.array([EOT], np.uint16)]), offsets)


def groups(P=23, K=4, seed=0, ties=True):
    """Groups with 0 to several ties each, completions of 1 to 14 tokens."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(0, V, rng.integers(low, high)).tolist()
    rewards = np.argsort(rng.random((P, K)), axis=1)
    if ties:
        rewards = np.concatenate([rewards[:, :2] + K, rng.integers(0, 3, (P, K - 2))], axis=1)
    return Groups([[EOT, *draw(1, 8)] for _ in range(P)],
                  [[draw(1, 15) for _ in range(K)] for _ in range(P)],
                  rewards.astype(np.float32), True)


@torch.no_grad()
def ref_logps(reference, made, s):
    K = len(made.completion_ids[0])
    idx, prompt_lens, lengths = pad_rows([p for p in made.prompt_ids for _ in range(K)],
                                         [c for cs in made.completion_ids for c in cs])
    with train.autocast(torch.device("cpu"), s.precision):
        logps = reference.eval().token_logps(idx, dpo.completion_mask(
            prompt_lens, lengths, idx.size(1)))
    return dpo.completion_logps(logps, prompt_lens, lengths).view(-1, K)


def job(kind, net, s=S, weight="sigmoid", noise=0.0, made=None):
    """batches, loss_fn and the unit of a small task of either kind."""
    if kind == "lm":
        return lm_batches(reviews(), "sft", 12, s.sft_accum, s, 1), lm_loss, "targets"
    made = made or groups()
    logps = ref_logps(net, made, s)
    logps = logps + noise * torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    unit = "groups" if s.loss == "plackett-luce" else "pairs"
    return (preference_batches(made, logps, list(range(len(made.rewards))), s),
            preference_loss(s, dpo.load_weight(weight)), unit)


def optim(kind, steps=6, **kw):
    o = Optim(steps, 1e-2, 2, "cosine", "adamw", 0.1) if kind == "lm" else \
        Optim(steps, 1e-3, 2, "linear", "rmsprop")
    return o._replace(**kw)


def trained(folder, kind, net, s=S, o=None, check=None, evaluation=None, batches=None, **kw):
    """The metrics of a fit in `folder`, which may have been begun before; `net` is trained."""
    made, loss_fn, unit = job(kind, net, s, **kw)
    with Run(folder, {}, {}) as run:
        fit(run, "sft" if kind == "lm" else "dpo", net, batches(made) if batches else made, loss_fn,
            o or optim(kind), s, unit, check, evaluation)
        return run.metrics()


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in PER_SECOND} for row in rows]


# ------------------------------------------------------------------------------ learning rate


@pytest.mark.parametrize("schedule, end", [("constant", 1.0), ("linear", 0.0), ("cosine", 0.05)])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_learning_rate_warms_up_to_its_peak_and_decays_to_its_end(schedule, end, warmup):
    o = Optim(100, 3.0, warmup, schedule, "adamw")
    lr = [learning_rate(o, step) for step in range(101)]
    assert max(lr) == pytest.approx(3.0) and lr[warmup] == pytest.approx(3.0), "not its peak"
    assert lr[:warmup] == pytest.approx([3.0 * (i + 1) / warmup for i in range(warmup)])
    assert lr[0] > 0, "the first step would do nothing"
    assert all(b <= a + 1e-12 for a, b in zip(lr[warmup:], lr[warmup + 1:])), "it rises again"
    assert lr[100] == pytest.approx(3.0 * end), "where the schedule ends"
    jumps = [abs(b - a) for a, b in zip(lr, lr[1:])]
    assert max(jumps) <= 3.0 / max(1, warmup) + 0.06, "a jump"
    half = (warmup + 100) // 2
    middle = {"constant": 1, "linear": 0.5, "cosine": 0.525}[schedule]
    assert lr[half] == pytest.approx(3.0 * middle, abs=0.03)


def test_a_warm_up_longer_than_the_run_is_cut_short():
    o = Optim(5, 1.0, 10, "linear", "adamw")
    assert [learning_rate(o, i) for i in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_draws_differ_by_seed_stage_and_step():
    seeds = {draw_seed(a, b, c) for a in (0, 1) for b in ("sft", "dpo") for c in (0, 1, "epoch 0")}
    assert len(seeds) == 12 and draw_seed(0, "sft", 1) == draw_seed(0, "sft", 1)


def test_only_matrices_decay():
    net = model()
    decayed = [g for g in train.make_optimizer(optim("lm"), net).param_groups if g["weight_decay"]]
    assert {p.dim() for g in decayed for p in g["params"]} == {2}
    rms = train.make_optimizer(optim("dpo"), net)
    assert isinstance(rms, torch.optim.RMSprop) and rms.param_groups[0]["weight_decay"] == 0
    both = sum(len(g["params"]) for g in train.make_optimizer(optim("lm"), net).param_groups)
    assert both == len(list(net.parameters())), "a parameter is in no group, or in two"


# ------------------------------------------------------------------------------ one large batch


@pytest.mark.parametrize("accum", [2, 5, 99])
@pytest.mark.parametrize("kind", ["lm", "dpo", "plackett-luce", "constant"])
def test_accumulation_equals_one_large_batch(tmp_path, kind, accum):
    s = replace(S, loss=kind) if kind == "plackett-luce" else S
    weight = "constant" if kind == "constant" else "sigmoid"
    runs = []
    for parts in 1, accum:
        net = model(dtype=torch.float64)
        cut = replace(s, sft_accum=parts, dpo_accum=parts, weight=weight)
        rows = trained(tmp_path / f"{parts}", kind, net, cut, weight=weight)
        runs.append((weights(net), without_clock(rows)))
    (one, rows), (many, others) = runs
    start = weights(model(dtype=torch.float64))
    assert (one - start).abs().max() > 1e-3, "nothing was learned, so nothing is shown"
    assert torch.allclose(one, many, atol=1e-6), f"off by {(one - many).abs().max():.1e}"
    for row in rows[0], others[0]:
        row.pop("accuracy", None)  # of margins that are 0: the sign of a rounding error
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6), "what is logged depends on the cut"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lm", "dpo"])
def test_micro_batches_on_cores_end_bit_for_bit_the_same(tmp_path, three_threads, kind, dropout):
    """Gradients are added in the order of the parts, and dropout draws in it."""
    s, runs = replace(S, sft_accum=5, dpo_accum=5), []
    for threads in 1, 3, 3:
        torch.set_num_threads(threads)
        net = model(dropout, dtype=torch.float64)
        rows = trained(tmp_path / f"{len(runs)}", kind, net, s)
        runs.append((weights(net), without_clock(rows)))
    (one, _), (many, rows), (again, others) = runs
    assert torch.equal(many, again) and rows == others
    assert torch.allclose(one, many, atol=1e-6), "cores have changed what is learned"


def test_unequal_micro_batches_are_not_a_mean_of_means(tmp_path):
    """Six groups of 6 pairs and one of 3: 39 pairs, each of the same weight however it is cut."""
    made, net = groups(7, ties=False), model()
    made.rewards[6, 2:] = made.rewards[6, 0]
    micros, n = job("dpo", net, replace(S, dpo_accum=2), made=made)[0](0)
    pairs = [len(m["yw_idxs"]) for m in micros]
    assert pairs[0] != pairs[1] and sum(pairs) == n == 39
    row = trained(tmp_path, "dpo", net, replace(S, dpo_accum=2), made=made, noise=3.0)[0]
    net = model()
    batches, loss_fn, _ = job("dpo", net, made=made, noise=3.0)
    loss, log = loss_fn(net, batches(0)[0][0])
    assert row["loss"] == pytest.approx(loss.item() / 39, rel=1e-4)
    assert row["margin"] == pytest.approx(log["margin"].mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_clipping_sees_the_gradient_itself(tmp_path, monkeypatch, precision):
    """Under plain gradient descent a clipped step's length is lr * clip, whatever the scale."""
    monkeypatch.setattr(train, "make_optimizer", lambda o, m: torch.optim.SGD(m.parameters(), o.lr))
    net, s = model(), replace(S, precision=precision)
    start = weights(net)
    rows = trained(tmp_path, "lm", net, s, Optim(1, 0.5, 0, "constant", "sgd", clip=0.1))
    assert rows[0]["grad_norm"] > 0.1, "nothing to clip"
    moved = float((weights(net) - start).norm())
    assert moved == pytest.approx(0.5 * 0.1, rel=2e-3), "clipped before unscaling?"
    net = model()
    trained(tmp_path / "free", "lm", net, s, Optim(1, 0.5, 0, "constant", "sgd", clip=0.0))
    moved = float((weights(net) - start).norm())
    assert moved == pytest.approx(0.5 * rows[0]["grad_norm"], rel=2e-2), "clip 0 must not clip"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["lm", "dpo"])
def test_half_precision_follows_float32(tmp_path, kind, precision):
    o = optim(kind, 12)
    losses = []
    for p in "fp32", precision:
        rows = trained(tmp_path / p, kind, model(), replace(S, precision=p), o)
        losses.append([r["loss"] for r in rows])
        assert all(math.isfinite(r["grad_norm"]) for r in rows)
    assert losses[0][-1] < losses[0][0], "float32 itself has learned nothing"
    tolerance = 0.02 if precision == "fp16" else 0.1
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)


def test_an_overflow_of_fp16_skips_the_step_and_lowers_the_scale(tmp_path):
    class Overflow(torch.autograd.Function):  # a finite loss whose scaled gradient is not
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.inf

    net, before = model(), []
    batches, _, _ = job("lm", net)

    def overflowing(net, micro):
        before.append(weights(net))
        loss, log = lm_loss(net, micro)
        return (Overflow.apply(loss) if len(before) == 2 else loss), log

    s = replace(S, precision="fp16", save_secs=0)
    with Run(tmp_path, {}, {}) as run:
        fit(run, "sft", net, batches, overflowing, optim("lm", 4), s)
        rows = run.metrics()
        assert run.resume()["scaler"]["scale"] == 2**15, "one overflow halves the scale of 2**16"
    assert [r["grad_norm"] is None for r in rows] == [False, True, False, False]
    assert torch.equal(before[1], before[2]), "the step that overflowed was taken"
    assert not torch.equal(before[2], before[3])


# ------------------------------------------------------------------------------ stopped, resumed


@pytest.mark.parametrize("kind", ["lm", "dpo"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_anywhere_ends_bit_for_bit_the_same(tmp_path, kind, optimizer, precision):
    """With dropout on: its draws depend on the step alone. Ctrl-C at two steps, and a crash
    between checkpoints, whose steps are done again."""
    o = optim(kind, 8, optimizer=optimizer)
    s = replace(S, precision=precision, sft_accum=2, dpo_accum=2)
    whole, stopped = model(0.2), None
    rows = trained(tmp_path / "whole", kind, whole, s, o)

    def interrupted_at(step, act):
        def wrap(batches):
            def inner(i):
                if i == step:
                    act()
                return batches(i)
            return inner
        return wrap

    for step, act, error in ((2, lambda: STOP.append(1), Interrupted),
                             (5, lambda: 1 / 0, ZeroDivisionError),
                             (3, lambda: STOP.append(1), Interrupted),
                             (7, lambda: STOP.append(1), Interrupted)):
        stopped = model(0.2)  # a new process has the initial weights, not the last ones
        with pytest.raises(error):
            trained(tmp_path / "cut", kind, stopped, s, o, batches=interrupted_at(step, act))
        STOP.clear()
    stopped = model(0.2)
    again = trained(tmp_path / "cut", kind, stopped, s, o)
    assert torch.equal(weights(whole), weights(stopped)), "resuming has changed the weights"
    assert without_clock(again) == without_clock(rows), "metrics.jsonl tells another story"
    assert [r["step"] for r in again] == list(range(8))


def test_ctrl_c_saves_and_says_where(tmp_path):
    def stop_at_3(batches):
        return lambda step: (STOP.append(1) if step == 3 else None, batches(step))[1]

    with pytest.raises(Interrupted, match="sft is saved at step 4 of 6"):
        trained(tmp_path, "lm", model(), batches=stop_at_3)
    with Run(tmp_path, {}, {}) as run:
        assert run.resume()["step"] == 4


def test_a_run_killed_after_its_last_step_has_nothing_to_do_again(tmp_path):
    net, asked = model(), []
    trained(tmp_path, "lm", net)
    other = model(seed=5)
    trained(tmp_path, "lm", other, batches=lambda b: lambda step: asked.append(step))
    assert not asked and torch.equal(weights(net), weights(other)) and not other.training


def test_another_number_of_threads_is_said(tmp_path, capsys):
    with pytest.raises(Interrupted):
        trained(tmp_path, "lm", model(), batches=lambda b: lambda i: (STOP.append(1), b(i))[1])
    STOP.clear()
    with Run(tmp_path, {}, {}) as run:
        run.checkpoint(run.resume() | {"threads": 99})
    trained(tmp_path, "lm", model())
    out = capsys.readouterr().out
    assert "begun with 99 threads" in out and "going on at step 1 of 6" in out


@pytest.mark.parametrize("damage", ["width", "layers", "optimizer", "key"])
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, damage):
    o = optim("lm")
    with pytest.raises(Interrupted):
        trained(tmp_path, "lm", model(), o=o, batches=lambda b: lambda i: (STOP.append(1), b(i))[1])
    STOP.clear()
    with Run(tmp_path, {}, {}) as run:
        state = run.resume()
        if damage == "key":
            del state["scaler"]
        run.checkpoint(state)
    saved = (tmp_path / "resume.pt").read_bytes()
    net = model() if damage in ("optimizer", "key") else GPT(
        GPTConfig(V, N_CTX, 2, 2, 8) if damage == "layers" else GPTConfig(V, N_CTX, 1, 2, 16))
    o = o._replace(optimizer="rmsprop") if damage == "optimizer" else o
    with pytest.raises(UserError, match="resume.pt is a checkpoint of another conf.*delete") as e:
        trained(tmp_path, "lm", net, o=o)
    assert "\n" not in str(e.value)
    assert (tmp_path / "resume.pt").read_bytes() == saved, "refused, and yet overwritten"


def test_checkpoints_come_by_the_clock(tmp_path, monkeypatch):
    saved, clock = [], iter(range(0, 1000, 4))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Run, "checkpoint", lambda self, state: saved.append(state["step"]))
    trained(tmp_path, "lm", model(), replace(S, save_secs=10.0), optim("lm", 12))
    assert len(saved) in (3, 4, 5) and saved[-1] == 12, saved


# ------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("stage, flag", [("sft", "--sft-lr"), ("chosen", "--sft-lr"),
                                         ("reward", "--reward-lr"), ("dpo", "--dpo-lr")])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_keeps_its_checkpoint(tmp_path, stage, flag, bad):
    def diverging(net, micro):
        steps.append(0)
        loss, log = lm_loss(net, micro)
        if len(steps) == 4:
            loss = loss * math.nan if bad == "loss" else loss + 0 * net.wpe.weight.sub(
                net.wpe.weight.detach()).sqrt().sum()  # 0 times an infinite slope
        return loss, log

    steps, net = [], model()
    batches, _, _ = job("lm", net)
    with Run(tmp_path, {}, {}) as run, pytest.raises(UserError) as error:
        fit(run, stage, net, batches, diverging, optim("lm"), replace(S, save_secs=0))
    for word in ("step 3", "step 3 in", str(tmp_path / "resume.pt"), flag, "--precision", stage):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
    good = model()
    trained(tmp_path, "lm", good)  # the checkpoint is whole: another try ends as if nothing was
    never = model()
    trained(tmp_path / "never", "lm", never)
    assert torch.equal(weights(good), weights(never)), "the bad step reached the checkpoint"


def test_not_finite_before_any_checkpoint(tmp_path):
    net = model()
    batches, _, _ = job("lm", net)
    with Run(tmp_path, {}, {}) as run, pytest.raises(UserError, match="step 0; nothing was saved"):
        fit(run, "sft", net, batches, lambda m, x: (lm_loss(m, x)[0] * math.inf, {}),
            optim("lm"), S)
    assert not (tmp_path / "resume.pt").exists()


# ------------------------------------------------------------------------------ what is logged


def test_every_step_logs_what_a_reader_asks_for(tmp_path):
    rows = trained(tmp_path, "dpo", model())
    wanted = {"step", "loss", "accuracy", "margin", "margin_abs", "reward_chosen",
              "reward_rejected", "logp_chosen", "logp_rejected", "weight", "weight_5",
              "weight_25", "weight_50", "weight_75", "weight_95", "grad_norm", "lr",
              "tokens_per_s", "pairs_per_s", "mfu", "seconds"}
    assert [r["step"] for r in rows] == list(range(6))
    for row in rows:
        assert wanted <= row.keys(), f"missing: {wanted - row.keys()}"
        assert all(math.isfinite(row[key]) for key in wanted), row
        assert row["weight_5"] <= row["weight_25"] <= row["weight_50"] <= row["weight_75"] \
            <= row["weight_95"]
        apart = row["reward_chosen"] - row["reward_rejected"]
        assert row["margin"] == pytest.approx(apart, abs=1e-4)
        assert row["margin_abs"] >= abs(row["margin"]) - 1e-6
        assert row["mfu"] > 0 and row["pairs_per_s"] > 0 and row["lr"] > 0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "targets_per_s" in trained(tmp_path / "lm", "lm", model())[0]
    s = replace(S, loss="plackett-luce")
    assert "groups_per_s" in trained(tmp_path / "pl", "dpo", model(), s)[0]


def test_summary_is_means_and_quantiles():
    x = torch.linspace(0, 1, 101)[torch.randperm(101)]
    got = summary({"weight": [x[:30], x[30:]], "other": [x.double()]})
    assert float(got["other"]) == pytest.approx(0.5) == pytest.approx(float(got["weight"]))
    for p in (5, 25, 50, 75, 95):
        assert float(got[f"weight_{p}"]) == pytest.approx(p / 100, abs=1e-6)


def test_the_rate_of_a_matrix_product_is_finite():
    for precision in "fp32", "bf16", "fp16":
        assert 1e6 < train.matmul_rate(torch.device("cpu"), precision) < 1e16, precision


def test_evaluations_are_logged_and_leave_training_as_it_was(tmp_path):
    seen = []

    def evaluation(net):
        seen.append(net.training)
        torch.rand(7)  # whatever it draws, the next step's dropout is its own
        net.eval()
        return {"score": len(seen)}

    plain, evaluated = model(0.2), model(0.2)
    s = replace(S, eval_every=4)
    trained(tmp_path / "a", "lm", plain, s, optim("lm", 10))
    rows = trained(tmp_path / "b", "lm", evaluated, s, optim("lm", 10), evaluation=evaluation)
    assert [r["step"] for r in rows if "eval" in r] == [3, 7, 9], "every fourth, and the last"
    assert torch.equal(weights(plain), weights(evaluated)), "evaluating has changed the training"
    rows = trained(tmp_path / "c", "lm", model(), S, optim("lm", 40), evaluation=evaluation)
    assert [r["step"] for r in rows if "eval" in r] == [9, 19, 29, 39], "by default four in all"


def test_compile_serves_training_and_not_sampling(tmp_path, monkeypatch):
    calls = []

    def compiled(f, dynamic):
        return lambda *args: (calls.append(len(args)), f(*args))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    net, plain = model(), model()
    s = replace(S, compile=True)
    evaluation = lambda m: dict(calls=len(calls), one=len(m.sample([[EOT]], 2, EOT, 0)),
                                more=len(calls))
    rows = [r["eval"] for r in trained(tmp_path / "a", "lm", net, s, evaluation=evaluation)
            if "eval" in r]
    assert len(calls) == 6 and all(r["calls"] == r["more"] for r in rows)
    trained(tmp_path / "b", "lm", plain)
    assert torch.equal(weights(net), weights(plain)) and "hidden" not in vars(net)


def test_torch_compile_can_trace_the_loop(tmp_path, monkeypatch):
    """With its own tracing, but without the minute that its code generator takes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    net, plain = model(), model()
    for where, trained_one, compiled in ("a", net, True), ("b", plain, False):
        trained(tmp_path / where, "dpo", trained_one, replace(S, compile=compiled),
                optim("dpo", 3))
    assert torch.allclose(weights(net), weights(plain), atol=1e-5)


# ------------------------------------------------------------------------------ the start of DPO


START = [("pairwise", w) for w in dpo.WEIGHTS] + [("plackett-luce", "sigmoid")]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("loss, weight", START)
def test_dpo_starts_where_the_policy_is_the_reference(tmp_path, loss, weight, ties):
    """Eq. 7 starts at log 2 with weight 1/2, A.3 at log K!; every margin is 0."""
    s = replace(S, loss=loss, weight=weight)
    check = starts_at_reference(s, 4)
    row = trained(tmp_path, "dpo", model(), s, optim("dpo", 1), check, weight=weight,
                  made=groups(ties=ties))[0]
    assert row["margin"] == pytest.approx(0, abs=1e-4)
    assert row["accuracy"] == pytest.approx(0.5, abs=0.5), "ties count half"
    if loss == "plackett-luce":
        assert row["loss"] == pytest.approx(math.log(24), abs=1e-4) or \
            (ties and row["loss"] < math.log(24))
    elif weight == "sigmoid":
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["weight_5"] == pytest.approx(0.5, abs=1e-4) == \
            pytest.approx(row["weight_95"], abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss, weight", START)
def test_another_reference_is_caught_at_step_0(tmp_path, loss, weight, precision):
    s = replace(S, loss=loss, weight=weight, precision=precision)
    start, net = weights(model()), model()
    with pytest.raises(UserError, match="dropout is on.*another model.*stale") as error:
        trained(tmp_path, "dpo", net, s, check=starts_at_reference(s, 4), weight=weight,
                noise=0.8, made=groups(ties=False))
    assert "\n" not in str(error.value) and "0.6931" in str(error.value)
    assert torch.equal(weights(net), start), "a step was taken from a wrong start"
    assert not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("loss", ["pairwise", "plackett-luce"])
def test_dropout_is_caught_at_step_0(tmp_path, loss, ties):
    s = replace(S, loss=loss)
    with pytest.raises(UserError, match="likely causes: dropout is on"):
        trained(tmp_path, "dpo", model(0.3), s, check=starts_at_reference(s, 4),
                made=groups(ties=ties))


def test_the_start_is_not_asked_for_again_after_resuming(tmp_path):
    asked = []
    for steps in 2, 5:
        with pytest.raises(Interrupted):
            trained(tmp_path, "dpo", model(), check=asked.append,
                    batches=lambda b: lambda i: (STOP.append(1) if i == steps else None, b(i))[1])
        STOP.clear()
    assert len(asked) == 1 and asked[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("n, batch", [(60, 12), (61, 12), (400, 4), (7, 7)])
def test_an_epoch_has_every_window_once(n, batch):
    lengths = np.random.default_rng(0).integers(1, 30, n)
    plans = [lm_plan(lengths, batch, seed) for seed in (0, 0, 1)]
    for plan in plans:
        assert plan.shape == (n // batch, batch), "an incomplete batch is left to the next epoch"
        assert len(set(plan.flatten())) == plan.size, "a window twice"
    assert (plans[0] == plans[1]).all() and (n == batch or (plans[0] != plans[2]).any())
    if n == 400:
        spread = np.ptp(lengths[plans[0]], axis=1).mean()
        assert spread < 5, f"lengths within a batch differ by {spread:.1f} of 29: padding"
        longer = np.diff(lengths[plans[0]].mean(1)) > 0
        assert 0.3 < longer.mean() < 0.7, "short ones first: a curriculum nobody asked for"


def test_lm_batches_are_a_function_of_seed_and_step():
    tokens = reviews()
    starts, lengths = tokens.windows(N_CTX)
    per_epoch = len(starts) // 12
    one, two = (lm_batches(tokens, "sft", 12, 3, S, 1) for _ in range(2))
    other = lm_batches(tokens, "sft", 12, 3, replace(S, seed=1), 1)
    for step in (3 * per_epoch, 0, per_epoch - 1, per_epoch):
        (a, n), (b, m), (c, _) = one(step), two(step), other(step)
        assert n == m and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)
        assert not all(x["idx"].shape == y["idx"].shape and torch.equal(x["idx"], y["idx"])
                       for x, y in zip(a, c)), "another seed, the same batch"
    for epoch in (0, 1):
        seen, total = [], 0
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            micros, n = one(step)
            assert len(micros) == 3 and sum(int(m["mask"].sum()) for m in micros) == n
            for m in micros:
                assert not m["mask"][:, 0].any(), "nothing predicts a first token"
                assert torch.equal(m["mask"].sum(1) + 1, m["lengths"])
                seen += [tuple(row[:k]) for row, k in zip(m["idx"].tolist(), m["lengths"].tolist())]
            total += n
        assert len(set(seen)) == len(seen) == 12 * per_epoch, "a window twice in an epoch"
        assert total <= lengths.sum() and total >= lengths.sum() - 12 * N_CTX


def test_lm_loss_is_the_sum_over_targets():
    net = model()
    (micro,), n = lm_batches(reviews(), "sft", 12, 1, S, 1)(0)
    loss, _ = lm_loss(net, micro)
    inputs, targets = micro["idx"][:, :-1], micro["idx"][:, 1:]
    logp = net(inputs).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert loss.item() == pytest.approx(-logp[micro["mask"][:, 1:]].sum().item(), rel=1e-5)
    assert n == micro["mask"].sum(), "the number of its terms"


def test_more_micro_batches_than_windows_and_fewer_windows_than_a_batch():
    micros, _ = lm_batches(reviews(), "sft", 4, 9, S, 1)(0)
    assert len(micros) == 4
    with pytest.raises(UserError, match="windows, fewer than a batch of 99999: lower --sft-batch"):
        lm_batches(reviews(), "sft", 99_999, 1, S, 1)


def test_a_pass_has_every_group_once():
    made, picked = groups(23), []
    logps = torch.arange(23 * 4.0).view(23, 4)  # tells which completions came
    train_on = [i for i in range(23) if i % 5]
    batches, again = (preference_batches(made, logps, train_on, S) for _ in range(2))
    for step in range(0, 36):  # 14 passes of 18 groups, in batches of 7
        micros, n = batches(step)
        rows = torch.cat([m["ref_logps"] for m in micros]).view(-1, 4)
        assert n == sum(len(m["yw_idxs"]) for m in micros) and len(rows) == 7
        picked += (rows[:, 0] // 4).int().tolist()
    for i in range(0, len(picked), len(train_on)):
        assert sorted(picked[i : i + len(train_on)]) == train_on, "a group twice in a pass"
    assert picked[:18] != picked[18:36], "each pass is shuffled anew"
    for step in (35, 4):
        assert torch.equal(batches(step)[0][0]["idx"], again(step)[0][0]["idx"])
    micros, n = preference_batches(made, logps, train_on, replace(S, loss="plackett-luce"))(0)
    assert n == 7, "a ranking is one term"
    assert len(preference_batches(made, logps, train_on, replace(S, dpo_accum=9))(0)[0]) == 7


def test_a_preference_batch_has_every_completion_once_and_every_pair():
    made = groups(23)
    picks = np.flatnonzero(made.rewards[:, 2] == made.rewards[:, 3])[:3]
    picks = np.array([*picks, *(i for i in (4, 0, 11, 7) if i not in picks)])[:5]
    micro = preference_batch(made, torch.randn(23, 4), picks)
    assert len(micro["idx"]) == 20, "each completion goes forward once"
    for row, (g, k) in enumerate((g, k) for g in picks for k in range(4)):
        p, n = int(micro["prompt_lens"][row]), int(micro["lengths"][row])
        assert micro["idx"][row, :p].tolist() == made.prompt_ids[g]
        assert micro["idx"][row, p:n].tolist() == made.completion_ids[g][k]
    rewards = made.rewards[picks].flatten()
    pairs = {(w, l) for w in range(20) for l in range(20)
             if w // 4 == l // 4 and rewards[w] > rewards[l]}
    assert pairs == set(zip(micro["yw_idxs"].tolist(), micro["yl_idxs"].tolist()))
    assert len(pairs) <= 27, "there are no ties in this test"


@pytest.mark.parametrize("weight", dpo.WEIGHTS)
def test_every_weight_learns_to_order_the_pairs(tmp_path, weight):
    s = replace(S, weight=weight, dpo_batch=23)
    rows = trained(tmp_path, "dpo", model(), s, optim("dpo", 25, lr=3e-3), weight=weight)
    assert rows[-1]["accuracy"] > 0.7 and rows[-1]["margin"] > 0.05, rows[-1]
