"""Every mistake of a user that we know: one sentence says what is wrong and what to do.

A row of MISTAKES is a command, some words of the sentence, and what was done before. Each row has a
folder of its own, where the smallest chain (sft, groups, dpo at TINY) stands finished under out/
and its corpus under data/. The exit code is 2, stderr has one line, and nothing was lost.

To add a row, add a line: `at_once` for what is refused before anything is made, `at_work` for what
a stage finds out, which may leave the marks of a run that has nothing to lose yet.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import resource
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import TINY, command, folder, refused
from test_plot_frontier import frontier_point
from test_reward import save_roberta

import dpo
import gpt
import plot_frontier
from experiments import figures
from gpt import GPT, GPTConfig
from support import hf_gpt2
from support.runs import main_exit

PROGRAMS = {"gpt.py": gpt.main, "plot_frontier.py": plot_frontier.main,
            "experiments.figures": figures.main}
FINAL = dict(sft="model.pt", groups="ref_logps.pt", dpo="model.pt")  # each stage's last file
BEGUN = {".lock", "config.json", "metrics.jsonl"}  # of a run without a checkpoint


class Mistake(NamedTuple):
    command: str  # after `python train.py` and TINY's settings, or a whole one of PROGRAMS
    words: tuple[str, ...]
    given: tuple[Callable, ...]  # steps before it, each called with the Place
    leaves: set[str]  # names of files that may be new


def at_once(command: str, *words: str, given=()) -> Mistake:
    return Mistake(command, words, given if isinstance(given, tuple) else (given,), set())


def at_work(command: str, *words: str, given=()) -> Mistake:
    return at_once(command, *words, given=given)._replace(leaves=BEGUN)


def preferences(lines, *words: str) -> Mistake:
    """--groups with these lines: texts as they are, others in JSON."""
    return at_work("--stage chosen --groups my.jsonl", *words, given=write("my.jsonl", lines))


# ------------------------------------------------------------------------------ what a user does


class Place:
    """A user's folder. `patch` and `after` are undone when the row is done."""

    def __init__(self, out: Path, patch: pytest.MonkeyPatch, after: contextlib.ExitStack):
        self.stages = {stage: folder(out, stage) for stage in FINAL}
        self.patch, self.after = patch, after

    def __call__(self, name: str) -> Path:
        """The path of "sft/model.pt", say, where sft's folder has a longer name."""
        stage, _, rest = name.partition("/")
        return self.stages[stage] / rest if stage in self.stages else Path(name)

    def run(self, text: str) -> SimpleNamespace:
        argv = shlex.split(re.sub(r"{(\w+)}", lambda match: str(self(match[1])), text))
        if not argv or argv[0] not in PROGRAMS:
            return command(*TINY, "--out", "out", "--data", "data", *argv)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main_exit(lambda: PROGRAMS[argv[0]](argv[1:]))
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def ran(text: str):
    def step(here):
        assert here.run(text).code == 0, "it should be right"
    return step


