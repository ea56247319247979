"""Laws of gpt.py: it computes what GPT-2 computes, its log-probs are those of softmax, and a
completion depends only on its prompt and its uniforms. GPT-2's files: tests/test_hf_gpt2.py."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import Waits

import data_imdb
import gpt
from gpt import GPT, GPTConfig, HeadLogps, length_buckets, pad_rows, sample_inverse_cdf
from support import hf_gpt2
from support.runs import UserError, main_exit, save_tensors
from support.tokenizer_files import read_tiktoken, save_tiktoken, tokens_of

SIZE = dict(vocab_size=61, n_ctx=24, n_layer=2, n_head=2, n_embd=16)


def tiny(seed=0, std=0.3, dtype=torch.float64, **changes) -> GPT:
    """A small GPT with weights so large that the next token is not uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZE | changes)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return model


def ids(*shape, V=61, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def all_but_first(idx):
    """The mask that scores all tokens except each row's first."""
    return (torch.arange(idx.size(1)) > 0).expand(idx.shape)


def largest(a, b) -> float:
    """The largest difference."""
    return float((a - b).detach().abs().max())


# ------------------------------------------------------------------------------ architecture


@pytest.mark.parametrize("shape, millions", [
    ((12, 12, 768), 124.439808), ((24, 16, 1024), 354.823168), ((36, 20, 1280), 774.03008),
    ((48, 25, 1600), 1557.6112)])
def test_parameters_of_the_four_published_sizes(shape, millions):
    layers, heads, width = shape
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width))
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_first_loss_is_log_v():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**SIZE)), ids(8, 24)
    loss = -model.token_logps(idx, all_but_first(idx)).sum() / (8 * 23)
    assert abs(loss.item() - math.log(61)) < 0.05, f"the first loss is {loss}, not log V"


def test_first_weights_keep_the_residual_streams_variance():
    """GPT-2's: 0.02, and over √(2 layers) where a block adds to the stream; biases 0, gains 1."""
    model = GPT(GPTConfig(vocab_size=99, n_ctx=64, n_layer=8, n_head=2, n_embd=64))
    for key, p in model.named_parameters():
        std = 0.02 / 4 if key.endswith("c_proj.weight") else 0.02
        if p.dim() == 1:
            assert (p == (".ln_" in "." + key and key.endswith("weight"))).all(), key
        else:
            assert abs(p.std().item() / std - 1) < 0.1, f"{key}: {p.std()}"


def written_out(model, idx):
    """GPT-2's logits (B, T, V) from a state dict and nothing of torch.nn."""
    w, x = model.state_dict(), model.wte.weight[idx] + model.wpe.weight[: idx.size(1)]
    later = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    for i in range(model.config.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        heads = []
        for q, k, v in zip(*(part.chunk(model.config.n_head, -1) for part in qkv)):
            scores = q @ k.mT / math.sqrt(q.size(-1))
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@torch.no_grad()
def test_logits_are_gpt2_s():
    model, idx = tiny(), ids(3, 24)
    assert largest(model(idx), written_out(model, idx)) < 1e-11


def test_later_token_changes_no_earlier_logit():
    model, idx = tiny(), ids(3, 24)
    before = model(idx)
    for t in (1, 12, 23):
        after = model(torch.cat([idx[:, :t], ids(3, 24 - t, seed=t + 1)], 1))
        assert torch.equal(before[:, :t], after[:, :t]), f"token {t} was seen before its turn"
        assert not torch.equal(before[:, t:], after[:, t:])


def test_cached_steps_are_the_whole_forward():
    model, idx = tiny(), ids(3, 24)
    cache = torch.empty(2, 2, 3, 2, 24, 8, dtype=torch.float64)
    parts = [model.hidden(idx[:, :5], cache)]
    parts += [model.hidden(idx[:, t : t + 1], cache, t) for t in range(5, 24)]
    assert largest(torch.cat(parts, 1), model.hidden(idx)) < 1e-12


def test_sequence_past_the_context_is_refused():
    with pytest.raises(ValueError, match="got 25 tokens, wanted at most 24"):
        tiny()(ids(1, 25))


def test_dropout_only_in_training():
    model, idx = tiny(dropout=0.5), ids(2, 10)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_pad_rows_keeps_tokens_and_counts_both_parts():
    idx, prompt_lens, lengths = pad_rows([[1, 2], [3]], [[4], [5, 6, 7]], fill=9)
    assert idx.tolist() == [[1, 2, 4, 9], [3, 5, 6, 7]]
    assert prompt_lens.tolist() == [2, 1] and lengths.tolist() == [3, 4]


@pytest.mark.parametrize("batch_size", [1, 7, 30, 99])
def test_length_buckets_hold_each_row_once_and_like_lengths_together(batch_size):
    lengths = ids(30, V=12)
    parts = length_buckets(lengths, batch_size)
    assert sorted(torch.cat(list(parts)).tolist()) == list(range(30))
    assert len(parts) == math.ceil(30 / batch_size) and max(map(len, parts)) <= batch_size
    for shorter, longer in itertools.pairwise(parts):
        assert lengths[shorter].max() <= lengths[longer].min()


# ------------------------------------------------------------------------------ log-probs


def plain_logps(model, idx, mask):
    """What token_logps should return: softmax at every position, in the model's precision."""
    logps = model(idx[:, :-1]).log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]
    return F.pad(logps, (1, 0)) * mask


