"""Reads GPT-2 checkpoints in the Hugging Face layout into our GPT, and writes them.

A folder holds config.json, the weights in one of WEIGHTS, and often a tokenizer's files. The
published GPT-2 models are downloaded by name.
"""

import functools
import http.client
import json
import math
import mmap
import os
import re
import struct
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from support.runs import (UserError, fetch, first_line, load_tensors, reading, save_json,
                          write_whole, writing)
from support.tokenizer_files import read_tokenizer, save_tokenizer

GPT2_SIZES = {name: dict(vocab_size=50257, n_ctx=1024, n_layer=layers, n_head=heads, n_embd=width)
              for name, layers, heads, width in (
                  ("gpt2", 12, 12, 768), ("gpt2-medium", 24, 16, 1024),
                  ("gpt2-large", 36, 20, 1280), ("gpt2-xl", 48, 25, 1600))}
GPT2_URL = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",  # the first that exists is read
           "pytorch_model.bin", "pytorch_model.bin.index.json")
ANOTHER = "restore it, or give the folder of a finished run, a folder in Hugging Face's layout, " \
          f"or one of {', '.join(GPT2_SIZES)}"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|transformer\.)+")  # DDP, torch.compile, transformers
KIND = dict(  # what GPT-2's config.json says besides the sizes
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, tie_word_embeddings=True, scale_attn_by_inverse_layer_idx=False)
SAME_GELU = "gelu_pytorch_tanh"  # another name of gelu_new
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "BOOL": torch.bool, "U8": torch.uint8}


def check_sizes(sizes: dict) -> None:
    """ValueError if a size of a GPT is not a whole number, or out of bounds, or if n_embd is not a
    multiple of n_head."""
    for name in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd"):
        most = 1000 if name == "n_layer" else 10**6
        if type(sizes[name]) is not int or not 0 < sizes[name] <= most:
            raise ValueError(f"{name} is {first_line(repr(sizes[name]))}; wanted a whole number "
                             f"from 1 to {most:,}")
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"n_embd {sizes['n_embd']} is no multiple of n_head {sizes['n_head']}")


def is_checkpoint(name: str) -> bool:
    """Whether `name` is a published GPT-2, or a folder with weights."""
    return name in GPT2_SIZES or any(os.path.exists(f"{name}/{weights}") for weights in WEIGHTS)


# ------------------------------------------------------------------------------ reading

def read(name: str, cache: Path, make: Callable[[dict], torch.nn.Module]) -> torch.nn.Module:
    """The model make(sizes) with the weights of the folder `name`, or of the published GPT-2 of
    that name, which the first call downloads to `cache`. UserError for another kind of model.

    The embedding may have more rows than the tokenizer has tokens, if it was padded or if tokens
    were added. These rows are removed, so that they are never sampled; other logits do not change.
    """
    if name in GPT2_SIZES:
        folder, remedy = cache / name, "delete it, and it is fetched again"
        download(name, folder / WEIGHTS[0])
        sizes, needed = GPT2_SIZES[name], 50257
    else:
        folder, remedy = Path(name), ANOTHER
        sizes, tokens = read_sizes(folder), read_tokenizer(folder)
        needed = 50257 if tokens is None else len(tokens) + 1
    rows = sizes["vocab_size"]
    if needed < rows < needed + 1024:
        sizes = sizes | {"vocab_size": needed}
        say_once(f"{folder}: ids {needed} to {rows - 1} are left out: its tokenizer lacks them")
    with reading(folder, remedy):
        path = next(filter(Path.exists, (folder / weights for weights in WEIGHTS)), None)
    if path is None:
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS)}; {remedy}")
    with reading(path, remedy):
        state = gpt2_state(read_weights(path))
        if len(state.get("wte.weight", ())) == rows:  # the number in its config.json
            state["wte.weight"] = state["wte.weight"][: sizes["vocab_size"]]
        return with_weights(lambda: make(sizes), state)


@functools.cache  # π_ref may be read again for each evaluation
def say_once(text: str) -> None:
    print(text, file=sys.stderr)


def read_sizes(folder: Path) -> dict:
    """GPTConfig's sizes from a Hugging Face config.json. UserError for another model."""
    path = folder / "config.json"
    with reading(path, ANOTHER):
        raw = json.loads(path.read_bytes())
        if raw.get("activation_function") == SAME_GELU:
            del raw["activation_function"]
        for key, value in KIND.items():
            if raw.get(key, value) != value:
                raise UserError(f"{path}: {key} is {first_line(repr(raw[key]))}, wanted {value!r} "
                                "as in GPT-2: give a GPT-2 model")
        sizes = dict(vocab_size=raw["vocab_size"], n_ctx=raw["n_positions"], n_embd=raw["n_embd"],
                     n_layer=raw["n_layer"], n_head=raw["n_head"])
        check_sizes(sizes)
        if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
            raise UserError(f"{path}: n_inner is {first_line(repr(raw['n_inner']))}, wanted "
                            f"{4 * raw['n_embd']} as in GPT-2: give a GPT-2 model")
    return sizes


