"""Lessons on DPO's loss, each a stage: what its parts are for, and where it goes wrong.

inspect shows the importance weights (Section 4's gradient) of a finished dpo run, pair by pair.
degenerate compares DPO with the same run at a constant weight, and with one whose loss has no
π_ref. overoptimisation compares runs on fewer and fewer preferences.
"""

import json
from dataclasses import replace

import numpy as np
import torch

import dpo
from evaluate import correlation, held_out_measures, rank_correlation
from experiments import figures
from experiments.baselines import needs_true_reward
from gpt import pad_rows
from job import Job
from support import student
from support.runs import Run, read_json, read_rows, read_text, write_whole
from support.settings import Settings
from train import (HELD_OUT, STAGES, Stage, build, is_made, parents_of_groups, score,
                   sequence_logps)

# ------------------------------------------------------------------------------ inspect

def inspect(job: Job, run: Run, n_groups: int = 24) -> None:
    """Section 4 on held-out pairs of a finished dpo run: which pairs are pushed, and how hard.

    inspect.json: a row per pair of the first n_groups (r̂, margin, weight, true reward gap,
    gradient norms, cosine, norm of the weighted update), and over all held-out groups the implicit
    reward's accuracy and correlations with r*. inspect.png and inspect.txt show them.
    """
    cfg, groups, policy = job.cfg, job.groups, job.policy("dpo")
    held = np.array(job.split[1])
    prompts, completions = groups.flat(held)
    logps, r = score(job, policy, prompts, completions), torch.from_numpy(groups.rewards[held])
    ref_logps = job.ref_logps[held].flatten()
    implicit = dpo.implicit_reward(logps, ref_logps, cfg.beta).view(r.shape)

    few = r[:n_groups]
    yw_idxs, yl_idxs, _ = dpo.preference_pairs(few)
    with job.autocast():  # one graph per completion: each backward pass crosses one sequence
        one_by_one = [sequence_logps(policy, *(x.to(job.device) for x in pad_rows([x], [y])))[0]
                      for x, y in zip(prompts[: few.numel()], completions)]
    columns, _ = dpo.inspect_pairs(
        one_by_one, ref_logps[: few.numel()].to(job.device), yw_idxs.to(job.device),
        yl_idxs.to(job.device), cfg.beta, list(policy.parameters()),
        student.load_weight(cfg.weight, dpo.WEIGHTS))
    columns["reward_gap"] = few.flatten()[yw_idxs] - few.flatten()[yl_idxs]
    rows = [dict(zip(columns, x)) for x in zip(*(c.tolist() for c in columns.values()))]
    table = dict(pairs=rows, step=cfg.dpo_steps, beta=cfg.beta, groups=len(held),
                 rank_correlation=rank_correlation(implicit, r),
                 correlation=correlation(implicit, r), **held_out_measures(logps, ref_logps, r))
    if is_made(job, "rm"):  # r_φ, if stage rm has run
        table["learned"] = read_json(job.folder("rm") / "report.json")
    text = inspection_text(job, rows, yw_idxs, yl_idxs, prompts, completions)
    write_whole(run.path("inspect.txt"), lambda file: file.write(text.encode()))
    figures.inspection(table, read_rows(job.folder("dpo") / "metrics.jsonl"),
                       run.path("inspect.png"))
    run.finish(json.dumps(table).encode())


def inspection_text(job: Job, rows, yw_idxs, yl_idxs, prompts, completions, n: int = 4) -> str:
    """The n pairs with the largest and the smallest weights, with their texts."""
    enc, lines = job.data.enc, []
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["weight"])
    for title, chosen in (("largest weights: pairs in the wrong order, pushed hardest", order[:n]),
                          ("smallest weights: pairs well in order, left alone", order[::-1][:n])):
        lines += [title, ""]
        for i in chosen:
            lines.append("weight {weight:.3f}  margin {margin:+.2f}  true gap {reward_gap:.2f}  "
                         "|∇w| {norm_w:.1f}  |∇l| {norm_l:.1f}  cosine {cosine:.2f}  "
                         "|update| {update:.2f}".format(**rows[i]))
            for name, at in (("y_w", int(yw_idxs[i])), ("y_l", int(yl_idxs[i]))):
                text = enc.decode([t for t in completions[at] if t != enc.eot_token])
                lines.append(f"  {name}  {enc.decode(prompts[at][1:])}|{text}".replace("\n", " "))
            lines.append("")
    return "\n".join(lines)