@pytest.mark.parametrize("kept", [99, 7], ids=["kept", "recomputed"])
@pytest.mark.parametrize("block", [99, 3], ids=["whole", "blocks"])
def test_token_logps_and_gradient_are_softmaxs(monkeypatch, kept, block):
    """For any limit on the logits that are kept for backward or computed at once."""
    monkeypatch.setattr(gpt, "LOGITS_BUDGET", {"cpu": 4 * 61 * kept})
    monkeypatch.setattr(gpt, "BLOCK_BYTES", {"cpu": 4 * 61 * block})
    model, idx = tiny(), ids(4, 9)
    mask = all_but_first(idx) & (ids(4, 9, V=3, seed=1) > 0)
    weight = torch.randn(4, 9, dtype=torch.float64)
    values, gradients = [], []
    for logps in (model.token_logps(idx, mask), plain_logps(model, idx, mask)):
        values.append(logps)
        gradients.append(torch.autograd.grad((weight * logps).sum(), list(model.parameters())))
    assert values[0].dtype == torch.float64
    assert largest(*values) < 1e-12, "values"
    assert max(map(largest, *gradients)) < 1e-11, "gradients"
    with torch.no_grad():
        assert largest(model.token_logps(idx, mask), values[1]) < 1e-12, "without a graph"


@pytest.mark.parametrize("kept", [36, 35])
def test_logits_past_the_budget_are_not_kept(monkeypatch, kept):
    monkeypatch.setattr(gpt, "LOGITS_BUDGET", {"cpu": 4 * 999 * kept})
    model, idx, sizes = tiny(vocab_size=999), ids(4, 10), []  # 36 tokens to score
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                  lambda x: x):
        model.token_logps(idx, all_but_first(idx))
    logits = [n for n in sizes if n % 999 == 0 and n != model.wte.weight.numel()]
    assert logits == ([36 * 999] if kept == 36 else []), "kept for backward"


@pytest.mark.parametrize("dtype, autocast, tolerance", [
    (torch.float64, False, 1e-13), (torch.float32, False, 1e-5), (torch.bfloat16, False, 0.02),
    (torch.float32, True, 0.02)], ids=["float64", "float32", "bfloat16", "autocast"])
def test_head_logps_and_gradients_are_cross_entropys(dtype, autocast, tolerance):
    """The oracle is F.cross_entropy in float64, on the same rounded numbers."""
    torch.manual_seed(0)
    h, w = (torch.randn(n, 32).bfloat16().to(dtype).requires_grad_() for n in (40, 300))
    targets, weight = ids(40, V=300), torch.rand(40)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = HeadLogps.apply(h, w, targets, True)
    want = -F.cross_entropy(h.double() @ w.double().T, targets, reduction="none")
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    assert largest(logps, want) < tolerance * want.abs().max()
    for ours, theirs in zip(*(torch.autograd.grad((weight * x).sum(), (h, w))
                              for x in (logps, want))):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_head_logps_gradcheck_and_a_second_backward():
    torch.manual_seed(0)
    h, w = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda h, w: HeadLogps.apply(h, w, targets, True), (h, w))
    logps = HeadLogps.apply(h, w, targets, True)
    grads = [torch.autograd.grad(logps.sum(), (h, w), retain_graph=True) for _ in range(2)]
    assert max(map(largest, *grads)) == 0, "backward changes what it saved"


