"""Every setting of a run, with its reason, and the four presets. Each field is a flag of train.py.

A field's group says which stages it belongs to: a stage's identity is made of its own group and
of those of the stages it stands on (stages.SETTINGS_OF). The group "run" changes where and how a
run goes, never its result.
"""

import argparse
import sys
from dataclasses import dataclass, field, fields, replace

from support.runs import UserError, json_hash


def opt(group, default, help, choices=None, low=0):
    return field(default=default,
                 metadata=dict(group=group, help=help, choices=choices, low=low))


@dataclass(frozen=True)
class Settings:
    """The defaults are the preset toy: two CPU cores, no network, about a minute."""

    # ---- data
    corpus: str = opt("data", "toy", "which reviews", ("toy", "imdb"))
    reviews: int = opt("data", 20_000, "how many to make (toy), or to read of each split (imdb; 0: "
                       "all)")
    vocab: str = opt("data", "1280", "gpt2, or the size of a BPE trained on the corpus")
    seed: int = opt("data", 0, "of the corpus, the weights, the batches and the samples")
    # ---- model
    n_layer: int = opt("model", 2, "blocks", low=1)
    n_head: int = opt("model", 4, "attention heads", low=1)
    n_embd: int = opt("model", 64, "channels", low=1)
    n_ctx: int = opt("model", 80, "context in tokens: a toy review has 35, prompt and sample 73",
                     low=10)
    init: str = opt("model", "", "start from a Hugging Face folder, gpt2, gpt2-medium, gpt2-large")
    precision: str = opt("model", "auto", "of the matrix products; auto: bf16 (else fp16) on a GPU,"
                         " fp32 on a CPU", ("auto", "fp32", "bf16", "fp16"))
    compile: bool = opt("model", False, "torch.compile the model")
    # ---- sft: reviews -> π_ref
    sft_steps: int = opt("sft", 900, "optimizer steps", low=1)
    sft_batch: int = opt("sft", 32, "windows a step", low=1)
    sft_accum: int = opt("run", 1, "micro-batches a step, on a CPU each core's: less memory", low=1)
    sft_lr: float = opt("sft", 1.2e-2, "peak; tiny models want ten times GPT-2's")
    sft_warmup: int = opt("sft", 40, "steps of linear warm-up")
    sft_decay: float = opt("sft", 0.01, "weight decay of matrices")
    dropout: float = opt("sft", 0.0, "in SFT only: log-probs are compared without it")
    # ---- reward: labels -> r*
    reward: str = opt("reward", "auto", "auto: exact on the toy, trained on imdb; siebert: the "
                      "paper's, needs transformers", ("auto", "siebert"))
    siebert_path: str = opt("reward", "siebert/sentiment-roberta-large-english", "name or folder")
    reward_steps: int = opt("reward", 1, "optimizer steps (unused where r* is exact)", low=1)
    reward_batch: int = opt("reward", 32, "whole reviews a step, and as many crops", low=1)
    reward_lr: float = opt("reward", 1e-4, "peak")
    reward_ctx: int = opt("reward", 512, "tokens that it reads: a long review's end", low=16)
    # ---- groups: π_ref's samples, judged
    groups: str = opt("groups", "", "other people's preferences instead: a JSONL file")
    reference: str = opt("groups", "", "the π_ref of that file: a run or Hugging Face folder")
    prompts: int = opt("groups", 7_500, "prompts (the paper's 25,000)", low=10)
    completions: int = opt("groups", 4, "completions a prompt, K: 4 give 6 pairs (C.1)", low=2)
    max_new: int = opt("groups", 64, "tokens a completion may have", low=1)
    eval_prompts: int = opt("groups", 384, "held-out prompts that every policy is judged on", low=2)
    valid_prompts: int = opt("groups", 128, "others, from validation reviews, to choose rates on",
                             low=2)
    optimum: int = opt("groups", 64, "reference samples a held-out prompt, for Eq. 4's optimum",
                       low=2)
    # ---- rm: groups -> r_φ
    rm_epochs: int = opt("rm", 3, "passes over the pairs; the best on held-out ones is kept", low=1)
    rm_batch: int = opt("rm", 22, "groups a step", low=1)
    rm_lr: float = opt("rm", 1e-3, "peak")
    # ---- every method's
    eval_every: int = opt("method", 0, "steps between evaluations; 0: four in all")
    run_seed: int = opt("method", 0, "of batches and rollouts alone; --seed remakes π_ref too")
    # ---- dpo
    loss: str = opt("dpo", "pairwise", "Eq. 7, or A.3's ranking", ("pairwise", "plackett-luce"))
    weight: str = opt("dpo", "sigmoid", "importance weight: sigmoid is DPO; constant, hinge, "
                      "indicator, ipo, cdpo, exponential, or FILE.py:FUNCTION")
    beta: float = opt("dpo", 1.6, "β: how dear a nat of KL is; the paper's 0.1 over-optimises here")
    dpo_steps: int = opt("dpo", 900, "optimizer steps", low=1)
    labels: str = opt("dpo", "hard", "who wins: hard, the higher r*; sampled from Eq. 1; soft, Eq. "
                      "1's probability as the label", ("hard", "sampled", "soft"))
    label_scale: float = opt("dpo", 10.0, "s of sampled and soft labels: Eq. 1 with rewards s r*")
    alpha: float = opt("dpo", 0.5, "of --stage unlikelihood (C.3)")
    dpo_batch: int = opt("dpo", 11, "groups a step, of 6 pairs: the paper's 64", low=1)
    dpo_accum: int = opt("run", 1, "micro-batches a step, on a CPU each core's: less memory", low=1)
    dpo_optimizer: str = opt("dpo", "rmsprop", "the paper's is RMSprop", ("adamw", "rmsprop"))
    dpo_schedule: str = opt("dpo", "linear", "after the warm-up", ("constant", "linear", "cosine"))
    dpo_lr: float = opt("dpo", 7e-4, "peak; the paper's is 1e-6 at 774M parameters")
    dpo_warmup: int = opt("dpo", 150, "steps of linear warm-up; RMSprop's first are too long")
    clip: float = opt("dpo", 1.0, "gradient norm at most; 0: never clipped")
    dpo_module: str = opt("dpo", "", "a student's file: the names it defines replace dpo.py's")
    # ---- ppo: r_φ or r* -> π_θ, by Eq. 3
    ppo_steps: int = opt("ppo", 17, "iterations", low=1)
    ppo_rollouts: int = opt("ppo", 256, "completions an iteration (the paper's 1,024)", low=8)
    ppo_lr: float = opt("ppo", 1e-3, "of the policy")
    ppo_value_lr: float = opt("ppo", 3e-3, "of the value network")
    ppo_target: float = opt("ppo", 2.0, "KL that β is steered to, nats; 0: β stays")
    ppo_beta: float = opt("ppo", 0.3, "where β of Eq. 3 starts, in standard deviations of the "
                          "reward over π_ref's samples")
    # ---- best-of-n, and the optimum
    best_of: int = opt("samples", 128, "π_ref's samples a test prompt: the largest N", low=2)
    # ---- frontier: every method of Figure 2
    seeds: int = opt("frontier", 1, "run seeds of every setting", low=1)
    points: int = opt("frontier", 3, "evaluations of every run, at regular steps", low=1)
    sweep_steps: int = opt("frontier", 300, "optimizer steps of every run but PPO's", low=1)
    dial: bool = opt("frontier", False, "also sampled and soft labels, s/β from 5 to 50")
    rankings: bool = opt("frontier", False, "also Plackett-Luce DPO")
    temperatures: bool = opt("frontier", False, "also win rates at temperatures 0 to 1")
    # ---- run
    jobs: int = opt("run", 0, "runs of the frontier at once; 0: one a core, four on a GPU")
    device: str = opt("run", "auto", "auto: CUDA where there is one", ("auto", "cpu", "cuda"))
    threads: int = opt("run", 0, "CPU threads; 0: torch's choice")
    out: str = opt("run", "out", "folder of all runs")
    data: str = opt("run", "data", "folder of corpus and token streams")
    save_secs: float = opt("run", 10.0, "seconds between checkpoints")


