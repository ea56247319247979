"""The hand-written training loop, and what it minimises: next tokens, and preferences.

    python train.py --stage dpo        builds what it needs (SFT, r*, preference groups), then DPO

One loop, `fit`, serves every stage that minimises a loss; a stage hands it batches and a loss.
The equations live in dpo.py, the settings in support/settings.py, the stages that call `fit` in stages.py,
their order in pipeline.py.

B sequences, T tokens, G groups, K completions a prompt, N pairs.
"""

import functools
import hashlib
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

# Before torch: threads that wait awake for a moment, then sleep. Torch's default waits awake for
# long: where another program took one of two cores that was 38 times slower than one thread (this:
# 1.5 times), and on an idle machine only 7 % faster than this.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data_imdb  # noqa: E402
import dpo  # noqa: E402
from evaluate import in_order  # noqa: E402
from gpt import by_length, on_cores, pad_rows  # noqa: E402
from support.runs import Run, UserError  # noqa: E402
from support.settings import Settings  # noqa: E402


class Interrupted(Exception):
    """Ctrl-C, taken at a point where the state is whole and saved."""


class Diverged(UserError):
    """A loss or a gradient that is not finite: other rates and other runs may be fine."""


STOP = []  # filled by Ctrl-C; asked between steps


def draw_seed(seed: int, stage: str, step) -> int:
    """Every random draw is a function of these three, so no generator's state needs saving."""
    return int(hashlib.sha256(f"{seed}/{stage}/{step}".encode()).hexdigest()[:12], 16)


# ------------------------------------------------------------------------------ the loop


class Optim(NamedTuple):
    steps: int
    lr: float  # peak
    warmup: int  # steps, linear
    schedule: str  # constant, linear or cosine, to 0 (cosine to 5 %)
    optimizer: str
    decay: float = 0.0  # of matrices
    clip: float = 1.0


def learning_rate(o: Optim, step: int) -> float:
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    done = (step - o.warmup) / max(1, o.steps - o.warmup)
    if o.schedule == "cosine":
        return o.lr * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
    return o.lr * (1 - done if o.schedule == "linear" else 1)


def make_optimizer(o: Optim, model) -> torch.optim.Optimizer:
    if o.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=o.lr)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=o.decay),
                              dict(params=others, weight_decay=0.0)], lr=o.lr, betas=(0.9, 0.95),
                             fused=True)


