"""From reviews to a preference-tuned model: the training loop, and the stages that call it.

    python train.py --stage dpo        makes what is missing (sft, groups), then runs DPO

Read `resumable` and `fit`, the loop; then `sft`, `reward`, `groups` and `dpo_stage`, in the order
in which they run; then the table of stages, `build` and `main`. The equations stand in dpo.py, the
settings in support/settings.py, every other stage (PPO, the frontier, ...) in experiments/.

B sequences, T tokens, G groups, K completions per prompt, N completions.
"""

import functools
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: OpenMP threads without work wait for a moment and then sleep. By default
# they keep spinning, which was 38 times slower while another program used one of two cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# imported first, so that Ctrl-C during the slow imports below prints one sentence
from support.runs import (Run, UserError, lock, main_exit, out_of_memory, read_json, read_rows,
                          save_json, write_whole)

import numpy as np
import torch
from tqdm import tqdm

import data_imdb
import dpo
from evaluate import held_out_measures, jackknife_optimum, pairwise_accuracy, report, write_samples
from gpt import GPT, GPTConfig, length_buckets, pad_rows
from job import Job, matmul_rate, seed_of
from reward import RewardModel, label_accuracy, label_batches, label_loss
from support import ranks, student
from support.settings import (OTHER_LOSSES, SETTINGS_OF, Settings, parse, settings_of, stage_of,
                              user_files)

# ------------------------------------------------------------------------------ the loop

class Diverged(UserError):
    """A number is not finite. Training may work at another learning rate."""


