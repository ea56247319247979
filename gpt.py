"""GPT-2's architecture: token ids in; hidden states, logits, per-token log-probs and samples out.

Reads and writes GPT-2 checkpoints in the Hugging Face layout. Knows nothing of text, rewards or
training; `main` alone imports data_imdb, to sample from words.

    python gpt.py --checkpoint out/toy/sft --prompt "The film" -n 4

B sequences, T tokens, V vocabulary, C channels, H heads, M scored tokens.
"""

import argparse
import functools
import json
import math
import mmap
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.runs import UserError, load_tensors, main_exit, os_errors, write_whole


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    n_ctx: int = 1024  # the longest sequence that has a position embedding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # 0 wherever log-probs are compared: DPO must start at log 2


class Linear(nn.Linear):
    def forward(self, x):
        return project(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]
        # SDPA aligns its causal mask to the top left, so a cached prefix allows one query at a time
        causal = cache is None or T > 1  # in training no comparison of shapes: torch.compile's vary
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's own gelu
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. Module names are the checkpoint's own, so that a state dict needs no renaming."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"{config} has heads of unequal width"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head: tied weights
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # each block adds to the residual stream twice: keep its variance flat
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("c_attn.bias") or name.endswith("c_fc.bias") or "c_proj" in name:
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, start=0):
        """The last hidden states, after ln_f: idx (B, T) -> (B, T, C).

        With `cache` (n_layer, 2, B, H, n_ctx, C/H), idx continues what the cache holds before
        `start`: any T at start 0, one token at a time after it.
        """
        T = idx.size(1)
        if start + T > self.config.n_ctx:
            raise ValueError(f"{start + T} tokens do not fit a context of {self.config.n_ctx}")
        x = self.wte(idx) + self.wpe.weight[start : start + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> logits (..., V), under autocast up to one constant a position."""
        return project(hidden, head_weight(self.wte.weight))

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V); position t predicts token t + 1."""
        return self.head(self.hidden(idx))

    def token_logps(self, idx, mask):
        """log π(idx[b, t] | idx[b, :t]) in nats where mask (B, T) is true, 0 elsewhere: (B, T).

        The head is applied only where it is asked for, and the result is float32 (float64 for a
        float64 model) whatever the precision of the matrix products. mask[:, 0] must be false:
        nothing predicts a first token.
        """
        mask, targets = mask[:, 1:], idx[:, 1:]
        hidden = self.hidden(idx[:, :-1])[mask]  # (M, C): position t - 1 predicts token t
        rows = max(1, LOGITS_BUDGET[idx.device.type] // (4 * self.config.vocab_size))
        grad, score = torch.is_grad_enabled(), HeadLogps.apply
        if grad and len(hidden) > rows:  # more than may be kept: made again in the backward pass
            score = functools.partial(checkpoint, score, use_reentrant=False)
        logps = torch.cat([score(h, self.wte.weight, t, grad) for h, t in zip(
            hidden.split(rows), targets[mask].split(rows))])  # (M,)
        out = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
        return F.pad(out.masked_scatter(mask, logps), (1, 0))

    @torch.no_grad()
    def sample(self, prompts, max_new, eos, seed, temperature=1.0, top_k=0, top_p=1.0, rows=512,
               progress=lambda n: None):
        """Continue each prompt until `eos`, `max_new` tokens or the end of the context.

        prompts: lists of token ids -> as many lists of new ids, `eos` included where it was drawn
        (-1: never). temperature 0 takes the likeliest token; top_k 0 and top_p 1 filter nothing.
        At most `rows` prompts run at once, divided among the `cores`; `progress(n)` hears of
        each n completions made. Row i's token s uses the uniform u[i, s], drawn up front from
        `seed`, so that a completion does not depend on how rows are batched, and two policies meet
        the same luck (common random numbers).
        Raises ValueError for a prompt that is empty or leaves no room in the context.
        """
        for prompt in prompts:
            if not 0 < len(prompt) < self.config.n_ctx:
                raise ValueError(f"a prompt of {len(prompt)} tokens; the context is "
                                 f"{self.config.n_ctx}: give 1 to {self.config.n_ctx - 1}")
        uniforms = torch.rand(len(prompts), max_new, generator=torch.Generator().manual_seed(seed))
        device, training, done = self.wte.weight.device, self.training, []
        n, at_once = len(prompts), cores(device)
        size = math.ceil(n / (at_once * math.ceil(n / rows))) if n else 1
        parts = ((prompts[i : i + size], uniforms[i : i + size], eos, temperature, top_k, top_p)
                 for i in range(0, n, size))
        self.eval()
        try:
            for part in on_cores(device, lambda part: self._sample_rows(*part), parts):
                done += part
                progress(len(part))
        finally:
            self.train(training)
        return done

    def _sample_rows(self, prompts, uniforms, eos, temperature, top_k, top_p):
        """Every row starts at position 0; one still inside its prompt takes its own next token."""
        device, config = self.wte.weight.device, self.config
        prompt_lens = torch.tensor([len(p) for p in prompts])
        ends = (prompt_lens + uniforms.size(1)).clamp(max=config.n_ctx)  # b stops before ends[b]
        tokens = torch.zeros(len(prompts), int(ends.max()), dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        stops = ends.clone()  # one past each row's last token
        prompt_lens, ends, tokens, stops, uniforms = (
            x.to(device) for x in (prompt_lens, ends, tokens, stops, uniforms))
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) \
            else self.wte.weight.dtype
        cache = torch.empty(config.n_layer, 2, len(prompts), config.n_head, tokens.size(1),
                            config.n_embd // config.n_head, dtype=dtype, device=device)
        live = torch.arange(len(prompts), device=device)  # the rows that still run
        alive = torch.ones_like(live, dtype=torch.bool)
        start, t = 0, min(len(p) for p in prompts)  # the shortest prompt goes in at once
        w = head_weight(self.wte.weight)
        while t < tokens.size(1):
            hidden = self.hidden(tokens[live, start:t], cache, start)[:, -1]
            step = t - prompt_lens[live]
            u = uniforms[live, step.clamp(0, uniforms.size(1) - 1)]
            new = draw(project(hidden, w), u, temperature, top_k, top_p)
            new = torch.where(alive & (step >= 0), new, tokens[live, t])  # in its prompt: its own
            tokens[live, t] = new
            ended = alive & (step >= 0) & ((new == eos) | (t + 1 >= ends[live]))
            stops[live] = torch.where(ended, t + 1, stops[live])
            alive &= ~ended
            start, t = t, t + 1
            if t % 4 == 0:  # asking is a CPU-GPU sync; copying the cache costs about a step
                left = int(alive.sum())
                if left == 0:
                    break
                if left < 0.85 * len(live):
                    live, cache, alive = live[alive], cache[:, :, alive], alive[alive]
        stops, lens, tokens = stops.tolist(), prompt_lens.tolist(), tokens.tolist()
        return [row[a:b] for row, a, b in zip(tokens, lens, stops)]

    @classmethod
    def load(cls, path: Path, dropout: float = 0.0) -> "GPT":
        """The model of a run's model.pt. Raises UserError where the file is no such thing."""
        saved = load_tensors(path)
        try:
            with torch.device("meta"):  # no weights to draw that the file's replace
                model = cls(GPTConfig(**saved["config"] | {"dropout": dropout}))
            model.load_state_dict(saved["model"], assign=True)
        except (KeyError, TypeError, RuntimeError) as e:
            raise UserError(f"{path} holds no GPT of this code ({str(e).splitlines()[0]}): delete "
                            "its folder and run the stage that makes it") from None
        return model

    def saved(self) -> dict:
        """What `load` reads: weights and configuration."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0, cache: Path = Path("data")) -> "GPT":
        """GPT-2's weights, from a folder in the Hugging Face layout or by name from its hub.

        name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or a folder with config.json and
        model.safetensors or pytorch_model.bin. Raises UserError for whatever is not a GPT-2.
        """
        folder = download_gpt2(name, cache) if name in GPT2_NAMES else Path(name)
        config = read_config(folder)
        model = cls(GPTConfig(**config, dropout=dropout))
        state = {k.removeprefix("transformer."): v for k, v in read_weights(folder).items()
                 if not k.endswith((".attn.bias", ".attn.masked_bias"))}  # the causal mask
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.get("wte.weight", head)):
            raise UserError(f"{folder}: its head is not tied to its embedding; GPT-2's is")
        for key, p in model.state_dict().items():  # they share the parameters' memory
            w = state.pop(key, None)
            if w is not None and key.endswith(CONV1D):
                w = w.t()  # GPT-2 was trained with weights of shape (in, out)
            if w is None or w.shape != p.shape:
                got = "nothing" if w is None else f"shape {tuple(w.shape)}"
                raise UserError(f"{folder}: {key} should have shape {tuple(p.shape)} by its "
                                f"config.json; the weights hold {got}")
            p.copy_(w)
        if state:
            raise UserError(f"{folder}: {len(state)} weights that GPT-2 does not have, the first "
                            f"{next(iter(state))}")
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors, for AutoModelForCausalLM.from_pretrained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        c = self.config
        config = dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new",
            vocab_size=c.vocab_size, n_positions=c.n_ctx, n_ctx=c.n_ctx, n_embd=c.n_embd,
            n_layer=c.n_layer, n_head=c.n_head, layer_norm_epsilon=1e-5, resid_pdrop=c.dropout,
            embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=True,
            torch_dtype="float32", bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
        for key, p in self.state_dict().items():
            blobs.append((p.t() if key.endswith(CONV1D) else p).float().cpu().contiguous())
            end = offset + 4 * p.numel()
            header["transformer." + key] = dict(
                dtype="F32", shape=list(blobs[-1].shape), data_offsets=[offset, end])
            offset = end
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)  # tensors start on 8 bytes

        text = json.dumps(config, indent=1).encode()
        write_whole(folder / "model.safetensors", lambda file: file.writelines(
            [struct.pack("<Q", len(head)), head, *(blob.numpy() for blob in blobs)]))
        write_whole(folder / "config.json", lambda file: file.write(text))


def head_weight(w):
    """W (V, C) as the head's products take it: under autocast in its dtype and less its mean row.
    Logits then move by one constant, which no softmax sees. GPT-2's lie near -35 to -110, where
    bf16 has no step finer than 0.25."""
    if not torch.is_autocast_enabled(w.device.type):
        return w
    return (w - w.mean(0)).to(torch.get_autocast_dtype(w.device.type))


def project(h, w, bias=None):
    """h Wᵀ + bias: h (..., C), W (V, C) -> (..., V). A large W is multiplied by oneDNN where a CPU
    works in float32 and without autograd: at V = 50257 torch's own takes 1.3 to 1.9 times as long.
    """
    if w.device.type == "cpu" and w.numel() >= 2**19 and w.dtype == torch.float32 and not \
            (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and \
            torch.backends.mkldnn.is_available():
        return F.linear(h.to_mkldnn(), w, bias).to_dense()
    return F.linear(h, w, bias)


LOGITS_BUDGET = {"cpu": 2**30, "cuda": 2**33}  # bytes that a thread may keep for backward
BLOCK_BYTES = {"cpu": 2**26, "cuda": 2**28}  # at work at once: a CPU's allocator is slow with more


class HeadLogps(torch.autograd.Function):
    """log softmax(h Wᵀ)[target], reduced in float32: h (M, C), W (V, C), targets (M,) -> (M,).

    What -F.cross_entropy(h Wᵀ, targets) computes, keeping one (M, V) tensor in place of several:
    softmax - onehot, which is -d log p / d logits, so that backward is two matrix products.
    """

    @staticmethod
    def forward(ctx, h, w, targets, grad):
        w = head_weight(w)
        h = h.to(w.dtype)
        full = torch.promote_types(h.dtype, torch.float32)
        logps = torch.empty(len(h), dtype=full, device=h.device)
        slopes = h.new_empty(len(h) if grad else 0, len(w))
        rows = max(1, BLOCK_BYTES[h.device.type] // (4 * len(w)))
        for i in range(0, len(h), rows):
            part = slice(i, i + rows)
            logits, target = project(h[part], w), targets[part, None]
            logp = logits.log_softmax(-1, dtype=full).gather(-1, target)
            logps[part] = logp[:, 0]
            if grad:
                torch.softmax(logits, -1, out=slopes[part])
                slopes[part].scatter_(-1, target, logp.expm1().to(h.dtype))  # p - 1
        ctx.save_for_backward(h, w, slopes)
        return logps

    @staticmethod
    def backward(ctx, grad):
        h, w, slopes = ctx.saved_tensors
        scale = -grad[:, None].to(h.dtype)
        return (slopes @ w) * scale, slopes.t() @ (h * scale), None, None


def pad_rows(prompts, completions, fill=0):
    """Token lists to idx (B, T), prompt_lens (B,) and lengths (B,), which count both parts."""
    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    idx = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows])
    return idx, torch.tensor([len(p) for p in prompts]), lengths


def cores(device) -> int:
    """Parts of a batch at work at once: on a CPU one a core, four at most, since Python itself runs
    one at a time; on a GPU one."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return 1
    return max((4, 3, 2), key=lambda n: n * (threads // n))  # the fewest cores idle


def on_cores(device, work, parts):
    """work(part) of each, in their order; on a CPU `cores` of them at once, in threads. Small
    operations divide badly among cores, whole parts do not. Not for work that draws random numbers.
    """
    parts = list(parts)
    n, threads = min(cores(device), len(parts)), torch.get_num_threads()
    if n <= 1:
        yield from map(work, parts)
        return
    grad, cast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu")

    def alone(part):  # a new thread has these modes at their defaults
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, cast):
            return work(part)

    yield from workers(n, threads // n).map(alone, parts)


@functools.cache
def workers(n: int, threads: int) -> ThreadPoolExecutor:
    """n of Python's threads with `threads` of torch's each: kept, as new ones have to warm up."""
    return ThreadPoolExecutor(n, "core", torch.set_num_threads, (threads,))


def alike(lengths, device, most: int):
    """Row indices (B,) by length, in parts of `most` or fewer: on a CPU a padded position costs as
    much as a token, and four parts with padding of their own take a third less than one; parts of
    fewer than ten lose it again. On a GPU, one."""
    parts = min(4, len(lengths) // 10) if device.type == "cpu" else 1
    return [rows for part in lengths.argsort().chunk(max(1, parts)) for rows in part.split(most)]


def by_length(score, idx, lengths):
    """score(idx of some rows, those rows) -> their values, of rows alike in length together:
    idx (B, T), lengths (B,) -> (B,), in the order of idx."""
    parts = alike(lengths, idx.device, len(lengths))
    out = [score(idx[rows, : int(lengths[rows].max())] if len(parts) > 1 else idx[rows], rows)
           for rows in parts]  # one part: a GPU need not wait to learn its length
    return torch.cat(out)[torch.cat(parts).argsort()]


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row by inverse CDF: logits (B, V), uniforms u (B,) in [0, 1) -> (B,).

    The first token whose cumulative probability exceeds u. torch.multinomial would draw V
    exponentials a row, which on a CPU takes longer than all the rest of a step.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits / temperature if temperature != 1 else logits
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        out = probs.cumsum(-1) - probs >= top_p  # the mass before a token: the first always stays
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    probs = logits.softmax(-1)
    # A cumulative sum over V is slow: first over blocks of 256, then within the block that was hit.
    V, n = probs.size(-1), probs.size(-1) // 256
    blocks = probs[:, : 256 * n].unflatten(-1, (n, 256)).sum(-1)
    rest = probs[:, 256 * n :].sum(-1, keepdim=True)
    block, u = search(torch.cat([blocks, rest], -1), u[:, None])
    tokens = 256 * block + torch.arange(256, device=u.device)  # (B, 256)
    inside, _ = search(probs.gather(-1, tokens.clamp(max=V - 1)) * (tokens < V), u)
    return tokens.gather(-1, inside)[:, 0]


def search(weights, x):
    """The first index whose cumulative weight exceeds x, and what of x is left there: (B, 1)."""
    cdf = weights.cumsum(-1, dtype=torch.float64)  # a GPU's float32 sums need not be monotone
    total = cdf[:, -1:]
    x = torch.minimum(x, total.nextafter(torch.zeros_like(total)))  # rounding: never past the end
    at = torch.searchsorted(cdf, x, right=True)
    return at, x - F.pad(cdf, (1, 0)).gather(-1, at)


GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
GPT2_URL = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"


def download_gpt2(name: str, cache: Path) -> Path:
    """cache/name with its two files, fetched once; whole or not at all, as torch.hub renames."""
    folder = cache / name
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
    raw["n_inner"] = raw.get("n_inner") or 4 * raw["n_embd"]
    wanted = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
                  n_inner=4 * raw["n_embd"], scale_attn_weights=True, tie_word_embeddings=True,
                  scale_attn_by_inverse_layer_idx=False)
    for key, value in wanted.items():
        if raw.get(key, value) != value:
            raise UserError(f"{folder}/config.json: {key} is {raw[key]!r}; GPT-2's is {value!r}")
    return config


def read_weights(folder: Path) -> dict:
    """The tensors of model.safetensors (8-byte length, JSON, raw bytes) or pytorch_model.bin."""
    path, pickled = (folder / name for name in WEIGHTS)
    if not path.exists():
        if not pickled.exists():
            raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS)}")
        tensors = load_tensors(pickled)
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise UserError(f"{pickled} does not hold tensors by name")
        return tensors
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "BOOL": torch.bool, "U8": torch.uint8}
    try:
        with os_errors("read", path), open(path, "rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = struct.unpack("<Q", raw[:8])[0]
        header = dict(json.loads(raw[8 : 8 + length]))
        header.pop("__metadata__", None)
        data, tensors = memoryview(raw)[8 + length :], {}
        for key, item in header.items():
            flat = torch.frombuffer(data[slice(*item["data_offsets"])], dtype=dtypes[item["dtype"]])
            tensors[key] = flat.view(item["shape"])
    except (ValueError, KeyError, TypeError, struct.error, RuntimeError) as e:
        raise UserError(f"{path} is truncated or no safetensors file ({e}): delete it, and fetch "
                        "it again") from None
    return tensors


def main(argv=None):
    import data_imdb

    parser = argparse.ArgumentParser(description="Sample from a checkpoint.")
    parser.add_argument("--checkpoint", default="out/toy/sft", metavar="RUN",
                        help="a run's folder, a Hugging Face folder, or gpt2[-medium|-large|-xl]")
    parser.add_argument("--prompt", default="The", help="the text to continue")
    parser.add_argument("-n", type=int, default=4, help="how many samples")
    parser.add_argument("--max-new", type=int, default=64, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.n < 1 or args.max_new < 1 or not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise UserError("give -n and --max-new from 1, --temperature from 0, --top-p in (0, 1]")
    run = Path(args.checkpoint)
    if (run / "model.pt").exists():
        model = GPT.load(run / "model.pt")
    elif args.checkpoint in GPT2_NAMES or any((run / name).exists() for name in WEIGHTS):
        model = GPT.from_pretrained(args.checkpoint)
    else:
        raise UserError(f"{run} holds no finished model: run  python train.py --stage sft")
    ranks = run / "bpe.tiktoken"
    enc = data_imdb.load_encoding(ranks) if ranks.exists() else data_imdb.gpt2_encoding()
    if enc.n_vocab != model.config.vocab_size:
        raise UserError(f"{run} has {model.config.vocab_size} tokens, its tokenizer {enc.n_vocab}: "
                        f"put the one that it was trained with at {ranks}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = [enc.eot_token] + enc.encode_ordinary(args.prompt)
    if len(prompt) >= model.config.n_ctx:
        raise UserError(f"the prompt has {len(prompt)} tokens; the model's context is "
                        f"{model.config.n_ctx}: shorten it")
    for ids in model.sample([prompt] * args.n, args.max_new, enc.eot_token, args.seed,
                            args.temperature, args.top_k, args.top_p):
        text = enc.decode([i for i in ids if i != enc.eot_token])
        print(f"{args.prompt}|{text}\n")


if __name__ == "__main__":
    sys.exit(main_exit(main))
