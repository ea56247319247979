"""Laws of support/hf_gpt2.py: transformers and this code read each other's folders and compute the
same, and other models are refused in one sentence.

The oracle is transformers (requirements-dev.txt).
"""

import contextlib
import hashlib
import http.server
import itertools
import json
import math
import struct
import threading

import pytest
import torch
from test_gpt import SIZE, all_but_first, ids, largest, tiny

import data_imdb
from gpt import GPT, GPTConfig
from support import hf_gpt2
from support.runs import UserError
from support.tokenizer_files import save_tokenizer, tokens_of


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
    (folder / "model.safetensors").write_bytes(b"")  # the model no longer needs the file
    assert torch.equal(again.wte.weight, model.wte.weight)


@pytest.mark.parametrize("n_ctx", [9, 24, 150])
def test_tensors_start_on_eight_bytes(tmp_path, n_ctx):
    """The safetensors format demands this of a writer."""
    hf_gpt2.save(tiny(n_ctx=n_ctx), tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0


def test_what_is_a_checkpoint(folder, tmp_path):
    assert hf_gpt2.is_checkpoint("gpt2-xl") and hf_gpt2.is_checkpoint(folder)
    assert not hf_gpt2.is_checkpoint(tmp_path) and not hf_gpt2.is_checkpoint("gpt3")
    assert not hf_gpt2.is_checkpoint("a" * 300), "a name that no file can have"


def test_n_inner_of_the_usual_size_is_accepted(folder):
    edit_config(folder, n_inner=64)
    GPT.from_pretrained(folder)


# ------------------------------------------------------------------------------ the download


PAGE = b"<!DOCTYPE html><title>Log in to this network</title>" + b" " * 3000


@contextlib.contextmanager
def hub(page, sha256, patch):
    """A server like huggingface.co: it redirects to the file and sends its SHA-256. Yields the list
    of its requests."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            moved = self.path != "/cdn"
            self.send_response(302 if moved else 200)
            for header in [("Location", "/cdn"), ("X-Linked-Etag", f'"{sha256}"')] * moved:
                self.send_header(*header)
            self.send_header("Content-Length", str(0 if moved else len(page)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"" if moved else page)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        patch.setattr(hf_gpt2, "GPT2_URL",
                      f"http://127.0.0.1:{server.server_port}/{{name}}/resolve/main/{{file}}")
        patch.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        try:
            yield asked
        finally:
            server.shutdown()


@pytest.fixture
def published(folder, monkeypatch):
    """The bytes of a published model.safetensors; "gpt2" is as small as the model of `folder`."""
    monkeypatch.setitem(hf_gpt2.GPT2_SIZES, "gpt2", SIZE)
    return (folder / "model.safetensors").read_bytes()


def test_download_once_then_read_the_copy(published, tmp_path, monkeypatch):
    data = tmp_path / "data" / "gpt2"
    data.mkdir(parents=True)
    with hub(published, hashlib.sha256(published).hexdigest(), monkeypatch) as asked:
        models = [GPT.from_pretrained("gpt2", cache=tmp_path / "data") for _ in range(2)]
    file = "/gpt2/resolve/main/model.safetensors"
    assert asked == [f"HEAD {file}", f"GET {file}", "GET /cdn"]
    assert all(torch.equal(m.wte.weight, tiny(dtype=torch.float32).wte.weight) for m in models)
    assert [file.name for file in data.iterdir()] == ["model.safetensors"]
    (data / "model.safetensors").write_bytes(PAGE)
    refusal(lambda: GPT.from_pretrained("gpt2", cache=tmp_path / "data"),
            data / "model.safetensors", "damaged", "delete it, and it is fetched again")


@pytest.mark.parametrize("page, word", [
    (lambda file: PAGE, "a header of"), (lambda file: b"", "damaged"),
    (lambda file: file[:-4], "damaged"), (lambda file: file + b" ", "damaged"),
    (lambda file: file[:-1] + b"?", "")], ids=["html", "empty", "cut", "longer", "another"])
@pytest.mark.parametrize("named", [True, False])
def test_a_download_of_something_else_is_not_kept(published, page, word, named, tmp_path,
                                                  monkeypatch):
    """With and without a SHA-256 from the server."""
    sha256 = hashlib.sha256(published).hexdigest() if named else "of another kind"
    with hub(page(published), sha256, monkeypatch):
        if not named and not word:
            return  # one byte of a weight is wrong: only a checksum can show that
        refusal(lambda: GPT.from_pretrained("gpt2", cache=tmp_path / "data"),
                "invalid hash" if named else word, "/gpt2/resolve/main/model.safetensors",
                f"try again, or put model.safetensors of gpt2 into {tmp_path}/data/gpt2")
    assert not list((tmp_path / "data" / "gpt2").iterdir())


def test_without_a_network_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_gpt2, "GPT2_URL", f"file://{tmp_path}/nowhere/{{name}}/{{file}}")
    refusal(lambda: GPT.from_pretrained("gpt2-xl", cache=tmp_path), "cannot download",
            "nowhere/gpt2-xl/model.safetensors", f"into {tmp_path}/gpt2-xl")
    (tmp_path / "file").touch()
    refusal(lambda: GPT.from_pretrained("gpt2", cache=tmp_path / "file"), "cannot ")


# ------------------------------------------------------------------------------ transformers


@pytest.fixture
def hugging():
    """make(**config): a small random GPT-2 of transformers."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")

    def make(**config):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**dict(
            vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
            bos_token_id=60, eos_token_id=60, pad_token_id=60) | config)).eval()
        with torch.no_grad():  # also biases and gains, which are 0 and 1
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        return model

    return make


