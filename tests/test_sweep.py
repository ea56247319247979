"""Laws of experiments/sweep.py: the plan, many runs at once, and frontier.jsonl.

Each run has two steps: the tests check which runs and points there are, not how good they are.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, command, folder, in_child, refused

from experiments import sweep
from experiments.baselines import best_of_kl
from experiments.rates import chosen_rates
from experiments.sweep import (evaluations, finals, finished, make_runs, methods_of,
                               run_parallel, tried, tried_rates)
from job import Job
from support import ranks
from support.points import KEYS, read_points
from support.runs import UserError, load_tensors
from support.settings import IMDB, TOY, parse
from train import Completions, Diverged, score

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
FEW = [*TINY, "--sweep-steps", "2", "--ppo-steps", "2", "--best-of", "16", "--jobs", "1",
       "--rm-epochs", "1", "--evals-per-run", "2"]


def job_of(out: Path, data: Path, *flags) -> Job:
    argv = [*FEW, *flags, "--out", str(out), "--data", str(data)]
    _, preset, _, cfg = parse(argv, False)
    return Job(preset, cfg, argv)


# ------------------------------------------------------------------------------ the plan


def test_the_plan_has_every_run_of_figure_2():
    cfg = replace(TOY, seeds=2)
    runs = finals(cfg, {name: 1e-3 for name in methods_of(cfg)})
    betas = {p.cfg.beta for p in runs if p.method == "dpo"}
    assert {0.05, 0.1, 1, 5} < betas, "Section 6.1"
    assert {p.cfg.alpha for p in runs if p.method == "unlikelihood"} == {0.05, 0.1, 0.5, 1}
    assert {p.cfg.ppo_target for p in runs if p.method == "ppo"} == {0.5, 1, 2, 3}
    seeds = {p.method: {q.cfg.run_seed for q in runs if q.method == p.method} for p in runs}
    assert seeds == {"dpo": {0, 1}, "unlikelihood": {0, 1}, "ppo": {0, 1}, "ppo-gt": {0, 1},
                     "preferred-ft": {0, 1, 2}}, "Preferred-FT has only its seed as a setting"


def test_a_candidate_at_the_chosen_rate_is_also_a_final_run():
    methods, first = methods_of(TOY), list(tried(TOY).values())
    chosen = {name: float(f"{getattr(TOY, m.rate) * m.multiples[1]:.3g}")
              for name, m in methods.items()}
    both = [p for p in finals(TOY, chosen) if p in first]
    assert len(both) == len(methods), "one per method is not run twice"


def test_every_setting_is_run_at_the_rate_chosen_for_its_method():
    for cfg in (replace(TOY, label_dial=True, rankings=True, online=True), IMDB):
        chosen = {name: getattr(cfg, m.rate) for name, m in methods_of(cfg).items()}
        for p in finals(cfg, chosen):
            assert p.rate == getattr(p.cfg, methods_of(cfg)[p.method].rate) == chosen[p.method]


def test_only_runs_that_choose_a_rate_are_evaluated_on_validation_prompts():
    assert all(p.cfg.valid_samples == 8 for p in tried(TOY).values())
    chosen = {name: float(f"{getattr(TOY, m.rate) * m.multiples[1]:.3g}")
              for name, m in methods_of(TOY).items()}
    for p in finals(replace(TOY, seeds=2), chosen):
        m = methods_of(TOY)[p.method]
        assert bool(p.cfg.valid_samples) == (p.setting == m.central and p.cfg.run_seed == 0)


@pytest.mark.parametrize("flags", ["--loss plackett-luce", "--labels soft", "--weight constant"])
def test_flags_do_not_change_the_loss_and_labels_of_a_method(flags):
    _, _, _, cfg = parse(["--preset", "toy", "--rankings", "--label-dial", *flags.split()], False)
    wanted = {"dpo": ("pairwise", "hard"), "plackett-luce": ("plackett-luce", "hard"),
              "dpo-soft": ("pairwise", "soft"), "dpo-sampled": ("pairwise", "sampled")}
    for p in finals(cfg, {name: 1e-3 for name in methods_of(cfg)}):
        if p.stage == "dpo":
            assert (p.cfg.loss, p.cfg.labels) == wanted[p.method] and p.cfg.weight == "sigmoid"


# ------------------------------------------------------------------------------ frontier.jsonl


def few_methods(cfg) -> dict:
    """Two settings and two rates of each method."""
    return {name: m._replace(multiples=(0.5, 1.0), settings={
        k: v for k, v in m.settings.items() if k in (m.central, next(iter(m.settings)))})
        for name, m in methods_of(cfg).items()}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sweep, "methods_of", few_methods)


@pytest.fixture(scope="module")
def swept(chain, tmp_path_factory) -> Path:
    """--out of a sweep over few methods, two points per run."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    for stage in ("sft", "groups"):
        shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "methods_of", few_methods)
        result = command("--stage", "frontier", *FEW, "--temperatures", "--out", out, "--data",
                         chain.data)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def points(swept) -> list[dict]:
    return read_points(folder(swept, "frontier"))


