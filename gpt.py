"""GPT-2: from token ids to hidden states, logits, log-probs per token, and samples.

The model knows nothing about text, rewards or training. support/hf_gpt2.py reads GPT-2's weights.

    python gpt.py --checkpoint out/toy/sft --prompt "The film" -n 4

B sequences, T tokens, V vocabulary, C channels, H heads, M scored tokens.
"""

import argparse
import functools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# imported first, so that Ctrl-C during the slow imports below prints one sentence
from support.runs import UserError, load_tensors, main_exit, reading

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from support import hf_gpt2
from support.tokenizer_files import MAX_CHARS, read_tokenizer, tokens_of


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    n_ctx: int = 1024  # the longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # 0 in DPO and PPO, which compare the log-probs of two models

    def __post_init__(self):
        hf_gpt2.check_sizes(vars(self))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]
        # SDPA's causal mask is right only at start 0. Later T is 1, and one query needs no mask.
        causal = cache is None or T > 1  # training never tests T: no guard for torch.compile
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # as in GPT-2
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
    """GPT-2. Modules have the names of the published checkpoint: a state dict needs no renaming."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head's weight
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # 2 n_layer outputs add up in the residual stream, so they start small
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, start=0):
        """The hidden states after ln_f: idx (B, T) -> (B, T, C).

        `cache` (n_layer, 2, B, H, length, C/H) holds the keys and values of all positions before
        `start`; those of idx are written into it. T must be 1 unless start is 0. Raises ValueError
        if the sequence is longer than n_ctx.
        """
        T = idx.size(1)
        if start + T > self.config.n_ctx:
            raise ValueError(f"got {start + T} tokens, wanted at most {self.config.n_ctx} (n_ctx)")
        x = self.wte(idx) + self.wpe.weight[start : start + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> logits (..., V); under autocast plus a constant that softmax ignores."""
        return project(hidden, head_weight(self.wte.weight))[..., : self.config.vocab_size]

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V); position t predicts token t + 1."""
        return self.head(self.hidden(idx))

    def token_logps(self, idx, mask):
        """log π(idx[b, t] | idx[b, :t]) in nats where mask (B, T) is true, 0 elsewhere: (B, T).

        The head is applied only where the mask is true. The result is float32 or wider, also under
        autocast. mask[:, 0] must be false: nothing predicts a first token.
        """
        where = mask[:, 1:].flatten().nonzero()[:, 0]  # (M,); here the CPU waits for the GPU
        hidden = self.hidden(idx[:, :-1]).flatten(0, 1).index_select(0, where)  # (M, C)
        targets = idx[:, 1:].flatten().index_select(0, where)  # position t - 1 predicts token t
        limit = max(1, LOGITS_BUDGET[idx.device.type] // (4 * self.config.vocab_size))
        needs_grad, score = torch.is_grad_enabled(), HeadLogps.apply
        if needs_grad and len(hidden) > limit:  # too many logits to keep: backward makes them again
            score = functools.partial(recompute, score, use_reentrant=False)
        parts = zip(hidden.split(limit), targets.split(limit))
        logps = torch.cat([score(h, self.wte.weight, t, needs_grad, self.score_block)
                           for h, t in parts])  # (M,)
        out = logps.new_zeros(len(idx) * (idx.size(1) - 1)).index_copy(0, where, logps)
        return F.pad(out.view(len(idx), -1), (1, 0))

    @staticmethod
    def score_block(logits, targets, slopes):
        """Logits (M, V), targets (M,) -> the targets' log-probs (M,), computed in float32.

        softmax - onehot is written to slopes (M, V). slopes is empty where no gradient is needed.
        """
        full = torch.promote_types(logits.dtype, torch.float32)
        all_logps, column = logits.log_softmax(-1, dtype=full), targets[:, None]
        logps = all_logps.gather(-1, column)
        if len(slopes):
            torch.exp(all_logps, out=slopes)
            slopes.scatter_(-1, column, logps.expm1().to(slopes.dtype))  # p - 1
        return logps[:, 0]

    def sample(self, prompts, max_new_tokens, eos, seed, temperature=1.0, top_k=0, top_p=1.0,
               batch_size=512, parallel=map):
        """Continue each prompt until `eos`, `max_new_tokens` or the end of the context.

        prompts: lists of token ids -> one list of new ids per prompt, with `eos` where it was drawn
        (eos=-1: no token ends a completion). Temperature 0 takes the most probable token; top_k 0
        and top_p 1 filter nothing. Parts of at most `batch_size` prompts are sampled together;
        `parallel` is `map` or the map of a thread pool. Token s of row i uses the uniform number
        u[i, s], and all of u is drawn from `seed` at the start. So a completion does not depend on
        batch_size, and two policies can be compared with common random numbers. ValueError for a
        prompt that is empty or leaves no room in the context.
        """
        for prompt in prompts:
            if not 0 < len(prompt) < self.config.n_ctx:
                raise ValueError(f"got a prompt of {len(prompt)} tokens, wanted 1 to "
                                 f"{self.config.n_ctx - 1}: the context has {self.config.n_ctx}")
        uniforms = torch.rand(len(prompts), max_new_tokens,
                              generator=torch.Generator().manual_seed(seed))
        n, training = len(prompts), self.training
        size = math.ceil(n / math.ceil(n / batch_size)) if n else 1  # parts of equal size

        def sample_from(i):
            return self._sample_part(prompts[i : i + size], uniforms[i : i + size], eos,
                                     temperature, top_k, top_p)

        self.eval()
        try:
            return [ids for part in parallel(sample_from, range(0, n, size)) for ids in part]
        finally:
            self.train(training)

    @torch.no_grad()
    def _sample_part(self, prompts, uniforms, eos, temperature, top_k, top_p):
        """All rows start at position 0. A row inside its prompt takes the prompt's next token."""
        device, config = self.wte.weight.device, self.config
        tokens, lens, _ = pad_rows(prompts, [[]] * len(prompts))
        ends = (lens + uniforms.size(1)).clamp(max=config.n_ctx)  # row b stops before ends[b]
        tokens = F.pad(tokens, (0, int(ends.max()) - tokens.size(1)))
        prompt_lens, ends, tokens, uniforms = (x.to(device) for x in (lens, ends, tokens, uniforms))
        stops = ends.clone()  # each row's length, until eos makes it shorter
        w = head_weight(self.wte.weight)  # keys and values have its dtype
        cache = torch.empty(config.n_layer, 2, len(prompts), config.n_head, tokens.size(1),
                            config.n_embd // config.n_head, dtype=w.dtype, device=device)
        rows = torch.arange(len(prompts), device=device)  # the rows in the cache
        running = torch.ones_like(rows, dtype=torch.bool)  # which of them go on
        start, t = 0, min(map(len, prompts))  # one forward reads the tokens before t
        while t < tokens.size(1):
            logits = project(self.hidden(tokens[rows, start:t], cache, start)[:, -1], w)
            logits = logits[:, : config.vocab_size]
            step = t - prompt_lens[rows]  # negative inside the prompt
            u = uniforms[rows, step.clamp(0, uniforms.size(1) - 1)]
            new = sample_inverse_cdf(logits, u, temperature, top_k, top_p)
            drawn = running & (step >= 0)
            tokens[rows, t] = torch.where(drawn, new, tokens[rows, t])
            ended = drawn & ((new == eos) | (t + 1 >= ends[rows]))
            stops[rows] = torch.where(ended, t + 1, stops[rows])
            running &= ~ended
            start, t = t, t + 1
            if t % 4 == 0:  # not at every token, because here the CPU waits for the GPU
                left = running.nonzero()[:, 0]
                if len(left) == 0:
                    break
                if len(left) < 0.85 * len(rows):  # not for a few, because this copies the cache
                    rows, running = rows[left], running[left]
                    cache = cache.index_select(2, left)
        return [row[a:b] for row, a, b in zip(tokens.tolist(), lens.tolist(), stops.tolist())]

    @classmethod
    def load(cls, path: Path, dropout: float = 0.0) -> "GPT":
        """The model in a run's model.pt. UserError if the file holds no such model."""
        saved = load_tensors(path)
        with reading(path):
            return hf_gpt2.with_weights(
                lambda: cls(GPTConfig(**saved["config"] | {"dropout": dropout})), saved["model"])

    def checkpoint(self) -> dict:
        """What `load` reads: configuration and weights."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0, cache: Path = Path("data")) -> "GPT":
        """GPT-2's weights, by name ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl": downloaded to
        `cache`) or from a folder in the Hugging Face layout. UserError for another model."""
        return hf_gpt2.read(name, cache, lambda sizes: cls(GPTConfig(**sizes, dropout=dropout)))


def head_weight(w):
    """W (V, C) for the head's product. Under autocast it has autocast's dtype, minus the mean of
    its rows: that adds one constant to all logits of a position, which softmax ignores. GPT-2's
    logits lie between -110 and -35, where bf16 has steps of 0.25 or more. On a GPU rows of zeros
    are added: the product is slow unless each row of logits starts at a multiple of 16 bytes."""
    if torch.is_autocast_enabled(w.device.type):
        w = (w - w.mean(0)).to(torch.get_autocast_dtype(w.device.type))
    extra = -len(w) % HEAD_MULTIPLE[w.device.type]
    return F.pad(w, (0, 0, 0, extra)) if extra else w


def project(h, w):
    """h Wᵀ: (..., C), (V, C) -> (..., V). On a CPU with V = 50257, oneDNN takes 17 ms for 64 rows,
    and torch's own product 23 ms."""
    if w.device.type == "cpu" and w.dtype == torch.float32 and len(w) > 2**15 and \
            not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
        return F.linear(h.to_mkldnn(), w).to_dense()
    return F.linear(h, w)