def resumable(job: Job, run: Run, parts: dict, steps: int, step: Callable[[int], dict | None],
              evaluation: Callable[[], dict] | None = None,
              evaluate_every: int = 0) -> dict | None:
    """Call step(i) for each i < steps, from the run's last checkpoint on.

    parts: name -> an object for the checkpoint, with state_dict and load_state_dict. step returns a
    row to log, or None. evaluation() is logged every `evaluate_every` steps (0: four times in all)
    and after the last. Returns the last evaluation. Raises Diverged if a row, an evaluation or a
    state is not finite, so that no checkpoint ever holds NaN.
    """
    def state(i: int) -> dict:
        """What a checkpoint after step i holds."""
        states = {name: part.state_dict() for name, part in parts.items()}
        check_finite(run, states, "a weight", i, saved)
        return states

    point = None
    start = saved = run.load_checkpoint(parts, steps)
    saved_at, every = time.monotonic(), evaluate_every or -(-steps // 4)
    bar = tqdm(range(start, steps), run.folder.name, initial=start, total=steps,
               disable=ranks.RANK > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
    for i in bar:
        began = time.perf_counter()
        row = step(i)
        if row:
            check_finite(run, row, "the loss or its gradient", i, saved)
            row = dict(step=i, seconds=time.perf_counter() - began) | row
            shown = {k: row[k] for k in ("loss", "reward", "kl") if k in row}
            bar.set_postfix(shown, refresh=False)
            run.log({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
        last = i + 1 == steps
        if evaluation and (last or (i + 1) % every == 0):
            state(i)  # raises Diverged before a model with NaN is evaluated
            point = evaluation()
            # with --groups the completions are logged too, because --stage judge reads them
            logged = point if job.cfg.groups else without_texts(point)
            check_finite(run, logged, "the evaluation", i, saved)
            run.log(dict(step=i, eval=logged))
        if last or time.monotonic() - saved_at >= job.cfg.save_secs:
            run.checkpoint(dict(step=i + 1) | state(i))
            saved, saved_at = i + 1, time.monotonic()
    return point or evaluation and evaluation()  # killed after the last step: evaluate again


def all_finite(state) -> bool:
    """Whether the tensors and floats in nested dicts and lists are finite."""
    if isinstance(state, (dict, list, tuple)):
        return all(map(all_finite, state.values() if isinstance(state, dict) else state))
    if torch.is_tensor(state):
        return not state.is_floating_point() or bool(state.isfinite().all())
    return not isinstance(state, float) or math.isfinite(state)


def check_finite(run: Run, state, what: str, step: int, saved: int) -> None:
    if not all_finite(state):
        stage = run.about["stage"]
        last = f"the last checkpoint is of step {saved}" if saved else "nothing was saved before it"
        rate = SETTINGS_OF[stage][-1].replace("groups", "sft")  # chosen uses the rate of sft
        rate = "--ppo-lr or --ppo-value-lr" if rate == "ppo" else f"--{rate}-lr"
        text = (f"{stage}: {what} is not finite at step {step}; {last}; try a lower {rate}, or "
                "--precision fp32")
        if module := run.settings.get("dpo_module"):
            raise student.CodeError(f"{text}. Perhaps the mistake is in {module}")
        raise Diverged(text)


def fit(job: Job, run: Run, model, batches, loss_fn, *, steps: int, lr: float, warmup: int,
        schedule="cosine", optimizer="adamw", weight_decay=0.0, grad_clip=1.0, evaluate_every=0,
        check=None, evaluation=None, unit="targets", more_parts=None) -> dict | None:
    """Minimise a loss over `steps` optimizer steps, resuming from the run's last checkpoint.

    batches(step) -> (micro-batches, n). A micro-batch is a dict of arrays; one is lengths (B,). n
    is the number of loss terms in the whole step, and `unit` names such a term. loss_fn(model,
    micro_batch) -> (the SUM of its terms, what to log: name -> a value per term). The sum over all
    micro-batches is divided by n once, so gradient accumulation equals one large batch. check(row)
    may refuse the first row. more_parts: more objects for the checkpoint; batches(step) may then
    depend on the model after step - 1. Returns the last evaluation.
    """
    cfg, device = job.cfg, job.device
    opt = make_optimizer(model, optimizer, lr, weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    body = getattr(model, "body", model)
    compiled = {name: torch.compile(getattr(body, name), dynamic=True)
                for name in ("hidden", "score_block") if cfg.compile}
    flops = 6 * sum(p.numel() for p in model.parameters())  # per token, without attention scores
    peak, ready = matmul_rate(device, cfg.precision), {}

    def prepare(i: int) -> tuple[list[tuple[int, dict]], int, int]:
        """This rank's micro-batches of step i on the device, each with its number in the step; then
        the number of terms and of tokens in the whole step."""
        micro_batches, n = batches(i)
        tokens = sum(int(m["lengths"].sum()) for m in micro_batches)
        share = ranks.share([*enumerate(micro_batches)])
        return [(k, to_device(m, device)) for k, m in share], n, tokens

    def step(i: int) -> dict:
        began = time.perf_counter()
        micro_batches, n, tokens = ready.pop(i, None) or prepare(i)
        model.train()
        rate = learning_rate(i, steps, lr, warmup, schedule)
        for group in opt.param_groups:
            group["lr"] = rate
        vars(body).update(compiled)
        total, logs = torch.zeros((), device=device), []
        for k, micro_batch in micro_batches:  # gradient accumulation
            torch.manual_seed(seed_of(cfg, run.about["stage"], i) + k)  # for dropout
            with job.autocast():
                loss, log = loss_fn(model, micro_batch)
            scaler.scale(loss / n).backward()
            total = total + loss.detach() / n
            logs.append(log)
        for name in compiled:
            delattr(body, name)  # sampling has other shapes, and would compile again
        if i + 1 < steps and not more_parts:
            ready[i + 1] = prepare(i + 1)  # while the GPU works
        if not micro_batches:  # a rank without a micro-batch has gradients of 0
            scaler.scale(0 * sum(p.sum() for p in model.parameters())).backward()
        ranks.add_up([total, *(p.grad for p in model.parameters())])
        scaler.unscale_(opt)  # clip the gradient itself, not its scaled copy
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        *logs, totals = to_arrays([*logs, dict(loss=total, grad_norm=norm)])
        row = summary(ranks.together(logs)) | summary([totals])
        if scaler.is_enabled() and not math.isfinite(row["grad_norm"]):
            row["grad_norm"] = None  # fp16: the scaler skips this step and lowers its scale
        if i == 0 and check and math.isfinite(row["loss"]):
            check(row)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        return row | {"lr": rate, "tokens_per_s": tokens / seconds, f"{unit}_per_s": n / seconds,
                      "mfu": flops * tokens / seconds / (peak * ranks.WORLD)}

    parts = dict(model=model, optimizer=opt, scaler=scaler) | (more_parts or {})
    point = resumable(job, run, parts, steps, step,
                      evaluation and (lambda: evaluation(model)), evaluate_every)
    model.eval()
    return point


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done,
                   "cosine": 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2}[schedule]


def make_optimizer(model, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if name == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=lr)
    groups = [dict(params=[p for p in model.parameters() if (p.dim() >= 2) == matrix],
                   weight_decay=weight_decay * matrix) for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def split_picks(picks, accum: int = 1) -> list[np.ndarray]:
    """A step's indices, divided into `accum` micro-batches per rank, or fewer: none is empty."""
    return np.array_split(picks, min(accum * ranks.WORLD, len(picks)))


def to_device(micro_batch: dict, device: torch.device) -> dict:
    """The micro-batch's arrays as tensors on the device. Copies to a GPU start from pinned memory,
    so that the CPU need not wait for them."""
    tensors = {name: torch.as_tensor(x) for name, x in micro_batch.items()}
    if device.type == "cuda":
        tensors = {name: x.pin_memory() for name, x in tensors.items()}
    return {name: x.to(device, non_blocking=True) for name, x in tensors.items()}


def to_arrays(logs: list[dict]) -> list[dict]:
    """Each tensor as an array. All are copied at once, so that the CPU waits for the GPU once."""
    tensors = [x.float().flatten() for log in logs for x in log.values()]
    borders = np.cumsum([len(x) for x in tensors])
    parts = iter(np.split(torch.cat(tensors).cpu().numpy(), borders))
    return [{name: next(parts) for name in log} for log in logs]


def summary(logs: list[dict]) -> dict[str, float]:
    """The mean of each logged value over all terms of the step, and the quantiles of the weight."""
    values = {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}
    out = {name: float(x.mean()) for name, x in values.items()}
    if "weight" in values:
        out |= {f"weight_{p}": float(np.percentile(values["weight"], p))
                for p in (5, 25, 50, 75, 95)}
    return out


# ------------------------------------------------------------------------------ sft

def lm_loss(model, micro_batch):
    """The negative log-likelihood in nats, summed over all real tokens except each row's first."""
    return -model.token_logps(micro_batch["idx"], micro_batch["mask"]).sum(), {}


@torch.no_grad()
def validation_loss(job: Job, model) -> float:
    """Nats per token on at most 1,024 windows of reviews that SFT has not seen."""
    tokens, nll = job.data.tokens["valid"], 0.0
    starts, lengths = tokens.windows(job.cfg.n_ctx)
    picks = np.random.default_rng(0).permutation(len(starts))[:1024]
    starts, lengths = starts[picks], lengths[picks]
    model.eval()
    for part in length_buckets(torch.from_numpy(lengths), 64):
        idx, mask = data_imdb.lm_batch(tokens, starts[part], lengths[part])
        with job.autocast():
            nll += float(lm_loss(model, to_device(dict(idx=idx, mask=mask), job.device))[0])
    return nll / int(lengths.sum())


def sft(job: Job, run: Run) -> None:
    """Reviews -> π_ref, by the next-token loss on the splits train and unsup."""
    cfg, data, tokens = job.cfg, job.data, job.data.unlabelled()
    dropped = [f"{n:,} of {k[4:]}" for k, n in data.notes.items() if n]
    print(f"  sft: {len(tokens):,} reviews with {tokens.offsets[-1]:,} tokens in all; left out as "
          f"duplicates: {', '.join(dropped) or 'none'}")
    torch.manual_seed(seed_of(cfg, "sft", "weights"))
    model = job.pretrained(cfg.init, cfg.dropout) if cfg.init else GPT(GPTConfig(
        data.enc.n_vocab, cfg.n_ctx, cfg.n_layer, cfg.n_head, cfg.n_embd,
        cfg.dropout)).to(job.device)
    batches = data_imdb.lm_batches(tokens, cfg.n_ctx, cfg.sft_batch, cfg.sft_accum * ranks.WORLD,
                                   seed_of(cfg, "sft", "batches"))
    fit(job, run, model, batches, lm_loss, steps=cfg.sft_steps, lr=cfg.sft_lr,
        warmup=cfg.sft_warmup, weight_decay=cfg.sft_decay,
        evaluation=lambda model: dict(loss=validation_loss(job, model)))
    job.save_policy(run, model)


def report_sft(job: Job) -> None:
    last = read_rows(job.folder("sft") / "metrics.jsonl")[-1]  # its evaluation
    print(f"sft: validation loss {last['eval']['loss']:.3f} nats per token")


def chosen(job: Job, run: Run) -> None:
    """Section 4 · without an SFT model, π_ref maximises the likelihood of the chosen completions.
    There is one pass only, because more passes would memorise a small file."""
    cfg, groups, (train, _) = job.cfg, job.groups, job.split
    model = job.pretrained(cfg.init, cfg.dropout) if cfg.init else job.policy("sft", cfg.dropout)
    best = groups.rewards.argmax(1)
    order = np.random.default_rng(seed_of(cfg, "chosen", "order")).permutation(train)

    def batches(step: int):
        picks, micro_batches, n = order[step * cfg.sft_batch :][: cfg.sft_batch], [], 0
        for part in split_picks(picks, cfg.sft_accum):
            idx, prompt_lens, lengths = pad_rows([groups.prompt_ids[i] for i in part],
                                                 [groups.completion_ids[i][best[i]] for i in part])
            mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
            micro_batches.append(dict(idx=idx, mask=mask, lengths=lengths))
            n += int(mask.sum())
        return micro_batches, n

    steps = max(1, len(train) // cfg.sft_batch)
    fit(job, run, model, batches, lm_loss, steps=steps, lr=cfg.sft_lr / 10,
        warmup=min(cfg.sft_warmup, steps // 10), weight_decay=cfg.sft_decay)
    job.save_policy(run, model)


# ------------------------------------------------------------------------------ reward

def reward(job: Job, run: Run) -> None:
    """Labels -> r* on IMDb: the SFT model's body with a scalar head. On the toy r* is exact."""
    cfg, data = job.cfg, job.data
    model = RewardModel.from_gpt(job.policy("sft"), cfg.reward_ctx, cfg.dropout).to(job.device)
    labels = {k: v.astype(np.float32) for k, v in data.labels.items() if v is not None}

    def batches(step: int):
        rng = np.random.default_rng(seed_of(cfg, "reward", step))
        return label_batches(data.tokens["train"], labels["train"], cfg.reward_batch,
                             cfg.reward_ctx, cfg.max_new_tokens + 8, rng,
                             ranks.WORLD), 2 * cfg.reward_batch

    fit(job, run, model, batches, label_loss, steps=cfg.reward_steps, lr=cfg.reward_lr,
        warmup=cfg.reward_steps // 20, weight_decay=cfg.sft_decay)
    n, measures = 5_000, {}  # n reviews per split: a standard error of half a percent
    for split in ("valid", "test"):
        for name, crop in ("whole", 0), ("crop", cfg.max_new_tokens):
            with job.autocast():
                measures[f"{split}_{name}"] = label_accuracy(
                    model, list(data.tokens[split])[:n], labels[split][:n], cfg.reward_ctx, crop)
    save_json(run.path("report.json"), measures)
    run.finish(model.checkpoint())


def report_reward(job: Job) -> None:
    for name, row in read_json(job.folder("reward") / "report.json").items():
        print(f"r* on {name.replace('_', ', ')}: accuracy {row['accuracy']:.3f}, calibration error "
              f"{row['calibration_error']:.3f}")


# ------------------------------------------------------------------------------ groups

CHUNK = 2048  # completions from one seed; a checkpoint may follow each chunk


class Completions(list):
    """Lists of token ids. A checkpoint holds them as one flat tensor, which is fast to save."""

    def state_dict(self) -> dict:
        return dict(ids=torch.tensor([i for ids in self for i in ids], dtype=torch.int32),
                    lengths=[len(ids) for ids in self])

    def load_state_dict(self, state: dict) -> None:
        self[:] = [ids.tolist() for ids in state["ids"].split(state["lengths"])]


def sample_all(job: Job, run: Run, model: GPT, prompts, name: str) -> list[list[int]]:
    """One completion per prompt, in chunks, each drawn from its own seed."""
    done = Completions()

    def step(i: int) -> None:
        part = prompts[i * CHUNK : (i + 1) * CHUNK]
        done.extend(job.sample(model, part, seed_of(job.cfg, name, i)))

    resumable(job, run, dict(completions=done), -(-len(prompts) // CHUNK), step)
    return done


def sequence_logps(model: GPT, idx, prompt_lens, lengths) -> torch.Tensor:
    """log π(y|x) in nats: idx (B, T), prompt_lens (B,), lengths (B,) -> (B,)."""
    mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
    return dpo.completion_logps(model.token_logps(idx, mask), prompt_lens, lengths)


@torch.no_grad()
def score(job: Job, model: GPT, prompts, completions) -> torch.Tensor:
    """log π(y|x) of each completion, (N,) on the CPU, computed as in training."""
    lengths = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions)])
    out = torch.empty(len(prompts))
    for part in length_buckets(lengths, max(1, job.batch_size(model) // 8)):
        padded = pad_rows([prompts[i] for i in part], [completions[i] for i in part])
        with job.autocast():
            out[part] = sequence_logps(model, *(x.to(job.device) for x in padded)).cpu()
    return out


def groups(job: Job, run: Run) -> None:
    """Samples π_ref, computes r* and log π_ref of the samples, evaluates π_ref and the optimum.

    A preference file (--groups) has its own completions. Then there is no r* and no optimum.
    """
    cfg, data, reference = job.cfg, job.data, job.load_reference()
    optimum, valid, redrawn = [], [], 0
    if cfg.groups:
        groups, notes = job.groups, job.groups.dropped
        held = dict.fromkeys(tuple(groups.prompt_ids[i]) for i in job.split[1])
        held_out = list(map(list, held))[: cfg.eval_prompts]
    else:
        judge = job.reward  # first: a missing package fails here, not after hours of sampling
        prompts, _ = data_imdb.sample_prompts(data.tokens["train"], cfg.prompts,
                                              seed_of(cfg, "groups", "prompts"))
        held_out, redrawn = data_imdb.sample_prompts(
            data.tokens["test"], cfg.eval_prompts, seed_of(cfg, "evaluate", "prompts"),
            avoid=set(map(tuple, prompts)))
        valid, _ = data_imdb.sample_prompts(
            data.tokens["valid"], cfg.valid_prompts, seed_of(cfg, "validate", "prompts"),
            avoid=set(map(tuple, prompts + held_out)))
        repeated = [p for p in prompts for _ in range(cfg.num_completions)] + \
                   [p for p in held_out for _ in range(cfg.optimum_samples)]
        samples = sample_all(job, run, reference, repeated, "groups")
        rewards, n = judge(repeated, samples), len(prompts) * cfg.num_completions
        groups = data_imdb.gather_groups(prompts, samples[:n], rewards[:n])
        notes = groups.dropped | {"evaluation prompts drawn again": redrawn}
        optimum = jackknife_optimum(rewards[n:].view(len(held_out), -1))
        for point in optimum:
            del point["rewards"], point["kls"]  # one value per prompt, not needed later
    left_out = [f"{n:,} ({reason})" for reason, n in groups.dropped.items() if n]
    print(f"  groups: {len(groups.rewards):,} prompts with {groups.K} completions each; left out: "
          f"{', '.join(left_out) or 'none'}" + bool(redrawn) *
          f"; {redrawn:,} test prompts also occurred in training and were drawn again")
    ref_logps = score(job, reference, *groups.flat(range(len(groups.rewards))))
    point = job.evaluate(reference, reference, held_out)
    del point["seconds"]  # so that the file is the same when it is made again
    save_json(run.path("reference.json"), dict(point=point, optimum=optimum, prompts=held_out,
                                               notes=notes, valid=valid))
    write_whole(run.path("groups.jsonl"), lambda f: data_imdb.write_groups(f, groups, data.enc))
    run.finish(dict(ref_logps=ref_logps.view(-1, groups.K)))


# ------------------------------------------------------------------------------ dpo

def preference_batches(cfg: Settings, groups: data_imdb.Groups, ref_logps, train: list[int]):
    """batches(step) for `fit`: dpo_batch groups per step; each pass has all groups in a new order.

    A micro-batch holds each completion once, however many pairs it is in (Appendix B).
    """
    name = f"dpo {cfg.run_seed}" if cfg.run_seed else "dpo"
    generator = torch.Generator().manual_seed(seed_of(cfg, name, "labels"))  # once for all passes
    uniforms = torch.rand(len(groups.rewards), math.comb(groups.K, 2), generator=generator)
    # [group, w, l]: one draw per pair, so that every pass has the same flipped pairs
    flips = cfg.label_noise and torch.rand(len(groups.rewards), groups.K, groups.K,
                                           generator=generator) < cfg.label_noise

    @functools.lru_cache(4)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng(seed_of(cfg, name, f"epoch {number}")).permutation(train)

    def micro_batch(picks) -> dict:
        idx, prompt_lens, lengths = pad_rows(*groups.flat(picks))  # (G*K, T), (G*K,), (G*K,)
        rewards = torch.from_numpy(groups.rewards[picks])
        yw_idxs, yl_idxs, p = dpo.label_pairs(rewards, cfg.labels, cfg.label_scale, uniforms[picks])
        if cfg.label_noise:
            flipped = flips[picks].flatten(0, 1)[yw_idxs, yl_idxs % groups.K]  # (N,)
            yw_idxs, yl_idxs = (torch.where(flipped, yl_idxs, yw_idxs),
                                torch.where(flipped, yw_idxs, yl_idxs))
        return dict(idx=idx, prompt_lens=prompt_lens, lengths=lengths, rewards=rewards, p=p,
                    ref_logps=ref_logps[picks].flatten(), yw_idxs=yw_idxs, yl_idxs=yl_idxs)

    def batches(step: int) -> tuple[list[dict], int]:
        picks = np.array([epoch(i // len(train))[i % len(train)]
                          for i in range(step * cfg.dpo_batch, (step + 1) * cfg.dpo_batch)])
        micro_batches = [micro_batch(part) for part in split_picks(picks, cfg.dpo_accum)]
        pairs = sum(len(m["yw_idxs"]) for m in micro_batches)
        return micro_batches, len(picks) if cfg.loss == "plackett-luce" else pairs

    return batches


def preference_loss(cfg: Settings):
    """loss_fn for `fit`: Eq. 7 on one micro-batch, or the loss that the settings name instead."""
    # OTHER_LOSSES push all pairs equally, so their logged weight is constant
    weight = dpo.WEIGHTS["constant"] if cfg.loss in OTHER_LOSSES else \
        student.load_weight(cfg.weight, dpo.WEIGHTS)

    def loss_fn(model, micro_batch):
        names = "idx", "prompt_lens", "lengths", "ref_logps", "yw_idxs", "yl_idxs"
        idx, prompt_lens, lengths, ref_logps, yw, yl = (micro_batch[k] for k in names)
        if cfg.loss == "reference-free":
            ref_logps = torch.zeros_like(ref_logps)
        pi_logps = sequence_logps(model, idx, prompt_lens, lengths)
        rewards = dpo.implicit_reward(pi_logps.detach(), ref_logps, cfg.beta)
        if cfg.loss == "plackett-luce":
            losses, rewards, _ = dpo.plackett_luce_loss(pi_logps, ref_logps,
                                                        micro_batch["rewards"], cfg.beta)
        elif cfg.loss == "unlikelihood":
            losses = dpo.unlikelihood_loss(pi_logps, yw, yl, cfg.alpha)
        elif cfg.loss == "preferred-ft":
            losses = dpo.preferred_ft_loss(pi_logps, yw)
        elif cfg.labels == "soft":
            losses, rewards = dpo.soft_dpo_loss(pi_logps, ref_logps, yw, yl, micro_batch["p"],
                                                cfg.beta)
        elif cfg.weight == "sigmoid":
            losses, rewards = dpo.dpo_loss(pi_logps, ref_logps, yw, yl, cfg.beta)
        else:
            losses, rewards = dpo.weighted_loss(pi_logps, ref_logps, yw, yl, cfg.beta, weight)
        if not losses.requires_grad:  # possible in a student's dpo_loss
            raise student.CodeError(f"{cfg.dpo_module or 'dpo.py'}: the losses have no gradient; "
                                    "compute them from pi_logps")
        margin, logps = rewards[yw] - rewards[yl], pi_logps.detach()
        return losses.sum(), dict(
            accuracy=pairwise_accuracy(rewards[yw], rewards[yl]), margin=margin,
            margin_abs=margin.abs(), reward_chosen=rewards[yw], reward_rejected=rewards[yl],
            logp_chosen=logps[yw], logp_rejected=logps[yl], weight=weight(margin, cfg.beta))

    return loss_fn


def starts_at_reference(cfg: Settings, K: int):
    """check for `fit`: at step 0 π_θ = π_ref, so every margin is 0 and the loss is known."""
    if cfg.loss == "reference-free":
        return None
    # how much a log-prob may differ, in nats: a batch of another shape is rounded differently, and
    # compiled code in half precision rounds less often
    nats = 0.005 if cfg.precision == "fp32" else 0.5 if cfg.compile else 0.2
    tolerance = max(1e-5, cfg.beta * nats)

    def check(row: dict) -> None:
        off = row["margin_abs"]
        if cfg.loss == "plackett-luce":  # smaller than log K! if ties made a ranking shorter
            off = max(off, row["loss"] - math.lgamma(K + 1))
        elif cfg.loss == "pairwise" and cfg.weight == "sigmoid":
            off = max(off, abs(row["loss"] - math.log(2)))
        if off > tolerance:
            raise UserError(
                f"the first loss is {row['loss']:.4f} with margins of {row['margin_abs']:.4f}, "
                "wanted log 2 = 0.6931 (log K! for Plackett-Luce) and 0, because π_θ starts as "
                f"π_ref; likely causes: {cfg.dpo_module and f'a mistake in {cfg.dpo_module}, '}"
                "dropout is on, the reference is another model, or groups/ref_logps.pt is of "
                "another reference (delete the groups folder)")

    return check


def ranked(groups: data_imdb.Groups, train: list[int]) -> list[int]:
    """The groups that Plackett-Luce can learn from: two completions or more are without a tie."""
    _, tied = dpo.ranking_logps(torch.zeros(groups.rewards.shape), torch.from_numpy(groups.rewards))
    kept = [i for i in train if (~tied[i]).sum() >= 2]
    print(f"  dpo: {int(tied[train].sum())} tied completions are left out of their rankings, "
          f"{len(train) - len(kept)} of {len(train)} groups are skipped")
    if not kept:
        raise UserError("each group has fewer than two completions without a tie: there is nothing "
                        "to rank; leave --loss plackett-luce out")
    return kept


HELD_OUT = 128  # the number of held-out groups that an evaluation scores, at most


def dpo_stage(job: Job, run: Run, fresh_groups=None) -> None:
    """Groups -> π_θ by Eq. 7. π_θ starts as π_ref, whose log-probs stage groups has computed.

    Online DPO gives fresh_groups(job, policy, batches), which returns batches to use instead.
    """
    cfg, groups, ref_logps, (train, held) = job.cfg, job.groups, job.ref_logps, job.split
    train = train[: cfg.train_prompts or None]
    policy, held = job.load_reference(), np.array(held[:HELD_OUT])
    # No training step needs π_ref. It is kept if it takes less than a twentieth of the memory; if
    # not, each evaluation reads it again.
    size = 4 * sum(p.numel() for p in policy.parameters())
    kept = job.load_reference() if size < job.memory() / 20 else None

    def evaluation(policy) -> dict:
        point = evaluate_policy(job, policy, kept or job.load_reference())
        logps = score(job, policy, *groups.flat(held))
        return point | held_out_measures(logps, ref_logps[held].flatten(),
                                         torch.from_numpy(groups.rewards[held]))

    with student.own_code(dpo, cfg.dpo_module):  # not for π_ref and the groups
        if cfg.loss == "plackett-luce":
            train = ranked(groups, train)
        stored = preference_batches(cfg, groups, ref_logps, train)
        fresh = fresh_groups and fresh_groups(job, policy, stored)
        batches, loss_fn = (student.blamed(f, cfg.dpo_module)
                            for f in (fresh or stored, preference_loss(cfg)))
        point = fit(job, run, policy, batches, loss_fn, steps=cfg.dpo_steps, lr=cfg.dpo_lr,
                    warmup=cfg.dpo_warmup, schedule=cfg.dpo_schedule, optimizer=cfg.dpo_optimizer,
                    grad_clip=cfg.grad_clip, evaluate_every=cfg.eval_every,
                    check=starts_at_reference(cfg, groups.K), evaluation=evaluation,
                    unit="groups" if cfg.loss == "plackett-luce" else "pairs",
                    more_parts=fresh and dict(fresh=fresh))
    finish_method(job, run, policy, point)


def evaluate_policy(job: Job, policy: GPT, reference: GPT) -> dict:
    """The policy's point on the test prompts, and its reward and KL on the validation prompts."""
    valid = job.reference_eval["valid"] * job.cfg.valid_samples
    point = job.evaluate(policy, reference, job.reference_eval["prompts"])
    if valid:
        on_valid = job.evaluate(policy, reference, valid)
        point |= dict(valid_reward=on_valid["reward"], valid_kl=on_valid["kl"])
    return point


def without_texts(point: dict) -> dict:
    return {k: v for k, v in point.items() if k != "completions"}


def finish_method(job: Job, run: Run, policy: GPT, point: dict) -> None:
    """Writes samples.txt, result.json (the last point), and model.pt, which marks it finished."""
    write_samples(job, run, point)
    save_json(run.path("result.json"), without_texts(point))
    job.save_policy(run, policy)


# ------------------------------------------------------------------------------ the command

class Stage(NamedTuple):
    make: Callable[[Job, Run], None]
    parents: Callable[[Settings], list[str]]  # the stages it reads; UserError if it cannot run
    final: str = "model.pt"  # its last file, which marks it finished
    report: Callable[[Job], None] | None = None  # prints its result
    compares: Callable[[Job], dict[str, str]] | None = None  # makes other runs: name -> hash
    check: Callable[[Job], None] | None = None  # checks a user's input before parents are made


def needs(wrong: bool, message: str, parents: list[str]) -> list[str]:
    if wrong:
        raise UserError(message)
    return parents


def parents_of_groups(cfg: Settings) -> list[str]:
    if cfg.groups:
        return [] if cfg.reference else ["chosen"]
    return ["sft"] + ["reward"] * (cfg.corpus == "imdb" and cfg.reward == "auto")


STAGES = {
    "sft": Stage(sft, lambda cfg: [], report=report_sft),
    "reward": Stage(reward, lambda cfg: needs(
        cfg.corpus == "toy", "r* of the toy corpus is exact: there is nothing to train; go on with "
        "--stage groups or --stage dpo", ["sft"]), report=report_reward),
    "chosen": Stage(chosen, lambda cfg: needs(
        not cfg.groups, "--stage chosen fine-tunes π_ref for a preference file: give --groups FILE",
        [] if cfg.init else ["sft"])),
    "groups": Stage(groups, parents_of_groups, "ref_logps.pt")}
for name in ("dpo", *OTHER_LOSSES):
    STAGES[name] = Stage(dpo_stage, lambda cfg: ["groups", *parents_of_groups(cfg)],
                         report=functools.partial(report, stage=name))
PARALLEL = *STAGES, "rm", "best-of-n"  # the stages that torchrun may start


def is_made(job: Job, stage: str) -> bool:
    return (job.folder(stage) / STAGES[stage].final).exists()


def build(job: Job, stage: str, is_parent: bool = False) -> str:
    """Make a stage, and its missing parents before it. Returns the hash of its files.

    A run's identity is its settings and its parents' hashes. A parent that is made now is reported.
    """
    cfg, folder, spec = job.cfg, job.folder(stage), STAGES[stage]
    if folder in job.hashes:
        return job.hashes[folder]
    parents = {parent: build(job, parent, True) for parent in spec.parents(cfg)}
    if spec.compares:
        # without the lock two commands would make the same runs
        with nullcontext() if is_made(job, stage) else lock(job.root, ".runs.lock"):
            parents |= spec.compares(job)
    parents |= {"data": job.data.identity} | user_files(cfg, stage)
    run = Run(folder, settings_of(cfg, SETTINGS_OF[stage]), parents, spec.final, job.about(stage))
    if run.finished:
        print(f"{stage}: found in {folder}", flush=True)
    else:
        print(f"{stage}: making {folder}", flush=True)
        began = time.perf_counter()
        with run:
            try:
                spec.make(job, run)
            except student.CodeError as error:
                if not run.path("resume.pt").exists():
                    raise
                raise UserError(f"{error}, after you delete {folder}: its checkpoint was made by "
                                "the code before the correction") from error
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise UserError(f"{stage} does not fit into the memory: give a smaller model or "
                                "--max-new-tokens; for sft a higher --sft-accum, for dpo a higher "
                                "--dpo-accum, for a frontier --jobs 1") from None
        print(f"{stage}: done in {time.perf_counter() - began:.1f} s", flush=True)
        if is_parent and spec.report:
            spec.report(job)
    job.hashes[folder] = run.hash
    return job.hashes[folder]


def unfinished(job: Job, stage: str) -> set[str]:
    """The unfinished stages: this one and all that it needs, unless they are finished."""
    parents = set().union(*(unfinished(job, parent) for parent in STAGES[stage].parents(job.cfg)))
    return parents if is_made(job, stage) else parents | {stage}


def main(argv=None) -> None:
    began = time.perf_counter()
    stage, preset, headline, cfg = parse(argv, torch.cuda.is_available())
    if ranks.WORLD > 1 and stage not in PARALLEL:
        raise UserError(f"--stage {stage} runs in one process (a frontier uses all GPUs by itself):"
                        " start it without torchrun")
    job = Job(preset, cfg, sys.argv[1:] if argv is None else list(argv))
    ranks.start(job.device.type == "cuda")
    print(headline, flush=True)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    student.load_weight(cfg.weight, dpo.WEIGHTS)  # a user's input is checked before hours of work
    if cfg.dpo_module:
        student.own_functions(dpo, cfg.dpo_module)
    with ranks.rank_0_first():
        job.read_given(left := unfinished(job, stage))
        if stage in left and STAGES[stage].check:
            STAGES[stage].check(job)
        job.data
    build(job, stage)
    if STAGES[stage].report:
        STAGES[stage].report(job)
    print(f"{time.perf_counter() - began:.0f} s in all")
    ranks.stop()


if __name__ == "__main__":
    if stage_of(sys.argv[1:]) not in STAGES:  # one of experiments/, which imports this file
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        os.execv(sys.executable, [sys.executable, "-P", "-m", "experiments", *sys.argv[1:]])
    sys.exit(main_exit(main))
