"""Laws of reward.py: r* is a function of the text, r_φ is read at the last token, and a reward
depends neither on the batch nor on the caller's precision."""

import json
import math

import numpy as np
import pytest
import torch

import data_imdb
from dpo import preference_pairs, reward_model_loss
from gpt import GPT, GPTConfig, pad_rows
from reward import (ModelReward, RewardModel, SiebertReward, ToyReward, crop, label_accuracy,
                    label_batch, label_batches, label_loss, truncate)
from support import toy_reviews
from support.runs import UserError, save_tensors

CONFIG = GPTConfig(vocab_size=20, n_ctx=16, n_layer=2, n_head=2, n_embd=16)
EOS = 19


def random_model(seed: int = 0, config: GPTConfig = CONFIG) -> RewardModel:
    """A reward model whose head is not zero, as after training."""
    torch.manual_seed(seed)
    model = RewardModel(config)
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.score.bias)
    return model.eval()


def random_rows(n: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[EOS, *rng.integers(0, 19, rng.integers(low, high + 1)).tolist()] for _ in range(n)]


# ------------------------------------------------------------------------------ r* of the toy

@pytest.fixture(scope="module")
def enc():
    return data_imdb.train_bpe(toy_reviews.reviews(300, 0), 400)


def halves(enc, reviews):
    """Each review as a prompt, which begins with <|endoftext|>, and a completion."""
    ids = [enc.encode_ordinary(text) for text in reviews]
    return [[enc.eot_token, *x[:5]] for x in ids], [x[5:] for x in ids]


def test_the_toys_reward_is_the_sentiment_of_prompt_and_completion(enc):
    reviews = toy_reviews.reviews(100, 1)
    prompts, completions = halves(enc, reviews)
    got = ToyReward(enc)(prompts, completions)
    assert got.dtype == torch.float32 and got.shape == (100,)
    torch.testing.assert_close(got, torch.tensor(list(map(toy_reviews.sentiment, reviews))))
    ended = ToyReward(enc)(prompts, [c + [enc.eot_token] for c in completions])
    assert torch.equal(got, ended), "<|endoftext|> is no part of the text"
    short = [c[:4] for c in completions]
    texts = [enc.decode(p[1:] + c) for p, c in zip(prompts, short)]
    torch.testing.assert_close(ToyReward(enc)(prompts, short),
                               torch.tensor(list(map(toy_reviews.sentiment, texts))))


def test_the_grammatical_share_is_over_sentences(enc):
    toy = ToyReward(enc)
    assert toy.grammatical(*halves(enc, toy_reviews.reviews(50, 2))) == 1
    good = "The acting was funny."
    texts = [f"{good} {good} {good}", "Was the funny acting."]
    assert toy.grammatical(*halves(enc, texts)) == 3 / 4, "a mean over texts would be 1/2, not 3/4"
    assert toy.grammatical([[enc.eot_token]], [[enc.eot_token]]) == 0, "no sentence at all"


# ------------------------------------------------------------------------------ the model

def test_a_new_model_gives_score_0_and_both_losses_are_log_2():
    model = RewardModel(CONFIG)
    idx, _, lengths = pad_rows(random_rows(8, 1, 15), [[]] * 8)
    scores = model(idx, lengths)
    assert torch.equal(scores, torch.zeros(8))
    yw, yl, _ = preference_pairs(torch.rand(2, 4))
    losses = reward_model_loss(scores, yw, yl)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    total, log = label_loss(model, dict(idx=idx, lengths=lengths, labels=torch.ones(8)))
    assert abs(total.item() - 8 * math.log(2)) < 1e-5 and len(log["loss"]) == 8


