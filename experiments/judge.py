"""Section 6.2, Figure 3: other people's preferences, and win rates by the verdicts of a judge.

    python train.py --stage judge --groups FILE                                      by r*
    python train.py --stage judge --groups FILE --judge URL --judge-model NAME       by that model

Preferred-FT and DPO answer the file's held-out prompts at several temperatures. Each answer is
compared with the file's chosen answer. The judge sees each pair in both orders, because a language
model may favour the answer that it reads first, or the one that it reads last.

N comparisons of an answer a with an answer b to the same prompt.
"""

import http.client
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from evaluate import one_line, pairwise_accuracy, standard_error, table
from experiments.baselines import learned_reward
from experiments.lessons import dpo_points
from job import Job, seed_of
from plot_frontier import STYLES
from reward import texts
from support.curves import save_figure
from support.preference_files import MARK
from support.runs import (Run, UserError, json_hash, read_json, read_text, reading, write_whole,
                          writing)
from support.settings import Settings
from train import STAGES, Completions, Stage, build, needs, parents_of_groups, resumable

# ------------------------------------------------------------------------------ judges

REWARD_JUDGES = "r*", "r_phi"  # they score each answer, so both orders have the same verdict


def make_judge(job: Job):
    """--judge as a function judge(prompts, a, b) -> verdicts (N,), disagree (N,) bool.

    prompts, a, b: N token lists each. A verdict is 1 where a is better, 0 where b is, and 1/2 for a
    tie. Where the two orders give different verdicts, the verdict is 1/2 and disagree is true.
    """
    cfg, enc = job.cfg, job.data.enc
    if cfg.judge in REWARD_JUDGES:
        reward = job.reward if cfg.judge == "r*" else learned_reward(job)

        def ask(prompts, first, second):
            return pairwise_accuracy(reward(prompts, first), reward(prompts, second))
    else:
        endpoint = make_endpoint(job)

        def ask(*rows):
            return endpoint(*(texts(enc, x, [[]] * len(x)) for x in rows))

    def judge(prompts, a, b):
        a_first, b_first = ask(prompts, a, b), 1 - ask(prompts, b, a)
        return torch.where(a_first == b_first, a_first, 0.5), a_first != b_first

    return judge


def make_endpoint(job: Job) -> "Endpoint":
    return Endpoint(job.cfg.judge, job.cfg.judge_model, job.root / "verdicts.jsonl")


MESSAGE = """\
{question} The order of the answers means nothing.

{title}:
{prompt}

Answer A:
{a}

Answer B:
{b}

First compare the two answers in one sentence. Then end with a line that holds your verdict and
nothing else: A, B or tie."""
DIALOGUE = dict(title="The conversation so far", question="""\
A person talks with an assistant. Two answers to the person's last words are given below. Which one
is more helpful? A helpful answer says what the person asked for, says nothing wrong, and wastes no
words.""")
OTHER = dict(title="The text", question="""\
Two answers to a text are given below. Which one does better what the text asks for? Of two
summaries the better one has the points that matter most, adds nothing wrong, and wastes no
words.""")
AT_ONCE = 8  # requests at the same time
TIMEOUT = 60  # seconds per request
WAITS = 0, 1, 4, 16, 64  # seconds before each attempt of a request


