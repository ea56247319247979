"""Reads preference files in many forms, and gives their texts and token ids.

A file is JSON lines or one JSON array, gzipped or not. Each row has our form or one of the forms
that TRL reads; other keys are ignored.

    ours           {"prompt", "completions", "rewards", "prompt_ids", "completion_ids"}. Without ids
                   the texts are tokenised. Without rewards the completions stand from best to worst
    pairs          {"prompt", "chosen", "rejected"}
    whole texts    {"chosen", "rejected"}: the prompt ends with the last MARK that both share
                   (Anthropic-HH). If neither has a MARK, the prompt is the words that both share at
                   their start
    conversations  "chosen" and "rejected" are lists of {"role", "content"}. They become texts in
                   HH's form, "\\n\\nHuman: ...\\n\\nAssistant: ...", where a system's turn begins
                   with "\\n\\nSystem:". "prompt" may be such a list, or the text of a user's turn.
                   Chosen and rejected may also begin with the prompt (UltraFeedback)

This code puts the token <|endoftext|> before each prompt and after each completion. Where a text
spells it there already, it is not added a second time. Elsewhere in a text it is ordinary text.
"""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from support.runs import UserError, first_ten, reading
from support.tokenizer_files import EOT, MAX_CHARS

MARK = "\n\nAssistant:"
NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # by role
OTHER_FORMS = {"stepwise supervision": {"completions", "labels"},
               "KTO's single completions with labels": {"completion", "label"},
               "a single completion": {"completion"},
               "a conversation to imitate": {"messages"}, "a text to imitate": {"text"}}


class Unusual(Exception):
    """Why a well-formed row is left out."""


class Row(NamedTuple):
    where: str  # "line 3", or "item 3" of an array
    prompt: str
    completions: list[str]  # K
    rewards: list[float] | None  # K
    ids: list | None  # the prompt's ids, and a list of each completion's


def want(ok: Any, wrong: str, got: Any = None) -> None:
    """UserError(`wrong`, and the start of what was got) unless `ok`."""
    if not ok:
        raise UserError(wrong if got is None else f"{wrong}: {got!r:.60}")


def read_preferences(path: Path | str) -> tuple[list[Row], Counter[str]]:
    """The rows to learn from, all with the same K, and the number of rows left out, by reason.

    UserError for malformed rows, all in one sentence, and if no row is left. It needs no tokenizer,
    so a command can check the file first.
    """
    with reading(path):
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        content = content.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        kind = "item" if content[:100].lstrip().startswith(b"[") else "line"
        items = json.loads(content) if kind == "item" else content.split(b"\n")
    want(not content.startswith(b"PAR1"), f"{path} is in Parquet; convert it to JSON lines: pandas."
         f"read_parquet({str(path)!r}).to_json('my.jsonl', orient='records', lines=True)")
    rows, bad, dropped, first = [], [], Counter(), None
    for number, item in enumerate(items, 1):
        if isinstance(item, bytes) and not item.strip():
            continue
        try:
            row = parse(item, f"{kind} {number}")
            first = first or row
            for name in ("completions", "rewards"):
                now, before = (len(getattr(r, name) or ()) for r in (row, first))
                want(now == before, f"{now} {name}, and {before} in {first.where}")
            rows.append(row)
        except Unusual as e:
            dropped[str(e)] += 1
        except UserError as e:
            bad.append(f"{kind} {number} ({e})")
    want(not bad, f"{path} has malformed rows: {first_ten(bad)}; wanted prompt, chosen and "
                  "rejected, or another form that support/preference_files.py describes")
    some_left(path, rows, dropped)
    return rows, dropped


def some_left(path: Path | str, left: Any, dropped: Counter[str]) -> None:
    want(left, f"{path} has no group to learn from (left out: {dict(dropped) or 'none'}); wanted "
               "completions that differ in text and in reward, and that fit into the context")


def parse(item: Any, where: str) -> Row:
    """The Row of an item, which is JSON as bytes, or already read. UserError if it is malformed,
    Unusual if it is left out."""
    if isinstance(item, bytes):
        try:
            item = json.loads(item.decode())
        except (ValueError, RecursionError) as e:
            raise UserError(f"no JSON in UTF-8: {getattr(e, 'msg', e)}") from e
    want(isinstance(item, dict), "no JSON object", item)
    pair = {"chosen", "rejected"} <= item.keys()
    if not pair and ("completions" not in item or "labels" in item):
        raise UserError(next((form for form, keys in OTHER_FORMS.items() if keys <= item.keys()),
                             f"keys: {list(item)!r:.80}"))
    texts = [item["chosen"], item["rejected"]] if pair else item["completions"]
    prompt, rewards, *ids = map(item.get, ("prompt", "rewards", "prompt_ids", "completion_ids"))
    want(isinstance(texts, list) and len(texts) > 1, "not two or more completions", texts)
    if rewards is not None:
        want(isinstance(rewards, list) and len(rewards) == len(texts)
             and all(type(r) in (int, float) and abs(r) < 1e38 for r in rewards),
             f"rewards that are not {len(texts)} finite numbers", rewards)
        want(not pair or rewards[0] >= rewards[1], "rewards that prefer the rejected one", rewards)
    if pair and all(isinstance(y, list) for y in texts):
        prompt, texts = from_conversations(prompt, texts)
    want(all(isinstance(y, str) for y in texts), "completions that are no texts", texts)
    if pair and prompt is None:
        prompt, texts = from_whole_texts(texts, item)
    want(isinstance(prompt, str), f"a prompt that is no text: {prompt!r:.40}")
    if rewards and len(set(map(np.float32, rewards))) < 2:
        raise Unusual("equal rewards")
    if ids != [None, None]:  # sampled by a model: completions may be empty or equal
        want(all(isinstance(y, list) for y in ids) and len(ids[1]) == len(texts) and all(
            isinstance(y, list) and set(map(type, y)) == {int} and min(y) >= 0
            for y in (ids[0], *ids[1])),
            "prompt_ids or completion_ids that are no lists of integers from 0, one for each text")
        return Row(where, prompt, texts, rewards, ids)
    prompt, texts = prompt.removeprefix(EOT), [without_end(y) for y in texts]
    if not all(y.strip() for y in texts):
        raise Unusual("an empty completion")
    if len(set(texts)) < (2 if rewards else len(texts)):
        raise Unusual("equal completions")
    if max(map(len, (prompt, *texts))) > MAX_CHARS:
        raise Unusual(f"longer than {MAX_CHARS:,} characters")
    return Row(where, prompt, texts, rewards, None)