HEAD_MULTIPLE = {"cpu": 1, "cuda": 64}  # the head's rows are padded to a multiple of this
LOGITS_BUDGET = {"cpu": 2**31, "cuda": 2**33}  # bytes of logits kept for the backward pass
BLOCK_BYTES = {"cpu": 2**26, "cuda": 2**28}  # of logits computed at once; larger is slower on a CPU


class HeadLogps(torch.autograd.Function):
    """log softmax(h Wᵀ)[target], computed in float32: h (M, C), W (V, C), targets (M,) -> (M,).

    It equals -F.cross_entropy(h Wᵀ, targets), and keeps one (M, V) tensor instead of several:
    softmax - onehot = -∂ log p/∂ logits. The backward pass is then two matrix products.
    """

    @staticmethod
    def forward(ctx, h, w, targets, needs_grad, score_block=GPT.score_block):
        ctx.V, w = len(w), head_weight(w)
        h, full = h.to(w.dtype), torch.promote_types(w.dtype, torch.float32)
        logps = torch.empty(len(h), dtype=full, device=h.device)
        slopes = h.new_empty(len(h) if needs_grad else 0, len(w))
        block = max(1, BLOCK_BYTES[h.device.type] // (4 * len(w)))
        for i in range(0, len(h), block):
            part = slice(i, i + block)
            logits = project(h[part], w)
            logits[:, ctx.V :] = -torch.inf  # padding is no token: p = 0
            logps[part] = score_block(logits, targets[part], slopes[part])
        ctx.save_for_backward(h, w, slopes)
        return logps

    @staticmethod
    def backward(ctx, grad):
        h, w, slopes = ctx.saved_tensors
        scale = -grad[:, None].to(h.dtype)
        return (slopes @ w) * scale, (slopes.t() @ (h * scale))[: ctx.V], None, None, None


def pad_rows(prompts, completions, fill=0):
    """Token lists -> idx (B, T), prompt_lens (B,), and lengths (B,) of prompt and completion."""
    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    idx = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows])
    return idx, torch.tensor([len(p) for p in prompts]), lengths


