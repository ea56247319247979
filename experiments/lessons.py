"""Two lessons on the importance weight of Section 4's gradient, which dpo.py has.

inspect shows a finished dpo run's weights pair by pair. degenerate compares DPO with the same run
at a constant weight.
"""

import json
from dataclasses import replace

import numpy as np
import torch

import dpo
from evaluate import correlation, held_out_measures, rank_correlation
from experiments import figures
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
        print(f"r_φ, a reward model trained on the same pairs: {learned['accuracy']:.1%}, "
              f"{learned['rank_correlation']:.3f}")
    print(f"picture: {folder / 'inspect.png'}")


# ------------------------------------------------------------------------------ degenerate

# a small β and a rate that does not decay, with which a few hundred steps show the difference
ABLATION = dict(beta=0.1, dpo_optimizer="adamw", dpo_schedule="constant", dpo_steps=300,
                dpo_warmup=0, eval_every=50, loss="pairwise")


def weight_ablation(cfg: Settings) -> list[Settings]:
    """DPO, and the same with a constant weight: equal reference, data, seed and optimizer."""
    lr = 1e-3 if cfg.corpus == "toy" else cfg.dpo_lr
    return [replace(cfg, weight=x, dpo_lr=lr, **ABLATION) for x in ("sigmoid", "constant")]


def make_ablation(job: Job) -> dict[str, str]:
    return {f"dpo {cfg.weight}": build(job.beside(cfg), "dpo") for cfg in weight_ablation(job.cfg)}


SHOWN = ("step", "kl", "ref_ppl", "logp_chosen", "logp_rejected", "repetition", "eos",
         "grammatical", "reward", "distinct2", "length")


def degenerate(job: Job, run: Run) -> None:
    """Both runs' points over the steps: degenerate.json, degenerate.png and degenerate.txt."""
    rows, samples = [], []
    some = np.array(job.split[1][:HELD_OUT])
    ref_logps = job.ref_logps[some].flatten()
    start = held_out_measures(ref_logps, ref_logps, torch.from_numpy(job.groups.rewards[some]))
    for cfg in weight_ablation(job.cfg):
        folder = job.beside(cfg).folder("dpo")
        points = [dict(step=0, **job.reference_eval["point"] | start)]
        points += [dict(step=row["step"] + 1, **row["eval"])
                   for row in read_rows(folder / "metrics.jsonl") if "eval" in row]
        rows += [dict(weight=cfg.weight, **{key: p[key] for key in SHOWN}) for p in points]
        samples.append(read_text(folder / "samples.txt").split("\n\n"))
    lines = []
    for sigmoid, constant in zip(*samples):
        constant = constant.splitlines()[-1:]
        lines += [*sigmoid.splitlines(), *(x.replace("after:", "w = 1:", 1) for x in constant), ""]
    write_whole(run.path("degenerate.txt"), lambda file: file.write("\n".join(lines).encode()))
    figures.degeneration(rows, run.path("degenerate.png"))
    run.finish(json.dumps(rows).encode())


def report_degenerate(job: Job) -> None:
    folder = job.folder("degenerate")
    rows, last = read_json(folder / "degenerate.json"), []
    for weight, name in (("sigmoid", "DPO, w = σ(-m)"), ("constant", "the same with w = 1")):
        print(f"\n{name}\n" + "".join(f"{key:>14}" for key in SHOWN))
        for row in (row for row in rows if row["weight"] == weight):
            print("".join(f"{'-':>14}" if row[key] is None else f"{row[key]:>14.5g}"
                          for key in SHOWN))
        last.append(row)
    kl, perplexity = (last[1][key] / last[0][key] for key in ("kl", "ref_ppl"))
    print(f"\nat the end, w = 1 over DPO: KL {kl:.1f} times, perplexity under π_ref "
          f"{perplexity:.1f} times\n")
    print("\n".join(read_text(folder / "degenerate.txt").splitlines()[:15]))
    print(f"\nmore samples: {folder / 'degenerate.txt'}\npicture:      {folder / 'degenerate.png'}")


STAGES["inspect"] = Stage(inspect, lambda cfg: ["dpo", "groups"], "inspect.json", report_inspect)
STAGES["degenerate"] = Stage(degenerate, lambda cfg: ["groups", *parents_of_groups(cfg)],
                             "degenerate.json", report_degenerate, make_ablation)