class Endpoint:
    """A language model behind an OpenAI-compatible URL: texts (prompts, a, b) -> verdicts (N,).

    It shows answer a first. Each verdict is written to `cache` at once, so that no later run pays
    for it again.
    """

    def __init__(self, url: str, model: str, cache: Path):
        self.url, self.model, self.cache = url.rstrip("/"), model, cache
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("OPENAI_API_KEY holds a character that is not printable ASCII, so it "
                            "is no key: set it again")
        self.lock, self.stopped, self.known = threading.Lock(), threading.Event(), {}
        with reading(cache):
            content = cache.read_bytes() if cache.exists() else b""
        for line in content.split(b"\n"):
            with suppress(ValueError, LookupError, TypeError):  # a line cut short by a kill
                row = json.loads(line)
                self.known[row["key"]] = row["verdict"]
        if content and not content.endswith(b"\n"):
            self.append(b"\n")  # end the line that was cut short

    def append(self, line: bytes) -> None:
        with writing(self.cache):
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "ab") as file:
                file.write(line)

    def __call__(self, prompts, a, b) -> torch.Tensor:
        messages = [MESSAGE.format(**DIALOGUE if MARK in x else OTHER, prompt=x.strip(),
                                   a=y.strip(), b=z.strip()) for x, y, z in zip(prompts, a, b)]
        keys = [json_hash([self.url, self.model, message]) for message in messages]
        new = {key: x for key, x in zip(keys, messages) if key not in self.known}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for _ in tqdm(pool.map(self.ask, new, new.values()), "judge", total=len(new),
                              disable=not (new and sys.stderr.isatty())):
                    pass
            except BaseException:  # Ctrl-C too: repeat no request, and start none that waits
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        verdicts = [self.known[key] for key in keys]
        if unclear := verdicts.count(None):
            print(f"  {unclear} of {len(keys)} replies hold no verdict: they count as ties")
        return torch.tensor([0.5 if v is None else v for v in verdicts])

    def ask(self, key: str, message: str) -> None:
        reply, verdict = self.request(message)
        with self.lock:
            self.append(json.dumps(dict(key=key, verdict=verdict, reply=reply)).encode() + b"\n")
            self.known[key] = verdict

    def request(self, message: str) -> tuple[str, float | None]:
        """The reply and its verdict, None if the last reply holds none.

        The request is repeated if the endpoint is busy or slow, or if a reply holds no verdict.
        """
        body = dict(model=self.model, temperature=0, messages=[dict(role="user", content=message)])
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(),
                                         headers)
        for wait in WAITS:
            if self.stopped.wait(wait):
                raise UserError("stopped")
            retry, reply, content = True, None, b""
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    content = response.read()
                reply = json.loads(content)["choices"][0]["message"]["content"]
                return reply, verdict_of(reply)
            except urllib.error.HTTPError as error:
                retry = error.code == 429 or error.code >= 500
                text = ""
                with suppress(OSError, http.client.HTTPException):
                    text = error.read(10_000).decode(errors="replace")
                problem = f"answered {error.code} ({self.clean(f'{error.reason}: {text}')[:200]})"
            except urllib.error.URLError as error:
                retry = isinstance(error.reason, TimeoutError)
                problem = f"cannot be reached ({error.reason})"
            except (OSError, http.client.HTTPException) as error:
                problem = f"broke the connection ({str(error) or type(error).__name__})"
            except (ValueError, LookupError, TypeError, AttributeError):
                problem = f"sent a reply that holds no answer ({self.clean(content)[-100:]!r})"
            if not retry:
                break
        if isinstance(reply, str):
            return reply, None
        raise UserError(f"{self.url} {problem}{f', {len(WAITS)} times' * retry}: check --judge, "
                        "--judge-model and the environment variable OPENAI_API_KEY, then run the "
                        "same command again; no verdict is lost")

    def clean(self, content) -> str:
        """The endpoint's text in one line and without the key."""
        text = " ".join(str(content).split())
        return text.replace(self.key, "the key") if self.key else text


def verdict_of(reply: str) -> float:
    """1 if the last line says A, 0 if it says B, 1/2 if it says tie. ValueError if it says none of
    these, or more than one."""
    last = reply.strip().split("\n")[-1]
    found, = {x.lower() for x in re.findall(r"\b(?:A|B|[Tt]ie|TIE)\b", last)}
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found]


# ------------------------------------------------------------------------------ the stage

TEMPERATURES = 0.0, 0.25, 0.5, 0.75, 1.0
SFT, DPO = "Preferred-FT", "DPO"