def old_buffers(prefix):
    """Old checkpoints also hold these: the causal mask of each layer, and a constant."""
    mask = torch.ones(24, 24, dtype=torch.uint8).tril().view(1, 1, 24, 24)
    names = itertools.product(range(2), [("bias", mask), ("masked_bias", torch.tensor(-1e4))])
    return {f"{prefix}h.{i}.attn.{name}": value.clone() for i, (name, value) in names}


def write_weights(state, folder, file):
    """Writes one of hf_gpt2.WEIGHTS. If it is an index, it has two shards."""
    from safetensors.torch import save_file

    write = save_file if "safetensors" in file else torch.save
    if not file.endswith(".index.json"):
        return write(state, folder / file)
    name = file.removesuffix(".index.json").replace(".", "-0000{}-of-00002.")
    keys = sorted(state)
    parts = {name.format(1): keys[::2], name.format(2): keys[1::2]}
    for part, held in parts.items():
        write({key: state[key] for key in held}, folder / part)
    (folder / file).write_text(json.dumps(dict(metadata={}, weight_map={
        key: part for part, held in parts.items() for key in held})))


@pytest.mark.parametrize("file", hf_gpt2.WEIGHTS)
@pytest.mark.parametrize("prefix", ["", "transformer.", "module._orig_mod.transformer.",
                                    "_orig_mod.module.transformer."])
@pytest.mark.parametrize("extras", [False, True], ids=["weights", "head-and-masks"])
def test_reads_transformers_files(hugging, tmp_path, file, prefix, extras):
    theirs = hugging()
    state = {prefix + k: v.clone() for k, v in theirs.transformer.state_dict().items()}
    if extras:
        outer = prefix.replace("transformer.", "")
        state |= {f"{outer}lm_head.weight": theirs.lm_head.weight.detach().clone()}
        state |= old_buffers(prefix)
    theirs.config.save_pretrained(tmp_path)
    write_weights(state, tmp_path, file)
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert largest(ours.double()(idx), theirs.double()(idx).logits) < 1e-11


