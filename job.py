"""One command's settings and device, the folders of its runs, and what stages load from them.

P prompts, K completions per prompt.
"""

import copy
import functools
import hashlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import data_imdb
from evaluate import evaluate
from gpt import GPT
from reward import ModelReward, RewardModel, SiebertReward, ToyReward
from support import ranks
from support.hf_gpt2 import GPT2_SIZES
from support.preference_files import read_preferences
from support.runs import Run, UserError, load_tensors, read_json
from support.settings import OTHER_LOSSES, PRESETS, SETTINGS_OF, Settings, run_name, run_title
from support.tokenizer_files import read_tokenizer, save_tiktoken, tokens_of


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # --precision -> dtype of matrix products


def seed_of(cfg: Settings, name: str, step=0) -> int:
    """The seed of a random draw, by (--seed, name, step). So no generator's state is ever saved."""
    return int(hashlib.sha256(f"{cfg.seed}/{name}/{step}".encode()).hexdigest()[:12], 16)


@functools.cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of 20 large matrix products. The logged mfu is relative to it."""
    dtype = HALF.get(precision, torch.float32)
    # small in half precision, which a CPU may emulate a hundred times slower
    n = 8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 128
    a = torch.randn(n, n, device=device, dtype=dtype)

    def seconds() -> float:
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the GPU
        return time.perf_counter() - began

    return 2 * n**3 / min(seconds() for _ in range(20))


class Job:
    """The settings of one command, its device, and what several stages load."""

    workers = 1  # processes that share the device, each with a Job

    def __init__(self, preset: str, cfg: Settings, command: list[str]):
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda was asked for, and torch finds no CUDA device: leave "
                            "the flag out, or install a CUDA build of torch")
        name = "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
        if name == "cuda":
            if ranks.LOCAL_RANK >= torch.cuda.device_count():
                raise UserError("torchrun started more processes than there are GPUs: give "
                                f"--nproc_per_node {torch.cuda.device_count()}")
            torch.cuda.set_device(ranks.LOCAL_RANK)
        half = "bf16" if name == "cuda" and torch.cuda.is_bf16_supported(False) else "fp16"
        self.auto = half if name == "cuda" else "fp32"
        self.cfg = replace(cfg, precision=self.auto) if cfg.precision == "auto" else cfg
        self.preset, self.command, self.device = preset, command, torch.device(name)
        self.root, self.hashes = Path(cfg.out) / preset, {}
        torch.set_float32_matmul_precision("high")  # TF32 for float32 products on a GPU
        torch.backends.cuda.enable_cudnn_sdp(False)  # it is slow at each new shape

    def beside(self, cfg: Settings) -> "Job":
        """A job with other settings for the stages after `groups`. Both jobs share what is loaded:
        data, preferences, r* and the hashes of finished parents."""
        other = copy.copy(self)
        other.cfg = cfg
        return other

    def autocast(self):
        dtype = HALF.get(self.cfg.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def defaults(self, stage: str) -> Settings:
        """The preset with what the device and the stage decide."""
        base = replace(PRESETS[self.preset], precision=self.auto)
        return replace(base, loss=stage) if stage in OTHER_LOSSES else base

    def folder(self, stage: str) -> Path:
        return self.root / (stage + run_name(self.cfg, self.defaults(stage), SETTINGS_OF[stage]))

    def title(self, stage: str) -> str:
        return run_title(stage, self.cfg, self.defaults(stage))

    def about(self, stage: str) -> dict:
        """What a run records about its command and machine. This is not part of its identity."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else \
            f"{platform.processor() or platform.machine()} CPU"
        return dict(stage=stage, title=self.title(stage), command=self.command,
                    preset=self.preset, device=device, threads=torch.get_num_threads(),
                    processes=ranks.WORLD, torch=torch.__version__,
                    python=platform.python_version(), started=time.strftime("%Y-%m-%d %H:%M:%S"))

    def read_given(self, stages: set[str]) -> None:
        """Read the files that a user gave to these stages, to report their errors at once."""
        cfg = self.cfg
        reads_preferences = cfg.groups and stages & {"chosen", "groups"}
        if reads_preferences:
            read_preferences(cfg.groups)  # before the tokenizer, which may take minutes to train
        if cfg.init and stages & {"sft", "chosen"}:
            self.pretrained(cfg.init)
        if cfg.reference and stages:
            self.load_reference()
        if cfg.reward == "siebert" and not cfg.groups and stages - {"sft"}:
            self.reward
        if reads_preferences:
            self.split

    # -------------------------------------------------------------------------- data and models

    @functools.cached_property
    def data(self) -> data_imdb.Data:
        cfg = self.cfg
        return data_imdb.load(cfg.corpus, cfg.vocab, Path(cfg.data), cfg.reviews, cfg.seed)

    def policy(self, stage: str, dropout: float = 0.0) -> GPT:
        path = self.folder(stage) / "model.pt"
        return self.check_compatible(GPT.load(path, dropout), path)

    def pretrained(self, name: str, dropout: float = 0.0) -> GPT:
        """The model in a run's folder or a Hugging Face folder, or GPT-2 by its name."""
        path = Path(name) / "model.pt"
        ours = path.exists()
        model = GPT.load(path, dropout) if ours else \
            GPT.from_pretrained(name, dropout, Path(self.cfg.data))
        tokens = read_tokenizer(Path(name)) if ours or name not in GPT2_SIZES else None
        if tokens not in (None, tokens_of(self.data.enc)):
            raise UserError(f"{name} was trained with another tokenizer than this command's: "
                            "give the --preset, --vocab and --seed that it was made with")
        return self.check_compatible(model, name)

    def check_compatible(self, model: GPT, name) -> GPT:
        """The model on the device. UserError if its vocabulary or context does not fit."""
        if model.config.vocab_size != self.data.enc.n_vocab:
            raise UserError(f"{name} has {model.config.vocab_size} tokens, and this command's "
                            f"tokenizer has {self.data.enc.n_vocab}: give the --vocab of {name}")
        if model.config.n_ctx < self.cfg.n_ctx:
            raise UserError(f"{name} has a context of {model.config.n_ctx} tokens, this command "
                            f"wants {self.cfg.n_ctx}: give --n-ctx {model.config.n_ctx}")
        return model.to(self.device)

    def load_reference(self) -> GPT:
        """π_ref: the SFT model; for a preference file, --reference or the model of stage chosen."""
        cfg = self.cfg
        return self.pretrained(cfg.reference) if cfg.reference else \
            self.policy("chosen" if cfg.groups else "sft")

    @functools.cached_property
    def reward(self):
        """r*: (prompts, completions) -> (N,) in [0, 1]."""
        if self.cfg.reward == "siebert":
            return SiebertReward(self.data.enc, self.cfg.siebert_path, self.device)
        if self.cfg.corpus == "toy":
            return ToyReward(self.data.enc)
        model = RewardModel.load(self.folder("reward") / "model.pt").to(self.device)
        return ModelReward(model, self.data.eot)

    @functools.cached_property
    def groups(self) -> data_imdb.Groups:
        """The groups of the finished stage; until it is finished, those of the file --groups."""
        finished = (self.folder("groups") / "ref_logps.pt").exists()
        path = self.folder("groups") / "groups.jsonl" if finished else Path(self.cfg.groups)
        return data_imdb.read_groups(path, self.data.enc, self.cfg.n_ctx)

    @functools.cached_property
    def split(self) -> tuple[list[int], list[int]]:
        """Indices of the groups to train on and of those held out."""
        return data_imdb.split_prompts(self.groups.prompt_ids)

    @functools.cached_property
    def ref_logps(self) -> torch.Tensor:
        """log π_ref of the groups' completions, (P, K)."""
        return load_tensors(self.folder("groups") / "ref_logps.pt")["ref_logps"]

    @functools.cached_property
    def reference_eval(self) -> dict:
        """What `groups` wrote about π_ref: its point, the prompts of that point, the optimum."""
        return read_json(self.folder("groups") / "reference.json")

    # -------------------------------------------------------------------------- sampling

    def memory(self) -> int:
        """This job's share of the memory in bytes: of the GPU's, or of 5 GiB on a CPU."""
        whole = 5 * 2**30 if self.device.type == "cpu" else \
            torch.cuda.get_device_properties(self.device).total_memory
        return whole // self.workers

    def batch_size(self, model: GPT) -> int:
        """How many sequences to sample at once: their keys and values take at most a tenth of the
        memory. On a CPU more than 1,000 are not faster."""
        length = self.cfg.n_ctx if self.cfg.groups else 9 + self.cfg.max_new_tokens
        numbers = 2 * model.config.n_layer * model.config.n_embd * length  # per sequence
        size = 2 if self.cfg.precision in HALF else 4  # bytes per number
        most = 1_000 if self.device.type == "cpu" else 10**9
        return max(1, min(most, self.memory() // (10 * size * numbers)))

    def sample(self, model: GPT, prompts, seed: int, temperature: float = 1.0) -> list[list[int]]:
        """One completion per prompt. On a CPU each worker thread samples a part of the prompts,
        because the small operations of one part gain little from several cores."""
        threads, workers = torch.get_num_threads(), 1
        if self.device.type == "cpu" and threads > 1:  # at most 4: Python runs one thread at a time
            workers = max((4, 3, 2), key=lambda n: n * (threads // n))

        def parallel(work, parts):
            def autocast(part):  # a new thread starts without autocast
                with self.autocast():
                    return work(part)

            try:
                with ThreadPoolExecutor(workers, "sample", torch.set_num_threads,
                                        (threads // workers,)) as pool:
                    return ranks.together([*pool.map(autocast, ranks.share(parts))])
            finally:
                torch.set_num_threads(threads)  # the pool has changed it for all threads

        most = min(ranks.together([self.batch_size(model)]))  # so that all ranks make equal parts
        batch_size = min(most // workers, -(-len(prompts) // (workers * ranks.WORLD)))
        return model.sample(prompts, self.cfg.max_new_tokens, self.data.eot, seed, temperature,
                            batch_size=max(1, batch_size), parallel=parallel)

    def evaluate(self, policy: GPT, reference: GPT, prompts, temperature: float = 1.0) -> dict:
        """The policy's point on these prompts. All policies of a seed use the same uniforms."""
        began = time.perf_counter()
        reward = None if self.cfg.groups else self.reward  # a preference file has no r*
        seed = seed_of(self.cfg, "evaluate")
        with self.autocast():
            point = evaluate(
                policy, reference, prompts, reward,
                lambda model, prompts, temperature: self.sample(model, prompts, seed, temperature),
                self.data.eot, temperature, max(1, self.batch_size(policy) // 8))
        return point | dict(seconds=round(time.perf_counter() - began, 2))

    def save_policy(self, run: Run, model: GPT) -> None:
        """Save the tokenizer, then model.pt, which marks the run finished."""
        save_tiktoken(tokens_of(self.data.enc), run.path("bpe.tiktoken"))
        run.finish(model.checkpoint())
