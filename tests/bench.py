"""Compares speeds in one run: DPO with TRL, sampling and LM training with transformers. This is a
program, not a test.

    pip install -r requirements.txt -r requirements-bench.txt
    python tests/bench.py                       # every row: half an hour on one core, 21 GB
    python tests/bench.py dpo-small lm-small    # some rows

Rows: dpo (TRL as it is by default: gradient checkpointing, the reference model in every step),
dpo-fast (TRL's fastest setting: reference log-probs precomputed, no checkpointing), dpo-bf16 (the
same in bf16), dpo-official (the loop of the authors' code, with transformers' model), sample
(`generate` as it is), sample-cdf (`generate` with torch.multinomial replaced by an inverse CDF),
and lm.

All rows are in float32 except dpo-bf16, with one thread and GPT-2's vocabulary. Both sides have
equal weights and data, and take turns. A number is the median over the turns, in seconds of CPU
time, so that other programs do not count. Each row prints our rate, the peer's, their ratio and the
target.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

# glibc returns the memory of a large tensor to the system when it is freed. The next use clears the
# pages again. With big logits the peers would be up to three times slower, which is not fair: so
# both sides run in a process that keeps its memory. The variables are read when a process starts,
# so main() starts this program again.
SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40),
            "MALLOC_TOP_PAD_": str(2**26), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SIZES = {"small": dict(n_layer=4, n_head=4, n_embd=128),
         "124M": dict(n_layer=12, n_head=12, n_embd=768)}
TARGETS = {"dpo-small": 9.0, "dpo-fast-small": 7.0, "dpo-bf16-small": 7.0,
           "dpo-official-small": 6.0, "sample-small": 4.0, "sample-cdf-small": 1.2, "lm-small": 1.0,
           "dpo-124M": 4.5, "sample-124M": 1.5, "lm-124M": 1.0}
BETA, LR = 0.1, 1e-6  # in every DPO row
UNITS = {"dpo": "pairs/s", "sample": "new tokens/s", "lm": "tokens/s"}


def models(size: str, folder: Path):
    """Our GPT and transformers' GPT2LMHeadModel with the same random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from gpt import GPT, GPTConfig
    from support import hf_gpt2

    torch.manual_seed(0)
    ours = GPT(GPTConfig(**SIZES[size]))
    hf_gpt2.save(ours, folder)
    return ours, AutoModelForCausalLM.from_pretrained(folder)


def turns(ours, theirs, n: int) -> tuple[list[float], list[float]]:
    """Seconds of n calls of each side, by turns. The first call of each does not count."""
    seconds = [], []
    for _ in range(n + 1):
        for work, out in zip((ours, theirs), seconds):
            began = time.process_time()
            work()
            out.append(time.process_time() - began)
    return seconds[0][1:], seconds[1][1:]


def preferences(V: int):
    """16 prompts of 3 to 9 tokens, each with 4 completions of 32 to 64 tokens and random rewards: 6
    pairs per prompt, 96 in all. Ids are random, because they do not change the speed."""
    import numpy as np

    from data_imdb import Groups

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, rng.integers(3, 10)).tolist() for _ in range(16)]
    completions = [[rng.integers(0, V, rng.integers(32, 65)).tolist() for _ in range(4)]
                   for _ in prompts]
    return Groups(prompts, completions, rng.random((16, 4), dtype=np.float32), True)


def our_dpo(policy, reference, groups, cast):
    """step() -> the loss: one step of train.fit. Reference log-probs are computed once before."""
    import torch

    import train
    from gpt import pad_rows
    from support.settings import Settings

    cfg, every = Settings(beta=BETA, dpo_batch=len(groups.rewards)), range(len(groups.rewards))
    with torch.no_grad(), cast():
        ref_logps = train.sequence_logps(reference, *pad_rows(*groups.flat(every)))
    batches = train.preference_batches(cfg, groups, ref_logps.view(-1, groups.K), list(every))
    optimizer = train.make_optimizer(policy, "adamw", LR, 0.0)
    loss_fn = train.preference_loss(cfg)

    def step() -> float:
        (micro_batch,), n = batches(0)
        with cast():
            loss, logs = loss_fn(policy, micro_batch)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train.summary({key: [value] for key, value in logs.items()})
        return loss.item() / n

    return step


