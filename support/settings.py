"""Every setting of every stage with its meaning, the four presets, and the command line.

Each field of Settings is a flag of train.py and belongs to a group. SETTINGS_OF says for each stage
which groups decide its result: they are part of a run's identity. The group "run" says where and
how a run works. It does not change the result.
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

SEED, RATE = 2**32 - 1, 1e38  # upper bounds: of seeds (32 bits), of rates (float32)


def opt(group, default, help, choices=None, low=0, high=10**9):
    """A setting. If it is a number, it must be from low to high."""
    return field(default=default, metadata=dict(group=group, help=help, choices=choices, low=low,
                                                high=high))


@dataclass(frozen=True)
class Settings:
    """The defaults are the preset toy: two CPU cores, no network, three minutes."""

    # ---- data
    corpus: str = opt("data", "toy", "which reviews", ("toy", "imdb"))
    reviews: int = opt("data", 20_000, "number of reviews; on imdb per split, and 0 means all",
                       high=10**7)
    vocab: str = opt("data", "1280", "tokenizer: gpt2, or the size of a BPE trained on the corpus")
    seed: int = opt("data", 0, "seed of the corpus, the weights, the batches and the samples",
                    high=SEED)
    # ---- model
    n_layer: int = opt("model", 2, "transformer blocks", low=1, high=1_000)
    n_head: int = opt("model", 4, "attention heads", low=1)
    n_embd: int = opt("model", 64, "channels", low=1, high=10**5)
    n_ctx: int = opt("model", 80, "context in tokens; a toy prompt and completion have at most 73",
                     low=10, high=10**6)
    init: str = opt("model", "", "weights to start from: a run's folder, a Hugging Face folder, "
                    "gpt2, gpt2-medium, gpt2-large or gpt2-xl")
    precision: str = opt("model", "auto", "precision of matrix products; auto: fp32 on a CPU, bf16 "
                         "on a GPU, or fp16 where it has no bf16", ("auto", "fp32", "bf16", "fp16"))
    compile: bool = opt("model", False, "compile the model with torch.compile")
    # ---- sft: reviews -> π_ref
    sft_steps: int = opt("sft", 900, "optimizer steps", low=1)
    sft_batch: int = opt("sft", 32, "windows of reviews per step", low=1)
    sft_accum: int = opt("run", 1, "micro-batches per step and process; more of them take less "
                         "memory", low=1)
    sft_lr: float = opt("sft", 1.2e-2, "peak learning rate; a tiny model needs a larger one than "
                        "GPT-2", high=RATE)
    sft_warmup: int = opt("sft", 40, "steps of linear warm-up")
    sft_decay: float = opt("sft", 0.01, "weight decay of the matrices")
    dropout: float = opt("sft", 0.0, "dropout in sft, chosen and reward; other stages use none",
                         high=0.99)
    # ---- reward: labels -> r*
    reward: str = opt("reward", "auto", "r*; auto: exact on the toy, a trained classifier on imdb; "
                      "siebert: the paper's classifier (needs transformers)", ("auto", "siebert"))
    siebert_path: str = opt("reward", "siebert/sentiment-roberta-large-english", "name or folder "
                            "of the siebert model")
    reward_steps: int = opt("reward", 1, "optimizer steps (not used where r* is exact)", low=1)
    reward_batch: int = opt("reward", 32, "whole reviews per step, and as many parts of reviews",
                            low=1, high=10**7)
    reward_lr: float = opt("reward", 1e-4, "peak learning rate", high=RATE)
    reward_ctx: int = opt("reward", 512, "largest number of tokens that r* reads: the end of a "
                          "long review", low=16, high=10**6)
    # ---- groups: π_ref's samples with their r*
    groups: str = opt("groups", "", "a preference file (JSON lines), used in place of samples")
    reference: str = opt("groups", "", "π_ref for --groups: the folder of a run or a Hugging Face "
                         "model")
    prompts: int = opt("groups", 7_500, "training prompts (the paper: 25,000)", low=10, high=10**7)
    num_completions: int = opt("groups", 4, "completions per prompt, K; 4 give 6 pairs", low=2,
                               high=1_000)
    max_new_tokens: int = opt("groups", 64, "largest number of tokens in a completion", low=1,
                              high=10**5)
    eval_prompts: int = opt("groups", 384, "test prompts on which every policy is evaluated", low=2,
                            high=10**7)
    valid_prompts: int = opt("groups", 128, "validation prompts, to choose learning rates", low=2,
                             high=10**7)
    optimum_samples: int = opt("groups", 32, "samples of π_ref per test prompt, to estimate the "
                               "optimum of Eq. 4", low=2, high=10**5)
    # ---- rm: groups -> r_φ
    rm_epochs: int = opt("rm", 3, "passes over the groups; the weights that are best on held-out "
                         "pairs are kept", low=1)
    rm_batch: int = opt("rm", 22, "groups per step", low=1)
    rm_lr: float = opt("rm", 1e-3, "peak learning rate", high=RATE)
    # ---- every method
    eval_every: int = opt("method", 0, "steps between evaluations; 0: four evaluations per run")
    valid_samples: int = opt("method", 0, "samples per validation prompt at each evaluation; the "
                             "frontier uses 8 to choose learning rates", high=10**5)
    run_seed: int = opt("method", 0, "seed of batches, rollouts, sampled labels and label noise; "
                        "it leaves π_ref unchanged", high=SEED)
    # ---- dpo
    loss: str = opt("dpo", "pairwise", "pairwise: Eq. 7; plackett-luce: A.3, on rankings; "
                    "reference-free: Eq. 7 without π_ref, which is not DPO",
                    ("pairwise", "plackett-luce", "reference-free"))
    weight: str = opt("dpo", "sigmoid", "importance weight: sigmoid (this is DPO), constant, "
                      "hinge, indicator, ipo, cdpo, exponential, or FILE.py:FUNCTION")
    beta: float = opt("dpo", 1.6, "β of Eq. 3 and 7; the paper's 0.1 is too small for the toy",
                      low=1e-6, high=10**6)
    dpo_steps: int = opt("dpo", 900, "optimizer steps", low=1)
    train_prompts: int = opt("dpo", 0, "groups to learn from; 0: all")
    labels: str = opt("dpo", "hard", "hard: the higher r* wins a pair; sampled: Eq. 1 draws the "
                      "winner; soft: the label is Eq. 1's probability", ("hard", "sampled", "soft"))
    label_scale: float = opt("dpo", 10.0, "s: sampled and soft labels use Eq. 1 with rewards s r*",
                             low=1e-6, high=10**6)
    label_noise: float = opt("dpo", 0.0, "probability that a training pair's label is flipped, "
                             "drawn once per pair", high=0.5)
    alpha: float = opt("dpo", 0.5, "α, the weight of log π(y_l) in --stage unlikelihood (C.3)")
    dpo_batch: int = opt("dpo", 11, "groups per step; 11 groups of 4 have 66 pairs, and the paper "
                         "uses 64; in a file of pairs each group is one pair", low=1, high=10**5)
    dpo_accum: int = opt("run", 1, "micro-batches per step and process; more of them take less "
                         "memory", low=1)
    dpo_optimizer: str = opt("dpo", "rmsprop", "the paper uses RMSprop", ("adamw", "rmsprop"))
    dpo_schedule: str = opt("dpo", "linear", "learning rate after the warm-up",
                            ("constant", "linear", "cosine"))
    dpo_lr: float = opt("dpo", 7e-4, "peak learning rate; the paper uses 1e-6 for 774M parameters",
                        high=RATE)
    dpo_warmup: int = opt("dpo", 150, "steps of linear warm-up, as in the paper")
    grad_clip: float = opt("dpo", 1.0, "largest norm of the gradient; 0: no clipping")
    dpo_module: str = opt("dpo", "", "your Python file: its functions replace those of the same "
                          "name in dpo.py")
    # ---- ppo: r_φ or r* -> π_θ, by Eq. 3
    ppo_steps: int = opt("ppo", 17, "iterations", low=1)
    ppo_rollouts: int = opt("ppo", 256, "completions per iteration (the paper: 1,024)", low=8,
                            high=10**7)
    ppo_lr: float = opt("ppo", 1e-3, "learning rate of the policy", high=RATE)
    ppo_value_lr: float = opt("ppo", 3e-3, "learning rate of the value network", high=RATE)
    ppo_target: float = opt("ppo", 2.0, "target KL in nats: β is adapted to it; 0: β is constant")
    ppo_beta: float = opt("ppo", 0.3, "β at the start, in standard deviations of the reward on "
                          "π_ref's samples")
    # ---- best-of-n
    best_of: int = opt("samples", 128, "samples of π_ref per test prompt: the largest N", low=2,
                       high=10**5)
    # ---- frontier: every method of Figure 2
    seeds: int = opt("frontier", 1, "runs per setting, each with its own run seed", low=1,
                     high=1_000)
    evals_per_run: int = opt("frontier", 3, "evaluations of every run, at regular steps", low=1)
    sweep_steps: int = opt("frontier", 300, "optimizer steps of every run except PPO's", low=1)
    label_dial: bool = opt("frontier", False, "add DPO on sampled and soft labels, s/β 5 to 50")
    rankings: bool = opt("frontier", False, "add Plackett-Luce DPO")
    temperatures: bool = opt("frontier", False, "add win rates at sampling temperatures 0 to 1")
    online: bool = opt("frontier", False, "add DPO on fresh groups, labelled by r* and "
                       "(one seed) by its own r̂")
    # ---- online: dpo, later on groups that π_θ draws
    online_start: int = opt("online", 300, "steps on the stored groups first")
    online_every: int = opt("online", 100, "steps between fresh groups", low=1)
    online_labels: str = opt("online", "r*", "who labels fresh groups: r*, or π_θ's own r̂ (self)",
                             ("r*", "self"))
    # ---- judge: win rates against a preference file's chosen answers
    judge: str = opt("judge", "r*", "who compares two answers: r*, which is film sentiment; r_phi "
                     "(the learned reward of stage rm); or the URL of an OpenAI-compatible "
                     "endpoint, for example http://localhost:8000/v1, with its key in "
                     "OPENAI_API_KEY")
    judge_model: str = opt("judge", "", "name of the model at that URL")
    # ---- ood: prompts with words that no review has
    ood_seeds: int = opt("ood", 3, "number of seeds, from --seed on; each has its own corpus, "
                         "π_ref, groups, dpo and rm", low=1, high=1_000)
    # ---- run
    jobs: int = opt("run", 0, "frontier runs at the same time; 0: one per CPU core, at most 8, or "
                    "four per GPU (one if the model is large)", high=1_000)
    device: str = opt("run", "auto", "auto: CUDA if there is a GPU", ("auto", "cpu", "cuda"))
    threads: int = opt("run", 0, "CPU threads; 0: torch's choice", high=1_000)
    out: str = opt("run", "out", "folder of all runs")
    data: str = opt("run", "data", "folder of the corpus and its tokens")
    save_secs: float = opt("run", 10.0, "seconds between checkpoints")


TOY = Settings()
IMDB = replace(
    TOY, corpus="imdb", vocab="gpt2", reviews=0,
    n_layer=8, n_head=8, n_embd=512, n_ctx=256,  # 51M parameters; 60 % of reviews fit 256 tokens
    dropout=0.1,  # SFT sees its 21.8M tokens several times
    sft_steps=6_000, sft_batch=128, sft_lr=1e-3, sft_warmup=300, sft_decay=0.1,
    reward_steps=1_500, reward_batch=64, reward_lr=1e-4,
    prompts=25_000, eval_prompts=1_024,  # C.1's prompts; 1,024 give a standard error near 0.01
    optimum_samples=64,
    rm_lr=1e-4, ppo_lr=1e-5, ppo_value_lr=1e-4, ppo_steps=60, ppo_rollouts=1_024,  # C.1's rollouts
    ppo_target=6.0, sweep_steps=1_000, evals_per_run=6,
    beta=0.1, dpo_steps=2_000, dpo_batch=11, dpo_warmup=150,  # as in Appendix B
    dpo_lr=1e-5,  # larger than in Appendix B, and decayed
    save_secs=60.0)
GPT2 = replace(
    IMDB, init="gpt2", n_layer=12, n_head=12, n_embd=768, n_ctx=1024, dropout=0.1,
    sft_steps=1_200, sft_batch=64, sft_lr=5e-5, reward_lr=2e-5, dpo_lr=2e-6)  # SFT: one epoch
GPT2_LARGE = replace(
    GPT2, init="gpt2-large", n_layer=36, n_head=20, n_embd=1280,  # C.1
    reward="siebert", sft_accum=4,  # C.1: r* is the siebert model
    dpo_lr=1e-6, dpo_warmup=150, dpo_schedule="constant",  # B: RMSprop, 1e-6 after 150 steps
    save_secs=600.0)  # a checkpoint has 6 to 19 GB
PRESETS = {"toy": TOY, "imdb": IMDB, "gpt2": GPT2, "gpt2-large": GPT2_LARGE}

GROUPS = {"data": "data", "model": "model", "sft": "sft: reviews → π_ref",
          "reward": "reward: labels → r*", "groups": "groups: π_ref's samples with their r*",
          "rm": "rm: groups → r_φ", "method": "every method after the groups",
          "dpo": "dpo, unlikelihood, preferred-ft: groups → π_θ",
          "ppo": "ppo, ppo-gt: r_φ or r* → π_θ", "samples": "best-of-n",
          "frontier": "frontier: every method of Figure 2",
          "online": "online: dpo, later on groups that π_θ draws",
          "judge": "judge: answers of π_θ compared with the chosen ones of a preference file",
          "ood": "ood: prompts with words that no review has",
          "run": "run: device, folders, checkpoints; they change a result by rounding only"}
BASE = ("data", "model", "sft", "reward", "groups")  # every method depends on them
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


# settings in a stage's groups that the stage chooses itself or ignores
UNUSED = {
    **dict.fromkeys(("dpo", "online"), ("alpha",)),
    "unlikelihood": ("loss", "weight", "label_scale", "beta"),  # β only scales the logged r̂
    "preferred-ft": ("loss", "weight", "label_scale", "beta", "alpha"),
    "degenerate": ("dpo_optimizer", "dpo_schedule", "dpo_steps", "dpo_warmup", "eval_every"),
    "overoptimisation": ("beta", "train_prompts", "eval_every"),
    "frontier": ("loss", "weight", "labels", "beta", "alpha", "run_seed", "eval_every",
                 "valid_samples", "dpo_steps", "dpo_warmup", "online_start", "online_labels",
                 "ppo_target")}


def settings_of(cfg: Settings, groups: tuple) -> dict:
    """The settings of these groups, by name."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["group"] in groups}


