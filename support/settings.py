"""Every setting of every stage with its reason, the four presets, and the command line.

Each field of Settings is a flag of train.py. A field's group says which stages it decides: a run's
identity is made of the groups of its stage (SETTINGS_OF). The group "run" says where and how a run
goes, never what comes out.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from support import ranks
from support.hf_gpt2 import GPT2_SIZES
from support.runs import UserError, file_hash, json_hash, reading

SEED, RATE = 2**32 - 1, 1e38  # upper bounds: what 32 bits hold, what a float32 holds


def opt(group, default, help, choices=None, low=0, high=10**9):
    """A setting. A number must be from low to high."""
    return field(default=default, metadata=dict(group=group, help=help, choices=choices, low=low,
                                                high=high))


@dataclass(frozen=True)
class Settings:
    """The defaults are the preset toy: two CPU cores, no network, about a minute and a half."""

    # ---- data
    corpus: str = opt("data", "toy", "which reviews", ("toy", "imdb"))
    reviews: int = opt("data", 20_000, "reviews to write (toy), or of each split (imdb; 0: all)",
                       high=10**7)
    vocab: str = opt("data", "1280", "gpt2, or the size of a BPE trained on the corpus")
    seed: int = opt("data", 0, "seed of the corpus, the weights, the batches and the samples",
                    high=SEED)
    # ---- model
    n_layer: int = opt("model", 2, "blocks", low=1, high=1_000)
    n_head: int = opt("model", 4, "attention heads", low=1)
    n_embd: int = opt("model", 64, "channels", low=1, high=10**5)
    n_ctx: int = opt("model", 80, "context in tokens; a toy prompt and completion have at most 73",
                     low=10, high=10**6)
    init: str = opt("model", "", "start from a run's or a Hugging Face folder, or from gpt2, "
                    "gpt2-medium, gpt2-large, gpt2-xl")
    precision: str = opt("model", "auto", "of the matrix products; auto: bf16 (or else fp16) on a "
                         "GPU, fp32 on a CPU", ("auto", "fp32", "bf16", "fp16"))
    compile: bool = opt("model", False, "compile the model with torch.compile")
    # ---- sft: reviews -> π_ref
    sft_steps: int = opt("sft", 900, "optimizer steps", low=1)
    sft_batch: int = opt("sft", 32, "windows per step", low=1)
    sft_accum: int = opt("run", 1, "micro-batches per step and process; more of them take less "
                         "memory", low=1)
    sft_lr: float = opt("sft", 1.2e-2, "peak rate; a tiny model wants ten times GPT-2's", high=RATE)
    sft_warmup: int = opt("sft", 40, "steps of linear warm-up")
    sft_decay: float = opt("sft", 0.01, "weight decay of the matrices")
    dropout: float = opt("sft", 0.0, "in SFT alone: log-probs are compared without dropout",
                         high=0.99)
    # ---- reward: labels -> r*
    reward: str = opt("reward", "auto", "auto: exact on the toy, trained on imdb; siebert: the "
                      "paper's judge, which needs transformers", ("auto", "siebert"))
    siebert_path: str = opt("reward", "siebert/sentiment-roberta-large-english", "name or folder")
    reward_steps: int = opt("reward", 1, "optimizer steps (not used where r* is exact)", low=1)
    reward_batch: int = opt("reward", 32, "whole reviews per step, and as many crops", low=1,
                            high=10**7)
    reward_lr: float = opt("reward", 1e-4, "peak rate", high=RATE)
    reward_ctx: int = opt("reward", 512, "tokens that r* reads: the end of a long review", low=16,
                          high=10**6)
    # ---- groups: π_ref's samples, judged
    groups: str = opt("groups", "", "other people's preferences instead: a JSONL file")
    reference: str = opt("groups", "", "π_ref of that file: a run's folder or a Hugging Face one")
    prompts: int = opt("groups", 7_500, "prompts (the paper: 25,000)", low=10, high=10**7)
    num_completions: int = opt("groups", 4, "completions per prompt, K; 4 give 6 pairs", low=2,
                               high=1_000)
    max_new_tokens: int = opt("groups", 64, "tokens of a completion at most", low=1, high=10**5)
    eval_prompts: int = opt("groups", 384, "held-out prompts that every policy is judged on", low=2,
                            high=10**7)
    valid_prompts: int = opt("groups", 128, "validation prompts, to choose learning rates", low=2,
                             high=10**7)
    optimum_samples: int = opt("groups", 32, "samples of π_ref per held-out prompt, from which "
                               "Eq. 4's optimum is estimated", low=2, high=10**5)
    # ---- rm: groups -> r_φ
    rm_epochs: int = opt("rm", 3, "passes; the best checkpoint on held-out pairs is kept", low=1)
    rm_batch: int = opt("rm", 22, "groups per step", low=1)
    rm_lr: float = opt("rm", 1e-3, "peak rate", high=RATE)
    # ---- every method
    eval_every: int = opt("method", 0, "steps between evaluations; 0: four evaluations per run")
    valid_samples: int = opt("method", 0, "samples per validation prompt at each evaluation; 8 in "
                             "a frontier's runs that choose learning rates", high=10**5)
    run_seed: int = opt("method", 0, "seed of batches and rollouts alone; --seed makes π_ref anew",
                        high=SEED)
    # ---- dpo
    loss: str = opt("dpo", "pairwise", "Eq. 7; A.3's ranking; or Eq. 7 with π_ref left out, which "
                    "is not DPO", ("pairwise", "plackett-luce", "reference-free"))
    weight: str = opt("dpo", "sigmoid", "importance weight: sigmoid is DPO; constant, hinge, "
                      "indicator, ipo, cdpo, exponential, or FILE.py:FUNCTION")
    beta: float = opt("dpo", 1.6, "β of Eq. 3 and 7; the paper's 0.1 over-optimises the toy",
                      low=1e-6, high=10**6)
    dpo_steps: int = opt("dpo", 900, "optimizer steps", low=1)
    train_prompts: int = opt("dpo", 0, "groups to learn from; 0: all")
    labels: str = opt("dpo", "hard", "who wins a pair: hard, the higher r*; sampled, drawn from "
                      "Eq. 1; soft, Eq. 1's probability as the label", ("hard", "sampled", "soft"))
    label_scale: float = opt("dpo", 10.0, "s of sampled and soft labels: Eq. 1 with rewards s r*",
                             low=1e-6, high=10**6)
    alpha: float = opt("dpo", 0.5, "α, the weight of log π(y_l) in --stage unlikelihood (C.3)")
    dpo_batch: int = opt("dpo", 11, "groups per step, of 6 pairs each: near the paper's 64", low=1,
                         high=10**5)
    dpo_accum: int = opt("run", 1, "micro-batches per step and process; more of them take less "
                         "memory", low=1)
    dpo_optimizer: str = opt("dpo", "rmsprop", "the paper's is RMSprop", ("adamw", "rmsprop"))
    dpo_schedule: str = opt("dpo", "linear", "after the warm-up", ("constant", "linear", "cosine"))
    dpo_lr: float = opt("dpo", 7e-4, "peak rate; the paper's is 1e-6 at 774M parameters", high=RATE)
    dpo_warmup: int = opt("dpo", 150, "steps of linear warm-up; RMSprop's first steps are too long")
    grad_clip: float = opt("dpo", 1.0, "largest norm of the gradient; 0: no clipping")
    dpo_module: str = opt("dpo", "", "a student's file; its functions replace those of dpo.py")
    # ---- ppo: r_φ or r* -> π_θ, by Eq. 3
    ppo_steps: int = opt("ppo", 17, "iterations", low=1)
    ppo_rollouts: int = opt("ppo", 256, "completions per iteration (the paper: 1,024)", low=8,
                            high=10**7)
    ppo_lr: float = opt("ppo", 1e-3, "rate of the policy", high=RATE)
    ppo_value_lr: float = opt("ppo", 3e-3, "rate of the value network", high=RATE)
    ppo_target: float = opt("ppo", 2.0, "KL in nats to which β is steered; 0: β stays as it is")
    ppo_beta: float = opt("ppo", 0.3, "β of Eq. 3 at first, in π_ref's standard deviations of r")
    # ---- best-of-n
    best_of: int = opt("samples", 128, "samples of π_ref per test prompt: the largest N", low=2,
                       high=10**5)
    # ---- frontier: every method of Figure 2
    seeds: int = opt("frontier", 1, "run seeds of every setting", low=1, high=1_000)
    evals_per_run: int = opt("frontier", 3, "evaluations of every run, at regular steps", low=1)
    sweep_steps: int = opt("frontier", 300, "optimizer steps of every run but PPO's", low=1)
    label_dial: bool = opt("frontier", False, "also sampled and soft labels, s/β from 5 to 50")
    rankings: bool = opt("frontier", False, "also Plackett-Luce DPO")
    temperatures: bool = opt("frontier", False, "also win rates at temperatures 0 to 1")
    online: bool = opt("frontier", False, "also DPO on fresh groups, by r* and by its own r̂")
    # ---- online: dpo, later on groups that π_θ draws
    online_start: int = opt("online", 300, "steps on the stored groups first")
    online_every: int = opt("online", 100, "steps between fresh groups", low=1)
    online_labels: str = opt("online", "r*", "who labels fresh groups: r*, or π_θ's own r̂ (self)",
                             ("r*", "self"))
    # ---- judge: win rates against a preference file's chosen answers
    judge: str = opt("judge", "r*", "who compares two answers: r*; r_phi, stage rm's learned "
                     "reward; or the URL of an OpenAI-compatible endpoint, as "
                     "http://localhost:8000/v1, with its key in OPENAI_API_KEY")
    judge_model: str = opt("judge", "", "name of the model at that URL")
    # ---- ood: prompts with words that no review has
    ood_seeds: int = opt("ood", 3, "seeds, from --seed on; each has a corpus, π_ref, groups, dpo "
                         "and rm of its own", low=1, high=1_000)
    # ---- run
    jobs: int = opt("run", 0, "runs of the frontier at once; 0: one per core, or on each GPU four "
                    "(of a large model one)", high=1_000)
    device: str = opt("run", "auto", "auto: CUDA where there is one", ("auto", "cpu", "cuda"))
    threads: int = opt("run", 0, "CPU threads; 0: torch's choice", high=1_000)
    out: str = opt("run", "out", "folder of all runs")
    data: str = opt("run", "data", "folder of the corpus and its tokens")
    save_secs: float = opt("run", 10.0, "seconds between checkpoints")


TOY = Settings()
IMDB = replace(
    TOY, corpus="imdb", vocab="gpt2", reviews=0,
    n_layer=8, n_head=8, n_embd=512, n_ctx=256,  # 51M; 60 % of reviews fit 256 tokens
    dropout=0.1,  # 21.8M tokens are seen several times
    sft_steps=6_000, sft_batch=128, sft_lr=1e-3, sft_warmup=300, sft_decay=0.1,
    reward_steps=1_500, reward_batch=64, reward_lr=1e-4,
    prompts=25_000, eval_prompts=1_024,  # C.1; 1,024 give a standard error near 0.01
    optimum_samples=64,
    rm_lr=1e-4, ppo_lr=1e-5, ppo_value_lr=1e-4, ppo_steps=60, ppo_rollouts=1_024,  # C.1's rollouts
    ppo_target=6.0, sweep_steps=1_000, evals_per_run=6,
    beta=0.1, dpo_steps=2_000, dpo_batch=11, dpo_warmup=150,  # B ...
    dpo_lr=1e-5,  # ... but for the rate and its decay
    save_secs=60.0)
GPT2 = replace(
    IMDB, init="gpt2", n_layer=12, n_head=12, n_embd=768, n_ctx=1024, dropout=0.1,
    sft_steps=1_200, sft_batch=64, sft_lr=5e-5, reward_lr=2e-5, dpo_lr=2e-6)  # one epoch: 6.1
GPT2_LARGE = replace(
    GPT2, init="gpt2-large", n_layer=36, n_head=20, n_embd=1280,  # C.1
    reward="siebert", sft_accum=4,  # the judge: C.1
    dpo_lr=1e-6, dpo_warmup=150, dpo_schedule="constant",  # B: RMSprop, 1e-6 after 150 steps
    save_secs=600.0)  # a checkpoint has 6 to 19 GB
PRESETS = {"toy": TOY, "imdb": IMDB, "gpt2": GPT2, "gpt2-large": GPT2_LARGE}

GROUPS = {"data": "data", "model": "model", "sft": "sft: reviews → π_ref",
          "reward": "reward: labels → r*", "groups": "groups: π_ref's samples, judged",
          "rm": "rm: groups → r_φ", "method": "every method after the groups",
          "dpo": "dpo, unlikelihood, preferred-ft: groups → π_θ",
          "ppo": "ppo, ppo-gt: r_φ or r* → π_θ", "samples": "best-of-n",
          "frontier": "frontier: every method of Figure 2",
          "online": "online: dpo, later on groups that π_θ draws",
          "judge": "judge: answers to a preference file's prompts, compared with its chosen ones",
          "ood": "ood: prompts with words that no review has",
          "run": "run: device, folders, checkpoints; no effect on the result but rounding"}
BASE = ("data", "model", "sft", "reward", "groups")  # what every method stands on
DPO = (*BASE, "method", "dpo")
OTHER_LOSSES = ("unlikelihood", "preferred-ft")  # these stages are dpo with another loss
SETTINGS_OF = {  # stage -> the groups of settings that decide its result
    "sft": BASE[:3], "reward": BASE[:4], "chosen": BASE, "groups": BASE,
    "dpo": DPO, "unlikelihood": DPO, "preferred-ft": DPO, "inspect": DPO, "degenerate": DPO,
    "overoptimisation": DPO, "variance": DPO, "online": (*DPO, "online"),
    "ood": (*DPO, "rm", "samples", "ood"), "judge": (*DPO, "rm", "judge"),
    "rm": (*BASE, "rm"), "ppo": (*BASE, "rm", "method", "ppo"), "ppo-gt": (*BASE, "method", "ppo"),
    "best-of-n": (*BASE, "rm", "samples"),
    "frontier": (*BASE, "rm", "method", "dpo", "ppo", "samples", "online", "frontier")}


def settings_of(cfg: Settings, groups: tuple) -> dict:
    """The settings of these groups, by name."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["group"] in groups}


