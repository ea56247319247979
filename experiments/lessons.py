"""Three stages that show what the parts of DPO's loss do, and how DPO can fail.

inspect shows the importance weight (Section 4's gradient) of single pairs in a finished dpo run.
degenerate compares DPO with the same runs at a constant weight, and with runs whose loss has no
π_ref. overoptimisation compares runs on 60, on 600 and on all preference groups.
"""

import json
from dataclasses import replace

import numpy as np
import torch

import dpo
from evaluate import (COLUMNS, correlation, held_out_measures, one_line, rank_correlation,
                      read_samples, table)
from experiments import figures
from experiments.baselines import needs_true_reward
from gpt import pad_rows
from job import Job
from support import student
from support.runs import Run, read_json, read_rows, read_text, write_whole
from support.settings import Settings
from train import (HELD_OUT, STAGES, Stage, build, is_made, needs, parents_of_groups, score,
                   sequence_logps)

# ------------------------------------------------------------------------------ inspect

def inspect(job: Job, run: Run, n_groups: int = 24) -> None:
    """Section 4 on held-out pairs of a finished dpo run: which pairs the gradient pushes hardest.

    inspect.json holds a row per pair of the first n_groups: r̂, margin, weight, true reward gap,
    gradient norms, cosine, norm of the weighted update. Over all held-out groups it holds the
    accuracy of r̂ and its correlations with r*, and the shares of pairs that log π_θ and log π_ref
    order as r* does. inspect.png and inspect.txt show them.
    """
    cfg, groups, policy = job.cfg, job.groups, job.policy("dpo")
    held = np.array(job.split[1])
    prompts, completions = groups.flat(held)
    logps, r = score(job, policy, prompts, completions), torch.from_numpy(groups.rewards[held])
    ref_logps = job.ref_logps[held].flatten()
    implicit = dpo.implicit_reward(logps, ref_logps, cfg.beta).view(r.shape)

    few = r[:n_groups]
    yw_idxs, yl_idxs, _ = dpo.preference_pairs(few)
    with job.autocast():  # one graph per completion: a backward pass runs through one sequence
        one_by_one = [sequence_logps(policy, *(x.to(job.device) for x in pad_rows([x], [y])))[0]
                      for x, y in zip(prompts[: few.numel()], completions)]
    columns, _ = dpo.inspect_pairs(
        one_by_one, ref_logps[: few.numel()].to(job.device), yw_idxs.to(job.device),
        yl_idxs.to(job.device), cfg.beta, list(policy.parameters()),
        student.load_weight(cfg.weight, dpo.WEIGHTS))
    columns["reward_gap"] = few.flatten()[yw_idxs] - few.flatten()[yl_idxs]
    rows = [dict(zip(columns, x)) for x in zip(*(c.tolist() for c in columns.values()))]
    results = dict(pairs=rows, step=cfg.dpo_steps, beta=cfg.beta, groups=len(held),
                   rank_correlation=rank_correlation(implicit, r),
                   correlation=correlation(implicit, r), **held_out_measures(logps, ref_logps, r),
                   ref_logp_accuracy=held_out_measures(ref_logps, ref_logps, r)["logp_accuracy"])
    if is_made(job, "rm"):  # r_φ, if stage rm has run
        results["learned"] = read_json(job.folder("rm") / "report.json")
    text = inspection_text(job, rows, yw_idxs, yl_idxs, prompts, completions)
    write_whole(run.path("inspect.txt"), lambda file: file.write(text.encode()))
    figures.inspection(results, read_rows(job.folder("dpo") / "metrics.jsonl"),
                       run.path("inspect.png"))
    run.finish(json.dumps(results).encode())


def inspection_text(job: Job, rows, yw_idxs, yl_idxs, prompts, completions, n: int = 4) -> str:
    """The n pairs with the largest and the smallest weights, with their texts."""
    enc, lines = job.data.enc, []
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["weight"])
    for title, chosen in (
            ("largest weights: pairs in the wrong order, which are pushed hardest", order[:n]),
            ("smallest weights: pairs clearly in the right order, hardly pushed", order[::-1][:n])):
        lines += [title, ""]
        for i in chosen:
            lines.append("weight {weight:.3f}  margin {margin:+.2f}  true gap {reward_gap:.2f}  "
                         "|∇w| {norm_w:.1f}  |∇l| {norm_l:.1f}  cosine {cosine:.2f}  "
                         "|update| {update:.2f}".format(**rows[i]))
            for name, at in (("y_w", int(yw_idxs[i])), ("y_l", int(yl_idxs[i]))):
                lines.append(f"  {name}  {one_line(enc, prompts[at])}|"
                             f"{one_line(enc, completions[at])}")
            lines.append("")
    return "\n".join(lines)