def without_end(text: str) -> str:
    while (short := text.rstrip()).endswith(EOT):
        text = short.removesuffix(EOT)
    return text


def from_whole_texts(texts: list[str], item: dict) -> tuple[str, list[str]]:
    """The prompt with which chosen and rejected begin, and the rest of each.

    Without MARK the prompt ends before the last space that both share, because no token crosses
    that place. (TRL ends it inside the first word that differs.)
    """
    shared = os.path.commonprefix(texts)
    end = shared.rfind(MARK) + len(MARK)
    if MARK not in shared:
        for key in item.keys() & {"question", "instruction", "query", "input"}:
            raise UserError(f"no prompt, but {key}: rename it to prompt")
        if any(MARK in text for text in texts):
            raise Unusual("no shared prompt")
        *words, _ = (shared + "x").rsplit(None, 1)  # x: a space at the end counts too
        end = len("".join(words))
    return texts[0][:end], [text[end:] for text in texts]


def from_conversations(prompt: Any, sides: list[list]) -> tuple[str, list[str]]:
    """The prompt and the two answers, in HH's form, from lists of messages."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    want(prompt is None or isinstance(prompt, list), "a prompt that is no text and no chat", prompt)
    before, *sides = ([render(m) for m in side] for side in (prompt or [], *sides))
    explicit = bool(before) and before[-1] not in os.path.commonprefix(sides)
    if explicit:  # else chosen and rejected begin with the prompt
        answers = all("".join(side[:1]).startswith(MARK) for side in sides)
        if before[-1].startswith("\n\nHuman:") and not answers:
            raise Unusual("chosen and rejected do not continue the prompt")
        sides = [before + side for side in sides]
    ends = [i for i in range(len(os.path.commonprefix(sides)) + 1)
            if all("".join(side[i : i + 1]).startswith(MARK) for side in sides)]
    if not ends:
        raise Unusual("no shared prompt")
    end = len(before) if explicit and len(before) in ends else ends[-1]
    return "".join(sides[0][:end]) + MARK, ["".join(side[end:])[len(MARK):] for side in sides]


def render(message: Any) -> str:
    role, content = map(message.get, ("role", "content")) if isinstance(message, dict) else (0, 0)
    want(str(role) in NAMES and isinstance(content, str),
         f"a message whose role is not {', '.join(NAMES)}, or whose content is no text", message)
    return f"\n\n{NAMES[role]}: {content}"


def token_ids(path: Path | str, rows: list[Row], enc: tiktoken.Encoding) -> list[list]:
    """[prompt, completions] of each row as ids: those of the row, or those of its texts.

    UserError if the ids of a row do not spell its texts.
    """
    all_ids, bad, eot = [], [], enc.eot_token
    for row in rows:
        texts = [row.prompt, *row.completions]
        if row.ids:
            all_ids.append(row.ids)
            high = max(map(max, (row.ids[0], *row.ids[1])))
            if high >= enc.n_vocab:
                bad.append(f"{row.where} (id {high} of a vocabulary of {enc.n_vocab})")
            elif (decoded := decode(*row.ids, enc)) != texts:
                pair = next(pair for pair in zip(decoded, texts) if pair[0] != pair[1])
                start = max(0, len(os.path.commonprefix(pair)) - 9)  # shortly before they differ
                bad.append("{} (ids of {!r:.40} for the text {!r:.40})".format(
                    row.where, *(text[start:] for text in pair)))
        else:
            prompt, *completions = map(enc.encode_ordinary, texts)
            all_ids.append([[eot, *prompt], [[*y, eot] for y in completions]])
    want(not bad, f"{path} has ids that do not spell their texts: {first_ten(bad)}; give the "
                  "--vocab that they were made with, or remove prompt_ids and completion_ids, so "
                  "that the texts are tokenised")
    return all_ids


def decode(prompt: list[int], completions: list[list[int]], enc: tiktoken.Encoding) -> list[str]:
    """The texts of the prompt and of each completion, without <|endoftext|> around them."""
    eot = enc.eot_token
    return [enc.decode(prompt[prompt[0] == eot :]),
            *(enc.decode(y[: len(y) - (y[-1] == eot)]) for y in completions)]