def test_gradient_at_a_token_that_is_nearly_certain():
    """1 - p is not computed from a rounded p: bf16 rounds this p to 1, and 1 - p would be 0."""
    h = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    w = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    HeadLogps.apply(h, w, torch.tensor([0]), True).backward()
    assert h.grad.item() == pytest.approx(1 / (1 + math.exp(8)), rel=0.01)


def test_token_logps_and_their_gradient_wait_once_for_a_gpu():
    model, idx = tiny(dtype=torch.float32), ids(4, 9)
    with Waits() as found:
        model.token_logps(idx, all_but_first(idx)).sum().backward()
    assert found == ["nonzero"]


def test_no_token_to_score():
    model, idx = tiny(), ids(2, 5)
    logps = model.token_logps(idx, torch.zeros(2, 5, dtype=torch.bool))
    assert logps.shape == (2, 5) and not logps.any()
    logps.sum().backward()
    assert not model.wte.weight.grad.any()


def test_half_precision_ignores_a_constant_that_all_logits_share():
    """Near -60 bf16 has steps of 0.25: without centring, log-probs would be wrong by about 0.1."""
    model, idx = tiny(dtype=torch.float32, std=0.1), ids(4, 24)
    with torch.no_grad():  # every hidden state has a 10 in channel 0, every row of W a -6
        model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0, 10, -6
    logits, logps, gradients = [], [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits.append(model(idx).float())
            logps.append(model.token_logps(idx, all_but_first(idx)))
        gradient = torch.autograd.grad(logps[-1].sum(), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    assert -70 < logits[0].mean() < -50
    assert logps[1].dtype == torch.float32 and 0 < largest(*logps) < 0.05
    assert largest(*(x.log_softmax(-1) for x in logits)) < 0.05, "the logits for sampling"
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


# ------------------------------------------------------------------------------ inverse CDF


def check_counts(logits, p, **filters):
    """With n evenly spaced uniforms each token is drawn n p times, plus or minus 1."""
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    drawn = sample_inverse_cdf(logits.expand(5000, -1), u, **filters)
    counts = torch.bincount(drawn, minlength=len(logits))
    assert largest(counts, 5000 * p) <= 1 + 1e-6
    assert not counts[p == 0].any()


def some_logits(V):
    return 2 * torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(V))


@pytest.mark.parametrize("V", [1, 2, 255, 256, 257, 700])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_each_token_is_drawn_as_often_as_its_probability(V, temperature):
    logits = some_logits(V)
    check_counts(logits, (logits / temperature).softmax(-1), temperature=temperature)


@pytest.mark.parametrize("filters", [
    dict(top_k=1), dict(top_k=5), dict(top_k=299), dict(top_k=400), dict(top_p=1e-9),
    dict(top_p=0.3), dict(top_p=0.9), dict(top_p=0.999),
    dict(temperature=0.7, top_k=20, top_p=0.8)], ids=str)
def test_filters_are_transformers(filters):
    transformers = pytest.importorskip("transformers")
    logits = some_logits(300)
    scores = logits[None] / filters.get("temperature", 1)
    if "top_k" in filters:
        scores = transformers.TopKLogitsWarper(filters["top_k"])(None, scores)
    if "top_p" in filters:
        scores = transformers.TopPLogitsWarper(filters["top_p"])(None, scores)
    check_counts(logits, scores[0].softmax(-1), **filters)


@pytest.mark.parametrize("filters, drawn", [
    (dict(), [0, 0, 1, 1, 2, 2]), (dict(temperature=0), [1] * 6), (dict(top_k=1), [1] * 6),
    (dict(top_k=2), [1, 1, 1, 2, 2, 2]), (dict(top_k=3), [0, 0, 1, 1, 2, 2]),
    (dict(top_p=0.49), [1] * 6), (dict(top_p=0.51), [1, 1, 1, 2, 2, 2]),
    (dict(top_p=0.81), [0, 0, 1, 1, 2, 2])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inverse_cdf_by_hand(filters, drawn, dtype):
    """The probabilities are 0.2, 0.5, 0.3. With token 0 filtered out they are 0, 0.625, 0.375."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log().to(dtype).expand(6, -1)
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert sample_inverse_cdf(logits, u, **filters).tolist() == drawn


@pytest.mark.parametrize("V", [3, 256, 50257])
def test_a_token_of_probability_0_is_never_drawn(V):
    """Also not for u at the ends of [0, 1), where rounding could lead past the last token."""
    u = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for possible in ([0], [V - 1], [V // 2], [1, V - 2]):
        logits = torch.full((4, V), -math.inf)
        logits[:, possible] = torch.randn(len(possible))
        drawn = sample_inverse_cdf(logits, u).tolist()
        assert set(drawn) <= set(possible), f"{drawn} are drawn, wanted {possible}"
        assert drawn[0] == possible[0] and drawn[3] == possible[-1]
    flat = sample_inverse_cdf(torch.zeros(4, V), u)
    assert flat[0] == 0 and flat[3] == V - 1


@pytest.mark.parametrize("V", [1, 3, 255, 256, 257, 300])
@pytest.mark.parametrize("filters", [dict(), dict(temperature=0), dict(top_k=2), dict(top_p=0.5)],
                         ids=str)
def test_logits_of_a_diverged_model_give_some_token(V, filters):
    """For NaN in one or in all places and for infinity, the index stays inside the vocabulary: on a
    GPU a larger index would be a device-side assertion. Other rows of the batch do not change."""
    good = torch.randn(V, generator=torch.Generator().manual_seed(0))
    rows = [torch.full((V,), x) for x in (math.nan, math.inf, -math.inf)]
    for at, x in itertools.product({0, V // 2, V - 1}, (math.nan, math.inf)):
        rows.append(good.clone())
        rows[-1][at] = x
    for u in (0.0, 0.5, 1 - 2**-24):
        drawn = sample_inverse_cdf(torch.stack([good, *rows]), torch.full((len(rows) + 1,), u),
                                   **filters)
        assert 0 <= drawn.min() and drawn.max() < V
        assert drawn[0] == sample_inverse_cdf(good[None], torch.tensor([u]), **filters)


def test_a_diverged_model_can_be_sampled():
    model = tiny()
    with torch.no_grad():
        model.ln_f.bias[0] = math.nan
    assert all(0 <= i < 61 for row in model.sample(PROMPTS, 9, -1, 0) for i in row)


# ------------------------------------------------------------------------------ sampler

PROMPTS = [[5, 1, 2], [7], [3, 3, 3, 3, 3], [8, 9], [1, 4, 1, 5, 9, 2, 6]]


@torch.no_grad()
def by_hand(model, prompts, max_new_tokens, eos, seed, **filters):
    """The sampler without a cache and without batches: one prompt after the other."""
    generator, out = torch.Generator().manual_seed(seed), []
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
    for prompt, u in zip(prompts, uniforms):
        new, most = [], min(max_new_tokens, model.config.n_ctx - len(prompt))
        while len(new) < most and eos not in new:
            logits = model(torch.tensor([prompt + new]))[:, -1]
            new.append(int(sample_inverse_cdf(logits, u[len(new), None], **filters)))
        out.append(new)
    return out


@pytest.mark.parametrize("filters", [
    dict(temperature=0), dict(), dict(temperature=0.7, top_k=9), dict(top_p=0.8)], ids=str)
def test_sample_is_the_plain_loop(filters):
    model, args = tiny(), (PROMPTS, 20, 3, 0)
    assert model.sample(*args, **filters) == by_hand(model, *args, **filters)


def test_sample_is_the_plain_loop_for_a_large_vocabulary():
    """With a large vocabulary oneDNN computes the head in float32 on a CPU."""
    model, args = tiny(std=0.2, dtype=torch.float32, vocab_size=2**15 + 1), (PROMPTS, 6, 3, 0)
    assert model.sample(*args) == by_hand(model, *args)


def test_sample_does_not_depend_on_batches_threads_or_other_prompts():
    model, prompts = tiny(std=0.15), PROMPTS * 8
    eos = 6  # ends about half of the rows, at different steps
    whole = model.sample(prompts, 15, eos, 1)
    assert 5 < sum(row[-1] == eos for row in whole) < 35 and len(set(map(len, whole))) > 4
    for batch_size in (1, 7, 40):
        assert model.sample(prompts, 15, eos, 1, batch_size=batch_size) == whole
    with ThreadPoolExecutor(2) as pool:
        assert model.sample(prompts, 15, eos, 1, batch_size=7, parallel=pool.map) == whole
    others = [prompts[0]] + [[2] * 8] * 39
    assert model.sample(others, 15, eos, 1)[0] == whole[0]


def test_batch_size_bounds_a_part():
    sizes = []
    tiny().sample(PROMPTS * 8, 2, -1, 0, batch_size=7, parallel=lambda work, parts: [
        sizes.append(len(rows)) or rows for rows in map(work, parts)])
    assert max(sizes) <= 7 and sum(sizes) == 40


def test_sample_ends_at_eos_and_keeps_it():
    for eos in range(0, 61, 6):
        for row in tiny().sample(PROMPTS * 4, 10, eos, eos):
            assert eos not in row[:-1], f"{row} goes on after {eos}"
            assert row[-1] == eos or len(row) == 10, f"{row} ends without {eos}"


def test_sample_ends_at_max_new_tokens_and_at_the_context():
    model = tiny()
    for size, most, length in ((1, 1, 1), (20, 10, 4), (23, 10, 1), (1, 50, 23)):
        assert [len(r) for r in model.sample([[1] * size] * 2, most, -1, 0)] == [length] * 2
    assert list(map(len, model.sample([[1] * 20, [1]], 10, -1, 0))) == [4, 10], "both in one batch"
    assert model.sample([], 10, 0, 0) == []


def test_sampling_waits_for_a_gpu_once_in_four_tokens():
    """Also where rows end at different steps, so that some are dropped before the end."""
    model = tiny(dtype=torch.float32)

    def waits(tokens, eos):
        with Waits() as found:
            samples = model.sample([[1, 2]] * 64, tokens, eos, 0)
        return len(found), len(set(map(len, samples)))

    assert waits(20, -1)[0] - waits(12, -1)[0] == 2
    dropping, lengths = waits(20, 3)
    assert lengths > 5 and dropping <= waits(20, -1)[0]
    assert waits(20, -1)[0] <= 20 / 4 + 5, "5 more: for the lengths and the result"


def test_common_random_numbers():
    """With one seed equal policies give equal samples, and here similar ones do too. Another seed
    gives other samples."""
    a, b = tiny(std=0.1), tiny(std=0.1)
    with torch.no_grad():
        b.wte.weight.add_(1e-6)
    state = torch.get_rng_state()
    rows = [m.sample(PROMPTS, 12, -1, seed) for m, seed in ((a, 0), (a, 0), (b, 0), (a, 1))]
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was used"
    assert rows[0] == rows[1] == rows[2]
    same = sum(x == y for p, q in zip(rows[0], rows[3]) for x, y in zip(p, q))
    assert same < 20, f"{same} of 60 tokens agree under another seed"


def test_completions_are_as_frequent_as_their_probability():
    """Pearson's test on all 40 completions of at most 3 tokens out of 4, where token 0 is EOS."""
    model, n = tiny(std=0.15, vocab_size=4), 4000
    new = [y for k in (1, 2, 3) for y in itertools.product(range(4), repeat=k)
           if 0 not in y[:-1] and (k == 3 or y[-1] == 0)]
    idx, prompt_lens, lengths = pad_rows([[2, 1]] * len(new), list(map(list, new)))
    t = torch.arange(idx.size(1))
    p = model.token_logps(idx, (t >= 2) & (t < lengths[:, None])).sum(1).exp().tolist()
    assert len(p) == 40 and sum(p) == pytest.approx(1)
    seen = [tuple(y) for y in model.sample([[2, 1]] * n, 3, 0, 0, batch_size=n)]
    statistic = sum((seen.count(y) - n * q) ** 2 / (n * q) for y, q in zip(new, p))
    assert statistic < 39 + 4 * math.sqrt(2 * 39), f"{statistic} for 39 degrees of freedom"


def test_sampling_is_without_autograd_and_dropout_and_leaves_the_mode():
    model, saved = tiny(dropout=0.5), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        samples = model.sample(PROMPTS, 8, -1, 0)
    assert not saved and not model.training
    model.train()
    assert model.sample(PROMPTS, 8, -1, 0) == samples, "dropout was on"
    assert model.training and model.h[0].training
    with pytest.raises(ZeroDivisionError):
        model.sample(PROMPTS, 8, -1, 0, parallel=lambda work, parts: 1 / 0)
    assert model.training, "an exception left the model in another mode"


def test_sampling_under_autocast():
    model = tiny(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.sample(PROMPTS, 8, -1, 0)
    assert [len(row) for row in rows] == [8] * 5


@pytest.mark.parametrize("prompt", [[], [1] * 24, [1] * 30], ids=len)
def test_prompt_without_room_is_refused(prompt):
    with pytest.raises(ValueError, match=f"got a prompt of {len(prompt)} tokens, wanted 1 to 23"):
        tiny().sample([[1], prompt], 4, 0, 0)


# ------------------------------------------------------------------------------ python gpt.py


def test_load_gives_back_the_checkpoint(tmp_path):
    model = tiny(dtype=torch.float32, dropout=0.3)
    save_tensors(tmp_path / "model.pt", model.checkpoint())
    again, idx = GPT.load(tmp_path / "model.pt"), ids(2, 9)
    assert again.config == GPTConfig(**SIZE), "dropout is 0 unless asked for"
    assert torch.equal(again.eval()(idx), model(idx))
    assert all(p.requires_grad for p in again.parameters()), "it cannot be trained"
    assert GPT.load(tmp_path / "model.pt", dropout=0.1).config.dropout == 0.1


def sizes(**changes):
    return lambda c: c | {"config": c["config"] | changes}


def weight(name, change):
    return lambda c: c | {"model": c["model"] | {name: change(c["model"][name])}}


@pytest.mark.parametrize("change, word", [
    (lambda c: [1], "TypeError"), (lambda c: {}, "KeyError: 'model'"), (lambda c: None, ""),
    (lambda c: c | {"config": None}, "TypeError"), (sizes(rope=1), "'rope'"),
    *((sizes(n_layer=x), f"n_layer is {x!r}; wanted a whole number from 1 to 1,000")
      for x in (10**9, 10**15, 0, -1, 2.0, True, None, "2", torch.tensor(2))),
    *((sizes(**{name: 10**15}), f"{name} is 1000000000000000; wanted a whole number from 1 to 1")
      for name in ("vocab_size", "n_ctx", "n_head", "n_embd")),
    (sizes(n_head=3), "n_embd 16 is no multiple of n_head 3"),
    (sizes(n_embd=32), "wte.weight should have shape (61, 32) and hold floats, got (61, 16)"),
    (sizes(n_embd=10**6), "wte.weight should have shape (61, 1000000)"),
    (sizes(n_layer=1000), "it has no h.2.ln_1.weight, wanted with shape (16,)"),
    (sizes(n_layer=1), "12 weights that this model does not have, among them h.1.attn."),
    (lambda c: c | {"model": {}}, "it has no wte.weight"), (lambda c: c | {"model": [1]}, ""),
    (lambda c: c | {"model": {"body": c["model"]["wte.weight"]}}, "it has no wte.weight"),
    (weight("ln_f.bias", lambda w: w[:15]), "ln_f.bias should have shape (16,)"),
    (weight("ln_f.bias", lambda w: w.long()), "ln_f.bias should have shape (16,) and hold floats"),
    (weight("ln_f.bias", lambda w: w.tolist()), ""),
    (weight("ln_f.bias", lambda w: w.to("meta")), ""),
    (weight("h.1.attn.c_proj.bias", lambda w: w * math.nan), "h.1.attn.c_proj.bias holds NaN"),
    (weight("wpe.weight", lambda w: w / 0), "wpe.weight holds NaN or infinite numbers")])
def test_load_refuses_what_is_no_checkpoint_of_ours(tmp_path, change, word):
    save_tensors(tmp_path / "model.pt", change(tiny(dtype=torch.float32).checkpoint()))
    with pytest.raises(UserError) as caught:
        GPT.load(tmp_path / "model.pt")
    sentence = str(caught.value)
    assert "model.pt is damaged or of another kind" in sentence and word in sentence
    assert "if a stage made it, delete that stage's folder" in sentence and "\n" not in sentence


def test_other_precisions_become_float32(tmp_path):
    for dtype in torch.float64, torch.bfloat16:
        model = tiny(dtype=dtype)
        save_tensors(tmp_path / "model.pt", model.checkpoint())
        again = GPT.load(tmp_path / "model.pt")
        assert torch.equal(again.wte.weight, model.wte.weight.float()), dtype


@pytest.mark.parametrize("size, words", [
    (dict(n_layer=10**9), "n_layer is 1000000000; wanted a whole number from 1 to 1,000"),
    (dict(n_head=5), "n_embd 768 is no multiple of n_head 5")])
def test_impossible_sizes_are_refused_by_name(size, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**size)


@pytest.fixture(scope="session")
def encoding():
    return data_imdb.train_bpe(["This movie was a joy.", "I loved this movie!"] * 5, 270)


@pytest.fixture
def run(tmp_path, encoding):
    """A run's folder: a model and its tokenizer."""
    model = tiny(std=0.1, dtype=torch.float32, vocab_size=encoding.n_vocab)
    save_tensors(tmp_path / "model.pt", model.checkpoint())
    save_tiktoken(tokens_of(encoding), tmp_path / "bpe.tiktoken")
    return tmp_path


def gpt_py(capsys, *argv):
    code = main_exit(lambda: gpt.main(list(map(str, argv))))
    return code, *capsys.readouterr()


def test_main_prints_samples(run, encoding, capsys):
    eos, args = encoding.eot_token, ("--checkpoint", run, "--prompt", "This movie", "-n", 100)
    code, out, err = gpt_py(capsys, *args, "--max-new-tokens", 9)
    prompt = [eos] + encoding.encode_ordinary("This movie")
    rows = GPT.load(run / "model.pt").sample([prompt] * 100, 9, eos, 0)
    assert any(row[-1] == eos for row in rows), "no sample ends, so nothing is shown"
    texts = [encoding.decode(row).removesuffix("<|endoftext|>") for row in rows]
    assert (code, err) == (0, "") and out == "".join(f"This movie|{text}\n\n" for text in texts)
    assert gpt_py(capsys, *args, "--max-new-tokens", 9, "--seed", 1)[1] != out
    greedy = gpt_py(capsys, *args, "--temperature", 0)[1].split("This movie|")
    assert len(set(greedy[1:])) == 1


def test_main_samples_from_a_hugging_face_folder(run, capsys):
    hf_gpt2.save(GPT.load(run / "model.pt"), run)
    (run / "model.pt").unlink()
    code, out, _ = gpt_py(capsys, "--checkpoint", run, "-n", 2, "--max-new-tokens", 3)
    assert code == 0 and out.count("The|") == 2


def test_main_exports_what_transformers_opens_and_what_it_reads_itself(run, tmp_path, capsys):
    folder, text = tmp_path / "new" / "hf", "This movie\n\n was a<|endoftext|> joy 😀"
    code, out, err = gpt_py(capsys, "--checkpoint", run, "--export", folder)
    assert (code, err) == (0, "") and str(folder) in out
    args = ("--prompt", "This movie", "-n", 9, "--max-new-tokens", 9)
    samples = [gpt_py(capsys, "--checkpoint", place, *args) for place in (run, folder)]
    assert samples[0] == samples[1] and samples[0][0] == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for place in folder, run:  # neither an export nor a run is overwritten
        code, _, err = gpt_py(capsys, "--checkpoint", run, "--export", place)
        assert code == 2 and f"{place} is not empty: give a new folder" in err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    idx = tokenizer(text, return_tensors="pt").input_ids[:, :24]
    ours = GPT.load(run / "model.pt").eval()
    enc = data_imdb.encoding_of(read_tiktoken(run / "bpe.tiktoken"))
    assert idx.tolist() == [enc.encode(text, allowed_special="all")[:24]]
    assert largest(ours.double()(idx), theirs.double()(idx).logits) < 1e-11
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == enc.eot_token


def test_the_tokenizer_of_a_folder_is_used_or_the_folder_is_refused(run, encoding, tmp_path,
                                                                    capsys):
    """With GPT-2's own tokenizer its ids would mean other texts."""
    folder = tmp_path / "hf"
    gpt_py(capsys, "--checkpoint", run, "--export", folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    args = ("--prompt", "abba", "-n", 1, "--max-new-tokens", 3, "--temperature", 0)
    code, out, _ = gpt_py(capsys, "--checkpoint", folder, *args)
    tokens = tokens_of(encoding)
    a, b = tokens.index(b"a"), tokens.index(b"b")
    tokens[a], tokens[b] = b"b", b"a"
    prompt, eos = [encoding.eot_token, b, a, a, b], encoding.eot_token
    (ids,) = GPT.load(run / "model.pt").sample([prompt], 3, eos, 0, temperature=0)
    said = b"".join(tokens[i] for i in ids if i != eos).decode(errors="replace")
    assert (code, out) == (0, f"abba|{said}\n\n")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    code, _, err = gpt_py(capsys, "--checkpoint", folder, *args)
    assert code == 2 and "vocab.json is damaged or of another kind" in err