def autocast(device: torch.device, precision: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def to_device(micro: dict, device: torch.device) -> dict:
    if device.type != "cuda":
        return micro
    return {k: v.pin_memory().to(device, non_blocking=True) for k, v in micro.items()}


def fit(run: Run, stage: str, model, batches, loss_fn, o: Optim, s: Settings, unit="targets",
        check=None, evaluation=None) -> None:
    """Minimise a loss over o.steps, resuming from the run's last checkpoint.

    batches(step) -> (micro-batches, n): dicts of CPU tensors, among them idx (B, T) and
    lengths (B,), and the number of terms, each a `unit`, of the whole step;
    loss_fn(model, micro) -> (the SUM of the micro-batch's terms, what to log, each (n,)).
    Sums over all micro-batches are divided by n once, so that accumulation is one large batch.
    check(row) may refuse the first row; evaluation(model) -> dict is logged now and then.
    Raises Diverged when a loss or a gradient is not finite, Interrupted after Ctrl-C.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(o, model)
    scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
    saved_at, saved_step = time.monotonic(), restored(run, stage, o, model, optimizer, scaler)
    start = saved_step or 0
    forward_flops = 2 * sum(p.numel() for p in model.parameters())  # a token, matrices alone
    peak = matmul_rate(device, s.precision) if start < o.steps else 1.0
    every = s.eval_every or -(-o.steps // 4)
    body = getattr(model, "body", model)
    compiled = torch.compile(body.hidden, dynamic=True) if s.compile else body.hidden
    model.train()
    bar = tqdm(range(start, o.steps), stage, initial=start, total=o.steps, unit="step",
               disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for step in bar:
        began = time.perf_counter()
        lr = learning_rate(o, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(draw_seed(s.seed, stage, step))  # dropout
        body.hidden = compiled
        micros, n = batches(step)
        tokens = sum(int(m["lengths"].sum()) for m in micros)
        total, logs = backward(model, micros, n, loss_fn, scaler, s.precision)
        scaler.unscale_(optimizer)  # clip the gradient itself, not its scaled copy
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf)
        values = summary(logs) | dict(loss=total, grad_norm=norm)
        row = dict(zip(values, torch.stack([torch.as_tensor(v, device=device).float()
                                            for v in values.values()]).tolist()))  # one sync
        # fp16's scaler skips a step whose gradient overflowed and lowers its scale; no one else may
        if not math.isfinite(row["loss"]) or not (scaler.is_enabled() or
                                                  math.isfinite(row["grad_norm"])):
            raise Diverged(diverged(run, stage, step, saved_step))
        if step == 0 and check:
            check(row)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        row |= {"lr": lr, "seconds": seconds, "tokens_per_s": tokens / seconds,
                f"{unit}_per_s": n / seconds, "mfu": 3 * forward_flops * tokens / seconds / peak}
        if not math.isfinite(row["grad_norm"]):
            row["grad_norm"] = None  # JSON has no infinity
        run.log(dict(step=step) | {k: v and float(f"{v:.6g}") for k, v in row.items()})
        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        del body.hidden  # sampling is one token at a time, and would compile again
        if evaluation and ((step + 1) % every == 0 or step + 1 == o.steps):
            run.log(dict(step=step, eval=evaluation(model)))
            model.train()
        due = time.monotonic() - saved_at >= s.save_secs
        if due or STOP or step + 1 == o.steps:
            run.checkpoint(dict(step=step + 1, model=model.state_dict(), scaler=scaler.state_dict(),
                                optimizer=optimizer.state_dict(), threads=torch.get_num_threads()))
            saved_at, saved_step = time.monotonic(), step + 1
        if STOP:
            raise Interrupted(f"{stage} is saved at step {step + 1} of {o.steps}")
    model.eval()


def restored(run: Run, stage: str, o: Optim, model, optimizer, scaler) -> int | None:
    """The step of the run's checkpoint, its state put back; None where there is none."""
    state = run.resume()
    if not state:
        return None
    with restoring(run):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    if state["threads"] != torch.get_num_threads():
        print(f"  {stage}: begun with {state['threads']} threads; bit-for-bit equality with an "
              "uninterrupted run needs the same number")
    if state["step"] < o.steps:
        print(f"  {stage}: going on at step {state['step']} of {o.steps}")
    return state["step"]


@contextmanager
def restoring(run: Run):
    """A state that does not fit what it is put into becomes a UserError."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise UserError(f"{run.path('resume.pt')} is a checkpoint of another configuration "
                        f"({str(e).splitlines()[0]}): delete {run.folder}") from None


def backward(model, micros, n: int, loss_fn, scaler, precision: str) -> tuple[torch.Tensor, dict]:
    """Adds the gradient of Σ loss / n; that sum, and each logged quantity's list of (n,)."""
    params, total, logs = list(model.parameters()), 0.0, {}
    device = params[0].device
    unit = scaler.scale(torch.ones((), device=device))  # 1, or fp16's scale

    def gradient(micro):
        with autocast(device, precision):
            loss, log = loss_fn(model, to_device(micro, device))
        return loss.detach() / n, log, torch.autograd.grad(loss, params, unit.to(loss) / n)

    # dropout's draws come from one generator: in the order of the parts
    drops = getattr(model, "body", model).config.dropout
    each = map if drops else functools.partial(on_cores, device)
    for loss, log, grads in each(gradient, micros):
        total = total + loss
        for p, grad in zip(params, grads):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        del grads  # before the next micro-batch makes its own
        for key, value in log.items():
            logs.setdefault(key, []).append(value)
    return total, logs


def summary(logs: dict) -> dict:
    """Means over the step's terms, and the importance weight's quantiles."""
    logs = {k: torch.cat(v).float() for k, v in logs.items()}
    out = {k: v.mean() for k, v in logs.items()}
    if "weight" in logs:
        q = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=logs["weight"].device)
        for p, value in zip((5, 25, 50, 75, 95), logs["weight"].quantile(q)):
            out[f"weight_{p}"] = value
    return out


def diverged(run: Run, stage: str, step: int, saved: int | None) -> str:
    last = f"the last good checkpoint is step {saved} in {run.path('resume.pt')}" \
        if saved is not None else "nothing was saved before it"
    rate = {"sft": "--sft-lr", "chosen": "--sft-lr", "reward": "--reward-lr", "rm": "--rm-lr",
            "ppo": "--ppo-lr", "ppo-gt": "--ppo-lr"}.get(stage, "--dpo-lr")
    return f"{stage}: the loss or its gradient is not finite at step {step}; {last}; " \
           f"try a lower {rate}, or --precision fp32"