def read_weights(path: Path) -> dict:
    """The tensors in one of the files WEIGHTS, by name. An index file names other files."""
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        if any(Path(shard).name != shard or shard.endswith(".json") for shard in shards):
            raise ValueError(f"a shard is not a weight file of this folder: {first_line(shards)}")
        tensors = {}
        for shard in shards:
            with reading(path.parent / shard, ANOTHER):
                tensors |= read_weights(path.parent / shard)
        return tensors
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else \
        load_tensors(path, ANOTHER)
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError("it does not hold tensors by name")
    return tensors


def read_safetensors(path: Path) -> dict:
    """The tensors of a file: an 8-byte length, a JSON header of that length, and the tensors' bytes
    without a gap. Raises ValueError, KeyError, TypeError ... if the header does not describe the
    file exactly."""
    with open(path, "rb") as file:
        raw = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    if start > len(raw):
        raise ValueError(f"it has a header of {start - 8:,} bytes in a file of {len(raw):,}")
    header, data, end, tensors = json.loads(bytes(raw[8:start])), raw[start:], 0, {}
    header.pop("__metadata__", None)
    for key, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        shape, name, (first, last) = item["shape"], item["dtype"], item["data_offsets"]
        if name not in DTYPES:
            raise ValueError(f"{key} has the dtype {name}, wanted one of {', '.join(DTYPES)}")
        size = math.prod(shape) * DTYPES[name].itemsize
        if min(shape, default=1) < 1 or (first, last) != (end, end + size) or last > len(data):
            raise ValueError(f"{key} of shape {shape} has the bytes {first} to {last} of "
                             f"{len(data)}, wanted {end} to {end + size}")
        tensors[key] = torch.frombuffer(data[first:last], dtype=DTYPES[name]).view(shape)
        end = last
    if end != len(data):
        raise ValueError(f"it has {len(data):,} bytes of data, and its header describes {end:,}")
    return tensors


def gpt2_state(tensors: dict) -> dict:
    """The tensors, not copied, with the names and shapes of our GPT."""
    state = {}
    for key, w in tensors.items():
        name = WRAPPERS.sub("", key)
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            continue
        if name in state:
            raise ValueError(f"it holds {name} twice")
        state[name] = w.t() if name.endswith(CONV1D) else w  # GPT-2 stores (in, out)
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.setdefault("wte.weight", head)):
        raise ValueError("its head differs from its embedding; in GPT-2 they are one matrix")
    return state


def with_weights(make: Callable[[], torch.nn.Module], state: dict) -> torch.nn.Module:
    """make()'s model with copies of these tensors in float32. ValueError names a tensor that is
    missing, unknown, of another shape or not finite."""
    with torch.device("meta"):  # draws no weights, since the tensors replace them
        model = make()
    others, filled = state.keys() - model.state_dict().keys(), {}
    for key, p in model.state_dict().items():
        if key not in state:
            raise ValueError(f"it has no {key}, wanted with shape {tuple(p.shape)}")
        w = state[key]
        if w.shape != p.shape or not w.is_floating_point():
            raise ValueError(f"{key} should have shape {tuple(p.shape)} and hold floats, got "
                             f"{tuple(w.shape)} and {w.dtype}")
        w = w.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not w.isfinite().all():
            raise ValueError(f"{key} holds NaN or infinite numbers")
        filled[key] = w
    if others:
        raise ValueError(f"it has {len(others)} weights that this model does not have, among them "
                         f"{min(others)}")
    model.load_state_dict(filled, assign=True)
    return model


def linked_sha256(url: str) -> str | None:
    """The SHA-256 of a file, which huggingface.co sends with its redirect; None if it sends none.
    """
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None  # then open() raises the redirect as an HTTPError

    try:
        urllib.request.build_opener(Stay).open(urllib.request.Request(url, method="HEAD"), None, 60)
    except (OSError, http.client.HTTPException) as answer:  # the redirect, or no network
        tag = (getattr(answer, "headers", None) or {}).get("X-Linked-Etag", "").strip('"')
        return tag if len(tag) == 64 else None
    return None


def download(name: str, path: Path) -> None:
    """Downloads GPT-2's model.safetensors to `path`, where it appears only when it is whole."""
    if path.exists():
        return
    url, remedy = GPT2_URL.format(name=name, file=path.name), \
        f"put {path.name} of {name} into {path.parent}"
    fetch(url, path, remedy, linked_sha256(url))
    try:  # without a checksum the file could be a network's login page
        with reading(url, f"try again, or {remedy}"):
            read_safetensors(path)
    except UserError:
        path.unlink()
        raise


# ------------------------------------------------------------------------------ writing

def export(model: torch.nn.Module, tokens: list[bytes], folder: Path) -> None:
    """Makes a folder for AutoModelForCausalLM and AutoTokenizer. UserError if it holds a file."""
    with reading(folder, "give another folder"):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: give a new folder")
    save(model, folder)
    save_tokenizer(tokens, folder, model.config.n_ctx)
    print(f"wrote {folder}: AutoModelForCausalLM and AutoTokenizer of transformers read it")


def save(model: torch.nn.Module, folder: Path) -> None:
    """Writes model.safetensors and config.json, for AutoModelForCausalLM.from_pretrained."""
    folder, c = Path(folder), model.config
    with writing(folder):
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
    head += b" " * (-len(head) % 8)  # tensors start at multiples of 8
    write_whole(folder / "model.safetensors", lambda file: file.writelines(
        [struct.pack("<Q", len(head)), head, *(blob.numpy() for blob in blobs)]))
    save_json(folder / "config.json", config, indent=1)
