"""Laws of experiments/judge.py: a judge is asked in both orders, an endpoint is asked each question
once, and with r* as the judge the win rates are those of r*. Also the dialogues of toy_reviews.py.

The endpoint is a server in a thread of this process.
"""

import http.server
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import KILL, TINY, command, folder, in_child, refused, same, stopped_and_finished

import support.toy_reviews as toy
from evaluate import pairwise_accuracy, standard_error
from experiments import judge
from experiments.judge import Endpoint, make_judge, verdict_of
from support.preference_files import parse
from support.runs import UserError, read_json, read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


# ------------------------------------------------------------------------------ an endpoint


def answers(message: str) -> tuple[str, str]:
    return re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nFirst", message, re.S).groups()


def better(a: str, b: str) -> str:
    """An endpoint's reply: the answer with the larger number is better."""
    a, b = float(a), float(b)
    return "One is larger.\n\nMore helpful: " + ("A" if a > b else "B" if b > a else "tie")


def completion(text) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """.url, .asked (a list of requests), and .reply(message) -> (status, bytes), to be changed."""
    monkeypatch.setattr(judge, "WAITS", (0,) * len(judge.WAITS))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    found = SimpleNamespace(asked=[], cache=tmp_path / "cache" / "verdicts.jsonl",
                            reply=lambda message: (200, completion(better(*answers(message)))))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.asked.append(SimpleNamespace(path=self.path, headers=self.headers, body=body))
            status, content = found.reply(body["messages"][0]["content"])
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    found.ask = lambda *texts, model="m": Endpoint(found.url, model, found.cache)(*texts).tolist()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def judged(job, tmp_path):
    """judged(settings ...) -> the judge of these settings, its cache in tmp_path."""
    def make(**settings):
        other = job.beside(replace(job.cfg, **settings))
        other.root = tmp_path
        return make_judge(other)

    return make


N = 6
PROMPTS, ONES, OTHERS = (["\n\nHuman: How many?\n\nAssistant:"] * N,
                         [f" {i}" for i in range(N)], [" 3"] * N)