def test_the_last_real_token_is_read_and_no_padding():
    model, rows = random_model(), random_rows(12, 1, 15)
    idx, _, lengths = pad_rows(rows, [[]] * 12)
    scores = model(idx, lengths)
    for fill in (7, EOS):
        padded = pad_rows(rows + [[0] * 16], [[]] * 13, fill)
        torch.testing.assert_close(model(padded[0], padded[2])[:12], scores, atol=1e-5, rtol=0)
    for row, score in zip(rows, scores):
        last = model.body.hidden(torch.tensor([row]))[0, -1]
        by_hand = last @ model.score.weight[0] + model.score.bias[0]
        torch.testing.assert_close(score, by_hand, atol=1e-5, rtol=0)
    changed = [row[:-1] + [(row[-1] + 1) % 19] for row in rows]
    other = model(*pad_rows(changed, [[]] * 12)[::2])
    assert ((other - scores).abs() > 1e-4).all(), "another last token, the same score"


def test_under_autocast_the_score_is_not_rounded_to_bf16():
    model = random_model()
    idx, _, lengths = pad_rows(random_rows(256, 3, 15), [[]] * 256)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(idx, lengths)
    assert scores.dtype == torch.float32
    ties = 256 - len(scores.unique())
    assert ties <= 2, f"{ties} of 256 rewards are equal after rounding: bf16 has three digits"


@pytest.mark.parametrize("n_ctx", [4, 16, 40])
def test_the_body_of_a_language_model_with_another_context(n_ctx):
    gpt = GPT(CONFIG).eval()
    model = RewardModel.from_gpt(gpt, n_ctx, dropout=0.1).eval()
    assert model.body.config.n_ctx == n_ctx and model.body.config.dropout == 0.1
    idx = torch.tensor(random_rows(3, 3, 3))
    assert torch.equal(model.body.hidden(idx), gpt.hidden(idx)), "its hidden states differ"
    wpe = model.body.wpe.weight
    assert wpe.shape == (n_ctx, 16)
    for t in range(n_ctx):
        assert torch.equal(wpe[t], gpt.wpe.weight[t % 16]), f"position {t} should repeat {t % 16}"
    with torch.no_grad():
        wpe.add_(1)
    assert not torch.equal(wpe[0], gpt.wpe.weight[0]), "the two models share their weights"


def test_saved_and_loaded_it_gives_the_same_scores(tmp_path):
    model = random_model()
    save_tensors(tmp_path / "model.pt", model.checkpoint())
    again = RewardModel.load(tmp_path / "model.pt").eval()
    assert again.body.config == CONFIG
    batch = pad_rows(random_rows(4, 1, 15), [[]] * 4)
    assert torch.equal(again(batch[0], batch[2]), model(batch[0], batch[2]))


def test_a_file_that_is_no_reward_model_is_named(tmp_path):
    path = tmp_path / "model.pt"
    save_tensors(path, GPT(CONFIG).checkpoint())
    with pytest.raises(UserError, match="model.pt is damaged or .* it has no body.wte.weight"):
        RewardModel.load(path)
    model = random_model()
    with torch.no_grad():
        model.score.weight[0, 3] = math.nan
    save_tensors(path, model.checkpoint())
    with pytest.raises(UserError, match="score.weight holds NaN"):
        RewardModel.load(path)


# ------------------------------------------------------------------------------ trained on labels

def test_truncate_keeps_the_end_of_a_long_review():
    review = np.array([EOS, *range(15)], dtype=np.uint16)
    assert truncate(review, 16) == truncate(review, 99) == review.tolist(), "it fits"
    assert truncate(review, 5) == [EOS, 11, 12, 13, 14], "the end is kept"
    assert truncate(review[:1], 5) == [EOS], "an empty review"
    assert all(type(i) is int for i in truncate(review, 5)), "uint16 could overflow later"


