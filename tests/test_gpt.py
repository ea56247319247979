"""Laws of gpt.py: it is GPT-2, its log-probs are softmax's, its samples depend on nothing but their
own prompt and luck, and what it cannot read it refuses in a sentence.

The oracle for the architecture and its files is transformers (requirements-dev.txt).
"""

import itertools
import json
import math
import struct
import threading
import time
import urllib.error

import pytest
import torch
import torch.nn.functional as F

import data_imdb
import gpt
from gpt import GPT, GPTConfig, HeadLogps, draw, on_cores, pad_rows
from support.runs import UserError, main_exit, save_tensors

SIZE = dict(vocab_size=61, n_ctx=24, n_layer=2, n_head=2, n_embd=16)


def tiny(seed=0, std=0.3, dtype=torch.float64, **changes) -> GPT:
    """A small GPT with opinions: at its first weights every token would be as likely as another."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZE | changes)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return model


def ids(*shape, V=61, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def largest(a, b) -> float:
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


def test_untrained_model_knows_nothing():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**SIZE)), ids(8, 24)
    loss = F.cross_entropy(model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert abs(loss.item() - math.log(61)) < 0.05, f"the first loss is {loss}, not log V"


def test_first_weights_keep_the_residual_streams_variance():
    """GPT-2's: 0.02, and over √(2 layers) where a block adds to the stream."""
    model = GPT(GPTConfig(vocab_size=99, n_ctx=64, n_layer=8, n_head=2, n_embd=64))
    for key, p in model.named_parameters():
        std = 0.02 / 4 if key.endswith("c_proj.weight") else 0.02
        assert p.dim() == 1 or abs(p.std().item() / std - 1) < 0.1, f"{key}: {p.std()}"


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
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
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


# ------------------------------------------------------------------------------ log-probs


def plain_logps(model, idx, mask):
    """What token_logps should be: softmax at every position, in the model's own precision."""
    logps = model(idx[:, :-1]).log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]
    return F.pad(logps, (1, 0)) * mask


@pytest.mark.parametrize("V", [61, 2**14 + 3])
@pytest.mark.parametrize("kept, block", [(10**6, 10**6), (10**6, 3), (7, 10**6), (7, 3)],
                         ids=["kept", "kept-blocks", "recomputed", "recomputed-blocks"])
def test_token_logps_and_gradient_are_softmaxs(monkeypatch, V, kept, block):
    """Whatever the number of rows that may be kept for backward, and be worked on at once."""
    monkeypatch.setattr(gpt, "LOGITS_BUDGET", {"cpu": 4 * V * kept})
    monkeypatch.setattr(gpt, "BLOCK_BYTES", {"cpu": 4 * V * block})
    model, idx, mask = tiny(vocab_size=V, n_layer=1), ids(4, 9, V=V), ids(4, 9, V=3, seed=1) > 0
    mask[:, 0] = False
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


@pytest.mark.parametrize("kept", [36, 7])
def test_logits_past_the_budget_are_not_kept(monkeypatch, kept):
    monkeypatch.setattr(gpt, "LOGITS_BUDGET", {"cpu": 4 * 999 * kept})
    model, idx = tiny(vocab_size=999), ids(4, 10)
    mask = torch.arange(10).expand(4, 10) > 0  # 36 tokens to score
    sizes, hooks = [], torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model.token_logps(idx, mask)
    logits = [n for n in sizes if n % 999 == 0 and n != model.wte.weight.numel()]
    assert logits == ([36 * 999] if kept == 36 else []), "kept for backward"


def test_head_logps_gradcheck_and_a_second_backward():
    torch.manual_seed(0)
    h, w = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda h, w: HeadLogps.apply(h, w, targets, True), (h, w))
    logps = HeadLogps.apply(h, w, targets, True)
    grads = [torch.autograd.grad(logps.sum(), (h, w), retain_graph=True) for _ in range(2)]
    assert max(map(largest, *grads)) == 0, "backward spoils what it saved"


