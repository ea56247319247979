"""Laws of support/settings.py: every setting a flag, each in one group, every bad value one sentence."""

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from conftest import command, refused

import pipeline
from pipeline import STAGES, parents
from stages import SETTINGS_OF
from support.runs import UserError
from support.settings import GROUPS, PRESETS, TOY, Settings, belonging, check, parse, suffix


def group(f) -> str:
    return f.metadata["group"]


def other_value(f):
    """Some value that the field does not have by default."""
    choices = f.metadata["choices"]
    if choices:
        return next(c for c in choices if c != f.default)
    return {int: 77, float: 0.25, str: f"{f.name}.x", bool: True}[f.type]


def changed(f) -> Settings:
    return replace(TOY, **{f.name: other_value(f)})


# ------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("f", fields(Settings), ids=lambda f: f.name)
def test_every_field_is_a_flag(f):
    flag, value = "--" + f.name.replace("_", "-"), other_value(f)
    value = {"vocab": "gpt2", "n_head": TOY.n_embd, "n_embd": 3 * TOY.n_embd}.get(f.name, value)
    given = [flag] if f.type is bool else [flag, str(value)]
    given += ["--groups", "a.jsonl"] if f.name == "reference" else []
    *_, settings = parse(["--preset", "toy", *given], STAGES, cuda=False)
    assert getattr(settings, f.name) == value and type(getattr(settings, f.name)) is f.type
    also = {"groups": "a.jsonl"} if f.name == "reference" else {}
    assert settings == replace(TOY, **{f.name: value}, **also), f"{flag} changes more than it says"