NAMED_BY_VALUE = ("corpus", "vocab", "init", "precision", "weight", "loss", "labels", "judge",
                  "online_labels")


def changed_settings(cfg: Settings, preset: Settings, groups: tuple) -> dict:
    """The settings of these groups that differ from the preset, by name."""
    base = settings_of(preset, groups)
    return {name: x for name, x in settings_of(cfg, groups).items() if x != base[name]}


def run_name(cfg: Settings, preset: Settings, groups: tuple) -> str:
    """The settings that differ from the preset, as the end of a folder's name: "-beta1.0-constant".
    """
    parts = []
    for name, value in changed_settings(cfg, preset, groups).items():
        text = value if name in NAMED_BY_VALUE else f"{name}{value}"
        parts.append("-" + "".join(c if c.isascii() and c.isalnum() or c in ".-_" else "_"
                                   for c in text)[-40:])
    text = "".join(parts)
    return text if len(text) <= 200 else f"{text[:183]}-{json_hash(text)}"  # at most 255 bytes fit


TITLES = {"dpo": "DPO, β {beta:g}", "online": "online DPO (labels by {online_labels}), β {beta:g}",
          "unlikelihood": "Unlikelihood, α {alpha:g}", "preferred-ft": "Preferred-FT",
          "ppo": "PPO (learned reward)", "ppo-gt": "PPO-GT (true reward)"}


