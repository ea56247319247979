"""Laws of data_imdb.py: what is read is what was written; every token is a target once."""

import io
import json
import os
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import regex
import requests

import data_imdb
from data_imdb import EOT, Groups, Tokens, UserError, lm_batch, sample_prompts, train_bpe

IMDB = os.environ.get("IMDB_PATH", "")
quiet = {"progress": lambda text: None}


@pytest.fixture(autouse=True)
def no_corpus(monkeypatch):
    """No test reads the real corpus by accident; those that mean to have their own fixture."""
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
    """The merges, found by recounting every pair of the whole text at every step."""
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


@pytest.mark.parametrize("seed", range(12))
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


@pytest.mark.parametrize("vocab", [256, 65_537, "abc", -1])
def test_bpe_refuses_a_size_it_cannot_have(vocab):
    with pytest.raises(UserError, match="257"):
        train_bpe(["some text"], vocab)


def test_an_encoding_survives_the_disk(tmp_path):
    enc = train_bpe(["the film was good " * 3, "ça ☃"], 290)
    with open(tmp_path / "bpe", "wb") as file:
        data_imdb.save_encoding(file, enc)
    again = data_imdb.load_encoding(tmp_path / "bpe")
    assert again._mergeable_ranks == enc._mergeable_ranks and again.eot_token == enc.eot_token
    with pytest.raises(UserError, match="missing"):
        data_imdb.load_encoding(tmp_path / "missing")


@pytest.mark.parametrize("failure", [requests.exceptions.ConnectionError("no route"),
                                     ValueError("Hash mismatch"), OSError(28, "disk full")])
def test_gpt2_without_its_files_names_the_variable(monkeypatch, tmp_path, failure):
    def refuse(path):
        raise failure

    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        data_imdb.gpt2_encoding()