def test_crops_are_consecutive_tokens_from_any_place_in_the_review():
    rng, review = np.random.default_rng(0), np.array([EOS, *range(10)], dtype=np.uint16)
    starts = set()
    for _ in range(200):
        got = crop(review, 4, rng)
        assert got[0] == EOS and len(got) == 5
        assert got[1:] == list(range(got[1], got[1] + 4)), "the tokens are not consecutive"
        starts.add(got[1])
    assert starts == set(range(7)), "a place is never used: perhaps the last one"
    assert crop(review, 10, rng) == crop(review, 50, rng) == review.tolist(), "a short review"
    assert crop(review[:1], 4, rng) == [EOS]


@pytest.mark.parametrize("n_ctx, max_crop", [(64, 24), (16, 24)])
def test_a_step_has_whole_reviews_and_as_many_crops_each_with_its_label(n_ctx, max_crop):
    rng = np.random.default_rng(0)
    tokens = [np.array([99, *[i] * int(rng.integers(1, 80))], dtype=np.uint16) for i in range(50)]
    labels = np.array([i % 2 for i in range(50)], dtype=np.float32)
    lengths = set()
    for _ in range(30):
        whole, crops = label_batches(tokens, labels, 16, n_ctx, max_crop, rng)
        for part, longest in ((whole, n_ctx), (crops, min(n_ctx, max_crop + 1))):
            assert part["idx"].shape[0] == len(part["lengths"]) == len(part["labels"]) == 16
            assert part["idx"].dtype == torch.int64 and part["labels"].dtype == torch.float32
            assert int(part["lengths"].max()) <= longest
            assert (part["idx"][:, 0] == 99).all(), "it must begin with <|endoftext|>"
            for row, n, label in zip(part["idx"], part["lengths"], part["labels"]):
                review = int(row[1])
                assert (row[1:n] == review).all() and label == review % 2, "another's label"
                if part is whole:
                    assert n == min(n_ctx, len(tokens[review])), "a whole review was cropped"
                elif len(tokens[review]) > n_ctx:
                    lengths.add(int(n) - 1)
    assert lengths == set(range(8, min(max_crop, n_ctx - 1) + 1)), "crops of 8 to max_crop tokens"


def test_the_label_loss_is_the_binary_cross_entropy():
    model, labels = random_model(), [1, 0, 1, 0, 0]
    rows = random_rows(5, 1, 15)
    total, log = label_loss(model, label_batch(rows, np.array(labels)))
    z = [model(torch.tensor([row]), torch.tensor([len(row)])).item() for row in rows]
    by_hand = [math.log1p(math.exp(-x if y else x)) for x, y in zip(z, labels)]
    np.testing.assert_allclose(log["loss"].numpy(), by_hand, rtol=1e-4)
    assert abs(total.item() - sum(by_hand)) < 1e-4, "the sum, for `fit` to divide"
    assert log["accuracy"].tolist() == [float((x > 0) == y) for x, y in zip(z, labels)]
    assert not log["loss"].requires_grad
    total.backward()
    assert model.score.weight.grad.abs().sum() > 0


def rigged(p: dict[int, float]) -> RewardModel:
    """A model that returns p[i] for a text that ends with token i, and records all texts."""
    model = RewardModel(CONFIG)
    model.seen = []

    def forward(idx, lengths):
        model.seen += [row[:n].tolist() for row, n in zip(idx, lengths)]
        last = idx[torch.arange(len(idx)), lengths - 1]
        return torch.tensor([p[int(i)] for i in last]).logit()

    model.forward = forward
    return model


def test_accuracy_and_calibration_error_worked_by_hand():
    says = {0: 0.95, 1: 0.65, 2: 0.15, 3: 1.0}
    ends = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 1, 0], dtype=np.float32)
    rng = np.random.default_rng(0)
    tokens = [np.array([EOS, *[4] * int(rng.integers(0, 12)), i]) for i in ends]
    # scored in order of length, which is not this order: each text must keep its label
    right = (4 + 1 + 2 + 1) / 10
    # 0.95 and 1 share the last bin: 6 texts, mean p (4 · 0.95 + 2 · 1) / 6, positives 5 / 6
    gap = (abs(4 * 0.95 + 2 * 1 - 5) + abs(2 * 0.65 - 1) + abs(2 * 0.15 - 0)) / 10
    for batch_size in (1, 3, 64):
        got = label_accuracy(rigged(says), tokens, labels, 16, batch_size=batch_size)
        assert abs(got["accuracy"] - right) < 1e-6
        assert abs(got["calibration_error"] - gap) < 1e-6, "a mean over ten bins"


