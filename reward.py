"""The reward of a completion: the ground truth r*, and the model of a learned reward, r_φ of Eq. 2.

A reward is a callable (prompts, completions) -> (N,) float32 on the CPU; both arguments hold token
ids. r* lies in [0, 1]. On the toy corpus it is a known function of the text. On IMDb it is
p(positive) by a trained classifier.

B sequences, T tokens, C channels, N completions.
"""

import math
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import GPT, GPTConfig, length_buckets, pad_rows
from support.runs import UserError, first_line
from support.toy_reviews import grammatical, sentiment


def texts(enc, prompts, completions) -> list[str]:
    """Each prompt and its completion as one text, without <|endoftext|>."""
    return [enc.decode([i for i in p + c if i != enc.eot_token])
            for p, c in zip(prompts, completions)]


class ToyReward:
    """r* of the toy corpus. It is exact, so there is no model to train."""

    def __init__(self, enc):
        self.enc = enc

    def __call__(self, prompts, completions):
        return torch.tensor([sentiment(t) for t in texts(self.enc, prompts, completions)])

    def grammatical(self, prompts, completions) -> float:
        """The share of sentences that the grammar could have made. Their polarity may be mixed."""
        counts = [grammatical(t) for t in texts(self.enc, prompts, completions)]
        return sum(good for good, _ in counts) / max(1, sum(n for _, n in counts))


class RewardModel(nn.Module):
    """A GPT with a scalar head on the last token: r_φ of Eq. 2, or the logit of r*."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.body = config, GPT(config)
        self.score = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.score.weight)  # all scores start at 0, both losses at log 2
        nn.init.zeros_(self.score.bias)

    @classmethod
    def from_gpt(cls, gpt: GPT, n_ctx: int, dropout: float = 0.0) -> "RewardModel":
        """A copy of `gpt` with a head. If n_ctx is longer, its position embeddings are repeated."""
        config = GPTConfig(**vars(gpt.config) | {"n_ctx": n_ctx, "dropout": dropout})
        model, state = cls(config), gpt.state_dict()
        times = math.ceil(n_ctx / gpt.config.n_ctx)
        state["wpe.weight"] = state["wpe.weight"].repeat(times, 1)[:n_ctx]
        model.body.load_state_dict(state)
        return model

    def forward(self, idx, lengths):
        """idx (B, T), lengths (B,) -> scores (B,) float32, at each row's token lengths - 1."""
        last = self.body.hidden(idx)[torch.arange(len(idx), device=idx.device), lengths - 1]
        with torch.autocast(idx.device.type, enabled=False):  # in bf16 many scores would be equal
            return self.score(last.float())[:, 0]

    checkpoint, load = GPT.checkpoint, classmethod(GPT.load.__func__)


class ModelReward:
    """r*: p(positive) by a model trained on labels. With `learned`, r_φ: the score of Eq. 2. The
    model of r_φ was trained on completions with their <|endoftext|>, so it reads that token too."""

    def __init__(self, model: RewardModel, eos: int, learned: bool = False, batch_size: int = 256):
        self.model, self.eos = model.eval(), eos
        self.learned, self.batch_size = learned, batch_size

    @torch.no_grad()
    def __call__(self, prompts, completions):
        device, n_ctx = self.model.score.weight.device, self.model.body.config.n_ctx
        out = []
        for i in range(0, len(prompts), self.batch_size):
            part = completions[i : i + self.batch_size]
            if not self.learned:  # r*'s model was trained on reviews without a final <|endoftext|>
                part = [[t for t in c if t != self.eos] for c in part]
            idx, _, lengths = pad_rows(prompts[i : i + self.batch_size], part)
            if idx.size(1) > n_ctx:
                raise UserError(f"got a text of {idx.size(1)} tokens, and the reward model reads "
                                f"at most {n_ctx}: give a larger --reward-ctx")
            with torch.autocast(device.type, enabled=False):  # float32, whatever the caller uses
                scores = self.model(idx.to(device), lengths.to(device))
            out.append((scores if self.learned else scores.sigmoid()).cpu())
        return torch.cat(out)