NAMED_BY_VALUE = ("corpus", "vocab", "init", "precision", "weight", "loss", "labels", "judge",
                  "online_labels")


def run_name(cfg: Settings, preset: Settings, groups: tuple) -> str:
    """What differs from the preset, for the end of a folder's name: "-beta1.0-constant"."""
    base, parts = settings_of(preset, groups), []
    for name, value in settings_of(cfg, groups).items():
        if value != base[name]:
            text = value if name in NAMED_BY_VALUE else f"{name}{value}"
            parts.append("-" + "".join(c if c.isascii() and c.isalnum() or c in ".-_" else "_"
                                       for c in text)[-40:])
    text = "".join(parts)
    return text if len(text) <= 200 else f"{text[:183]}-{json_hash(text)}"  # a name holds 255 bytes


def user_files(cfg: Settings, stage: str) -> dict[str, str]:
    """The hashes of all files that a user gave to a stage. They are part of the run's identity."""
    siebert = [cfg.siebert_path] if cfg.reward == "siebert" else []
    given = {"sft": [cfg.init], "chosen": [cfg.groups, cfg.init],
             "groups": [cfg.groups, cfg.reference, *siebert * (not cfg.groups)],
             "judge": siebert * (cfg.judge == "r*"),
             **dict.fromkeys(("dpo", "online", *OTHER_LOSSES),
                             [cfg.dpo_module, cfg.weight.rpartition(":")[0]])}
    hashes = {}
    for name in filter(None, given.get(stage, [])):
        if name in GPT2_SIZES and not (Path(name) / "model.pt").exists():
            hashes[name] = ""  # its weights do not change
        elif Path(name).is_dir():
            hashes |= {str(path): file_hash(path) for path in checkpoint_files(Path(name))}
        elif name not in siebert:  # where it is no folder, it is a name on the Hugging Face hub
            hashes[name] = file_hash(name)
    return hashes


