"""Laws of support/settings.py: every setting is a flag in one group, and it changes the folder's
name of the stages that depend on it, and of no other. Bad values are rows of test_mistakes.py."""

import os
import re
from dataclasses import FrozenInstanceError, fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import command

import train
from experiments.lessons import data_ablation, loss_ablation
from experiments.sweep import finals, methods_of
from gpt import GPT, GPTConfig
from support.runs import UserError, file_hash
from support.settings import (GROUPS, OTHER_LOSSES, PRESETS, SETTINGS_OF, TOY, Settings, check,
                              UNUSED, parse, run_name, run_title, settings_of, stage_of,
                              user_files)

FIELDS = pytest.mark.parametrize("f", fields(Settings), ids=lambda f: f.name)


def group(f) -> str:
    return f.metadata["group"]


def other_value(f):
    """A value that is not the field's default."""
    choices = f.metadata["choices"]
    if choices:
        return next(c for c in choices if c != f.default)
    return {int: 77, float: 0.25, str: f"{f.name}.x", bool: True}[f.type]


def changed(f) -> Settings:
    return replace(TOY, **{f.name: other_value(f)})


# ------------------------------------------------------------------------------ flags


@FIELDS
def test_every_field_is_a_flag(f, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("groups.x", "a.jsonl", "init.x/model.pt", "reference.x/model.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    flag, value = "--" + f.name.replace("_", "-"), other_value(f)
    value = {"vocab": "gpt2", "n_head": TOY.n_embd, "n_embd": 3 * TOY.n_embd}.get(f.name, value)
    given = [flag] if f.type is bool else [flag, str(value)]
    given += ["--groups", "a.jsonl"] if f.name == "reference" else []
    *_, cfg = parse(["--preset", "toy", *given], cuda=False)
    assert getattr(cfg, f.name) == value and type(getattr(cfg, f.name)) is f.type
    also = {"groups": "a.jsonl"} if f.name == "reference" else {}
    assert cfg == replace(TOY, **{f.name: value}, **also), f"{flag} changes another setting"


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
    assert all(name in result.out for name in SETTINGS_OF), "--help must name every stage"


def test_every_field_says_what_it_is_for():
    for f in fields(Settings):
        assert f.metadata["help"] and group(f) in GROUPS, f.name


def test_the_preset_is_chosen_by_the_device_and_says_so():
    assert parse([], cuda=True)[:3] == (
        "dpo", "imdb", "preset imdb (the default with CUDA); stage dpo")
    assert parse(["--device", "cpu"], cuda=True)[1] == "toy"
    stage, preset, headline, cfg = parse([], cuda=False)
    assert (stage, preset, cfg) == ("dpo", "toy", TOY) and "(the default without CUDA)" in headline
    for name in PRESETS:
        got = parse(["--preset", name, "--stage", "sft"], cuda=True)
        assert got == ("sft", name, f"preset {name} (--preset); stage sft", PRESETS[name])


def test_the_stage_is_known_before_the_other_flags_are_read():
    """train.py starts `python -m experiments` for a stage of experiments/ and reads no other flag.
    """
    assert stage_of([]) == "dpo" and stage_of(["--no-such-flag", "--stage", "ppo"]) == "ppo"
    for stage in OTHER_LOSSES:
        assert parse(["--stage", stage], cuda=False)[3].loss == stage, "dpo with a loss"


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
    assert used == set(GROUPS) - {"run"}, "every group except `run` decides a stage"


@FIELDS
def test_a_setting_renames_only_the_stages_of_its_group(f):
    cfg = changed(f)
    for stage, groups in SETTINGS_OF.items():
        same = settings_of(cfg, groups) == settings_of(TOY, groups), \
            run_name(cfg, TOY, groups) == ""
        other = group(f) not in groups
        assert same == (other, other), f"{f.name} ({group(f)}) and {stage}"


@pytest.mark.parametrize("stage", SETTINGS_OF)
def test_a_stage_depends_on_all_that_its_parents_depend_on(stage):
    cfg = replace(TOY, groups="a.jsonl") if stage in ("chosen", "judge") else \
        replace(TOY, corpus="toy" if stage == "ood" else "imdb")
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
    assert len("unlikelihood" + long) < 256, "too long for a file system"
    assert long != longer, "two long names are equal"


@pytest.mark.parametrize("flags, unused", [
    ("--stage rm --label-noise 0.2 --jobs 2 --ppo-lr 1", "rm, which does not use --label-noise, "
                                                         "--ppo-lr"),
    ("--stage rm --rm-lr 1 --prompts 99", ""), ("--stage online --online-every 7 --beta 1", ""),
    ("--stage sft --beta 0.5", "sft, which does not use --beta"),
    ("--stage preferred-ft --dpo-steps 9", ""), ("--stage inspect --rm-lr 1 --beta 1", ""),
    ("--stage unlikelihood --loss pairwise", "unlikelihood, which does not use --loss"),
    ("--stage degenerate --dpo-steps 9 --beta 1", "degenerate, which does not use --dpo-steps")])
def test_flags_that_do_not_change_a_stage_are_named(flags, unused):
    _, _, headline, _ = parse(flags.split(), cuda=False)
    assert headline == f"preset toy (the default without CUDA); stage {unused or flags.split()[1]}"


def test_a_stage_lists_as_unused_only_settings_of_its_groups():
    for stage, names in UNUSED.items():
        assert set(names) <= settings_of(TOY, SETTINGS_OF[stage]).keys(), stage


@pytest.mark.parametrize("stage, runs", [
    ("frontier", lambda cfg: [(p.stage, p.cfg) for p in finals(cfg, dict.fromkeys(
        methods_of(cfg), 1e-3))]),
    ("degenerate", lambda cfg: [("dpo", x) for x in loss_ablation(cfg).values()]),
    ("overoptimisation", lambda cfg: [("dpo", x) for x in data_ablation(SimpleNamespace(
        cfg=cfg, split=[range(9_999)])).values()])])
def test_a_setting_that_a_stage_lists_as_unused_decides_none_of_its_runs(stage, runs):
    every = replace(TOY, online=True, label_dial=True, rankings=True)
    others = {f.name: other_value(f) for f in fields(Settings) if f.name in UNUSED[stage]}
    plans = [[{name: x for name, x in settings_of(cfg, SETTINGS_OF[of]).items()
               if name not in UNUSED.get(of, ())} for of, cfg in runs(start)]
             for start in (every, replace(every, **others))]
    assert len(plans[0]) >= 3 and plans[0] == plans[1]


@pytest.mark.parametrize("stage, settings, title", [
    ("dpo", {}, "DPO, β 1.6"), ("dpo", dict(weight="constant"), "DPO, β 1.6; weight constant"),
    ("dpo", dict(labels="soft", beta=0.5, dpo_steps=9), "DPO, β 0.5; dpo_steps 9, labels soft"),
    ("dpo", dict(loss="plackett-luce", seed=1), "DPO, β 1.6; seed 1, loss plackett-luce"),
    ("online", {}, "online DPO (labels by r*), β 1.6"),
    ("online", dict(online_labels="self", online_every=5),
     "online DPO (labels by self), β 1.6; online_every 5"),
    ("unlikelihood", dict(alpha=0.1, weight="ipo"), "Unlikelihood, α 0.1"),
    ("preferred-ft", dict(run_seed=2, ppo_steps=9), "Preferred-FT; run_seed 2"),
    ("dpo", dict(alpha=0.1), "DPO, β 1.6"),
    ("ppo", dict(beta=0.5), "PPO (learned reward), target KL 2"),
    ("ppo-gt", dict(ppo_target=0.0), "PPO-GT (true reward), constant β 0.3"),
    ("ppo-gt", dict(ppo_target=9.0, ppo_lr=1), "PPO-GT (true reward), target KL 9; ppo_lr 1"),
    ("sft", dict(sft_lr=0.1), "sft; sft_lr 0.1")])
def test_a_title_says_what_differs_from_the_preset_in_the_settings_of_its_stage(stage, settings,
                                                                               title):
    assert run_title(stage, replace(TOY, **settings), TOY) == title


def test_a_users_file_is_a_parent_of_the_stages_that_read_it(tmp_path):
    run = ["run/model.pt", "run/bpe.tiktoken"]
    hf = ["hf/config.json", "hf/model-1-of-2.safetensors", "hf/model-2-of-2.safetensors",
          "hf/model.safetensors.index.json", "hf/vocab.json", "hf/merges.txt", "hf/tokenizer.json"]
    bin = ["bin/config.json", "bin/pytorch_model.bin"]
    for name in ("g.jsonl", "w.py", "m.py", *run, *hf, *bin, "run/samples.txt", "hf/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def hashes(cfg, stage):
        return {path.removeprefix(f"{tmp_path}/"): hash
                for path, hash in user_files(cfg, stage).items()}

    def given(**names):
        return replace(TOY, **{key: f"{tmp_path}/{name}" for key, name in names.items()})

    cfg = given(groups="g.jsonl", weight="w.py:f", dpo_module="m.py", init="hf", reference="run")
    judged = replace(given(siebert_path="bin"), reward="siebert")
    wanted = {"sft": hf, "chosen": [*hf, "g.jsonl"], "groups": ["g.jsonl", *run],
              **dict.fromkeys(("dpo", "online", *OTHER_LOSSES), ["w.py", "m.py"])}
    for stage in SETTINGS_OF:
        files = wanted.get(stage, [])
        assert hashes(cfg, stage) == {name: file_hash(tmp_path / name) for name in files}, stage
        assert hashes(judged, stage).keys() == {*bin} if stage in ("groups", "judge") else \
            not hashes(judged, stage), "r* decides the groups"
        given_groups = hashes(replace(judged, groups=cfg.groups), stage).keys()
        assert given_groups & {*bin} == ({*bin} if stage == "judge" else set())
        assert user_files(TOY, stage) == {}, "the user gave no file"
        assert user_files(PRESETS["gpt2-large"], stage) == (
            {"gpt2-large": ""} if stage in ("sft", "chosen") else {}), "names, not files"


# ------------------------------------------------------------------------------ bad values


NUMBERS = pytest.mark.parametrize("f", [f for f in fields(Settings) if f.type in (int, float)],
                                  ids=lambda f: f.name)
WANTED = {  # the range that must be allowed: from the smallest model to the largest machine
    **dict.fromkeys("n_layer n_head".split(), (1, 200)), "n_embd": (1, 16_384),
    "n_ctx": (10, 65_536), "reward_ctx": (16, 65_536), "max_new_tokens": (1, 32_768),
    "num_completions": (2, 512), "dropout": (0, 0.9), "label_noise": (0, 0.5),
    **dict.fromkeys("optimum_samples best_of".split(), (2, 65_536)),
    **dict.fromkeys("prompts eval_prompts valid_prompts ppo_rollouts".split(), (10, 10**7)),
    **dict.fromkeys("reviews sft_batch reward_batch rm_batch".split(), (64, 10**7)),
    "dpo_batch": (1, 10**5),
    **dict.fromkeys("seed run_seed".split(), (0, 2**32 - 1)),
    **dict.fromkeys("seeds ood_seeds".split(), (1, 500)),
    **dict.fromkeys("jobs threads".split(), (0, 512)), "valid_samples": (0, 10**4),
    **dict.fromkeys("beta label_scale".split(), (1e-5, 1e5)),
    **dict.fromkeys("alpha grad_clip ppo_target ppo_beta sft_decay save_secs".split(), (0, 1e6)),
    **dict.fromkeys("sft_lr reward_lr rm_lr dpo_lr ppo_lr ppo_value_lr".split(), (0, 1e30))}
STEPS = (1, 10**9)


@NUMBERS
def test_senseless_numbers_are_refused_and_useful_numbers_are_not(f):
    flag = "--" + f.name.replace("_", "-")
    for text in ["0", "-1", str(10**18), str(10**23), *["nan", "inf", "-inf", "1e300", "-1e300",
                                                         "1e-300", "1e999"] * (f.type is float)]:
        try:
            value = getattr(parse(["--preset", "toy", f"{flag}={text}"], False)[3], f.name)
        except UserError as error:
            assert f"{flag} is {f.type(text)}; it must be from" in str(error)
            continue
        large = f.name.endswith("_lr") and value <= 1e38  # training will report that it diverges
        assert value in (0, 1e-300) or large, f"{flag} {text} passes"
        assert f.name not in ("beta", "label_scale"), "float32 rounds it to 0 and divides by it"
    for value in WANTED.get(f.name, STEPS):
        check(replace(TOY, **{f.name: f.type(value)}, **{"n_embd": dict(n_head=1), "n_head": dict(
            n_embd=200)}.get(f.name, {})))


@pytest.mark.parametrize("f", [f for f in fields(Settings) if f.type is str
                               and not f.metadata["choices"]], ids=lambda f: f.name)
def test_a_name_that_no_file_can_have_is_refused(f):
    for bad in ("a\0b", "\ud800", *[""] * (f.default != "")):
        with pytest.raises(UserError, match="--" + f.name.replace("_", "-")):
            check(replace(TOY, **{f.name: bad}))
    assert getattr(parse(["--preset", "gpt2", "--init", ""], False)[3], "init") == "", "the default"


def test_a_model_larger_than_the_memory_is_refused_at_once(monkeypatch):
    """The number of parameters is that of GPT without biases and norms, with 16 bytes for each."""
    pages, memory = dict(SC_PAGE_SIZE=4096, SC_PHYS_PAGES=2**23), 2**35
    monkeypatch.setattr(os, "sysconf", pages.get)
    with pytest.raises(UserError, match="--n-layer") as caught:
        parse("--preset toy --n-embd 16384 --n-layer 200".split(), False)
    said = re.search(r"([\d,]+) parameters need about ([\d,]+) GB.* has ([\d,]+) GB",
                     str(caught.value))
    n, needed, has = (int(x.replace(",", "")) for x in said.groups())
    with torch.device("meta"):
        model = GPT(GPTConfig(1280, TOY.n_ctx, 200, 4, 16_384))
    assert n == sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert needed == round(16 * n / 1e9) and has == round(memory / 1e9)
    for layers, cuda in ((0.9, False), (1.1, False), (3.6, True), (4.4, True)):
        argv = f"--preset toy --n-embd 4096 --n-layer {layers * memory / 16 / 12 / 4096**2:.0f}"
        if layers in (0.9, 3.6):  # with CUDA, gradients and moments are not in the CPU's memory
            parse(argv.split(), cuda)
        else:
            with pytest.raises(UserError, match="machine"):
                parse(argv.split(), cuda)
    parse("--preset toy --n-embd 16384 --n-layer 200 --init gpt2".split(), False)  # its own sizes