def official_dpo(policy, reference, groups):
    """step() -> the loss, as in the authors' code: chosen and rejected of each pair in one batch,
    which goes through the policy and the reference, with log_softmax over all logits."""
    import torch
    import torch.nn.functional as F

    import dpo
    from gpt import pad_rows

    prompts, completions = groups.flat(range(len(groups.rewards)))
    yw, yl, _ = dpo.preference_pairs(torch.from_numpy(groups.rewards))
    both = torch.cat([yw, yl]).tolist()  # 2N sequences
    idx, prompt_lens, lengths = pad_rows([prompts[i] for i in both], [completions[i] for i in both])
    mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0)

    def logps(model):
        logits = model(idx, attention_mask=(torch.arange(idx.size(1)) < lengths[:, None]).long())
        logp = logits.logits[:, :-1].float().log_softmax(-1)
        return (logp.gather(2, idx[:, 1:, None])[:, :, 0] * mask[:, 1:]).sum(-1)

    def step() -> float:
        pi = logps(policy)
        with torch.no_grad():
            ref = logps(reference)
        h = BETA * (pi - ref)
        loss = -F.logsigmoid(h[: len(yw)] - h[len(yw) :]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def their_dpo(policy, reference, groups, n: int, folder: Path, turn, fast: bool, bf16: bool):
    """n steps of DPOTrainer, with turn() after each. Returns the losses and the seconds per step.
    """
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    import dpo

    losses, seconds, began = [], [], []

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            began.append(time.process_time())

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.process_time() - began[-1])
            turn()
            began.append(time.process_time())

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it holds token ids already

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    yw, yl, _ = dpo.preference_pairs(torch.from_numpy(groups.rewards))
    (_, flat), K = groups.flat(range(len(groups.rewards))), groups.K
    rows = [dict(prompt_ids=groups.prompt_ids[w // K], chosen_ids=flat[w], rejected_ids=flat[l])
            for w, l in zip(yw.tolist(), yl.tolist())]
    tokenizer = PreTrainedTokenizerFast(  # only its padding id is used
        tokenizer_object=Tokenizer(tokenizer_models.WordLevel({"<pad>": 0}, "<pad>")),
        eos_token="<pad>", pad_token="<pad>")
    config = DPOConfig(output_dir=str(folder), max_steps=n, per_device_train_batch_size=len(rows),
                       bf16=bf16, use_cpu=True, beta=BETA, learning_rate=LR, report_to=[],
                       save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
                       precompute_ref_log_probs=fast, gradient_checkpointing=not fast)
    trainer = Trainer(policy, reference, args=config, processing_class=tokenizer,
                      train_dataset=Dataset.from_list(rows), callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses, seconds


def bench_dpo(size: str, n: int, folder: Path, kind: str = ""):
    """One optimizer step on 96 pairs in one batch; `kind` names the peer (see above)."""
    import copy

    import torch

    from support import hf_gpt2

    reference, their_reference = models(size, folder / "reference")
    policy = copy.deepcopy(reference)
    with torch.no_grad():  # with π_θ = π_ref every loss would be log 2, and comparing shows nothing
        for p in policy.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    hf_gpt2.save(policy, folder / "policy")
    their_policy = type(their_reference).from_pretrained(folder / "policy")
    groups, losses, seconds = preferences(policy.config.vocab_size), [], []
    bf16 = kind == "bf16"
    step = our_dpo(policy, reference, groups, (
        lambda: torch.autocast("cpu", torch.bfloat16)) if bf16 else nullcontext)
    del reference  # our steps do not need it

    def turn():
        began = time.process_time()
        losses.append(step())
        seconds.append(time.process_time() - began)

    if kind == "official":
        their_losses = []
        theirs = official_dpo(their_policy, their_reference, groups)
        seconds, their_seconds = turns(lambda: losses.append(step()),
                                       lambda: their_losses.append(theirs()), n)
    else:
        their_losses, their_seconds = their_dpo(their_policy, their_reference, groups, n + 1,
                                                folder / "out", turn, bool(kind), bf16)
        seconds, their_seconds = seconds[1:], their_seconds[1:]
    print(f"  first loss {losses[0]:.6f}, theirs {their_losses[0]:.6f}; log 2 is 0.693147")
    assert abs(losses[0] - their_losses[0]) < (0.02 if bf16 else 1e-4), "not the same loss"
    return 96, seconds, their_seconds


def inverse_cdf(probs, num_samples):
    """Draws as torch.multinomial, by one uniform number and a cumulative sum per row."""
    import torch

    cdf = probs.cumsum(-1)
    u = torch.rand(len(probs), 1) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(max=probs.size(-1) - 1)


def bench_sample(size: str, n: int, folder: Path, kind: str = ""):
    """64 rows × 64 new tokens after prompts of 8 tokens, so that `generate` need not pad. The
    temperature is 1, nothing is filtered, no row ends early, and both have a KV cache."""
    import torch

    ours, theirs = models(size, folder)
    prompts = torch.randint(ours.config.vocab_size, (64, 8))
    theirs.eval()

    def generate():
        out = theirs.generate(prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              max_new_tokens=64, eos_token_id=None, pad_token_id=0, use_cache=True)
        assert out.shape == (64, 72)

    def sample():
        out = ours.sample(prompts.tolist(), 64, eos=-1, seed=0)
        assert [len(row) for row in out] == [64] * 64

    with mock.patch("torch.multinomial", inverse_cdf) if kind == "cdf" else nullcontext():
        return 64 * 64, *turns(sample, generate, n)


def bench_lm(size: str, n: int, folder: Path, kind: str = ""):
    """One optimizer step on 8 × 256 tokens. The peer's is the usual one on model(idx, labels=idx).
    """
    import torch

    import train

    ours, theirs = models(size, folder)
    idx = torch.randint(ours.config.vocab_size, (8, 256))
    mask = torch.ones_like(idx, dtype=torch.bool)
    mask[:, 0] = False
    ours.train(), theirs.train()
    theirs.config.use_cache = False
    for dropout in (m for m in theirs.modules() if isinstance(m, torch.nn.Dropout)):
        assert dropout.p == 0, "save_pretrained should have written dropout 0"

    def stepper(model, loss_of):
        optimizer, losses = train.make_optimizer(model, "adamw", 1e-4, 0.01), []

        def step():
            loss = loss_of(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))

        return step, losses

    step, losses = stepper(ours, lambda model: train.lm_loss(
        model, dict(idx=idx, mask=mask))[0] / int(mask.sum()))
    their_step, their_losses = stepper(theirs, lambda model: model(idx, labels=idx).loss)
    seconds = turns(step, their_step, n)
    assert abs(losses[0] - their_losses[0]) < 1e-4, (losses[0], their_losses[0])
    return int(mask.sum()), *seconds


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"{', '.join(TARGETS)}; none: all")
    parser.add_argument("--turns", type=int, default=0, help="timed turns; 0: 7 small, 2 at 124M")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(TARGETS):
        parser.error(f"no row {', '.join(unknown)}; rows: {', '.join(TARGETS)}")
    if any(os.environ.get(k) != v for k, v in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work = {"dpo": bench_dpo, "sample": bench_sample, "lm": bench_lm}
    for row in args.rows or TARGETS:
        what, *kind, size = row.split("-")
        with tempfile.TemporaryDirectory() as folder:
            terms, ours, theirs = work[what](size, args.turns or (7 if size == "small" else 2),
                                             Path(folder), *kind)
        a, b = (terms / statistics.median(s) for s in (ours, theirs))
        print(f"{row:<20}{a:>10.1f} {UNITS[what]:<13} peer {b:>9.1f}   ratio {a / b:>6.2f}   "
              f"target {TARGETS[row]:.1f}", flush=True)


if __name__ == "__main__":
    main()
