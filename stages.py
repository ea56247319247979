"""The stages, from reviews to a preference-tuned model: each reads the previous ones' files.

A stage is a short function (Context, Run): load, build the loss, `fit`, save. pipeline.py calls
them in order. Knows no equation (dpo.py) and no loop (train.py).

P prompts, K completions a prompt, N pairs.
"""

import functools
import hashlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data_imdb
import dpo
import plot_frontier
from evaluate import evaluate, in_order, optimal_reward, unbiased
from gpt import GPT, GPTConfig, cores, on_cores, pad_rows
from reward import (
    ModelReward,
    RewardModel,
    SiebertReward,
    ToyReward,
    accuracy,
    label_batches,
    label_loss,
)
from support.runs import Run, UserError, load_tensors, read_json, write_whole
from support.settings import BASE, PRESETS, Settings, suffix
from train import (
    STOP,
    Interrupted,
    Optim,
    autocast,
    draw_seed,
    fit,
    lm_batches,
    lm_loss,
    preference_batches,
    preference_loss,
    restoring,
    starts_at_reference,
)

# ------------------------------------------------------------------------------ what they share


OTHER_LOSSES = "unlikelihood", "preferred-ft"  # stages that differ from dpo by their loss alone
# the groups of settings that decide a stage's result
DPO = (*BASE, "method", "dpo")
SETTINGS_OF = {"sft": BASE[:3], "reward": BASE[:4], "chosen": BASE, "groups": BASE,
               "dpo": DPO, "unlikelihood": DPO, "preferred-ft": DPO, "inspect": DPO,
               "degenerate": DPO, "rm": (*BASE, "rm"), "ppo": (*BASE, "rm", "method", "ppo"),
               "ppo-gt": (*BASE, "method", "ppo"), "best-of-n": (*BASE, "rm", "samples"),
               "frontier": (*BASE, "rm", "method", "dpo", "ppo", "samples", "frontier")}


