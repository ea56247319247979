"""Laws of support/preference_files.py: a preference in any form gives the ids of its texts.

Files that are refused are rows of test_mistakes.py.
"""

import gzip
import json
import random

import pytest

from data_imdb import read_groups, train_bpe
from support.preference_files import MARK, read_preferences

ENC = train_bpe(["this film is good and that film is bad, yes no"], 300)
EOT, TEXTS = ENC.eot_token, ["good", "bad", "yes", "no"]


def encode(text: str) -> list[int]:
    return ENC.encode_ordinary(text)


def ended(*texts: str) -> list[list[int]]:
    return [[*encode(text), EOT] for text in texts]


@pytest.fixture
def read(tmp_path):
    """read(rows or bytes) -> Groups"""
    def read(*rows, content=None, n_ctx=512):
        (tmp_path / "my.jsonl").write_bytes(
            "\n".join(map(json.dumps, rows)).encode() if content is None else content)
        return read_groups(tmp_path / "my.jsonl", ENC, n_ctx)
    return read


@pytest.fixture
def parse(read):
    """parse(row) -> (the prompt's ids, each completion's ids, rewards or None)"""
    def parse(row: dict):
        groups = read(row)
        assert len(groups.prompt_ids) == 1
        return (groups.prompt_ids[0], groups.completion_ids[0],
                pytest.approx(groups.rewards[0].tolist()) if groups.has_reward else None)
    return parse


@pytest.fixture
def texts(tmp_path):
    """texts(row) -> (prompt, completion, ...) without a tokenizer"""
    def texts(row: dict):
        (tmp_path / "my.jsonl").write_text(json.dumps(row))
        ((_, prompt, completions, _, _),), _ = read_preferences(tmp_path / "my.jsonl")
        return prompt, *completions
    return texts


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------ forms

def test_our_own_lines_keep_their_ids(parse):
    row = {"prompt": "film", "completions": [" good", " bad", ""], "rewards": [0.9, 0.1, 0.5],
           "prompt_ids": [EOT, *b"film"],  # other tokens than the tokenizer's, of the same text
           "completion_ids": [[*b" good", EOT], [*b" bad"], [EOT]]}  # the second did not end itself
    ids = row["prompt_ids"], row["completion_ids"]
    assert encode("film") != [*b"film"] and parse(row) == (*ids, [0.9, 0.1, 0.5])
    assert parse(row | {"rewards": None}) == (*ids, None), "completions stand best first"


@pytest.mark.parametrize("prompt", ["this film ☃\u2028", "", "a\x00b"])
def test_without_ids_a_text_is_tokenised_between_endoftexts(parse, prompt):
    row = {"prompt": prompt, "completions": TEXTS, "extra": 1}
    assert parse(row) == ([EOT, *encode(prompt)], ended(*TEXTS), None)
    assert parse(row | {"rewards": [0, 1, 0.5, 0.5]})[2] == [0, 1, 0.5, 0.5]


def test_a_pair_has_the_chosen_completion_first(parse):
    row = {"rejected": " is bad", "chosen": " is good", "prompt": "this film"}
    want = [EOT, *encode("this film")], ended(" is good", " is bad")
    assert parse(row) == (*want, None) and parse(row | {"rewards": [2, 1]}) == (*want, [2, 1])


def test_one_dialogue_in_every_form_gives_the_same_ids(read):
    prompt, good, bad = "\n\nHuman: film?\n\nAssistant:", " It is good", " It is bad"
    asked, chosen, rejected = [user("film?")], assistant("It is good"), assistant("It is bad")
    sides = {"chosen": [*asked, chosen], "rejected": [*asked, rejected]}
    forms = [{"prompt": prompt, "completions": [good, bad]},
             {"prompt": prompt, "chosen": good, "rejected": bad},
             {"chosen": prompt + good, "rejected": prompt + bad},
             sides, sides | {"prompt": asked}, sides | {"prompt": "film?"},
             sides | {"prompt": "film?", "prompt_id": "0af", "messages": sides["chosen"],
                      "score_chosen": 1.0, "score_rejected": 9.0},  # UltraFeedback-binarized
             {"prompt": asked, "chosen": [chosen], "rejected": [rejected]},
             {"prompt": "film?", "chosen": [chosen], "rejected": [rejected]},
             {"prompt": prompt, "completions": [good, bad], "prompt_ids": [EOT, *encode(prompt)],
              "completion_ids": ended(good, bad)}]
    groups = read(*forms)
    assert not groups.has_reward and not groups.dropped
    for form, p, y in zip(forms, groups.prompt_ids, groups.completion_ids, strict=True):
        assert (p, y) == ([EOT, *encode(prompt)], ended(good, bad)), form


