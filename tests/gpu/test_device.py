"""In each precision a device computes what the CPU computes in float64. The tests run on a CPU at
tiny sizes, and on a GPU at the sizes of the preset imdb.

    python -m pytest -m cuda -rP tests/gpu/test_device.py    # on a GPU; -rP prints the numbers

B sequences, T tokens, V vocabulary, C channels, P prompts, K completions per prompt.
"""

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import MemoryRun, job_on, random_groups

import gpt
import train
from dpo import completion_mask
from evaluate import sequence_kl
from experiments.ppo import PPO, PPOConfig
from gpt import GPT, GPTConfig, HeadLogps, pad_rows
from reward import ModelReward, RewardModel

K = 4
fp32_and_bf16 = pytest.mark.parametrize("precision", ["fp32", "bf16"], indirect=True)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])
def device(request):
    torch.set_num_threads(8 if request.param == "cuda" else 1)  # it also computes float64
    yield torch.device(request.param)
    torch.set_num_threads(1)


@pytest.fixture(params=["fp32", "tf32", "bf16", "fp16"])
def precision(request):
    torch.set_float32_matmul_precision("highest" if request.param == "fp32" else "high")
    yield request.param
    torch.set_float32_matmul_precision("high")


@pytest.fixture(scope="module")
def case(device):
    return Case(device)


class Case:
    """A model of a size that fits the device, and P prompts with K completions each."""

    def __init__(self, device: torch.device):
        self.device, self.big = device, device.type == "cuda"
        sizes = (50257, 128, 8, 8, 512) if self.big else (301, 128, 1, 2, 16)
        self.config = GPTConfig(*sizes)
        self.V, self.P = self.config.vocab_size, 24 if self.big else 12
        self.jobs = {p: job_on(device.type, precision=p) for p in ("fp32", "bf16", "fp16")}
        torch.manual_seed(0)
        self.weights = GPT(self.config).eval()
        with torch.no_grad():  # logits as large as those of a trained model
            self.weights.wte.weight.mul_(70 / self.config.n_embd**0.5)
        self.groups = random_groups(np.random.default_rng(0), self.V, self.P,
                                    *((20, 64) if self.big else (5, 12)))
        self.prompts, self.all = self.groups.prompt_ids, self.groups.flat(range(self.P))
        self.few = [x[:16] for x in pad_rows(*self.all)]  # idx (B, T), prompt_lens and lengths (B,)
        self.mask = completion_mask(*self.few[1:], self.few[0].size(1))

    def model(self, device=None) -> GPT:
        return copy.deepcopy(self.weights).to(device or self.device)

    def autocast(self, precision: str):
        return self.jobs["fp32" if precision == "tf32" else precision].autocast()

    def logps(self, model: GPT, precision: str = "fp32") -> torch.Tensor:
        """Log-probs (B, T) of the tokens of `few`."""
        device = model.wte.weight.device
        with self.autocast(precision):
            return model.token_logps(self.few[0].to(device), self.mask.to(device))

    def grads(self, model: GPT, precision: str = "fp32") -> dict[str, torch.Tensor]:
        """The gradient of the sum of `logps`, by the name of the parameter."""
        names, parameters = zip(*model.named_parameters())
        grads = torch.autograd.grad(self.logps(model, precision).sum(), parameters)
        return {name: grad.double().cpu() for name, grad in zip(names, grads)}

    @functools.cached_property
    def truth(self) -> SimpleNamespace:
        """The same numbers in float64 on the CPU."""
        model = self.model("cpu").double()
        grads = flat(self.grads(model))
        with torch.no_grad():
            return SimpleNamespace(logits=model(self.few[0][:4]), logps=self.logps(model),
                                   grads=grads)

    def fit_dpo(self, job, run, model, steps, *, ref_logps=None, lr=1e-6, optimizer="rmsprop",
                **settings):
        """DPO by train.fit, where each step has the same 11 groups."""
        ref_logps = torch.zeros(self.P, K) if ref_logps is None else ref_logps
        batches = train.preference_batches(job.cfg, self.groups, ref_logps,
                                           list(range(job.cfg.dpo_batch)))
        train.fit(job, run, model, batches, train.preference_loss(job.cfg), steps=steps, lr=lr,
                  warmup=0, schedule="constant", optimizer=optimizer, **settings)

    def ref_logps(self, job, model) -> torch.Tensor:
        return train.score(job, model, *self.all).view(self.P, K)