def test_gradient_at_a_token_that_is_nearly_certain():
    """1 - p is computed as such: of a p that bf16 rounds to 1 nothing would be left."""
    h = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    w = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    HeadLogps.apply(h, w, torch.tensor([0]), True).backward()
    assert h.grad.item() == pytest.approx(1 / (1 + math.exp(8)), rel=0.01)


def test_no_token_to_score():
    model, idx = tiny(), ids(2, 5)
    logps = model.token_logps(idx, torch.zeros(2, 5, dtype=torch.bool))
    assert logps.shape == (2, 5) and not logps.any()
    logps.sum().backward()
    assert not model.wte.weight.grad.any()


def test_half_precision_sees_past_the_constant_that_gpt2_s_logits_share():
    """At -60 bf16's step is 0.25: without centring every log-prob would be off by a tenth."""
    model, idx = tiny(dtype=torch.float32, std=0.1), ids(4, 24)
    with torch.no_grad():  # every hidden state has a 10 in channel 0, every row of W a -6
        model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0, 10, -6
    mask = torch.ones_like(idx, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    whole = model(idx)
    assert -70 < whole.mean() < -50
    want = model.token_logps(idx, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got, logits = model.token_logps(idx, mask), model(idx)
    assert largest(got, want) < 0.05
    assert largest(logits.float().log_softmax(-1), whole.log_softmax(-1)) < 0.05, "to sample from"


def test_autocast_reduces_in_float32():
    model, idx = tiny(std=0.1, dtype=torch.float32), ids(4, 24)
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[:, 0] = False
    logps, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logps.append(model.token_logps(idx, mask))
        gradient = torch.autograd.grad(logps[-1].sum(), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    assert logps[1].dtype == torch.float32 and 0 < largest(*logps) < 0.05
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


# ------------------------------------------------------------------------------ draw


def counts(n, p_logits, **filters):
    """How often each token is drawn by an even grid of n uniforms, beside n p."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(p_logits.expand(n, -1), u, **filters)
    return torch.bincount(drawn, minlength=p_logits.size(-1)).double()


@pytest.mark.parametrize("V", [1, 2, 255, 256, 257, 700])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_is_the_inverse_of_the_cdf(V, temperature):
    """Over an even grid of u each token comes n p times, give or take the one at its border."""
    logits = 2 * torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(V))
    expected = 5000 * (logits / temperature).softmax(-1)
    assert largest(counts(5000, logits, temperature=temperature), expected) <= 1 + 1e-6


def test_draw_by_hand():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, -1)
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert draw(logits, u).tolist() == [0, 0, 1, 1, 2, 2]
    assert draw(logits, u, temperature=0).tolist() == [1] * 6
    assert draw(logits.bfloat16(), u).tolist() == [0, 0, 1, 1, 2, 2], "bf16 logits, float32 sums"


@pytest.mark.parametrize("k", [1, 2, 5, 299, 300, 400])
def test_top_k_leaves_the_likeliest_and_their_proportions(k):
    logits = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    p = logits.softmax(-1)
    p[p.argsort(descending=True)[k:]] = 0
    assert largest(counts(3000, logits, top_k=k), 3000 * p / p.sum()) <= 1 + 1e-6


@pytest.mark.parametrize("mass", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_leaves_the_smallest_set_of_that_mass(mass):
    logits = 2 * torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    p = logits.softmax(-1)
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(-1) < mass).sum()) + 1
    p[order[size:]] = 0
    assert largest(counts(3000, logits, top_p=mass), 3000 * p / p.sum()) <= 1 + 1e-6


@pytest.mark.parametrize("V", [3, 256, 50257])
def test_draw_never_takes_what_has_no_probability(V):
    """At the ends of [0, 1) too, where rounding could lead past the last token."""
    u = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for alive in ([0], [V - 1], [V // 2], [1, V - 2]):
        logits = torch.full((4, V), -math.inf)
        logits[:, alive] = torch.randn(len(alive))
        drawn = draw(logits, u)
        assert set(drawn.tolist()) <= set(alive), f"{drawn.tolist()} are drawn, {alive} may be"
        assert drawn[0] == alive[0] and drawn[3] == alive[-1]
    flat = draw(torch.zeros(4, V), u)
    assert flat[0] == 0 and flat[3] == V - 1


# ------------------------------------------------------------------------------ sampler

PROMPTS = [[5, 1, 2], [7], [3, 3, 3, 3, 3], [8, 9], [1, 4, 1, 5, 9, 2, 6]]


def by_hand(model, prompts, max_new, eos, seed, **filters):
    """The sampler without its cache, its batches and its ragged prompts."""
    generator, out = torch.Generator().manual_seed(seed), []
    uniforms = torch.rand(len(prompts), max_new, generator=generator)
    for prompt, u in zip(prompts, uniforms):
        new = []
        while len(new) < max_new and len(prompt) + len(new) < model.config.n_ctx and eos not in new:
            logits = model(torch.tensor([prompt + new]))[:, -1]
            new.append(int(draw(logits, u[len(new), None], **filters)))
        out.append(new)
    return out


@pytest.mark.parametrize("filters", [dict(temperature=0), dict(), dict(temperature=0.7, top_k=9),
                                     dict(top_p=0.8)], ids=str)
def test_sample_is_the_plain_loop(filters):
    model, args = tiny(), (PROMPTS, 12, 3, 0)
    assert model.sample(*args, **filters) == by_hand(model, *args, **filters)


def test_sample_does_not_depend_on_batching():
    """Nor on rows that ended and were dropped, nor on the lengths of others' prompts."""
    model, prompts, heard = tiny(std=0.15), PROMPTS * 8, []
    eos = 6  # ends about half of the rows, at different steps
    whole = model.sample(prompts, 15, eos, 1)
    assert 5 < sum(row[-1] == eos for row in whole) < 35 and len(set(map(len, whole))) > 4
    for rows in (1, 3, 7, 40):
        assert model.sample(prompts, 15, eos, 1, rows=rows, progress=heard.append) == whole, rows
    assert sum(heard) == 4 * 40 and max(heard) == 40
    others = [prompts[0]] + [[2] * 8] * 39
    assert model.sample(others, 15, eos, 1)[0] == whole[0]


def test_sample_does_not_depend_on_cores(three_threads):
    model, args, heard = tiny(std=0.15), (PROMPTS * 8, 15, 6, 1), []
    whole = model.sample(*args, rows=5, progress=heard.append)
    assert heard == [2] * 20, "five prompts or fewer at once, on three cores"
    torch.set_num_threads(1)
    assert model.sample(*args) == whole


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_gives_the_same_numbers(monkeypatch):
    """Large matrices on a CPU, in float32 and without autograd."""
    V, calls, plain = 2**14 + 3, [], torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda self: calls.append(1) or plain(self))
    model, idx = tiny(std=0.05, dtype=torch.float32, vocab_size=V, n_embd=64), ids(4, 9, V=V)
    mask = (torch.arange(9) > 2).expand(4, 9)
    logps = model.token_logps(idx, mask)
    grads = torch.autograd.grad(logps.sum(), list(model.parameters()))
    assert len(calls) == 1, "the head alone, which needs no autograd"
    want = plain_logps(model, idx, mask)
    assert len(calls) == 1 and largest(logps, want) < 1e-5, "values"
    for a, b in zip(grads, torch.autograd.grad(want.sum(), list(model.parameters()))):
        assert largest(a, b) < 1e-4 * max(1, b.abs().max()), "gradients"
    with torch.no_grad():
        assert largest(model(idx), model.double()(idx)) < 1e-4 and len(calls) == 2
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            model(idx)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        model(idx)
    assert len(calls) == 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("cast", [True, False])
def test_on_cores_keeps_order_and_modes(three_threads, grad, cast):
    """A thread begins with autograd on, autocast off and all of torch's threads for itself."""
    def look(part):
        time.sleep(0.01 * (3 - part % 3))  # the last is done first
        seen.append(threading.get_ident())
        return (part, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"), torch.get_num_threads())

    seen, device = [], torch.device("cpu")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.float16, cast):
        dtype = torch.get_autocast_dtype("cpu")
        assert list(on_cores(device, look, range(7))) == [
            (part, grad, cast, dtype, 1) for part in range(7)]
        assert len(set(seen)) > 1 and threading.get_ident() not in seen
        assert torch.get_num_threads() == 3, "the caller's own threads have changed"
        assert list(on_cores(device, look, [5])) == [(5, grad, cast, dtype, 3)], "one part: all"
        seen.clear()
        list(on_cores(torch.device("cuda"), look, range(3)))
        assert set(seen) == {threading.get_ident()}, "a GPU's work divides itself"


def test_on_cores_raises_what_a_part_raises(three_threads):
    with pytest.raises(ZeroDivisionError):
        list(on_cores(torch.device("cpu"), lambda part: 1 / (part - 4), range(9)))


def test_sample_ends_at_eos_and_keeps_it():
    for eos in range(0, 61, 6):
        for row in tiny().sample(PROMPTS * 4, 10, eos, eos):
            assert eos not in row[:-1], f"{row} goes on after {eos}"
            assert row[-1] == eos or len(row) == 10, f"{row} ends without {eos}"


def test_sample_ends_at_max_new_and_at_the_context():
    model = tiny()
    for size, max_new, length in ((1, 1, 1), (20, 10, 4), (23, 10, 1), (1, 50, 23)):
        assert [len(r) for r in model.sample([[1] * size] * 2, max_new, -1, 0)] == [length] * 2
    assert list(map(len, model.sample([[1] * 20, [1]], 10, -1, 0))) == [4, 10], "side by side"
    assert model.sample([], 10, 0, 0) == []


def test_common_random_numbers():
    """The same seed is the same luck: equal policies agree, close ones too, other seeds do not."""
    a, b = tiny(std=0.1), tiny(std=0.1)
    with torch.no_grad():
        b.wte.weight.add_(1e-6)
    state = torch.get_rng_state()
    rows = [m.sample(PROMPTS, 12, -1, seed) for m, seed in ((a, 0), (a, 0), (b, 0), (a, 1))]
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was used"
    assert rows[0] == rows[1] == rows[2]
    same = sum(x == y for p, q in zip(rows[0], rows[3]) for x, y in zip(p, q))
    assert same < 20, f"{same} of 60 tokens agree under another seed"


def test_samples_follow_the_model():
    """Frequencies of the first new token over many rows, by Pearson's statistic."""
    model, n = tiny(std=0.15), 4000
    p = model(torch.tensor([[5, 1, 2]]))[0, -1].softmax(-1).detach()
    rows = model.sample([[5, 1, 2]] * n, 1, -1, 0, rows=n)
    seen = torch.bincount(torch.tensor(rows).flatten(), minlength=61)
    statistic = float(((seen - n * p) ** 2 / (n * p)).sum())
    assert statistic < 60 + 4 * math.sqrt(2 * 60), f"{statistic} for 60 degrees of freedom"


def test_sampling_is_without_dropout_and_leaves_the_mode():
    model = tiny(dropout=0.5)
    calm = model.sample(PROMPTS, 8, -1, 0)
    model.train()
    assert model.sample(PROMPTS, 8, -1, 0) == calm, "dropout was on"
    assert model.training and model.h[0].training
    with pytest.raises(ZeroDivisionError):
        model.sample(PROMPTS, 8, -1, 0, progress=lambda n: 1 / 0)
    assert model.training, "an exception left the model in another mode"


def test_sampling_under_autocast():
    model = tiny(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.sample(PROMPTS, 8, -1, 0)
    assert [len(row) for row in rows] == [8] * 5


@pytest.mark.parametrize("prompt", [[], [1] * 24, [1] * 30], ids=len)
def test_prompt_without_room_is_refused(prompt):
    with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens; the context is 24"):
        tiny().sample([[1], prompt], 4, 0, 0)


# ------------------------------------------------------------------------------ checkpoints


def test_load_gives_back_what_was_saved(tmp_path):
    model = tiny(dtype=torch.float32, dropout=0.3)
    save_tensors(tmp_path / "model.pt", model.saved())
    again, idx = GPT.load(tmp_path / "model.pt"), ids(2, 9)
    assert again.config == GPTConfig(**SIZE), "dropout is 0 unless asked for"
    assert torch.equal(again.eval()(idx), model(idx))


def test_pretrained_folder_gives_back_what_was_saved(tmp_path):
    model = tiny(dtype=torch.float32)
    folder = tmp_path / "new" / "folder"
    model.save_pretrained(folder)
    again = GPT.from_pretrained(folder, dropout=0.1)
    assert again.config == GPTConfig(**SIZE, dropout=0.1)
    for key, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], p), key
    with torch.no_grad():
        again.wte.weight.zero_()  # a private copy: the file must stay as it is
    assert torch.equal(GPT.from_pretrained(folder).wte.weight, model.wte.weight)


@pytest.mark.parametrize("n_ctx", [9, 24, 150])
def test_tensors_start_on_eight_bytes(tmp_path, n_ctx):
    """As safetensors asks of whoever writes one."""
    tiny(n_ctx=n_ctx).save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0


def refusal(work, *words):
    with pytest.raises(UserError) as caught:
        work()
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    for word in words:
        assert str(word) in sentence, f"{word!r} is not in: {sentence}"


def test_load_refuses_what_is_no_model(tmp_path):
    path, saved = tmp_path / "model.pt", tiny(dtype=torch.float32).saved()
    wider = tiny(dtype=torch.float32, n_embd=32).saved()
    renamed = {"body." + k: v for k, v in saved["model"].items()}
    for wrong in ([1], {}, {"config": None, "model": {}}, saved | {"model": wider["model"]},
                  saved | {"model": renamed}, saved | {"config": {**saved["config"], "rope": 1}}):
        save_tensors(path, wrong)
        refusal(lambda: GPT.load(path), path, "holds no GPT of this code")
    save_tensors(path, saved)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(lambda: GPT.load(path), path, "truncated")
    refusal(lambda: GPT.load(tmp_path / "none.pt"), "none.pt")


@pytest.fixture
def folder(tmp_path):
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("key, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6),
    ("n_inner", 48), ("scale_attn_weights", False), ("tie_word_embeddings", False),
    ("scale_attn_by_inverse_layer_idx", True)])