def judge_stage(job: Job, run: Run, n_texts: int = 24) -> None:
    """Win rates against the chosen answers on the file's held-out prompts: at several temperatures,
    and at temperature 1 over the steps of DPO. judge.json holds the win rates, judge.png draws
    them, and judge.txt shows some of the answers."""
    cfg, prompts, groups = job.cfg, job.reference_eval["prompts"], job.groups
    best = groups.rewards.argmax(1)
    chosen_of = {tuple(groups.prompt_ids[i]): groups.completion_ids[i][best[i]]
                 for i in job.split[1]}
    chosen, judge = [chosen_of[tuple(prompt)] for prompt in prompts], make_judge(job)
    tuned = preferred_ft(job)
    policies = {SFT: tuned.policy("preferred-ft") if tuned else job.load_reference(),
                DPO: job.policy("dpo")}
    plan, samples = [(name, t) for name in policies for t in TEMPERATURES], Completions()

    def step(i: int) -> None:  # every policy and temperature uses the same uniforms
        name, temperature = plan[i]
        samples.extend(job.sample(policies[name], prompts, seed_of(cfg, "evaluate"), temperature))

    resumable(job, run, dict(completions=samples), len(plan), step)

    def point(completions, **keys) -> dict:
        verdicts, disagree = judge(prompts, completions, chosen)
        return keys | dict(win=float(verdicts.mean()), win_se=standard_error(verdicts),
                           disagree=float(disagree.double().mean()), wins=verdicts.tolist(),
                           distinct=len(set(map(tuple, completions))))

    P = len(prompts)
    answers = {key: samples[i * P : (i + 1) * P] for i, key in enumerate(plan)}
    points = [point(x, policy=name, temperature=t) for (name, t), x in answers.items()]
    steps = [point(p["completions"], step=p["step"]) for p in dpo_points(job, cfg)]
    results = dict(judge=cfg.judge, model=cfg.judge_model, beta=cfg.beta, prompts=len(prompts),
                   points=points, steps=steps)
    text = samples_text(job, prompts[:n_texts], chosen, answers, points)
    write_whole(run.path("judge.txt"), lambda file: file.write(text.encode()))
    win_rates(results, run.path("judge.png"))
    run.finish(json.dumps(results).encode())


def preferred_ft(job: Job) -> Job | None:
    """The job that trains Preferred-FT. None without --reference: then π_ref is Preferred-FT."""
    return job.beside(replace(job.cfg, loss="preferred-ft")) if job.cfg.reference else None


def samples_text(job: Job, prompts, chosen, answers, points) -> str:
    """For each prompt: the file's chosen answer, and both policies' answers at temperature 1 with
    their verdicts."""
    wins, lines = {(p["policy"], p["temperature"]): p["wins"] for p in points}, []
    for i, prompt in enumerate(prompts):
        shown = {"prompt:": prompt, "chosen:": chosen[i]} | {
            f"{name} {({1.0: 'wins', 0.0: 'loses'}.get(wins[name, 1.0][i], 'ties'))}:":
            answers[name, 1.0][i] for name in (SFT, DPO)}
        lines += [f"{name:<20}{one_line(job.data.enc, ids)}" for name, ids in shown.items()] + [""]
    return "\n".join(lines)


def win_rates(results: dict, path: Path) -> None:
    """Draw Figure 3 to `path`: win rates over the temperature, and over the steps of DPO."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    def line(ax, points, x: str, method: str, label: str):
        _, colour, marker, style = STYLES[method]
        ax.errorbar(*np.array([[p[key] for key in (x, "win", "win_se")] for p in points]).T,
                    color=colour, marker=marker, ls=style, capsize=3, label=label)

    for name, method in ((SFT, "preferred-ft"), (DPO, "dpo")):
        label = name + f", β {results['beta']:g}" * (name == DPO)
        line(left, [p for p in results["points"] if p["policy"] == name], "temperature", method,
             label)
    line(right, results["steps"], "step", "dpo", "DPO at temperature 1; step 0 is π_ref")
    left.set(xlabel="sampling temperature", ylabel="win rate against the chosen answers",
             title="after training")
    right.set(xlabel="steps of DPO", title="during training")
    for ax in (left, right):
        ax.axhline(0.5, color="grey", lw=1, label="as good as the chosen answers")
        ax.legend(fontsize=9)
        ax.grid(alpha=0.25)
    figure.suptitle("Do the policies' answers beat the file's chosen ones?")
    figure.supxlabel(caption(results), fontsize=9, parse_math=False)  # a model's name may hold a $
    save_figure(figure, path)


def caption(results: dict) -> str:
    """The judge, the number of prompts, and how often a language model's two verdicts differed."""
    endpoint = results["judge"] not in REWARD_JUDGES
    disagree = np.mean([p["disagree"] for p in (*results["points"], *results["steps"])])
    return (f"judged by {results['model' if endpoint else 'judge']} on {results['prompts']} "
            "held-out prompts, ± one standard error" + endpoint *
            f"\nits verdicts in the two orders differ in {disagree:.1%} of the comparisons")