def report_inspect(job: Job) -> None:
    folder = job.folder("inspect")
    table = read_json(folder / "inspect.json")
    print("\n" + read_text(folder / "inspect.txt"))
    print(f"is the language model a reward model? on {table['groups']} held-out prompts the "
          f"implicit reward orders {table['accuracy']:.1%} of pairs as r* (or the file) does; rank "
          f"correlation within a prompt {table['rank_correlation']:.3f}, linear "
          f"{table['correlation']:.3f}")
    if learned := table.get("learned"):
        print(f"r_φ, the reward model of stage rm: {learned['accuracy']:.1%}, "
              f"{learned['rank_correlation']:.3f}")
    print(f"picture: {folder / 'inspect.png'}")


# ------------------------------------------------------------------------------ degenerate

# a rate that does not decay, with which a few hundred steps show the difference
ABLATION = dict(dpo_optimizer="adamw", dpo_schedule="constant", dpo_steps=300,
                dpo_warmup=0, eval_every=50, loss="pairwise")


def loss_ablation(cfg: Settings) -> dict[str, Settings]:
    """DPO, and the same with a constant weight, and without π_ref: equal start, data, seed and
    optimizer."""
    lr = 1e-3 if cfg.corpus == "toy" else cfg.dpo_lr
    dpo_run = replace(cfg, weight="sigmoid", dpo_lr=lr, **ABLATION)
    return {"sigmoid": dpo_run, "constant": replace(dpo_run, weight="constant"),
            "reference-free": replace(dpo_run, loss="reference-free")}


def make_dpo_runs(job: Job, runs: dict[str, Settings]) -> dict[str, str]:
    """The dpo runs that a stage compares: name -> hash."""
    return {f"dpo {name}": build(job.beside(cfg), "dpo") for name, cfg in runs.items()}


def dpo_points(job: Job, cfg: Settings) -> list[dict]:
    """A finished dpo run's points, π_ref's at step 0 first."""
    some = np.array(job.split[1][:HELD_OUT])
    ref_logps = job.ref_logps[some].flatten()
    start = held_out_measures(ref_logps, ref_logps, torch.from_numpy(job.groups.rewards[some]))
    rows = read_rows(job.beside(cfg).folder("dpo") / "metrics.jsonl")
    return [dict(step=0, **job.reference_eval["point"] | start)] + \
           [dict(step=row["step"] + 1, **row["eval"]) for row in rows if "eval" in row]


SHOWN = ("step", "kl", "ref_ppl", "logp_chosen", "logp_rejected", "repetition", "eos",
         "grammatical", "reward", "distinct2", "length")


def degenerate(job: Job, run: Run) -> None:
    """The runs' points over the steps: degenerate.json, degenerate.png and degenerate.txt."""
    rows, samples, lines = [], [], []
    for name, cfg in loss_ablation(job.cfg).items():
        rows += [dict(weight=name, **{key: p[key] for key in SHOWN}) for p in dpo_points(job, cfg)]
        samples.append(read_text(job.beside(cfg).folder("dpo") / "samples.txt").split("\n\n"))
    for sigmoid, *others in zip(*samples):
        lines += sigmoid.splitlines()
        for name, text in zip(("w = 1:", "no π_ref:"), others):
            lines += [x.replace("after:", name, 1) for x in text.splitlines()[-1:]]
        lines.append("")
    write_whole(run.path("degenerate.txt"), lambda file: file.write("\n".join(lines).encode()))
    figures.degeneration(rows, run.path("degenerate.png"))
    run.finish(json.dumps(rows).encode())


