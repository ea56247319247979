"""From text to tokens, batches, prompts and preference groups.

    read_imdb, read_toy -> reviews; train_bpe, gpt2_encoding -> an encoding; load -> both, as Data
    Tokens -> lm_batches -> batches for a language model
    Tokens -> sample_prompts -> (other files sample, and score with r*) -> gather_groups -> Groups
    Groups <-> groups.jsonl (read_groups, write_groups); split_prompts -> training, held out

Legend: B sequences, T tokens, V vocabulary, P prompts, K completions per prompt, N reviews.
"""

import argparse
import functools
import hashlib
import heapq
import itertools
import json
import operator
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

# imported first, so that Ctrl-C during the slow imports below prints one sentence
from support.runs import (RESTORE, UserError, file_hash, first_line, json_hash, main_exit,
                          read_json, reading, save_json, write_whole, writing)

import numpy as np
import regex
import tiktoken

from support import imdb_archive, toy_reviews
from support.imdb_archive import FOLDERS
from support.preference_files import decode, read_preferences, some_left, token_ids
from support.tokenizer_files import EOT, read_tiktoken, save_tiktoken, tokens_of

SPLITS = ("train", "unsup", "valid", "test")
FILES = ("bpe.tiktoken", *(f"{split}.npy" for split in SPLITS))


# ------------------------------------------------------------------------------ reviews

class Review(NamedTuple):
    text: str
    label: int | None  # 1 positive, 0 negative, None without a label


Splits = dict[str, list[Review]]
Progress = Callable[[str], object]  # called with a line of text: print, or a list's append


def read_imdb(path: Path | None, cache: Path, progress: Progress = print, seed: int = 0
              ) -> tuple[Splits, dict[str, int]]:
    """The Large Movie Review Dataset (Maas et al. 2011) from `path`, or else downloaded to `cache`.

    `path` is an archive or an unpacked folder. Reviews are shuffled by `seed`. "valid" is every
    20th review of train, and no longer part of train. A text that occurs in several splits is kept
    in the first of test, valid, train, unsup; notes["dup_<split>"] counts the dropped reviews.
    UserError for a missing, damaged or incomplete corpus; only train/unsup may be missing.
    """
    path = path or imdb_archive.download(cache, progress)
    progress(f"reading {path}")
    contents = imdb_archive.read_reviews(path, FOLDERS, progress)
    raw: Splits = {"test": [], "train": [], "unsup": []}
    for folder, (split, label, _) in FOLDERS.items():
        for content in contents[folder]:
            text = re.sub(r"<br\s*/?>", "\n", content.decode("utf-8", "replace"))
            raw[split].append(Review(text.strip(), label))
    for i, split in enumerate(raw):
        np.random.default_rng((seed, i)).shuffle(raw[split])
    raw["valid"] = raw["train"][::20]
    del raw["train"][::20]
    splits, notes, seen = {}, {}, set()
    for split in ("test", "valid", "train", "unsup"):  # a shared text stays in the first
        splits[split] = [review for review in raw[split] if review.text not in seen]
        notes[f"dup_{split}"] = len(raw[split]) - len(splits[split])
        seen.update(review.text for review in raw[split])
    return splits, notes


def read_toy(n: int, seed: int) -> Splits:
    """`n` reviews without their repeats. They have no labels: r* is a function of the text."""
    rows = [Review(text, None) for text in dict.fromkeys(toy_reviews.reviews(n, seed))]
    k = len(rows) // 20
    return {"test": rows[:k], "valid": rows[k : 2 * k], "train": rows[2 * k :], "unsup": []}


# ------------------------------------------------------------------------------ tokens

# GPT-2 splits a text into these pre-tokens. No token crosses the border between two of them.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's byte-level BPE, V = 50257. UserError if tiktoken cannot get its two files."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # no network, or a damaged file
        raise UserError("tiktoken could not get GPT-2's vocab.bpe and encoder.json "
                        f"({first_line(e)}); set TIKTOKEN_CACHE_DIR to a folder that has them"
                        ) from e