def test_lines_an_array_and_gzip_hold_the_same(read):
    rows = [{"prompt": f"film {i}", "chosen": "good ☃", "rejected": "bad"} for i in range(5)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    contents = [lines, b"\xef\xbb\xbf" + lines, lines.replace(b"\n", b"\r\n\r\n") + b"\n",
                json.dumps(rows, indent=2).encode(), b"\n " + json.dumps(rows).encode()]
    contents += [gzip.compress(content) for content in contents]
    first = read(*rows)
    assert first.prompt_ids == [[EOT, *encode(f"film {i}")] for i in range(5)]
    for content in contents:
        groups = read(content=content)
        assert groups.prompt_ids == first.prompt_ids, content[:20]
        assert groups.completion_ids == first.completion_ids, content[:20]


# ------------------------------------------------------------------------------ implicit prompts

def test_an_anthropic_hh_prompt_ends_with_the_last_mark_that_both_share(texts):
    head = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: film?\n\nAssistant:"
    chosen = " good\n\nHuman: why?\n\nAssistant: no"  # it contains a MARK too
    assert texts({"chosen": head + chosen, "rejected": head + " bad"}) == (head, chosen, " bad")
    early = "\n\nHuman: hi\n\nAssistant:"  # the next questions differ
    rest = [" yes\n\nHuman: a\n\nAssistant: b", " yes\n\nHuman: c\n\nAssistant: d"]
    assert texts({"chosen": early + rest[0], "rejected": early + rest[1]}) == (early, *rest)


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("The sky is blue.", "The sky is green.", "The sky is"),  # TRL's own example
    ("The sky is blue", "The sky is black", "The sky is"),  # TRL: "The sky is bl"
    ("The sky is", "The sky is blue", "The sky"),  # else chosen would be empty
    ("The sky  is", "The sky \n was", "The sky"), ("The sky is ☃", "The sky is ☂", "The sky is"),
    ("blue", "black", ""), (" blue", " green", ""), ("blue", "", None)])
def test_without_a_mark_the_prompt_is_the_words_that_both_share(read, texts, chosen, rejected,
                                                                prompt):
    row = {"chosen": chosen, "rejected": rejected}
    if prompt is None:
        groups = read({"chosen": "a", "rejected": "b"}, row)
        assert groups.dropped == {"an empty completion": 1}
        return
    assert texts(row) == (prompt, chosen[len(prompt):], rejected[len(prompt):])
    assert texts(row | {"prompt": ""}) == ("", chosen, rejected), "an empty prompt is a prompt"
    groups = read(row)
    for text, ids in zip((chosen, rejected), groups.completion_ids[0]):
        assert groups.prompt_ids[0] + ids == [EOT, *encode(text), EOT], "a token was cut in two"


def test_the_prompt_of_conversations_ends_before_the_answers_that_differ(texts):
    head = [{"role": "system", "content": "Be brief."}, user("hi"), assistant("hey"), user("film?")]
    text = "\n\nSystem: Be brief.\n\nHuman: hi\n\nAssistant: hey\n\nHuman: film?\n\nAssistant:"
    chosen, rejected = [assistant("good"), user("so?"), assistant("yes")], [assistant("bad")]
    more = " good\n\nHuman: so?\n\nAssistant: yes"
    assert texts({"chosen": head + chosen, "rejected": head + rejected}) == (text, more, " bad")
    assert texts({"prompt": head, "chosen": chosen, "rejected": rejected}) == (text, more, " bad")
    # an answer that both share after an explicit prompt is not part of the prompt
    assert texts({"prompt": head[:2], "chosen": head[2:] + rejected, "rejected": head[2:] + chosen}
                 ) == ("\n\nSystem: Be brief.\n\nHuman: hi\n\nAssistant:",
                       f" hey\n\nHuman: film?{MARK} bad", f" hey\n\nHuman: film?{MARK}{more}")
    # a prompt may begin with an assistant's turn
    assert texts({"chosen": head[2:] + chosen, "rejected": head[2:] + rejected}) == (
        f"{MARK} hey\n\nHuman: film?{MARK}", more, " bad")
    # one of them may be longer, and a message may contain the text of a MARK
    assert texts({"chosen": [user("x\n\nAssistant: y"), assistant("z"), user("u"), assistant("v")],
                  "rejected": [user("x\n\nAssistant: y"), assistant("z")]}) == (
        "\n\nHuman: x\n\nAssistant: y\n\nAssistant:", " z\n\nHuman: u\n\nAssistant: v", " z")


def test_trl_s_examples_of_preferences(texts):
    """The four forms of TRL's docs/source/dataset_formats.md."""
    sky, colour = user("What color is the sky?"), "\n\nHuman: What color is the sky?\n\nAssistant:"
    blue, green = assistant("It is blue."), assistant("It is green.")
    for row, want in (
            ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
             ("The sky is", " blue.", " green.")),
            ({"chosen": "The sky is blue.", "rejected": "The sky is green."},
             ("The sky is", " blue.", " green.")),
            ({"prompt": [sky], "chosen": [blue], "rejected": [green]},
             (colour, " It is blue.", " It is green.")),
            ({"chosen": [sky, blue], "rejected": [sky, green]},
             (colour, " It is blue.", " It is green."))):
        assert texts(row) == want