def test_reads_what_save_model_writes(hugging, tmp_path):
    """Of the two tied tensors it keeps lm_head.weight."""
    from safetensors import safe_open
    from safetensors.torch import save_model

    theirs = hugging()
    theirs.config.save_pretrained(tmp_path)
    save_model(theirs, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" in names and "transformer.wte.weight" not in names
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert largest(ours.double()(idx), theirs.double()(idx).logits) < 1e-11


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_reads_other_precisions(hugging, tmp_path, dtype, sharded):
    theirs = hugging().to(dtype)
    theirs.save_pretrained(tmp_path, **dict(max_shard_size="10KB") if sharded else {})
    assert (tmp_path / "model.safetensors").exists() != sharded
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert ours.wte.weight.dtype == torch.float32
    assert largest(ours.double()(idx), theirs.float().double()(idx).logits) < 1e-11


def test_gelu_by_its_other_name(hugging, tmp_path):
    theirs = hugging(activation_function="gelu_pytorch_tanh")
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path).eval(), ids(3, 24)
    assert largest(ours.double()(idx), theirs.double()(idx).logits) < 1e-11


@pytest.mark.parametrize("vocab, kept", [
    (50_257, 50_257), (50_258, 50_257), (50_304, 50_257), (51_200, 50_257),  # padded to 64, 1,024
    (50_256, 50_256), (51_281, 51_281)])  # another tokenizer: kept
def test_rows_of_no_token_are_left_out(hugging, tmp_path, vocab, kept, capsys):
    theirs, idx = hugging(vocab_size=vocab, n_layer=1), ids(2, 24, V=50_000)
    theirs.save_pretrained(tmp_path)
    for _ in range(2):
        ours = GPT.from_pretrained(tmp_path).eval()
    assert ours.config.vocab_size == kept
    with torch.no_grad():
        assert largest(ours.double()(idx), theirs.double()(idx).logits[..., :kept]) < 1e-11
    said = f"{tmp_path}: ids {kept} to {vocab - 1} are left out: its tokenizer lacks them\n"
    assert capsys.readouterr().err.count(said) == (kept < vocab), "said once"


def test_rows_past_a_tokenizer_of_its_own_are_left_out(hugging, tmp_path):
    enc = data_imdb.train_bpe(["the film is good"] * 3, 262)
    theirs, idx = hugging(vocab_size=320), ids(3, 24, V=262)  # padded to a multiple of 64
    theirs.save_pretrained(tmp_path)
    save_tokenizer(tokens_of(enc), tmp_path, 24)
    ours = GPT.from_pretrained(tmp_path).eval()
    assert ours.config.vocab_size == enc.n_vocab == 262
    assert largest(ours.double()(idx), theirs.double()(idx).logits[..., :262]) < 1e-11


def test_transformers_reads_our_folder(hugging, folder):
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is type(hugging()) and not any(report.values()), report
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.transformer.wte.weight
    ours, idx = tiny(dtype=torch.float32).double(), ids(3, 24)
    assert largest(ours(idx), theirs.eval().double()(idx).logits) < 1e-11


def test_scores_and_greedy_samples_are_transformers(hugging, tmp_path):
    theirs = hugging()
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path).double().eval(), ids(3, 10)
    theirs.double()
    loss = theirs(idx, labels=idx).loss
    assert largest(-ours.token_logps(idx, all_but_first(idx)).sum() / 27, loss) < 1e-5
    said = theirs.generate(idx, do_sample=False, max_new_tokens=14, eos_token_id=None,
                           attention_mask=torch.ones_like(idx))
    assert ours.sample(idx.tolist(), 14, -1, 0, temperature=0) == said[:, 10:].tolist()


# ------------------------------------------------------------------------------ refusals


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def weights(change):
    """model.safetensors with change(its bytes)."""
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    return damage


def header(change, extra=b""):
    """model.safetensors with change(its header as a dict), and with more bytes at its end."""
    def edit(raw):
        n = 8 + struct.unpack("<Q", raw[:8])[0]
        head = json.loads(raw[8:n])
        head = json.dumps(change(head) or head).encode()
        return struct.pack("<Q", len(head)) + head + raw[n:] + extra
    return weights(edit)