def test_gpt2_saved_is_gpt2(tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's vocabulary would be downloaded")
    enc = data_imdb.gpt2_encoding()
    assert enc.n_vocab == 50_257 and enc.eot_token == 50_256
    with open(tmp_path / "bpe", "wb") as file:
        data_imdb.save_encoding(file, enc)
    again, rng = data_imdb.load_encoding(tmp_path / "bpe"), random.Random(0)
    for text in ["It's 2 films,  isn't\n\n it?", *("".join(rng.choices("ab é'☃\n 1.", k=50))
                                                  for _ in range(200))]:
        assert again.encode_ordinary(text) == enc.encode_ordinary(text)


# ------------------------------------------------------------------------------ streams

def some_tokens(sizes, seed=0, eot=99):
    """Reviews of these many tokens, <|endoftext|> counted."""
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
        idx, mask = lm_batch(tokens, starts[part], lengths[part], pad_to=4, pad_id=98)
        assert idx.dtype == np.int64 and mask.dtype == bool and idx.shape == mask.shape
        assert (idx.shape[1] - 1) % 4 == 0, "the number of inputs should be a multiple of pad_to"
        assert not mask[:, 0].any(), "nothing predicts a row's first token"
        assert (mask.sum(1) == lengths[part]).all()
        assert (idx[:, 1:][~mask[:, 1:]] == 98).all(), "what is no target is padding"
        targets.update(idx[mask].tolist())
    # Each review's closing <|endoftext|> is the next one's first token: as multisets, the stream.
    assert targets == Counter(tokens.stream[1:].tolist())


@pytest.mark.parametrize("n_ctx", [1, 3, 8])
def test_a_window_knows_what_comes_before_a_first_word(n_ctx):
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
    assert all(review[0] == 99 for review in tokens), "<|endoftext|> precedes every review"


# ------------------------------------------------------------------------------ IMDb, in small

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


def test_archive_of_either_kind_and_folder_read_alike(tiny, tmp_path):
    names = dict(reversed(tiny_reviews().items()))
    xz = write_archive(tmp_path / "tiny.tar.xz", names, "w:xz")
    for name, text in names.items():
        file = tmp_path / "folder" / "aclImdb" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    wanted = data_imdb.read_imdb(tiny, tmp_path, **quiet)
    for other in (xz, tmp_path / "folder", tmp_path / "folder" / "aclImdb"):
        assert data_imdb.read_imdb(other, tmp_path, **quiet) == wanted, other


def test_reviews_labels_and_line_breaks(tiny, tmp_path):
    splits, _ = data_imdb.read_imdb(tiny, tmp_path, **quiet)
    for split in ("train", "valid", "test"):
        for text, label in splits[split]:
            assert "<br" not in text and "\n\nis it é" in text
            assert "train" not in text.split()[0] or ("pos" in text) == label, "label of another"
    assert all(review.label is None for review in splits["unsup"])
    assert len(splits["test"]) == 80 and 3 <= len(splits["valid"]) <= 4


def test_duplicates_stay_where_they_evaluate(tiny, tmp_path):
    splits, notes = data_imdb.read_imdb(tiny, tmp_path, **quiet)
    texts = {split: {review.text for review in splits[split]} for split in splits}
    for a in texts:
        for b in texts:
            assert a == b or not texts[a] & texts[b], f"{a} and {b} share a text"
    assert notes["dup_test"] == 0, "the evaluation side is kept"
    assert notes["dup_train"] + notes["dup_valid"] == 3 and notes["dup_unsup"] == 3
    everything = {text.replace("<br />", "\n") for text in tiny_reviews().values()}
    assert set.union(*texts.values()) == everything, "only copies may be dropped"


def test_another_seed_shuffles_otherwise(tiny, tmp_path):
    splits = [data_imdb.read_imdb(tiny, tmp_path, seed=seed, **quiet)[0] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] and splits[0]["valid"] != splits[2]["valid"]
    assert sorted(splits[0]["test"]) == sorted(splits[2]["test"])


def test_members_are_never_written_by_their_path(tiny, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    evil = write_archive(tmp_path / "evil.tar.gz", tiny_reviews() | {"../../evil.txt": "evil"})
    before = set(tmp_path.rglob("*"))
    data_imdb.read_imdb(evil, tmp_path, **quiet)
    assert set(tmp_path.rglob("*")) == before, "reading an archive wrote something"


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9])
def test_a_truncated_archive_is_refused(tiny, tmp_path, mode, share):
    path = write_archive(tmp_path / "cut.tar", tiny_reviews(), mode)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"cut\.tar.*IMDB_PATH") as caught:
        data_imdb.read_imdb(path, tmp_path, **quiet)
    assert "\n" not in str(caught.value), "one sentence"