TOY = Settings()
IMDB = replace(
    TOY, corpus="imdb", vocab="gpt2", reviews=0,
    n_layer=8, n_head=8, n_embd=512, n_ctx=256,  # 51M; 60 % of reviews fit 256 tokens
    dropout=0.1,  # 21.8M tokens are seen several times
    sft_steps=6_000, sft_batch=128, sft_lr=1e-3, sft_warmup=300, sft_decay=0.1,
    reward_steps=1_500, reward_batch=64, reward_lr=1e-4,
    prompts=25_000, eval_prompts=1_024,  # C.1; 1,024 give a standard error near 0.01
    valid_prompts=512,
    rm_lr=1e-4, ppo_lr=1e-5, ppo_value_lr=1e-4, ppo_steps=60, ppo_rollouts=1_024,  # C.1's rollouts
    ppo_target=6.0, sweep_steps=1_000, points=6,
    beta=0.1, dpo_steps=2_000, dpo_batch=11, dpo_warmup=150,  # B ...
    dpo_lr=1e-5,  # ... but for the rate and its decay
    save_secs=60.0)
GPT2 = replace(
    IMDB, init="gpt2", n_layer=12, n_head=12, n_embd=768, n_ctx=1024, dropout=0.1,
    sft_steps=1_200, sft_batch=64, sft_lr=5e-5,  # one epoch, near enough: Section 6.1
    reward_lr=2e-5, dpo_lr=2e-6)
GPT2_LARGE = replace(
    GPT2, init="gpt2-large", n_layer=36, n_head=20, n_embd=1280,  # C.1
    reward="siebert",  # C.1
    sft_accum=4,
    dpo_lr=1e-6, dpo_warmup=150, dpo_schedule="constant",  # B: RMSprop, 1e-6 after 150 steps
    save_secs=600.0)  # a checkpoint has 6 to 19 GB