class SiebertReward:
    """The paper's r*: p(positive) by siebert/sentiment-roberta-large-english, by its name or from a
    local folder. UserError if the model or the optional package transformers is missing."""

    def __init__(self, enc, name="siebert/sentiment-roberta-large-english", device="cpu",
                 batch_size=64):
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise UserError("--reward siebert needs transformers, which is not installed: run "
                            "pip install transformers") from None
        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # stderr is no terminal
        logging.set_verbosity_error()  # else it prints a table of missing weights
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True)
            bad = sorted(report["missing_keys"]) or [
                key for key, w in model.state_dict().items() if not w.isfinite().all()]
            if bad:  # transformers fills missing weights with random numbers
                raise ValueError(f"{len(bad)} weights are missing or not finite, one is {bad[0]}")
        except Exception as e:  # a damaged file can raise an error of any type
            raise UserError(f"could not load {name} ({first_line(e)}): give a folder that "
                            "holds it with --siebert-path") from None
        labels = {v.upper(): k for k, v in model.config.id2label.items()}
        if "POSITIVE" not in labels:
            raise UserError(f"{name} has the labels {sorted(labels)}, wanted one named POSITIVE: "
                            "give another --siebert-path")
        self.model, self.positive = model.to(device).eval(), labels["POSITIVE"]
        self.enc, self.batch_size = enc, batch_size

    @torch.no_grad()
    def __call__(self, prompts, completions):
        strings, out = texts(self.enc, prompts, completions), []
        for i in range(0, len(strings), self.batch_size):
            batch = self.tokenizer(strings[i : i + self.batch_size], return_tensors="pt",
                                   padding=True, truncation=True).to(self.model.device)
            with torch.autocast(self.model.device.type, enabled=False):  # as in ModelReward
                logits = self.model(**batch).logits.float()
            out.append(logits.softmax(-1)[:, self.positive].cpu())
        return torch.cat(out)


def truncate(ids, n_ctx: int) -> list[int]:
    """A review's tokens, <|endoftext|> first. Of a long review the end is kept: it sums up."""
    return [int(ids[0]), *map(int, ids[1:][-(n_ctx - 1):])]


def crop(ids, n: int, rng) -> list[int]:
    """<|endoftext|> and n consecutive tokens from a random place, or all of a shorter review."""
    start = rng.integers(1, max(2, len(ids) - n + 1))
    return [int(ids[0]), *map(int, ids[start : start + n])]


def label_batch(rows, labels) -> dict:
    idx, _, lengths = pad_rows(rows, [[]] * len(rows))
    return dict(idx=idx, lengths=lengths, labels=torch.tensor(labels, dtype=torch.float32))


def label_batches(tokens, labels, batch: int, n_ctx: int, max_crop: int, rng, parts: int = 1):
    """The 2 `parts` micro-batches of one step: idx (B, T), lengths (B,), labels (B,). They hold
    `batch` whole reviews and `batch` crops of 8 to `max_crop` tokens. The crops teach the model to
    judge short completions too."""
    high = min(max_crop, n_ctx - 1) + 1
    pick = rng.integers(0, len(tokens), 2 * batch)
    whole = [truncate(tokens[i], n_ctx) for i in pick[:batch]]
    crops = [crop(tokens[i], int(rng.integers(8, high)), rng) for i in pick[batch:]]
    rows, labels = whole + crops, labels[pick]
    return [label_batch([rows[i] for i in part], labels[part])
            for part in np.array_split(range(2 * batch), 2 * parts)]


def label_loss(model, micro_batch):
    """The sum of the labels' cross-entropy, and what to log for each sequence."""
    logits = model(micro_batch["idx"], micro_batch["lengths"])
    losses = F.binary_cross_entropy_with_logits(logits, micro_batch["labels"], reduction="none")
    right = (logits.detach() > 0) == (micro_batch["labels"] > 0.5)
    return losses.sum(), dict(loss=losses.detach(), accuracy=right.float())


@torch.no_grad()
def label_accuracy(model: RewardModel, tokens, labels, n_ctx: int, crop_len: int = 0,
                   batch_size: int = 64) -> dict:
    """Accuracy on labelled reviews, and the expected calibration error of p(positive): the gap
    between the mean p and the share of positive reviews in each tenth of [0, 1], as a mean over
    reviews. With crop_len 0 the model reads whole reviews (their last n_ctx tokens), else crops.
    """
    rng, device, p = np.random.default_rng(0), model.score.weight.device, torch.empty(len(labels))
    model.eval()
    reviews = [crop(ids, min(crop_len, n_ctx - 1), rng) if crop_len else truncate(ids, n_ctx)
               for ids in tokens]
    for part in length_buckets(torch.tensor(list(map(len, reviews))), batch_size):
        idx, _, lengths = pad_rows([reviews[i] for i in part], [[]] * len(part))
        p[part] = model(idx.to(device), lengths.to(device)).sigmoid().cpu()
    y = torch.tensor(labels, dtype=torch.float32)
    bins = (p * 10).long().clamp(max=9)
    gaps = [(p[bins == b].mean() - y[bins == b].mean()).abs() * (bins == b).float().mean()
            for b in bins.unique()]
    return dict(accuracy=float(((p > 0.5) == (y > 0.5)).float().mean()),
                calibration_error=float(sum(gaps)))