def test_every_run_of_the_plan_has_its_points(points):
    found = {(p["method"], p["setting"], p["seed"]) for p in points}
    for method, m in few_methods(TOY).items():
        assert {(method, s, seed) for s in m.settings for seed in range(m.seeds)} <= found
        others = {s for name, s, _ in found if name == method and "rate=" in s}
        assert len(others) == len(m.multiples) - 1, "the runs at the other rates, too"
    assert {("sft", "", 0), ("best-of-n", "N=16", 0), ("best-of-n-learned", "N=4", 0),
            ("best-of-n-implicit", "N=16", 0)} <= found
    for ideal in ("optimum", "score-tilt"):
        assert sum(method == ideal for method, _, _ in found) > 20


def test_every_point_has_every_key_and_the_same_prompts(points):
    for p in points:
        assert tuple(p) == tuple(KEYS)
        assert len(p["rewards"]) == len(p["kls"]) == 8
        assert p["method"] in ("optimum", "score-tilt") or 0 <= p["win"] <= 1
        if p["method"] == "best-of-n":
            assert p["kl"] == pytest.approx(best_of_kl(int(p["setting"][2:])))
    sft = next(p for p in points if p["method"] == "sft" and p["temperature"] == 1)
    assert sft["kl"] == 0 and sft["win"] == 0.5 and sft["step"] == 0, "equal policies"


def test_a_win_is_over_a_sample_of_pi_ref_of_another_seed(chain, swept, points):
    """Of one seed, a policy's sample and π_ref's would be alike, and often equal."""
    evaluated = job_of(swept, chain.data).reference_eval["point"]["rewards"]
    others = load_tensors(folder(swept, "best-of-n") / "samples.pt")["rewards"][:, 0].numpy()
    assert not np.allclose(evaluated, others, atol=1e-4)
    for p in points:
        if p["method"] in ("dpo", "ppo", "preferred-ft", "sft") and (p["method"], p["kl"]) != (
                "sft", 0):
            win = np.mean([0.5 + 0.5 * np.sign(round(a - b, 4))
                           for a, b in zip(p["rewards"], others)])
            assert p["win"] == pytest.approx(win), (p["method"], p["temperature"])


def test_points_come_at_regular_steps_and_costs_never_fall(points):
    runs = {}
    for p in points:
        if p["method"] in methods_of(TOY) and p["temperature"] == 1:
            runs.setdefault((p["method"], p["setting"], p["seed"]), []).append(p)
    for name, (first, last) in runs.items():
        assert (first["step"], last["step"]) == (1, 2), name
        assert first["seconds"] <= last["seconds"]
        new = 8 if name[0] in ("ppo", "ppo-gt") else 0  # one completion per rollout
        assert last["samples"] - first["samples"] == new, name
    dpo, ppo, ppo_gt = (runs[method, setting, 0][0]["samples"] for method, setting in (
        ("dpo", "beta=2"), ("ppo", "target=2"), ("ppo-gt", "target=2")))
    assert (ppo_gt, ppo - dpo) == (8, 8), "PPO with r* needs no completions of π_ref"


def test_the_chosen_rate_has_the_largest_share_on_validation_prompts(chain, swept, few):
    job = job_of(swept, chain.data)
    table = tried_rates(job)
    assert table == json.loads((folder(swept, "frontier") / "rates.json").read_text())
    for method in few_methods(job.cfg):
        rows = [row for row in table if row["method"] == method]
        best, = (row for row in rows if row["chosen"])
        assert len(rows) == 2 and best["share"] == max(row["share"] for row in rows)
    valid, test = (set(map(tuple, job.reference_eval[key])) for key in ("valid", "prompts"))
    assert not valid & test


def test_other_temperatures_are_measured_on_the_run_that_chose_the_rate(chain, swept, few, points):
    job = job_of(swept, chain.data)
    cold = {(p["method"], p["temperature"]): p for p in points if p["temperature"] != 1}
    assert len(cold) == sum(p["temperature"] != 1 for p in points) == 5 * 4
    for method in ("dpo", "ppo", "preferred-ft"):
        for t in (0, 0.25, 0.5, 0.75):
            p = cold[method, t]
            central = few_methods(job.cfg)[method].central
            assert (p["setting"], p["seed"], p["step"]) == (central, 0, 2)
    assert cold["sft", 0]["rewards"] == cold["best-of-n-learned", 0]["rewards"], "N equal samples"