# ------------------------------------------------------------------------------ <|endoftext|>

@pytest.mark.parametrize("end", ["<|endoftext|>", "<|endoftext|>\n", "<|endoftext|> <|endoftext|>"])
def test_an_end_that_is_spelled_out_is_one_token(parse, end):
    want = [EOT, *encode("film")], ended(" good ", " bad")
    row = {"prompt": "film", "chosen": " good " + end, "rejected": " bad" + end}
    assert parse(row) == (*want, None)
    assert parse(row | {"prompt": "<|endoftext|>film"}) == (*want, None)
    chat = {"prompt": "film?", "chosen": [assistant("good" + end)], "rejected": [assistant("bad")]}
    assert parse(chat)[1] == ended(" good", " bad")


def test_inside_a_text_endoftext_is_ordinary(parse, read):
    prompt, completions, _ = parse({"prompt": "x<|endoftext|>", "chosen": "<|endoftext|>y",
                                    "rejected": "a <|endoftext|> b"})
    assert prompt == [EOT, *encode("x<|endoftext|>")] and prompt.count(EOT) == 1
    assert completions == ended("<|endoftext|>y", "a <|endoftext|> b")
    assert [y.count(EOT) for y in completions] == [1, 1]
    row = {"prompt": "x", "completions": ["<|endoftext|>", "b"], "prompt_ids": [EOT, *b"x"],
           "completion_ids": [[*b"<|endoftext|>", EOT], [*b"b", EOT]]}  # sampled as letters
    assert parse(row)[1] == row["completion_ids"]


# ------------------------------------------------------------------------------ unusual rows

def test_unusual_rows_are_left_out_and_counted_by_reason(read):
    usual = {"prompt": "film", "chosen": " good", "rejected": " bad"}
    dialogue = "\n\nHuman: {}\n\nAssistant: {}".format
    rows = [usual, usual,  # a duplicate is kept
            usual | {"chosen": " "}, usual | {"rejected": ""}, usual | {"chosen": "<|endoftext|>"},
            usual | {"chosen": [user("film"), assistant("")],
                     "rejected": [user("film"), assistant("x")]},
            usual | {"chosen": [user("song"), assistant("y")],
                     "rejected": [user("song"), assistant("x")]},
            usual | {"rejected": " good"}, {"chosen": "same words", "rejected": "same words"},
            {"chosen": dialogue("a", "b"), "rejected": dialogue("c", "d")},
            {"chosen": [user("a")], "rejected": [user("b")]},
            usual | {"prompt": "x" + " " * 10**6 + "y"}, usual | {"rejected": "film " * 600}]
    groups = read(*rows)
    assert groups.completion_ids == [ended(" good", " bad")] * 2
    assert groups.dropped == {"an empty completion": 4, "equal completions": 2,
                              "no shared prompt": 2, "longer than 500,000 characters": 1,
                              "longer than 512 tokens": 1,
                              "chosen and rejected do not continue the prompt": 1}
    ranks = {"prompt": "film", "completions": ["a", "b", "a"]}
    groups = read(ranks | {"rewards": [1, 0, 1]}, ranks | {"rewards": [1, 1, 1]},
                  ranks | {"completions": ["a"] * 3, "rewards": [1, 2, 3]})
    assert groups.rewards.tolist() == [[1, 0, 1]], "equal texts with equal rewards"
    assert groups.dropped == {"equal rewards": 1, "equal completions": 1}
    assert read(ranks, ranks | {"completions": ["a", "b", "c"]}).dropped == {"equal completions": 1}
    long = {"prompt": "film " * 600, "completions": ["a", "b"], "rewards": [1, 0]}
    assert read(long, {"prompt": "x", "completions": ["a", "b"], "rewards": [0, 1]}
                ).rewards.tolist() == [[0, 1]], "the reward of another group"


def test_harmless_base_is_read_without_its_four_empty_answers(read):
    """Anthropic-HH's harmless-base/test.jsonl.gz has 2,312 rows; in 4 of them chosen is a space."""
    rng, rows = random.Random(0), []
    for i in range(2312):
        head = "".join(f"\n\nHuman: {i} {rng.random()}?\n\nAssistant: yes" for _ in range(i % 3))
        head += f"\n\nHuman: {i}?\n\nAssistant:"
        rows.append({"chosen": head + " good" * (i % 600 != 9) + " ", "rejected": head + " bad"})
    groups = read(content=gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert len(groups.prompt_ids) == 2308 and groups.dropped == {"an empty completion": 4}


def test_surrogates_are_read_as_replacement_characters(read):
    groups = read({"prompt": "a\ud800", "chosen": "\udc00", "rejected": "\ud83d\ude00 \x00"})
    assert groups.prompt_ids == [[EOT, *encode("a\ufffd")]]
    assert groups.completion_ids == [ended("\ufffd", "😀 \x00")]