RIGHT = [0, 0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("reply, verdict", [
    ("A", 1), ("Both are fine.\nB", 0), ("A is long.\n\nMore helpful: **B**.\n", 0), ("Tie.", 0.5),
    ("tie", 0.5), ("B\nA", 1)])
def test_the_last_line_is_the_verdict(reply, verdict):
    assert verdict_of(reply) == verdict


@pytest.mark.parametrize("reply", ["", "neither", "A\nI cannot say", "A or B", "a", None, ["A"]])
def test_a_reply_with_no_or_two_verdicts_is_refused(reply):
    with pytest.raises((ValueError, AttributeError)):
        verdict_of(reply)


def test_an_endpoint_is_asked_in_the_format_of_openai(endpoint):
    assert endpoint.ask(PROMPTS, ONES, OTHERS) == RIGHT
    assert len(endpoint.asked) == N
    for request in endpoint.asked:
        assert request.path == "/v1/chat/completions"
        assert request.headers["Authorization"] == "Bearer sk-secret"
        assert request.body["model"] == "m" and request.body["temperature"] == 0
        message, = request.body["messages"]
        assert message["role"] == "user" and "How many?" in message["content"]
        assert "helpful" in message["content"], "the question for a dialogue"
    endpoint.ask(["A post. TL;DR:"], ["1"], ["2"])
    assert "summaries" in endpoint.asked[-1].body["messages"][0]["content"], "another text"


def test_without_a_key_no_authorization_is_sent(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint.ask(PROMPTS[:1], ["1"], ["2"])
    assert "Authorization" not in endpoint.asked[0].headers


def test_a_busy_slow_or_unclear_endpoint_is_asked_again(endpoint, monkeypatch):
    monkeypatch.setattr(judge, "TIMEOUT", 0.2)
    monkeypatch.setattr(judge, "WAITS", (0,) * 6)
    troubles = iter([(429, b""), (500, b"{"), (200, b"no JSON"), (200, completion(None)), "slow"])

    def reply(message):
        trouble = next(troubles, None)
        if trouble == "slow":
            time.sleep(0.5)
            trouble = 200, completion("A")  # nobody reads it
        return trouble or (200, completion(better(*answers(message))))

    endpoint.reply = reply
    assert endpoint.ask(PROMPTS[:1], ["1"], ["2"]) == [0] and len(endpoint.asked) == 6


@pytest.mark.parametrize("status, content, words, requests", [
    (401, b'{"error": "wrong key:\n sk-secret"}', ["answered 401", "wrong key", "OPENAI_API_KEY"],
     1),
    (404, b"no such model", ["answered 404", "no such model", "--judge-model"], 1),
    (503, b"", ["answered 503", "5 times"], 5),
    (200, b"[]", ["no answer", "[]"], 5)])
def test_a_request_that_fails_at_last_is_one_sentence_without_the_key(endpoint, status, content,
                                                                      words, requests):
    endpoint.reply = lambda message: (status, content)
    with pytest.raises(UserError) as caught:
        endpoint.ask(PROMPTS[:1], ["1"], ["2"])
    said = str(caught.value)
    assert all(word in said for word in [*words, endpoint.url]) and "\n" not in said, said
    assert "sk-secret" not in said and len(endpoint.asked) == requests
    assert not endpoint.cache.exists(), "the cache holds what is no verdict"


def test_a_question_that_never_gets_a_verdict_is_a_tie_and_is_counted(endpoint, capsys):
    endpoint.reply = lambda message: (200, completion(
        "I refuse" if answers(message)[0] == "0" else better(*answers(message))))
    assert endpoint.ask(PROMPTS, ONES, OTHERS) == [0.5, *RIGHT[1:]]
    assert "1 of 6 replies hold no verdict" in capsys.readouterr().out
    asked = len(endpoint.asked)
    assert asked == N - 1 + len(judge.WAITS)
    assert endpoint.ask(PROMPTS, ONES, OTHERS) == [0.5, *RIGHT[1:]] and len(endpoint.asked) == asked


def test_after_ctrl_c_nothing_is_asked_again(endpoint, monkeypatch):
    monkeypatch.setattr(judge, "WAITS", (0, 30))
    def interrupted(message):
        raise KeyboardInterrupt

    server = Endpoint(endpoint.url, "m", endpoint.cache)
    monkeypatch.setattr(server, "ask", lambda key, message: interrupted(message))
    with pytest.raises(KeyboardInterrupt):
        server(PROMPTS, ONES, OTHERS)
    endpoint.reply = lambda message: (503, b"")
    with pytest.raises(UserError):
        server.request("again?")
    assert not endpoint.asked, "no request follows Ctrl-C"


def test_an_endpoint_that_does_not_exist_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="cannot be reached.*refused"):
        Endpoint("http://127.0.0.1:9", "m", tmp_path / "x")(["x"], ["1"], ["2"])
    monkeypatch.setenv("OPENAI_API_KEY", "sk\nsecret")
    with pytest.raises(UserError, match="set it again") as caught:
        Endpoint("http://127.0.0.1:9", "m", tmp_path / "x")
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------ the cache


def test_a_question_is_asked_once(endpoint):
    for _ in range(2):
        assert endpoint.ask(PROMPTS, ONES, OTHERS) == RIGHT and len(endpoint.asked) == N
    endpoint.ask(PROMPTS * 2, OTHERS * 2, ["7"] * 2 * N)
    assert len(endpoint.asked) == N + 1, "an equal question is asked once"
    endpoint.ask(PROMPTS[:1], ONES[:1], OTHERS[:1], model="other")
    assert len(endpoint.asked) == N + 2, "another model has other verdicts"


@pytest.mark.parametrize("torn", [lambda old: old[:-10], lambda old: old + b'{"key": "12', lambda
                                  old: old + b"null\n[]\n", lambda old: old[:-1]])
def test_a_last_line_cut_short_does_no_harm(endpoint, torn):
    endpoint.ask(PROMPTS, ONES, OTHERS)
    endpoint.cache.write_bytes(torn(endpoint.cache.read_bytes()))
    for _ in range(2):
        assert endpoint.ask(PROMPTS, ONES, OTHERS) == RIGHT and len(endpoint.asked) <= N + 1


def test_after_a_kill_only_the_missing_verdicts_are_asked_for(endpoint, monkeypatch):
    monkeypatch.setattr(judge, "AT_ONCE", 1)
    append, calls = Endpoint.append, iter(range(N))

    def die(self, line):
        if next(calls) == 3:
            append(self, line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "append", die)
        code, text = in_child(lambda: endpoint.ask(PROMPTS, ONES, OTHERS))
    assert code == -KILL and len(endpoint.asked) == 4, text
    assert endpoint.ask(PROMPTS, ONES, OTHERS) == RIGHT
    assert len(endpoint.asked) == 4 + N - 3, "three verdicts were on the disk"


# ------------------------------------------------------------------------------ both orders


def test_a_position_bias_averages_to_the_unbiased_rate(endpoint, judged, job):
    """An endpoint that says A for close pairs. In these, A is better as often as B."""
    def biased(a, b) -> str:
        return better(float(a) + 1.5, b)

    pairs = [(4, 1), (7, 2), (9, 3), (1, 6), (2, 3), (3, 2), (5, 4), (4, 5), (6, 6), (8, 8)]
    enc = job.data.enc
    prompts, a, b = ([enc.encode_ordinary(f" {x}") for x in column]
                     for column in ("x" * len(pairs), *zip(*pairs)))
    true = torch.tensor([float(pairwise_accuracy(*pair)) for pair in pairs])
    endpoint.reply = lambda message: (200, completion(biased(*answers(message))))
    ask = judged(judge=endpoint.url, judge_model="m")
    verdicts, disagree = ask(prompts, a, b)
    one_order = sum(verdict_of(biased(*pair)) for pair in pairs) / len(pairs)
    assert one_order == pytest.approx(0.9) and verdicts.mean() == true.mean() == 0.6
    assert torch.equal(verdicts[:4], true[:4]), "where the answers differ much, it is right"
    assert disagree.tolist() == [False] * 4 + [True] * 6 and (verdicts[disagree] == 0.5).all()
    assert len(endpoint.asked) == len({*pairs, *(pair[::-1] for pair in pairs)}), "both orders"
    assert (ask(prompts, b, a)[0] == 1 - verdicts).all(), "the place of an answer changes nothing"


def test_r_star_as_a_judge_is_the_win_rate_of_the_frontier(job, judged, monkeypatch):
    prompts, completions = job.groups.flat(range(20))
    a, b = completions, completions[1:] + completions[:1]
    a = [y if i % 7 else x for i, (x, y) in enumerate(zip(a, b))]  # equal answers tie
    verdicts, disagree = judged()(prompts, a, b)
    win = pairwise_accuracy(job.reward(prompts, a), job.reward(prompts, b))
    assert torch.equal(verdicts, win) and set(win.tolist()) == {0, 0.5, 1} and not disagree.any()
    monkeypatch.setattr(judge, "learned_reward", lambda job: lambda prompts, completions:
                        -job.reward(prompts, completions))
    assert torch.equal(judged(judge="r_phi")(prompts, a, b)[0], 1 - win), "r_φ judges"


# ------------------------------------------------------------------------------ the stage


def rows(n: int) -> list[dict]:
    rng, found = random.Random(0), {}
    while len(found) < n:
        film, good, bad = (toy.expand(symbol, sign, rng, set())[0] for symbol, sign in (
            ("title", 1), ("adjective", 1), ("adjective", -1)))
        prompt = f"\n\nHuman: {film}?\n\nAssistant:"
        found[prompt] = dict(chosen=f"{prompt} It was {good}.", rejected=f"{prompt} It was {bad}.")
    return list(found.values())


@pytest.fixture
def place(chain, copied, tmp_path):
    """The arguments of --stage judge beside a finished sft, on 40 short dialogues."""
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    return ["--stage", "judge", *TINY, "--out", copied("sft"), "--data", chain.data, "--groups",
            path]


def test_win_rates_over_temperatures_and_steps(place, tmp_path):
    out = tmp_path / "out"
    result = command(*place, figures=True)
    assert result.code == 0, result.err
    run = folder(out, "judge")
    table = read_json(run / "judge.json")
    points = {(p["policy"], p["temperature"]): p for p in table["points"]}
    assert [*points] == [(name, t) for name in ("Preferred-FT", "DPO")
                         for t in (0, 0.25, 0.5, 0.75, 1)]
    steps = table["steps"]
    assert [p["step"] for p in steps] == [0, 2, 4, 6]
    assert steps[0]["wins"] == points["Preferred-FT", 1]["wins"], "it is π_ref"
    assert steps[-1]["wins"] == points["DPO", 1]["wins"], "the same samples of DPO"

    held = read_json(folder(out, "groups") / "reference.json")
    last = read_rows(folder(out, "dpo") / "metrics.jsonl")[-1]["eval"]
    assert len(last["completions"]) == table["prompts"] == len(held["prompts"]) == 4
    texts = (run / "judge.txt").read_text().split("\n\n")
    for i, text in enumerate(texts[:4]):
        lines = [line[20:] for line in text.splitlines()]
        prompt, chosen, tuned, policy = lines
        assert any(row["chosen"] == f"{prompt}{chosen}".replace("⏎", "\n") for row in rows(40)), \
            "the file's own answer to this prompt"
        for key, answer in (("Preferred-FT", tuned), ("DPO", policy)):
            win = float(pairwise_accuracy(toy.sentiment(answer), toy.sentiment(chosen)))
            assert points[key, 1]["wins"][i] == win
            assert f"{key} { {1: 'wins', 0.5: 'ties', 0: 'loses'}[win]}:" in text
    for p in (*table["points"], *steps):
        assert p["win"] == sum(p["wins"]) / 4 and p["disagree"] == 0
        assert p["win_se"] == pytest.approx(standard_error(torch.tensor(p["wins"])))
    shown = result.out[result.out.index("win rate against"):].split("prompt:")[0].splitlines()
    assert max(map(len, shown)) <= 100 and not any("orders" in line for line in shown), \
        "r* has the same verdict in both orders"
    assert "Preferred-FT" in shown[3] and "DPO" in shown[3]
    few = steps[:-1][:: -(-(len(steps) - 1) // 4)]  # at most four; the last step is temperature 1
    for line, p in zip(shown[4:], [points["DPO", t] for t in (0, 0.25, 0.5, 0.75, 1)] + few):
        error = f" ±{p['win_se']:.3f}" * (p["win_se"] > 0)
        assert line.endswith(f"  {p['win']:.3f}{error}"), "temperatures, then steps"
    assert shown[9].startswith("step 0: π_ref ") and ": " not in "".join(shown[10 : 9 + len(few)])
    assert shown[9 + len(few)].startswith("Preferred-FT: after training"), "no more rows"
    assert (run / "judge.png").stat().st_size > 10_000

    shutil.move(run, tmp_path / "first")
    stopped_and_finished(place, (KILL, "after", "resume.pt", 3), (KILL, "torn", "judge.txt"))
    same(tmp_path / "first", run)


def test_an_endpoint_judges_a_given_reference_beside_preferred_ft(place, endpoint, tmp_path):
    """It is asked a test question before a stage is made, and later only questions whose verdicts
    are not on the disk."""
    out, given = tmp_path / "out", tmp_path / "given"
    shutil.move(folder(out, "sft"), given)
    argv = [*place, "--reference", given, "--judge", endpoint.url, "--judge-model", "m",
            "--dpo-lr", "0.02"]
    endpoint.reply = lambda message: (401, b"")
    refused(command(*argv), "answered 401")
    assert len(endpoint.asked) == 1 and not list(out.glob("*/*/config.json"))

    endpoint.reply = lambda message: (200, completion("A"))
    result = command(*argv)
    assert result.code == 0, result.err
    table = read_json(folder(out, "judge") / "judge.json")
    for p in (*table["points"], *table["steps"]):
        assert (p["win"], p["disagree"]) == (0.5, 1), "the endpoint always says A"
    samples = (folder(out, "preferred-ft") / "samples.txt").read_text().splitlines()
    tuned, reference = ([line.partition("|")[2].removesuffix(" …").split() for line in samples
                         if line.startswith(name)] for name in ("after:", "before:"))
    assert tuned == [line[20:].split() for line in (
        folder(out, "judge") / "judge.txt").read_text().splitlines()
        if line.startswith("Preferred-FT")] != reference, "Preferred-FT is not the given π_ref"
    settings = read_json(folder(out, "judge") / "config.json")["settings"]
    assert settings["judge"] == endpoint.url and "judged by m on 4" in result.out
    assert "verdicts in the two orders differ in 100.0% of the comparisons" in result.out
    asked = len(endpoint.asked)
    shutil.rmtree(folder(out, "judge"))
    assert command(*argv).code == 0
    assert len(endpoint.asked) == asked + 1, "only the test question is asked again"
    shutil.rmtree(folder(out, "judge"))
    endpoint.reply = lambda message: (401, b"")
    refused(command(*argv), "answered 401")
    endpoint.reply = lambda message: (200, completion("I cannot say, sk-secret"))
    assert "sk-secret" not in refused(command(*argv), "no verdict", "cannot say", "--judge-model")
    for path in (out / "toy").rglob("*"):
        assert path.is_dir() or b"sk-secret" not in path.read_bytes(), path


# ------------------------------------------------------------------------------ the dialogues


def test_a_dialogue_prefers_the_answer_of_higher_reward(capsys):
    toy.main(["--dialogues", "200"])
    lines = capsys.readouterr().out.splitlines()
    found = [parse(line.encode(), "") for line in lines]
    assert len(found) == 200 and {x.prompt.count("\n\nHuman:") for x in found} == {1, 2}
    assert len({x.prompt for x in found}) > 190, "most prompts are different"
    for x in found:
        assert x.prompt.startswith("\n\nHuman: ") and x.prompt.endswith("\n\nAssistant:")
        assert toy.sentiment(x.completions[0]) > toy.sentiment(x.completions[1])
        for text in x.completions:
            good, n = toy.grammatical(text)
            assert good == n > 0, text
    toy.main(["--dialogues", "50"])
    assert capsys.readouterr().out.splitlines() == lines[:50]