def test_best_of_n_by_the_implicit_reward_is_that_of_the_dpo_run(chain, swept, few, points):
    job = job_of(swept, chain.data)
    state = load_tensors(folder(swept, "best-of-n") / "samples.pt")
    plans = [p for p in finals(job.cfg, chosen_rates(tried_rates(job))) if p.method == "dpo"]
    implicit = sweep.implicit_rewards(job, plans, state)
    assert implicit.shape == (8, 16)
    run, = [p for p in plans if p.cfg.valid_samples]
    policy, samples = job.beside(run.cfg).policy("dpo"), Completions()
    samples.load_state_dict(state["completions"])
    prompt = job.reference_eval["prompts"][3]
    logps = [score(job, model, [prompt] * 16, samples[48:64])
             for model in (policy, job.load_reference())]
    torch.testing.assert_close(implicit[3], logps[0] - logps[1], rtol=0, atol=1e-4)
    best = state["rewards"][torch.arange(8), implicit.argmax(1)]
    point, = [p for p in points if (p["method"], p["setting"]) == ("best-of-n-implicit", "N=16")]
    np.testing.assert_allclose(point["rewards"], best.numpy(), atol=1e-4)
    assert sweep.implicit_rewards(job, [], state) is None, "there is no DPO run"


def test_a_finished_run_is_not_made_again(chain, swept, few, tmp_path):
    out = shutil.copytree(swept, tmp_path / "out")
    shutil.rmtree(folder(out, "frontier"))

    def times():
        return {f: f.stat().st_mtime_ns for f in out.glob("toy/*/*") if f.name != ".lock"}

    before = times()
    result = command("--stage", "frontier", *FEW, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    assert before.items() <= times().items(), "a run's file was written again"
    again, first = (read_points(folder(root, "frontier")) for root in (out, swept))
    assert again == [p for p in first if p["temperature"] == 1]


def test_metrics_without_the_last_evaluation_are_refused(chain, swept, few, tmp_path):
    out = shutil.copytree(swept, tmp_path / "out")
    job = job_of(out, chain.data)
    plan = next(iter(tried(job.cfg).values()))
    metrics = job.beside(plan.cfg).folder(plan.stage) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="lost its last rows.*delete"):
        evaluations(job, plan)


def test_a_sweep_over_a_parent_that_changed_is_refused(chain, copied):
    out = copied("sft", "groups")
    model = folder(out, "sft") / "model.pt"
    model.write_bytes(model.read_bytes()[:-100])
    refused(command("--stage", "frontier", *FEW, "--out", out, "--data", chain.data),
            "model.pt has changed since the run was finished", "delete")


# ------------------------------------------------------------------------------ many runs at once


@pytest.fixture
def job(chain, copied):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # no shell's job control
    yield job_of(copied("sft", "groups"), chain.data, "--dpo-steps", "2", "--evals-per-run", "1")
    signal.signal(signal.SIGINT, handler)


def two_runs(job: Job):
    return [("dpo", replace(job.cfg, beta=beta, threads=1)) for beta in (0.3, 0.6)]


def with_workers(act, count: int) -> None:
    """Calls act(worker processes) in a thread of its own, once `count` of them have started."""
    def wait():
        while len(workers := multiprocessing.active_children()) < count:
            time.sleep(0.01)
        time.sleep(0.3)
        act(workers)

    threading.Thread(target=wait, daemon=True).start()


def send(number: int):
    return lambda workers: [os.kill(worker.pid, number) for worker in workers]


def test_a_worker_makes_the_same_run_as_this_process(job):
    """Even if Ctrl-C reaches the worker: it ignores Ctrl-C, also while it starts."""
    ended, run = [], two_runs(job)[0]
    with_workers(send(signal.SIGINT), 1)
    (name, made), = run_parallel(job, [[run]], 2, lambda *a: ended.append(a)).items()
    assert ended == [(*run, None)]
    shutil.rmtree(job.root / name)
    job.hashes.clear()
    assert run_parallel(job, [[run]], 1, lambda *a: None) == {name: made}


def test_a_worker_reads_what_its_runs_share_only_once(job):
    """After the first run the groups are deleted. Reading them again would make them again."""
    (first, second), workers, groups = two_runs(job), [], job.folder("groups")

    def batches():
        yield [first]
        shutil.rmtree(groups)
        yield [second]

    made = run_parallel(job, batches(), 2, lambda *a: workers.append(
        [worker.pid for worker in multiprocessing.active_children()]))
    assert len(made) == 2 and not groups.exists()
    assert len(workers[0]) == 1 and workers[0] == workers[1]
    assert not multiprocessing.active_children(), "a worker still runs after the sweep"


def test_finished_runs_start_no_process(job, monkeypatch):
    made = run_parallel(job, [two_runs(job)], 1, lambda *a: None)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", None)
    assert run_parallel(job, [two_runs(job)], 2, lambda *a: None) == made


