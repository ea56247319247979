"""Laws of stages.py: what each stage writes, and that every number in it can be found again."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import TINY, command, folder, refused

import data_imdb
import stages
import train
from gpt import GPT
from pipeline import STAGES
from reward import ToyReward
from stages import (
    Context,
    completions_of,
    gather_groups,
    held_out_measures,
    lm_tokens,
    score,
    split_prompts,
    validation_loss,
)
from support.runs import UserError, file_hash, load_tensors
from support.settings import PRESETS, parse


@pytest.fixture
def ctx(chain):
    argv = [*TINY, "--out", str(chain.out), "--data", str(chain.data)]
    _, preset, _, settings = parse(argv, STAGES, False)
    return Context(preset, settings, argv)


def read(path):
    return json.loads(path.read_text())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ what is written


FILES = {
    "sft": {"config.json", "metrics.jsonl", "model.pt", "bpe.tiktoken"},
    "groups": {"config.json", "groups.jsonl", "ref_logps.pt", "reference.json"},
    "dpo": {"config.json", "metrics.jsonl", "model.pt", "bpe.tiktoken", "result.json",
            "samples.txt", "curves.png"}}


@pytest.mark.parametrize("stage", FILES)
def test_a_stage_leaves_its_files_and_nothing_half_done(chain, stage):
    names = {f.name for f in folder(chain.out, stage).iterdir()} - {".lock"}
    assert names - {"metrics.jsonl"} == FILES[stage] - {"metrics.jsonl"}


@pytest.mark.parametrize("stage", FILES)
def test_config_says_what_was_run(chain, stage):
    run = folder(chain.out, stage)
    config = read(run / "config.json")
    assert config["settings"]["n_embd"] == 16 and config["settings"]["precision"] == "fp32"
    assert ("beta" in config["settings"]) == (stage == "dpo"), "a later stage's setting"
    assert not {"out", "data", "threads"} & config["settings"].keys(), "where, and not what"
    about = config["about"]
    assert about["command"][: len(TINY)] == TINY and about["preset"] == "toy"
    assert about["torch"] == torch.__version__ and about["threads"] == 1
    assert about["device"].endswith("CPU") and about["python"].startswith("3.")
    parents = {"sft": set(), "groups": {"sft"}, "dpo": {"sft", "groups"}}[stage] | {"data"}
    assert config["parents"].keys() == parents
    for name in parents - {"data"}:
        assert config["parents"][name] == file_hash(folder(chain.out, name) / STAGES[name].final)


def test_a_policy_carries_its_tokenizer_and_its_configuration(chain, ctx):
    for stage in "sft", "dpo":
        run = folder(chain.out, stage)
        enc, net = data_imdb.load_encoding(run / "bpe.tiktoken"), GPT.load(run / "model.pt")
        text = "I found The Silent Harbour truly dull."
        assert enc.encode_ordinary(text) == ctx.data.enc.encode_ordinary(text)
        assert net.config.vocab_size == enc.n_vocab and net.config.n_ctx == 48
        assert net.config.dropout == 0, "a checkpoint samples without dropout"


def test_groups_can_be_read_by_a_human_and_found_again(chain, ctx):
    run = folder(chain.out, "groups")
    rows = [json.loads(line) for line in (run / "groups.jsonl").read_text().splitlines()]
    assert len(rows) + read(run / "reference.json")["notes"]["equal rewards"] == 40
    enc, judge = ctx.data.enc, ToyReward(ctx.data.enc)
    for row in rows:
        assert row.keys() == {"prompt", "completions", "rewards", "prompt_ids", "completion_ids"}
        assert row["prompt_ids"][0] == enc.eot_token and 3 <= len(row["prompt_ids"]) <= 9
        assert enc.decode(row["prompt_ids"][1:]) == row["prompt"]
        assert len(row["completions"]) == 4 and len(set(row["rewards"])) > 1
        again = judge([row["prompt_ids"]] * 4, row["completion_ids"])
        assert row["rewards"] == pytest.approx(again.tolist(), abs=1e-6), "r* of another text"
        for ids in row["completion_ids"]:
            assert len(ids) <= 24 and enc.eot_token not in ids[:-1], "goes on after its end"
    assert any(f"{len(rows)} of 4 completions" in line for line in chain.text.splitlines())


def test_reference_log_probs_are_those_of_the_reference(chain, ctx):
    """By a plain forward pass of one completion at a time: no batch, no mask, no padding."""
    run, net = folder(chain.out, "groups"), GPT.load(folder(chain.out, "sft") / "model.pt").eval()
    made = data_imdb.read_groups(run / "groups.jsonl", ctx.data.enc, 48)
    stored = load_tensors(run / "ref_logps.pt")["ref_logps"]
    assert stored.shape == (len(made.rewards), 4)
    for i in range(0, len(stored), 7):
        for k in range(4):
            ids, n = made.prompt_ids[i] + made.completion_ids[i][k], len(made.prompt_ids[i])
            with torch.no_grad():
                logp = net(torch.tensor([ids]))[0].log_softmax(-1)
            plain = sum(logp[t - 1, ids[t]].item() for t in range(n, len(ids)))
            assert stored[i, k].item() == pytest.approx(plain, abs=1e-3)


def test_scores_do_not_depend_on_the_company(ctx, three_threads):
    net, made = ctx.reference, ctx.groups
    prompts = [p for p in made.prompt_ids for _ in range(4)]
    flat = [c for cs in made.completion_ids for c in cs]
    whole = score(ctx, net, prompts, flat)
    ctx.rows = lambda: 3
    assert torch.allclose(whole, score(ctx, net, prompts, flat), atol=1e-4)
    order = np.random.default_rng(0).permutation(len(flat))
    shuffled = score(ctx, net, [prompts[i] for i in order], [flat[i] for i in order])
    assert torch.allclose(shuffled, whole[order], atol=1e-4), "scores in another order"


def test_evaluation_prompts_are_no_training_prompts(chain, copied, monkeypatch):
    """Of 250 short prefixes some recur in the test reviews: those are drawn again, and counted."""
    drawn, out = [], copied("sft")
    draw = data_imdb.sample_prompts
    monkeypatch.setattr(data_imdb, "sample_prompts",
                        lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    argv = "--stage groups --prompts 250 --completions 2 --max-new 8 --optimum 2".split()
    result = command(*TINY, *argv, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    (train, _), (held_out, again), (valid, _) = drawn
    before = read(folder(out, "groups") / "reference.json")
    assert before["prompts"] == held_out and len(held_out) == 8
    for one, other in ((train, held_out), (train, valid), (held_out, valid)):
        assert not set(map(tuple, one)) & set(map(tuple, other))
    assert again > 0 and f"evaluation prompts drawn again {again}" in result.out


def test_a_tenth_of_the_groups_is_never_trained_on(chain, ctx, copied, monkeypatch):
    seen, batches = [], stages.preference_batches
    monkeypatch.setattr(stages, "preference_batches", lambda made, logps, train, s: (
        seen.append(train), batches(made, logps, train, s))[1])
    out = copied("sft", "groups")
    assert command(*TINY, "--dpo-steps", 1, "--out", out, "--data", chain.data).code == 0
    train, held = split_prompts(ctx.groups.prompt_ids)
    assert seen == [train] and len(held) >= 2 and not set(train) & set(held)


@pytest.mark.parametrize("stage, flags, parts", [
    ("sft", "--sft-steps 1 --sft-accum 2 --dropout 0", 6), ("sft", "--sft-steps 1", 1),
    ("dpo", "--dpo-steps 1", 3)], ids=["sft", "dropout", "dpo"])
def test_every_core_has_micro_batches(chain, copied, monkeypatch, three_threads, stage, flags,
                                      parts):
    """Not under dropout, which draws for one after another."""
    seen, backward = set(), train.backward
    monkeypatch.setattr(train, "backward", lambda model, micros, *rest: (
        seen.add(len(micros)), backward(model, micros, *rest))[1])
    out = copied("sft", "groups") if stage == "dpo" else copied()
    result = command(*TINY, "--threads", 3, "--stage", stage, *flags.split(), "--out", out,
                     "--data", chain.data)
    assert result.code == 0 and seen == {parts}, result.err


def test_the_reference_is_a_point_at_no_distance_from_itself(chain):
    before = read(folder(chain.out, "groups") / "reference.json")
    point = before["point"]
    assert point["kl"] == pytest.approx(0, abs=1e-6) == pytest.approx(point["kl_mc"], abs=1e-4)
    assert len(point["completions"]) == len(point["rewards"]) == 8
    best = before["optimum"]
    assert best[0]["kl"] < best[-1]["kl"] and best[0]["reward"] < best[-1]["reward"]
    assert 4 >= best[0]["ess"] > best[-1]["ess"] >= 1, "of 4 samples a prompt"


def test_the_result_is_the_last_evaluation_and_can_be_computed_again(chain, ctx):
    run = folder(chain.out, "dpo")
    result, rows = read(run / "result.json"), metrics(run)
    wanted = {"reward", "reward_se", "kl", "kl_se", "kl_mc", "kl_mc_se", "length", "length_se",
              "eos", "repetition", "distinct2", "grammatical", "ref_ppl", "accuracy", "samples",
              "temperature", "seconds", "rewards", "kls"}
    assert wanted <= result.keys(), wanted - result.keys()
    assert len(result["rewards"]) == len(result["kls"]) == result["samples"] == 8
    last = [r["eval"] for r in rows if "eval" in r][-1]
    assert last == result
    prompts = read(folder(chain.out, "groups") / "reference.json")["prompts"]
    again = ctx.evaluate(ctx.policy("dpo").eval(), ctx.policy("sft").eval(), prompts)
    for key in ("reward", "kl", "kl_mc", "length", "eos", "grammatical"):
        assert again[key] == pytest.approx(result[key], abs=1e-5), key
    assert 0 <= result["accuracy"] <= 1 and result["kl"] > 0


def test_dpo_starts_at_log_2_and_moves(chain):
    run = folder(chain.out, "dpo")
    rows = [r for r in metrics(run) if "eval" not in r]
    assert [r["step"] for r in rows] == list(range(6))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["weight_5"] == pytest.approx(0.5, abs=1e-5) == \
        pytest.approx(rows[0]["weight_95"], abs=1e-5)
    a, b = (load_tensors(folder(chain.out, x) / "model.pt")["model"] for x in ("sft", "dpo"))
    assert not torch.equal(a["wte.weight"], b["wte.weight"])


def test_the_table_shows_the_files_numbers(chain):
    result = read(folder(chain.out, "dpo") / "result.json")
    point = read(folder(chain.out, "groups") / "reference.json")["point"]
    lines = chain.text.splitlines()
    (head,) = [line for line in lines if "reward r*" in line]
    for column in ("KL, nats", "length", "ended", "repeated", "grammatical", "held-out acc."):
        assert column in head
    for name, row in (("π_ref", point), ("π_θ, β 0.5", result)):
        (line,) = [line for line in lines if line.startswith(name)]
        for key in ("reward", "kl", "length", "eos", "repetition", "grammatical"):
            assert f"{row[key]:.3f}" in line, f"{key} in {line!r}"
    assert f"{result['accuracy']:.3f}" in line
    assert any(line.startswith("optimum at that KL") for line in lines)
    for name in ("curves.png", "samples.txt"):
        assert str(folder(chain.out, "dpo") / name) in chain.text, f"{name}'s path is not printed"


def test_samples_stand_side_by_side(chain, ctx):
    text = (folder(chain.out, "dpo") / "samples.txt").read_text()
    before = read(folder(chain.out, "groups") / "reference.json")
    blocks = text.strip("\n").split("\n\n")
    assert len(blocks) == 8
    for block, prompt in zip(blocks, before["prompts"]):
        assert block.startswith("prompt:  " + ctx.data.enc.decode(prompt[1:]))
        assert re.search(r"\nbefore:  r\* [01]\.\d\d \|", block)
        assert re.search(r"\nafter:   r\* [01]\.\d\d \|", block)
    assert blocks[0] in chain.text, "no sample is shown at the end"
    assert (folder(chain.out, "dpo") / "curves.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------ the pieces


def test_sft_validates_on_reviews_that_it_has_not_seen(chain, ctx):
    """Nats per token, equal to a plain loop over the reviews, and falling."""
    net, tokens = ctx.policy("sft").eval(), ctx.data.tokens["valid"]
    nll, n = 0.0, 0
    starts, lengths = tokens.windows(48)
    for start, length in zip(starts, lengths):
        ids = torch.from_numpy(tokens.stream[start : start + length + 1].astype(np.int64))
        with torch.no_grad():
            logp = net(ids[None, :-1])[0].log_softmax(-1)
        nll -= logp.gather(-1, ids[1:, None]).sum().item()
        n += int(length)
    assert validation_loss(ctx, net) == pytest.approx(nll / n, rel=1e-4)
    losses = [r["eval"]["loss"] for r in metrics(folder(chain.out, "sft")) if "eval" in r]
    assert losses[-1] == pytest.approx(nll / n, rel=1e-4) and losses[-1] < losses[0]
    assert f"validation loss {losses[-1]:.3f} nats/token" in chain.text


def test_one_stream_of_train_and_unsup(ctx):
    tokens = lm_tokens(ctx.data)
    assert len(tokens) == len(ctx.data.tokens["train"])
    a = data_imdb.Tokens(np.array([9, 1, 2, 9, 3, 9], np.uint16), np.array([0, 3, 5]))
    b = data_imdb.Tokens(np.array([9, 4, 9, 5, 6, 9], np.uint16), np.array([0, 2, 5]))
    ctx.data.tokens, kept = {**ctx.data.tokens, "train": a, "unsup": b}, ctx.data.tokens
    try:
        both = lm_tokens(ctx.data)
    finally:
        ctx.data.tokens = kept
    assert [x.tolist() for x in both] == [[9, 1, 2], [9, 3], [9, 4], [9, 5, 6]]
    assert both.stream[-1] == 9, "the last review's end"


def test_a_tenth_of_the_prompts_is_held_out_whatever_their_order():
    rng = np.random.default_rng(0)
    prompts = [[0, int(i)] for i in rng.integers(0, 100, 300)]  # many twice
    train, held = split_prompts(prompts)
    distinct = {tuple(p) for p in prompts}
    assert sorted(train + held) == list(range(300))
    away = {tuple(prompts[i]) for i in held}
    assert len(away) == len(distinct) // 10
    assert not away & {tuple(prompts[i]) for i in train}, "a prompt on both sides"
    order = rng.permutation(300)
    _, again = split_prompts([prompts[i] for i in order])
    assert {tuple(prompts[order[i]]) for i in again} == away, "the split depends on the order"
    assert [len(x) for x in split_prompts([[0, 1], [0, 2], [0, 3]])] == [1, 2], "two: an error bar"
    with pytest.raises(UserError, match="2 distinct prompts"):
        split_prompts([[0, 1], [0, 2], [0, 1]])


def test_groups_of_equal_rewards_are_left_out():
    rewards = torch.tensor([[0.1, 0.2], [0.5, 0.5], [0.9, 0.1]]).flatten()
    samples = [[i] for i in range(6)]
    made, equal = gather_groups([[7], [8], [9]], samples, rewards, 2)
    assert made.prompt_ids == [[7], [9]] and equal == 1
    assert made.completion_ids == [[[0], [1]], [[4], [5]]] and made.has_reward
    with pytest.raises(UserError, match="same reward: nothing to prefer"):
        gather_groups([[7]], samples, torch.ones(6), 2)


def test_held_out_accuracy_is_the_share_of_pairs_in_order():
    rewards = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.7]])  # 3 pairs and 2: a tie has no winner
    ref_logps = torch.tensor([-3.0, -4.0, -5.0, -6.0, -7.0, -8.0])
    right = held_out_measures(ref_logps + rewards.flatten(), ref_logps, rewards)
    assert right["accuracy"] == 1 and right["logp_chosen"] == pytest.approx(
        ((-3 + 0.9) * 2 - 5 + 0.5 + 2 * (-8 + 0.7)) / 5)
    assert held_out_measures(ref_logps - rewards.flatten(), ref_logps, rewards)["accuracy"] == 0
    assert held_out_measures(ref_logps, ref_logps, rewards)["accuracy"] == 0.5, "π_ref has no view"
    mixed = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 0.5])  # two of five in order
    assert held_out_measures(ref_logps + mixed, ref_logps, rewards)["accuracy"] == \
        pytest.approx(2 / 5)


def test_the_results_accuracy_is_on_pairs_held_out(chain, ctx):
    made, net = ctx.groups, ctx.policy("dpo").eval()
    _, held = split_prompts(made.prompt_ids)
    stored = load_tensors(ctx.folder("groups") / "ref_logps.pt")["ref_logps"]
    right = total = 0
    for i in held:
        logps = score(ctx, net, *completions_of(made, [i]))
        h = logps - stored[i]
        for a in range(4):
            for b in range(4):
                if made.rewards[i, a] > made.rewards[i, b]:
                    total, right = total + 1, right + bool(h[a] > h[b])
    result = read(folder(chain.out, "dpo") / "result.json")
    assert 0 < total and result["accuracy"] == pytest.approx(right / total, abs=1e-6)


# ------------------------------------------------------------------------------ other ways


@pytest.mark.parametrize("flags, unit", [
    ("--loss plackett-luce", "groups"), ("--weight constant", "pairs"), ("--weight ipo", "pairs"),
    ("--dpo-accum 3 --dpo-optimizer adamw --dpo-schedule cosine --clip 0", "pairs")])
def test_other_losses_run_from_the_same_groups(chain, copied, flags, unit):
    out = copied("sft", "groups")
    result = command(*TINY, *flags.split(), "--dpo-steps", 3, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    assert result.out.count("found in") == 2, "the parents do not depend on DPO's settings"
    rows = metrics(folder(out, "dpo"))
    assert rows[0][f"{unit}_per_s"] > 0
    if "plackett" in flags:
        assert rows[0]["loss"] <= math.log(24) + 1e-4
        assert rows[0]["loss"] > math.log(2), "a ranking of four has more to say than one pair"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_chain_in_half_precision_starts_at_its_reference(chain, tmp_path, precision):
    result = command(*TINY, "--precision", precision, "--dpo-steps", 2, "--out", tmp_path,
                     "--data", chain.data)
    assert result.code == 0, result.err
    rows = metrics(folder(tmp_path, "dpo"))
    assert rows[0]["margin_abs"] < 0.05, "π_ref is scored by another path than π_θ"
    config = read(folder(tmp_path, "sft") / "config.json")
    assert config["settings"]["precision"] == precision


def test_more_micro_batches_change_nothing_but_rounding(chain, tmp_path):
    result = command(*TINY, "--dropout", 0, "--sft-accum", 3, "--stage", "sft", "--out",
                     tmp_path / "a", "--data", chain.data)
    other = command(*TINY, "--dropout", 0, "--stage", "sft", "--out", tmp_path / "b", "--data",
                    chain.data)
    assert result.code == other.code == 0
    one, two = (load_tensors(folder(tmp_path / x, "sft") / "model.pt")["model"] for x in "ab")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-4), name


def test_init_starts_from_a_hugging_face_folder(chain, tmp_path):
    """One step at a vanishing rate: what comes out is what went in."""
    start = GPT.load(folder(chain.out, "sft") / "model.pt")
    start.save_pretrained(tmp_path / "hf")
    argv = [*TINY, "--init", tmp_path / "hf", "--stage", "sft", "--sft-steps", 1, "--sft-lr", 1e-12,
            "--data", chain.data, "--out", tmp_path / "out"]
    assert command(*argv).code == 0
    made = GPT.load(folder(tmp_path / "out", "sft") / "model.pt")
    for (name, a), b in zip(start.named_parameters(), made.parameters()):
        assert torch.allclose(a, b, atol=1e-9), name
    GPT.load(folder(chain.out, "dpo") / "model.pt").save_pretrained(tmp_path / "hf")
    refused(command(*argv), "hf has changed since")


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_own_folder_has_no_suffix(name):
    context = Context(name, PRESETS[name], [])
    assert context.folder("dpo").parts[-2:] == (name, "dpo")
    assert context.s.precision != "auto", "an identity must say what was computed"
    assert (context.device.type == "cuda") == torch.cuda.is_available()