def test_another_architecture_is_refused(folder, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refusal(lambda: GPT.from_pretrained(folder), path, key, value)


def test_n_inner_of_the_usual_size_is_accepted(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_inner": 64}))
    GPT.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [("vocab_size", 62), ("n_positions", 20), ("n_embd", 32),
                                        ("n_layer", 3), ("n_layer", 1), ("n_head", 3)])
def test_config_that_does_not_fit_the_weights_is_refused(folder, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refusal(lambda: GPT.from_pretrained(folder), folder)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"vocab_size": 61}'])
def test_folder_without_a_config_is_refused(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refusal(lambda: GPT.from_pretrained(folder), folder, "no config.json of a GPT-2")


def test_weights_file_that_is_missing_truncated_or_foreign_is_refused(folder):
    path, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for raw in (b"", whole[:5], whole[:100], whole[: 8 + header], whole[:-1], b"PK\3\4" * 500,
                struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"17",
                struct.pack("<Q", 11) + b'{"a": {}}  ', struct.pack("<Q", 2**62) + whole[8:]):
        path.write_bytes(raw)
        refusal(lambda: GPT.from_pretrained(folder), folder)
    path.unlink()
    refusal(lambda: GPT.from_pretrained(folder), folder, "neither model.safetensors nor")
    for wrong in ([1], {"wte.weight": 3}):
        save_tensors(folder / "pytorch_model.bin", wrong)
        refusal(lambda: GPT.from_pretrained(folder), "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4")
    refusal(lambda: GPT.from_pretrained(folder), "pytorch_model.bin", "truncated")


def test_weights_of_another_model_are_refused(folder):
    (folder / "model.safetensors").unlink()
    state, path = tiny(dtype=torch.float32).state_dict(), folder / "pytorch_model.bin"
    state = {k: v.t() if k.endswith(gpt.CONV1D) else v for k, v in state.items()}
    torch.save(state, path)
    GPT.from_pretrained(folder)
    for change in ({"lm_head.weight": torch.zeros(61, 16)}, {"h.0.attn.rotary": torch.zeros(2)},
                   {"wte.weight": torch.zeros(61, 17)}):
        torch.save(state | change, path)
        refusal(lambda: GPT.from_pretrained(folder), folder)
    del state["ln_f.bias"]
    torch.save(state, path)
    refusal(lambda: GPT.from_pretrained(folder), folder, "ln_f.bias", "nothing")


# ------------------------------------------------------------------------------ downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this disk, which the real torch.hub.download_url_to_file fetches from."""
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "hub" / "gpt2")
    monkeypatch.setattr(gpt, "GPT2_URL", f"file://{tmp_path}/hub/{{name}}/{{file}}")
    return tmp_path / "hub"


def test_download_once_then_read_the_copy(hub, tmp_path):
    model = GPT.from_pretrained("gpt2", cache=tmp_path / "data")
    (hub / "gpt2" / "model.safetensors").unlink()
    again = GPT.from_pretrained("gpt2", cache=tmp_path / "data")
    assert torch.equal(model.wte.weight, again.wte.weight)
    assert {f.name for f in (tmp_path / "data" / "gpt2").iterdir()} == {
        "config.json", "model.safetensors"}


def test_download_that_stops_half_way_leaves_no_file_of_that_name(hub, tmp_path, monkeypatch):
    """A kill at any moment is as harmless: until all bytes are there, they bear another name."""
    target = tmp_path / "data" / "gpt2" / "model.safetensors"
    bar = torch.hub.tqdm

    class Stop(bar):
        def update(self, n):
            if target.with_name("config.json").exists():  # so this is the second file
                assert not target.exists(), "the name is there before all of the bytes"
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(torch.hub, "tqdm", Stop)
    with pytest.raises(KeyboardInterrupt):
        GPT.from_pretrained("gpt2", cache=tmp_path / "data")
    assert not target.exists()
    monkeypatch.setattr(torch.hub, "tqdm", bar)
    GPT.from_pretrained("gpt2", cache=tmp_path / "data")
    assert target.read_bytes() == (hub / "gpt2" / "model.safetensors").read_bytes()


def test_no_network_is_a_sentence(tmp_path, monkeypatch):
    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refusal(lambda: GPT.from_pretrained("gpt2-xl", cache=tmp_path), "could not download",
            "openai-community/gpt2-xl", "name resolution", tmp_path / "gpt2-xl")


# ------------------------------------------------------------------------------ transformers


@pytest.fixture
def hugging():
    """transformers' small random GPT-2, in its own precision, and token ids."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=60, eos_token_id=60, pad_token_id=60)).eval()
    with torch.no_grad():  # biases and gains too: they start at 0 and 1
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def old_buffers(prefix):
    """What old checkpoints also hold: the causal mask of each layer, and a constant."""
    mask = torch.ones(24, 24, dtype=torch.uint8).tril().view(1, 1, 24, 24)
    names = itertools.product(range(2), [("bias", mask), ("masked_bias", torch.tensor(-1e4))])
    return {f"{prefix}h.{i}.attn.{name}": value.clone() for i, (name, value) in names}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("extras", [False, True], ids=["weights", "head-and-masks"])
def test_reads_transformers_files(hugging, tmp_path, file, prefix, extras):
    state = {prefix + k: v.clone() for k, v in hugging.transformer.state_dict().items()}
    if extras:
        state |= {"lm_head.weight": hugging.lm_head.weight.detach().clone()} | old_buffers(prefix)
    hugging.config.save_pretrained(tmp_path)
    if file.endswith("bin"):
        torch.save(state, tmp_path / file)
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / file)
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert largest(ours(idx), hugging(idx).logits) < 1e-4
    assert largest(ours.double()(idx), hugging.double()(idx).logits) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reads_half_precision(hugging, tmp_path, dtype):
    hugging.to(dtype).save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert ours.wte.weight.dtype == torch.float32
    assert largest(ours.double()(idx), hugging.double()(idx).logits) < 1e-11


def test_transformers_reads_our_folder(hugging, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, idx = tiny(dtype=torch.float32), ids(3, 24)
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is type(hugging) and not any(report.values()), report
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.transformer.wte.weight
    assert largest(ours.double()(idx), theirs.eval().double()(idx).logits) < 1e-11


def test_scores_and_greedy_samples_are_transformers(hugging, tmp_path):
    hugging.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path).double().eval(), ids(3, 10)
    hugging.double()
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 0] = False
    loss = hugging(idx, labels=idx).loss
    assert largest(-ours.token_logps(idx, mask).sum() / 27, loss) < 1e-5
    theirs = hugging.generate(idx, do_sample=False, max_new_tokens=14, eos_token_id=None,
                              attention_mask=torch.ones_like(idx))
    assert ours.sample(idx.tolist(), 14, -1, 0, temperature=0) == theirs[:, 10:].tolist()


# ------------------------------------------------------------------------------ python gpt.py


@pytest.fixture
def run(tmp_path):
    """A run's folder: a model and the BPE that it was made for."""
    texts = ["This movie was a joy.", "This movie was a bore.", "I loved this movie!"] * 5
    enc = data_imdb.train_bpe(texts, 280)
    model = tiny(dtype=torch.float32, vocab_size=enc.n_vocab)
    save_tensors(tmp_path / "model.pt", model.saved())
    with open(tmp_path / "bpe.tiktoken", "wb") as file:
        data_imdb.save_encoding(file, enc)
    return tmp_path


def gpt_py(capsys, *argv):
    code = main_exit(lambda: gpt.main(list(map(str, argv))))
    return code, *capsys.readouterr()


def test_main_prints_samples(run, capsys):
    args = "--checkpoint", run, "--prompt", "This movie", "-n", 3, "--max-new", 5
    code, out, err = gpt_py(capsys, *args)
    assert code == 0 and err == ""
    assert out.count("This movie|") == 3 and "<|endoftext|>" not in out
    assert gpt_py(capsys, *args)[1] == out, "the same seed, the same samples"
    assert gpt_py(capsys, *args, "--seed", 1)[1] != out
    greedy = gpt_py(capsys, *args, "--temperature", 0)[1].split("This movie|")
    assert greedy[1] == greedy[2]


@pytest.mark.parametrize("argv, words", [
    (["--prompt", "movie " * 60], ["the model's context is 24"]),
    (["-n", 0], ["-n"]), (["--max-new", 0], ["--max-new"]), (["--top-p", 0], ["--top-p"]),
    (["--temperature", -1], ["--temperature"]),
    (["--checkpoint", "nowhere"], ["nowhere", "train.py"])])
def test_main_refuses_in_one_sentence(run, capsys, argv, words):
    code, out, err = gpt_py(capsys, "--checkpoint", run, *argv)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err


def test_main_refuses_a_tokenizer_of_another_model(run, capsys):
    save_tensors(run / "model.pt", tiny(dtype=torch.float32).saved())
    code, _, err = gpt_py(capsys, "--checkpoint", run)
    assert code == 2 and "61 tokens" in err and "bpe.tiktoken" in err


def test_main_samples_from_a_hugging_face_folder(run, capsys):
    GPT.load(run / "model.pt").save_pretrained(run)
    (run / "model.pt").unlink()
    code, out, _ = gpt_py(capsys, "--checkpoint", run, "-n", 2, "--max-new", 3)
    assert code == 0 and out.count("The|") == 2
