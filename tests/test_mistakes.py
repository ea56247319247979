"""Every mistake of a user that we know: one sentence says what is wrong and what to do.

A row of MISTAKES is a command, some words of the sentence, and the steps before the command. Each
row runs in its own folder. There the smallest chain (sft, groups, dpo at TINY) is finished under
out/, and its corpus is under data/. The exit code must be 2, stderr must have one line, and no file
may be lost.

To add a row, add a line with `at_once` if the mistake is refused before any file is made, or with
`at_work` if a stage finds it: it may then leave the files of a run without a checkpoint.
"""

import contextlib
import fcntl
import gzip
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
from data_imdb import EOT
from experiments import figures
from gpt import GPT, GPTConfig
from support import hf_gpt2
from support.runs import lock, main_exit

PROGRAMS = {"gpt.py": gpt.main, "plot_frontier.py": plot_frontier.main,
            "experiments.figures": figures.main}
FINAL = dict(sft="model.pt", groups="ref_logps.pt", dpo="model.pt")  # each stage's last file
BEGUN = {".lock", "config.json", "metrics.jsonl", "best.pt"}  # of a run without a checkpoint


class Mistake(NamedTuple):
    command: str | list[str]  # after `python train.py` and TINY's settings, or one of PROGRAMS
    words: tuple[str, ...]
    given: tuple[Callable, ...]  # steps before the command, each called with the Place
    leaves: set[str]  # names of files that the command may make


def at_once(command: str | list[str], *words: str, given=()) -> Mistake:
    return Mistake(command, words, given if isinstance(given, tuple) else (given,), set())


def at_work(command: str | list[str], *words: str, given=()) -> Mistake:
    return at_once(command, *words, given=given)._replace(leaves=BEGUN)


def preferences(lines, *words: str) -> Mistake:
    """--groups with these lines: a str is written as it is, another object as JSON."""
    return at_once("--stage chosen --groups my.jsonl", *words, given=write("my.jsonl", lines))


# ------------------------------------------------------------------------------ what a user does


class Place:
    """A user's folder. `patch` and `after` undo their changes at the end of the row."""

    def __init__(self, out: Path, patch: pytest.MonkeyPatch, after: contextlib.ExitStack):
        self.stages = {stage: folder(out, stage) for stage in FINAL}
        self.patch, self.after = patch, after

    def __call__(self, name: str) -> Path:
        """The path for a name such as "sft/model.pt": the folder of sft has a longer name."""
        stage, _, rest = name.partition("/")
        return self.stages[stage] / rest if stage in self.stages else Path(name)

    def run(self, words: str | list[str]) -> SimpleNamespace:
        argv = [re.sub(r"{(\w+)}", lambda match: str(self(match[1])), word)
                for word in (shlex.split(words) if isinstance(words, str) else words)]
        if not argv or argv[0] not in PROGRAMS:
            return command(*TINY, "--out", "out", "--data", "data", *argv)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main_exit(lambda: PROGRAMS[argv[0]](argv[1:]))
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def ran(text: str):
    def step(here):
        assert here.run(text).code == 0, "this command must work"
    return step


