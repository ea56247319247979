"""The reward of a completion: the ground truth r*, and the body of a reward model, Eq. 2's r_φ.

A reward is a callable (prompts, completions) -> (N,) float32 on the CPU, of token ids. r* lies in
[0, 1]: a known function of the text on the toy corpus, p(positive) by a trained classifier on IMDb.

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
    """What was sampled, as text, without <|endoftext|>."""
    return [enc.decode([i for i in p + c if i != enc.eot_token])
            for p, c in zip(prompts, completions)]


class ToyReward:
    """r* of the toy corpus: exact, nothing to train."""

    def __init__(self, enc):
        self.enc = enc

    def __call__(self, prompts, completions):
        return torch.tensor([sentiment(t) for t in texts(self.enc, prompts, completions)])

    def grammatical(self, prompts, completions) -> float:
        """The share of sentences that are in the grammar's language, whatever their polarity."""
        counts = [grammatical(t) for t in texts(self.enc, prompts, completions)]
        return sum(good for good, _ in counts) / max(1, sum(n for _, n in counts))


class RewardModel(nn.Module):
    """A GPT with a scalar head, read at the last token: r_φ of Eq. 2, or the logit of r*."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.body = config, GPT(config)
        self.score = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.score.weight)  # starts indifferent: log 2 under either loss
        nn.init.zeros_(self.score.bias)

    @classmethod
    def from_gpt(cls, gpt: GPT, n_ctx: int, dropout: float = 0.0) -> "RewardModel":
        """The body of a language model. A longer context repeats its position embeddings."""
        config = GPTConfig(**vars(gpt.config) | {"n_ctx": n_ctx, "dropout": dropout})
        model, state = cls(config), gpt.state_dict()
        times = math.ceil(n_ctx / gpt.config.n_ctx)
        state["wpe.weight"] = state["wpe.weight"].repeat(times, 1)[:n_ctx]
        model.body.load_state_dict(state)
        return model

    def forward(self, idx, lengths):
        """idx (B, T), lengths (B,) -> (B,) float32, of each row's token lengths - 1."""
        last = self.body.hidden(idx)[torch.arange(len(idx), device=idx.device), lengths - 1]
        with torch.autocast(idx.device.type, enabled=False):  # a bf16 score would tie rewards
            return self.score(last.float())[:, 0]

    checkpoint, load = GPT.checkpoint, classmethod(GPT.load.__func__)


class ModelReward:
    """r*: p(positive), by a model trained on labels. With `learned`, r_φ: Eq. 2's score, by a model
    that reads the closing <|endoftext|> too, being trained on completions that have it."""

    def __init__(self, model: RewardModel, eos: int, learned: bool = False, batch_size: int = 256):
        self.model, self.eos = model.eval(), eos
        self.learned, self.batch_size = learned, batch_size

    @torch.no_grad()
    def __call__(self, prompts, completions):
        device, n_ctx = self.model.score.weight.device, self.model.body.config.n_ctx
        out = []
        for i in range(0, len(prompts), self.batch_size):
            part = completions[i : i + self.batch_size]
            if not self.learned:  # reviews have no closing <|endoftext|>: the last word is read
                part = [[t for t in c if t != self.eos] for c in part]
            idx, _, lengths = pad_rows(prompts[i : i + self.batch_size], part)
            if idx.size(1) > n_ctx:
                raise UserError(f"a text of {idx.size(1)} tokens; the reward model reads {n_ctx}: "
                                "raise --reward-ctx")
            with torch.autocast(device.type, enabled=False):  # one judge, whoever asks
                scores = self.model(idx.to(device), lengths.to(device))
            out.append((scores if self.learned else scores.sigmoid()).cpu())
        return torch.cat(out)