def test_workers_take_the_gpus_in_turn(monkeypatch):
    taken, count = [], multiprocessing.get_context("spawn").Value("i", 0)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=1))
    monkeypatch.setattr(ranks, "end_with_parent", lambda parent: None)
    for name, value in dict(is_available=True, is_bf16_supported=True, device_count=2).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(ranks, "LOCAL_RANK", 0)
    for _ in range(5):
        sweep.start_worker(count, 2)
        Job("toy", TOY, [])
    assert taken == [0, 1, 0, 1, 0]


def test_four_small_runs_share_a_gpu_and_a_large_run_has_one_alone(job, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(sweep, "run_parallel", lambda job, batches, jobs, done: asked.append(jobs))
    job.cfg, job.device = replace(job.cfg, jobs=0), torch.device("cuda")
    for size in (10**7, 10**8):
        model = torch.nn.Linear(size, 1, bias=False, device="meta")
        monkeypatch.setattr(job, "load_reference", lambda: model)
        make_runs(job)
    assert asked == [12, 3]


@pytest.mark.parametrize("signal_sent, raised", [(signal.SIGINT, KeyboardInterrupt),
                                                 (signal.SIGKILL, UserError)])
def test_ctrl_c_and_a_killed_worker_end_the_sweep_and_its_workers(job, signal_sent, raised):
    """Ctrl-C goes to the whole process group; SIGKILL to the workers alone."""
    def work():
        os.setpgrp()
        with_workers(lambda workers: os.killpg(0, signal.SIGINT), 2) \
            if signal_sent == signal.SIGINT else with_workers(send(signal.SIGKILL), 2)
        try:
            run_parallel(job, [two_runs(job)], 2, lambda *a: None)
        except raised as error:
            print(repr(error), multiprocessing.active_children())
            return 3

    code, text = in_child(work)
    assert code == 3 and "[]" in text and "Traceback" not in text, text
    assert signal_sent == signal.SIGINT or "--jobs" in text
    assert not any(finished(job, *run) for run in two_runs(job)), "a worker finished its run"
    assert len(run_parallel(job, [two_runs(job)], 1, lambda *a: None)) == 2, "it continues"


def test_a_killed_sweep_leaves_no_worker_behind(job, tmp_path):
    def work():
        def die(workers):
            (tmp_path / "pid").write_text(str(workers[0].pid))
            os.kill(os.getpid(), signal.SIGKILL)

        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)  # else a living worker keeps our pipe open
        with_workers(die, 1)
        run_parallel(job, [two_runs(job)[:1]], 2, lambda *a: None)

    code, text = in_child(work)
    assert code == -signal.SIGKILL, text
    pid = int((tmp_path / "pid").read_text())
    stat, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while stat.exists() and " Z " not in stat.read_text():
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            pytest.fail("the worker still runs")
        time.sleep(0.05)


def test_runs_that_diverge_are_left_out_and_named(job, monkeypatch, capsys):
    """One candidate has a rate that is far too large, and one setting has a loss that overflows."""
    one = methods_of(TOY)["unlikelihood"]._replace(multiples=(1.0, 1e36), settings={
        f"alpha={a:g}": dict(loss="unlikelihood", alpha=a) for a in (0.5, 1e39)})
    monkeypatch.setattr(sweep, "methods_of", lambda cfg: {"unlikelihood": one})
    hashes = make_runs(job)
    assert len(hashes) == 3, "rm, best-of-n and one candidate, which is also a final run"
    text = capsys.readouterr().out
    assert "2 runs diverged and are left out: unlikelihood alpha=0.5" in text
    assert "unlikelihood alpha=1e+39" in text and "5 of 5 runs" in text
    assert [(row["share"] is None, row["chosen"]) for row in tried_rates(job)] == [(0, 1), (1, 0)]


def test_a_reward_model_that_diverges_ends_the_sweep(chain, copied):
    job = job_of(copied("sft", "groups"), chain.data, "--rm-lr", "1e36")
    with pytest.raises(Diverged, match="--rm-lr"):
        make_runs(job)


def test_divergence_is_reported_and_any_other_error_is_raised(job):
    wanted, ended = two_runs(job), []
    wanted[0] = "dpo", replace(wanted[0][1], dpo_lr=1e36, dpo_warmup=0, eval_every=2)
    hashes = run_parallel(job, [wanted], 1, lambda *a: ended.append(a[2]))
    assert len(hashes) == 1 and isinstance(ended[0], Diverged) and ended[1] is None
    busy = job.beside(replace(job.cfg, beta=0.9)).folder("dpo")
    busy.mkdir()
    with open(busy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another process"):
            run_parallel(job, [[("dpo", replace(job.cfg, beta=0.9))]], 1, lambda *a: None)
