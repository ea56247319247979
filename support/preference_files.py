"""Preference files of other people: one JSON line in any of the forms that we read, to token ids.

data_imdb.read_groups describes the forms and says which line of which file was wrong.
"""

import json
import os

import tiktoken

from support.runs import UserError


def want(ok: bool, what: str) -> None:
    """UserError(what was wanted), unless it is so."""
    if not ok:
        raise UserError(what)


def parse_preference(line: bytes, enc: tiktoken.Encoding) -> tuple[list, list, list | None]:
    """One line -> the prompt's ids, each completion's ids, and rewards or None.

    UserError says what was wanted; the caller puts the file and the line before it.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"JSON in UTF-8, got {getattr(e, 'msg', e)}") from e
    want(isinstance(row, dict) and ("completions" in row or {"chosen", "rejected"} <= row.keys()),
         "an object with the keys prompt and completions, or prompt, chosen and rejected, or "
         f"chosen and rejected, got {sorted(row) if isinstance(row, dict) else row!r:.80}")
    texts = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    want(isinstance(texts, list) and len(texts) > 1 and all(isinstance(y, str) for y in texts),
         f"a list of two or more completions, all of them texts, got {texts!r:.80}")
    prompt, rewards, ids = (row.get(key) for key in ("prompt", "rewards", "completion_ids"))
    want(rewards is None or isinstance(rewards, list) and len(rewards) == len(texts)
         and all(type(r) in (int, float) and abs(r) < 1e38 for r in rewards),
         f"{len(texts)} rewards, finite numbers, one per completion, got {rewards!r:.80}")
    if ids is None:
        if not row.keys() & {"prompt", "completions"}:  # Anthropic-HH
            mark = "\n\nAssistant:"
            end = os.path.commonprefix(texts).rfind(mark) + len(mark)
            want(end >= len(mark), f"a prompt, or a {mark!r} that chosen and rejected share")
            prompt, texts = texts[0][:end], [text[end:] for text in texts]
        want(isinstance(prompt, str), f"a prompt, a text, got {prompt!r:.80}")
        want(all(y.strip() for y in texts), "some text in every completion, got an empty one")
        prompt, *ids = map(enc.encode_ordinary, (prompt, *texts))
        return [enc.eot_token, *prompt], [[*y, enc.eot_token] for y in ids], rewards
    prompt = row.get("prompt_ids")
    want(isinstance(ids, list) and len(ids) == len(texts) and all(
        isinstance(y, list) and y and all(type(i) is int for i in y) for y in (prompt, *ids)),
        "prompt_ids, and completion_ids for each completion: lists of integers, none of them empty")
    low, high = min(map(min, (prompt, *ids))), max(map(max, (prompt, *ids)))
    want(0 <= low and high < enc.n_vocab,
         f"ids from 0 to {enc.n_vocab - 1}, the vocabulary, got ids from {low} to {high}")
    return prompt, ids, rewards