PRESETS = {"toy": TOY, "imdb": IMDB, "gpt2": GPT2, "gpt2-large": GPT2_LARGE}

BASE = ("data", "model", "sft", "reward", "groups")  # what every method stands on
GROUPS = {"data": "data", "model": "model", "sft": "sft: reviews → π_ref",
          "reward": "reward: labels → r*", "groups": "groups: π_ref's samples, judged",
          "rm": "rm: groups → r_φ", "method": "every method after the groups",
          "dpo": "dpo, unlikelihood, preferred-ft: groups → π_θ",
          "ppo": "ppo, ppo-gt: r_φ or r* → π_θ", "samples": "best-of-n, and the optimum",
          "frontier": "frontier: every method of Figure 2",
          "run": "run: where and how, never what"}


def belonging(settings: Settings, groups: tuple) -> dict:
    """The settings of these groups: what decides a stage's result."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)
            if f.metadata["group"] in groups}


ALONE = ("corpus", "vocab", "init", "precision", "weight", "loss", "labels")  # named by their value


def suffix(settings: Settings, preset: Settings, groups: tuple) -> str:
    """What differs from the preset, for a folder's name: "-beta1.0-constant"."""
    base, parts = belonging(preset, groups), []
    for name, value in belonging(settings, groups).items():
        if value != base[name]:
            text = value if name in ALONE else f"{name}{value}"
            parts.append("-" + "".join(c if c.isascii() and c.isalnum() or c in ".-_" else "_"
                                       for c in text)[-40:])
    text = "".join(parts)
    return text if len(text) <= 200 else f"{text[:183]}-{json_hash(text)}"  # a name holds 255 bytes


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print sixty flags before the sentence
        sys.stderr.write(f"error: {message}; see  python train.py --help\n")
        sys.exit(2)


def parse(argv, stages, cuda: bool) -> tuple[str, str, str, Settings]:
    """Stage, preset, the reason for the preset, and the settings."""
    parser = Parser(usage="python train.py [--stage STAGE] [--preset PRESET] [any setting below]",
                    description=f"Stages: {', '.join(stages)}. A stage first builds what it needs.",
                    allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28))
    parser.add_argument("--stage", choices=stages, default="dpo", metavar="STAGE",
                        help="one of the above; default: dpo")
    parser.add_argument("--preset", choices=PRESETS, help="default: imdb with CUDA, else toy")
    titles = {group: parser.add_argument_group(title) for group, title in GROUPS.items()}
    for f in fields(Settings):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata["choices"],
            metavar=None if f.metadata["choices"] else f.type.__name__.upper())
        default = f"(toy {f.default!r})" if f.default != "" else ""
        titles[f.metadata["group"]].add_argument(
            "--" + f.name.replace("_", "-"), default=None, dest=f.name,
            help=f"{f.metadata['help']} {default}".replace("%", "%%"), **kind)
    args = parser.parse_args(argv)
    name = args.preset or ("imdb" if cuda and args.device != "cpu" else "toy")
    reason = "--preset" if args.preset else "CUDA is here" if name == "imdb" else \
        "on a CPU; with CUDA it would be imdb"
    given = {f.name: getattr(args, f.name) for f in fields(Settings)
             if getattr(args, f.name) is not None}
    settings = replace(PRESETS[name], **given)
    check(settings)
    return args.stage, name, reason, settings


def check(s: Settings) -> None:
    """Raises UserError for a value out of range."""
    for f in fields(s):
        value = getattr(s, f.name)
        if f.type in (int, float) and not value >= f.metadata["low"]:
            raise UserError(f"--{f.name.replace('_', '-')} is {value}; it must be at least "
                            f"{f.metadata['low']}")
    if not 0 < s.beta < float("inf"):
        raise UserError(f"--beta is {s.beta}; it must be positive")
    if not s.dropout < 1:
        raise UserError(f"--dropout is {s.dropout}; it must be in [0, 1)")
    if s.n_embd % s.n_head:
        raise UserError(f"--n-embd {s.n_embd} does not divide by --n-head {s.n_head}")
    if s.vocab != "gpt2" and not (s.vocab.isdigit() and 257 <= int(s.vocab) <= 65_536):
        raise UserError(f"--vocab is {s.vocab!r}; give gpt2 or a size from 257 to 65536")
    if s.corpus == "imdb" and s.reward == "auto" and s.reward_ctx < s.max_new + 9:
        raise UserError(f"--reward-ctx {s.reward_ctx} cannot hold a prompt of 9 tokens and a "
                        f"completion of {s.max_new}: give at least {s.max_new + 9}")
    if s.loss == "plackett-luce" and s.weight != "sigmoid":
        raise UserError(f"--weight {s.weight} weighs pairs, and --loss plackett-luce ranks: give "
                        "one of the two")
    if s.labels != "hard" and (s.loss != "pairwise" or s.weight != "sigmoid"):
        raise UserError(f"--labels {s.labels} are Eq. 7's: leave --loss, --weight and other stages "
                        "than dpo out")
    if s.reference and not s.groups:
        raise UserError("--reference is the π_ref of a preference file: give --groups FILE with it")
