"""Laws of data_imdb.py: what is read is what was written; every token is a target once. Bad files
that a user may give are rows of test_mistakes.py."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex

import data_imdb
from data_imdb import (EOT, Data, Groups, Tokens, UserError, encoding_of, gather_groups, lm_batch,
                       lm_batches, sample_prompts, split_prompts, train_bpe)
from support import imdb_archive
from support.runs import main_exit
from support.tokenizer_files import read_tiktoken, save_tiktoken, tokens_of

IMDB = os.environ.get("IMDB_PATH", "")
quiet = {"progress": lambda text: None}


@pytest.fixture(autouse=True)
def no_corpus(monkeypatch):
    """No test reads the real corpus by accident. Those that need it use the fixture `real`."""
    monkeypatch.delenv("IMDB_PATH", raising=False)


# ------------------------------------------------------------------------------ BPE

def merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out, i = [*out, new], i + 2
        else:
            out, i = [*out, ids[i]], i + 1
    return out


def naive_bpe(texts, vocab_size):
    """The merges of BPE. Every step counts every pair in the whole text again."""
    words = [list(w.encode()) for text in texts for w in regex.findall(data_imdb.PATTERN, text)]
    merges = []
    while 256 + len(merges) < vocab_size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, pair, 256 + len(merges)) for word in words]
        merges.append(pair)
    return merges


def random_texts(seed, n=12):
    rng = random.Random(seed)
    alphabet = rng.choice(["ab", "abc  ", "aab' \n", "né ☃ 1", "isn't  It's 12\n"])
    return ["".join(rng.choices(alphabet, k=rng.randrange(0, 60))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(8))
def test_bpe_equals_a_naive_one_and_tiktoken_applies_its_merges(seed):
    texts = random_texts(seed)
    vocab = random.Random(seed).choice([260, 290, 1000])
    merges, enc = naive_bpe(texts, vocab), train_bpe(texts, vocab)
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    got = [enc.decode_single_token_bytes(i) for i in range(enc.eot_token)]
    assert got == tokens, "another merge than the most frequent pair (of equals the smallest ids)"
    assert enc.n_vocab == len(tokens) + 1 <= vocab
    for text in texts + random_texts(seed + 1):
        ids = []
        for word in regex.findall(data_imdb.PATTERN, text):
            word = list(word.encode())
            for i, pair in enumerate(merges):
                word = merge(word, pair, 256 + i)
            ids += word
        assert enc.encode_ordinary(text) == ids, f"tiktoken does not apply the merges to {text!r}"


def test_bpe_gives_back_any_text():
    rng = random.Random(0)
    enc = train_bpe(["the film was good, the ending was bad\n" * 3], 300)
    for _ in range(300):
        points = [rng.randrange(rng.choice([128, 0xD800])) for _ in range(rng.randrange(40))]
        points += [rng.randrange(0xE000, 0x110000) for _ in range(rng.randrange(9))]
        text = "".join(map(chr, points)) + rng.choice(["", " the film", "\n\n ", "'s " + EOT])
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text
        assert enc.eot_token not in ids, "text can spell <|endoftext|>, never be it"


def test_bpe_stops_when_no_pair_is_left():
    enc = train_bpe(["aaaa bb"], 5000)
    assert enc.n_vocab < 270 and enc.eot_token == enc.n_vocab - 1
    assert len(enc.encode_ordinary("aaaa bb")) == 2, "every pre-token should be one token"
    assert train_bpe([], 300).n_vocab == 257, "no text, no merges: the bytes and the special token"


def test_bpe_does_not_depend_on_the_order_of_texts():
    texts = random_texts(3, 30)
    one, two = train_bpe(texts, 400), train_bpe(texts[::-1], 400)
    assert one._mergeable_ranks == two._mergeable_ranks, "ties are broken by the order of reading"


def test_bpe_refuses_a_size_it_cannot_have():
    for vocab in (256, 65_537, "abc", -1):
        with pytest.raises(UserError, match="257"):
            train_bpe(["some text"], vocab)


def test_an_encoding_survives_the_disk(tmp_path):
    enc = train_bpe(["the film was good " * 3, "ça ☃"], 290)
    save_tiktoken(tokens_of(enc), tmp_path / "bpe")
    again = encoding_of(read_tiktoken(tmp_path / "bpe"))
    assert again._mergeable_ranks == enc._mergeable_ranks and again.eot_token == enc.eot_token


@pytest.mark.parametrize("damage", [
    lambda lines: lines[1:], lambda lines: [*lines, lines[0]], lambda lines: [b"\xff \xfe"],
    lambda lines: [], lambda lines: [b"{}"], lambda lines: [b"", *lines],
    lambda lines: [line.split()[1] for line in lines]])
def test_damaged_ranks_are_refused(tmp_path, damage):
    save_tiktoken(tokens_of(train_bpe(["the film was good " * 3], 290)), tmp_path / "bpe")
    lines = (tmp_path / "bpe").read_bytes().splitlines()
    (tmp_path / "bpe").write_bytes(b"\n".join(damage(lines)))
    with pytest.raises(UserError, match="bpe is damaged or of another kind"):
        read_tiktoken(tmp_path / "bpe")


def test_gpt2_saved_is_gpt2(tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's vocabulary would be downloaded")
    enc = data_imdb.gpt2_encoding()
    assert enc.n_vocab == 50_257 and enc.eot_token == 50_256
    save_tiktoken(tokens_of(enc), tmp_path / "bpe")
    again, rng = encoding_of(read_tiktoken(tmp_path / "bpe")), random.Random(0)
    for text in ["It's 2 films,  isn't\n\n it?", *("".join(rng.choices("ab é'☃\n 1.", k=50))
                                                  for _ in range(200))]:
        assert again.encode_ordinary(text) == enc.encode_ordinary(text)


@pytest.mark.parametrize("trouble", ["damaged", "not writable"])
def test_gpt2s_files_that_tiktoken_cannot_get_give_one_sentence(tmp_path, monkeypatch, trouble):
    def read_file(url):  # a network that answers with a login page, or with the file
        if trouble == "damaged":
            return b"<html>please log in</html>"
        return (source / hashlib.sha1(url.encode()).hexdigest()).read_bytes()

    if not (source := Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""))).is_absolute():
        pytest.skip("TIKTOKEN_CACHE_DIR is not set")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # tiktoken's own cache
    monkeypatch.setattr("tiktoken.load.read_file", read_file)
    cache = tmp_path / "cache"
    if trouble == "damaged":
        shutil.copytree(source, cache)
        for file in cache.iterdir():
            file.chmod(0o644)
            file.write_bytes(b"noise")
    else:
        cache.write_text("a file where a folder was wanted")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    with pytest.raises(UserError, match=r"GPT-2's vocab.bpe.*\(.+\); set TIKTOKEN_CACHE_DIR to"):
        data_imdb.gpt2_encoding()


# ------------------------------------------------------------------------------ streams

def some_tokens(sizes, seed=0, eot=99):
    """Reviews with these numbers of tokens, <|endoftext|> included."""
    rng = np.random.default_rng(seed)
    reviews = [[eot, *rng.integers(0, eot, size - 1)] for size in sizes]
    offsets = np.cumsum([0, *sizes])
    return Tokens(np.array([*sum(reviews, []), eot], dtype=np.uint16), offsets)


@pytest.mark.parametrize("n_ctx", [1, 2, 7, 8, 64])
def test_every_token_is_a_target_exactly_once(n_ctx):
    sizes = [1, 2, n_ctx, n_ctx + 1, 2 * n_ctx, 3 * n_ctx + 1, 1, 5]
    tokens = some_tokens(sizes)
    starts, lengths = tokens.windows(n_ctx)
    order = np.random.default_rng(0).permutation(len(starts))
    targets = Counter()
    for part in np.array_split(order, 3):
        idx, mask = lm_batch(tokens, starts[part], lengths[part])
        assert idx.dtype == np.int64 and mask.dtype == bool and idx.shape == mask.shape
        assert not mask[:, 0].any(), "nothing predicts a row's first token"
        assert (mask.sum(1) == lengths[part]).all()
        assert (idx[:, 1:][~mask[:, 1:]] == 0).all(), "all positions without a target are padding"
        targets.update(idx[mask].tolist())
    # The <|endoftext|> after a review is the first token of the next: together they are the stream.
    assert targets == Counter(tokens.stream[1:].tolist())


@pytest.mark.parametrize("n_ctx", [1, 3, 8])
def test_a_window_starts_at_endoftext_or_at_a_multiple_of_the_context(n_ctx):
    tokens = some_tokens([4, 9, 24, 1, 8, 16, 17])
    starts, lengths = tokens.windows(n_ctx)
    assert (lengths >= 1).all() and (lengths <= n_ctx).all()
    for start, length in zip(starts, lengths):
        review = np.searchsorted(tokens.offsets, start, side="right") - 1
        inside = start - tokens.offsets[review]
        assert inside % n_ctx == 0, "neither at <|endoftext|> nor at a multiple of the context"
        assert inside > 0 or tokens.stream[start] == 99
        assert start + length <= tokens.offsets[review + 1], "runs into the next review"


def test_reviews_come_back_one_by_one():
    tokens = some_tokens([3, 1, 7])
    assert [len(review) for review in tokens] == [3, 1, 7] and len(tokens) == 3
    assert all(review[0] == 99 for review in tokens), "<|endoftext|> stands before every review"


def rows_of(micro_batches):
    """The real tokens of every row."""
    return [tuple(row[:n]) for m in micro_batches
            for row, n in zip(m["idx"].tolist(), m["lengths"])]


def test_an_lm_epoch_has_every_window_once_and_the_next_another_order():
    tokens = some_tokens(np.random.default_rng(0).integers(4, 30, 400))
    windows = len(tokens.windows(24)[0])
    per_epoch, batches = windows // 12, lm_batches(tokens, 24, batch=12, accum=3, seed=1)
    epochs = []
    for epoch in range(3):
        epochs.append([])
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            micro_batches, n = batches(step)
            assert len(micro_batches) == 3 and n == sum(m["mask"].sum() for m in micro_batches)
            for m in micro_batches:
                assert (m["mask"].sum(1) + 1 == m["lengths"]).all(), "the first token is no target"
            epochs[-1].append(frozenset(rows_of(micro_batches)))
        assert len(frozenset.union(*epochs[-1])) == 12 * per_epoch, "a window twice in an epoch"
    assert not set(epochs[0]) & set(epochs[1]), "the next epoch has the same batches"
    assert not set(epochs[1]) & set(epochs[2])


def test_an_lm_batch_has_windows_of_similar_length_and_batches_come_in_random_order():
    tokens = some_tokens(np.random.default_rng(0).integers(2, 30, 800))
    batches = lm_batches(tokens, 64, batch=4, accum=1, seed=0)
    lengths = np.array([batches(step)[0][0]["lengths"] for step in range(200)])
    spread = np.ptp(lengths, axis=1).mean()
    assert spread < 5, f"lengths in a batch differ by {spread:.1f} of 28: padding"
    longer = (np.diff(lengths.mean(1)) > 0).mean()
    assert 0.3 < longer < 0.7, "batches come sorted by length, short reviews first"


def test_lm_batches_are_a_function_of_seed_and_step():
    tokens = some_tokens(range(4, 60))
    one, two, other = (lm_batches(tokens, 24, 12, 3, seed) for seed in (1, 1, 2))
    for step in (25, 0, 4, 5):
        assert rows_of(one(step)[0]) == rows_of(two(step)[0]) != rows_of(other(step)[0])
    assert len(lm_batches(tokens, 24, 4, 9, 1)(0)[0]) == 4, "no empty micro-batch"


def test_unlabelled_is_train_and_unsup_as_one_stream():
    train, unsup = some_tokens([3, 2, 9]), some_tokens([2, 4], seed=1)
    data = Data(None, 99, dict(train=train, unsup=unsup), {}, {}, "")
    both = data.unlabelled()
    assert [x.tolist() for x in both] == [x.tolist() for x in (*train, *unsup)]
    assert len(both) == 5 and both.stream[-1] == 99, "<|endoftext|> after the last review"
    data.tokens["unsup"] = Tokens(np.array([99], np.uint16), np.array([0]))  # as on the toy corpus
    assert [x.tolist() for x in data.unlabelled()] == [x.tolist() for x in train]


# ------------------------------------------------------------------------------ a small IMDb

FEW = {key: (split, label, 40) for key, (split, label, _) in data_imdb.FOLDERS.items()}


def tiny_reviews():
    """name -> text: 40 of each kind; three texts of test recur in train, two of train in unsup."""
    names = {f"{key}/{i}_{7 if 'pos' in key else 2}.txt": f"{key} {i}<br /><br />is it é {i * i}?"
             for key in FEW for i in range(40)}
    for i in range(3):
        names[f"train/pos/{i}_7.txt"] = names[f"test/neg/{i}_2.txt"]
    names["train/unsup/5_2.txt"] = names["train/neg/30_2.txt"]
    names["train/unsup/6_2.txt"] = names["train/neg/31_2.txt"]
    names["train/unsup/7_2.txt"] = names["test/pos/31_7.txt"]
    return names


def write_archive(path, names, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, text in {**names, "README": "read me", "train/labeledBow.feat": "1"}.items():
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(data_imdb, "FOLDERS", FEW)
    return write_archive(tmp_path / "tiny.tar.gz", tiny_reviews())


def test_reviews_labels_and_line_breaks(tiny, tmp_path):
    splits, _ = data_imdb.read_imdb(tiny, tmp_path, **quiet)
    for split in ("train", "valid", "test"):
        for text, label in splits[split]:
            assert "<br" not in text and "\n\nis it é" in text
            assert "train" not in text.split()[0] or ("pos" in text) == label, "another's label"
    assert all(review.label is None for review in splits["unsup"])
    assert len(splits["test"]) == 80 and 3 <= len(splits["valid"]) <= 4


def test_a_duplicate_stays_in_the_split_for_evaluation(tiny, tmp_path):
    splits, notes = data_imdb.read_imdb(tiny, tmp_path, **quiet)
    texts = {split: {review.text for review in splits[split]} for split in splits}
    for a in texts:
        for b in texts:
            assert a == b or not texts[a] & texts[b], f"{a} and {b} share a text"
    assert notes["dup_test"] == 0, "a duplicate must stay in test"
    assert notes["dup_train"] + notes["dup_valid"] == 3 and notes["dup_unsup"] == 3
    everything = {text.replace("<br />", "\n") for text in tiny_reviews().values()}
    assert set.union(*texts.values()) == everything, "only copies may be dropped"


def test_another_seed_gives_another_order(tiny, tmp_path):
    splits = [data_imdb.read_imdb(tiny, tmp_path, seed=seed, **quiet)[0] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] and splits[0]["valid"] != splits[2]["valid"]
    assert sorted(splits[0]["test"]) == sorted(splits[2]["test"])


# ------------------------------------------------------------------------------ load

def test_toy_splits_share_no_text():
    splits = data_imdb.read_toy(2000, seed=0)
    texts = [review.text for split in splits.values() for review in split]
    assert len(set(texts)) == len(texts) and set(splits) == set(data_imdb.SPLITS)
    assert len(splits["test"]) == len(splits["valid"]) == len(texts) // 20 and not splits["unsup"]


def same(a, b):
    return a.identity == b.identity and all(np.array_equal(a.tokens[s].stream, b.tokens[s].stream)
                                            for s in data_imdb.SPLITS)


def test_tokens_are_the_reviews_and_are_mapped_from_the_disk(tmp_path):
    data = data_imdb.load("toy", 400, tmp_path, 300, seed=1)
    splits = data_imdb.read_toy(300, seed=1)
    for split, tokens in data.tokens.items():
        assert isinstance(tokens.stream.base, np.memmap) and tokens.stream.dtype == np.uint16
        assert [data.enc.decode(ids[1:]) for ids in tokens] == [row.text for row in splits[split]]
        assert all(ids[0] == data.eot for ids in tokens) and tokens.stream[-1] == data.eot
        assert data.labels[split] is None
    assert data.enc.n_vocab == 400 and data.eot == 399


def test_a_second_load_reads_what_the_first_wrote(tmp_path):
    def written():
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    first = data_imdb.load("toy", 300, tmp_path, 100, seed=0)
    before = written()
    for vocab in (300, "300"):  # --vocab is a text
        assert same(first, data_imdb.load("toy", vocab, tmp_path, 100, seed=0))
    assert written() == before, "built again"


def test_another_setting_never_reads_the_files(tmp_path, monkeypatch):
    settings = [(300, 100, 0), (310, 100, 0), (300, 120, 0), (300, 100, 1)]
    loaded = [data_imdb.load("toy", v, tmp_path, n, seed) for v, n, seed in settings]
    assert len({data.identity for data in loaded}) == len(settings)
    for data, (v, n, seed) in zip(loaded, settings):
        assert same(data, data_imdb.load("toy", v, tmp_path, n, seed))
    (tmp_path / "edited.py").write_text("another grammar")
    monkeypatch.setattr(data_imdb.toy_reviews, "__file__", str(tmp_path / "edited.py"))
    data_imdb.load("toy", 300, tmp_path, 100, 0)
    assert len(list(tmp_path.glob("toy-*"))) == 5, "reviews of the old grammar were read"


def test_without_one_of_its_files_a_corpus_is_built_again(tmp_path):
    """A kill can leave any of the files out."""
    wanted = data_imdb.load("toy", 300, tmp_path / "whole", 60, 0)
    (whole,) = (tmp_path / "whole").iterdir()
    assert len(list(whole.iterdir())) == 6
    for file in whole.iterdir():
        shutil.copytree(whole, tmp_path / file.name / whole.name)
        (tmp_path / file.name / whole.name / file.name).unlink()
        assert same(wanted, data_imdb.load("toy", 300, tmp_path / file.name, 60, 0)), file.name


def test_imdb_loads_with_its_labels(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("IMDB_PATH", str(tiny))
    said = []
    data = data_imdb.load("imdb", 400, tmp_path / "data", 0, 0, progress=said.append)
    assert said and data.notes["dup_unsup"] == 3 and data.labels["unsup"] is None
    label = {text.replace("<br />", "\n"): int("/pos" in name)  # of the copy that is kept
             for name, text in reversed(tiny_reviews().items()) if "unsup" not in name}
    for split in ("train", "valid", "test"):
        texts = [data.enc.decode(ids[1:]) for ids in data.tokens[split]]
        assert data.labels[split].tolist() == [label[text] for text in texts]
    few = data_imdb.load("imdb", 400, tmp_path / "data", 25, 0, **quiet)
    for split, tokens in few.tokens.items():
        assert len(tokens) == min(25, len(data.tokens[split]))
        for i, ids in enumerate(tokens):
            assert few.enc.decode(ids) == data.enc.decode(data.tokens[split][i]), "not the first n"
    monkeypatch.setenv("IMDB_PATH", str(write_archive(
        tmp_path / "other.tar.gz", tiny_reviews() | {"train/unsup/8_2.txt": "all new " * 99})))
    assert data_imdb.load("imdb", 400, tmp_path / "data", 0, 0, **quiet).identity != data.identity


def test_the_official_reviews_have_one_cache_from_any_archive(tiny, tmp_path, monkeypatch):
    def load(path=None):
        monkeypatch.setenv("IMDB_PATH", str(path or ""))
        return data_imdb.load("imdb", 300, tmp_path / "data", 0, 0, **quiet)

    xz = write_archive(tmp_path / "tiny.tar.xz", dict(reversed(tiny_reviews().items())), "w:xz")
    for name, path in dict(SHA256=tiny, RECOMPRESSED=xz).items():
        monkeypatch.setattr(imdb_archive, name, hashlib.sha256(path.read_bytes()).hexdigest())
    first = load(xz)
    monkeypatch.delattr(data_imdb, "read_imdb")  # would read or download again
    for other in (tiny, None):
        assert same(first, load(other))
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_imdb_without_unsup_is_train_alone(tiny, tmp_path, monkeypatch):
    names = {name: text for name, text in tiny_reviews().items() if "unsup" not in name}
    few, said = write_archive(tmp_path / "few.tar.gz", names), []
    whole, data = [], []
    for path, seen in ((tiny, whole), (few, data)):
        monkeypatch.setenv("IMDB_PATH", str(path))
        seen += [data_imdb.load("imdb", 300, tmp_path / "data", 0, 0, said.append)
                 for _ in range(2)]
    assert same(*data) and data[0].identity != whole[0].identity
    assert sum("no train/unsup" in line for line in said) == 1, "said once, when it is read"
    for split in ("train", "valid", "test"):
        assert [data[0].enc.decode(ids[1:]) for ids in data[0].tokens[split]] == \
            [whole[0].enc.decode(ids[1:]) for ids in whole[0].tokens[split]]
        assert data[0].labels[split].tolist() == whole[0].labels[split].tolist()
    assert len(data[0].tokens["unsup"]) == 0 and data[0].labels["unsup"] is None
    assert [x.tolist() for x in data[0].unlabelled()] == \
        [x.tolist() for x in data[0].tokens["train"]]


def deep(old):
    return b"[" * 100_000


DAMAGE = {"cut short": lambda old: old[: len(old) // 2], "one byte short": lambda old: old[:-1],
          "empty": lambda old: b"", "longer": lambda old: old + b"0", "deep": deep,
          "noise": lambda old: random.Random(0).randbytes(len(old)),
          "one bit": lambda old: old[:-9] + bytes([old[-9] ^ 1]) + old[-8:]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused_and_is_built_again_once_deleted(tmp_path, damage):
    wanted = data_imdb.load("toy", 300, tmp_path, 60, 0)
    (base,) = tmp_path.iterdir()
    for file in sorted(base.iterdir()):
        old = file.read_bytes()
        file.write_bytes(DAMAGE[damage](old))
        with pytest.raises(UserError, match=f"{base}.* is damaged.*delete {base}, and the same"):
            data_imdb.load("toy", 300, tmp_path, 60, 0)
        file.write_bytes(old)
        assert same(wanted, data_imdb.load("toy", 300, tmp_path, 60, 0))


def test_a_cache_with_other_content_is_refused(tiny, tmp_path, monkeypatch):
    """Content that can be read, but was edited or comes from another file."""
    monkeypatch.setenv("IMDB_PATH", str(tiny))

    def load():
        return data_imdb.load("imdb", 300, tmp_path / "data", 0, 0, **quiet)

    wanted = load()
    (base,) = (tmp_path / "data").iterdir()
    about = json.loads((base / "about.json").read_bytes())
    flipped = {"labels": about["labels"] | {"test": [1 - y for y in about["labels"]["test"]]}}
    fewer = {"labels": about["labels"] | {"test": about["labels"]["test"][1:]}}

    def stream(array):
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    train = np.load(base / "train.npy")
    wrong = [("about.json", json.dumps(other).encode()) for other in (
        {}, 5, [], None, about | flipped, about | fewer, about | {"notes": {}},
        {key: value for key, value in about.items() if key != "identity"})]
    wrong += [("train.npy", content) for content in (
        (base / "test.npy").read_bytes(), stream(train[:-1]), stream(train.astype(np.int64)),
        stream(train.astype(float)), stream(train[None]), stream(train + 300),
        stream(np.array([None])), stream(np.uint16(1)))]
    lines = (base / "bpe.tiktoken").read_bytes().splitlines(keepends=True)
    wrong += [("bpe.tiktoken", b"".join(lines[:-1]))]
    for name, content in wrong:
        old = (base / name).read_bytes()
        (base / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{base}.* is damaged.*delete {base}, and the same"):
            load()
        (base / name).write_bytes(old)
    assert same(wanted, load())


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_the_place_of_a_file_is_refused(tmp_path, make):
    wanted = data_imdb.load("toy", 300, tmp_path, 60, 0)
    (base,) = tmp_path.iterdir()
    for name in (*data_imdb.FILES, "about.json"):
        file = (base / name).rename(tmp_path / "away")
        make(base / name)
        with pytest.raises(UserError, match=f"/{name}.* a .*; delete {base}, and the same"):
            data_imdb.load("toy", 300, tmp_path, 60, 0)
        (base / name).rmdir() if make is Path.mkdir else (base / name).unlink()
        file.rename(base / name)
    shutil.rmtree(base)
    assert same(wanted, data_imdb.load("toy", 300, tmp_path, 60, 0))


@pytest.mark.parametrize("where", ["tarfile.TarInfo.isfile", "heapq.heappop", "numpy.save"])
def test_ctrl_c_while_imdb_is_read_or_built_is_130_and_the_next_call_builds_it(
        tiny, tmp_path, monkeypatch, capsys, where):
    def stopped(*_):
        raise KeyboardInterrupt

    def load(folder=tmp_path / "data"):
        loaded.append(data_imdb.load("imdb", 300, folder, 0, 0, **quiet))

    loaded = []
    monkeypatch.setenv("IMDB_PATH", str(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(where, stopped)
        assert main_exit(load) == 130 and not loaded
    assert "Traceback" not in capsys.readouterr().err
    assert main_exit(load) == main_exit(lambda: load(tmp_path / "other")) == 0
    assert same(*loaded)


def test_commands_that_build_one_cache_at_the_same_time_all_succeed(tmp_path):
    start = threading.Barrier(4)  # all start before the first has built the cache

    def build(_):
        start.wait()
        return data_imdb.load("toy", 300, tmp_path, 60, 0)

    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(build, range(4)))
    assert all(same(data, built[0]) for data in built)
    (base,) = tmp_path.iterdir()
    assert len(list(base.iterdir())) == 6, "temporary files are left"


# ------------------------------------------------------------------------------ prompts

def test_prompts_are_prefixes_of_every_length_each_review_once():
    tokens = some_tokens([30] * 400 + [3] * 50, eot=60_000)  # no two have an equal prefix
    prompts, redrawn = sample_prompts(tokens, 400, seed=0)
    prefixes = {tuple(review[: 1 + n].tolist()): i for i, review in enumerate(tokens)
                for n in range(2, 9)}
    assert redrawn == 0 and len({prefixes[tuple(p)] for p in prompts}) == 400, "a review twice"
    lengths = Counter(len(prompt) - 1 for prompt in prompts)
    assert set(lengths) == set(range(2, 9)) and min(lengths.values()) > 30, "not uniform"
    more, _ = sample_prompts(tokens, 900, seed=0)
    assert more[:400] == prompts, "the first prompts do not depend on their number"
    assert max(Counter(prefixes[tuple(p)] for p in more).values()) == 3, "the reviews come again"
    assert sample_prompts(tokens, 400, seed=[0, 1])[0] != prompts


def test_prompts_avoid_and_count():
    tokens = some_tokens([30] * 300)
    avoid = set(map(tuple, sample_prompts(tokens, 200, seed=0)[0]))
    prompts, redrawn = sample_prompts(tokens, 250, seed=0, avoid=avoid)
    assert len(prompts) == 250 and not avoid & set(map(tuple, prompts)) and redrawn >= 200
    with pytest.raises(UserError, match="in 3 reviews, wanted 5"):
        tokens = some_tokens([30] * 3)
        sample_prompts(tokens, 5, 0, lo=2, hi=2, avoid={tuple(t[:3].tolist()) for t in tokens})
    with pytest.raises(UserError, match="2 to 8 tokens"):
        sample_prompts(some_tokens([5, 6]), 1, seed=0)


# ------------------------------------------------------------------------------ groups

ENC = train_bpe(["this film is good and that film is bad, yes no"], 300)
E = ENC.eot_token
OURS = {"prompt": "film", "completions": [" good", " bad", ""], "rewards": [0.9, 0.1, 0.5],
        "prompt_ids": [E, *b"film"], "completion_ids": [[*b" good", E], [*b" bad"], [E]]}
PAIR = {"prompt": "this film", "chosen": " is good", "rejected": " is bad"}
HH = {"chosen": "\n\nHuman: film?\n\nAssistant: good",
      "rejected": "\n\nHuman: film?\n\nAssistant: bad"}


def read(tmp_path, *rows, n_ctx=64):
    path = tmp_path / "groups.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data_imdb.read_groups(path, ENC, n_ctx)


def encode(text):
    return ENC.encode_ordinary(text)


@pytest.mark.parametrize("has_reward", [True, False])
def test_groups_that_are_written_and_read_are_equal(tmp_path, has_reward):
    rng = np.random.default_rng(0)
    ids = [[rng.integers(0, E, rng.integers(1, 9)).tolist() + [E] * (i % 2) for i in range(4)]
           for _ in range(50)]  # arbitrary bytes: most are no valid text
    ids[1] = [[*"é".encode()[:1]], [*"é".encode()[1:]], [*b"<|endoftext|>", E], [E]]
    rewards = rng.random((50, 4)) if has_reward else np.tile(np.linspace(1, 0, 4), (50, 1))
    groups = Groups([[E, 1, p] for p in range(50)], ids, rewards.astype(np.float32), has_reward)
    with open(tmp_path / "g.jsonl", "wb") as file:
        data_imdb.write_groups(file, groups, ENC)
    again = data_imdb.read_groups(tmp_path / "g.jsonl", ENC, 64)
    assert again.prompt_ids == groups.prompt_ids and again.completion_ids == ids
    assert np.array_equal(again.rewards, groups.rewards) and again.rewards.dtype == np.float32
    assert again.has_reward == has_reward and again.dropped == {}
    row = json.loads((tmp_path / "g.jsonl").read_bytes().splitlines()[0])
    assert EOT not in row["prompt"] + "".join(row["completions"]), "people read these texts"
    assert has_reward == (row["rewards"] is not None)


def test_a_file_may_mix_forms_with_one_k_and_without_rewards_the_best_stands_first(tmp_path):
    ours = read(tmp_path, OURS)
    assert ours.completion_ids == [OURS["completion_ids"]] and ours.has_reward
    assert np.allclose(ours.rewards, [OURS["rewards"]])
    mixed = read(tmp_path, PAIR, "", HH)
    assert len(mixed.prompt_ids) == 2 and not mixed.has_reward
    assert mixed.rewards.tolist() == [[1, 0], [1, 0]]
    ranked = read(tmp_path, {"prompt": "x", "completions": ["good", "yes", "no", "bad"]})
    assert (np.diff(ranked.rewards[0]) < 0).all() and not ranked.has_reward


def test_groups_that_are_left_out_are_counted(tmp_path):
    equal = OURS | {"rewards": [0.5, 0.5, 0.5 + 1e-12]}  # equal in float32
    got = read(tmp_path, equal, OURS, equal)
    assert len(got.prompt_ids) == len(got.rewards) == 1 and got.dropped == {"equal rewards": 2}
    long = PAIR | {"prompt": "this film " * 40}
    late = PAIR | {"rejected": " is bad" * 40}
    got = read(tmp_path, long, PAIR, late)
    assert len(got.prompt_ids) == 1 and list(got.dropped.values()) == [2]
    length = len(encode("this film")) + 1 + max(len(encode(y)) for y in (" is good", " is bad")) + 1
    assert read(tmp_path, PAIR, n_ctx=length).dropped == {}, "it has exactly n_ctx tokens"
    with pytest.raises(UserError, match="no group to learn from"):
        read(tmp_path, PAIR, n_ctx=length - 1)


def test_gathered_groups_of_equal_rewards_are_left_out_and_counted():
    samples = [[i] for i in range(6)]
    groups = gather_groups([[7], [8], [9]], samples, [0.1, 0.2, 0.5, 0.5, 0.9, 0.1])
    assert groups.prompt_ids == [[7], [9]] and groups.dropped == {"equal rewards": 1}
    assert groups.completion_ids == [[[0], [1]], [[4], [5]]] and groups.has_reward
    assert groups.K == 2 and groups.rewards.dtype == np.float32
    np.testing.assert_allclose(groups.rewards, [[0.1, 0.2], [0.9, 0.1]], rtol=1e-6)
    with pytest.raises(UserError, match="all rewards are equal, so there is no preference"):
        gather_groups([[7], [8]], samples, np.ones(6))


def test_flat_groups_have_one_prompt_per_completion():
    groups = Groups([[7], [8], [9]], [[[1], [2]], [[3], [4, 5]], [[6], [0]]], None, True)
    for picks in ([2, 0], np.array([2, 0])):
        assert groups.flat(picks) == ([[9], [9], [7], [7]], [[6], [0], [1], [2]])


def test_a_tenth_of_the_prompts_is_held_out_whatever_their_order():
    rng = np.random.default_rng(0)
    prompts = [[0, int(i)] for i in rng.integers(0, 100, 300)]  # many occur twice
    train, held = split_prompts(prompts)
    distinct, away = {tuple(p) for p in prompts}, {tuple(prompts[i]) for i in held}
    assert sorted(train + held) == list(range(300)) and len(away) == len(distinct) // 10
    assert not away & {tuple(prompts[i]) for i in train}, "a prompt is in both parts"
    order = rng.permutation(300)
    _, again = split_prompts([prompts[i] for i in order])
    assert {tuple(prompts[order[i]]) for i in again} == away, "the split depends on the order"
    assert [len(x) for x in split_prompts([[0, 1], [0, 2], [0, 3]])] == [1, 2], "at least two"


# ------------------------------------------------------------------------------ main, real data

def test_main_shows_prompts_completions_rewards_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data_imdb.main(["-n", "2"])
    out = capsys.readouterr().out
    assert out.count(f"prompt: {EOT}") == 2 and out.count("r* = ") == 8 and "≻" in out
    for none in ("0", "-3"):
        data_imdb.main(["-n", none])
        out = capsys.readouterr().out
        assert "train: 1" in out and "prompt:" not in out


def test_importing_does_not_need_torch():
    code = "import sys, data_imdb; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(data_imdb.__file__).parent)
    assert done.returncode == 0


@pytest.fixture(scope="session")
def contents():
    """The bytes of every review, by folder."""
    if not IMDB or not Path(IMDB).exists():
        pytest.skip("IMDB_PATH is not set, or nothing is there: the real corpus is not tested")
    return imdb_archive.read_reviews(Path(IMDB), data_imdb.FOLDERS, **quiet)


@pytest.fixture(scope="session")
def real(contents):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imdb_archive, "read_reviews", lambda *_: contents)
        return data_imdb.read_imdb(Path(IMDB), Path("unused"), **quiet)


def test_real_imdb_has_the_reviews_whose_hash_is_pinned(contents):
    """An unpacked folder has this hash too, so it uses the tokens that the archive has made."""
    digest = hashlib.sha256()
    for folder, texts in contents.items():
        for i, text in sorted(enumerate(texts), key=lambda row: f"{row[0]}_"):
            digest.update(f"{folder}/{i} {len(text)}\n".encode() + text)
    assert digest.hexdigest()[:16] == imdb_archive.REVIEWS


def test_real_imdb_is_whole(real):
    splits, notes = real
    for split, n in {"test": 25_000, "valid": 1_250, "train": 23_750, "unsup": 50_000}.items():
        assert len(splits[split]) == n - notes[f"dup_{split}"]
        assert not any("<br />" in review.text or not review.text for review in splits[split])
    assert sum(review.label for review in splits["test"]) == 12_500
    assert Counter(review.label for review in splits["unsup"]).keys() == {None}


def test_real_imdb_splits_share_no_text(real):
    splits, notes = real
    texts = {split: {review.text for review in splits[split]} for split in splits}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
    assert notes["dup_test"] == 0 and notes["dup_train"] > 100 and notes["dup_unsup"] > 266


def test_real_imdb_in_tokens(real):
    texts = [review.text for review in real[0]["train"][:500]]
    enc = train_bpe(texts, 600)
    assert enc.n_vocab == 600 and all(enc.decode(enc.encode_ordinary(t)) == t for t in texts)
