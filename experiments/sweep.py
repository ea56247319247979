"""The sweep: every method of Figure 2 from one reference model, its points in frontier.jsonl.

    python train.py --stage frontier

A method's learning rate is chosen at one setting (rates.py). Then every setting is run at that
rate and evaluated at regular steps on the same test prompts. The runs at the other rates are points
of the frontier too, because the paper's frontier shows all of its runs. Each run is one of STAGES.

P prompts, K samples per prompt.
"""

import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluate import jackknife_optimum, pairwise_accuracy, rounded, standard_error
from experiments import figures, online  # noqa: F401  online adds its stage
from experiments.baselines import (all_groups, best_of_kl, expected_best, learned_reward,
                                   needs_true_reward)
from experiments.ppo import no_fp16
from experiments.rates import candidates, chosen_rates, rate_table, report_rates, share
from job import Job, seed_of
from plot_frontier import kl_range
from support import ranks
from support.points import KEYS
from support.runs import Run, UserError, load_tensors, read_json, read_rows, save_json
from support.settings import Settings
from train import STAGES, Completions, Diverged, Stage, build, is_made, needs, score

DIAL = (5, 10, 20, 50)  # s/β: the optimum of sampled and soft labels depends on this ratio alone
TEMPERATURES = (0.0, 0.25, 0.5, 0.75)  # besides 1


# ------------------------------------------------------------------------------ the plan

class Method(NamedTuple):
    stage: str
    rate: str  # the name of its learning rate in Settings
    multiples: tuple  # the multiples of this rate that are tried
    settings: dict[str, dict]  # name -> the values of Settings that it changes
    central: str  # the name of the setting at which the rate is chosen
    seeds: int  # run seeds


def methods_of(cfg: Settings) -> dict[str, Method]:
    toy = cfg.corpus == "toy"
    targets = (0.5, 1.0, 2.0, 3.0) if toy else (3.0, 6.0, 9.0, 12.0)
    paper = dict(loss="pairwise", weight="sigmoid", labels="hard")
    betas = {f"beta={b:g}": dict(paper, beta=b)  # Section 6.1's four; 0.5; more on the toy
             for b in (0.05, 0.1, 0.5, 1.0, 5.0, *(2.0, 3.0, 10.0) * toy)}
    alphas = {f"alpha={a:g}": dict(paper, loss="unlikelihood", alpha=a)
              for a in (0.05, 0.1, 0.5, 1.0)}
    kls = {f"target={t:g}": dict(ppo_target=t) for t in targets}
    usual, seeds = (0.25, 0.5, 1.0, 2.0), cfg.seeds
    found = {  # the longest first, so that all cores finish at about the same time
        "ppo": Method("ppo", "ppo_lr", usual, kls, f"target={targets[2]:g}", seeds),
        "ppo-gt": Method("ppo-gt", "ppo_lr", usual, kls, f"target={targets[2]:g}", seeds),
        # on the toy not β 1: there a good rate ends past the compared KLs, and a rate that is too
        # small would win
        "dpo": Method("dpo", "dpo_lr", usual, betas, "beta=2" if toy else "beta=0.1", seeds),
        "unlikelihood": Method("unlikelihood", "dpo_lr", usual, alphas, "alpha=0.5", seeds),
        "preferred-ft": Method("preferred-ft", "dpo_lr", (0.5, 1.0, 2.0, 4.0),
                               {"": dict(paper, loss="preferred-ft")}, "", max(3, seeds))}
    if cfg.rankings:
        rankings = {name: v | dict(loss="plackett-luce") for name, v in betas.items()}
        found["plackett-luce"] = found["dpo"]._replace(settings=rankings, seeds=1)
    for labels in ("sampled", "soft") if cfg.label_dial else ():
        dial = {f"s/beta={x}": dict(paper, labels=labels, beta=cfg.label_scale / x) for x in DIAL}
        found[f"dpo-{labels}"] = found["dpo"]._replace(settings=dial, central="s/beta=10", seeds=1)
    fresh = {f"beta={b:g}": dict(paper, beta=b) for b in ((2.0, 3.0, 5.0) if toy else (0.05, 0.1))}
    for name, labels in (("dpo-online", "r*"), ("dpo-self", "self")) if cfg.online else ():
        own = {setting: v | dict(online_labels=labels) for setting, v in fresh.items()}
        found[name] = found["dpo"]._replace(stage="online", settings=own,
                                            seeds=seeds if labels == "r*" else 1)
    return found