def report_inspect(job: Job) -> None:
    folder = job.folder("inspect")
    results = read_json(folder / "inspect.json")
    print("\n" + read_text(folder / "inspect.txt"))
    print(f"Is the language model a reward model? On {results['groups']} held-out prompts r̂ "
          f"orders {results['accuracy']:.1%} of pairs\nas r* (or the file) does. Correlation of "
          f"r̂ with r* within a prompt: {results['rank_correlation']:.3f} (ranks), "
          f"{results['correlation']:.3f} (linear).")
    print(f"Does DPO make π(y_w) > π(y_l)? log π_θ orders {results['logp_accuracy']:.1%} of these "
          f"pairs as r* does, and\nlog π_ref {results['ref_logp_accuracy']:.1%}. Eq. 7 makes the "
          "ratio π_θ/π_ref larger for y_w than for y_l, not π_θ itself.")
    if learned := results.get("learned"):
        print(f"r_φ, the reward model of stage rm, orders {learned['accuracy']:.1%}; its rank "
              f"correlation is {learned['rank_correlation']:.3f}")
    print(f"picture: {folder / 'inspect.png'}")


# ------------------------------------------------------------------------------ degenerate

# the learning rate does not decay, so that a few hundred steps show the difference
ABLATION = dict(dpo_optimizer="adamw", dpo_schedule="constant", dpo_steps=300,
                dpo_warmup=0, eval_every=50)
SEEDS = 3  # runs per loss: a seed sets the order of the batches


def loss_ablation(cfg: Settings) -> dict[str, Settings]:
    """DPO; the same with a constant weight; the same without π_ref; and, if --weight names a third
    weight, the same with it. All have the same start, data, optimizer and seeds."""
    lr = 1e-3 if cfg.corpus == "toy" else cfg.dpo_lr
    dpo_run = replace(cfg, weight="sigmoid", dpo_lr=lr, **ABLATION)
    losses = {"sigmoid": dpo_run, "constant": replace(dpo_run, weight="constant"),
              "reference-free": replace(dpo_run, loss="reference-free")}
    losses.setdefault(cfg.weight, replace(dpo_run, weight=cfg.weight))
    return {f"{name} {seed}": replace(loss, run_seed=seed) for name, loss in losses.items()
            for seed in range(cfg.run_seed, cfg.run_seed + SEEDS)}


def make_dpo_runs(job: Job, runs: dict[str, Settings]) -> dict[str, str]:
    """The dpo runs that a stage compares: name -> hash."""
    return {f"dpo {name}": build(job.beside(cfg), "dpo") for name, cfg in runs.items()}


def dpo_points(job: Job, cfg: Settings) -> list[dict]:
    """The points of a finished dpo run. The first one is π_ref, at step 0."""
    some = np.array(job.split[1][:HELD_OUT])
    ref_logps = job.ref_logps[some].flatten()
    start = held_out_measures(ref_logps, ref_logps, torch.from_numpy(job.groups.rewards[some]))
    rows = read_rows(job.beside(cfg).folder("dpo") / "metrics.jsonl")
    return [dict(step=0, **job.reference_eval["point"] | start)] + \
           [dict(step=row["step"] + 1, **row["eval"]) for row in rows if "eval" in row]


SHOWN = ("step", "kl", "ref_ppl", "logp_chosen", "logp_rejected", "repetition", "eos",
         "grammatical", "reward", "distinct2", "length")


def degenerate(job: Job, run: Run) -> None:
    """degenerate.json holds the points of all runs, degenerate.png draws them, and degenerate.txt
    shows samples of the first seed."""
    rows, samples = [], {}
    for name, cfg in loss_ablation(job.cfg).items():
        name = name.rpartition(" ")[0]
        rows += [dict(weight=name, seed=cfg.run_seed, **{key: p[key] for key in SHOWN})
                 for p in dpo_points(job, cfg)]
        samples.setdefault(name, read_samples(job.beside(cfg).folder("dpo") / "samples.txt"))
    labels = ["prompt", "π_ref", *map(figures.loss_label, samples)]
    width, blocks = max(map(len, labels)) + 2, []
    for first, *others in zip(*samples.values()):  # a prompt, π_ref's sample and a policy's, each
        lines = [*first, *(policy for *_, policy in others)]
        blocks.append([f"{label + ':':<{width}}{line[9:]}"  # without the label of samples.txt
                       for label, line in zip(labels, lines)])
    text = "\n\n".join("\n".join(block) for block in blocks)
    write_whole(run.path("degenerate.txt"), lambda file: file.write(text.encode()))
    figures.degeneration(rows, blocks[0], run.path("degenerate.png"))
    run.finish(json.dumps(rows).encode())


