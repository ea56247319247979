"""Laws of experiments/ood.py: the prompts have unseen words, the measures are exact for r*, and a
killed stage over several seeds resumes."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import KILL, TINY, command, folder, refused, same, stopped
from test_plot_frontier import assert_nothing_is_cut_off, errorbars_of, labels, saved_by

from evaluate import held_out_measures, standard_error
from experiments import ood
from experiments.ood import SETS, TEST, draw, ordered_pairs, over_seeds, share, with_error
from job import Job
from support.toy_reviews import GRAMMAR, INTENSIFIERS, LEXICON, POLAR, UNSEEN, expand, reviews

COMMON = set("a and at came found has i in is my of the this was we with".split())
TEXTS = {name: " ".join(sum(symbols.values(), [])) for name, symbols in UNSEEN.items()}
NEW = {name: set(re.findall(r"\w+", re.sub(r"\{.*?\}", " ", text).lower())) - COMMON
       for name, text in TEXTS.items()}


# ------------------------------------------------------------------------------ the words


def test_no_review_has_an_unseen_word_and_no_unseen_word_is_polar():
    corpus = set(re.findall(r"\w+", " ".join(reviews(20_000, 0)).lower()))
    for name, new in NEW.items():
        assert len(new) > 25 and not new & corpus, f"{name}: {sorted(new & corpus)} are in reviews"
        assert not new & {*LEXICON, *INTENSIFIERS, "not", "but", "although"}, name


@pytest.mark.parametrize("name", UNSEEN)
def test_an_opener_with_unseen_words_is_a_sentence_with_the_right_articles(name):
    rng, grammar, seen = random.Random(0), GRAMMAR | UNSEEN[name], set()
    assert {symbol for options in grammar.values() for option in options
            for symbol in re.findall(r"\{-?(\w+)", option)} <= {*grammar, *POLAR}
    for i in range(2000):
        text, _ = expand("opener", (-1) ** i, rng, set(), grammar)
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}*]", text), text
        words = set(re.findall(r"\w+", text.lower())) & NEW[name]
        assert words and text.endswith("."), text
        seen |= words
    assert seen == NEW[name], f"never used: {NEW[name] - seen}"


@pytest.mark.parametrize("name", UNSEEN)
def test_c1_nearly_every_prompt_has_a_whole_unseen_word_and_leaves_room(job, name):
    job.reference_eval = dict(prompts=[[0]] * 500)
    prompts = ood.unseen_prompts(job, name)
    assert prompts == ood.unseen_prompts(job, name), "a killed run draws the same"
    texts = [job.data.enc.decode(p[1:]) for p in prompts]
    whole = [text for text in texts if set(re.findall(r"\w+", text.lower())) & NEW[name]]
    assert len(prompts) == 500 and len(whole) > 480, sorted({*texts} - {*whole})
    for prompt, text in zip(prompts, texts):
        assert prompt[0] == job.data.eot not in prompt[1:] and len(text.split()) <= 8
        assert len(prompt) + job.cfg.max_new_tokens <= job.cfg.n_ctx, "no room for a completion"
    assert len({*texts}) > 200 and {len(text.split()) for text in texts} >= {3, 4, 5, 6, 7, 8}


# ------------------------------------------------------------------------------ the measures


def test_accuracy_counts_all_pairs_of_a_prompt():
    torch.manual_seed(0)
    scores, rewards = torch.randint(3, (5, 6)), torch.randint(4, (5, 6))
    rewards[2] = 1  # all are equal: no pair
    right, pairs = ordered_pairs(scores, rewards)
    for s, r, *found in zip(scores.tolist(), rewards.tolist(), right.tolist(), pairs.tolist()):
        each = [(a, b) for a in range(6) for b in range(6) if r[a] > r[b]]
        assert found == [sum((s[a] > s[b]) + 0.5 * (s[a] == s[b]) for a, b in each), len(each)]
    assert pairs[2] == 0 < pairs[1]
    usual = held_out_measures(scores.flatten().float(), torch.zeros(30), rewards)["accuracy"]
    assert float(right.sum() / pairs.sum()) == pytest.approx(usual), "train.py's measure"


def test_the_jackknife_error_is_the_standard_error_of_a_mean_and_the_spread_of_a_ratio():
    generator = torch.Generator().manual_seed(0)
    start, reached, best = draws = torch.rand(3, 400, 300, generator=generator).double() + \
        torch.tensor([0.0, 1.0, 2.0])[:, None, None]  # 400 draws of 300 prompts
    assert with_error(float, start[0]) == pytest.approx(
        [float(start[0].mean()), standard_error(start[0])])
    found = [with_error(share, *draws[:, i]) for i in range(20)]
    spread = float(((reached - start).mean(1) / (best - start).mean(1)).std())
    for value, error in found:
        assert value == pytest.approx(0.5, abs=5 * spread) and error == pytest.approx(spread, 0.2)
    assert share(0.4, 0.7, 1.0) == pytest.approx(0.5)
    assert with_error(share, best[0], reached[0], best[0]) == [None, None], "the gain is 0"


def test_r_star_is_a_perfect_reward_model_and_pi_ref_an_indifferent_one(job, monkeypatch):
    policy = Job.policy
    monkeypatch.setattr(Job, "policy", lambda job, stage: policy(job, "sft"))
    monkeypatch.setattr(ood, "learned_reward", lambda job: lambda *x: 2 * job.reward(*x) + 1)
    for name in SETS:
        found = ood.measure(job, name)["measures"]
        assert found["accuracy: r_φ"] == found["gain: best of 8 by r_φ"] == [1, 0]
        assert found["r*: best of 8 by r_φ"] == found["r*: best of 8 by r*"]
        assert found["accuracy: r̂"] == [0.5, 0] and found["KL: DPO's samples"] == [0, 0]
        (a, se_a), (b, se_b) = (found[f"r*: {x}'s samples"] for x in ("π_ref", "DPO"))
        assert abs(a - b) < 5 * (se_a**2 + se_b**2) ** 0.5, "both are π_ref's samples"


# ------------------------------------------------------------------------------ the stage


FLAGS = [*TINY, *"--stage ood --ood-seeds 2 --best-of 6 --dpo-steps 12 --dpo-lr 0.003".split()]


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("ood") / "out"
    for stage in ("sft", "groups"):
        shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
    result = command(*FLAGS, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    return out, result.out


def test_the_stage_measures_every_seed_and_set_and_prints_a_table(made):
    out, text = made
    run = folder(out, "ood")
    table = json.loads((run / "ood.json").read_text())
    assert [(row["seed"], row["prompts"]) for row in table["rows"]] == [
        (seed, name) for seed in (0, 1) for name in SETS]
    first, *others = (row["measures"] for row in table["rows"])
    assert len(first) == 11 and all(row.keys() == first.keys() for row in others)
    assert len({str(row) for row in [first, *others]}) == 6, "every seed and set has other samples"
    for row in [first, *others]:
        assert row["KL: DPO's samples"][0] > 0
        by = [row[f"r*: best of 6 by {x}"][0] for x in ("r̂", "r_φ", "r*")]
        assert max(by) == by[2] > row["r*: π_ref's samples"][0]
    lines = text[text.index("seeds: 2"):text.index("DPO's first")].splitlines()
    assert max(map(len, lines)) <= 100 and {*lines[1].split()} == {*" ".join(SETS).split()}
    shown = {key: next(x for x in lines if x.startswith(key + " ")) for key in first}
    assert len({len(x.replace("r̂", "r")) for x in shown.values()}) == 1, "r̂ is one column wide"
    for key, line in shown.items():
        cells = ["{:.3f} ±{:.3f}".format(*over_seeds(table, name, key)) for name in SETS]
        assert line.split()[-6:] == " ".join(cells).split()
    assert all(f"{name}: " in text for name in SETS)
    assert (run / "ood.png").exists()
    names = [path.name for path in (out / "toy").iterdir()]
    for stage in ("sft", "groups", "dpo", "rm"):
        assert sum(name.startswith(stage) and "-seed1-" in name for name in names) == 1, stage


def test_a_killed_run_resumes_and_ends_the_same(made, chain, tmp_path):
    shutil.copytree(made[0], tmp_path / "out")
    run = folder(tmp_path / "out", "ood")
    shutil.rmtree(run)
    argv = [*FLAGS, "--out", tmp_path / "out", "--data", chain.data]
    stopped([*argv, "--save-secs", 0], KILL, "log", n=4)
    result = command(*argv)
    assert result.code == 0 and "going on at step 3 of 6" in result.out, result.err
    same(run, folder(made[0], "ood"))


@pytest.mark.parametrize("flags", [["--corpus", "imdb"], ["--groups", "my.jsonl"]])
def test_without_the_grammar_of_the_toy_corpus_it_is_refused(tmp_path, flags):
    refused(command("--stage", "ood", *TINY, *flags, "--out", tmp_path), "--stage ood", "grammar",
            "leave --corpus and --groups out")


# ------------------------------------------------------------------------------ the figure


def world() -> dict:
    """Two seeds, 0.02 apart; the second has no optimum on the last set of prompts."""
    keys = ["accuracy: r̂", "accuracy: r_φ", "gain: best of 8 by r̂", "gain: best of 8 by r_φ",
            "gain: DPO's samples", "r*: π_ref's samples"]
    rows = [dict(seed=seed, prompts=name, example="", measures={
        key: [0.9 - 0.05 * s - 0.03 * k + 0.02 * seed, 0.03] for k, key in enumerate(keys)})
        for seed in (0, 1) for s, name in enumerate(SETS)]
    rows[-1]["measures"]["gain: DPO's samples"] = [None, None]
    return dict(P=384, N=8, rows=rows)


def test_a_measure_over_seeds_has_a_mean_an_error_and_a_range():
    assert over_seeds(world(), TEST, "accuracy: r_φ") == pytest.approx(
        (0.88, 0.03 / 2**0.5, 0.87, 0.89))
    assert over_seeds(world(), [*SETS][-1], "gain: DPO's samples") is None


def test_the_figure_shows_means_and_ranges_and_nothing_is_cut_off(tmp_path):
    figure = saved_by(lambda: draw(world(), Path(tmp_path / "ood.png")))
    pairs, gains = figure.axes
    assert [len(errorbars_of(ax)) for ax in figure.axes] == [2, 3]
    for ax, keys in ((pairs, ["accuracy: r̂", "accuracy: r_φ"]),
                     (gains, ["gain: best of 8 by r̂", "gain: best of 8 by r_φ"])):
        assert [t.get_text() for t in ax.get_xticklabels()] == list(SETS) and ax.get_ylabel()
        for bars, key in zip(errorbars_of(ax), keys):
            found = [over_seeds(world(), name, key) for name in SETS]
            assert bars.lines[0].get_ydata() == pytest.approx([mean for mean, *_ in found])
            ends = [tuple(s[:, 1]) for s in bars.lines[2][0].get_segments()]
            assert sum(ends, ()) == pytest.approx(sum((x[2:] for x in found), ()))
    assert len(errorbars_of(gains)[2].lines[0].get_ydata()) == 2, "a set has no value"
    assert len(labels(figure)) == 3 and "best of 8" in gains.get_title()
    assert "Seeds: 2" in figure.get_supxlabel() and "384 prompts" in figure.get_supxlabel()
    assert_nothing_is_cut_off(figure)