def write(name: str, content):
    """A text, bytes, or a list of lines, those that are no texts in JSON."""
    def step(here):
        text = content if isinstance(content, (str, bytes)) else "".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content)
        here(name).parent.mkdir(parents=True, exist_ok=True)
        here(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return step


def change(name: str, edit):
    """edit(bytes) -> bytes, or a number: how many of the bytes are left."""
    def step(here):
        old = here(name).read_bytes()
        here(name).write_bytes(old[:edit] if isinstance(edit, int) else edit(old))
    return step


def remove(*names: str):
    def step(here):
        for path in map(here, names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return step


def mine(code: str):
    return write("mine.py", code)


def save(name: str, obj):
    return lambda here: torch.save(obj, here(name))


def copy(name: str, target: str):
    return lambda here: shutil.copy(here(name), here(target))


def variable(name: str, value: str):
    return lambda here: here.patch.setenv(name, value)


def model(name: str, vocab: int = 0, n_ctx: int = 48):
    """A GPT of another shape, as a run's model.pt or as a Hugging Face folder."""
    def step(here):
        size = vocab or GPT.load(here("sft/model.pt")).config.vocab_size
        made = GPT(GPTConfig(size, n_ctx, 1, 2, 16))
        if name.endswith(".pt"):
            here(name).parent.mkdir(exist_ok=True)
            torch.save(made.checkpoint(), here(name))
        else:
            hf_gpt2.save(made, here(name))
    return step


def locked(name: str):
    def step(here):
        file = here.after.enter_context(open(here(name + "/.lock"), "w"))
        fcntl.flock(file, fcntl.LOCK_EX)
    return step


def no_permission(here):
    """out/toy may be read and not written; root, whom permissions do not bind, becomes nobody."""
    for path in (Path(), *Path().rglob("*")):
        path.chmod(0o755)
    Path("out/toy").chmod(0o555)
    here.after.callback(Path("out/toy").chmod, 0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
        here.after.callback(os.seteuid, 0)
        if not os.access(__file__, os.R_OK, effective_ids=True):
            pytest.skip("nobody may not read this checkout")


def full_disk(here):
    """The kernel's own refusal: no file may grow past 20 kB, and a checkpoint has more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    here.after.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)


def archive(*members: str):
    def step(here):
        with tarfile.open("few.tar.gz", "w:gz") as file:
            for member in members:
                file.addfile(tarfile.TarInfo(f"aclImdb/{member}"))
    return step


def no_network(here):
    """As on a machine without one: no corpus, no checkpoint, no tokenizer can be downloaded."""
    here.patch.delenv("IMDB_PATH", raising=False)
    here.patch.setattr("data_imdb.URL", "file:///nowhere/aclImdb_v1.tar.gz")
    here.patch.setattr(hf_gpt2, "GPT2_URL", "file:///nowhere/{name}/{file}")
    here.patch.setattr("tiktoken.registry.ENCODINGS", {})  # tiktoken's own cache
    here.patch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    here.patch.setenv("https_proxy", "http://127.0.0.1:9")


def judge(**kwargs):
    """The folder of a tiny judge for --siebert-path."""
    def step(here):
        Path("judge").mkdir()
        save_roberta(Path("judge"), **kwargs)
    return step


PAIR = {"prompt": "this film", "chosen": " is good", "rejected": " is bad"}
OURS = {"prompt": "film", "completions": [" a", " b", " c"], "rewards": [0.9, 0.1, 0.5],
        "prompt_ids": [5, 6], "completion_ids": [[7], [8, 9], [10]]}
PAIRS = write("my.jsonl", [PAIR])
OTHER = "--num-completions 3"  # groups that must be made, so that sft's model is loaded
REFERENCE, INIT = "--groups my.jsonl --reference hf", "--stage sft --init hf"
JUDGE = f"{OTHER} --reward siebert --siebert-path judge"
WEIGHT, MODULE = "--weight mine.py:mine", "--dpo-module mine.py"
DPO_LOSS = "pi_logps, ref_logps, yw_idxs, yl_idxs, beta"
IMDB, ARCHIVE = "--corpus imdb --stage sft", variable("IMDB_PATH", "few.tar.gz")

MISTAKES = {
    # ---- flags
    "an unknown stage": at_once("--stage dop", "dop", "sft"),
    "an unknown preset": at_once("--preset gpt3", "gpt3", "gpt2-large"),
    "an unknown flag": at_once("--dpo-rate 1", "--dpo-rate"),
    "a flag cut short": at_once("--sft-step 10", "--sft-step"),
    "a stray word": at_once("dpo", "dpo"),
    "no value": at_once("--beta", "--beta"),
    "a word for a number": at_once("--sft-steps many", "--sft-steps", "many"),
    "a fraction for a count": at_once("--sft-steps 1.5", "--sft-steps"),
    "an unknown choice": at_once("--loss ranking", "plackett-luce"),
    "no steps": at_once("--sft-steps 0", "--sft-steps is 0", "at least 1"),
    "an empty batch": at_once("--dpo-batch 0", "--dpo-batch is 0"),
    "a negative rate": at_once("--dpo-lr -1", "--dpo-lr is -1"),
    "a rate that is no number": at_once("--dpo-lr nan", "--dpo-lr is nan"),
    "beta zero": at_once("--beta 0", "--beta is 0", "positive"),
    "beta below zero": at_once("--beta -0.1", "--beta is -0.1"),
    "beta infinite": at_once("--beta inf", "--beta is inf"),
    "beta that is no number": at_once("--beta nan", "--beta is nan"),
    "all dropped out": at_once("--dropout 1", "--dropout is 1", "[0, 1)"),
    "heads that do not divide": at_once("--n-head 3", "--n-head 3", "--n-embd"),
    "a vocabulary without all bytes": at_once("--vocab 100", "--vocab is '100'", "257"),
    "a vocabulary past uint16": at_once("--vocab 70000", "--vocab is '70000'"),
    "a vocabulary by another name": at_once("--vocab llama", "--vocab is 'llama'", "gpt2"),
    "one completion": at_once("--num-completions 1", "--num-completions is 1", "at least 2"),
    "too few reviews": at_once("--reviews 10", "10 reviews", "20 or more"),
    "a judge that reads too little": at_once(
        "--corpus imdb --reward-ctx 32", "--reward-ctx 32", "at least 33"),
    "pairs' weight for rankings": at_once("--loss plackett-luce --weight ipo", "--weight ipo"),
    "soft labels for rankings": at_once("--loss plackett-luce --labels soft", "--labels soft"),
    "drawn labels for C.3": at_once("--stage unlikelihood --labels sampled", "--labels sampled"),
    "a reference for nothing": at_once("--reference out/x", "--reference", "--groups"),
    "an unknown weight": at_once("--weight quadratic", "quadratic", "hinge"),
    "no CUDA": at_once("--device cuda", "--device cuda", "CUDA build", given=lambda here:
                       here.patch.setattr(torch.cuda, "is_available", lambda: False)),
    "a batch of more than there is": at_work("--sft-batch 9999", "--sft-batch", "--reviews"),
    "a rate that diverges": at_work("--sft-lr 1e30", "not finite at step 1", "--sft-lr"),

    # ---- stages that do not apply
    "r* of the toy is exact": at_once("--stage reward", "exact", "--stage dpo"),
    "chosen without pairs": at_once("--stage chosen", "--groups FILE"),
    **{f"{stage} without r*": at_once(f"--stage {stage} --groups my.jsonl", "needs r*", "--groups",
                                      given=PAIRS)
       for stage in ("ppo-gt", "best-of-n", "frontier")},
    **{f"{stage} in fp16": at_once(f"--stage {stage} --precision fp16", "fp16", "--precision bf16")
       for stage in ("ppo", "ppo-gt", "frontier")},
    "a student's dpo.py in a frontier": at_once(
        f"--stage frontier {MODULE}", "--dpo-module", "--stage dpo",
        given=mine(f"def dpo_loss({DPO_LOSS}): pass")),

    # ---- preference files
    "a file that is not there": at_once("--groups nowhere.jsonl", "cannot read nowhere.jsonl",
                                        given=remove("sft")),  # missed before sft is made
    "an empty file": preferences([], "my.jsonl has no group to learn from"),
    "malformed JSON": preferences([PAIR, "", '{"prompt": "this'], "my.jsonl, line 3: ", "JSON"),
    "another encoding": preferences('{"prompt": "é"}'.encode("latin-1"), "line 1", "JSON in UTF-8"),
    "JSON too deep to read": preferences(["[" * 100_000], "line 1", "JSON"),
    "not an object": preferences(["[1, 2]"], "line 1", "an object"),
    "other keys": preferences([PAIR, {"question": "x", "answer": "y"}], "line 2", "keys"),
    "half a pair": preferences([PAIR, {"prompt": "x", "chosen": "y"}], "line 2", "keys"),
    "a prompt that is no text": preferences([PAIR | {"prompt": 3}], "line 1", "a prompt, a text"),
    "no prompt": preferences([{"completions": ["a", "b"]}], "line 1", "a prompt, a text"),
    "chat messages": preferences([PAIR | {"chosen": [{"role": "user"}]}], "line 1", "texts"),
    "completions in one text": preferences([OURS | {"completions": "abc"}], "line 1", "a list"),
    "a completion alone": preferences([{"prompt": "x", "completions": ["a"]}], "two or more"),
    "an empty completion": preferences([PAIR, PAIR | {"rejected": " \n"}], "line 2", "empty"),
    "a dialogue without a mark": preferences([{"chosen": "a", "rejected": "b"}], "Assistant:"),
    "another K": preferences([OURS, PAIR], "line 2", "as many completions as before"),
    "rewards in some lines": preferences([OURS, OURS | {"rewards": None}], "line 2", "rewards"),
    "too few rewards": preferences([OURS | {"rewards": [1, 0]}], "3 rewards"),
    "one reward for all": preferences([OURS | {"rewards": 0.5}], "3 rewards"),
    "rewards in quotes": preferences([OURS | {"rewards": ["1", "2", "3"]}], "3 rewards"),
    **{f"a reward of {name}": preferences([json.dumps(OURS).replace("0.9", x)], "finite")
       for name, x in (("NaN", "NaN"), ("infinity", "1e999"), ("more than float32", "1e39"),
                       ("four hundred digits", "9" * 400))},
    "no prompt ids": preferences([OURS | {"prompt_ids": None}], "prompt_ids"),
    "empty prompt ids": preferences([OURS | {"prompt_ids": []}], "empty"),
    "empty completion ids": preferences([OURS | {"completion_ids": [[7], [], [8]]}], "empty"),
    "too few completion ids": preferences([OURS | {"completion_ids": [[7]]}], "completion_ids"),
    "ids as text": preferences([OURS | {"completion_ids": "ids"}], "completion_ids"),
    "ids that are no integers": preferences([OURS | {"prompt_ids": [5, 6.0]}], "integers"),
    "ids that are booleans": preferences([OURS | {"prompt_ids": [5, True]}], "integers"),
    "an id past the vocabulary": preferences([OURS | {"prompt_ids": [9999]}], "ids from 0", "9999"),
    "a negative id": preferences([OURS | {"prompt_ids": [-1]}], "got ids from -1"),
    "equal rewards": preferences([OURS | {"rewards": [1, 1, 1]}] * 3, "no group", "rewards': 3"),
    "completions too long": preferences([PAIR | {"chosen": "long " * 99}], "longer than 48 tokens"),
    "prompts too long": preferences([PAIR | {"prompt": "long " * 99}], "longer than 48 tokens"),
    "nothing to rank": at_work(
        f"{REFERENCE} --loss plackett-luce", "nothing to rank", "--loss plackett-luce out", given=(
            write("my.jsonl", [OURS | dict(rewards=[1, 1, 0], prompt_ids=[i]) for i in (5, 6, 7)]),
            model("hf"), ran(f"{REFERENCE} --stage groups"))),
    "two prompts": preferences([PAIR, PAIR | {"prompt": "x"}, PAIR], "2 distinct prompts", "three"),

    # ---- checkpoints and Hugging Face folders
    "a reference of another vocabulary": at_work(
        REFERENCE, "hf has 300 tokens", "--vocab", given=(PAIRS, model("hf", vocab=300))),
    "a reference of a shorter context": at_work(
        REFERENCE, "hf has a context of 32", "--n-ctx 32", given=(PAIRS, model("hf", n_ctx=32))),
    "a reference of another tokenizer": at_work(
        REFERENCE, "hf was trained with another tokenizer", "--vocab", given=(
            PAIRS, model("hf"), model("hf/model.pt"), copy("sft/bpe.tiktoken", "hf"),
            change("hf/bpe.tiktoken", lambda old: old.replace(b"IQ==", b"?").replace(
                b"Ig==", b"IQ==").replace(b"?", b"Ig==")))),  # ! and " have changed places
    "a reference cut short": at_work(REFERENCE, "safetensors is truncated", given=(
        PAIRS, model("hf"), change("hf/model.safetensors", 3000))),
    "a reference that is nowhere": at_once(REFERENCE, "--reference hf is no run", given=PAIRS),
    "a start of another vocabulary": at_work(
        INIT, "hf has 300 tokens", "--vocab", given=model("hf", vocab=300)),
    "a start that changed": at_once(INIT, "hf has changed since", "delete", "restore hf", given=(
        model("hf"), ran(INIT), model("hf"))),
    "a start that is nowhere": at_work(INIT, "hf has no config.json of a GPT-2", "gpt2-medium"),
    "GPT-2 without network": at_work("--stage sft --init gpt2", "could not download",
                                     "into data/gpt2", given=no_network),
    "a model of another vocabulary": at_work(OTHER, "model.pt has 300 tokens", "--vocab",
                                             given=model("sft/model.pt", vocab=300)),
    "a model of a shorter context": at_work(OTHER, "model.pt has a context of 32", "--n-ctx 32",
                                            given=model("sft/model.pt", n_ctx=32)),
    "a model cut short": at_work(OTHER, "model.pt is truncated", "delete it",
                                 given=change("sft/model.pt", 5000)),
    "an empty model": at_work(OTHER, "model.pt is truncated", given=change("sft/model.pt", 0)),
    "no model of ours": at_work(OTHER, "model.pt holds no GPT", "delete",
                                given=save("sft/model.pt", {"model": {}})),

    # ---- judges
    "no transformers": at_work(JUDGE, "pip install transformers", given=lambda here:
                               here.patch.setitem(sys.modules, "transformers", None)),
    "a judge that is nowhere": at_work(JUDGE, "could not load judge", "--siebert-path",
                                       given=(judge(), remove("judge"))),
    **{f"a judge without its {name}": at_work(JUDGE, "could not load judge", "--siebert-path",
                                              given=(judge(), remove(f"judge/{name}")))
       for name in ("model.safetensors", "config.json", "vocab.json")},
    **{f"a judge whose {name} is cut short": at_work(JUDGE, "could not load judge", given=(
        judge(), change(f"judge/{name}", 20)))
       for name in ("model.safetensors", "config.json", "vocab.json")},
    "a judge with other labels": at_work(JUDGE, "['BAD', 'GOOD']", "one must be POSITIVE",
                                         given=judge(labels=("bad", "good"))),

    # ---- a student's own code
    "a weight that is not there": at_once("--weight nowhere.py:f", "cannot import nowhere.py"),
    "a module that is not there": at_once("--dpo-module nowhere.py", "cannot import nowhere.py"),
    "a weight that is no Python": at_once(WEIGHT, "cannot import mine.py", "SyntaxError",
                                          given=mine("def mine(")),
    "a weight by another name": at_once(WEIGHT, "defines no function 'mine'",
                                        given=mine("def other(margin, beta): pass")),
    "a weight that is no function": at_once(WEIGHT, "no function 'mine'", given=mine("mine = 3")),
    "a weight without beta": at_once(WEIGHT, "mine.py:1 (mine) must take (margin, beta)",
                                     given=mine("def mine(margin): pass")),
    "a weight of another shape": at_work(WEIGHT, "mine.py:1 (mine)", "shape", "got float",
                                         given=mine("def mine(margin, beta): return 1.0")),
    "a weight that is not finite": at_work(WEIGHT, "mine.py:1 (mine)", "finite", "got nan",
                                           given=mine("def mine(margin, beta): return margin / 0")),
    "a weight that fills the GPU": at_work(
        WEIGHT, "does not fit the GPU", "--dpo-accum", given=mine(
            "import torch\ndef mine(margin, beta): raise torch.OutOfMemoryError('CUDA')")),
    "a weight that changed": at_once(WEIGHT, "mine.py has changed since", "delete", given=(
        mine("def mine(margin, beta): return 0 * margin + 0.5"), ran(WEIGHT),
        mine("def mine(margin, beta): return 0 * margin + 0.25"))),
    "a module without beta": at_once(MODULE, "mine.py:1", "dpo_loss must take",
                                     given=mine(f"def dpo_loss({DPO_LOSS[:-6]}): pass")),
    "a module of nothing that is used": at_once(MODULE, "mine.py defines no function of dpo.py",
                                                given=mine("def no_such_name(): pass")),
    "a module that forgets π_ref": at_work(
        MODULE, "the first loss is", "log 2 = 0.6931", given=mine(
            f"from dpo import dpo_loss as true\ndef dpo_loss({DPO_LOSS}):\n"
            "    return true(pi_logps, 0 * ref_logps, yw_idxs, yl_idxs, beta)")),

    # ---- corpora and archives
    "no network": at_once(IMDB, "cannot download", "aclImdb_v1", "IMDB_PATH", given=no_network),
    "no corpus at IMDB_PATH": at_once(IMDB, "IMDB_PATH is nowhere", "no reviews",
                                      given=variable("IMDB_PATH", "nowhere")),
    "a folder without reviews": at_once(IMDB, "IMDB_PATH is data", "no reviews",
                                        given=variable("IMDB_PATH", "data")),
    "a corpus that is no archive": at_once(IMDB, "few.tar.gz cannot be read as an archive",
                                           given=(write("few.tar.gz", "a poem\n"), ARCHIVE)),
    "an archive cut short": at_once(IMDB, "few.tar.gz cannot be read as an archive", given=(
        archive("README"), change("few.tar.gz", 60), ARCHIVE)),
    "an incomplete archive": at_once(IMDB, "has 0 reviews named test/pos", "wanted 12,500",
                                     given=(archive("train/pos/0_9.txt"), ARCHIVE)),
    "GPT-2's tokenizer without network": at_once("--stage sft --vocab gpt2", "TIKTOKEN_CACHE_DIR",
                                                 given=no_network),

    # ---- the folders of runs
    "a parent that changed": at_once("", "sft has changed since", "delete", "restore sft",
                                     given=copy("dpo/model.pt", "sft/model.pt")),
    "a folder of other settings": at_once(
        "", "sft_lr = 0.5", "sft_lr = 0.006", "--out", given=change(
            "sft/config.json", lambda old: old.replace(b'"sft_lr": 0.006', b'"sft_lr": 0.5'))),
    "a damaged config.json": at_once("", "config.json is damaged", "restore it",
                                     given=write("dpo/config.json", "{")),
    "a folder without config.json": at_once("", "holds model.pt but no config.json", "--out",
                                            given=remove("sft/config.json")),
    **{f"another process at work in {stage}": at_once(
        f"--stage {stage}", "in use by another process", given=(
            remove(f"{stage}/{final}"), locked(stage)))
       for stage, final in FINAL.items()},
    **{f"the checkpoint of another stage in {stage}": at_work(
        f"--stage {stage}", "resume.pt is a checkpoint of another configuration", "delete", given=(
            remove(f"{stage}/{final}"), save(f"{stage}/resume.pt", dict(step=9, other=2))))
       for stage, final in FINAL.items()},
    "a checkpoint cut short": at_once("", "resume.pt is truncated", "delete it", given=(
        remove("dpo/model.pt"), copy("sft/model.pt", "dpo/resume.pt"),
        change("dpo/resume.pt", 5000))),
    "no checkpoint of a run": at_once("", "resume.pt is no checkpoint", "delete it", given=(
        remove("dpo/model.pt"), save("dpo/resume.pt", [1, 2]))),
    "reference.json is gone": at_work("", "cannot read", "reference.json", "delete",
                                      given=remove("groups/reference.json", "dpo")),
    "result.json is gone": at_once("", "cannot read", "result.json", "run the stage again",
                                   given=remove("dpo/result.json")),
    "results in a file's place": at_once("--out file", "cannot write file/toy",
                                         given=write("file", "in the way")),
    "a corpus in a file's place": at_once("--data file", "cannot write file",
                                          given=write("file", "in the way")),
    "no permission": at_once("--beta 2", "cannot write out/toy", "Permission denied",
                             given=no_permission),
    "a full disk": at_work("--stage sft --sft-steps 3 --save-secs 0", "cannot write", "resume.pt",
                           "free some space", given=full_disk),

    # ---- python gpt.py
    "no checkpoint to sample from": at_once("gpt.py --checkpoint nowhere", "nowhere", "train.py"),
    "a prompt past the context": at_once(f"gpt.py --checkpoint {{sft}} --prompt '{'film ' * 60}'",
                                         "the model's context is 48", "shorten it"),
    **{f"gpt.py {flag}": at_once(f"gpt.py --checkpoint {{sft}} {flag}", flag.split()[0])
       for flag in ("-n 0", "--max-new-tokens 0", "--top-p 0", "--temperature -1",
                    "--temperature nan")},
    "a tokenizer of another model": at_once("gpt.py --checkpoint {sft}", "300 tokens", "bpe.tiktok",
                                            given=model("sft/model.pt", vocab=300)),

    # ---- python plot_frontier.py
    "no frontier": at_once("plot_frontier.py nowhere", "there is no nowhere", "--stage frontier"),
    "an empty frontier": at_once("plot_frontier.py f", "holds no point", "--stage frontier",
                                 given=write("f/frontier.jsonl", [])),
    "a frontier without π_ref": at_once("plot_frontier.py f", "no point of sft", given=write(
        "f/frontier.jsonl", [frontier_point("dpo", "beta=1", 1.0, 0.7)])),
    "a frontier in which no line is a point": at_once(
        "plot_frontier.py f", "holds no point", "delete it", given=write(
            "f/frontier.jsonl", ["{", "3"])),
    "curves of no dpo run": at_once("plot_frontier.py {sft}", "holds no run of dpo"),
    "curves of an empty run": at_once("plot_frontier.py f", "holds no run of dpo",
                                      given=write("f/metrics.jsonl", "")),
    "curves without their groups": at_once("plot_frontier.py {dpo} --groups nowhere", "cannot read",
                                           "nowhere/reference.json"),
    "a picture that cannot be written": at_once(
        "plot_frontier.py f", "cannot write f/frontier.png", given=(
            write("f/frontier.jsonl", [frontier_point("sft")]),
            lambda here: Path("f/frontier.png").mkdir())),

    # ---- python -m experiments.figures
    "figures without π_ref": at_once("experiments.figures f", "no point of sft", given=write(
        "f/frontier.jsonl", [frontier_point("dpo", "beta=1", 1.0, 0.7)])),
    "a table that cannot be written": at_once(
        "experiments.figures f", "cannot write f/table.md", given=(
            write("f/frontier.jsonl", [frontier_point("sft")]),
            lambda here: Path("f/table.md").mkdir())),
}


@pytest.fixture
def here(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chain.out, "out")
    shutil.copytree(chain.data, "data")
    functions = dict(vars(dpo))  # --dpo-module replaces some
    with contextlib.ExitStack() as after:
        yield Place(Path("out"), monkeypatch, after)
    vars(dpo).update(functions)


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, here):
    mistake = MISTAKES[name]
    for step in mistake.given:
        step(here)
    before = contents()
    refused(here.run(mistake.command), *mistake.words)
    after = contents()
    assert [p for p in before if after.get(p) != before[p]] == [], "lost or changed"
    new = {path.name for path in after.keys() - before.keys()}
    assert new <= mistake.leaves, "files that may hinder the corrected command"