class Planned(NamedTuple):
    """One run of the sweep."""

    method: str
    setting: str
    stage: str
    cfg: Settings
    rate: float

    def __str__(self) -> str:
        name = f"{self.method} {self.setting}".strip()
        return f"{name}, rate {self.rate:g}, seed {self.cfg.run_seed}"


def planned(cfg: Settings, method: str, setting: str, rate: float, seed: int = 0) -> Planned:
    m = methods_of(cfg)[method]
    steps = cfg.ppo_steps if m.rate == "ppo_lr" else cfg.sweep_steps
    changes = dict(m.settings[setting], run_seed=seed, eval_every=-(-steps // cfg.evals_per_run),
                   valid_samples=8 * (setting == m.central and seed == 0))
    if m.rate == "dpo_lr":
        changes |= dict(dpo_steps=steps, dpo_warmup=steps // 6, online_start=max(1, steps // 3))
    return Planned(method, setting, m.stage, replace(cfg, **{m.rate: rate}, **changes), rate)


def tried(cfg: Settings) -> dict[tuple, Planned]:
    """Candidate -> its run, for all candidates of all methods: rates are chosen among them."""
    return {c: planned(cfg, *c) for c in candidates(cfg, methods_of(cfg))}


def finals(cfg: Settings, rates: dict[str, float]) -> list[Planned]:
    """Every setting and seed of every method at its chosen rate."""
    return [planned(cfg, name, setting, rates[name], seed)
            for name, m in methods_of(cfg).items() if name in rates
            for setting in m.settings for seed in range(m.seeds)]


def finished(job: Job, stage: str, cfg: Settings) -> bool:
    return is_made(job.beside(cfg), stage)


def compared(job: Job) -> int:
    """The number of π_ref's completions in the training preferences."""
    return len(job.split[0]) * job.groups.K


def evaluations(job: Job, p: Planned) -> list[dict]:
    """The points of a finished run, each with its step and the run's cost up to this step.

    samples: the completions drawn, with those in the training preferences. seconds: the time of the
    run's own steps.
    """
    cfg, folder, ppo = p.cfg, job.beside(p.cfg).folder(p.stage), p.stage in ("ppo", "ppo-gt")
    drawn = 0 if p.stage == "ppo-gt" else compared(job)
    round_size = cfg.online_every * cfg.dpo_batch * job.groups.K
    points, seconds = [], 0.0
    for row in read_rows(folder / "metrics.jsonl"):
        if "eval" in row:
            step = row["step"] + 1
            rounds = max(0, -(-(step - cfg.online_start) // cfg.online_every))
            samples = drawn + step * cfg.ppo_rollouts * ppo + \
                rounds * round_size * (p.stage == "online")
            points.append(dict(row["eval"], step=step, seconds=round(seconds, 2), samples=samples))
        else:
            seconds += row["seconds"]
    if not points or points[-1]["step"] != (cfg.ppo_steps if ppo else cfg.dpo_steps):
        raise UserError(f"{folder}/metrics.jsonl has lost its last rows: delete {folder}, then run "
                        "the same command again, which makes this run anew")
    return points


def tried_rates(job: Job) -> list[dict]:
    (low, *_), top, _ = kl_range(job.preset)
    optimum = jackknife_optimum(load_tensors(job.folder("best-of-n") / "samples.pt")["valid"])
    return rate_table({c: share(evaluations(job, p), optimum, low, top)
                       if finished(job, p.stage, p.cfg) else None
                       for c, p in tried(job.cfg).items()})


# ------------------------------------------------------------------------------ many runs at once

def run_parallel(job: Job, batches, jobs: int, done) -> dict[str, str]:
    """Make all runs, `jobs` at the same time: folder name -> hash of the run's last file.

    batches: an iterable of lists of (stage, settings). The next list is requested after all runs of
    the previous list have ended. done(stage, settings, error) is called when a run ends; error is
    None or Diverged. Any other exception kills the workers and is raised. The same command then
    continues the sweep.
    """
    hashes, pool, spawn = {}, None, multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count() if job.device.type == "cuda" else 1
    shared = job.preset, job.cfg, tuple(job.command), -(-jobs // gpus)

    def finish(stage, cfg, result):
        try:
            hashes[job.beside(cfg).folder(stage).name], error = result(), None
        except Diverged as diverged:
            error = diverged
        done(stage, cfg, error)

    try:
        for wanted in batches:
            futures = {}
            for stage, cfg in wanted:
                if jobs == 1 or finished(job, stage, cfg):
                    finish(stage, cfg, lambda: build_quietly(job.beside(cfg), stage))
                    continue
                # workers inherit this: they ignore Ctrl-C, and the parent kills them
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
                try:
                    pool = pool or ProcessPoolExecutor(jobs, spawn, start_worker,
                                                       (spawn.Value("i", 0), gpus))
                    futures[pool.submit(in_worker, shared, stage, cfg)] = stage, cfg
                finally:
                    signal.signal(signal.SIGINT, handler)
            for future in as_completed(futures):
                finish(*futures[future], future.result)
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise UserError("a run was killed from outside, perhaps because memory ran out: give "
                            "a lower --jobs; the same command then continues the sweep") from None
        raise
    finally:
        if pool:
            pool.shutdown()
    return hashes


def start_worker(taken, gpus: int) -> None:
    """Called when a worker starts: it takes the next GPU, and will end if its parent is killed."""
    ranks.end_with_parent(multiprocessing.parent_process().pid)
    with taken.get_lock():
        ranks.LOCAL_RANK = taken.value % gpus
        taken.value += 1


@functools.cache
def worker_job(preset: str, cfg: Settings, command: tuple[str, ...], workers: int) -> Job:
    job = Job(preset, cfg, list(command))
    job.workers = workers
    return job


def in_worker(shared: tuple, stage: str, cfg: Settings) -> str:
    torch.set_num_threads(cfg.threads)
    job = worker_job(*shared)
    job.cfg = cfg  # all runs share what the job has loaded
    return build_quietly(job, stage)


def build_quietly(job: Job, stage: str) -> str:
    """`build` without its output: the sweep prints the progress of all runs."""
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return build(job, stage)


def make_runs(job: Job) -> dict[str, str]:
    """Make all runs of the sweep -> their hashes: first the candidates of the rates, then the rest.

    A run that diverges is left out and named. Any other error ends the sweep.
    """
    cores = len(os.sched_getaffinity(0))
    # a small model leaves a GPU idle between its kernels; a large one needs all of its memory
    small = sum(p.numel() for p in job.load_reference().parameters()) < 1e8
    jobs = job.cfg.jobs or (min(cores, 8) if job.device.type == "cpu" else
                            (4 if small else 1) * torch.cuda.device_count())
    cfg = replace(job.cfg, threads=max(1, cores // jobs)) if jobs > 1 else job.cfg
    first = list(tried(cfg).values())
    total = 2 + len(first) + len(finals(cfg, {p.method: p.rate for p in first})) \
        - len(methods_of(cfg))  # one candidate per method is also a final run
    plans = {(p.stage, p.cfg): p for p in first}
    diverged, count = [], itertools.count(1)
    with tqdm(total=total, desc="frontier", unit="run", disable=not sys.stderr.isatty()) as bar:

        def done(stage, cfg, error):
            p = plans.get((stage, cfg))  # None: r_φ or Best-of-N, which the frontier needs
            what = str(p or stage)
            if error and not p:
                raise error
            if error:
                diverged.append(what)
                what += f": {error}"
            elif p:
                last = evaluations(job, p)[-1]
                what += f": reward {last['reward']:.3f} at KL {last['kl']:.2f}"
            bar.update()
            bar.write(f"  {next(count)} of {total} runs; {what}")

        def batches():
            yield [("rm", cfg), *(run for run in plans if run[0] != "ppo")]
            yield [("best-of-n", cfg), *(run for run in plans if run[0] == "ppo")]  # they need r_φ
            rest = [p for p in finals(cfg, chosen_rates(tried_rates(job))) if p not in first]
            plans.update({(p.stage, p.cfg): p for p in rest})
            yield [(p.stage, p.cfg) for p in rest]

        hashes = run_parallel(job, batches(), jobs, done)
    if diverged:
        print(f"  {len(diverged)} runs diverged and are left out: {'; '.join(diverged)}")
    return hashes


# ------------------------------------------------------------------------------ frontier.jsonl

def frontier(job: Job, run: Run) -> None:
    """All points of the sweep in frontier.jsonl; rates.json says how the rates were chosen."""
    reference, reference_eval = job.load_reference(), job.reference_eval
    state = load_tensors(job.folder("best-of-n") / "samples.pt")
    config, size = reference.config, sum(p.numel() for p in reference.parameters()) / 1e6
    # a win rate compares independent samples: these have another seed than all evaluations
    base = np.array(rounded(state["rewards"][:, 0]))

    def line(method, setting, point, seed=0, **more) -> dict:
        row = dict(seed=seed, step=0, temperature=1.0, seconds=0.0) | point | more
        row |= dict(preset=job.preset, method=method, setting=setting,
                    model=f"{size:.2g}M parameters, {config.n_layer} layers of {config.n_embd}")
        row.setdefault("win", float(np.mean(pairwise_accuracy(np.array(row["rewards"]), base))))
        return {key: row.get(key) for key in KEYS}

    lines = [line("sft", "", reference_eval["point"], samples=0, win=0.5)]  # by symmetry
    table = tried_rates(job)
    plans = [p for p in finals(job.cfg, chosen_rates(table)) if finished(job, p.stage, p.cfg)]
    others = [p._replace(setting=f"{p.setting} rate={p.rate:g}".strip())
              for p in tried(job.cfg).values()
              if p not in plans and finished(job, p.stage, p.cfg)]
    for p in plans + others:
        lines += [line(p.method, p.setting, point, p.cfg.run_seed)
                  for point in evaluations(job, p)]
    lines += sampled_lines(job, state, line, implicit_rewards(job, plans, state))
    if job.cfg.temperatures:
        lines += temperature_lines(job, plans, reference, line)
    save_json(run.path("rates.json"), table)
    run.finish(b"".join(json.dumps(row).encode() + b"\n" for row in lines))


def implicit_rewards(job: Job, plans: list[Planned], state: dict) -> torch.Tensor | None:
    """r̂/β of the samples that best-of-n keeps, (P, samples per prompt), by the DPO run that chose
    the rate. None if there is no such run."""
    for p in plans:
        if p.method == "dpo" and p.cfg.valid_samples:
            samples = Completions()
            samples.load_state_dict(state["completions"])
            n = len(samples) // len(state["rewards"])
            prompts = [x for x in job.reference_eval["prompts"] for _ in range(n)]
            logps, ref_logps = (score(job, model, prompts, samples) for model in (
                job.beside(p.cfg).policy(p.stage), job.load_reference()))
            return (logps - ref_logps).view(-1, n)


def best_point(rewards, N: int) -> dict:
    """The point of Best-of-N from the rewards (P,) of the chosen samples."""
    kl = best_of_kl(N)
    return dict(reward=float(rewards.mean()), reward_se=standard_error(rewards), kl=kl, kl_se=0.0,
                rewards=[round(x, 4) for x in rewards.tolist()],
                kls=[round(kl, 4)] * len(rewards), seconds=None)


def sampled_lines(job: Job, state: dict, line, implicit) -> list[dict]:
    """Best-of-N by r*, by r_φ and by a DPO policy's r̂, the optimum, and the tilt by the score, all
    from π_ref's samples (P, K). implicit: r̂ of the first of them; None without such a policy.

    The tilt by the score is π_ref exp(s/β)/Z with s = logit r*. On the toy, s is a sum over
    words, times a constant. This policy is the optimum for s: it ignores that r* saturates.
    """
    r, drawn = state["rewards"], compared(job)
    base = np.array(job.reference_eval["point"]["rewards"])  # of another seed than r
    win = torch.from_numpy(pairwise_accuracy(r.numpy().round(4), base[:, None].astype(np.float32)))
    lines, scores = [], [("best-of-n", r, 0), ("best-of-n-learned", state["learned"], drawn)]
    if implicit is not None:
        scores.append(("best-of-n-implicit", implicit, drawn))
    for method, scored, more in scores:
        K = scored.size(1)
        for N in (n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= K):
            rewards, wins = (expected_best(scored, x[:, :K], N) for x in (r, win))
            lines.append(line(method, f"N={N}", best_point(rewards, N), win=float(wins.mean()),
                              samples=more + len(r) * N))
    sharpness = sorted({*np.geomspace(0.05, 200, 40).tolist(), *map(float, DIAL)})  # 1/β
    for method, scale, tilt in (("optimum", 1, None), ("score-tilt", 0.1, r.logit(1e-6))):
        betas = [1 / (scale * x) for x in sharpness]
        for beta, point in zip(betas, jackknife_optimum(r, betas, tilt)):
            lines.append(line(method, f"1/beta={1 / beta:.4g}", point, samples=r.numel(),
                              seconds=None, win=None))
    return lines


def temperature_lines(job: Job, plans, reference, line) -> list[dict]:
    """Points at temperatures below 1: of π_ref, of one policy per method (the run that chose the
    rate), and of Best-of-N by r_φ on π_ref's samples at this temperature."""
    policies = [("sft", "", {}, reference)]
    policies += [(p.method, p.setting, dict(step=evaluations(job, p)[-1]["step"]),
                  job.beside(p.cfg).policy(p.stage)) for p in plans if p.cfg.valid_samples
                 and p.method in ("dpo", "ppo", "preferred-ft")]
    lines, learned, N = [], learned_reward(job), min(16, job.cfg.best_of)
    prompts = job.reference_eval["prompts"]
    repeated = [p for p in prompts for _ in range(N)]
    for t in TEMPERATURES:
        lines += [line(method, setting, job.evaluate(policy, reference, prompts, temperature=t),
                       **more) for method, setting, more, policy in policies]
        seed = seed_of(job.cfg, "best-of-n", f"temperature {t}")
        samples = job.sample(reference, repeated, seed, temperature=t)
        best = learned(repeated, samples).view(-1, N).argmax(1).tolist()
        rewards = job.reward(prompts, [samples[i * N + k] for i, k in enumerate(best)])
        lines.append(line("best-of-n-learned", f"N={N}", best_point(rewards, N), temperature=t,
                          samples=compared(job) + len(samples)))  # kl is to π_ref at t
    return lines


def report_frontier(job: Job) -> None:
    folder = job.folder("frontier")
    report_rates(read_json(folder / "rates.json"))
    for picture in figures.draw_all(folder / "frontier.jsonl"):
        print(f"picture: {picture}")


def frontier_parents(cfg: Settings) -> list[str]:
    parents = all_groups(cfg, "frontier", no_fp16(cfg, needs_true_reward(cfg, "frontier")))
    return needs(bool(cfg.dpo_module), "--dpo-module would replace functions of dpo.py for every "
                 "method of the frontier: leave it out, or give it to --stage dpo", parents)


STAGES["frontier"] = Stage(frontier, frontier_parents, "frontier.jsonl", report_frontier, make_runs)