class SiebertReward:
    """The paper's judge, p(positive) by siebert/sentiment-roberta-large-english, or a local folder
    of that layout. Raises UserError without it or the optional package transformers."""

    def __init__(self, enc, name="siebert/sentiment-roberta-large-english", device="cpu",
                 batch_size=64):
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise UserError("--reward siebert needs transformers, which is not installed: run "
                            "pip install transformers") from None
        if not sys.stderr.isatty():
            logging.disable_progress_bar()  # as train.py's own: no bar in a pipe
        logging.set_verbosity_error()  # of what a folder lacks it prints a table
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True)
            bad = sorted(report["missing_keys"]) or [
                key for key, w in model.state_dict().items() if not w.isfinite().all()]
            if bad:  # transformers draws missing ones at random
                raise ValueError(f"{len(bad)} weights are missing or not finite, as {bad[0]}")
        except Exception as e:  # a damaged file fails anywhere inside, with any type
            raise UserError(f"could not load {name} ({first_line(e)}): give a folder that "
                            "holds it with --siebert-path") from None
        labels = {v.upper(): k for k, v in model.config.id2label.items()}
        if "POSITIVE" not in labels:
            raise UserError(f"{name} has the labels {sorted(labels)}; one must be POSITIVE")
        self.model, self.positive = model.to(device).eval(), labels["POSITIVE"]
        self.enc, self.batch_size = enc, batch_size

    @torch.no_grad()
    def __call__(self, prompts, completions):
        strings, out = texts(self.enc, prompts, completions), []
        for i in range(0, len(strings), self.batch_size):
            batch = self.tokenizer(strings[i : i + self.batch_size], return_tensors="pt",
                                   padding=True, truncation=True).to(self.model.device)
            with torch.autocast(self.model.device.type, enabled=False):  # one judge, whoever asks
                logits = self.model(**batch).logits.float()
            out.append(logits.softmax(-1)[:, self.positive].cpu())
        return torch.cat(out)


def truncate(ids, n_ctx: int) -> list[int]:
    """A review's tokens, <|endoftext|> first; of a long one the end, where the verdict stands."""
    return [int(ids[0]), *map(int, ids[1:][-(n_ctx - 1):])]


def crop(ids, n: int, rng) -> list[int]:
    """<|endoftext|> and n tokens in a row from anywhere in the review; a shorter one whole."""
    start = rng.integers(1, max(2, len(ids) - n + 1))
    return [int(ids[0]), *map(int, ids[start : start + n])]


def label_batch(rows, labels) -> dict:
    idx, _, lengths = pad_rows(rows, [[]] * len(rows))
    return dict(idx=idx, lengths=lengths, labels=torch.tensor(labels, dtype=torch.float32))


def label_batches(tokens, labels, batch: int, n_ctx: int, max_crop: int, rng, parts: int = 1):
    """One step's micro-batches of idx (B, T), lengths (B,), labels (B,): `batch` whole reviews, and
    as many crops of 8 to `max_crop` tokens, so that short completions are judged well too; each in
    `parts`."""
    high = min(max_crop, n_ctx - 1) + 1
    pick = rng.integers(0, len(tokens), 2 * batch)
    whole = [truncate(tokens[i], n_ctx) for i in pick[:batch]]
    crops = [crop(tokens[i], int(rng.integers(8, high)), rng) for i in pick[batch:]]
    rows, labels = whole + crops, labels[pick]
    return [label_batch([rows[i] for i in part], labels[part])
            for part in np.array_split(range(2 * batch), 2 * parts)]


def label_loss(model, micro_batch):
    """Summed cross-entropy of the labels, and what to log, per sequence."""
    logits = model(micro_batch["idx"], micro_batch["lengths"])
    losses = F.binary_cross_entropy_with_logits(logits, micro_batch["labels"], reduction="none")
    right = (logits.detach() > 0) == (micro_batch["labels"] > 0.5)
    return losses.sum(), dict(loss=losses.detach(), accuracy=right.float())


@torch.no_grad()
def label_accuracy(model: RewardModel, tokens, labels, n_ctx: int, crop_len: int = 0,
                   batch_size: int = 64) -> dict:
    """Accuracy on labelled reviews, and the expected calibration error of p(positive): the gap
    between the mean p and the share of positive reviews in a bin, averaged over the reviews' bins.

    crop_len 0 judges whole reviews (their last n_ctx tokens), otherwise a crop of that many tokens.
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