def write(name: str, content):
    """Writes a text, bytes, or a list of lines: a str as it is, another object as JSON."""
    def step(here):
        text = content if isinstance(content, (str, bytes)) else "".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content)
        here(name).parent.mkdir(parents=True, exist_ok=True)
        here(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return step


def change(name: str, edit):
    """Changes a file by edit(bytes) -> bytes, or to its first `edit` bytes."""
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
    """Writes a GPT of this shape, as a run's model.pt or as a Hugging Face folder."""
    def step(here):
        size = vocab or GPT.load(here("sft/model.pt")).config.vocab_size
        made = GPT(GPTConfig(size, n_ctx, 1, 2, 16))
        if name.endswith(".pt"):
            here(name).parent.mkdir(exist_ok=True)
            torch.save(made.checkpoint(), here(name))
        else:
            hf_gpt2.save(made, here(name))
    return step


def checkpoint(edit):
    """Makes hf/ from the SFT run, with edit(its model.pt as a dict)."""
    def step(here):
        Path("hf").mkdir()
        shutil.copy(here("sft/bpe.tiktoken"), "hf")
        torch.save(edit(torch.load(here("sft/model.pt"))), "hf/model.pt")
    return step


def locked(name: str):
    def step(here):
        file = here.after.enter_context(open(here(name + "/.lock"), "w"))
        fcntl.flock(file, fcntl.LOCK_EX)
    return step


def sweeping(here):
    here.after.enter_context(lock(Path("out/toy"), ".runs.lock"))


def forbid(name: str, mode: int):
    """Gives the folder this mode. Root, who may read all files, becomes the user nobody."""
    def step(here):
        for path in (Path(), *Path().rglob("*")):
            path.chmod(0o755)
        Path(name).chmod(mode)
        here.after.callback(Path(name).chmod, 0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)
            here.after.callback(os.seteuid, 0)
            if not os.access(__file__, os.R_OK, effective_ids=True):
                pytest.skip("nobody may not read this checkout")
    return step


no_permission = forbid("out/toy", 0o555)  # may be read, but not written


def full_disk(here):
    """The kernel refuses: no file may grow past 20 kB, and a checkpoint is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    here.after.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)


def archive(*members: str, **header):
    """Writes few.tar.gz: members with these headers, without content."""
    def step(here):
        with tarfile.open("few.tar.gz", "w:gz") as file:
            for name in members:
                member = tarfile.TarInfo(f"aclImdb/{name}")
                for key, value in header.items():
                    setattr(member, key, value)
                file.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
    return step


def cached(name: str, edit):
    """Edits a file of the corpus's tokens as `change` does, or replaces it by a folder or pipe."""
    def step(here):
        path = next(Path("data").glob(f"toy-*/{name}"))
        if edit not in (Path.mkdir, os.mkfifo):
            return change(str(path), edit)(here)
        path.unlink()
        edit(path)
    return step


def no_network(here):
    """Makes downloads fail: of the corpus, a checkpoint and a tokenizer."""
    here.patch.delenv("IMDB_PATH", raising=False)
    here.patch.setattr("support.imdb_archive.URL", "file:///nowhere/aclImdb_v1.tar.gz")
    here.patch.setattr(hf_gpt2, "GPT2_URL", "file:///nowhere/{name}/{file}")
    here.patch.setattr("tiktoken.registry.ENCODINGS", {})  # tiktoken's own cache
    here.patch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    here.patch.setenv("https_proxy", "http://127.0.0.1:9")


def judge(**kwargs):
    """Makes the folder of a tiny model for --siebert-path."""
    def step(here):
        Path("judge").mkdir()
        save_roberta(Path("judge"), **kwargs)
    return step


PAIR = {"prompt": "this film", "chosen": " is good", "rejected": " is bad"}
OURS = {"prompt": "it", "completions": ["a", "bc", "d"], "rewards": [0.9, 0.1, 0.5],
        "prompt_ids": [*b"it"], "completion_ids": [[*b"a"], [*b"bc"], [*b"d"]]}  # id = byte
CHAT = [{"role": "user", "content": "film?"}, {"role": "assistant", "content": "good"}]
PAIRS = write("my.jsonl", [PAIR])
OTHER = "--num-completions 3"  # so groups must be made, and sft's model is loaded
REFERENCE, INIT = "--groups my.jsonl --reference hf", "--stage sft --init hf"
JUDGE = f"{OTHER} --reward siebert --siebert-path judge"
FORGOTTEN = change("sft/config.json", lambda old: old.replace(b'"files"', b'"f"'))  # an old run
WEIGHT, MODULE = "--weight mine.py:mine", "--dpo-module mine.py"
POINT = json.dumps(frontier_point("sft"))
DPO_LOSS = "pi_logps, ref_logps, yw_idxs, yl_idxs, beta"
IMDB, ARCHIVE = "--corpus imdb --stage sft", variable("IMDB_PATH", "few.tar.gz")
BUILT = "delete data/", "the same command builds it again"

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
    "no steps": at_once("--sft-steps 0", "--sft-steps is 0", "from 1 to"),
    "an empty batch": at_once("--dpo-batch 0", "--dpo-batch is 0"),
    "a negative rate": at_once("--dpo-lr -1", "--dpo-lr is -1"),
    "a rate that is no number": at_once("--dpo-lr nan", "--dpo-lr is nan"),
    "beta zero": at_once("--beta 0", "--beta is 0", "from 1e-06 to"),
    "beta below zero": at_once("--beta -0.1", "--beta is -0.1"),
    "beta infinite": at_once("--beta inf", "--beta is inf"),
    "beta that is no number": at_once("--beta nan", "--beta is nan"),
    "all dropped out": at_once("--dropout 1", "--dropout is 1", "to 0.99"),
    "heads that do not divide": at_once("--n-head 3", "--n-head 3", "--n-embd"),
    "a vocabulary without all bytes": at_once("--vocab 100", "--vocab is '100'", "257"),
    "a vocabulary past uint16": at_once("--vocab 70000", "--vocab is '70000'"),
    "a vocabulary in superscripts": at_once("--vocab ²⁵⁷", "--vocab is '²⁵⁷'", "257 to 65536"),
    "a vocabulary by another name": at_once("--vocab llama", "--vocab is 'llama'", "gpt2"),
    "one completion": at_once("--num-completions 1", "--num-completions is 1", "from 2 to"),
    "too few reviews": at_once("--reviews 10", "10 reviews", "20 or more"),
    "a judge that reads too little": at_once(
        "--corpus imdb --reward-ctx 32", "--reward-ctx 32", "at least 33"),
    **{f"{flag} {value}": at_once(f"--{flag}={value}", f"--{flag} is ", "it must be from")
       for flag, values in {
           "seed": [10**23], "threads": [10**13], "jobs": [-1, 10**9], "seeds": [10**9],
           "best-of": [10**7], "n-layer": [10**9], "label-scale": [0, "inf", "1e300"],
           "dpo-lr": ["inf"], "sft-decay": [-1, "inf"], "alpha": ["nan"], "grad-clip": [-1],
           "ppo-target": ["inf"], "save-secs": ["nan", -1], "label-noise": [0.6, "nan"]}.items()
       for value in values},
    "a model that no machine has": at_once(
        "--n-embd 16384 --n-layer 200", "parameters need", "this machine has", "smaller --n-layer"),
    **{f"--{flag} of {name}": at_once(f"--{flag} '{value}'", f"--{flag} is", "must be a name")
       for flag in ("out", "data", "siebert-path", "weight")
       for name, value in (("nothing", ""), ("a NUL byte", "a\0b"), ("no UTF-8", "\udcff"))},
    **{f"--{flag} of 5,000 characters": at_once(f"--{flag} {'x' * 5000}", words)
       for flag, words in {
           **dict.fromkeys(("out", "data", "groups", "init"), "File name too long; check the"),
           "weight": "unknown weight", "dpo-module": "cannot import"}.items()},
    "a pipe of preferences": at_once("--groups pipe", "pipe is a pipe", "never end",
                                     given=lambda here: os.mkfifo("pipe")),
    "a file for --reference": at_once("--groups my.jsonl --reference my.jsonl",
                                      "cannot read my.jsonl/config.json", "a finished run",
                                      given=PAIRS),
    "a file for --init": at_once("--init my.jsonl", "my.jsonl/config.json", "gpt2-xl", given=PAIRS),
    "pairs' weight for rankings": at_once("--loss plackett-luce --weight ipo", "--weight ipo"),
    "soft labels for rankings": at_once("--loss plackett-luce --labels soft", "--labels soft"),
    "drawn labels for C.3": at_once("--stage unlikelihood --labels sampled", "--labels sampled"),
    **{f"label noise with {flags}": at_once(f"--label-noise 0.2 {flags}", "--label-noise",
                                                   flags.split()[0])
       for flags in ("--labels soft", "--labels sampled", "--loss plackett-luce",
                     "--stage frontier")},
    "a reference for nothing": at_once("--reference out/x", "--reference", "--groups"),
    "an unknown weight": at_once("--weight quadratic", "quadratic", "hinge"),
    "no CUDA": at_once("--device cuda", "--device cuda", "CUDA build", given=lambda here:
                       here.patch.setattr(torch.cuda, "is_available", lambda: False)),
    "a batch of more than there is": at_work("--sft-batch 9999", "--sft-batch", "--reviews"),
    "a rate that diverges": at_work("--sft-lr 1e30", "is not finite at step 1", "--sft-lr"),
    **{f"a rate that diverges at the last step of {stage}": at_work(
        f"--stage {stage} {flags}", "is not finite at step", "nothing was saved before it",
        f"--{flags.split('-')[2]}-lr")
       for stage, flags in {
           "sft": "--sft-lr 1e30 --sft-steps 1", "dpo": "--dpo-lr 1e20 --dpo-steps 1",
           "preferred-ft": "--dpo-lr 1e38 --dpo-steps 1", "rm": "--rm-lr 1e30 --rm-epochs 1",
           "ppo-gt": "--ppo-lr 1e30 --ppo-steps 3"}.items()},

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

    "a judge without answers": at_once("--stage judge", "--groups FILE"),
    **{f"a judge at {url}": at_once(
        f"--stage judge --groups my.jsonl --judge {url} --judge-model m", "or the URL of",
        "OPENAI_API_KEY", given=PAIRS)
       for url in ("localhost:8000/v1", "r", "http://", "http://a..b/v1", "http://host:x/v1",
                   "ftp://host/v1", "http://me:sk-1@host/v1", "http://host/v1?key=sk-1")},
    "a judge without a model": at_once("--stage judge --groups my.jsonl --judge http://host/v1",
                                       "--judge-model NAME", given=PAIRS),
    "a judge that reads less than an answer": at_once(
        "--stage judge --groups my.jsonl --preset imdb --reward-ctx 40",
        "--reward-ctx 48", given=PAIRS),
    "a judge that nobody serves": at_once(
        "--stage judge --groups my.jsonl --judge http://127.0.0.1:9/v1 --judge-model m",
        "http://127.0.0.1:9/v1 cannot be reached", "--judge", given=write(
            "my.jsonl", [PAIR | {"prompt": x} for x in "abc"])),

    # ---- preference files
    "a file that is not there": at_once("--groups nowhere.jsonl", "cannot read nowhere.jsonl",
                                        given=remove("sft")),  # noticed before sft is made
    "a folder of preferences": at_once("--groups mine", "cannot read mine: Is a directory",
                                       given=write("mine/my.jsonl", [PAIR])),
    "an empty file": preferences([], "my.jsonl has no group to learn from"),
    "malformed JSON": preferences([PAIR, "", '{"prompt": "this'], "malformed", "line 3 (no JSON"),
    "twelve malformed lines": preferences(
        [PAIR, *["{"] * 5, "", *[PAIR | {"prompt": 3}] * 7], "line 2 (no JSON", "line 6 (no JSON",
        "line 8 (a prompt that is no text: 3)", "line 12 (", "and 2 more; wanted prompt, chosen"),
    "another encoding": preferences('{"prompt": "é"}'.encode("latin-1"), "line 1 (no JSON in"),
    "UTF-16": preferences(f"{json.dumps(PAIR)}\n".encode("utf-16") * 2, "line 1 (no JSON"),
    "JSON too deep to read": preferences(['{"prompt":' * 100_000], "line 1 (no JSON", "recursion"),
    "a number past what Python reads": preferences(['{"a": ' + "9" * 5000 + "}"], "line 1 (no J"),
    "an array too deep to read": preferences(["[" * 100_000], "my.jsonl is damaged", "Recursion"),
    "an array cut short": preferences("\n[" + json.dumps(PAIR) + ",", "my.jsonl is damaged"),
    "an array of numbers": preferences(["[1, 2]"], "item 1 (no JSON object: 1), item 2 (no"),
    "not an object": preferences([PAIR, "5", "null"], "line 2 (no JSON object: 5), line 3 (no"),
    "a gzip cut short": preferences(gzip.compress(b"[" + b" " * 999)[:-9], "my.jsonl is damaged"),
    "Parquet": preferences(b"PAR1\x15\x04PAR1", "pandas.read_parquet('my.jsonl').to_json("),
    "other keys": preferences([PAIR, {"a": "x", "b": "y"}], "line 2 (keys: ['a', 'b']); want"),
    "no keys": preferences(["{}"], "line 1 (keys: []); wanted"),
    "half a pair": preferences([PAIR, {"prompt": "x", "chosen": "y"}], "line 2 (keys: ['pr"),
    **{f"the form of {name}": preferences([row], f"line 1 ({name}); wanted") for name, row in {
        "KTO's single completions with labels": dict(prompt="x", completion="y", label=True),
        "stepwise supervision": dict(prompt="x", completions=["y", "z"], labels=[True, False]),
        "a single completion": dict(prompt="x", completion="y"),
        "a text to imitate": dict(text="x"),
        "a conversation to imitate": dict(messages=CHAT)}.items()},
    "a prompt of another name": preferences([{"question": "x", "chosen": "y", "rejected": "z"}],
                                            "no prompt, but question: rename it to prompt"),
    "a prompt that is no text": preferences([PAIR | {"prompt": 3}], "a prompt that is no text: 3"),
    "no prompt": preferences([{"completions": ["a", "b"]}], "(a prompt that is no text: None)"),
    "a prompt that is no conversation": preferences(
        [{"prompt": 3, "chosen": CHAT, "rejected": CHAT}], "a prompt that is no text and no chat"),
    "a conversation beside a text": preferences([PAIR | {"chosen": CHAT}], "completions that are "),
    "a chat that two texts go on from": preferences([PAIR | {"prompt": CHAT}], "(a prompt that"),
    **{f"a message {message}": preferences([{"chosen": [message], "rejected": CHAT}],
                                           "line 1 (a message whose role is not system, user")
       for message in ({"role": "tool", "content": "x"}, {"from": "human", "value": "x"}, "x",
                       {"role": ["user"], "content": "x"}, {"role": "user", "content": None})},
    "completions in one text": preferences([OURS | {"completions": "abc"}], "not two or more"),
    "a completion alone": preferences([{"prompt": "x", "completions": ["a"]}], "two or more"),
    "a pair with a number": preferences([PAIR | {"rejected": 5}], "completions that are no"),
    "empty completions": preferences([PAIR | {"rejected": " \n"}, PAIR | {"chosen": EOT}],
                                     "no group", "{'an empty completion': 2}"),
    "equal completions": preferences([PAIR | {"rejected": f" is good{EOT}\n"}, {
        "chosen": CHAT, "rejected": CHAT}], "no group", "{'equal completions': 2}"),
    "dialogues that share no prompt": preferences(
        [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
         {"chosen": CHAT, "rejected": CHAT[1:]}], "no group", "{'no shared prompt': 2}"),
    "a million blanks": preferences([PAIR | {key: "a" + " " * 10**6 + "b"} for key in PAIR],
                                    "no group", "longer than 500,000 characters': 3"),
    "another K": preferences([OURS, PAIR], "line 2 (2 completions, and 3 in line 1)"),
    "rewards in some lines": preferences([OURS, OURS | {"rewards": None}],
                                         "line 2 (0 rewards, and 3 in line 1)"),
    "too few rewards": preferences([OURS | {"rewards": [1, 0]}], "not 3 finite"),
    "one reward for all": preferences([OURS | {"rewards": 0.5}], "not 3 finite"),
    "rewards in quotes": preferences([OURS | {"rewards": ["1", "2", "3"]}], "not 3 finite"),
    **{f"a reward of {name}": preferences([json.dumps(OURS).replace("0.9", x)], "finite")
       for name, x in (("NaN", "NaN"), ("infinity", "1e999"), ("more than float32", "1e39"),
                       ("four hundred digits", "9" * 400))},
    "rewards that overturn a pair": preferences(
        [PAIR | {"rewards": [1, 0]}, PAIR | {"rewards": [0, 0.5]}],
        "line 2 (rewards that prefer the rejected one: [0, 0.5])"),
    "no prompt ids": preferences([OURS | {"prompt_ids": None}], "prompt_ids"),
    "no completion ids": preferences([OURS | {"completion_ids": None}], "completion_ids"),
    "empty prompt ids": preferences([OURS | {"prompt_ids": []}], "prompt_ids"),
    "empty completion ids": preferences([OURS | {"completion_ids": [[7], [], [8]]}], "completion"),
    "too few completion ids": preferences([OURS | {"completion_ids": [[7]]}], "completion_ids"),
    "ids as text": preferences([OURS | {"completion_ids": "ids"}], "completion_ids"),
    "ids that are no integers": preferences([OURS | {"prompt_ids": [5, 6.0]}], "integers"),
    "ids that are booleans": preferences([OURS | {"prompt_ids": [5, True]}], "integers"),
    "a negative id": preferences([OURS | {"prompt_ids": [-1]}], "integers from 0"),
    "an id past the vocabulary": preferences([OURS, OURS | {"prompt_ids": [9999]}],
                                             "line 2 (id 9999 of a vocabulary of", "--vocab"),
    "a text edited by hand": preferences(
        [OURS, OURS | {"completions": ["a", "be", "d"]}, OURS | {"prompt": "it "},
         OURS | {"prompt": "x" * 99 + "y", "prompt_ids": [*b"x" * 99, *b"z"]}],
        "line 2 (ids of 'bc' for the text 'be'), line 3 (ids of 'it' for the text 'it '), line 4 "
        "(ids of 'xxxxxxxxxz' for the text 'xxxxxxxxxy')", "remove prompt_ids"),
    "equal rewards": preferences([OURS | {"rewards": [1, 1, 1]}] * 3, "no group", "rewards': 3"),
    "completions too long": preferences([PAIR | {"chosen": "long " * 99}], "longer than 48 tokens"),
    "prompts too long": preferences([PAIR | {"prompt": "long " * 99}], "longer than 48 tokens"),
    "nothing to rank": at_work(
        f"{REFERENCE} --loss plackett-luce", "nothing to rank", "--loss plackett-luce out", given=(
            write("my.jsonl", [OURS | dict(rewards=[1, 1, 0], prompt=x, prompt_ids=[ord(x)])
                               for x in "abc"]), model("hf"), ran(f"{REFERENCE} --stage groups"))),
    "two prompts": preferences([PAIR, PAIR | {"prompt": "x"}, PAIR], "2 distinct prompts", "three"
                               )._replace(leaves=BEGUN),

    # ---- checkpoints and Hugging Face folders
    "a reference of another vocabulary": at_once(
        REFERENCE, "hf has 300 tokens", "--vocab", given=(PAIRS, model("hf", vocab=300))),
    "a reference of a shorter context": at_once(
        REFERENCE, "hf has a context of 32", "--n-ctx 32", given=(PAIRS, model("hf", n_ctx=32))),
    "a reference of another tokenizer": at_once(
        REFERENCE, "hf was trained with another tokenizer", "--vocab", given=(
            PAIRS, model("hf"), model("hf/model.pt"), copy("sft/bpe.tiktoken", "hf"),
            change("hf/bpe.tiktoken", lambda old: old.replace(b"IQ==", b"?").replace(
                b"Ig==", b"IQ==").replace(b"?", b"Ig==")))),  # ! and " are exchanged
    "a reference cut short": at_once(
        REFERENCE, "hf/model.safetensors is damaged", "restore it", given=(
            PAIRS, model("hf"), change("hf/model.safetensors", 3000))),
    **{f"a reference with {size} layers": at_once(
        REFERENCE, "hf/config.json is damaged", f"n_layer is {value}; wanted a whole number",
        given=(PAIRS, model("hf"), change("hf/config.json", lambda old, size=size: old.replace(
            b'"n_layer": 1', f'"n_layer": {size}'.encode()))))
       for size, value in (("1000000000", "1000000000"), ("-1", "-1"), ('"2"', "'2'"),
                           ("2.0", "2.0"), ("null", "None"), ("true", "True"), (10**15, 10**15))},
    "a reference of another activation": at_once(
        REFERENCE, "activation_function is 'gelu', wanted 'gelu_new' as in GPT-2", given=(
            PAIRS, model("hf"), change("hf/config.json", lambda old: old.replace(
                b'"gelu_new"', b'"gelu"')))),
    "a reference in eight bits": at_once(
        REFERENCE, "wte.weight has the dtype F8_E4M3, wanted one of F64, F32", given=(
            PAIRS, model("hf"), change("hf/model.safetensors", lambda old: old.replace(
                b'"pt"', b'""').replace(b'"F32", "shape": [', b'"F8_E4M3","shape":[', 1)))),
    "a reference whose tensors overlap": at_once(
        REFERENCE, "model.safetensors is damaged", "of shape [900, 16] has the bytes 0", given=(
            PAIRS, model("hf"), change("hf/model.safetensors", lambda old: re.sub(
                rb'(ln_f.bias.*?)"data_offsets": \[(\d+), (\d+)\]', lambda match: match[1]
                + b'"data_offsets": [0, 64]'.ljust(len(match[0]) - len(match[1])), old)))),
    "a reference whose shard is gone": at_once(REFERENCE, "cannot read hf/a.safetensors", given=(
        PAIRS, model("hf"), remove("hf/model.safetensors"),
        write("hf/model.safetensors.index.json", '{"weight_map": {"x": "a.safetensors"}}'))),
    "a reference with a tokenizer of another kind": at_once(
        REFERENCE, "hf/vocab.json is damaged", "a space before every text", "of GPT-2's kind",
        given=(PAIRS, model("hf"), write("hf/vocab.json", "{}"), write("hf/merges.txt", ""),
               write("hf/tokenizer_config.json", '{"add_prefix_space": true}'))),
    "a reference that is nowhere": at_once(REFERENCE, "hf/config.json", "gpt2-xl", given=PAIRS),
    "a start of another vocabulary": at_once(
        INIT, "hf has 300 tokens", "--vocab", given=model("hf", vocab=300)),
    "a start that changed": at_once(INIT, "hf/model.safetensors has changed since", "delete",
                                    given=(model("hf"), ran(INIT), model("hf"))),
    "a start that is nowhere": at_once(  # found before the reviews are made
        INIT, "cannot read hf/config.json: No such file", "gpt2-medium", given=remove("data")),
    "GPT-2 without network": at_once(
        "--stage sft --init gpt2", "cannot download file:///nowhere/gpt2/model.safetensors",
        "try again, or put model.safetensors of gpt2 into data/gpt2", given=no_network),
    "a web page kept as GPT-2": at_once(
        "--stage sft --init gpt2", "data/gpt2/model.safetensors is damaged", "delete it, and it is "
        "fetched again", given=write("data/gpt2/model.safetensors", "<!DOCTYPE html><title>Login")),
    **{f"a run's model with {name}": at_once(REFERENCE, "hf/model.pt is damaged", words, given=(
        PAIRS, checkpoint(edit))) for name, words, edit in (
            ("nothing in it", "KeyError", lambda saved: {}),
            ("a billion layers", "n_layer is 1000000000; wanted a whole number from 1 to 1,000",
             lambda saved: saved | {"config": saved["config"] | {"n_layer": 10**9}}),
            ("a weight of another shape", "ln_f.bias should have shape (16,)",
             lambda saved: saved | {"model": saved["model"] | {"ln_f.bias": torch.zeros(3)}}),
            ("a weight of NaN", "ln_f.bias holds NaN", lambda saved: saved | {
                "model": saved["model"] | {"ln_f.bias": torch.full((16,), torch.nan)}}))},
    "a model of another vocabulary": at_work(OTHER, "model.pt has 300 tokens", "--vocab", given=(
        FORGOTTEN, model("sft/model.pt", vocab=300))),
    "a model of a shorter context": at_work(OTHER, "model.pt has a context of 32", "--n-ctx 32",
                                            given=(FORGOTTEN, model("sft/model.pt", n_ctx=32))),
    "a model of an earlier version": at_work(
        OTHER, "model.pt is damaged", "it has no wte.weight", "delete that stage's folder", given=(
            FORGOTTEN, change("sft/model.pt", lambda old: old.replace(b"wte", b"wxe")))),
    **{f"a model cut to {n} bytes": at_once(
        OTHER, "model.pt has changed since the run was finished", "restore it, or delete",
        given=change("sft/model.pt", n)) for n in (5000, 0)},

    # ---- judges
    "no transformers": at_once(JUDGE, "pip install transformers", given=lambda here:
                               here.patch.setitem(sys.modules, "transformers", None)),
    "a judge that is nowhere": at_once(JUDGE, "could not load judge", "--siebert-path",
                                       given=(judge(), remove("judge"))),
    **{f"a judge without its {name}": at_once(JUDGE, "could not load judge", "--siebert-path",
                                              given=(judge(), remove(f"judge/{name}")))
       for name in ("model.safetensors", "config.json", "vocab.json")},
    **{f"a judge whose {name} is cut short": at_once(JUDGE, "could not load judge", given=(
        judge(), change(f"judge/{name}", 20)))
       for name in ("model.safetensors", "config.json", "vocab.json")},
    "a judge without its tensors": at_once(
        JUDGE, "could not load judge (25 weights are missing or not finite", "--siebert-path",
        given=(judge(), write("judge/model.safetensors", b"\2" + bytes(7) + b"{}"))),
    "a judge with other labels": at_once(JUDGE, "['BAD', 'GOOD']", "wanted one named POSITIVE",
                                         given=judge(labels=("bad", "good"))),

    # ---- a student's own code
    "a weight that is not there": at_once("--weight nowhere.py:f", "cannot import nowhere.py"),
    "a module that is not there": at_once("--dpo-module nowhere.py", "cannot import nowhere.py"),
    "a weight that is no Python": at_once(WEIGHT, "mine.py:1 raised SyntaxError",
                                          given=mine("def mine(")),
    "a weight by another name": at_once(WEIGHT, "defines no function 'mine'",
                                        given=mine("def other(margin, beta): pass")),
    "a weight that is no function": at_once(WEIGHT, "no function 'mine'", given=mine("mine = 3")),
    "a weight without beta": at_once(WEIGHT, "mine.py:1 (mine) must take (margin, beta)",
                                     given=mine("def mine(margin): pass")),
    "a weight of another shape": at_once(WEIGHT, "mine.py:1 (mine)", "shape", "got float",
                                         given=mine("def mine(margin, beta): return 1.0")),
    "a weight that is not finite": at_once(WEIGHT, "mine.py:1 (mine)", "finite", "got -inf",
                                           given=mine("def mine(margin, beta): return margin / 0")),
    "a weight that raises": at_once(WEIGHT, "mine.py:2 raised KeyError: 'x'", "correct it",
                                    given=mine("def mine(margin, beta):\n    return {}['x']")),
    "a weight that ends the program": at_once(WEIGHT, "mine.py:1 raised SystemExit: 0", given=mine(
        "def mine(margin, beta): raise SystemExit(0)")),
    "a file that ends the program": at_once(WEIGHT, "mine.py:2 raised SystemExit",
                                            given=mine("import sys\nsys.exit()")),
    "a weight that raises at work": at_work(
        WEIGHT, "mine.py:3 raised ZeroDivisionError", given=mine(
            "def mine(margin, beta):\n    if len(margin) > 3:\n        return 1 / 0\n"
            "    return 0 * margin")),
    "a weight that is not written yet": at_once(
        WEIGHT, "mine.py:2 raised NotImplementedError: exercise 06", "run the same command again",
        given=mine("def mine(margin, beta):\n    raise NotImplementedError('exercise 06')")),
    "a weight that raises after a checkpoint": at_once(
        f"{WEIGHT} --save-secs 0", "mine.py:5 raised ValueError: late",
        "after you delete out/toy/dpo-", given=mine(
            "calls = []\ndef mine(margin, beta):\n    calls.append(0)\n    if len(calls) > 8:\n"
            "        raise ValueError('late')\n    return 0 * margin")
    )._replace(leaves=BEGUN | {"resume.pt"}),
    "a weight that fills the memory": at_work(
        WEIGHT, "does not fit into the memory", "--dpo-accum", given=mine(
            "import torch\ndef mine(margin, beta):\n    if len(margin) > 3:\n"
            "        raise torch.OutOfMemoryError('CUDA')\n    return 0 * margin")),
    "a weight that changed": at_once(WEIGHT, "mine.py has changed since", "delete", given=(
        mine("def mine(margin, beta): return 0 * margin + 0.5"), ran(WEIGHT),
        mine("def mine(margin, beta): return 0 * margin + 0.25"))),
    "a module without beta": at_once(MODULE, "mine.py:1", "dpo_loss must take",
                                     given=mine(f"def dpo_loss({DPO_LOSS[:-6]}): pass")),
    "a module of nothing that is used": at_once(MODULE, "mine.py defines no function of dpo.py",
                                                given=mine("def no_such_name(): pass")),
    "a module that raises": at_once(MODULE, "mine.py:1 raised ImportError", given=mine(
        "from dpo import no_such_name")),
    "a module that raises at work": at_work(
        MODULE, "mine.py:3 raised ValueError: mine", "correct it", given=mine(
            f"def dpo_loss({DPO_LOSS}):\n    if True:\n        raise ValueError('mine')")),
    "a module that is not written yet": at_work(
        MODULE, "mine.py:2 raised NotImplementedError: exercise 03", given=mine(
            f"def dpo_loss({DPO_LOSS}):\n    raise NotImplementedError('exercise 03')")),
    "a module that ends the program": at_work(
        MODULE, "mine.py:1 raised SystemExit", given=mine(
            f"def dpo_loss({DPO_LOSS}): raise SystemExit(0)")),
    "a module that returns nothing": at_work(
        MODULE, "with the code of mine.py", "train.py", "raised TypeError", given=mine(
            f"def dpo_loss({DPO_LOSS}): pass")),
    "a module whose loss has no gradient": at_work(
        MODULE, "the losses have no gradient", "pi_logps", given=mine(
            f"import math\ndef dpo_loss({DPO_LOSS}):\n"
            "    zero = 0 * pi_logps.detach()\n    return zero[yw_idxs] + math.log(2), zero")),
    **{f"a module whose loss is {value}": at_work(
        MODULE, "is not finite at step 0", "Perhaps the mistake is in mine.py; correct", given=mine(
            f"from dpo import dpo_loss as true\ndef dpo_loss({DPO_LOSS}):\n"
            "    losses, r = true(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)\n"
            f"    return {code}, r"))
       for value, code in {"NaN": "losses / 0 - losses / 0", "of infinite slope": (
           "losses + (pi_logps - pi_logps).sqrt()[yw_idxs]")}.items()},
    "a module whose loss is NaN after a checkpoint": at_once(
        f"{MODULE} --save-secs 0", "is not finite at step 2", "the mistake is in mine.py",
        "after you delete out/toy/dpo-", given=mine(
            f"from dpo import dpo_loss as true\ncalls = []\ndef dpo_loss({DPO_LOSS}):\n"
            "    calls.append(0)\n"
            "    losses, r = true(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)\n"
            "    return losses / (len(calls) < 3), r")
    )._replace(leaves=BEGUN | {"resume.pt"}),
    "a module that forgets π_ref": at_work(
        MODULE, "the first loss is", "log 2 = 0.6931", "a mistake in mine.py", given=mine(
            f"from dpo import dpo_loss as true\ndef dpo_loss({DPO_LOSS}):\n"
            "    return true(pi_logps, 0 * ref_logps, yw_idxs, yl_idxs, beta)")),

    # ---- corpora and archives
    "no network": at_once(IMDB, "cannot download", "aclImdb_v1", "IMDB_PATH", given=no_network),
    "no corpus at IMDB_PATH": at_once(IMDB, "cannot read nowhere: No such file", "set IMDB_PATH",
                                      given=variable("IMDB_PATH", "nowhere")),
    "an IMDB_PATH that is too long": at_once(IMDB, "File name too long", "set IMDB_PATH",
                                             given=variable("IMDB_PATH", "x" * 300)),
    "a pipe at IMDB_PATH": at_once(IMDB, "few.tar.gz is a pipe or a device",
                                   given=(lambda here: os.mkfifo("few.tar.gz"), ARCHIVE)),
    "a folder without reviews": at_once(IMDB, "data has 0 reviews named test/pos", "set IMDB_PATH",
                                        given=variable("IMDB_PATH", "data")),
    "the training half of the corpus": at_once(
        IMDB, "aclImdb/train has 0 reviews named test/pos", "set IMDB_PATH", given=(
            write("aclImdb/train/pos/0_9.txt", "good"), variable("IMDB_PATH", "aclImdb/train"))),
    "no permission to read the reviews": at_once(
        IMDB, "cannot read aclImdb: Permission denied", "set IMDB_PATH", given=(
            write("aclImdb/test/pos/0_9.txt", "good"), variable("IMDB_PATH", "aclImdb"),
            forbid("aclImdb/test/pos", 0))),
    **{f"{kind} for an archive": at_once(
        IMDB, "few.tar.gz is damaged or of another kind", "set IMDB_PATH",
        given=(write("few.tar.gz", content), ARCHIVE))
       for kind, content in {
           "a poem": "a poem\n", "a web page": "<!DOCTYPE html><title>Not found</title>",
           "nothing": "", "a .zip": b"PK\5\6" + bytes(18), "a .zst": b"\x28\xb5\x2f\xfd\0\x01"}
       .items()},
    "an archive cut short": at_once(IMDB, "few.tar.gz is damaged", "set IMDB_PATH", given=(
        archive("README"), change("few.tar.gz", 60), ARCHIVE)),
    "an incomplete archive": at_once(IMDB, "has 0 reviews named test/pos", "wanted 12,500",
                                     given=(archive("train/pos/0_9.txt"), ARCHIVE)),
    "a review that is there twice": at_once(
        IMDB, "few.tar.gz has two reviews named train/pos/0_RATING.txt", "wanted one",
        given=(archive("train/pos/0_9.txt", "train/pos/0_8.txt"), ARCHIVE)),
    **{f"a review in an archive that {kind}": at_once(
        IMDB, "5_9.txt", *words, "set IMDB_PATH",
        given=(archive("test/pos/5_9.txt", **header), ARCHIVE))
       for kind, (header, words) in {
           "is a bomb": (dict(size=10**15), ["has 1,000,000,000,000,000 bytes, wanted at most"]),
           "is a link": (dict(type=tarfile.SYMTYPE, linkname="x"), ["is a folder, a link"]),
           "is a hard link": (dict(type=tarfile.LNKTYPE, linkname="x"), ["is a folder, a link"]),
           "is a folder": (dict(type=tarfile.DIRTYPE), ["is a folder"])}.items()},
    **{f"a review in a folder that {kind}": at_once(
        IMDB, "aclImdb/test/pos/5_9.txt", *words, "set IMDB_PATH",
        given=(write("aclImdb/test/pos/0_9.txt", "good"), variable("IMDB_PATH", "aclImdb"),
               lambda here, make=make: make(Path("aclImdb/test/pos/5_9.txt"))))
       for kind, (make, *words) in {
           "is a folder": (Path.mkdir, "Is a directory"), "is a pipe": (os.mkfifo, "a pipe"),
           "is a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
           "is a link to a folder": (lambda path: path.symlink_to(".."), "Is a directory"),
           "is a broken link": (lambda path: path.symlink_to("x"), "cannot read", "No such file"),
           "is an endless link": (lambda path: path.symlink_to(path.name), "cannot read"),
           "is a book": (lambda path: path.write_bytes(bytes(2**20 + 1)), "wanted at most")}
       .items()},
    "a download that was damaged later": at_once(
        IMDB, "data/aclImdb_v1.tar.gz is damaged", "delete it", "downloads it again",
        given=(no_network, write("data/aclImdb_v1.tar.gz", "<html>"))),
    **{f"a corpus's tokens: {kind}": at_once("--stage sft", "data/toy-900", "is damaged", *BUILT,
                                             given=cached(name, edit))
       for kind, (name, edit) in {
           "bpe.tiktoken cut short": ("bpe.tiktoken", 600),
           "bpe.tiktoken empty": ("bpe.tiktoken", 0),
           "train.npy cut short": ("train.npy", 600), "train.npy empty": ("train.npy", 0),
           "unsup.npy one byte short": ("unsup.npy", lambda old: old[:-1]),
           "valid.npy that is noise": ("valid.npy", lambda old: os.urandom(len(old))),
           "one token changed": ("train.npy", lambda old: old[:-4] + b"\1\1" + old[-2:]),
           "an id past the vocabulary": ("test.npy", lambda old: old[:-4] + b"\xff" * 4),
           "about.json cut short": ("about.json", 20), "about.json empty": ("about.json", 0),
           "about.json {}": ("about.json", lambda old: b"{}"),
           "about.json 5": ("about.json", lambda old: b"5"),
           "about.json deeply nested": ("about.json", lambda old: b"[" * 100_000),
           "a label of another": ("about.json", lambda old: old.replace(b"null", b"1", 1)),
           "a label too few": ("about.json", lambda old: old.replace(b"null, ", b"", 1))}.items()},
    **{f"a corpus's tokens: {kind} as {name}": at_once(
        "--stage sft", f"/{name}", *BUILT, given=(cached(name, make)))
       for name in ("train.npy", "about.json")
       for kind, make in {"a folder": Path.mkdir, "a pipe": os.mkfifo}.items()},
    "a corpus's tokens: another split's": at_once(
        "--stage sft", "is damaged", *BUILT, given=lambda here: shutil.copy(
            *(next(Path("data").glob(f"toy-*/{split}.npy")) for split in ("test", "train")))),
    "GPT-2's tokenizer without network": at_once("--stage sft --vocab gpt2", "TIKTOKEN_CACHE_DIR",
                                                 given=no_network),

    # ---- the folders of runs
    **{f"a {name} that was changed": at_once(
        "", f"{name.partition('/')[2]} has changed since the run was finished", "restore it",
        given=change(name, edit))
       for name, edit in {
           "sft/model.pt": lambda old: old[:-1], "sft/metrics.jsonl": 0,
           "sft/bpe.tiktoken": lambda old: old.replace(b"IQ==", b"Iw=="),
           "groups/ref_logps.pt": 500,
           "groups/groups.jsonl": lambda old: old.replace(b'"rewards": [0', b'"rewards": [1', 1),
           "groups/reference.json": lambda old: b"{}", "dpo/result.json": lambda old: b"[" * 10**5,
           "dpo/metrics.jsonl": lambda old: b"5\n" + old}.items()},
    **{f"a {name} that is gone": at_once("", "cannot read", name.partition("/")[2], "restore",
                                         given=remove(name))
       for name in ("groups/groups.jsonl", "groups/reference.json", "dpo/result.json")},
    "a parent that was made anew": at_once(
        "", "sft has changed since", "delete", "restore sft", given=(
            change("sft/config.json", lambda old: old.replace(b'"files"', b'"former"')),
            copy("dpo/model.pt", "sft/model.pt"))),
    "a pipe in a run's place": at_once("", "model.pt is a pipe", given=(
        remove("sft/model.pt"), lambda here: os.mkfifo(here("sft/model.pt")))),
    "a pipe for a model": at_once("gpt.py --checkpoint {sft}", "model.pt is a pipe", given=(
        remove("sft/model.pt"), lambda here: os.mkfifo(here("sft/model.pt")))),
    "a pipe for a checkpoint": at_once("", "resume.pt is a pipe", given=(
        remove("dpo/model.pt"), lambda here: os.mkfifo(here("dpo/resume.pt")))),
    "a device of preferences": at_once("--groups /dev/zero", "/dev/zero is a pipe or a device"),
    "a folder of other settings": at_once(
        "", "sft_lr = 0.5", "sft_lr = 0.006", "--out", given=change(
            "sft/config.json", lambda old: old.replace(b'"sft_lr": 0.006', b'"sft_lr": 0.5'))),
    **{f"a config.json of {content[:9]}": at_once("", "config.json is damaged", "restore it",
                                                  given=write("dpo/config.json", content))
       for content in ("{", "{}", "5", "null", "[" * 10**5)},
    "a folder without config.json": at_once("", "holds model.pt but no config.json", "--out",
                                            given=remove("sft/config.json")),
    **{f"another process at work in {stage}": at_once(
        f"--stage {stage}", "in use by another process", given=(
            remove(f"{stage}/{final}"), locked(stage)))
       for stage, final in FINAL.items()},
    "a second sweep": at_once("--stage degenerate", "in use by another process", "wait",
                              given=sweeping),
    **{f"the checkpoint of another stage in {stage}": at_work(
        f"--stage {stage}", "resume.pt is damaged or of another kind", "delete it", given=(
            remove(f"{stage}/{final}"), save(f"{stage}/resume.pt", dict(step=9, other=2))))
       for stage, final in FINAL.items()},
    **{f"{what} for a checkpoint": at_once("", "resume.pt", "delete it, and", "from step 0", given=(
        remove("dpo/model.pt"), step))
       for what, step in {
           "a torn file": lambda here: change("dpo/resume.pt", 5000)(
               copy("sft/model.pt", "dpo/resume.pt")(here) and here),
           "a list": save("dpo/resume.pt", [1, 2]), "no step": save("dpo/resume.pt", {}),
           "an empty file": write("dpo/resume.pt", ""),
           "a step in words": save("dpo/resume.pt", dict(step="nine"))}.items()},
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
                                         "the model's context is 48", "shorten the prompt"),
    "a million spaces": at_once(["gpt.py", "--checkpoint", "{sft}", "--prompt", " " * 10**6 + "x"],
                                "the model's context is 48", "shorten the prompt"),
    **{f"gpt.py {flag}": at_once(f"gpt.py --checkpoint {{sft}} {flag}", flag.split()[0], "; give ")
       for flag in ("-n 0", "-n 1000000000", "--max-new-tokens 0", "--max-new-tokens 1000000000",
                    "--top-p 0", "--top-p nan", "--top-k -5", f"--seed {10**23}", "--seed -1",
                    *(f"--temperature {t}" for t in ("-1", "nan", "inf", "1e-40")))},
    "an export into a run": at_once("gpt.py --checkpoint {sft} --export {dpo}", "is not empty"),
    "an export into a file": at_once("gpt.py --checkpoint {sft} --export file", "give another",
                                     given=write("file", "in the way")),
    "a name too long to sample from": at_once(f"gpt.py --checkpoint {'a' * 300}", "too long"),
    "a tokenizer of another model": at_once("gpt.py --checkpoint {sft}", "300 tokens", "bpe.tiktok",
                                            given=model("sft/model.pt", vocab=300)),

    # ---- python plot_frontier.py
    "no frontier": at_once("plot_frontier.py nowhere", "no file nowhere", "--stage frontier"),
    "an empty frontier": at_once("plot_frontier.py f", "holds no point", "--stage frontier",
                                 given=write("f/frontier.jsonl", [])),
    "a frontier without π_ref": at_once("plot_frontier.py f", "no point of sft", given=write(
        "f/frontier.jsonl", [frontier_point("dpo", "beta=1", 1.0, 0.7)])),
    "a frontier in which no line is a point": at_once(
        "plot_frontier.py f", "holds no point", "give another", given=write(
            "f/frontier.jsonl", ["{", "3"])),
    **{f"a frontier of {name}": at_once("plot_frontier.py f", "holds no point", given=write(
        "f/frontier.jsonl", content)) for name, content in {
            "400 digits": [POINT.replace('"kl": 0.0', f'"kl": {"9" * 400}')],
            "5,000 digits": [POINT.replace('"kl": 0.0', f'"kl": {"9" * 5000}')],
            "a negative error": [POINT.replace('"kl_se": 0.02', '"kl_se": -0.02')],
            "a formula": [frontier_point("sft", model="$\\frac{$")],
            "a line end": [frontier_point("sft", preset="a\nb")],
            "10,000 characters": [frontier_point("sft", "x" * 10_000)],
            "booleans": [frontier_point("sft", temperature=True)], "deep JSON": ["[" * 100_000],
            "bytes": bytes(range(256)) * 40, "texts for rewards": [frontier_point(
                "sft", rewards=["0.5"] * 60)]}.items()},
    "a pipe for a frontier": at_once("plot_frontier.py f", "no file f/frontier.jsonl", given=(
        lambda here: Path("f").mkdir(), lambda here: os.mkfifo("f/frontier.jsonl"))),
    "a folder for a frontier": at_once("plot_frontier.py f", "there is no file f/frontier.jsonl",
                                       given=write("f/frontier.jsonl/x", "")),
    "curves of no dpo run": at_once("plot_frontier.py {sft}", "holds no run of dpo"),
    "curves of an empty run": at_once("plot_frontier.py f", "holds no run of dpo",
                                      given=write("f/metrics.jsonl", "")),
    **{f"curves of {name}": at_once(
        "plot_frontier.py {dpo}", "metrics.jsonl is damaged", given=change(
            "dpo/metrics.jsonl", lambda old, value=value: re.sub(
                rb'("margin": )[^,]*', rb"\g<1>" + value, old)))
       for name, value in (("text", b'"1"'), ("NaN", b"NaN"), ("null", b"null"),
                           ("a boolean", b"true"), ("400 digits", b"9" * 400))},
    "curves without a column": at_once(
        "plot_frontier.py {dpo}", "metrics.jsonl is damaged", "margin",
        given=change("dpo/metrics.jsonl", lambda old: old.replace(b'"margin"', b'"m"'))),
    **{f"curves of a run that begins with {row}": at_once(
        "plot_frontier.py {dpo}", "holds no run of dpo", given=change(
            "dpo/metrics.jsonl", lambda old, row=row: row.encode() + b"\n" + old))
       for row in ("5", "null", "{}", '{"step": 0}')},
    **{f"curves from a reference.json of {text[:9]}": at_once(
        "plot_frontier.py {dpo}", "reference.json is damaged", "restore", given=write(
            "groups/reference.json", text))
       for text in ("{}", "5", "[]", '{"point": {}}', "[" * 100_000)},
    "curves without their groups": at_once("plot_frontier.py {dpo}", "groups* holds the groups of",
                                           given=remove("groups")),
    "a picture that cannot be written": at_once(
        "plot_frontier.py f", "cannot write f/frontier.png", given=(
            write("f/frontier.jsonl", [frontier_point("sft")]),
            lambda here: Path("f/frontier.png").mkdir())),

    # ---- python -m experiments.figures
    "figures without π_ref": at_once("experiments.figures f", "no point of sft", given=write(
        "f/frontier.jsonl", [frontier_point("dpo", "beta=1", 1.0, 0.7)])),
    "figures of nothing": at_once("experiments.figures f", "holds no point", given=write(
        "f/frontier.jsonl", [frontier_point("sft", model="$\\frac{$"), "null", "\x00"])),
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


