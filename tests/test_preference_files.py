"""Laws of support/preference_files.py: each form of a preference gives the ids that its text has.

The lines that are refused are rows of test_mistakes.py.
"""

import json

import pytest

from data_imdb import train_bpe
from support.preference_files import parse_preference

ENC = train_bpe(["this film is good and that film is bad, yes no"], 300)
EOT, TEXTS = ENC.eot_token, ["good", "bad", "yes", "no"]


def parse(row: dict):
    """(the prompt's ids, each completion's ids, rewards or None)"""
    return parse_preference(json.dumps(row).encode(), ENC)


def encode(text: str) -> list[int]:
    return ENC.encode_ordinary(text)


def ended(*texts: str) -> list[list[int]]:
    return [[*encode(text), EOT] for text in texts]


def test_our_own_lines_keep_their_ids_whatever_their_text():
    row = {"prompt": "this film", "completions": [" is good", " is bad", ""],
           "rewards": [0.9, 0.1, 0.5], "prompt_ids": [EOT, 5, 6],
           "completion_ids": [[7, 8, EOT], [9], [EOT]]}  # the second did not end itself
    assert parse(row) == ([EOT, 5, 6], [[7, 8, EOT], [9], [EOT]], [0.9, 0.1, 0.5])
    assert parse(row | {"rewards": None})[2] is None, "completions stand best first"


@pytest.mark.parametrize("prompt", ["this film ☃\u2028", ""])
def test_without_ids_a_text_is_tokenised_between_endoftexts(prompt):
    row = {"prompt": prompt, "completions": TEXTS, "extra": 1}
    assert parse(row) == ([EOT, *encode(prompt)], ended(*TEXTS), None)
    assert parse(row | {"rewards": [0, 1, 0.5, 0.5]})[2] == [0, 1, 0.5, 0.5]


def test_a_pair_has_the_chosen_completion_first():
    row = {"rejected": " is bad", "chosen": " is good", "prompt": "this film"}
    assert parse(row) == ([EOT, *encode("this film")], ended(" is good", " is bad"), None)


def test_an_anthropic_hh_prompt_ends_with_the_last_mark_that_both_share():
    head = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: film?\n\nAssistant:"
    chosen = " good\n\nHuman: why?\n\nAssistant: no"  # goes on past the prompt
    got = parse({"chosen": head + chosen, "rejected": head + " bad film"})
    assert got == ([EOT, *encode(head)], ended(chosen, " bad film"), None)


def test_a_text_that_spells_endoftext_is_no_end():
    prompt, completions, _ = parse({"prompt": "x", "chosen": "<|endoftext|>", "rejected": "y"})
    assert EOT not in completions[0][:-1] and ENC.decode(completions[0][:-1]) == "<|endoftext|>"