def run_title(stage: str, cfg: Settings, preset: Settings) -> str:
    """The method, and the settings that differ from the preset: "DPO, β 1.6; labels soft"."""
    title, others = TITLES.get(stage, stage), changed_settings(cfg, preset, SETTINGS_OF[stage])
    if stage in ("ppo", "ppo-gt"):
        title += ", target KL {ppo_target:g}" if cfg.ppo_target else ", constant β {ppo_beta:g}"
    silent = *UNUSED.get(stage, ()), "ppo_target"
    listed = ", ".join(f"{name} {value}" for name, value in others.items()
                       if f"{{{name}" not in title and name not in silent)
    return "; ".join(filter(None, [title.format(**vars(cfg)), listed]))


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
        elif name not in siebert:  # a siebert path that is no folder is a name on the hub
            hashes[name] = file_hash(name)
    return hashes


CHECKPOINT = re.compile(r"(config|tokenizer|vocab|merges|special_tokens|model|pytorch_model)"
                        r".*\.(json|txt|safetensors|bin)$")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that are read from a run's or Hugging Face folder: weights, sizes, tokenizer."""
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
    """Stage, preset, the first line to print, and the settings. --help shows the stage's flags.

    UserError for a value out of range. An unknown flag or word ends the program with exit code 2.
    """
    stage = stage_of(argv)
    parser = Parser(
        usage="python train.py [--stage STAGE] [--preset PRESET] [any setting below]",
        description=f"Stages: {', '.join(SETTINGS_OF)}. A stage first runs the stages that it "
        f"needs. This help shows the settings of stage {stage}, with their values in the preset "
        "toy. For those of another stage run  python train.py --stage STAGE --help",
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
    reason = ("--preset" if preset else "the default with CUDA" if name == "imdb" else
              "the default without CUDA")
    headline = f"preset {name} ({reason}); stage {stage}"
    # inspect shows r_φ beside r̂, if stage rm has run
    used = settings_of(TOY, (*SETTINGS_OF[stage], "run", *["rm"] * (stage == "inspect")))
    used = used.keys() - UNUSED.get(stage, ())
    if unused := [f"--{x.replace('_', '-')}" for x in given if x not in used]:
        headline += f", which does not use {', '.join(unused)}"
    cfg = replace(PRESETS[name], **given)
    if stage in OTHER_LOSSES:
        cfg = replace(cfg, loss=stage)
    check(cfg)
    check_memory(cfg, cuda)
    return stage, name, headline, cfg


def check(cfg: Settings) -> None:
    """UserError for a value out of range, and for settings that exclude each other."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        flag = f"--{f.name.replace('_', '-')} is {value!r}"
        if f.type in (int, float) and not low <= value <= high:
            raise UserError(f"{flag}; it must be from {low} to {high}")
        # no empty name, no NUL byte, no surrogates (Python puts them where bytes are not UTF-8)
        if f.type is str and value != f.default and not re.fullmatch("[^\0\ud800-\udfff]+", value):
            raise UserError(f"{flag}; it must be a name in UTF-8")
    for name in (cfg.out, cfg.data, cfg.groups, cfg.init, cfg.reference):
        with reading(name):
            (Path(name) / "x").exists()  # OSError if the name is too long or permission is missing
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"--n-embd is {cfg.n_embd}; it must be a multiple of --n-head {cfg.n_head}")
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
    if cfg.label_noise and (cfg.labels != "hard" or cfg.loss == "plackett-luce"):
        raise UserError(f"--label-noise {cfg.label_noise:g} flips the hard labels of pairs: leave "
                        "--labels and --loss plackett-luce out")
    if cfg.reference and not cfg.groups:
        raise UserError("--reference is the π_ref of a preference file: give --groups FILE with it")


def check_memory(cfg: Settings, cuda: bool) -> None:
    """UserError for a new model that does not fit into the CPU's memory, at 4 bytes per number.

    On a CPU it holds weights, gradients and AdamW's two moments. With a GPU it holds the weights,
    which are made on the CPU first; CUDA itself reports what does not fit on the GPU.
    """
    V, C = 50_257 if cfg.vocab == "gpt2" else int(cfg.vocab), cfg.n_embd
    n = 12 * cfg.n_layer * C * C + (V + cfg.n_ctx) * C  # without biases and norms
    needed = n * (4 if cuda and cfg.device != "cpu" else 16) / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > memory and not (cfg.init or cfg.reference):
        raise UserError(f"{n:,} parameters need about {needed:,.0f} GB, and this machine has "
                        f"{memory:,.0f} GB: give a smaller --n-layer, --n-embd or --n-ctx")