def flat(grads: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])


def relative(a, b) -> float:
    """The norm of the difference, divided by the norm of b."""
    return float(((a - b).norm() / b.norm()).detach())


def equal_share(a, b) -> float:
    return float(np.mean([x == y for x, y in zip(a, b, strict=True)]))


# ------------------------------------------------------------------------------ the model

def test_logits_are_those_of_float64(case, precision):
    with torch.no_grad(), case.autocast(precision):
        logits = case.model()(case.few[0][:4].to(case.device)).double().cpu()
    got, want = (x - x.mean(-1, keepdim=True) for x in (logits, case.truth.logits))
    off = relative(got, want)
    print(f"relative difference {off:.2g}")
    assert off < dict(fp32=1e-4, tf32=5e-3, bf16=0.03, fp16=5e-3)[precision]


def test_token_log_probs_are_those_of_float64(case, precision):
    with torch.no_grad():
        off = (case.logps(case.model(), precision).cpu() - case.truth.logps)[case.mask]
    print(f"difference in nats: {off.abs().max():.2g} max, {off.mean():+.1g} mean, "
          f"{off.std():.2g} sd")
    limit = dict(fp32=1e-3, tf32=0.05, bf16=0.15, fp16=0.05)[precision]
    assert off.abs().max() < limit and abs(off.mean()) < limit / 5


def test_gradients_point_where_those_of_float64_do(case, precision):
    cosine = float(F.cosine_similarity(flat(case.grads(case.model(), precision)), case.truth.grads,
                                       dim=0))
    print(f"1 - cosine {1 - cosine:.2g}")
    assert cosine > 0.999


def test_head_is_cross_entropy_in_float64(case, precision):
    V, C, device = case.V, case.config.n_embd, case.device
    torch.manual_seed(0)
    h = torch.randn(300, C, device=device, requires_grad=True)
    w = torch.randn(V, C, device=device).mul_(0.1).requires_grad_()
    targets, weights = torch.randint(V, (300,), device=device), torch.rand(300, device=device)
    want = -F.cross_entropy(h.double() @ w.double().t(), targets, reduction="none")
    with case.autocast(precision):
        got = HeadLogps.apply(h, w, targets, True)
    got, want = ((x, *torch.autograd.grad((x * weights).sum(), (h, w))) for x in (got, want))
    off = {name: relative(a, b) for name, a, b in zip(("logps", "dh", "dw"), got, want)}
    print(f"relative differences {off}")
    assert max(off.values()) < (0.02 if precision in ("bf16", "fp16") else 2e-3), off


@fp32_and_bf16
def test_a_head_padded_to_a_multiple_of_64_changes_nothing(case, precision, monkeypatch):
    assert case.V % 64, "nothing would be padded"
    model, found, many = case.model(), [], case.prompts * 8
    for multiple in (1, 64):
        monkeypatch.setitem(gpt.HEAD_MULTIPLE, case.device.type, multiple)
        with torch.no_grad(), case.autocast(precision):
            logits = model(case.few[0][:4].to(case.device))
            samples = model.sample(many, 24, -1, 7)
            logps = case.logps(model, precision)
        found.append((logits, logps, case.grads(model, precision), samples))
    (logits, logps, grads, plain), (padded_logits, padded_logps, padded_grads, padded) = found
    off = (padded_logps - logps)[case.mask]
    off_grads = {name: relative(padded_grads[name], grads[name]) for name in grads}
    first = equal_share([x[0] for x in padded], [x[0] for x in plain])
    print(f"log-probs differ by {off.abs().max():.2g}, gradients by {max(off_grads.values()):.2g} "
          f"(embedding {off_grads['wte.weight']:.2g}); equal: first tokens {first:.3f}, "
          f"completions {equal_share(padded, plain):.3f}")
    limit = dict(fp32=1e-4, bf16=0.1)[precision]
    assert off.abs().max() < limit and abs(off.mean()) < limit / 10
    assert max(off_grads.values()) < dict(fp32=1e-3, bf16=0.05)[precision], off_grads
    assert padded_logits.shape == logits.shape and relative(padded_logits, logits) < limit
    assert max(map(max, padded)) < case.V, "an id that is no token was sampled"
    if precision == "fp32":  # in bf16 rounded probabilities may give another next token
        assert first >= 0.9