def test_a_damaged_archive_is_refused(tiny, tmp_path):
    content = bytearray(tiny.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tiny.write_bytes(content)
    with pytest.raises(UserError, match="IMDB_PATH"):
        data_imdb.read_imdb(tiny, tmp_path, **quiet)


def test_a_wrong_archive_is_refused(tiny, tmp_path):
    other = write_archive(tmp_path / "other.tar.gz", {"notes.txt": "no reviews"})
    with pytest.raises(UserError, match="has 0 reviews.*wanted 40.*IMDB_PATH"):
        data_imdb.read_imdb(other, tmp_path, **quiet)
    (tmp_path / "poem.txt").write_text("not an archive at all\n" * 100)
    with pytest.raises(UserError, match="cannot be read as an archive"):
        data_imdb.read_imdb(tmp_path / "poem.txt", tmp_path, **quiet)


def test_too_few_reviews_are_refused(tiny, tmp_path):
    names = tiny_reviews()
    del names["train/neg/17_2.txt"]
    path = write_archive(tmp_path / "few.tar.gz", names)
    with pytest.raises(UserError, match="has 39 reviews named train/neg.*wanted 40"):
        data_imdb.read_imdb(path, tmp_path, **quiet)


def test_a_missing_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("IMDB_PATH", str(tmp_path / "nowhere.tar.gz"))
    with pytest.raises(UserError, match=r"nowhere\.tar\.gz.*IMDB_PATH"):
        data_imdb.load("imdb", 300, tmp_path / "data", 0, 0, **quiet)
    with pytest.raises(UserError, match="missing"):
        data_imdb.read_imdb(tmp_path / "nowhere.tar.gz", tmp_path, **quiet)


@pytest.mark.parametrize("failure", [URLError("Name or service not known"), TimeoutError("slow"),
                                     ConnectionResetError(104, "reset")])
def test_no_network_names_imdb_path(tmp_path, monkeypatch, failure):
    def refuse(*args, **kwargs):
        raise failure

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(UserError, match="cannot download .*aclImdb_v1.*IMDB_PATH"):
        data_imdb.read_imdb(None, tmp_path / "cache", **quiet)


def test_a_download_counts_only_with_its_checksum(tiny, tmp_path, monkeypatch):
    calls, cache = [], tmp_path / "cache"

    def fetch(url, target, **kwargs):
        calls.append(url)
        Path(target).write_bytes(tiny.read_bytes())

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    with pytest.raises(UserError, match="md5.*wanted 84,125,825.*IMDB_PATH"):
        data_imdb.download(cache, **quiet)
    assert not (cache / "aclImdb_v1.tar.gz").exists(), "kept what is not the corpus"
    monkeypatch.setattr(data_imdb, "MD5", data_imdb.hashlib.md5(tiny.read_bytes()).hexdigest())
    wanted = data_imdb.read_imdb(tiny, tmp_path, **quiet)
    assert data_imdb.read_imdb(None, cache, **quiet) == wanted
    assert data_imdb.read_imdb(None, cache, **quiet) == wanted
    assert calls == [data_imdb.URL] * 2, "a checked archive was downloaded again"


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        data_imdb.download(tmp_path / "file" / "cache", **quiet)


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


def test_a_second_load_reads_what_the_first_wrote(tmp_path, monkeypatch):
    first = data_imdb.load("toy", 300, tmp_path, 100, seed=0)
    monkeypatch.setattr(data_imdb, "train_bpe", None)
    assert same(first, data_imdb.load("toy", 300, tmp_path, 100, seed=0))
    assert same(first, data_imdb.load("toy", "300", tmp_path, 100, seed=0)), "a flag's text"


def test_another_setting_never_reads_the_files(tmp_path, monkeypatch):
    settings = [(300, 100, 0), (310, 100, 0), (300, 120, 0), (300, 100, 1)]
    loaded = [data_imdb.load("toy", v, tmp_path, n, seed) for v, n, seed in settings]
    assert len({data.identity for data in loaded}) == len(settings)
    for data, (v, n, seed) in zip(loaded, settings):
        assert same(data, data_imdb.load("toy", v, tmp_path, n, seed))
    grammar = tmp_path / "toy_reviews.py"
    grammar.write_text("another grammar")
    monkeypatch.setattr(data_imdb.toy_reviews, "__file__", str(grammar))
    monkeypatch.setattr(data_imdb.toy_reviews, "reviews", lambda n, seed: [
        f"review {i}" for i in range(n)])
    data = data_imdb.load("toy", 300, tmp_path, 100, 0)
    assert data.enc.decode(data.tokens["test"][0][1:]) == "review 0", "an edited grammar is stale"


def test_killed_at_any_write_a_rerun_is_right(tmp_path, monkeypatch):
    wanted = data_imdb.load("toy", 300, tmp_path / "whole", 60, 0)
    written = sorted(file.name for file in (tmp_path / "whole").rglob("*.*") if file.is_file())
    write_whole = data_imdb.write_whole
    for kill in range(len(written)):
        folder, left = tmp_path / f"killed{kill}", [kill]

        def dies(path, content):
            if not left[0]:
                raise ZeroDivisionError("killed")
            left[0] -= 1
            write_whole(path, content)

        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(data_imdb, "write_whole", dies)
            data_imdb.load("toy", 300, folder, 60, 0)
        assert same(wanted, data_imdb.load("toy", 300, folder, 60, 0)), f"killed at {written[kill]}"
    assert len(written) == 6
    next((tmp_path / "whole").rglob("valid.npy")).unlink()
    assert same(wanted, data_imdb.load("toy", 300, tmp_path / "whole", 60, 0)), "a file was lost"


def test_imdb_loads_with_its_labels(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("IMDB_PATH", str(tiny))
    said = []
    data = data_imdb.load("imdb", 400, tmp_path / "data", 0, 0, progress=said.append)
    assert said and data.notes["dup_unsup"] == 3 and data.labels["unsup"] is None
    label = {text.replace("<br />", "\n"): int("/pos" in name)  # the label of the copy kept
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


def test_load_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(UserError, match="19 reviews"):
        data_imdb.load("toy", 300, tmp_path, 19, 0)
    with pytest.raises(UserError, match="-1 reviews"):
        data_imdb.load("imdb", 300, tmp_path, -1, 0)
    with pytest.raises(UserError, match="vocabulary of gpt3"):
        data_imdb.load("toy", "gpt3", tmp_path, 50, 0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        data_imdb.load("toy", 300, tmp_path / "file", 50, 0)


# ------------------------------------------------------------------------------ prompts

def test_prompts_are_prefixes_of_every_length_each_review_once():
    tokens = some_tokens([30] * 400 + [3] * 50, eot=60_000)  # no two prefixes alike
    prompts, redrawn = sample_prompts(tokens, 400, seed=0)
    prefixes = {tuple(review[: 1 + n].tolist()): i for i, review in enumerate(tokens)
                for n in range(2, 9)}
    assert redrawn == 0 and len({prefixes[tuple(p)] for p in prompts}) == 400, "a review twice"
    lengths = Counter(len(prompt) - 1 for prompt in prompts)
    assert set(lengths) == set(range(2, 9)) and min(lengths.values()) > 30, "not uniform"
    more, _ = sample_prompts(tokens, 900, seed=0)
    assert more[:400] == prompts, "the first n do not depend on how many follow"
    assert max(Counter(prefixes[tuple(p)] for p in more).values()) == 3, "exhausted: starts again"
    assert sample_prompts(tokens, 400, seed=[0, 1])[0] != prompts


def test_prompts_avoid_and_count():
    tokens = some_tokens([30] * 300)
    avoid = set(map(tuple, sample_prompts(tokens, 200, seed=0)[0]))
    prompts, redrawn = sample_prompts(tokens, 250, seed=0, avoid=avoid)
    assert len(prompts) == 250 and not avoid & set(map(tuple, prompts)) and redrawn >= 200
    with pytest.raises(UserError, match="to avoid"):
        tokens = some_tokens([30] * 3)
        sample_prompts(tokens, 5, 0, lo=2, hi=2, avoid={tuple(t[:3].tolist()) for t in tokens})
    with pytest.raises(UserError, match="2 to 8 tokens"):
        sample_prompts(some_tokens([5, 6]), 1, seed=0)


# ------------------------------------------------------------------------------ groups

ENC = train_bpe(["this film is good and that film is bad, yes no"], 300)
E = ENC.eot_token
OURS = {"prompt": "this film", "completions": [" is good", " is bad", ""],
        "rewards": [0.9, 0.1, 0.5], "prompt_ids": [E, 5, 6],
        "completion_ids": [[7, 8, E], [9], [E]]}
PAIR = {"prompt": "this film", "chosen": " is good", "rejected": " is bad"}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: film?\n\nAssistant: good",
      "rejected": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: film?\n\nAssistant: bad film"}


def read(tmp_path, *rows, n_ctx=64):
    path = tmp_path / "groups.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data_imdb.read_groups(path, ENC, n_ctx)


def encode(text):
    return ENC.encode_ordinary(text)


@pytest.mark.parametrize("has_reward", [True, False])
def test_groups_come_back_exactly(tmp_path, has_reward):
    rng = np.random.default_rng(0)
    ids = [[rng.integers(0, E, rng.integers(1, 9)).tolist() + [E] * (i % 2) for i in range(4)]
           for _ in range(50)]  # arbitrary bytes: most are no valid text
    rewards = rng.random((50, 4)) if has_reward else np.tile(np.linspace(1, 0, 4), (50, 1))
    groups = Groups([[E, 1, p] for p in range(50)], ids, rewards.astype(np.float32), has_reward)
    with open(tmp_path / "g.jsonl", "wb") as file:
        data_imdb.write_groups(file, groups, ENC)
    again = data_imdb.read_groups(tmp_path / "g.jsonl", ENC, 64)
    assert again.prompt_ids == groups.prompt_ids and again.completion_ids == ids
    assert np.array_equal(again.rewards, groups.rewards) and again.rewards.dtype == np.float32
    assert again.has_reward == has_reward and again.dropped == {}
    row = json.loads((tmp_path / "g.jsonl").read_bytes().splitlines()[0])
    assert EOT not in row["prompt"] + "".join(row["completions"]), "written to be read"
    assert has_reward == (row["rewards"] is not None)


def test_the_three_forms(tmp_path):
    ours = read(tmp_path, OURS)
    assert ours.prompt_ids == [[E, 5, 6]] and ours.completion_ids == [[[7, 8, E], [9], [E]]]
    assert ours.has_reward and np.allclose(ours.rewards, [[0.9, 0.1, 0.5]])
    pair = read(tmp_path, PAIR)
    assert pair.prompt_ids == [[E, *encode("this film")]]
    assert pair.completion_ids == [[[*encode(" is good"), E], [*encode(" is bad"), E]]]
    assert not pair.has_reward and pair.rewards.tolist() == [[1, 0]]
    hh = read(tmp_path, HH)
    prompt = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: film?\n\nAssistant:"
    assert hh.prompt_ids == [[E, *encode(prompt)]], "the last mark that both share"
    assert hh.completion_ids == [[[*encode(" good"), E], [*encode(" bad film"), E]]]
    mixed = read(tmp_path, PAIR, "", HH | {"extra": 1})
    assert len(mixed.prompt_ids) == 2, "two forms of K = 2 may share a file, with empty lines"


def test_ours_written_by_hand(tmp_path):
    texts = ["good", "bad", "yes", "no"]
    got = read(tmp_path, {"prompt": "this film ☃\u2028", "completions": texts})
    assert got.prompt_ids == [[E, *encode("this film ☃\u2028")]]
    assert got.completion_ids == [[[*encode(text), E] for text in texts]]
    assert not got.has_reward and (np.diff(got.rewards[0]) < 0).all(), "no rewards: best first"
    got = read(tmp_path, {"prompt": "", "completions": texts, "rewards": [0, 1, 0.5, 0.5]})
    assert got.prompt_ids == [[E]] and got.rewards.tolist() == [[0, 1, 0.5, 0.5]]


def test_what_is_left_out_is_counted(tmp_path):
    equal = OURS | {"rewards": [0.5, 0.5, 0.5 + 1e-12]}  # equal in float32, as they are kept
    got = read(tmp_path, equal, OURS, equal)
    assert len(got.prompt_ids) == len(got.rewards) == 1 and got.dropped == {"equal rewards": 2}
    long = PAIR | {"prompt": "this film " * 40}
    late = PAIR | {"rejected": " is bad" * 40}
    got = read(tmp_path, long, PAIR, late)
    assert len(got.prompt_ids) == 1 and list(got.dropped.values()) == [2]
    length = len(encode("this film")) + 1 + max(len(encode(y)) for y in (" is good", " is bad")) + 1
    assert read(tmp_path, PAIR, n_ctx=length).dropped == {}, "exactly the context fits"
    with pytest.raises(UserError, match="no group to learn from"):
        read(tmp_path, PAIR, n_ctx=length - 1)


BAD = {
    "malformed JSON": ('{"prompt": "this', "JSON"),
    "a NaN reward": (json.dumps(OURS).replace("0.9", "NaN"), "finite"),
    "not an object": ("[1, 2]", "object"),
    "other keys": ({"question": "x", "answer": "y"}, "keys"),
    "half a pair": ({"prompt": "x", "chosen": "y"}, "keys"),
    "a prompt that is no text": (PAIR | {"prompt": 3}, "prompt"),
    "a null prompt": (PAIR | {"prompt": None}, "prompt"),
    "no prompt": ({"completions": ["a", "b"], "rewards": [0, 1]}, "prompt"),
    "chat messages": (PAIR | {"chosen": [{"role": "user"}]}, "texts"),
    "completions in one text": (OURS | {"completions": "abc"}, "list"),
    "one completion": ({"prompt": "x", "completions": ["a"], "rewards": [1]}, "two or more"),
    "an empty completion": (PAIR | {"rejected": " \n"}, "empty"),
    "empty completion ids": (OURS | {"completion_ids": [[7], [], [E]]}, "empty"),
    "empty prompt ids": (OURS | {"prompt_ids": []}, "empty"),
    "no prompt ids": (OURS | {"prompt_ids": None}, "prompt_ids"),
    "too few ids": (OURS | {"completion_ids": [[7], [8]]}, "completion_ids"),
    "ids as text": (OURS | {"completion_ids": "ids"}, "completion_ids"),
    "ids that are no integers": (OURS | {"completion_ids": [[7], [8.0], [E]]}, "integers"),
    "ids that are booleans": (OURS | {"prompt_ids": [E, True]}, "integers"),
    "an id beyond the vocabulary": (OURS | {"prompt_ids": [E, E + 1]}, f"ids from 7 to {E + 1}"),
    "a negative id": (OURS | {"completion_ids": [[7], [-1], [E]]}, "got ids from -1"),
    "too few rewards": (OURS | {"rewards": [1, 0]}, "rewards"),
    "rewards that are no numbers": (OURS | {"rewards": ["1", "2", "3"]}, "rewards"),
    "one reward for all": (OURS | {"rewards": 0.5}, "rewards"),
    "a dialogue without a mark": ({"chosen": "good", "rejected": "bad"}, "Assistant:"),
    "another K": (OURS | {"completions": ["a", "b"], "completion_ids": [[7], [8]],
                          "rewards": [1, 0]}, "as many completions"),
    "JSON too deep to read": ("[" * 100_000, "JSON"),
    "a reward of four hundred digits": (json.dumps(OURS).replace("0.9", "9" * 400), "finite"),
    "a reward past float32": (json.dumps(OURS).replace("0.9", "1e39"), "finite"),
    "an infinite reward": (json.dumps(OURS).replace("0.9", "1e999"), "finite"),
    "no rewards among rewards": (OURS | {"rewards": None}, "rewards"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_groups_are_refused_with_their_line(tmp_path, case):
    row, what = BAD[case]
    first = OURS if "completions" in str(row) else PAIR  # so that only `row` is at fault
    with pytest.raises(UserError, match=r"groups\.jsonl, line 3: ") as caught:
        read(tmp_path, first, "", row)
    assert what in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_a_groups_file_with_nothing_to_learn(tmp_path):
    for rows in ([], [OURS | {"rewards": [1, 1, 1]}]):
        with pytest.raises(UserError, match=r"groups\.jsonl has no group to learn from"):
            read(tmp_path, *rows)
    with pytest.raises(UserError, match="nowhere"):
        data_imdb.read_groups(tmp_path / "nowhere.jsonl", ENC, 64)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 1: wanted JSON in UTF-8"):
        data_imdb.read_groups(tmp_path / "latin.jsonl", ENC, 64)


# ------------------------------------------------------------------------------ main, real data

def test_main_shows_prompts_completions_rewards_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data_imdb.main(["-n", "2"])
    out = capsys.readouterr().out
    assert out.count(f"prompt: {EOT}") == 2 and out.count("r* = ") == 8 and "≻" in out


def test_importing_does_not_need_torch():
    code = "import sys, data_imdb; sys.exit('torch' in sys.modules)"
    root = Path(data_imdb.__file__).parent
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code],
                      os.environ | {"PYTHONPATH": str(root)}) == 0


@pytest.fixture(scope="session")
def real():
    if not IMDB or not Path(IMDB).exists():
        pytest.skip("IMDB_PATH is not set, or nothing is there: the real corpus is not tested")
    return data_imdb.read_imdb(Path(IMDB), Path("unused"), **quiet)


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
    texts = [review.text for review in real[0]["train"][:2000]]
    enc = train_bpe(texts, 600)
    assert enc.n_vocab == 600 and all(enc.decode(enc.encode_ordinary(t)) == t for t in texts)