CHECKPOINT = re.compile(r"(config|tokenizer|vocab|merges|special_tokens|model|pytorch_model)"
                        r".*\.(json|txt|safetensors|bin)$")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that loading a run's or a Hugging Face folder reads: weights, sizes, tokenizer."""
    if (folder / "model.pt").exists():
        return [folder / "model.pt", folder / "bpe.tiktoken"]
    with reading(folder):
        return [path for path in sorted(folder.iterdir()) if CHECKPOINT.match(path.name)]


# ------------------------------------------------------------------------------ command line

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print every flag before the sentence
        if not ranks.RANK:
            sys.stderr.write(f"error: {message}; see  python train.py --help\n")
        sys.exit(2)


STAGE = Parser(add_help=False, allow_abbrev=False)
STAGE.add_argument("--stage", choices=SETTINGS_OF, default="dpo", metavar="STAGE",
                   help="one of the above; default: dpo")


def stage_of(argv) -> str:
    return STAGE.parse_known_args(argv)[0].stage


def parse(argv, cuda: bool) -> tuple[str, str, str, Settings]:
    """Stage, preset, the reason for the preset, and the settings. --help shows the stage's flags.

    UserError for a value out of range; argparse's own exit 2 for an unknown flag or word.
    """
    stage = stage_of(argv)
    parser = Parser(
        usage="python train.py [--stage STAGE] [--preset PRESET] [any setting below]",
        description=f"Stages: {', '.join(SETTINGS_OF)}. A stage first makes what it needs. Shown "
        f"are the settings that {stage} depends on; each stage shows its own after --stage STAGE.",
        parents=[STAGE], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28))
    parser.add_argument("--preset", choices=PRESETS, help="default: imdb with CUDA, else toy")
    titles = {group: parser.add_argument_group(title) for group, title in GROUPS.items()}
    for f in fields(Settings):
        group, choices = f.metadata["group"], f.metadata["choices"]
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=choices, metavar=None if choices else f.type.__name__.upper())
        text = f.metadata["help"] + (f" (toy {f.default!r})" if f.default != "" else "")
        shown = group in (*SETTINGS_OF[stage], "run")
        titles[group].add_argument(
            "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
            help=text.replace("%", "%%") if shown else argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    stage, preset = given.pop("stage"), given.pop("preset")
    name = preset or ("imdb" if cuda and given.get("device") != "cpu" else "toy")
    reason = ("--preset" if preset else "CUDA is here" if name == "imdb" else
              "on a CPU; with CUDA it would be imdb")
    cfg = replace(PRESETS[name], **given)
    if stage in OTHER_LOSSES:
        cfg = replace(cfg, loss=stage)
    check(cfg)
    check_memory(cfg, cuda)
    return stage, name, reason, cfg


def check(cfg: Settings) -> None:
    """UserError for a value out of range, and for settings that exclude each other."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        flag = f"--{f.name.replace('_', '-')} is {value!r}"
        if f.type in (int, float) and not low <= value <= high:
            raise UserError(f"{flag}; it must be from {low} to {high}")
        # refused: an empty name, a NUL byte, surrogates (they stand for bytes that are no UTF-8)
        if f.type is str and value != f.default and not re.fullmatch("[^\0\ud800-\udfff]+", value):
            raise UserError(f"{flag}; it must be a name, in UTF-8")
    for name in (cfg.out, cfg.data, cfg.groups, cfg.init, cfg.reference):
        with reading(name):
            (Path(name) / "x").exists()  # OSError: a name too long, or no permission
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"--n-embd {cfg.n_embd} does not divide by --n-head {cfg.n_head}")
    if cfg.vocab != "gpt2" and cfg.vocab not in map(str, range(257, 65_537)):
        raise UserError(f"--vocab is {cfg.vocab!r}; give gpt2 or a size from 257 to 65536")
    longest = 9 + cfg.max_new_tokens  # <|endoftext|>, 8 tokens of a prompt, a completion
    if cfg.corpus == "imdb" and cfg.reward == "auto" and cfg.reward_ctx < longest:
        raise UserError(f"--reward-ctx {cfg.reward_ctx} cannot hold a prompt of 9 tokens and a "
                        f"completion of {cfg.max_new_tokens}: give at least {longest}")
    if cfg.loss in ("plackett-luce", "reference-free") and cfg.weight != "sigmoid":
        raise UserError(f"--weight {cfg.weight} works only with --loss pairwise")
    if cfg.labels != "hard" and (cfg.loss != "pairwise" or cfg.weight != "sigmoid"):
        raise UserError(f"--labels {cfg.labels} works only with --stage dpo and the default --loss "
                        "and --weight")
    if cfg.reference and not cfg.groups:
        raise UserError("--reference is the π_ref of a preference file: give --groups FILE with it")


def check_memory(cfg: Settings, cuda: bool) -> None:
    """UserError for a new model that does not fit the memory, at 4 bytes per number.

    A CPU holds weights, gradients and AdamW's two moments. A GPU says itself what does not fit it,
    but weights are made on the CPU before.
    """
    V, C = 50_257 if cfg.vocab == "gpt2" else int(cfg.vocab), cfg.n_embd
    n = 12 * cfg.n_layer * C * C + (V + cfg.n_ctx) * C  # all but biases and norms
    needed = n * (4 if cuda and cfg.device != "cpu" else 16) / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > memory and not (cfg.init or cfg.reference):
        raise UserError(f"a model of {n:,} parameters needs about {needed:,.0f} GB, this machine "
                        f"has {memory:,.0f} GB: give a smaller --n-layer, --n-embd or --n-ctx")