@pytest.mark.parametrize("dropout, limit", [(0.0, 40), (0.1, 44)])
def test_bytes_kept_for_the_backward_pass(case, dropout, limit, monkeypatch):
    """Bytes per token, layer and channel under bf16, without the copies of the weights in bf16. One
    layer is the difference of 3 layers and 1. Dropout keeps two masks of a byte or two each."""
    B, T, C, H = (16, 128, 512, 8) if case.big else (4, 64, 64, 2)
    if not case.big:  # with dropout a CPU's attention would keep (B, H, T, T): it is turned off
        attend = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention",
                            lambda *qkv, is_causal, dropout_p: attend(*qkv, is_causal=is_causal))

    def kept(layers: int) -> int:
        model = GPT(GPTConfig(301, T, layers, H, C, dropout)).to(case.device).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}  # by address; they are kept, so that no address is used twice

        def pack(x):
            if x.untyped_storage().data_ptr() not in weights:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), case.autocast("bf16"):
            model.hidden(torch.zeros(B, T, dtype=torch.int64, device=case.device))
        copies = sum(2 * p.numel() for p in model.h.parameters() if p.dim() == 2)
        return sum(storage.nbytes() for storage in storages.values()) - copies

    each = (kept(3) - kept(1)) / (2 * B * T * C)
    print(f"{each:.1f} bytes")
    assert each <= limit