def report_degenerate(job: Job) -> None:
    folder = job.folder("degenerate")
    rows = read_json(folder / "degenerate.json")
    last = {(row["weight"], row["seed"]): row for row in rows}  # keeps the last step
    points = {"π_ref": rows[0]} | {f"{figures.loss_label(name)}, seed {seed}": row
                                   for (name, seed), row in last.items()}
    columns = {"KL, nats": ("kl", 2, "KL(π ‖ π_ref) per completion"),
               "perplexity": ("ref_ppl", 1, "of the samples under π_ref"),
               "log π(y_w)": ("logp_chosen", 1, "of held-out chosen completions")}
    others = "repeated", "ended", "grammatical", "reward r*"
    print(f"\nafter {rows[-1]['step']} steps; a seed sets the order of the batches\n" + table(
        points, columns | {title: COLUMNS[title] for title in others}) + "\n")
    for name in dict.fromkeys(row["weight"] for row in rows):
        if name != "sigmoid":
            print(f"{figures.loss_label(name)} ends at {figures.times_dpo(rows, name, 'kl')} times "
                  f"DPO's KL and {figures.times_dpo(rows, name, 'ref_ppl')} times its perplexity")
    print("\n" + "\n\n".join(map("\n".join, read_samples(folder / "degenerate.txt")[:3])))
    print("\nLook at perplexity and the samples: reward alone may not show that texts are broken.\n"
          f"samples: {folder / 'degenerate.txt'}\npicture: {folder / 'degenerate.png'}")
    if job.cfg.weight in dpo.WEIGHTS:
        print("next:    the same command with --weight FILE.py:FUNCTION draws your own weight too")


# ------------------------------------------------------------------------------ overoptimisation

def data_ablation(job: Job) -> dict[str, Settings]:
    """DPO on 60 groups, on 600 and on all. β is so small that over-optimisation shows."""
    sizes = [n for n in (60, 600) if n < len(job.split[0])]
    cfg = replace(job.cfg, beta=0.5, eval_every=max(1, job.cfg.dpo_steps // 12))
    return {f"{n or len(job.split[0]):,} prompts": replace(cfg, train_prompts=n)
            for n in (*sizes, 0)}


def overoptimisation(job: Job, run: Run) -> None:
    """True reward, implicit reward and KL of each policy's own samples over the steps, in
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
    points = {}
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        peak = max(mine, key=lambda row: row["reward"])
        points[name] = mine[-1] | dict(peak=peak["reward"], at=peak["step"])
    print("\n" + table(points, {
        "highest r*": ("peak", 3, "mean true reward of the best evaluation"),
        "at step": ("at", 0, "of that evaluation"), "last r*": ("reward", 3, "after the last step"),
        "implicit": ("implicit", 2, "mean implicit reward of π_θ's own samples"),
        "last KL": ("kl", 2, "KL(π ‖ π_ref) in nats per completion"),
        "accuracy": COLUMNS["accuracy"]}))
    print("Look at the fewest prompts: the implicit reward rises, r* does not.\n"
          f"picture: {folder / 'overoptimisation.png'}")


STAGES["inspect"] = Stage(inspect, lambda cfg: ["dpo", "groups"], "inspect.json", report_inspect)
STAGES["degenerate"] = Stage(
    degenerate, lambda cfg: needs(
        cfg.labels != "hard" or cfg.loss != "pairwise", "--stage degenerate chooses losses itself "
        "and takes hard labels: leave --labels and --loss out",
        ["groups", *parents_of_groups(cfg)]), "degenerate.json",
    report_degenerate, lambda job: make_dpo_runs(job, loss_ablation(job.cfg)))
STAGES["overoptimisation"] = Stage(
    overoptimisation, lambda cfg: needs_true_reward(cfg, "overoptimisation"),
    "overoptimisation.json", report_overoptimisation,
    lambda job: make_dpo_runs(job, data_ablation(job)))