def test_help_has_every_flag_in_its_group_and_no_format_codes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    text = command("--help")
    assert text.code == 0 and not text.err
    assert "%%" not in text.out and "%(" not in text.out, "an unformatted % in --help"
    assert max(map(len, text.out.splitlines())) <= 90
    places = [text.out.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert places == sorted(places), "groups out of order"
    sections = dict(zip(GROUPS, (text.out[a:b] for a, b in zip(places, [*places[1:], None]))))
    for f in fields(Settings):
        flag = "\n  --" + f.name.replace("_", "-")
        assert re.search(flag + r"[ ,\n]", sections[group(f)]), f"{flag} is not under {group(f)}"
    for stage in STAGES:
        assert stage in text.out


def test_every_field_says_what_it_is_for():
    for f in fields(Settings):
        assert f.metadata["help"], f"{f.name} has no reason beside it"
        assert group(f) in GROUPS, f"{f.name} is in no group"


def test_the_preset_is_chosen_by_the_device_and_says_so():
    assert parse([], STAGES, cuda=True)[:3] == ("dpo", "imdb", "CUDA is here")
    stage, preset, reason, settings = parse([], STAGES, cuda=False)
    assert (stage, preset, settings) == ("dpo", "toy", TOY) and "CUDA" in reason
    for name in PRESETS:
        got = parse(["--preset", name, "--stage", "sft"], STAGES, cuda=True)
        assert got == ("sft", name, "--preset", PRESETS[name])


# ------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_frozen(name):
    check(PRESETS[name])
    with pytest.raises(FrozenInstanceError):
        PRESETS[name].beta = 1.0


def test_gpt2_large_is_the_papers_setting():
    """Appendix B and C.1: RMSprop at 1e-6, 150 steps of warm-up, β 0.1, 4 completions of each of
    25,000 prompts, batches of 64 pairs, the siebert judge."""
    s = PRESETS["gpt2-large"]
    assert (s.dpo_optimizer, s.dpo_lr, s.dpo_warmup, s.beta) == ("rmsprop", 1e-6, 150, 0.1)
    assert (s.prompts, s.completions, s.reward, s.init) == (25_000, 4, "siebert", "gpt2-large")
    assert s.dpo_batch == round(64 / 6), "11 groups of 6 pairs are nearest to 64"


@pytest.mark.parametrize("name", PRESETS)
def test_a_sample_and_its_prompt_fit_the_context(name):
    s = PRESETS[name]
    assert s.max_new + 9 <= s.n_ctx, "<|endoftext|>, 8 tokens of prompt, and the completion"


# ------------------------------------------------------------------------------ identity


def test_groups_and_stages_agree():
    assert {group(f) for f in fields(Settings)} == set(GROUPS), "a group without title or setting"
    assert SETTINGS_OF.keys() == STAGES.keys()
    used = {g for groups in SETTINGS_OF.values() for g in groups}
    assert used == set(GROUPS) - {"run"}, "a group that decides nothing, or `run` that does"


@pytest.mark.parametrize("f", fields(Settings), ids=lambda f: f.name)
def test_a_setting_moves_the_stages_of_its_group_only(f):
    s = changed(f)
    for stage, groups in SETTINGS_OF.items():
        same = belonging(s, groups) == belonging(TOY, groups), suffix(s, TOY, groups) == ""
        other = group(f) not in groups
        assert same == (other, other), f"{f.name} ({group(f)}) and {stage}"


def test_a_stage_depends_on_all_that_its_parents_depend_on():
    for stage in SETTINGS_OF:
        for parent in parents(stage, replace(TOY, corpus="imdb")):
            missing = set(SETTINGS_OF[parent]) - set(SETTINGS_OF[stage])
            assert not missing, f"{stage} reads {parent}, whose {missing} would not rename it"


def test_folders_of_other_settings_have_other_names():
    everything = tuple(set(GROUPS) - {"run"})
    names = [suffix(changed(f), TOY, everything) for f in fields(Settings) if group(f) != "run"]
    assert "" not in names and len(set(names)) == len(names)
    assert suffix(replace(TOY, beta=1.0, weight="constant"), TOY, ("dpo",)) == "-constant-beta1.0"


def test_a_suffix_is_a_folder_name():
    s = replace(TOY, groups="../é data/my prefs.jsonl", weight="/a/b/" + "c" * 300 + ".py:w")
    name = suffix(s, TOY, SETTINGS_OF["dpo"])
    assert re.fullmatch(r"[-\w.]+", name, re.ASCII) and len(name) < 240, name
    everything = Settings(**{f.name: other_value(f) for f in fields(Settings)})
    long, longer = (suffix(replace(everything, dpo_lr=lr), TOY, SETTINGS_OF["dpo"])
                    for lr in (0.5, 0.75))
    assert len("groups" + long) < 256, "more than a file system's name holds"
    assert long != longer, "cut, two settings share a folder"


# ------------------------------------------------------------------------------ bad values


BAD = {
    "an unknown stage": ("--stage dop", "dop", "sft"),
    "an unknown preset": ("--preset gpt3", "gpt3", "gpt2-large"),
    "an unknown flag": ("--dpo-rate 1", "--dpo-rate"),
    "a flag cut short": ("--sft-step 10", "--sft-step"),
    "a stray word": ("dpo", "dpo"),
    "no value": ("--beta", "--beta"),
    "a word for a number": ("--sft-steps many", "--sft-steps", "many"),
    "a fraction for a count": ("--sft-steps 1.5", "--sft-steps"),
    "an unknown choice": ("--loss ranking", "plackett-luce"),
    "no steps": ("--sft-steps 0", "--sft-steps is 0", "at least 1"),
    "an empty batch": ("--dpo-batch 0", "--dpo-batch is 0"),
    "a negative rate": ("--dpo-lr -1", "--dpo-lr is -1"),
    "a rate that is no number": ("--dpo-lr nan", "--dpo-lr is nan"),
    "beta zero": ("--beta 0", "--beta is 0", "positive"),
    "beta below zero": ("--beta -0.1", "--beta is -0.1"),
    "beta infinite": ("--beta inf", "--beta is inf"),
    "beta that is no number": ("--beta nan", "--beta is nan"),
    "all dropped out": ("--dropout 1", "--dropout is 1", "[0, 1)"),
    "heads that do not divide": ("--n-head 3", "--n-head 3", "--n-embd"),
    "a vocabulary without all bytes": ("--vocab 100", "--vocab is '100'", "257"),
    "a vocabulary past uint16": ("--vocab 70000", "--vocab is '70000'"),
    "a vocabulary by another name": ("--vocab llama", "--vocab is 'llama'", "gpt2"),
    "one completion": ("--completions 1", "--completions is 1", "at least 2"),
    "a judge that reads too little": ("--preset imdb --reward-ctx 64", "--reward-ctx 64", "73"),
    "two weights": ("--loss plackett-luce --weight constant", "--weight constant"),
    "a reference for nothing": ("--reference out/x", "--reference", "--groups"),
    "an unknown weight": ("--weight quadratic", "quadratic", "hinge"),
    "a weight's file that is not there": ("--weight nowhere.py:f", "nowhere.py"),
    "a module that is not there": ("--dpo-module nowhere.py", "nowhere.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_one_sentence(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "build", lambda *_: pytest.fail("accepted"))
    argv, *words = BAD[case]
    refused(command("--device", "cpu", *argv.split()), *words)
    assert not list(tmp_path.iterdir()), "refused, and yet something was written"


@pytest.mark.parametrize("f", [f for f in fields(Settings) if f.type in (int, float)],
                         ids=lambda f: f.name)
def test_every_number_has_a_floor(f):
    below = f.metadata["low"] - 1
    with pytest.raises(UserError, match="--" + f.name.replace("_", "-")):
        check(replace(TOY, **{f.name: f.type(below)}))