def length_buckets(lengths, batch_size: int):
    """Row indices by rising lengths (B,), in parts of at most `batch_size`. Rows of similar length
    need little padding, and a padded position costs as much time as a token."""
    return lengths.argsort().split(batch_size)


def sample_inverse_cdf(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row by inverse CDF: logits (B, V), uniforms u (B,) in [0, 1) -> (B,).

    It is the first token whose cumulative probability exceeds u. torch.multinomial would draw V
    exponentials per row. On a CPU that takes longer than the rest of a step.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits / temperature if temperature != 1 else logits  # dividing by 1 would only copy
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        out = probs.cumsum(-1) - probs >= top_p  # the sum before a token, so the first stays
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    probs = logits.softmax(-1)
    # A cumulative sum over V is slow. So find a block of 256 tokens first, then the token in it.
    V, n = probs.size(-1), probs.size(-1) // 256
    blocks = probs[:, : 256 * n].unflatten(-1, (n, 256)).sum(-1)
    rest = probs[:, 256 * n :].sum(-1, keepdim=True)
    block, u = search(torch.cat([blocks, rest], -1), u[:, None])
    tokens = 256 * block + torch.arange(256, device=u.device)  # (B, 256)
    inside, _ = search(probs.gather(-1, tokens.clamp(max=V - 1)) * (tokens < V), u)
    return (256 * block + inside)[:, 0].clamp(max=V - 1)  # NaN logits can lead past the end


def search(weights, x):
    """The first index whose cumulative weight exceeds x, and x minus the weights before: (B, 1)."""
    cdf = weights.cumsum(-1, dtype=torch.float64)  # a GPU's float32 sums need not be monotone
    total = cdf[:, -1:]
    x = torch.minimum(x, total.nextafter(torch.zeros_like(total)))  # rounding may exceed the total
    index = torch.searchsorted(cdf, x, right=True)
    return index, x - F.pad(cdf, (1, 0)).gather(-1, index)


def main(argv=None):
    import data_imdb

    parser = argparse.ArgumentParser(description="Sample from a checkpoint, or export it.")
    parser.add_argument("--checkpoint", default="out/toy/sft", metavar="RUN",
                        help="a run's folder, a Hugging Face folder, or gpt2[-medium|-large|-xl]")
    parser.add_argument("--export", metavar="FOLDER", help="write it to FOLDER, for transformers")
    parser.add_argument("--prompt", default="The", help="the text to continue")
    numbers = (("-n", "samples", 4, 1, 10_000),  # meaning, default and bounds
               ("--max-new-tokens", "new tokens per sample at most", 64, 1, 10_000),
               ("--temperature", "0 takes the most probable token", 1.0, 1e-3, 1e3),
               ("--top-k", "keep the K most probable tokens (0: all)", 0, 0, 10**6),
               ("--top-p", "keep the most probable tokens up to this sum", 1.0, 1e-9, 1.0),
               ("--seed", "seed of the samples", 0, 0, 2**63 - 1))
    for flag, meaning, default, low, high in numbers:
        parser.add_argument(flag, type=type(default), default=default,
                            help=f"{meaning}; default {default:g}, from {low:g} to {high:g}")
    args = parser.parse_args(argv)
    for flag, _, _, low, high in numbers:
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if not low <= value <= high and (flag, value) != ("--temperature", 0):  # 0: greedy
            raise UserError(f"{flag} is {value}; give {low:g} to {high:g}")
    run = Path(args.checkpoint)
    with reading(run):
        ours = (run / "model.pt").exists()
    if ours:
        model = GPT.load(run / "model.pt")
    elif hf_gpt2.is_checkpoint(args.checkpoint):
        model = GPT.from_pretrained(args.checkpoint)
    else:
        raise UserError(f"{run} holds no finished model: run  python train.py --stage sft")
    tokens = read_tokenizer(run)
    enc = data_imdb.encoding_of(tokens) if tokens else data_imdb.gpt2_encoding()
    if enc.n_vocab != model.config.vocab_size:
        raise UserError(f"the model of {run} has {model.config.vocab_size} tokens, its tokenizer "
                        f"has {enc.n_vocab}: put the right one at {run / 'bpe.tiktoken'}")
    if args.export:
        return hf_gpt2.export(model, tokens_of(enc), Path(args.export))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = [enc.eot_token] + enc.encode_ordinary(args.prompt[:MAX_CHARS])
    if len(prompt) >= model.config.n_ctx:
        raise UserError(f"the prompt has {len(prompt)} tokens or more, and the model's context is "
                        f"{model.config.n_ctx}: shorten the prompt")
    for ids in model.sample([prompt] * args.n, args.max_new_tokens, enc.eot_token, args.seed,
                            args.temperature, args.top_k, args.top_p, batch_size=16):
        print(f"{args.prompt}|{enc.decode([i for i in ids if i != enc.eot_token])}\n")


if __name__ == "__main__":
    sys.exit(main_exit(main))