def test_accuracy_reads_whole_reviews_or_crops_of_one_length():
    tokens = [np.array(row) for row in random_rows(40, 1, 30)]
    labels = np.ones(40, dtype=np.float32)
    model = rigged(dict.fromkeys(range(20), 0.9))
    label_accuracy(model, tokens, labels, 16)
    assert sorted(model.seen) == sorted(truncate(ids, 16) for ids in tokens), "the last 16 tokens"
    assert not model.training, "dropout is on"
    for crop_len in (5, 99):
        model = rigged(dict.fromkeys(range(20), 0.9))
        got = label_accuracy(model, tokens, labels, 16, crop_len)
        assert sorted(map(len, model.seen)) == sorted(
            min(len(ids), crop_len + 1, 16) for ids in tokens)
        assert got["accuracy"] == 1 and abs(got["calibration_error"] - 0.1) < 1e-6


def test_a_tiny_model_learns_whether_a_word_occurs():
    """Positive reviews contain token 1, negative ones do not. The accuracy is of whole reviews,
    because a crop may not contain the token."""
    rng = np.random.default_rng(0)
    labels = np.arange(400, dtype=np.float32) % 2
    tokens = []
    for y in labels:
        row = rng.integers(2, 19, rng.integers(8, 15))
        row[rng.integers(len(row))] = 1 if y else 2
        tokens.append(np.array([EOS, *row]))
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(vocab_size=20, n_ctx=16, n_layer=1, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = label_accuracy(model, tokens[300:], labels[300:], 16)
    model.train()
    for step in range(60):
        for micro_batch in label_batches(tokens[:300], labels[:300], 32, 16, 14, rng):
            (label_loss(model, micro_batch)[0] / 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = label_accuracy(model, tokens[300:], labels[300:], 16)
    assert before["accuracy"] == 0.5, "a new model gives every text the same score"
    assert after["accuracy"] > 0.95 and after["calibration_error"] < 0.2, after


# ------------------------------------------------------------------------------ a model as a reward

def test_sentiment_is_a_probability_of_prompt_and_completion_without_its_end():
    model = random_model()
    judge = ModelReward(model.train(), EOS)
    assert not model.training, "a reward has no dropout"
    rows = random_rows(20, 3, 14)
    prompts, completions = [r[:2] for r in rows], [r[2:] for r in rows]
    got = judge(prompts, completions)
    assert got.shape == (20,) and got.dtype == torch.float32 and not got.requires_grad
    assert ((0 <= got) & (got <= 1)).all() and got.std() > 0.05
    for row, p in zip(rows, got):
        with torch.no_grad():
            alone = model(torch.tensor([row]), torch.tensor([len(row)])).sigmoid()[0]
        torch.testing.assert_close(p, alone, atol=1e-5, rtol=0)
    ended = judge(prompts, [c + [EOS] for c in completions])
    torch.testing.assert_close(ended, got, msg="<|endoftext|> at the end changed the reward")
    few = ModelReward(model, EOS, batch_size=3)(prompts, completions)
    torch.testing.assert_close(few, got, atol=1e-5, rtol=0, msg="rewards depend on the batch")


def test_a_completion_that_ends_at_once_is_judged_by_its_prompt():
    judge = ModelReward(random_model(), EOS)
    assert torch.equal(judge([[EOS, 1, 2]], [[EOS]]), judge([[EOS, 1]], [[2, EOS]]))


def test_a_learned_reward_is_the_score_itself_and_reads_the_end():
    model = random_model()
    learned, prompts = ModelReward(model, EOS, learned=True), [[EOS, 1, 2]] * 2
    got = learned(prompts, [[3, EOS], [3]])
    for p, row in zip(got, ([EOS, 1, 2, 3, EOS], [EOS, 1, 2, 3])):
        with torch.no_grad():
            torch.testing.assert_close(p, model(torch.tensor([row]), torch.tensor([len(row)]))[0])
    assert got[0] != got[1], "r_φ reads <|endoftext|>"


def test_a_text_past_the_judges_context_is_refused():
    judge = ModelReward(random_model(), EOS)
    judge([[EOS]], [[1] * 15 + [EOS]])  # 16 tokens: the last EOS is not read
    with pytest.raises(UserError, match="17 tokens.*reads at most 16.*--reward-ctx"):
        judge([[EOS, 1], [EOS]], [[2], [1] * 16])


# ------------------------------------------------------------------------------ the paper's r*

class Letters:
    """An encoding whose tokens are characters."""

    eot_token = 0

    def decode(self, ids):
        return "".join(map(chr, ids))


def letters(text):
    return [ord(c) for c in text]


def save_roberta(path, labels=("NEGATIVE", "POSITIVE")) -> None:
    """A folder as the siebert model's: a tiny random RoBERTa with a tokenizer of letters."""
    transformers = pytest.importorskip(
        "transformers", reason="--reward siebert is optional: pip install transformers")
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(chr, range(33, 127)), "Ġ"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, initializer_range=1.0,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    transformers.RobertaForSequenceClassification(config).save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps(
        dict(tokenizer_class="RobertaTokenizer", model_max_length=30)))


def test_siebert_is_the_models_probability_of_positive(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_roberta(tmp_path / "judge")
    judge = SiebertReward(Letters(), str(tmp_path / "judge"), batch_size=2)
    words = ["dull", "good film", "a", "not so good", "x" * 60]  # the last is truncated to 30
    prompts, completions = [[0, *letters("the ")]] * 5, [letters(w) + [0] for w in words]
    got = judge(prompts, completions)
    assert got.shape == (5,) and got.dtype == torch.float32
    assert ((0 <= got) & (got <= 1)).all() and got.std() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(judge(prompts, completions), got), "float32 under autocast too"
    from transformers import pipeline
    classify = pipeline("text-classification", str(tmp_path / "judge"), top_k=None, device="cpu")
    for word, p in zip(words[:4], got):
        scores = {row["label"]: row["score"] for row in classify([f"the {word}"])[0]}
        assert abs(scores["POSITIVE"] - float(p)) < 1e-5, word
    save_roberta(tmp_path / "other", ("positive", "negative"))
    swapped = SiebertReward(Letters(), str(tmp_path / "other"))(prompts, completions)
    torch.testing.assert_close(swapped, 1 - got, msg="the label is found by its name")


@pytest.mark.parametrize("change, words", [
    (lambda state: {}, "25 weights are missing or not finite, one is classifier.dense.bias"),
    (lambda state: {k: w for k, w in state.items() if "classifier" not in k}, "4 weights are mis"),
    (lambda state: {k: w * math.nan if "out_proj.bias" in k else w for k, w in state.items()},
     "1 weights are missing or not finite, one is classifier.out_proj.bias"),
    (lambda state: {k: w.new_zeros(3) if "out_proj.bias" in k else w for k, w in state.items()},
     "mismatched_sizes")])
def test_a_judge_of_random_weights_is_refused(change, words, tmp_path, capfd):
    """transformers would fill missing weights with random numbers and print a table of them."""
    save_roberta(tmp_path)
    from safetensors.torch import load_file, save_file
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError, match=words) as caught:
        SiebertReward(Letters(), str(tmp_path))
    assert "--siebert-path" in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "a table was printed too"