def entry(name="transformer.ln_f.bias", **changes):
    """Changes one tensor of the header. ln_f.bias is the last one and has 64 bytes."""
    return header(lambda head: head[name].update(changes))


def pickled(change):
    """pytorch_model.bin in place of model.safetensors, with change(the state dict)."""
    def damage(folder):
        (folder / "model.safetensors").unlink()
        state = {key: p.t() if key.endswith(hf_gpt2.CONV1D) else p
                 for key, p in tiny(dtype=torch.float32).state_dict().items()}
        torch.save(change(state), folder / "pytorch_model.bin")
    return damage


def index(weight_map):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    return damage


def filled(name, value):
    return pickled(lambda state: state | {name: torch.full_like(state[name], value)})


FILE = "model.safetensors is damaged or of another kind"
CONFIG, BIN = FILE.replace("model.safetensors", "config.json"), FILE.replace(
    "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("damage, words", [
    (config(model_type="llama"), "model_type is 'llama', wanted 'gpt2' as in GPT-2"),
    (config(activation_function="relu"), "activation_function is 'relu'"),
    (config(activation_function="gelu"), "activation_function is 'gelu', wanted 'gelu_new' as in"),
    (config(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    (config(layer_norm_epsilon=math.nan), "layer_norm_epsilon is nan"),
    (config(n_inner=48), "n_inner is 48, wanted 64 as in GPT-2"),
    (config(scale_attn_weights=False), "scale_attn_weights is False"),
    (config(tie_word_embeddings=False), "tie_word_embeddings is False"),
    (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (config(vocab_size=62), ("wte.weight should have shape (62, 16)", "got (61, 16)")),
    (config(vocab_size=60), ("wte.weight should have shape (60, 16)", "got (61, 16)")),
    (config(n_positions=20), "wpe.weight should have shape (20, 16)"),
    (config(n_embd=32), "wte.weight should have shape (61, 32)"),
    (config(n_layer=3), "it has no h.2.ln_1.weight"),
    (config(n_layer=1), "12 weights that this model does not have, among them h.1."),
    (config(n_head=3), "n_embd 16 is no multiple of n_head 3"),
    *((config(n_layer=x), (CONFIG, f"n_layer is {x!r}; wanted a whole number from 1 to 1,000"))
      for x in (10**9, 10**15, 0, -1, 2.0, True, None, "2", [2])),
    *((config(**{name: 10**15}), f"{name} is 1000000000000000")
      for name in ("vocab_size", "n_embd", "n_head")),
    (config(n_positions=10**15), "n_ctx is 1000000000000000"),
    (config(n_layer=int("9" * 4000)), "n_layer is 9999"),
    (lambda folder: (folder / "config.json").unlink(), ("cannot read", "config.json", "gpt2-xl")),
    *((text(x), CONFIG) for x in ("", "{", "[]", "[" * 10**5, '{"vocab_size": 61}')),
    (lambda folder: (folder / "model.safetensors").unlink(),
     "has neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin nor"),
    (weights(lambda raw: b""), FILE), (weights(lambda raw: raw[:5]), FILE),
    (weights(lambda raw: raw[:100]), (FILE, "a header of", "in a file of 100")),
    (weights(lambda raw: raw[:-1]), (FILE, "ln_f.bias", "has the bytes")),
    (weights(lambda raw: raw + b"\0"), (FILE, "and its header describes")),
    (weights(lambda raw: b"PK\3\4" * 500), FILE),
    (weights(lambda raw: struct.pack("<Q", 2) + b"17"), FILE),
    (weights(lambda raw: struct.pack("<Q", 2) + b"{}"), (FILE, "it has no wte.weight")),
    (weights(lambda raw: struct.pack("<Q", 10**5) + b"[" * 10**5), (FILE, "Recursion")),
    (weights(lambda raw: struct.pack("<Q", 11) + b'{"a": {}}  '), FILE),
    (weights(lambda raw: struct.pack("<Q", 2**62) + raw[8:]), (FILE, "a header of 4,611,686,")),
    (entry(dtype="F8_E4M3"), "ln_f.bias has the dtype F8_E4M3, wanted one of F64, F32"),
    (entry(dtype=["F32"]), FILE), (entry(dtype="F64"), "has the bytes"),
    (entry(dtype="U8", shape=[64]), "ln_f.bias should have shape (16,) and hold floats, got (64,)"),
    (entry(shape=[17]), "has the bytes"), (entry(shape=[-16]), "has the bytes"),
    (entry(shape=[-4, -4]), "has the bytes"), (entry(shape=["16"]), FILE),
    (entry(shape=[16, 1]), "ln_f.bias should have shape (16,)"), (entry(shape=16), FILE),
    (entry(shape=[10**9] * 50), "of shape [1000"), (entry(data_offsets=[0, 64]), "has the bytes"),
    (entry(data_offsets=[-64, 0]), "has the bytes"),
    (entry(data_offsets=[10**9, 10**9 + 64]), "has the bytes"),
    (entry(data_offsets=[0]), FILE), (entry(data_offsets=None), FILE),
    (entry("transformer.wte.weight", data_offsets=[64, 64 + 61 * 64]), "has the bytes"),
    (header(lambda head: head | {"wte.weight": head["transformer.wte.weight"]}), "has the bytes"),
    (header(lambda head: list(head)), FILE), (header(lambda head: dict.fromkeys(head)), FILE),
    (pickled(lambda state: [1]), (BIN, "it does not hold tensors by name")),
    (pickled(lambda state: {"wte.weight": 3}), "it does not hold tensors by name"),
    (pickled(lambda state: {"model": state}), "it does not hold tensors by name"),
    (pickled(lambda state: state | {"transformer.wte.weight": state["wte.weight"]}), "twice"),
    (pickled(lambda state: state | {"lm_head.weight": torch.zeros(61, 16)}), "its head differs"),
    (pickled(lambda state: state | {"wte.weight": torch.zeros(61, 17)}), "got (61, 17)"),
    (pickled(lambda state: state | {"wte.weight": torch.zeros(61, 16).long()}), "and torch.int64"),
    (pickled(lambda state: state | {"wte.weight": torch.zeros(())}), BIN),
    (pickled(lambda state: state | {"ln_f.bias": torch.zeros(16).double() + 1e300}), "ln_f.bias"),
    (pickled(lambda state: state | {"ln_f.bias": torch.zeros(16, device="meta")}), BIN),
    (pickled(lambda state: {}), "it has no wte.weight"),
    *((filled("h.1.mlp.c_fc.bias", x), "h.1.mlp.c_fc.bias holds NaN or infinite numbers")
      for x in (math.nan, math.inf, -math.inf)),
    (index({}), "index.json is damaged"), (index({"weight_map": ["a"]}), "index.json is damaged"),
    (index({"weight_map": {"a": "model-2.safetensors"}}), ("cannot read", "model-2.safetensors")),
    (index({"weight_map": {"a": "../../other.safetensors"}}), "a shard is not a weight file"),
    (index({"weight_map": {"a": "model.safetensors.index.json"}}), "a shard is not a weight file"),
    (index({"weight_map": {"a": 3}}), "index.json is damaged"),
    (lambda folder: (folder / "vocab.json").write_text("{}"), "cannot read")])
def test_another_model_is_refused_in_one_sentence(folder, damage, words):
    damage(folder)
    sentence = refusal(lambda: GPT.from_pretrained(folder), folder,
                       *[words] if isinstance(words, str) else words)
    assert "delete it" not in sentence and "fetch" not in sentence, "a user's file must not change"
    assert len(sentence) < 1000


def refusal(work, *words) -> str:
    with pytest.raises(UserError) as caught:
        work()
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    for word in words:
        assert str(word) in sentence, f"{word!r} is not in: {sentence}"
    return sentence