class Context:
    """The settings of one command, and what several stages load."""

    def __init__(self, preset: str, s: Settings, command: list[str]):
        if s.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda was asked for, and torch finds no CUDA device: leave "
                            "the flag out, or install a CUDA build of torch")
        name = "cuda" if s.device != "cpu" and torch.cuda.is_available() else "cpu"
        half = "bf16" if name == "cuda" and torch.cuda.is_bf16_supported(False) else "fp16"
        self.auto = half if name == "cuda" else "fp32"
        if s.precision == "auto":
            s = replace(s, precision=self.auto)
        self.s, self.preset, self.device = s, preset, torch.device(name)
        self.root, self.command, self.built = Path(s.out) / preset, command, {}
        torch.set_float32_matmul_precision("high")  # TF32 where float32 matrices meet a GPU
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape

    @functools.cached_property
    def data(self) -> data_imdb.Data:
        return data_imdb.load(self.s.corpus, self.s.vocab, Path(self.s.data), self.s.reviews,
                              self.s.seed)

    def beside(self, settings: Settings) -> "Context":
        """Other settings on the same data and the same finished parents."""
        other = Context(self.preset, settings, self.command)
        other.built, other.data = self.built, self.data
        return other

    def folder(self, stage: str) -> Path:
        base = PRESETS[self.preset]
        if base.precision == "auto":
            base = replace(base, precision=self.auto)
        if stage in OTHER_LOSSES:
            base = replace(base, loss=stage)
        return self.root / (stage + suffix(self.s, base, SETTINGS_OF[stage]))

    def rows(self) -> int:
        """Sequences sampled at once: what a KV cache of their length may take."""
        length = self.s.n_ctx if self.s.groups else 9 + self.s.max_new
        return max(1, (80_000 if self.device.type == "cpu" else 2**16) // length)

    def parts(self, accum: int, dropout: float = 0.0) -> int:
        """Micro-batches of a step: each core `accum`. Dropout's draws need one after another."""
        return accum * (1 if dropout else cores(self.device))

    def policy(self, stage: str, dropout: float = 0.0) -> GPT:
        path = self.folder(stage) / "model.pt"
        return self.fitting(GPT.load(path, dropout), path)

    def pretrained(self, name: str, dropout: float = 0.0) -> GPT:
        return self.fitting(GPT.from_pretrained(name, dropout, Path(self.s.data)), name)

    def fitting(self, model: GPT, name) -> GPT:
        """The model, on the device. UserError where its tokens or its context are other ones."""
        if model.config.vocab_size != self.data.enc.n_vocab:
            raise UserError(f"{name} has {model.config.vocab_size} tokens, the tokenizer of this "
                            f"command {self.data.enc.n_vocab}: give the --vocab that it was "
                            "trained with")
        if model.config.n_ctx < self.s.n_ctx:
            raise UserError(f"{name} has a context of {model.config.n_ctx} tokens, this command "
                            f"wants {self.s.n_ctx}: give --n-ctx {model.config.n_ctx}")
        return model.to(self.device)

    @functools.cached_property
    def reward(self):
        """r*, or None where other people's preferences came without it."""
        if self.s.reward == "siebert":
            return SiebertReward(self.data.enc, self.s.siebert_path, self.device)
        if self.s.corpus == "toy":
            return ToyReward(self.data.enc)
        model = RewardModel.load(self.folder("reward") / "model.pt").to(self.device)
        return ModelReward(model, self.data.eot)

    def evaluate(self, policy, reference, prompts, **kwargs) -> dict:
        """A point on these prompts: the same uniforms for every policy of this seed."""
        began = time.perf_counter()
        reward = None if self.s.groups else self.reward  # other people's rewards are not our r*
        with autocast(self.device, self.s.precision):
            point = evaluate(policy, reference, prompts, reward, self.data.eot, self.s.max_new,
                             draw_seed(self.s.seed, "evaluate", 0), rows=self.rows(),
                             grammatical=getattr(reward, "grammatical", None), **kwargs)
        return point | dict(seconds=round(time.perf_counter() - began, 2))

    @functools.cached_property
    def reference(self) -> GPT:
        """π_ref: the SFT model, or for a preference file the one given or fine-tuned for it."""
        s, path = self.s, Path(self.s.reference)
        if not s.reference:
            return self.policy("chosen" if s.groups else "sft")
        if (path / "model.pt").exists():
            ranks = data_imdb.load_encoding(path / "bpe.tiktoken")._mergeable_ranks
            if ranks != self.data.enc._mergeable_ranks:
                raise UserError(f"{path} was trained with another tokenizer than this command's: "
                                "give the --preset, --vocab and --seed that it was made with")
            return self.fitting(GPT.load(path / "model.pt"), path)
        return self.pretrained(s.reference)

    @functools.cached_property
    def groups(self) -> data_imdb.Groups:
        """The stage's own file once it is made, else what --groups names."""
        made = (self.folder("groups") / "ref_logps.pt").exists()
        path = self.folder("groups") / "groups.jsonl" if made else Path(self.s.groups)
        return data_imdb.read_groups(path, self.data.enc, self.s.n_ctx)

    @functools.cached_property
    def split(self) -> tuple[list[int], list[int]]:
        """Indices of the groups to train on and to hold out."""
        return split_prompts(self.groups.prompt_ids)

    @functools.cached_property
    def before(self) -> dict:
        """What the groups stage says of π_ref: its point, the prompts it was judged on."""
        return read_json(self.folder("groups") / "reference.json")

    @functools.cached_property
    def ref_logps(self) -> torch.Tensor:
        """log π_ref of the groups' completions, (P, K)."""
        return load_tensors(self.folder("groups") / "ref_logps.pt")["ref_logps"]


def split_prompts(prompts) -> tuple[list[int], list[int]]:
    """Indices of the groups to train on and, a tenth of the distinct prompts, to hold out."""
    distinct = sorted(set(map(tuple, prompts)),
                      key=lambda p: hashlib.sha256(repr(p).encode()).digest())
    if len(distinct) < 3:
        raise UserError(f"the preferences have {len(distinct)} distinct prompts; three are needed, "
                        "two of them to be held out")
    held = set(distinct[: max(2, len(distinct) // 10)])
    train = [i for i, p in enumerate(prompts) if tuple(p) not in held]
    return train, [i for i, p in enumerate(prompts) if tuple(p) in held]


@torch.no_grad()
def score(ctx: Context, model: GPT, prompts, completions) -> torch.Tensor:
    """log π(y|x) of each completion (N,), by the same path as in training."""
    lengths = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions)])
    out = torch.empty(len(prompts))

    def logps(part):
        idx, prompt_lens, ends = (x.to(ctx.device) for x in pad_rows(
            [prompts[i] for i in part], [completions[i] for i in part]))
        with autocast(ctx.device, ctx.s.precision):
            mask = dpo.completion_mask(prompt_lens, ends, idx.size(1))
            logps = model.token_logps(idx, mask)
        return dpo.completion_logps(logps, prompt_lens, ends).cpu()

    # alike in length: least padding; fewer than are sampled: all of their tokens are at work
    parts = lengths.argsort().split(max(1, ctx.rows() // (4 * cores(ctx.device))))
    for part, values in zip(parts, on_cores(ctx.device, logps, parts)):
        out[part] = values
    return out


def save_json(path: Path, obj) -> None:
    write_whole(path, lambda file: file.write(json.dumps(obj).encode()))


# ------------------------------------------------------------------------------ sft


def lm_tokens(data: data_imdb.Data) -> data_imdb.Tokens:
    """Train and unsup as one stream: a language model needs no labels."""
    a, b = data.tokens["train"], data.tokens["unsup"]
    return data_imdb.Tokens(np.concatenate([a.stream[:-1], b.stream]),
                            np.concatenate([a.offsets[:-1], b.offsets + a.offsets[-1]]))


@torch.no_grad()
def validation_loss(ctx: Context, model: GPT, windows: int = 1024) -> float:
    """Nats per token on reviews that SFT has not seen."""
    tokens = ctx.data.tokens["valid"]
    starts, lengths = tokens.windows(ctx.s.n_ctx)
    order = np.random.default_rng(0).permutation(len(starts))[:windows]
    order, nll = order[np.argsort(lengths[order])], 0.0
    model.eval()
    for part in np.array_split(order, max(1, len(order) // 64)):
        idx, mask = (torch.from_numpy(x).to(ctx.device)
                     for x in data_imdb.lm_batch(tokens, starts[part], lengths[part]))
        with autocast(ctx.device, ctx.s.precision):
            nll -= float(model.token_logps(idx, mask).sum())
    return nll / int(lengths[order].sum())


def sft(ctx: Context, run: Run) -> None:
    """Reviews -> π_ref, by the next-token loss."""
    s, data = ctx.s, ctx.data
    tokens = lm_tokens(data)
    print(f"  sft: {len(tokens):,} reviews of {tokens.offsets[-1]:,} tokens; duplicates left out: "
          f"{', '.join(f'{k[4:]} {n}' for k, n in data.notes.items() if n) or 'none'}")
    torch.manual_seed(draw_seed(s.seed, "sft", "weights"))
    if s.init:
        model = ctx.pretrained(s.init, s.dropout)
    else:
        model = GPT(GPTConfig(data.enc.n_vocab, s.n_ctx, s.n_layer, s.n_head, s.n_embd, s.dropout))
        model.to(ctx.device)
    pad_to = math.gcd(64, s.n_ctx) if ctx.device.type == "cuda" else 1  # few shapes to compile
    o = Optim(s.sft_steps, s.sft_lr, s.sft_warmup, "cosine", "adamw", s.sft_decay)
    accum = ctx.parts(s.sft_accum, s.dropout)
    fit(run, "sft", model, lm_batches(tokens, "sft", s.sft_batch, accum, s, pad_to), lm_loss, o, s,
        evaluation=lambda m: dict(loss=validation_loss(ctx, m)))
    finish_policy(ctx, run, model)


def finish_policy(ctx: Context, run: Run, model: GPT) -> None:
    """model.pt last: it marks the run finished. Its tokenizer lies beside it."""
    write_whole(run.path("bpe.tiktoken"), lambda file: data_imdb.save_encoding(file, ctx.data.enc))
    run.finish(model.saved())


def chosen(ctx: Context, run: Run) -> None:
    """Section 4 · without an SFT model, π_ref maximises the likelihood of chosen completions."""
    s, groups = ctx.s, ctx.groups
    model = ctx.pretrained(s.init, s.dropout) if s.init else ctx.policy("sft", s.dropout)
    train, _ = ctx.split
    best = groups.rewards.argmax(1)
    order = np.random.default_rng(draw_seed(s.seed, "chosen", "order")).permutation(train)

    def batches(step: int):
        micros, n = [], 0
        picks = order[step * s.sft_batch : (step + 1) * s.sft_batch]
        for part in np.array_split(picks, min(ctx.parts(s.sft_accum, s.dropout), len(picks))):
            idx, prompt_lens, lengths = pad_rows(
                [groups.prompt_ids[i] for i in part],
                [groups.completion_ids[i][best[i]] for i in part])
            mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
            micros.append(dict(idx=idx, mask=mask, lengths=lengths))
            n += int(mask.sum())
        return micros, n

    # one pass over the chosen completions: more would fit a small file by heart
    steps = max(1, len(train) // s.sft_batch)
    o = Optim(steps, s.sft_lr / 10, min(s.sft_warmup, steps // 10), "cosine", "adamw", s.sft_decay)
    fit(run, "chosen", model, batches, lm_loss, o, s)
    finish_policy(ctx, run, model)


# ------------------------------------------------------------------------------ reward


def reward(ctx: Context, run: Run) -> None:
    """Labels -> r*, for IMDb: the SFT model's body with a scalar head."""
    s, data = ctx.s, ctx.data
    model = RewardModel.from_gpt(ctx.policy("sft"), s.reward_ctx, s.dropout).to(ctx.device)
    labels = {k: v.astype(np.float32) for k, v in data.labels.items() if v is not None}

    def batches(step: int):
        rng = np.random.default_rng(draw_seed(s.seed, "reward", step))
        micros = label_batches(data.tokens["train"], labels["train"], s.reward_batch,
                               s.reward_ctx, s.max_new + 8, rng)
        return micros, 2 * s.reward_batch

    o = Optim(s.reward_steps, s.reward_lr, s.reward_steps // 20, "cosine", "adamw", s.sft_decay)
    fit(run, "reward", model, batches, label_loss, o, s)
    report, n = {}, 5_000  # reviews: a standard error of half a percent
    for split in ("valid", "test"):
        for name, crop in (("whole", 0), ("crop", s.max_new)):
            with autocast(ctx.device, s.precision):
                right, gap = accuracy(model, list(data.tokens[split])[:n], labels[split][:n],
                                      s.reward_ctx, crop)
            report[f"{split}_{name}"] = dict(accuracy=right, calibration_error=gap)
    save_json(run.path("report.json"), report)
    run.finish(model.saved())


# ------------------------------------------------------------------------------ groups


CHUNK = 2048  # completions that share a seed: the same on every machine


def sample_all(ctx: Context, run: Run, policy: GPT, prompts, name: str) -> list[list[int]]:
    """One completion a prompt; resumes at the last chunk saved."""
    s = ctx.s
    state = run.resume() or dict(step=0, ids=torch.empty(0, dtype=torch.int32), lengths=[])
    with restoring(run):
        ids, lengths = [state["ids"]], state["lengths"]
    saved_at = time.monotonic()
    with tqdm(total=len(prompts), desc="sampling", unit="completion", initial=len(lengths),
              disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for step in range(state["step"], math.ceil(len(prompts) / CHUNK)):
            with autocast(ctx.device, s.precision):
                new = policy.sample(prompts[step * CHUNK : (step + 1) * CHUNK], s.max_new,
                                    ctx.data.eot, draw_seed(s.seed, name, step),
                                    rows=ctx.rows(), progress=bar.update)
            ids.append(torch.tensor([i for c in new for i in c], dtype=torch.int32))
            lengths += [len(c) for c in new]
            last = len(lengths) == len(prompts)
            if STOP or last or time.monotonic() - saved_at >= s.save_secs:
                run.checkpoint(dict(step=step + 1, ids=torch.cat(ids), lengths=lengths))
                saved_at = time.monotonic()
            if STOP:
                raise Interrupted(f"{len(lengths):,} of {len(prompts):,} completions are saved")
    flat = torch.cat(ids).tolist()
    ends = np.cumsum(lengths).tolist()
    return [flat[b - n : b] for b, n in zip(ends, lengths)]


def groups(ctx: Context, run: Run) -> None:
    """π_ref's completions, judged; their reference log-probs; π_ref as an evaluated point."""
    s, data, reference = ctx.s, ctx.data, ctx.reference
    if s.groups:
        made, notes = ctx.groups, ctx.groups.dropped
        _, held = ctx.split
        held_out = list(dict.fromkeys(tuple(made.prompt_ids[i]) for i in held))[: s.eval_prompts]
        held_out, valid, samples = [list(p) for p in held_out], [], []
    else:
        judge = ctx.reward  # what is missing for it is missed before hours of sampling
        prompts, _ = data_imdb.sample_prompts(data.tokens["train"], s.prompts,
                                              draw_seed(s.seed, "groups", "prompts"))
        held_out, redrawn = data_imdb.sample_prompts(
            data.tokens["test"], s.eval_prompts, draw_seed(s.seed, "evaluate", "prompts"),
            avoid=set(map(tuple, prompts)))
        valid, _ = data_imdb.sample_prompts(
            data.tokens["valid"], s.valid_prompts, draw_seed(s.seed, "validate", "prompts"),
            avoid=set(map(tuple, prompts + held_out)))
        repeated = [p for p in prompts for _ in range(s.completions)] + \
                   [p for p in held_out for _ in range(s.optimum)]
        samples = sample_all(ctx, run, reference, repeated, "groups")
        rewards = judge(repeated, samples)
        made, ties = gather_groups(prompts, samples, rewards, s.completions)
        notes = {"equal rewards": ties, "evaluation prompts drawn again": redrawn}
        rewards = rewards[len(prompts) * s.completions :].view(len(held_out), s.optimum)
    flat = [c for cs in made.completion_ids for c in cs]
    K = len(made.completion_ids[0])
    print(f"  groups: {len(made.rewards):,} of {K} completions; left out or drawn again: "
          f"{', '.join(f'{k} {n}' for k, n in notes.items() if n) or 'none'}")
    ref_logps = score(ctx, reference, [p for p in made.prompt_ids for _ in range(K)], flat)
    point = ctx.evaluate(reference, reference, held_out)
    valid_reward = ctx.evaluate(reference, reference, valid)["reward"] if valid else None
    optimum = [{k: v for k, v in p.items() if k not in ("rewards", "kls")} for p in
               unbiased(rewards, [1e9, *np.geomspace(20, 0.01, 40)])] if samples else []
    save_json(run.path("reference.json"),
              dict(point=point, optimum=optimum, prompts=held_out, notes=notes,
                   valid=valid, valid_reward=valid_reward))
    write_whole(run.path("groups.jsonl"),
                lambda file: data_imdb.write_groups(file, made, data.enc))
    run.finish(dict(ref_logps=ref_logps.view(-1, K)))


def gather_groups(prompts, samples, rewards, K: int) -> tuple[data_imdb.Groups, int]:
    """Groups of K completions and how many were left out because all their rewards are equal."""
    rewards = rewards[: len(prompts) * K].view(-1, K).numpy()
    keep = np.flatnonzero((rewards != rewards[:, :1]).any(1))
    if not len(keep):
        raise UserError("every completion of every prompt has the same reward: nothing to prefer")
    return data_imdb.Groups([prompts[i] for i in keep],
                            [samples[i * K : (i + 1) * K] for i in keep],
                            rewards[keep], True), len(prompts) - len(keep)


# ------------------------------------------------------------------------------ dpo


HELD_OUT = 128  # groups that an evaluation looks at


def completions_of(made: data_imdb.Groups, picks) -> tuple[list, list]:
    """Prompts and completions of some groups, a completion each: two lists of G*K."""
    K = len(made.completion_ids[0])
    return ([made.prompt_ids[i] for i in picks for _ in range(K)],
            [c for i in picks for c in made.completion_ids[i]])


def held_out_measures(logps, ref_logps, rewards) -> dict:
    """On pairs that no one trained on: the share that the implicit reward orders as r* does, and
    the mean log π of their members. (G*K,), (G*K,), (G, K)."""
    yw, yl, _ = dpo.preference_pairs(rewards)
    h = logps - ref_logps
    return dict(accuracy=float(in_order(h[yw], h[yl]).mean()), logp_chosen=float(logps[yw].mean()),
                logp_rejected=float(logps[yl].mean()))


def dpo_stage(ctx: Context, run: Run) -> None:
    """Groups -> π_θ by Eq. 7, from π_ref, whose log-probs were computed once."""
    s, made = ctx.s, ctx.groups
    weight = dpo.load_weight(s.weight)
    ref_logps, before, (train, held) = ctx.ref_logps, ctx.before, ctx.split
    if s.loss == "plackett-luce":  # a group needs two completions that no other ties with
        _, tied = dpo.ranking_logps(torch.zeros(made.rewards.shape), torch.from_numpy(made.rewards))
        ranked = [i for i in train if (~tied[i]).sum() >= 2]
        print(f"  dpo: {int(tied[train].sum())} tied completions leave their rankings, "
              f"{len(train) - len(ranked)} of {len(train)} groups are skipped")
        train = ranked
        if not train:
            raise UserError("no group has two completions that no other ties with: nothing to "
                            "rank; leave --loss plackett-luce out")
    model = ctx.reference
    del ctx.reference  # the cached π_ref becomes π_θ; for its KL it is read again, then dropped

    def evaluation(model) -> dict:
        point = judged(ctx, model, ctx.reference, before)
        del ctx.reference
        logps = score(ctx, model, *completions_of(made, some))
        point |= held_out_measures(logps, ref_logps[some].flatten(),
                                   torch.from_numpy(made.rewards[some]))
        last.update(point)
        return without_texts(point)

    name = s.loss if s.loss in OTHER_LOSSES else "dpo"
    last, some = {}, np.array(held[:HELD_OUT])
    o = Optim(s.dpo_steps, s.dpo_lr, s.dpo_warmup, s.dpo_schedule, s.dpo_optimizer, 0.0, s.clip)
    cut = replace(s, dpo_accum=ctx.parts(s.dpo_accum))
    fit(run, name, model, preference_batches(made, ref_logps, train, cut),
        preference_loss(s, weight), o, s, "groups" if s.loss == "plackett-luce" else "pairs",
        starts_at_reference(s, len(made.completion_ids[0])), evaluation)
    if not last:  # killed after the last step
        evaluation(model)
    finish_method(ctx, run, before, last)
    finish_policy(ctx, run, model)


def judged(ctx: Context, policy, reference, before: dict, learned=None) -> dict:
    """The policy's point on the test prompts, and what it is worth on the validation prompts.

    learned: the reward that it was trained on, where that is a callable as r*."""
    point = ctx.evaluate(policy, reference, before["prompts"])
    if learned:
        point["reward_learned"] = float(learned(before["prompts"], point["completions"]).mean())
    if before["valid"]:
        valid = ctx.evaluate(policy, reference, before["valid"])
        point |= dict(valid_reward=valid["reward"], valid_kl=valid["kl"])
    return point


def finish_method(ctx: Context, run: Run, before: dict, point: dict) -> None:
    """result.json, a trained policy's last point, and samples.txt."""
    write_samples(ctx, run, before, point)
    save_json(run.path("result.json"), without_texts(point))


def without_texts(point: dict) -> dict:
    """What is logged of a point."""
    return {k: v for k, v in point.items() if k != "completions"}


def write_samples(ctx: Context, run: Run, before: dict, after: dict, n: int = 24) -> None:
    """The same prompts with the same luck, under π_ref and under π_θ."""
    enc, eot, lines = ctx.data.enc, ctx.data.eot, []
    for i, prompt in enumerate(before["prompts"][:n]):
        lines.append(f"prompt:  {enc.decode(prompt[1:])}")
        for name, point in (("before", before["point"]), ("after", after)):
            ids = point["completions"][i]
            worth = f"r* {point['rewards'][i]:.2f}" if "rewards" in point else "r* -"
            text = enc.decode([t for t in ids if t != eot]).replace("\n", " ")
            end = "" if ids[-1] == eot else " …"
            lines.append(f"{name + ':':<8} {worth} |{text}{end}")
        lines.append("")
    write_whole(run.path("samples.txt"), lambda file: file.write("\n".join(lines).encode()))


def report_method(ctx: Context, stage: str) -> None:
    """The table, four samples and the picture of a finished run of a method."""
    folder, before = ctx.folder(stage), ctx.before
    after = read_json(folder / "result.json")
    best = optimal_reward(before["optimum"], after["kl"])
    columns = [("reward r*", "reward"), ("KL, nats", "kl"), ("length", "length"), ("ended", "eos"),
               ("repeated", "repetition"), ("grammatical", "grammatical"),
               ("held-out acc.", "accuracy")]
    rows = [("π_ref", before["point"]), (f"π_θ, {described(stage, ctx.s)}", after),
            ("optimum at that KL", dict(reward=best, kl=after["kl"]))]
    print("\n" + " " * 20 + "".join(f"{title:>17}" for title, _ in columns))
    for name, point in rows:
        cells = []
        for _, key in columns:
            value, se = point.get(key), point.get(key + "_se")
            cells.append("-" if value is None else f"{value:.3f}" + (f" ±{se:.3f}" if se else ""))
        print(f"{name:<20}" + "".join(f"{cell:>17}" for cell in cells))
    print(f"on {after['samples']} held-out prompts, ± one standard error; KL is KL(π ‖ π_ref) a "
          f"completion, one-sample estimate {after['kl_mc']:.3f} ±{after['kl_mc_se']:.3f}\n")
    print("\n".join((folder / "samples.txt").read_text().splitlines()[:16]))
    print(f"\nmore samples: {folder / 'samples.txt'}")
    if stage in ("dpo", *OTHER_LOSSES):
        if not (folder / "curves.png").exists():  # drawn here, for a sweep's runs need none
            plot_frontier.training_curves(folder, ctx.folder("groups") / "reference.json")
        print(f"curves:       {folder / 'curves.png'}")


def described(stage: str, s: Settings) -> str:
    """A method's setting in a few letters."""
    if stage in ("ppo", "ppo-gt"):
        return f"KL → {s.ppo_target:g}" if s.ppo_target else f"β {s.ppo_beta:g}"
    return {"unlikelihood": f"α {s.alpha:g}", "preferred-ft": "preferred"}.get(
        stage, f"β {s.beta:g}")


def report_reward(ctx: Context) -> None:
    report = read_json(ctx.folder("reward") / "report.json")
    for name, row in report.items():
        print(f"r* on {name.replace('_', ', ')}: accuracy {row['accuracy']:.3f}, calibration error "
              f"{row['calibration_error']:.3f}")
