"""GPT-2 checkpoints in the Hugging Face layout: read into our GPT, and written from it.

A folder holds config.json and model.safetensors or pytorch_model.bin.
"""

import json
import mmap
import struct
import sys
from pathlib import Path

import torch

from support.runs import UserError, load_tensors, os_errors, save_json, write_whole

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
KIND = dict(  # what GPT-2 is by its config.json, besides its sizes
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, tie_word_embeddings=True, scale_attn_by_inverse_layer_idx=False)
GPT2_URL = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"


def is_checkpoint(name: str) -> bool:
    """Whether `name` is one of GPT-2's, or a folder with weights in it."""
    return name in GPT2_NAMES or any((Path(name) / weights).exists() for weights in WEIGHTS)


def folder_of(name: str, cache: Path) -> Path:
    """The folder `name`, or cache/name with GPT-2's two files, which the first call downloads."""
    if name not in GPT2_NAMES:
        return Path(name)
    folder = cache / name
    with os_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            url = GPT2_URL.format(name=name, file=file)
            try:
                torch.hub.download_url_to_file(url, str(folder / file), None, sys.stderr.isatty())
            except OSError as e:
                raise UserError(f"could not download {url} ({e}): put config.json and "
                                f"model.safetensors of {name} into {folder}") from None
    return folder


def read_config(folder: Path) -> dict:
    """GPTConfig's fields from a Hugging Face config.json. Raises UserError for another model."""
    try:
        raw = json.loads((folder / "config.json").read_text())
        config = dict(vocab_size=raw["vocab_size"], n_ctx=raw["n_positions"], n_embd=raw["n_embd"],
                      n_layer=raw["n_layer"], n_head=raw["n_head"])
        if raw["n_embd"] % raw["n_head"]:
            raise ValueError(f"n_embd {raw['n_embd']} does not divide by n_head {raw['n_head']}")
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as e:
        raise UserError(f"{folder} has no config.json of a GPT-2 ({type(e).__name__}: {e}); give "
                        f"one of {', '.join(GPT2_NAMES)} or a folder with one") from None
    raw["n_inner"] = raw.get("n_inner") or 4 * raw["n_embd"]  # null or absent
    for key, value in dict(KIND, n_inner=4 * raw["n_embd"]).items():
        if raw.get(key, value) != value:
            raise UserError(f"{folder}/config.json: {key} is {raw[key]!r}; GPT-2's is {value!r}")
    return config


def read_weights(folder: Path) -> dict:
    """The tensors of model.safetensors (8-byte length, JSON, raw bytes) or pytorch_model.bin."""
    path, pickled = (folder / name for name in WEIGHTS)
    if not path.exists() and not pickled.exists():
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS)}")
    if not path.exists():
        tensors = load_tensors(pickled)
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise UserError(f"{pickled} does not hold tensors by name")
        return tensors
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "BOOL": torch.bool, "U8": torch.uint8}
    try:
        with os_errors("read", path), open(path, "rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = struct.unpack("<Q", raw[:8])[0]
        header = dict(json.loads(raw[8 : 8 + length]))
        header.pop("__metadata__", None)
        data = memoryview(raw)[8 + length :]
        return {key: torch.frombuffer(data[slice(*item["data_offsets"])],
                                      dtype=dtypes[item["dtype"]]).view(item["shape"])
                for key, item in header.items()}
    except (ValueError, KeyError, TypeError, struct.error, RuntimeError) as e:
        raise UserError(f"{path} is truncated or no safetensors file ({e}): delete it, and fetch "
                        "it again") from None


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy a folder's weights into a GPT of the same shape. UserError where they do not fit."""
    state = {k.removeprefix("transformer."): v for k, v in read_weights(folder).items()
             if not k.endswith((".attn.bias", ".attn.masked_bias"))}  # the causal mask
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):
        raise UserError(f"{folder}: its head is not tied to its embedding; GPT-2's is")
    for key, p in model.state_dict().items():  # they share the parameters' memory
        w = state.pop(key, None)
        if w is not None and key.endswith(CONV1D):
            w = w.t()  # GPT-2's have the shape (in, out)
        if w is None or w.shape != p.shape:
            got = "nothing" if w is None else f"shape {tuple(w.shape)}"
            raise UserError(f"{folder}: {key} should have shape {tuple(p.shape)} by its "
                            f"config.json; the weights hold {got}")
        p.copy_(w)
    if state:
        raise UserError(f"{folder}: {len(state)} weights that GPT-2 does not have, the first "
                        f"{next(iter(state))}")


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors, for AutoModelForCausalLM.from_pretrained."""
    folder, c = Path(folder), model.config
    with os_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        KIND, architectures=["GPT2LMHeadModel"], torch_dtype="float32", vocab_size=c.vocab_size,
        n_positions=c.n_ctx, n_ctx=c.n_ctx, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for key, p in model.state_dict().items():
        blobs.append((p.t() if key.endswith(CONV1D) else p).float().cpu().contiguous())
        header["transformer." + key] = dict(dtype="F32", shape=list(blobs[-1].shape),
                                            data_offsets=[offset, offset + 4 * p.numel()])
        offset += 4 * p.numel()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # tensors start on 8 bytes
    write_whole(folder / "model.safetensors", lambda file: file.writelines(
        [struct.pack("<Q", len(head)), head, *(blob.numpy() for blob in blobs)]))
    save_json(folder / "config.json", config, indent=1)
