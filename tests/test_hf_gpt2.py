"""Laws of support/hf_gpt2.py: transformers and we read each other's folders and compute the same,
and what is no GPT-2 is refused in a sentence.

The oracle is transformers (requirements-dev.txt).
"""

import itertools
import json
import struct

import pytest
import torch
from test_gpt import SIZE, all_but_first, ids, largest, tiny

from gpt import GPT, GPTConfig
from support import hf_gpt2
from support.runs import UserError


@pytest.fixture
def folder(tmp_path):
    hf_gpt2.save(tiny(dtype=torch.float32), tmp_path / "new" / "folder")
    return tmp_path / "new" / "folder"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------ our own folders


def test_load_gives_back_what_was_saved(folder):
    model, again = tiny(dtype=torch.float32), GPT.from_pretrained(folder, dropout=0.1)
    assert again.config == GPTConfig(**SIZE, dropout=0.1)
    for key, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], p), key


@pytest.mark.parametrize("n_ctx", [9, 24, 150])
def test_tensors_start_on_eight_bytes(tmp_path, n_ctx):
    """As safetensors asks of whoever writes one."""
    hf_gpt2.save(tiny(n_ctx=n_ctx), tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0


def test_what_is_a_checkpoint(folder, tmp_path):
    assert hf_gpt2.is_checkpoint("gpt2-xl") and hf_gpt2.is_checkpoint(folder)
    assert not hf_gpt2.is_checkpoint(tmp_path) and not hf_gpt2.is_checkpoint("gpt3")


def test_n_inner_of_the_usual_size_is_accepted(folder):
    edit_config(folder, n_inner=64)
    GPT.from_pretrained(folder)


def test_download_once_then_read_the_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_gpt2, "GPT2_URL", f"file://{tmp_path}/hub/{{name}}/{{file}}")
    hf_gpt2.save(tiny(dtype=torch.float32), tmp_path / "hub" / "gpt2")
    model = GPT.from_pretrained("gpt2", cache=tmp_path / "data")
    (tmp_path / "hub" / "gpt2" / "model.safetensors").unlink()
    again = GPT.from_pretrained("gpt2", cache=tmp_path / "data")
    assert torch.equal(model.wte.weight, again.wte.weight)
    assert {f.name for f in (tmp_path / "data" / "gpt2").iterdir()} == {
        "config.json", "model.safetensors"}


# ------------------------------------------------------------------------------ transformers


@pytest.fixture
def hugging():
    """transformers' small random GPT-2."""
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


@pytest.mark.parametrize("file", hf_gpt2.WEIGHTS)
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
    assert largest(ours.double()(idx), hugging.double()(idx).logits) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_reads_other_precisions(hugging, tmp_path, dtype):
    hugging.to(dtype).save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert ours.wte.weight.dtype == torch.float32
    assert largest(ours.double()(idx), hugging.float().double()(idx).logits) < 1e-11


def test_transformers_reads_our_folder(hugging, folder):
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is type(hugging) and not any(report.values()), report
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.transformer.wte.weight
    ours, idx = tiny(dtype=torch.float32).double(), ids(3, 24)
    assert largest(ours(idx), theirs.eval().double()(idx).logits) < 1e-11


def test_scores_and_greedy_samples_are_transformers(hugging, tmp_path):
    hugging.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path).double().eval(), ids(3, 10)
    hugging.double()
    loss = hugging(idx, labels=idx).loss
    assert largest(-ours.token_logps(idx, all_but_first(idx)).sum() / 27, loss) < 1e-5
    theirs = hugging.generate(idx, do_sample=False, max_new_tokens=14, eos_token_id=None,
                              attention_mask=torch.ones_like(idx))
    assert ours.sample(idx.tolist(), 14, -1, 0, temperature=0) == theirs[:, 10:].tolist()


# ------------------------------------------------------------------------------ refusals


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def weights(change):
    """model.safetensors with the bytes that change(its bytes) gives."""
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    return damage


def pickled(change):
    """pytorch_model.bin in its place, with what change(the state dict) gives."""
    def damage(folder):
        (folder / "model.safetensors").unlink()
        torch.save(change(tiny(dtype=torch.float32).state_dict()), folder / "pytorch_model.bin")
    return damage


NO_CONFIG, TORN, UNFIT = "no config.json of a GPT-2", "is truncated or no", "by its config.json"


@pytest.mark.parametrize("damage, word", [
    (config(model_type="llama"), "model_type is 'llama'; GPT-2's is 'gpt2'"),
    (config(activation_function="relu"), "activation_function is 'relu'"),
    (config(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    (config(n_inner=48), "n_inner is 48; GPT-2's is 64"),
    (config(scale_attn_weights=False), "scale_attn_weights is False"),
    (config(tie_word_embeddings=False), "tie_word_embeddings is False"),
    (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (config(vocab_size=62), UNFIT), (config(n_positions=20), UNFIT), (config(n_embd=32), UNFIT),
    (config(n_layer=3), UNFIT), (config(n_layer=1), "12 weights that GPT-2 does not have"),
    (config(n_head=3), NO_CONFIG), (config(n_head=0), NO_CONFIG),
    (lambda folder: (folder / "config.json").unlink(), NO_CONFIG), (text(""), NO_CONFIG),
    (text("{"), NO_CONFIG), (text("[]"), NO_CONFIG), (text('{"vocab_size": 61}'), NO_CONFIG),
    (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (weights(lambda raw: b""), TORN), (weights(lambda raw: raw[:5]), TORN),
    (weights(lambda raw: raw[:100]), TORN), (weights(lambda raw: raw[:-1]), TORN),
    (weights(lambda raw: b"PK\3\4" * 500), TORN),
    (weights(lambda raw: struct.pack("<Q", 2) + b"17"), TORN),
    (weights(lambda raw: struct.pack("<Q", 11) + b'{"a": {}}  '), TORN),
    (weights(lambda raw: struct.pack("<Q", 2**62) + raw[8:]), TORN),
    (pickled(lambda state: [1]), "does not hold tensors by name"),
    (pickled(lambda state: {"wte.weight": 3}), "does not hold tensors by name"),
    (pickled(lambda state: state | {"lm_head.weight": torch.zeros(61, 16)}), "not tied"),
    (pickled(lambda state: state | {"wte.weight": torch.zeros(61, 17)}), "hold shape (61, 17)"),
    (pickled(lambda state: {}), "hold nothing")])
def test_another_model_is_refused_in_one_sentence(folder, damage, word):
    damage(folder)
    refusal(lambda: GPT.from_pretrained(folder), folder, word)


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_gpt2, "GPT2_URL", f"file://{tmp_path}/nowhere/{{name}}/{{file}}")
    refusal(lambda: GPT.from_pretrained("gpt2-xl", cache=tmp_path), "could not download",
            "nowhere/gpt2-xl/config.json", f"into {tmp_path}/gpt2-xl")
    (tmp_path / "file").touch()
    refusal(lambda: GPT.from_pretrained("gpt2", cache=tmp_path / "file"), "cannot write")


def refusal(work, *words):
    with pytest.raises(UserError) as caught:
        work()
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    for word in words:
        assert str(word) in sentence, f"{word!r} is not in: {sentence}"
