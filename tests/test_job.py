"""Laws of job.py: the name of a run's folder, what a stage loads, and samples that depend only on
their seed."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import folder

from data_imdb import encoding_of
from evaluate import evaluate
from gpt import GPT, GPTConfig
from job import Job, matmul_rate, seed_of
from reward import ToyReward
from support import hf_gpt2
from support.runs import Run, UserError
from support.settings import PRESETS
from support.tokenizer_files import read_tiktoken

V, EOT = 30, 29
PROMPTS = [[EOT, *range(i % 5 + 1)] for i in range(13)]


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def sampler(**changes):
    """A Job without a corpus. Its vocabulary has V tokens."""
    changes = dict(device="cpu", max_new_tokens=20, n_ctx=32) | changes
    job = Job("toy", replace(PRESETS["toy"], **changes), [])
    job.data = SimpleNamespace(eot=EOT, enc=SimpleNamespace(n_vocab=V))
    return job


def model(seed=0, vocab=V, n_ctx=32):
    torch.manual_seed(seed)
    made = GPT(GPTConfig(vocab, n_ctx, 1, 2, 16))
    with torch.no_grad():  # larger than the first weights, so that samples differ
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


# ------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", PRESETS)
def test_a_folder_of_the_presets_own_settings_has_no_suffix(name):
    job = Job(name, PRESETS[name], [])
    for stage in "sft", "dpo", "ppo", "frontier":
        assert job.folder(stage) == job.root / stage and job.root.parts[-1] == name
    other = Job(name, replace(PRESETS[name], loss="unlikelihood"), [])
    assert other.folder("unlikelihood") == job.root / "unlikelihood"
    assert job.cfg.precision != "auto", "the identity must name the precision"
    assert (job.device.type == "cuda") == torch.cuda.is_available()


def test_a_folder_shows_the_settings_of_its_stage_that_differ_from_the_preset():
    job = Job("toy", replace(PRESETS["toy"], device="cpu", beta=0.5, weight="constant", sft_lr=0.01,
                             ppo_steps=9, dpo_accum=3, save_secs=1, out="elsewhere"), [])
    assert job.root.parts == ("elsewhere", "toy")
    assert job.folder("sft").name == "sft-sft_lr0.01"
    assert job.folder("dpo").name == "dpo-sft_lr0.01-constant-beta0.5"
    assert job.folder("ppo").name == "ppo-sft_lr0.01-ppo_steps9"
    half = Job("toy", replace(job.cfg, precision="bf16"), [])
    assert half.folder("sft").name == "sft-bf16-sft_lr0.01"


def test_a_job_beside_has_other_settings_and_shares_what_is_loaded(job):
    shared = "data", "reward", "groups", "split", "ref_logps", "reference_eval", "hashes"
    loaded = [getattr(job, name) for name in shared]
    other = job.beside(replace(job.cfg, beta=9.0))
    assert all(getattr(other, name) is x for name, x in zip(shared, loaded))
    assert other.cfg.beta == 9.0 != job.cfg.beta
    assert other.folder("sft") == job.folder("sft") and other.folder("dpo") != job.folder("dpo")


def test_draws_differ_by_seed_name_and_step():
    cfgs = [replace(PRESETS["toy"], seed=seed) for seed in (0, 1)]
    draws = itertools.product(cfgs, ("sft", "dpo"), (0, 1, "epoch 0"))
    assert len({seed_of(*draw) for draw in draws}) == 12
    assert seed_of(cfgs[0], "sft", 1) == seed_of(replace(cfgs[0], beta=3.0), "sft", 1)


# ------------------------------------------------------------------------------ data and models


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_policy_is_the_runs_model_with_the_dropout_asked_for(chain, job):
    saved = GPT.load(folder(chain.out, "dpo") / "model.pt")
    assert same_weights(job.policy("dpo"), saved)
    assert job.policy("dpo").config.dropout == 0 and job.policy("dpo", 0.3).config.dropout == 0.3


def test_the_reference_is_a_new_copy_of_the_sft_model_each_time(job):
    """Training π_θ, which starts as a copy, must not change π_ref."""
    reference, policy = job.load_reference(), job.load_reference()
    assert same_weights(reference, job.policy("sft"))
    policy.wte.weight.data += 1
    assert same_weights(job.load_reference(), job.policy("sft"))


def test_a_users_reference_is_a_run_or_a_hugging_face_folder(chain, job, tmp_path):
    hf_gpt2.save(job.policy("dpo"), tmp_path / "hf")
    for place in folder(chain.out, "dpo"), tmp_path / "hf":
        other = job.beside(replace(job.cfg, groups="pairs.jsonl", reference=str(place)))
        assert same_weights(other.load_reference(), job.policy("dpo")), place


@pytest.mark.parametrize("vocab, n_ctx, words", [
    (V + 1, 32, "31 tokens.* 30: give the --vocab"), (V, 24, "context of 24.*32: give --n-ctx 24")])
def test_a_model_of_another_vocabulary_or_a_shorter_context_is_refused(vocab, n_ctx, words):
    with pytest.raises(UserError, match=f"^out/x has .*{words}"):
        sampler().check_compatible(model(vocab=vocab, n_ctx=n_ctx), "out/x")
    longer = model(n_ctx=64)
    assert sampler().check_compatible(longer, "out/x") is longer


def test_the_groups_are_read_with_their_split_and_log_probs(chain, job):
    assert isinstance(job.reward, ToyReward)
    train, held = job.split
    assert sorted(train + held) == list(range(len(job.groups.rewards)))
    assert job.ref_logps.shape == job.groups.rewards.shape and job.groups.has_reward
    assert len(job.reference_eval["prompts"]) == 8 and job.reference_eval["optimum"]


def test_a_saved_policy_carries_its_tokenizer_and_finishes_the_run(job, tmp_path):
    with Run(tmp_path, {}, {}) as run:
        run.checkpoint(dict(step=1))
        job.save_policy(run, job.policy("dpo", 0.3))
        assert run.finished and not run.path("resume.pt").exists()
    enc = encoding_of(read_tiktoken(tmp_path / "bpe.tiktoken"))
    saved = GPT.load(tmp_path / "model.pt")
    text = "I found The Silent Harbour truly dull."
    assert enc.encode_ordinary(text) == job.data.enc.encode_ordinary(text)
    assert same_weights(saved, job.policy("dpo")) and saved.config.dropout == 0


# ------------------------------------------------------------------------------ sampling


def test_samples_depend_on_neither_threads_nor_batches(three_threads):
    whole = sampler().sample(model(), PROMPTS, seed=1)
    assert len(whole) == 13 and all(1 <= len(y) <= 20 for y in whole)
    torch.set_num_threads(1)
    assert sampler().sample(model(), PROMPTS, seed=1) == whole, "with one thread"
    few = sampler(max_new_tokens=20, groups="pairs.jsonl", n_ctx=2_000_000)
    assert few.batch_size(model()) == 2 and few.sample(model(), PROMPTS, seed=1) == whole
    assert sampler().sample(model(), PROMPTS[:4], seed=1) == whole[:4], "with fewer prompts"
    assert sampler().sample(model(), PROMPTS, seed=2) != whole
    cold = sampler().sample(model(), PROMPTS, seed=1, temperature=0.5)
    assert cold == model().sample(PROMPTS, 20, EOT, 1, temperature=0.5) != whole


def test_threads_sample_under_the_autocast_of_the_job(three_threads):
    half, net = sampler(precision="bf16"), model()
    with half.autocast():  # the same parts in one thread
        plain = net.sample(PROMPTS, 20, EOT, 1, batch_size=5)
    assert half.sample(net, PROMPTS, seed=1) == plain != sampler().sample(net, PROMPTS, seed=1)


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_torch_has_as_many_threads_after_sampling_as_before(three_threads, threads):
    torch.set_num_threads(threads)
    sampler().sample(model(), PROMPTS, seed=1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads, "in every new thread"
    with pytest.raises(TypeError):  # also after an error in a thread
        sampler().sample(model(), PROMPTS[:1], seed=1, temperature="hot")
    assert torch.get_num_threads() == threads


def test_a_cache_of_a_batch_has_bounded_memory():
    for max_new, n_ctx, groups in (9_000, 256, ""), (64, 256, ""), (20, 10_240, "pairs.jsonl"):
        job = sampler(max_new_tokens=max_new, n_ctx=n_ctx, groups=groups)
        length = n_ctx if groups else 9 + max_new  # a preference file's prompts may be long
        n, row = job.batch_size(model()), 2 * 16 * 4 * length  # keys and values of 16 channels
        assert n == 1_000 or n * row <= job.memory() / 10 < (n + 1) * row
    assert sampler(max_new_tokens=20).batch_size(model()) == 1_000
    assert sampler(max_new_tokens=10**8).batch_size(model()) == 1


def test_a_larger_model_is_sampled_in_smaller_batches():
    one, three = model(), GPT(GPTConfig(V, 32, 3, 2, 16))
    whole, half = (sampler(max_new_tokens=9_000, precision=p) for p in ("fp32", "bf16"))
    assert whole.batch_size(three) == whole.batch_size(one) // 3
    assert half.batch_size(one) // 2 == whole.batch_size(one), "two bytes per number"


def test_threads_share_the_memory_and_the_prompts(three_threads):
    class Recorder:
        config = model().config

        def sample(self, *args, batch_size, parallel):
            return batch_size

    few = sampler(max_new_tokens=160_000)
    assert few.batch_size(Recorder) == 26 and few.sample(Recorder(), PROMPTS * 9, seed=1) == 26 // 3
    assert sampler().sample(Recorder(), PROMPTS, seed=1) == 5, "13 prompts in three parts"


# ------------------------------------------------------------------------------ evaluation


def test_evaluations_use_the_same_uniforms_for_every_policy(chain, job):
    policy, reference, prompts = job.policy("dpo"), job.policy("sft"), [[EOT, 5]] * 4 + PROMPTS
    point = job.evaluate(policy, reference, prompts)
    seed = seed_of(job.cfg, "evaluate")
    plain = evaluate(policy, reference, prompts, job.reward, lambda model, prompts, temperature:
                     model.sample(prompts, 24, job.data.eot, seed), job.data.eot)
    assert point["seconds"] >= 0 and point["completions"] == plain["completions"]
    for key in plain.keys() - {"completions", "kls", "rewards"}:
        assert point[key] == pytest.approx(plain[key], abs=1e-5), key
    again = job.evaluate(reference, reference, prompts)
    assert again["kl"] == pytest.approx(0, abs=1e-6)
    assert again["completions"] == reference.sample(prompts, 24, job.data.eot, seed)
    cold = job.evaluate(policy, reference, prompts, temperature=0.0)
    assert cold["temperature"] == 0 and len(set(map(str, cold["completions"][:4]))) == 1
    theirs = job.beside(replace(job.cfg, groups="pairs.jsonl"))
    assert theirs.evaluate(policy, reference, prompts)["reward"] is None, "there is no r*"


def test_the_precision_and_the_rate_that_mfu_is_relative_to():
    x = torch.ones(8, 8)
    for precision, dtype in dict(fp32=torch.float32, bf16=torch.bfloat16,
                                 fp16=torch.float16).items():
        with sampler(precision=precision).autocast():
            assert (x @ x).dtype == dtype
        rate = matmul_rate(torch.device("cpu"), precision)
        assert 1e6 < rate < 1e16 and matmul_rate(torch.device("cpu"), precision) == rate