def report_degenerate(job: Job) -> None:
    folder = job.folder("degenerate")
    rows, last = read_json(folder / "degenerate.json"), []
    for weight, name in (("sigmoid", "DPO, w = σ(-m)"), ("constant", "the same with w = 1"),
                         ("reference-free", "the same without π_ref in the loss")):
        print(f"\n{name}\n" + "".join(f"{key:>14}" for key in SHOWN))
        for row in (row for row in rows if row["weight"] == weight):
            print("".join(f"{'-':>14}" if row[key] is None else f"{row[key]:>14.5g}"
                          for key in SHOWN))
        last.append(row)
    print()
    for name, row in zip(("w = 1", "no π_ref"), last[1:]):
        kl, perplexity = (row[key] / last[0][key] for key in ("kl", "ref_ppl"))
        print(f"at the end, {name} over DPO: KL {kl:.1f} times, perplexity under π_ref "
              f"{perplexity:.1f} times")
    print("\n" + "\n".join(read_text(folder / "degenerate.txt").splitlines()[:18]))
    print(f"\nmore samples: {folder / 'degenerate.txt'}\npicture:      {folder / 'degenerate.png'}")


# ------------------------------------------------------------------------------ overoptimisation

def data_ablation(job: Job) -> dict[str, Settings]:
    """DPO on 60 groups, on 600 and on all: β is small enough for over-optimisation to show."""
    sizes = [n for n in (60, 600) if n < len(job.split[0])]
    cfg = replace(job.cfg, beta=0.5, eval_every=max(1, job.cfg.dpo_steps // 12))
    return {f"{n or len(job.split[0]):,} prompts": replace(cfg, train_prompts=n)
            for n in (*sizes, 0)}


def overoptimisation(job: Job, run: Run) -> None:
    """True reward, implicit reward and KL of the policies' own samples over the steps:
    overoptimisation.json and overoptimisation.png."""
    rows = [dict(run=name, implicit=cfg.beta * p["kl_mc"],
                 **{key: p[key] for key in ("step", "reward", "reward_se", "kl", "grammatical",
                                            "accuracy")})
            for name, cfg in data_ablation(job).items() for p in dpo_points(job, cfg)]
    figures.overoptimisation(rows, job.reference_eval["optimum"], run.path("overoptimisation.png"))
    run.finish(json.dumps(rows).encode())


def report_overoptimisation(job: Job) -> None:
    folder = job.folder("overoptimisation")
    rows = read_json(folder / "overoptimisation.json")
    print(f"\n{'':<15}{'r* at its peak':>16}{'at step':>9}{'r* at the end':>15}"
          f"{'r̂ at the end':>14}{'KL at the end':>15}{'held-out acc.':>15}")
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        peak, end = max(mine, key=lambda row: row["reward"]), mine[-1]
        print(f"{name:<15}{peak['reward']:>16.3f}{peak['step']:>9}{end['reward']:>15.3f}"
              f"{end['implicit']:>14.2f}{end['kl']:>15.2f}{end['accuracy']:>15.3f}")
    print(f"picture: {folder / 'overoptimisation.png'}")


STAGES["inspect"] = Stage(inspect, lambda cfg: ["dpo", "groups"], "inspect.json", report_inspect)
STAGES["degenerate"] = Stage(
    degenerate, lambda cfg: ["groups", *parents_of_groups(cfg)], "degenerate.json",
    report_degenerate, lambda job: make_dpo_runs(job, loss_ablation(job.cfg)))
STAGES["overoptimisation"] = Stage(
    overoptimisation, lambda cfg: needs_true_reward(cfg, "overoptimisation"),
    "overoptimisation.json", report_overoptimisation,
    lambda job: make_dpo_runs(job, data_ablation(job)))