RIGHT = f"from dpo import dpo_loss as true\ndef dpo_loss({DPO_LOSS}):\n" \
        "    return true(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)"


@pytest.mark.parametrize("command, wrong, right", [
    (WEIGHT, mine("def mine(margin, beta): return margin[:3] if len(margin) > 3 else 0 * margin"),
     mine("def mine(margin, beta): return 0 * margin + 0.5")),
    *((MODULE, mine(f"def dpo_loss({DPO_LOSS}): {body}"), mine(RIGHT))
      for body in ("pass", "raise NotImplementedError")),
    (f"{REFERENCE} --stage groups", (PAIRS, model("hf")),
     write("my.jsonl", [PAIR | {"prompt": f"film {i}"} for i in range(5)]))])
def test_after_a_mistake_the_corrected_command_works(here, command, wrong, right):
    for step in wrong if isinstance(wrong, tuple) else (wrong,):
        step(here)
    refused(here.run(command))
    right(here)
    result = here.run(command)
    assert result.code == 0, result.err


def test_a_mistake_after_a_checkpoint_says_what_to_delete(here):
    mine(RIGHT.replace("    return", "    calls.append(0)\n    if len(calls) > 2:\n        1 / 0\n"
                       "    return") + "\ncalls = []")(here)
    said = refused(here.run(f"{MODULE} --save-secs 0"), "mine.py:5 raised ZeroDivisionError")
    folder = re.search(r"after you delete (\S+):", said)[1]
    mine(RIGHT)(here)
    refused(here.run(MODULE), "mine.py has changed since", f"delete {folder}")
    shutil.rmtree(folder)
    assert here.run(MODULE).code == 0


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_sentence(name, here):
    mistake = MISTAKES[name]
    for step in mistake.given:
        step(here)
    before = contents()
    refused(here.run(mistake.command), *mistake.words)
    after = contents()
    assert [p for p in before if after.get(p) != before[p]] == [], "lost or changed"
    new = {path.name for path in after.keys() - before.keys()}
    assert new <= mistake.leaves, "these files may hinder the corrected command"
