"""Byte-level BPE in Hugging Face's files: vocab.json with merges.txt, or tokenizer.json.

In this file a tokenizer is the list of its tokens as bytes. The index of a token is its id and its
rank, and <|endoftext|> has the next id after the last token. GPT-2's tokenizer has this form, and
so have those that data_imdb.py trains.
"""

import base64
import json
from pathlib import Path

from support.runs import RESTORE, reading, save_json, write_whole

EOT = "<|endoftext|>"
MAX_CHARS = 500_000  # the longest text to encode: tiktoken fails at 999,999 spaces in a row
KIND = "give a model whose tokenizer is of GPT-2's kind: byte-level BPE, with its merges in the " \
       "order of their ids and <|endoftext|> after them"
# The files hold text, with one character per byte: a printable byte is itself, another byte is one
# of the characters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(
    byte for byte in range(256) if byte not in PRINTABLE)}
BYTES = {char: byte for byte, char in CHARS.items()}


def tokens_of(enc) -> list[bytes]:
    """The tokens of a tiktoken.Encoding whose last id is that of <|endoftext|>."""
    return [enc.decode_single_token_bytes(i) for i in range(enc.eot_token)]


def read_tokenizer(folder: Path) -> list[bytes] | None:
    """A folder's tokens, or None if it has no tokenizer. UserError for a tokenizer of another kind.

    Tokens that were added after <|endoftext|> are left out: no text is encoded with them here.
    """
    if (folder / "bpe.tiktoken").exists():
        return read_tiktoken(folder / "bpe.tiktoken")
    whole, path, merged = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        with reading(whole, KIND):
            raw = json.loads(whole.read_bytes())
            model, split = raw["model"], raw["pre_tokenizer"]
            if model.get("type", "BPE") != "BPE" or raw.get("normalizer") or \
                    split["type"] != "ByteLevel" or not split.get("use_regex", True):
                raise ValueError("it is not a byte-level BPE that splits texts as GPT-2's does")
            vocab = model["vocab"] | {token["content"]: token["id"]
                                      for token in raw.get("added_tokens", [])}
            return checked(vocab, model["merges"], split["add_prefix_space"])
    if not path.exists():
        return None
    with reading(path, KIND):
        vocab, config = json.loads(path.read_bytes()), folder / "tokenizer_config.json"
        with reading(config, KIND):
            options = dict(json.loads(config.read_bytes())) if config.exists() else {}
        with reading(merged, KIND):
            lines = merged.read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines[lines[0].startswith("#version") :] if line]
        return checked(vocab, merges, options.get("add_prefix_space", False))


def read_tiktoken(path: Path, remedy: str = RESTORE) -> list[bytes]:
    """The tokens in a run's bpe.tiktoken. Each line holds a token in base64, and its rank."""
    with reading(path, remedy):
        tokens = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
        if not {bytes([i]) for i in range(256)} <= set(tokens) or len(set(tokens)) < len(tokens):
            raise ValueError("a token is missing, or is there twice")
    return tokens


def save_tiktoken(tokens: list[bytes], path: Path) -> None:
    """Writes the file that read_tiktoken reads."""
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    write_whole(path, lambda file: file.writelines(lines))


def checked(vocab: dict[str, int], merges: list, prefix_space: bool) -> list[bytes]:
    """The tokens before <|endoftext|>. A merge is a list of two names, or both in one text with a
    space between them. tiktoken knows the tokens but not the merges: ValueError if it would give a
    text other ids."""
    if prefix_space:
        raise ValueError("it puts a space before every text")
    names = {i: name for name, i in vocab.items()}
    tokens = [bytes(BYTES[char] for char in names[i]) for i in range(vocab[EOT])]
    results = ["".join(merge).replace(" ", "") for merge in merges]
    if sorted(tokens[:256]) != [bytes([byte]) for byte in range(256)] or \
            [names[i] for i in range(256, len(tokens))] != results:
        raise ValueError(f"its first {len(tokens):,} ids are not the 256 bytes and then the "
                         f"{len(results):,} results of its merges")
    return tokens


def save_tokenizer(tokens: list[bytes], folder: Path, n_ctx: int) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json, for AutoTokenizer.from_pretrained.
    """
    ranks = {token: i for i, token in enumerate(tokens)}

    def name(token: bytes) -> str:
        return "".join(CHARS[byte] for byte in token)

    merges = "".join(" ".join(map(name, split(token, ranks))) + "\n"
                     for token in tokens if len(token) > 1)
    write_whole(folder / "merges.txt", lambda file: file.write(
        f"#version: 0.2\n{merges}".encode()))
    save_json(folder / "vocab.json", {name(token): i for token, i in ranks.items()}
              | {EOT: len(tokens)})
    save_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="GPT2Tokenizer", add_prefix_space=False, model_max_length=n_ctx,
        bos_token=EOT, eos_token=EOT, unk_token=EOT), indent=1)


def split(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts from which a token was merged: BPE of its bytes without the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [a + b for a, b in zip(parts, parts[1:])]
        i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[i : i + 2] = [pairs[i]]
    return parts