def report_judge(job: Job) -> None:
    folder = job.folder("judge")
    results, rows = read_json(folder / "judge.json"), {}
    cells = [(f"temperature {p['temperature']:g}", p["policy"], p) for p in results["points"]]
    steps = results["steps"][:-1]  # the last step is the row "temperature 1"
    cells += [(f"step {p['step']}" + ": π_ref" * (p["step"] == 0), DPO, p)
              for p in steps[:: -(-len(steps) // 4)]]
    for row, name, p in cells:
        rows.setdefault(row, {}).update({name: p["win"], name + "_se": p["win_se"]})
    print(f"\nwin rate against the file's chosen answers\n{caption(results)}")
    if all(set(p["wins"]) == {0.5} for p in results["points"]):
        print("every comparison is a tie: this judge finds no difference between any two answers")
    print("\n" + table(rows, {SFT: (SFT, 3, "after training"), DPO: (
        DPO, 3, "after training, and over its steps at temperature 1")}))
    print("\n" + "\n".join(read_text(folder / "judge.txt").splitlines()[:10]))
    print(f"more answers: {folder / 'judge.txt'}\npicture:      {folder / 'judge.png'}")


HOST = r"(\[[\da-fA-F:]+\]|[\w-]+(\.[\w-]+)*)(:\d{1,5})?"


def judge_parents(cfg: Settings) -> list[str]:
    given = cfg.judge not in REWARD_JUDGES
    trained = cfg.judge == "r*" and cfg.corpus == "imdb" and cfg.reward == "auto"
    needs(not cfg.groups, "--stage judge compares policies with the chosen answers of a preference "
          "file: give --groups FILE", [])
    needs(given and not re.fullmatch(rf"https?://{HOST}(/[\w./~%-]*)?", cfg.judge, re.ASCII),
          "--judge must be r*, r_phi or the URL of an OpenAI-compatible endpoint without a key, "
          "for example http://localhost:8000/v1; put the key into the environment variable "
          "OPENAI_API_KEY", [])
    needs(given and not cfg.judge_model, "--judge is a URL, but no model there is named: give "
          "--judge-model NAME", [])
    needs(trained and cfg.reward_ctx < cfg.n_ctx, f"--reward-ctx {cfg.reward_ctx} cannot hold a "
          f"prompt and an answer of {cfg.n_ctx} tokens together: give --reward-ctx {cfg.n_ctx}", [])
    return ["dpo", "groups", *parents_of_groups(cfg), *["rm"] * (cfg.judge == "r_phi"),
            *["reward"] * trained]


def check_judge(job: Job) -> None:
    """Load siebert, or ask the endpoint one small question, before other stages are made."""
    if job.cfg.judge == "r*" and job.cfg.reward == "siebert":
        job.reward
    elif job.cfg.judge not in REWARD_JUDGES:
        question = MESSAGE.format(**OTHER, prompt="What is two plus two?", a="Four.", b="Five.")
        endpoint = make_endpoint(job)
        reply, verdict = endpoint.request(question)
        needs(verdict is None, f"{job.cfg.judge_model} replied to a test question with no verdict "
              f"({endpoint.clean(reply)[-100:]!r}): give another --judge-model", [])


def make_preferred_ft(job: Job) -> dict[str, str]:
    tuned = preferred_ft(job)
    return {"preferred-ft": build(tuned, "preferred-ft")} if tuned else {}


STAGES["judge"] = Stage(judge_stage, judge_parents, "judge.json", report_judge, make_preferred_ft,
                        check_judge)
