"""The sweep: every method of Figure 2 from one reference model, its points in frontier.jsonl.

A method's learning rate is chosen among four at one setting, on validation prompts; then each of
its settings runs at that rate (on the toy a β larger than that one's, at less), judged at regular
steps on test prompts, the same for all: no rate, and no policy for another temperature, is chosen
by what it does on them.
Knows no equation and no figure (plot_frontier.py); a run is a stage of pipeline.py.

P prompts, K samples a prompt.
"""

import json
import math
import os
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import plot_frontier
import points
from evaluate import in_order, standard_error, unbiased
from methods import best_of_kl, expected_best, learned_reward
from stages import Context, save_json
from support.runs import Run, UserError, load_tensors, read_json, read_rows
from support.settings import Settings
from train import STOP, Diverged, Interrupted, autocast, draw_seed

DIAL = (5, 10, 20, 50)  # s/β, which alone decides where sampled and soft labels lead
TEMPERATURES = (0.0, 0.25, 0.5, 0.75)  # beside 1


class Method(NamedTuple):
    stage: str
    rate: str  # the setting that is its learning rate ...
    multiples: tuple  # ... and four multiples of it to choose from
    settings: dict[str, dict]  # by name: what sets them apart
    central: str  # the one that the rate is chosen on
    seeds: int  # run seeds


def methods_of(s: Settings) -> dict[str, Method]:
    toy = s.corpus == "toy"
    targets = (0.5, 1.0, 2.0, 3.0) if toy else (3.0, 6.0, 9.0, 12.0)
    paper = dict(loss="pairwise", weight="sigmoid", labels="hard")
    betas = {f"beta={b:g}": dict(paper, beta=b)  # Section 6.1's, one between, and the toy's KLs
             for b in (0.05, 0.1, 0.5, 1.0, 5.0, *(2.0, 3.0, 4.0) * toy)}
    alphas = {f"alpha={a:g}": dict(loss="unlikelihood", alpha=a) for a in (0.05, 0.1, 0.5, 1.0)}
    kls = {f"target={t:g}": dict(ppo_target=t) for t in targets}
    usual = 0.25, 0.5, 1.0, 2.0
    # on the toy not at β 1, where a fitting rate leaves the compared KLs and one too small wins
    found = {  # the longest first, lest one core end long after the others
        "ppo": Method("ppo", "ppo_lr", usual, kls, f"target={targets[2]:g}", s.seeds),
        "ppo-gt": Method("ppo-gt", "ppo_lr", usual, kls, f"target={targets[2]:g}", s.seeds),
        "dpo": Method("dpo", "dpo_lr", usual, betas, "beta=2" if toy else "beta=0.1", s.seeds),
        "unlikelihood": Method("unlikelihood", "dpo_lr", usual, alphas, "alpha=0.5", s.seeds),
        "preferred-ft": Method("preferred-ft", "dpo_lr", (0.5, 1.0, 2.0, 4.0),
                               {"": dict(loss="preferred-ft")}, "", max(3, s.seeds))}
    if s.rankings:
        rankings = {name: v | dict(loss="plackett-luce") for name, v in betas.items()}
        found["plackett-luce"] = found["dpo"]._replace(settings=rankings, seeds=1)
    for labels in ("sampled", "soft") if s.dial else ():
        dial = {f"s/beta={x}": dict(paper, labels=labels, beta=s.label_scale / x) for x in DIAL}
        found[f"dpo-{labels}"] = found["dpo"]._replace(settings=dial, central="s/beta=10",
                                                           seeds=1)
    return found


class Planned(NamedTuple):
    """One run of the sweep."""

    method: str
    setting: str
    stage: str
    settings: Settings
    rate: float


