"""Laws of support/settings.py: every setting is a flag in one group, and a setting renames the
stages that it decides and no other. Bad values are rows of test_mistakes.py."""

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from conftest import command

import train
from support.runs import UserError, file_hash
from support.settings import (GROUPS, OTHER_LOSSES, PRESETS, SETTINGS_OF, TOY, Settings, check,
                              parse, run_name, settings_of, stage_of, user_files)

FIELDS = pytest.mark.parametrize("f", fields(Settings), ids=lambda f: f.name)


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


@FIELDS
def test_every_field_is_a_flag(f):
    flag, value = "--" + f.name.replace("_", "-"), other_value(f)
    value = {"vocab": "gpt2", "n_head": TOY.n_embd, "n_embd": 3 * TOY.n_embd}.get(f.name, value)
    given = [flag] if f.type is bool else [flag, str(value)]
    given += ["--groups", "a.jsonl"] if f.name == "reference" else []
    *_, cfg = parse(["--preset", "toy", *given], cuda=False)
    assert getattr(cfg, f.name) == value and type(getattr(cfg, f.name)) is f.type
    also = {"groups": "a.jsonl"} if f.name == "reference" else {}
    assert cfg == replace(TOY, **{f.name: value}, **also), f"{flag} changes more than it says"


@pytest.mark.parametrize("stage", SETTINGS_OF)
def test_help_shows_the_flags_that_the_stage_depends_on(stage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    result = command("--stage", stage, "--help")
    assert result.code == 0 and not result.err
    assert "%%" not in result.out and "%(" not in result.out, "an unformatted % in --help"
    assert max(map(len, result.out.splitlines())) <= 90
    places = {group: result.out.find(f"\n{title}:\n") for group, title in GROUPS.items()}
    there = [group for group in GROUPS if places[group] >= 0]
    assert set(there) == {*SETTINGS_OF[stage], "run"}
    assert sorted(there, key=places.get) == there, "groups out of order"
    for f in fields(Settings):
        found = re.search(r"\n  --" + f.name.replace("_", "-") + r"[ ,\n]", result.out)
        assert bool(found) == (group(f) in there), f.name
        if found:
            assert found.start() > places[group(f)], f"{f.name} is not under {group(f)}"
            following = [places[g] for g in there if places[g] > places[group(f)]]
            assert found.start() < min(following, default=len(result.out)), f.name
    assert all(name in result.out for name in SETTINGS_OF), "a stage that nobody hears of"


def test_every_field_says_what_it_is_for():
    for f in fields(Settings):
        assert f.metadata["help"] and group(f) in GROUPS, f.name


def test_the_preset_is_chosen_by_the_device_and_says_so():
    assert parse([], cuda=True)[:3] == ("dpo", "imdb", "CUDA is here")
    assert parse(["--device", "cpu"], cuda=True)[1] == "toy"
    stage, preset, reason, cfg = parse([], cuda=False)
    assert (stage, preset, cfg) == ("dpo", "toy", TOY) and "CUDA" in reason
    for name in PRESETS:
        got = parse(["--preset", name, "--stage", "sft"], cuda=True)
        assert got == ("sft", name, "--preset", PRESETS[name])


def test_the_stage_is_known_before_the_rest_is_read():
    """train.py hands a stage of experiments/ over before it looks at any other flag."""
    assert stage_of([]) == "dpo" and stage_of(["--no-such-flag", "--stage", "ppo"]) == "ppo"
    for stage in OTHER_LOSSES:
        assert parse(["--stage", stage], cuda=False)[3].loss == stage, "dpo with another loss"


# ------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_frozen_and_a_sample_fits_the_context(name):
    cfg = PRESETS[name]
    check(cfg)
    with pytest.raises(FrozenInstanceError):
        cfg.beta = 1.0
    assert cfg.max_new_tokens + 9 <= cfg.n_ctx, "<|endoftext|>, 8 tokens of prompt, a completion"


def test_gpt2_large_is_the_papers_setting():
    """Appendix B and C.1: RMSprop at 1e-6, 150 steps of warm-up, β 0.1, 4 completions of each of
    25,000 prompts, batches of 64 pairs, the siebert judge."""
    cfg = PRESETS["gpt2-large"]
    assert (cfg.dpo_optimizer, cfg.dpo_lr, cfg.dpo_warmup, cfg.beta) == ("rmsprop", 1e-6, 150, 0.1)
    assert (cfg.prompts, cfg.num_completions, cfg.reward) == (25_000, 4, "siebert")
    assert cfg.init == "gpt2-large"
    assert cfg.dpo_batch == round(64 / 6), "11 groups of 6 pairs are nearest to 64"


# ------------------------------------------------------------------------------ identity


def test_groups_and_stages_agree():
    assert {group(f) for f in fields(Settings)} == set(GROUPS), "a group without title or setting"
    assert SETTINGS_OF.keys() == train.STAGES.keys()
    used = {g for groups in SETTINGS_OF.values() for g in groups}
    assert used == set(GROUPS) - {"run"}, "a group that decides nothing, or `run` that does"


@FIELDS
def test_a_setting_moves_the_stages_of_its_group_only(f):
    cfg = changed(f)
    for stage, groups in SETTINGS_OF.items():
        same = settings_of(cfg, groups) == settings_of(TOY, groups), \
            run_name(cfg, TOY, groups) == ""
        other = group(f) not in groups
        assert same == (other, other), f"{f.name} ({group(f)}) and {stage}"


@pytest.mark.parametrize("stage", SETTINGS_OF)
def test_a_stage_depends_on_all_that_its_parents_depend_on(stage):
    cfg = replace(TOY, groups="a.jsonl") if stage == "chosen" else replace(TOY, corpus="imdb")
    for parent in train.STAGES[stage].parents(cfg):
        missing = set(SETTINGS_OF[parent]) - set(SETTINGS_OF[stage])
        assert not missing, f"{stage} reads {parent}, whose {missing} would not rename it"


def test_folders_of_other_settings_have_other_names():
    everything = tuple(set(GROUPS) - {"run"})
    names = [run_name(changed(f), TOY, everything) for f in fields(Settings) if group(f) != "run"]
    assert "" not in names and len(set(names)) == len(names)
    cfg = replace(TOY, beta=1.0, weight="constant")
    assert run_name(cfg, TOY, ("dpo",)) == "-constant-beta1.0"


def test_a_run_name_is_a_folder_name():
    cfg = replace(TOY, groups="../é data/my prefs.jsonl", weight="/a/b/" + "c" * 300 + ".py:w")
    name = run_name(cfg, TOY, SETTINGS_OF["dpo"])
    assert re.fullmatch(r"[-\w.]+", name, re.ASCII) and len(name) < 240, name
    everything = Settings(**{f.name: other_value(f) for f in fields(Settings)})
    long, longer = (run_name(replace(everything, dpo_lr=lr), TOY, SETTINGS_OF["dpo"])
                    for lr in (0.5, 0.75))
    assert len("unlikelihood" + long) < 256, "more than a file system's name holds"
    assert long != longer, "two long names share a folder"


def test_what_a_user_gave_is_a_parent_of_the_stages_that_read_it(tmp_path):
    for name in ("g.jsonl", "w.py", "m.py", "model.pt"):
        (tmp_path / name).write_text(name)
    file = {name: str(tmp_path / name) for name in ("g.jsonl", "w.py", "m.py")}
    cfg = replace(TOY, groups=file["g.jsonl"], weight=file["w.py"] + ":f", dpo_module=file["m.py"],
                  init="gpt2", reference=str(tmp_path))
    mine = {"sft": {"gpt2": ""}, "chosen": {"gpt2": "", file["g.jsonl"]: "g.jsonl"},
            "groups": {file["g.jsonl"]: "g.jsonl", str(tmp_path): "model.pt"},
            **dict.fromkeys(("dpo", *OTHER_LOSSES), {file["w.py"]: "w.py", file["m.py"]: "m.py"})}
    for stage in SETTINGS_OF:
        wanted = {path: name and file_hash(tmp_path / name)
                  for path, name in mine.get(stage, {}).items()}
        assert user_files(cfg, stage) == wanted, stage
        assert user_files(TOY, stage) == {}, "nothing was given"


# ------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize("f", [f for f in fields(Settings) if f.type in (int, float)],
                         ids=lambda f: f.name)
def test_every_number_has_a_floor(f):
    for bad in (f.type(f.metadata["low"] - 1), *([float("nan")] if f.type is float else [])):
        with pytest.raises(UserError, match="--" + f.name.replace("_", "-")):
            check(replace(TOY, **{f.name: bad}))