def train_bpe(texts: Iterable[str], vocab_size: int | str) -> tiktoken.Encoding:
    """Byte-level BPE (Sennrich et al. 2016) with GPT-2's pre-tokens; <|endoftext|> has the last id.

    Each step merges the most frequent adjacent pair; of equally frequent pairs, the one with the
    smallest ids. If no pair is left, the result is smaller than `vocab_size` (257 to 65,536). The
    distinct pre-tokens are counted first, and a step visits only those that contain its pair.
    """
    if not str(vocab_size).isdecimal() or not 257 <= int(vocab_size) <= 65_536:
        raise UserError(f"got a vocabulary of {vocab_size}, wanted 257 (the bytes and {EOT}) to "
                        "65,536 (what uint16 holds), or gpt2")
    pre_tokens = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    # A word is a str with one character per token, chr(the token's id): str.replace does a merge.
    words = [word.encode("utf-8", "replace").decode("latin-1") for word in pre_tokens]
    counts = list(pre_tokens.values())
    pairs = Counter()  # two characters -> how often they are adjacent
    words_with = defaultdict(set)  # two characters -> the words that contain them, now or before
    for i, word in enumerate(words):
        for pair in map(operator.add, word, word[1:]):
            pairs[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    ranks = [bytes([i]) for i in range(256)]
    while heap and len(ranks) < int(vocab_size) - 1:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            continue  # out of date: the pair's new count was pushed when it changed
        token = chr(len(ranks))
        ranks.append(ranks[ord(pair[0])] + ranks[ord(pair[1])])
        change = Counter()
        for i in words_with.pop(pair):
            old, words[i] = words[i], words[i].replace(pair, token)
            for other in map(operator.add, old, old[1:]):
                change[other] -= counts[i]
            for other in map(operator.add, words[i], words[i][1:]):
                change[other] += counts[i]
                words_with[other].add(i)
        for other, difference in change.items():
            pairs[other] += difference
            if difference and pairs[other]:
                heapq.heappush(heap, (-pairs[other], other))
    return encoding_of(ranks)


def encoding_of(tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """The encoding with these tokens, in the order of their ids, and <|endoftext|> after them."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name=f"bpe{len(ranks) + 1}", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


@dataclass
class Tokens:
    """A split's reviews in one stream. <|endoftext|> stands before each review and at the end."""

    stream: np.ndarray  # (tokens + 1,) uint16
    offsets: np.ndarray  # (N + 1,) int64: where each review's <|endoftext|> stands

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.stream[self.offsets[i] : self.offsets[i + 1]]

    def windows(self, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of every training window: `length` inputs, each with a next token.

        A window starts at a review's <|endoftext|>, or at a multiple of `n_ctx` inside the review.
        A review's last target is the <|endoftext|> after it. So every token is a target once.
        """
        sizes = np.diff(self.offsets)
        pieces = -(-sizes // n_ctx)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(self.offsets[:-1], pieces) + n_ctx * (np.arange(len(first)) - first)
        return starts, np.minimum(n_ctx, np.repeat(self.offsets[1:], pieces) - starts)


def lm_batch(tokens: Tokens, starts: np.ndarray,
             lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """idx (B, T) int64, padded with 0, and the mask (B, T) of targets: all but a row's first token.

    Row b has lengths[b] + 1 real tokens.
    """
    column = np.arange(np.max(lengths) + 1)
    real = column <= np.asarray(lengths)[:, None]  # (B, T)
    where = np.where(real, np.asarray(starts)[:, None] + column, 0)
    return np.where(real, tokens.stream[where].astype(np.int64), 0), real & (column > 0)


def lm_batches(tokens: Tokens, n_ctx: int, batch: int, accum: int,
               seed: int) -> Callable[[int], tuple[list[dict], int]]:
    """batches(step) -> (`accum` micro-batches of idx, mask and lengths, the number of targets).

    A batch holds windows of similar length, because padding costs as much time as tokens. An epoch
    has each window at most once, in batches of random order. UserError for less than one batch.
    """
    starts, lengths = tokens.windows(n_ctx)
    if len(starts) < batch:
        raise UserError(f"got {len(starts)} training windows, wanted at least one batch of {batch}:"
                        " lower --sft-batch or raise --reviews")
    per_epoch = len(starts) // batch

    @functools.lru_cache(1)
    def epoch(number: int) -> np.ndarray:  # (per_epoch, batch) windows
        rng = np.random.default_rng((seed, number))
        order = rng.permutation(len(lengths))
        pools = np.split(order, range(16 * batch, len(order), 16 * batch))
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
        return rng.permutation(order[: per_epoch * batch].reshape(per_epoch, batch))

    def batches(step: int) -> tuple[list[dict], int]:
        windows, micro_batches = epoch(step // per_epoch)[step % per_epoch], []
        for part in np.array_split(windows, min(accum, batch)):
            idx, mask = lm_batch(tokens, starts[part], lengths[part])
            micro_batches.append(dict(idx=idx, mask=mask, lengths=lengths[part] + 1))
        return micro_batches, int(lengths[windows].sum())

    return batches


@dataclass
class Data:
    enc: tiktoken.Encoding
    eot: int
    tokens: dict[str, Tokens]  # by split
    labels: dict[str, np.ndarray | None]  # by split: (N,) int8, 1 positive, 0 negative
    notes: dict[str, int]  # duplicates dropped, by split
    identity: str  # the hash of every stream, label and rank

    def unlabelled(self) -> Tokens:
        """Train and unsup as one stream: a language model needs no labels."""
        a, b = self.tokens["train"], self.tokens["unsup"]
        return Tokens(np.concatenate([a.stream[:-1], b.stream]),
                      np.concatenate([a.offsets[:-1], b.offsets + a.offsets[-1]]))


def load(corpus: str, vocab: str | int, folder: Path, reviews: int, seed: int,
         progress: Progress = print) -> Data:
    """The corpus as tokens. The first call builds files in `folder`; later calls memory-map them.

    `reviews` is the number of reviews of corpus "toy"; of "imdb" the first `reviews` of each
    shuffled split are used, or all if it is 0. `vocab` is "gpt2", or the size of a BPE that is
    trained on train and unsup. The subfolder's name has a hash of these settings and of the source
    of the reviews, so other settings never read its files. UserError if a file has changed since.
    """
    if reviews < (20 if corpus == "toy" else 0):
        raise UserError(f"got {reviews} reviews, wanted 20 or more (on imdb, 0 for all): give "
                        "--reviews")
    path = Path(os.environ["IMDB_PATH"]) if os.environ.get("IMDB_PATH") else None
    source = (file_hash(toy_reviews.__file__) if corpus == "toy" else
              imdb_archive.reviews_hash(path) if path else imdb_archive.REVIEWS)
    base = Path(folder) / f"{corpus}-{vocab}-{json_hash([reviews, seed, source])}"
    if not all(os.path.exists(base / name) for name in (*FILES, "about.json")):
        if corpus == "toy":
            splits, notes, progress = read_toy(reviews, seed), {}, lambda text: None
        else:
            splits, notes = read_imdb(path, Path(folder), progress, seed)
            splits = {split: rows[: reviews or None] for split, rows in splits.items()}
        _build(splits, notes, str(vocab), base, progress)
    again = f"delete {base}, and the same command builds it again"
    with reading(base, again):
        about = read_json(base / "about.json", again)
        identity = _identity(base, about["notes"], about["labels"], again)
        if about["identity"] != identity:
            raise ValueError("a file has changed since it was written")
        enc = encoding_of(read_tiktoken(base / "bpe.tiktoken", again))
        # np.asarray keeps the memory map, and its elements are read faster than np.memmap's
        streams = {s: np.asarray(np.load(base / f"{s}.npy", mmap_mode="r")) for s in SPLITS}
    tokens = {s: Tokens(x, np.flatnonzero(x == enc.eot_token)) for s, x in streams.items()}
    labels = {s: np.array(y, dtype=np.int8) if y and None not in y else None
              for s, y in about["labels"].items()}
    return Data(enc, enc.eot_token, tokens, labels, about["notes"], identity)


def _identity(base: Path, notes: dict[str, int], labels: dict[str, list],
              remedy: str = RESTORE) -> str:
    return json_hash([notes, labels, [file_hash(base / name, remedy) for name in FILES]])


def _build(splits: Splits, notes: dict[str, int], vocab: str, base: Path, progress: Progress):
    """Writes the files of `load`, about.json last."""
    progress(f"vocabulary {vocab}: training a BPE" if vocab != "gpt2" else "vocabulary gpt2")
    texts = (row.text for split in ("train", "unsup") for row in splits[split])
    enc = gpt2_encoding() if vocab == "gpt2" else train_bpe(texts, vocab)
    with writing(base):
        base.mkdir(parents=True, exist_ok=True)
    save_tiktoken(tokens_of(enc), base / "bpe.tiktoken")
    for split, rows in splits.items():
        progress(f"encoding {len(rows):,} reviews of {split}")
        texts, parts = [row.text for row in rows], []
        for i in range(0, len(texts), 1024):  # in parts: lists take 18 times the stream's memory
            batch = enc.encode_ordinary_batch(texts[i : i + 1024], num_threads=4)
            parts += [np.array([enc.eot_token, *ids], dtype=np.uint16) for ids in batch]
        stream = np.concatenate([*parts, np.uint16([enc.eot_token])])
        write_whole(base / f"{split}.npy", lambda file: np.save(file, stream))
    labels = {s: [row.label for row in rows] for s, rows in splits.items()}
    about = {"notes": notes, "labels": labels, "identity": _identity(base, notes, labels)}
    save_json(base / "about.json", about)


# ------------------------------------------------------------------------------ preferences

def sample_prompts(tokens: Tokens, n: int, seed: int | Sequence[int], lo: int = 2, hi: int = 8,
                   avoid: Collection[tuple[int, ...]] = frozenset()) -> tuple[list[list[int]], int]:
    """App. C.1 · `n` prompts: <|endoftext|> and the first lo to hi tokens of reviews.

    `seed` shuffles the reviews, and none is used twice before all are used once. A prompt that is
    in `avoid` (evaluation avoids the training prompts) is drawn again; the second result counts it.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(np.diff(tokens.offsets) > hi))
    prompts, drawn = [], 0
    while len(prompts) < n:
        if not len(order) or drawn - len(prompts) > 100 * n:
            raise UserError(f"found {len(prompts)} prompts of {lo} to {hi} tokens in {len(tokens)} "
                            f"reviews, wanted {n}: lower --prompts, --eval-prompts or "
                            "--valid-prompts, or raise --reviews")
        prompt = tokens[order[drawn % len(order)]][: 1 + rng.integers(lo, hi + 1)].tolist()
        drawn += 1
        if tuple(prompt) not in avoid:
            prompts.append(prompt)
    return prompts, drawn - n


@dataclass
class Groups:
    """Preference data: P prompts with K completions each, as ids. No text is encoded again."""

    prompt_ids: list[list[int]]  # P, <|endoftext|> first
    completion_ids: list[list[list[int]]]  # P x K, <|endoftext|> last where it was sampled
    rewards: np.ndarray  # (P, K) float32
    has_reward: bool  # False: the rewards only give the order, from 1 for the best to 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> groups left out

    @property
    def K(self) -> int:
        return len(self.completion_ids[0])

    def flat(self, picks: Iterable[int]) -> tuple[list[list[int]], list[list[int]]]:
        """G groups as two lists of length G*K: each completion's prompt, and the completions."""
        return ([self.prompt_ids[i] for i in picks for _ in range(self.K)],
                [y for i in picks for y in self.completion_ids[i]])


def gather_groups(prompts: list[list[int]], samples: list[list[int]],
                  rewards: np.ndarray) -> Groups:
    """Groups from P prompts, their P*K samples in order, and r* of each sample: rewards (P*K,).

    A group whose rewards are all equal has no preference. It is left out and counted in `dropped`.
    """
    rewards = np.asarray(rewards, dtype=np.float32).reshape(len(prompts), -1)
    K = rewards.shape[1]
    keep = np.flatnonzero((rewards != rewards[:, :1]).any(1))
    if not len(keep):
        raise UserError("in each group all rewards are equal, so there is no preference: give more "
                        "--prompts, or in --stage online a larger --online-every")
    return Groups([prompts[i] for i in keep], [samples[i * K : (i + 1) * K] for i in keep],
                  rewards[keep], True, {"equal rewards": len(prompts) - len(keep)})


def split_prompts(prompts: list[list[int]]) -> tuple[list[int], list[int]]:
    """Indices of the groups to train on, and of those held out: a tenth of the distinct prompts.

    A hash of its tokens decides whether a prompt is held out. UserError for fewer than three.
    """
    distinct = sorted(set(map(tuple, prompts)),
                      key=lambda p: hashlib.sha256(repr(p).encode()).digest())
    if len(distinct) < 3:
        raise UserError(f"got preferences for {len(distinct)} distinct prompts, wanted three or "
                        "more: two are held out")
    held = set(distinct[: max(2, len(distinct) // 10)])
    train = [i for i, p in enumerate(prompts) if tuple(p) not in held]
    return train, [i for i, p in enumerate(prompts) if tuple(p) in held]


def write_groups(file: BinaryIO, groups: Groups, enc: tiktoken.Encoding) -> None:
    """Writes one JSON line per group. Without r*, "rewards" is null, and the best stands first."""
    rows = zip(groups.prompt_ids, groups.completion_ids, groups.rewards, strict=True)
    for prompt_ids, completion_ids, rewards in rows:
        prompt, *completions = decode(prompt_ids, completion_ids, enc)
        row = {"prompt": prompt, "completions": completions,
               # str gives the shortest decimal of a float32: 0.9, not 0.8999999761581421
               "rewards": [float(str(r)) for r in rewards] if groups.has_reward else None,
               "prompt_ids": prompt_ids, "completion_ids": completion_ids}
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_groups(path: Path, enc: tiktoken.Encoding, n_ctx: int) -> Groups:
    """Preferences from a file in any form that support/preference_files.py describes.

    Groups longer than n_ctx (prompt and completion) and groups without a preference are left out
    and counted in `dropped`. UserError for malformed rows, with their lines, and for no group left.
    """
    rows, dropped = read_preferences(path)
    ids, has_reward = token_ids(path, rows, enc), rows[0].rewards is not None
    short = [len(prompt) + max(map(len, completions)) <= n_ctx for prompt, completions in ids]
    if not all(short):
        dropped[f"longer than {n_ctx} tokens"] = short.count(False)
    some_left(path, any(short), dropped)
    prompts, completions = zip(*itertools.compress(ids, short))
    best_first = np.linspace(1, 0, len(completions[0]))
    scores = [row.rewards or best_first for row in itertools.compress(rows, short)]
    return Groups([*prompts], [*completions], np.array(scores, dtype=np.float32), has_reward,
                  dict(dropped))


# ------------------------------------------------------------------------------ the command

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print prompts with four reviews and pairs.")
    parser.add_argument("--corpus", choices=["toy", "imdb"], default="toy", help="which reviews")
    parser.add_argument("-n", type=int, default=3, help="how many prompts")
    args = parser.parse_args(argv)
    vocab, reviews = (1280, 20_000) if args.corpus == "toy" else ("gpt2", 0)
    data = load(args.corpus, vocab, Path("data"), reviews, seed=0)
    for split, tokens in data.tokens.items():
        print(f"{split}: {len(tokens):,} reviews, {tokens.offsets[-1]:,} tokens")
    train, labels, enc = data.tokens["train"], data.labels["train"], data.enc
    groups = ((prompt, [i for i, x in enumerate(train) if x[: len(prompt)].tolist() == prompt][:4])
              for prompt in sample_prompts(train, 1_000, seed=0, hi=4)[0])
    groups = (group for group in groups if len(group[1]) == 4)
    for _, (prompt, picks) in zip(range(args.n), groups):
        print(f"\nprompt: {EOT}{enc.decode(prompt[1:])}")
        rewards = {}
        for name, i in zip("abcd", picks):
            rest = enc.decode(train[i][len(prompt) :][:48]).replace("\n", " ")
            rewards[name] = (toy_reviews.sentiment(enc.decode(train[i][1:])) if labels is None
                             else float(labels[i]))
            print(f"  {name}, r* = {rewards[name]:.2f}: {rest}")
        pairs = [f"{w} ≻ {l}" for w in rewards for l in rewards if rewards[w] > rewards[l]]
        print("  pairs:", ", ".join(pairs) or "none, because all r* are equal")


if __name__ == "__main__":
    sys.exit(main_exit(main))