def planned(s: Settings, method: str, setting: str, rate: float, seed: int = 0) -> Planned:
    m = methods_of(s)[method]
    ratio = m.settings[m.central].get("beta", 1) / m.settings[setting].get("beta", 1)
    # log π/π_ref has 1/β as far to go, and RMSprop's steps know only the rate: at one for all, the
    # toy's large βs ended too far out. √ lies between that and 1/β; it was tried nowhere else
    if ratio < 1 and s.corpus == "toy":
        rate = float(f"{rate * math.sqrt(ratio):.3g}")
    changes = dict(run_seed=seed, **{m.rate: rate}, **m.settings[setting])
    if m.stage in ("ppo", "ppo-gt"):
        changes |= dict(eval_every=-(-s.ppo_steps // s.points))
    else:
        changes |= dict(dpo_steps=s.sweep_steps, dpo_warmup=s.sweep_steps // 6,
                        eval_every=-(-s.sweep_steps // s.points))
    return Planned(method, setting, m.stage, replace(s, **changes), rate)


def candidates(s: Settings) -> list[Planned]:
    """Four learning rates a method, at its central setting."""
    return [planned(s, name, m.central, float(f"{getattr(s, m.rate) * x:.3g}"))
            for name, m in methods_of(s).items() for x in m.multiples]


def finals(s: Settings, rates: dict[str, float]) -> list[Planned]:
    """Every setting and seed of every method at its chosen rate."""
    return [planned(s, name, setting, rates[name], seed)
            for name, m in methods_of(s).items() if name in rates
            for setting in m.settings for seed in range(m.seeds)]


def evaluations(ctx: Context, p: Planned) -> list[dict]:
    """The points of a finished run, each with its step and what was spent until then.

    samples: completions drawn. forwards: sequences passed through a model, to draw them or to score
    them. A run bears what it stands on, as if it were alone: π_ref's samples that were compared,
    π_ref's scores of them, r_φ's training. seconds: of its own steps.
    """
    drawn, learning = compared(ctx), rm_cost(ctx)
    found, seconds, last = [], 0.0, {}
    folder = ctx.beside(p.settings).folder(p.stage)
    for row in read_rows(folder / "metrics.jsonl"):
        if "eval" not in row:
            seconds, last = seconds + row["seconds"], row
            continue
        step = row["step"] + 1
        if p.stage == "ppo-gt":
            spent = last["samples"], last["forwards"]  # of π_ref's only the rewards' spread is used
        elif p.stage == "ppo":
            spent = learning[0] + last["samples"], learning[1] + last["forwards"]
        else:  # π_ref scores each completion once, for the losses that have it
            scored = drawn if p.stage == "dpo" else 0
            spent = drawn, drawn + scored + step * p.settings.dpo_batch * ctx.s.completions
        found.append(dict(row["eval"], step=step, seconds=round(seconds, 2), samples=spent[0],
                          forwards=spent[1]))
    steps = p.settings.ppo_steps if p.stage in ("ppo", "ppo-gt") else p.settings.dpo_steps
    if not found or found[-1]["step"] != steps:
        raise UserError(f"{folder}/metrics.jsonl has lost its last rows: delete {folder}, and the "
                        "same command makes it again")
    return found


def compared(ctx: Context) -> int:
    """How many of π_ref's completions the training preferences are about."""
    return len(ctx.split[0]) * ctx.s.completions


def rm_cost(ctx: Context) -> tuple[int, int]:
    """Samples and forward passes that r_φ takes: they are drawn, and read in each of its epochs."""
    return compared(ctx), compared(ctx) * (1 + ctx.s.rm_epochs)


def top_kl(ctx: Context) -> float:
    """The KL up to which methods are compared."""
    return points.scale(ctx.preset)[1]


# ------------------------------------------------------------------------------ the runs


def sweep(ctx: Context, make) -> dict[str, str]:
    """All runs, through `make` of pipeline.py: the rates' first, then the rest. Their hashes.

    A run that diverges is left out and named; any other error is raised, and what ended is kept.
    """
    s = ctx.s
    first = candidates(s)
    total = len(first) + 2 + sum(len(m.settings) * m.seeds - 1 for m in methods_of(s).values())
    cores = len(os.sched_getaffinity(0))
    # a small model leaves a GPU idle between its kernels; a large one fills its memory alone
    small = sum(p.numel() for p in ctx.reference.parameters()) < 1e8
    jobs = s.jobs or (min(cores, 8) if ctx.device.type == "cpu" else 4 if small else 1)
    shared = dict(threads=max(1, cores // jobs)) if jobs > 1 else {}
    failed, names, began = [], {}, time.monotonic()
    with tqdm(total=total, desc="frontier", unit="run", dynamic_ncols=True,
              disable=not sys.stderr.isatty()) as bar:
        ended = []  # whether each was found, not made

        def done(stage, settings, error, found=False):
            p = names.get((stage, settings))
            what = f"{p.method} {p.setting}, rate {p.rate:g}, seed {p.settings.run_seed}" if p \
                else stage
            if error:
                if p is None or not isinstance(error, Diverged):
                    raise error  # the other runs would meet it too, or need what it would have made
                failed.append(what)
                what += f": {error}"
            elif p:
                last = evaluations(ctx, p)[-1]
                what += f": reward {last['reward']:.3f} at KL {last['kl']:.2f}"
            ended.append(found)
            left = (time.monotonic() - began) * (total - len(ended)) / max(1, ended.count(False))
            bar.update()
            bar.write(f"  {len(ended)} of {total} runs, {left:.0f} s left; {what}")
            if STOP:
                raise Interrupted("the runs that ended are kept")

        def run(plans, *others):
            names.update({(p.stage, replace(p.settings, **shared)): p for p in plans})
            wanted = [(p.stage, replace(p.settings, **shared)) for p in plans]
            return make([*others, *wanted], jobs=jobs, done=done)

        shared_s = replace(s, **shared)
        learns = [p for p in first if p.stage == "ppo"]  # from r_φ, which is trained meanwhile
        hashes = run([p for p in first if p not in learns], ("rm", shared_s))
        hashes |= run(learns, ("best-of-n", shared_s))
        rates = chosen_rates(ctx)
        hashes |= run([p for p in finals(s, rates) if p not in first])
    if failed:
        print(f"  {len(failed)} runs diverged and are left out: {'; '.join(failed)}")
    return hashes


def chosen_rates(ctx: Context) -> dict[str, float]:
    """For each method the learning rate with the largest share of the optimal gain."""
    return {row["method"]: row["rate"] for row in rate_table(ctx) if row["chosen"]}


def rate_table(ctx: Context) -> list[dict]:
    """Every candidate, its share (below; None if it failed), and whether it was chosen."""
    table = []
    for p in candidates(ctx.s):
        table.append(dict(method=p.method, setting=p.setting, rate=p.rate,
                          share=share(ctx, p) if finished(ctx, p) else None))
    for method in methods_of(ctx.s):
        rows = [row for row in table if row["method"] == method]
        best = max(rows, key=lambda row: -math.inf if row["share"] is None else row["share"])
        for row in rows:
            row["chosen"] = row is best and row["share"] is not None
    return table


def finished(ctx: Context, p: Planned) -> bool:
    return (ctx.beside(p.settings).folder(p.stage) / "model.pt").exists()


def share(ctx: Context, p: Planned) -> float:
    """Of the optimum's gain in reward at a run's KL, the share that it makes on validation prompts.

    The mean over the second half of its points, where the rate has fallen, as far as they lie in
    the compared range of KL; where none does, minus the last one's KL: the nearest is chosen. The
    optimum's curve, which knows no policy, is the groups stage's, of π_ref on the test prompts.
    """
    before, top, found = ctx.before, top_kl(ctx), evaluations(ctx, p)
    kl, best = zip(*sorted((p["kl"], p["reward"]) for p in before["optimum"]))
    shares = [(x["valid_reward"] - before["valid_reward"])
              / max(0.02, np.interp(x["valid_kl"], kl, best) - best[0])  # near 0 all is noise
              for x in found[len(found) // 2 :] if x["valid_kl"] <= top]
    return float(np.mean(shares)) if shares else -found[-1]["valid_kl"]


# ------------------------------------------------------------------------------ the points


def frontier(ctx: Context, run: Run) -> None:
    """All points of the sweep in frontier.jsonl; rates.json says how the rates were chosen."""
    before = ctx.before
    state = load_tensors(ctx.folder("best-of-n") / "samples.pt")
    s, config = ctx.s, ctx.reference.config
    size = sum(p.numel() for p in ctx.reference.parameters()) / 1e6
    base = np.array(before["point"]["rewards"])

    def line(method, setting, point, seed=0, **more) -> dict:
        row = dict(seed=seed, step=0, temperature=1.0, seconds=0.0) | point | more
        row |= dict(preset=ctx.preset, method=method, setting=setting,
                    model=f"{size:.2g}M parameters, {config.n_layer} layers of {config.n_embd}")
        row.setdefault("win", float(np.mean(in_order(np.array(row["rewards"]), base))))
        return {key: row.get(key) for key in points.KEYS}

    lines = [line("sft", "", before["point"], samples=0, forwards=0,
                  reward_learned=float(state["learned"].mean()))]
    rates = rate_table(ctx)
    plans = [p for p in finals(s, {row["method"]: row["rate"] for row in rates if row["chosen"]})
             if finished(ctx, p)]  # the others diverged
    for p in plans:
        for point in evaluations(ctx, p):
            if p.stage == "dpo":  # its reward model is itself
                point["reward_learned"] = p.settings.beta * point["kl_mc"]
            lines.append(line(p.method, p.setting, point, p.settings.run_seed))
    lines += sampled_lines(ctx, state, base, line)
    if s.temperatures:
        lines += temperature_lines(ctx, plans, before, line)
    save_json(run.path("rates.json"), rates)
    run.finish(lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in lines))


def sampled_lines(ctx: Context, state: dict, base, line) -> list[dict]:
    """Best-of-N by r* and by r_φ, and the optimum: from π_ref's samples (P, K), untrained."""
    s, r, learned = ctx.s, state["rewards"], state["learned"]
    won = torch.from_numpy(in_order(r.numpy().round(4), base[:, None].astype(np.float32)))
    P, lines, learning = len(r), [], rm_cost(ctx)
    for method, scores, learns in (("best-of-n", r, 0), ("best-of-n-learned", learned, 1)):
        for N in (n for n in (1, 2, 4, 8, 16, 64, 128) if n <= s.best_of):
            best, kl = expected_best(scores, r, N), best_of_kl(N)
            lines.append(line(method, f"N={N}", dict(
                reward=float(best.mean()), reward_se=standard_error(best), kl=kl, kl_se=0.0,
                rewards=[round(x, 4) for x in best.tolist()], kls=[round(kl, 4)] * P,
                win=float(expected_best(scores, won, N).mean()),
                reward_learned=float(expected_best(scores, learned, N).mean()),
                seconds=None, samples=P * N + learns * learning[0],
                forwards=P * N + learns * (P * N + learning[1]))))  # r_φ learns, and scores each
    sharpness = sorted({*np.geomspace(0.05, 200, 40).tolist(), *map(float, DIAL)})  # 1/β
    for x, point in zip(sharpness, unbiased(r, [1 / x for x in sharpness])):
        lines.append(line("optimum", f"1/beta={x:.4g}", point, samples=r.numel(),
                          forwards=r.numel(), seconds=None, win=None))
    return lines


def temperature_lines(ctx: Context, plans, before: dict, line) -> list[dict]:
    """One finished policy a method, at temperatures below 1: the best on validation prompts within
    the plotted range of KL; π_ref; and Best-of-N by r_φ of π_ref's samples at that temperature."""
    policies, prompts = [("sft", "", 0, 0, ctx.reference)], before["prompts"]
    for method in ("dpo", "ppo", "preferred-ft"):
        last = [(evaluations(ctx, p)[-1], p) for p in plans if p.method == method]
        if not last:
            continue
        near = [x for x in last if x[0]["valid_kl"] <= top_kl(ctx)] or last
        point, p = max(near, key=lambda x: x[0]["valid_reward"])
        policy = ctx.beside(p.settings).policy(p.stage)
        policies.append((method, p.setting, p.settings.run_seed, point["step"], policy))
    lines, learned, N, learning = [], learned_reward(ctx), min(16, ctx.s.best_of), rm_cost(ctx)
    for t in TEMPERATURES:
        for method, setting, seed, step, policy in policies:
            point = ctx.evaluate(policy, ctx.reference, prompts, temperature=t)
            lines.append(line(method, setting, point, seed, step=step))
        repeated = [p for p in prompts for _ in range(N)]
        with autocast(ctx.device, ctx.s.precision):
            samples = ctx.reference.sample(repeated, ctx.s.max_new, ctx.data.eot, draw_seed(
                ctx.s.seed, "best-of-n", f"temperature {t}"), temperature=t, rows=ctx.rows())
        best = learned(repeated, samples).view(-1, N).argmax(1).tolist()
        rewards = ctx.reward(prompts, [samples[i * N + k] for i, k in enumerate(best)])
        kl = best_of_kl(N)  # to π_ref at this temperature
        lines.append(line("best-of-n-learned", f"N={N}", dict(
            temperature=t, kl=kl, kl_se=0.0, kls=[round(kl, 4)] * len(prompts),
            reward=float(rewards.mean()), reward_se=standard_error(rewards),
            rewards=[round(x, 4) for x in rewards.tolist()], seconds=None,
            samples=learning[0] + len(samples), forwards=learning[1] + 2 * len(samples))))
    return lines


def report_frontier(ctx: Context) -> None:
    folder = ctx.folder("frontier")
    table = read_json(folder / "rates.json")
    for row in table:
        if row["chosen"]:
            tried = [r["rate"] for r in table if r["method"] == row["method"]]
            edge = ", at the edge of what was tried" * (row["rate"] in (min(tried), max(tried)))
            won = f"{row['share']:.3f} of the optimal gain on validation prompts" \
                if row["share"] >= 0 else "the nearest of those that all left the compared KLs"
            less = ", a larger β at less" * any(
                p.rate < row["rate"] for p in finals(ctx.s, {row["method"]: row["rate"]}))
            print(f"  {row['method']:<14} learning rate {row['rate']:g} of "
                  f"{', '.join(f'{rate:g}' for rate in tried)}: {won}{edge}{less}")
    for picture in plot_frontier.draw_frontier(folder / "frontier.jsonl"):
        print(f"picture: {picture}")