# ------------------------------------------------------------------------------ training

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])  # a GPU's fp32 is TF32 here
def test_eq07_starts_at_log_2(case, precision):
    job, model, run = case.jobs[precision], case.model(), MemoryRun()
    case.fit_dpo(job, run, model, 1, ref_logps=case.ref_logps(job, model),
                 check=train.starts_at_reference(job.cfg, K))
    off = run.rows[0]["margin_abs"] / job.cfg.beta
    print(f"margins of {off:.2g} nats; half precision may have 0.2")
    assert abs(run.rows[0]["loss"] - math.log(2)) < 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_fp16_skips_overflows_then_learns(case, optimizer, monkeypatch):
    scale, steps = (2.0**40, 40) if case.big else (2.0**24, 20)
    monkeypatch.setattr(torch.amp, "GradScaler",
                        functools.partial(torch.amp.GradScaler, init_scale=scale))
    job, model, run = case.jobs["fp16"], case.model(), MemoryRun()
    case.fit_dpo(job, run, model, steps, ref_logps=case.ref_logps(job, model),
                 lr=3e-7 if case.big else 1e-4, optimizer=optimizer)
    norms, losses = ([row[key] for row in run.rows] for key in ("grad_norm", "loss"))
    print(f"{norms.count(None)} of {steps} steps skipped, scale {run.state['scaler']['scale']:g}, "
          f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
    assert norms[0] is None and norms[-1] is not None, norms
    assert losses[-1] < losses[0] - 0.003, losses


def test_a_resumed_run_goes_on(case):
    start, ends = case.model().wte.weight.detach(), []
    for stops in ((6,), (3, 6)):
        run = MemoryRun()
        for steps in stops:
            model = case.model()
            case.fit_dpo(case.jobs["bf16"], run, model, steps)
        ends.append((run.rows, model.wte.weight.detach() - start))
    (rows, moved), (resumed, other) = ends
    loss, again, off = rows[-1]["loss"], resumed[-1]["loss"], relative(other, moved)
    print(f"loss {loss:.6f} and {again:.6f}, relative difference of what was learned {off:.2g}")
    assert [row["step"] for row in resumed] == list(range(6))
    assert abs(loss - again) < 2e-3 * abs(loss) + 1e-4 and off < 0.1


def test_accumulation_is_one_large_batch(case):
    grads = []
    for accum in (1, 4):
        model = case.model()
        case.fit_dpo(job_on(case.device.type, precision="bf16", dpo_accum=accum), MemoryRun(),
                     model, 1, grad_clip=0, check=lambda row: grads.append(
                         torch.cat([p.grad.flatten() for p in model.parameters()])))
    off = relative(*grads)
    print(f"relative difference of the gradients {off:.2g}")
    assert off < 0.045


def test_ppo_starts_at_a_ratio_of_1(case):
    def sample(model, prompts, seed):
        with case.autocast("bf16"):
            return model.sample(prompts, 24, case.V - 1, seed)

    def reward(prompts, completions):
        return torch.tensor([float(len(c)) for c in completions])

    ppo = PPO(case.model(), case.model(), reward, sample, case.V - 1, PPOConfig(4, 1e-6, warmup=0),
              case.jobs["bf16"].autocast, batch_size=64)
    row = ppo.step(0, case.prompts, 0)
    print(f"kl {row['kl']:.2g}, approx_kl {row['approx_kl']:.2g}, clip_fraction "
          f"{row['clip_fraction']:.3f}")
    assert all(map(math.isfinite, row.values())), row
    assert abs(row["kl"]) < 1e-3 and row["approx_kl"] < 0.05, row


# ------------------------------------------------------------------------------ samples and judges

@fp32_and_bf16
def test_samples_depend_on_neither_the_device_nor_the_batches(case, precision):
    prompts, eos = case.prompts[:16], case.V - 1
    want = case.model("cpu").sample(prompts, 24, eos, 7)
    with case.autocast(precision):
        one, parts = (case.model().sample(prompts, 24, eos, 7, batch_size=n) for n in (16, 5))
    first = equal_share([x[0] for x in one], [x[0] for x in want])
    print(f"equal: first tokens {first:.2f}, completions {equal_share(one, want):.2f}, in other "
          f"batches {equal_share(one, parts):.2f}")
    assert all(len(x) <= 24 and max(x) < case.V for x in one + parts)
    if precision == "fp32":
        assert first >= 0.9
        assert equal_share(one, parts) >= 0.8


@fp32_and_bf16
def test_kl_to_itself_is_0_and_to_another_policy_is_equal_on_both(case, precision):
    policy = case.model("cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p), alpha=0.002 if case.big else 0.03)
    want = sequence_kl(policy, case.model("cpu"), *case.few)[0].mean()
    few = [x.to(case.device) for x in case.few]
    with case.autocast(precision):
        kl, zero = (sequence_kl(model, case.model(), *few)[0]
                    for model in (policy.to(case.device), case.model()))
    print(f"{kl.mean():.4f} nats, on the CPU {want:.4f}; to itself {zero.abs().max():.1g}")
    assert zero.abs().max() < 1e-6
    assert abs(kl.mean() - want) < 0.05 * want + 0.05


def test_a_reward_is_equal_on_both(case):
    model = RewardModel.from_gpt(case.model("cpu"), 128)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    want = ModelReward(model, case.V - 1)(*case.all)
    got = ModelReward(model.to(case.device), case.V - 1)(*case.all)
    off = float((want - got).abs().max())
    print(f"largest difference {off:.2g}, ties {len(got) - len(got.unique())}")
    assert off < 0.02
