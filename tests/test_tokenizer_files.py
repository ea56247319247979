"""Laws of support/tokenizer_files.py: a text has the same ids in tiktoken, in transformers with the
files that we write, and again in tiktoken with the files that transformers writes.

Oracles: OpenAI's vocab.bpe and encoder.json, and the tokenizers of transformers.
"""

import json
import os

import pytest
from test_hf_gpt2 import refusal

import data_imdb
from support import toy_reviews
from support.tokenizer_files import EOT, read_tokenizer, save_tokenizer, tokens_of

TEXTS = ["The film's worth it.", "", " ", "  two  spaces ", "\n\n a\r\n\tb \n", "x " * 300,
         "It's, I'll, WE'VE, don't, 'S, '", "1234 5 67890.1²", "é e\u0301 Straße 東京 हिन्दी \u3000",
         "😀👩‍👩‍👧 🏳️‍🌈!?", "\x00\x7f\x85\u2028", "<|endoftext|>", f"good{EOT} bad{EOT}{EOT}\n",
         "<|endoftext", "_" * 40 + "=" * 70 + " " * 90, "a\u00a0b\u200bc"]


def encoding(vocab):
    if vocab != "gpt2":
        return data_imdb.train_bpe(toy_reviews.reviews(300, 0), vocab)
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's vocabulary would be downloaded")
    return data_imdb.gpt2_encoding()


def test_gpt2_s_files_are_openai_s(tmp_path):
    from tiktoken.load import read_file_cached

    save_tokenizer(tokens_of(encoding("gpt2")), tmp_path, 1024)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    assert (tmp_path / "merges.txt").read_bytes() == read_file_cached(url + "vocab.bpe")
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads(
        read_file_cached(url + "encoder.json"))


@pytest.mark.parametrize("vocab", ["gpt2", 900, 257])
def test_transformers_gives_tiktoken_s_ids_and_writes_what_we_read(vocab, tmp_path):
    """In a text <|endoftext|> is its id, or plain text, as with encode_ordinary."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    enc = encoding(vocab)
    (tmp_path / "ours").mkdir()
    save_tokenizer(tokens_of(enc), tmp_path / "ours", 48)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (len(theirs), theirs.model_max_length) == (enc.n_vocab, 48)
    assert theirs.eos_token_id == theirs.bos_token_id == enc.eot_token
    for text in TEXTS + toy_reviews.reviews(30, 1):
        ids = theirs(text)["input_ids"]
        assert ids == enc.encode(text, allowed_special="all"), repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        plain = theirs(text, split_special_tokens=True)["input_ids"]
        assert plain == enc.encode_ordinary(text), repr(text)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").exists()
    for folder in "ours", "theirs":
        assert read_tokenizer(tmp_path / folder) == tokens_of(enc), folder
    theirs.add_tokens(["<|im_end|>", "[PAD]"])
    theirs.save_pretrained(tmp_path / "grown")
    assert read_tokenizer(tmp_path / "grown") == tokens_of(enc), "tokens after <|endoftext|>"


def test_a_folder_without_a_tokenizer(tmp_path):
    assert read_tokenizer(tmp_path) is None and read_tokenizer(tmp_path / "nowhere") is None


# ------------------------------------------------------------------------------ refusals

VOCAB = {chr(c): i for i, c in enumerate([*range(33, 127), *range(161, 173), *range(174, 324)])}
SMALL = VOCAB | {"th": 256, "the": 257, EOT: 258}
MERGES = ["t h", "th e"]


def plain(vocab=SMALL, merges=MERGES, **config):
    return {"vocab.json": vocab, "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer_config.json": config}


def whole(change=(), model=(), split=()):
    split = dict(type="ByteLevel", add_prefix_space=False) | dict(split)
    model = dict(type="BPE", vocab=SMALL, merges=[["t", "h"], ["th", "e"]]) | dict(model)
    raw = dict(normalizer=None, pre_tokenizer=split, model=model, added_tokens=[]) | dict(change)
    return {"tokenizer.json": raw}


def written(files, folder):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("files", [
    plain(), plain(dict(reversed(SMALL.items()))), whole(), whole(model=dict(merges=MERGES)),
    whole(split=dict(use_regex=True)), plain(SMALL | {"[PAD]": 259}),
    whole(model=dict(vocab={k: v for k, v in SMALL.items() if k != EOT}),
          change=dict(added_tokens=[dict(id=258, content=EOT)]))])
def test_files_written_by_hand(files, tmp_path):
    written(files, tmp_path)
    tokens = read_tokenizer(tmp_path)
    assert len(tokens) == 258 and tokens[256:] == [b"th", b"the"] and tokens[0] == b"!"
    assert data_imdb.encoding_of(tokens).encode_ordinary("the th") == [257, 220, 256]


ORDER, SPLIT = "ids are not the 256 bytes and then the", "not a byte-level BPE that splits texts as"


@pytest.mark.parametrize("files, word", [
    (plain({EOT: 0} | {k: v + 1 for k, v in SMALL.items() if k != EOT}), ORDER),  # EOT first
    (plain({"<s>": 0} | {k: v + 1 for k, v in SMALL.items()}), ORDER),  # as in RoBERTa
    (plain(SMALL | {"th": 257, "the": 256}), ORDER), (plain(merges=MERGES[:1]), ORDER),
    (plain(merges=[*MERGES, "a b"]), ORDER), (plain(merges=["t h", "th o"]), ORDER),
    (plain(SMALL | {EOT: -1}), ORDER), (plain(SMALL | {EOT: 256}), ORDER),
    (plain(SMALL | {EOT: 10**15}), "KeyError"), (plain(SMALL | {EOT: "258"}), "vocab.json"),
    (plain(SMALL | {"th": 300}), "KeyError"), (plain(VOCAB), "KeyError"), (plain({}), "KeyError"),
    (plain(SMALL | {"東": 256}), "KeyError"), (plain(list(SMALL)), "vocab.json is damaged"),
    (plain(add_prefix_space=True), "a space before every text"),
    (plain() | {"tokenizer_config.json": "{"}, "tokenizer_config.json is damaged"),
    ({"vocab.json": SMALL}, "cannot read"), ({"vocab.json": "[" * 10**5}, "vocab.json is damaged"),
    (whole(model=dict(type="Unigram")), SPLIT), (whole(split=dict(type="Metaspace")), SPLIT),
    (whole(split=dict(use_regex=False)), SPLIT), (whole(dict(normalizer=dict(type="NFC"))), SPLIT),
    (whole(split=dict(add_prefix_space=True)), "a space before every text"),
    (whole(dict(pre_tokenizer=None)), "tokenizer.json is damaged"),
    (whole(dict(model=None)), "tokenizer.json is damaged"), (whole(model=dict(merges=None)), "dam"),
    (whole(model=dict(merges=[["t", "h"], [1, 2]])), "tokenizer.json is damaged"),
    ({"tokenizer.json": "[]"}, "tokenizer.json is damaged"), ({"tokenizer.json": ""}, "damaged")])
def test_a_tokenizer_of_another_kind_is_refused(files, word, tmp_path):
    written(files, tmp_path)
    refusal(lambda: read_tokenizer(tmp_path), tmp_path, word, "of GPT-2's kind")