@functools.cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here: the 100 % of the logged mfu."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    # a CPU may emulate fp16 a hundred times slower
    n = 8192 if device.type == "cuda" else 1024 if dtype != torch.float16 else 128
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for it
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


# ------------------------------------------------------------------------------ next tokens


def lm_plan(lengths, batch: int, seed: int) -> np.ndarray:
    """One epoch's batches of windows (n, batch): alike in length within, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    pools = [p[np.argsort(lengths[p], kind="stable")] for p in np.split(
        order, range(16 * batch, len(order), 16 * batch))]
    order = np.concatenate(pools)
    whole = len(order) // batch
    return rng.permutation(order[: whole * batch].reshape(whole, batch))


def lm_loss(model, micro):
    """Summed NLL in nats of every real token but the first, and what to log, per sequence."""
    logps = model.token_logps(micro["idx"], micro["mask"])
    losses = -logps.sum(1)
    return losses.sum(), {}


def lm_batches(tokens, stage: str, batch: int, accum: int, s: Settings, pad_to: int):
    starts, lengths = tokens.windows(s.n_ctx)
    if len(starts) < batch:
        raise UserError(f"{len(starts)} training windows, fewer than a batch of {batch}: lower "
                        "--sft-batch or raise --reviews")
    plan = functools.lru_cache(2)(
        lambda epoch: lm_plan(lengths, batch, draw_seed(s.seed, stage, f"epoch {epoch}")))

    def batches(step: int):
        steps = len(starts) // batch
        chosen, micros = plan(step // steps)[step % steps], []
        for part in np.array_split(chosen, min(accum, batch)):
            idx, mask = data_imdb.lm_batch(tokens, starts[part], lengths[part], pad_to)
            micros.append(dict(idx=torch.from_numpy(idx), mask=torch.from_numpy(mask),
                               lengths=torch.from_numpy(lengths[part] + 1)))
        return micros, int(lengths[chosen].sum())

    return batches


# ------------------------------------------------------------------------------ preferences


def label_pairs(rewards, s: Settings, picks, uniforms):
    """Who wins, rewards (G, K) -> yw_idxs, yl_idxs, and the probability p that it does, (N,) each.

    hard: the higher r*, ties dropped. sampled: drawn from Eq. 1 with rewards s r*, by uniforms
    (P, K (K - 1) / 2), one a pair of every group, whose row is in `picks` (G,). soft: the higher
    r* with Eq. 1's p; a tie has p = 1/2.
    """
    if s.labels == "hard":
        yw_idxs, yl_idxs, _ = dpo.preference_pairs(rewards)
        return yw_idxs, yl_idxs, torch.ones(len(yw_idxs))
    G, K = rewards.shape
    pairs = torch.combinations(torch.arange(K))  # (K (K - 1) / 2, 2)
    first, second = ((pairs[:, i] + K * torch.arange(G)[:, None]).flatten() for i in (0, 1))
    r = s.label_scale * rewards.flatten()
    p = dpo.preference_probability(r[first], r[second])
    lost = uniforms[picks].flatten() >= p if s.labels == "sampled" else p < 0.5
    yw_idxs, yl_idxs = torch.where(lost, second, first), torch.where(lost, first, second)
    return yw_idxs, yl_idxs, torch.ones_like(p) if s.labels == "sampled" else p.maximum(1 - p)


def preference_batch(made: data_imdb.Groups, ref_logps, picks, s=Settings(), uniforms=None) -> dict:
    """Groups to one micro-batch: every completion once (G*K), pairs as index vectors (App. B)."""
    K = len(made.completion_ids[0])
    idx, prompt_lens, lengths = pad_rows([made.prompt_ids[i] for i in picks for _ in range(K)],
                                         [c for i in picks for c in made.completion_ids[i]])
    rewards = torch.from_numpy(made.rewards[picks])
    yw_idxs, yl_idxs, p = label_pairs(rewards, s, picks, uniforms)
    return dict(idx=idx, prompt_lens=prompt_lens, lengths=lengths, rewards=rewards, p=p,
                ref_logps=ref_logps[picks].flatten(), yw_idxs=yw_idxs, yl_idxs=yl_idxs)


def preference_batches(made, ref_logps, train: list[int], s: Settings):
    """batches(step) for `fit`: s.dpo_batch groups a step, pass after pass, each reshuffled."""
    train, K = np.array(train), made.rewards.shape[1]
    name = f"dpo {s.run_seed}" if s.run_seed else "dpo"
    permutation = functools.lru_cache(4)(lambda epoch: np.random.default_rng(
        draw_seed(s.seed, name, f"epoch {epoch}")).permutation(train))
    uniforms = torch.rand(len(made.rewards), K * (K - 1) // 2, generator=torch.Generator(
        ).manual_seed(draw_seed(s.seed, name, "labels")))  # a label is drawn once, as data are

    def batches(step: int):
        at = np.arange(step * s.dpo_batch, (step + 1) * s.dpo_batch)
        picks = np.array([permutation(i // len(train))[i % len(train)] for i in at.tolist()])
        micros = [preference_batch(made, ref_logps, part, s, uniforms)
                  for part in np.array_split(picks, min(s.dpo_accum, len(picks)))]
        if s.loss == "plackett-luce":
            return micros, len(picks)
        return micros, sum(len(m["yw_idxs"]) for m in micros)

    return batches


def sequence_logps(model, idx, prompt_lens, lengths):
    """log π(y|x) in nats: idx (B, T), (B,), (B,) -> (B,)."""
    def score(idx, rows):
        mask = dpo.completion_mask(prompt_lens[rows], lengths[rows], idx.size(1))
        logps = model.token_logps(idx, mask)
        return dpo.completion_logps(logps, prompt_lens[rows], lengths[rows])

    return by_length(score, idx, lengths)


def preference_loss(s: Settings, weight):
    """loss_fn for `fit`: Eq. 7 or what the settings name in its place, on one micro-batch."""
    if s.loss in ("unlikelihood", "preferred-ft"):  # satisfied pairs weigh as much as others
        weight = dpo.WEIGHTS["constant"]

    def loss_fn(model, micro):
        pi_logps = sequence_logps(model, micro["idx"], micro["prompt_lens"], micro["lengths"])
        yw, yl = micro["yw_idxs"], micro["yl_idxs"]
        rewards = dpo.implicit_reward(pi_logps.detach(), micro["ref_logps"], s.beta)
        pair = pi_logps, micro["ref_logps"], yw, yl
        if s.loss == "plackett-luce":
            losses, rewards, _ = dpo.plackett_luce_loss(*pair[:2], micro["rewards"], s.beta)
        elif s.loss == "unlikelihood":
            losses = dpo.unlikelihood_loss(pi_logps, yw, yl, s.alpha)
        elif s.loss == "preferred-ft":
            losses = dpo.preferred_ft_loss(pi_logps, yw)
        elif s.labels == "soft":
            losses, rewards = dpo.soft_dpo_loss(*pair, micro["p"], s.beta)
        elif s.weight == "sigmoid":
            losses, rewards = dpo.dpo_loss(*pair, s.beta)
        else:
            losses, rewards = dpo.weighted_loss(*pair, s.beta, weight)
        margin, logps = rewards[yw] - rewards[yl], pi_logps.detach()
        return losses.sum(), dict(
            accuracy=in_order(rewards[yw], rewards[yl]), margin=margin, margin_abs=margin.abs(),
            reward_chosen=rewards[yw], reward_rejected=rewards[yl], logp_chosen=logps[yw],
            logp_rejected=logps[yl], weight=weight(margin, s.beta))

    return loss_fn


def starts_at_reference(s: Settings, K: int):
    """check for `fit`: at step 0 π_θ = π_ref, so every margin is 0 and the loss is known."""
    tolerance = max(1e-5, s.beta * (0.005 if s.precision == "fp32" else 0.2))  # of other roundings

    def check(row: dict) -> None:
        off = row["margin_abs"]
        if s.loss == "plackett-luce":  # less where ties left a ranking shorter than K
            off = max(off, row["loss"] - math.lgamma(K + 1))
        elif s.loss == "pairwise" and s.weight == "sigmoid":
            off = max(off, abs(row["loss"] - math.log(2)))
        if off > tolerance:
            raise UserError(
                f"the first loss is {row['loss']:.4f} and its margins {row['margin_abs']:.4f} "
                "in size, where π_θ = π_ref gives log 2 = 0.6931 (log K! for Plackett-Luce) and 0; "
                "likely causes: dropout is on, the reference is another model, or "
                "groups/ref_logps.pt is stale (delete the groups folder)")

    return check


if __name__ == "__main__":
    from pipeline import main  # which imports this file, under its own name
    from support.runs import main_exit

    code = main_exit(main)
    if code == 130:  # Ctrl-C: a normal exit would wait for the threads at work
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
