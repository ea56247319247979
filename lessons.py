"""Two stages to learn from: `inspect`, the gradient's weights seen pair by pair, and `degenerate`,
DPO beside the loss that forgot its weight.

They train nothing of their own and know no equation: dpo.py has the gradient, stages.py the runs.

P prompts, K completions a prompt, N pairs.
"""

import json
from dataclasses import replace

import numpy as np
import torch

import dpo
import plot_frontier
from evaluate import correlation, rank_correlation
from gpt import pad_rows
from stages import HELD_OUT, Context, completions_of, held_out_measures, score
from support.runs import Run, read_json, read_rows, write_whole
from support.settings import Settings
from train import autocast

# ------------------------------------------------------------------------------ inspect


def inspect_stage(ctx: Context, run: Run, groups: int = 24) -> None:
    """Section 4 on held-out pairs of a finished dpo run: who is pushed, how hard, and why.

    inspect.json: a row a pair (r̂, margin, weight, true reward gap, gradient norms, cosine, norm of
    the weighted update), and over all held-out groups the implicit reward's accuracy and its
    correlations with r*. inspect.png and inspect.txt show them.
    """
    s, made, weight = ctx.s, ctx.groups, dpo.load_weight(ctx.s.weight)
    ref_logps, (_, held) = ctx.ref_logps, ctx.split
    policy = ctx.policy("dpo")
    K, picks = len(made.completion_ids[0]), np.array(held)
    prompts, completions = completions_of(made, picks)
    logps, r = score(ctx, policy, prompts, completions), torch.from_numpy(made.rewards[picks])
    implicit = dpo.implicit_reward(logps, ref_logps[picks].flatten(), s.beta).view(-1, K)

    few = torch.from_numpy(made.rewards[picks[:groups]])
    yw_idxs, yl_idxs, _ = dpo.preference_pairs(few)
    B = few.numel()
    columns, _ = dpo.inspect_pairs(
        one_by_one(ctx, policy, prompts[:B], completions[:B]),
        ref_logps[picks[:groups]].flatten().to(ctx.device), yw_idxs.to(ctx.device),
        yl_idxs.to(ctx.device), s.beta, list(policy.parameters()), weight)
    columns["reward_gap"] = few.flatten()[yw_idxs] - few.flatten()[yl_idxs]
    rows = [dict(zip(columns, values))
            for values in zip(*(column.tolist() for column in columns.values()))]
    table = dict(pairs=rows, step=s.dpo_steps, beta=s.beta, groups=len(picks),
                 rank_correlation=rank_correlation(implicit, r),
                 correlation=correlation(implicit, r),
                 **held_out_measures(logps, ref_logps[picks].flatten(), r))
    if (learned := ctx.folder("rm") / "report.json").exists():  # --stage rm has made it
        table["learned"] = read_json(learned)
    text = inspection_text(ctx, rows, yw_idxs, yl_idxs, prompts, completions)
    write_whole(run.path("inspect.txt"), lambda file: file.write(text.encode()))
    plot_frontier.inspection(table, read_rows(ctx.folder("dpo") / "metrics.jsonl"),
                             run.path("inspect.png"))
    run.finish(lambda file: file.write(json.dumps(table).encode()))


def one_by_one(ctx: Context, policy, prompts, completions) -> list[torch.Tensor]:
    """log π(y|x) of each completion with a graph of its own: a backward then passes through one
    sequence, not through the whole batch."""
    out = []
    with autocast(ctx.device, ctx.s.precision):  # as π_ref was scored; once: one cast of the blocks
        for prompt, completion in zip(prompts, completions):
            idx, prompt_lens, lengths = (x.to(ctx.device) for x in pad_rows([prompt], [completion]))
            mask = dpo.completion_mask(prompt_lens, lengths, idx.size(1))
            logps = policy.token_logps(idx, mask)
            out.append(dpo.completion_logps(logps, prompt_lens, lengths)[0])
    return out


def inspection_text(ctx: Context, rows, yw_idxs, yl_idxs, prompts, completions, n: int = 4) -> str:
    """The pairs with the largest and the smallest weights, with their texts."""
    enc, lines = ctx.data.enc, []
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["weight"])
    for title, chosen in (("largest weights: pairs in the wrong order, pushed hardest", order[:n]),
                          ("smallest weights: pairs well in order, left alone", order[::-1][:n])):
        lines += [title, ""]
        for i in chosen:
            row, w, l = rows[i], int(yw_idxs[i]), int(yl_idxs[i])
            lines.append(
                f"weight {row['weight']:.3f}  margin {row['margin']:+.2f}  true gap "
                f"{row['reward_gap']:.2f}  |∇w| {row['norm_w']:.1f}  |∇l| {row['norm_l']:.1f}  "
                f"cosine {row['cosine']:.2f}  |update| {row['update']:.2f}")
            for name, at in (("y_w", w), ("y_l", l)):
                text = enc.decode([t for t in completions[at] if t != enc.eot_token])
                lines.append(f"  {name}  {enc.decode(prompts[at][1:])}|{text}".replace("\n", " "))
            lines.append("")
    return "\n".join(lines)


def report_inspect(ctx: Context) -> None:
    folder = ctx.folder("inspect")
    table = read_json(folder / "inspect.json")
    print("\n" + (folder / "inspect.txt").read_text())
    print(f"is the language model a reward model? on {table['groups']} held-out prompts the "
          f"implicit reward orders {table['accuracy']:.1%} of pairs as r* (or the file) does; rank "
          f"correlation within a prompt {table['rank_correlation']:.3f}, linear "
          f"{table['correlation']:.3f}")
    if learned := table.get("learned"):
        print(f"r_φ, a reward model trained on the same pairs: {learned['accuracy']:.1%}, "
              f"{learned['rank_correlation']:.3f}")
    print(f"picture: {folder / 'inspect.png'}")


# ------------------------------------------------------------------------------ degenerate


# settings of their own, where some hundreds of steps show it: a small β, a rate that does not fall
TWIN = dict(beta=0.1, dpo_optimizer="adamw", dpo_schedule="constant", dpo_steps=300, dpo_warmup=0,
            eval_every=50, loss="pairwise")


def twins(s: Settings) -> list[Settings]:
    """DPO and its constant-weight twin: the same reference, data, seed and optimiser."""
    lr = 1e-3 if s.corpus == "toy" else s.dpo_lr
    return [replace(s, weight=weight, dpo_lr=lr, **TWIN) for weight in ("sigmoid", "constant")]


KEYS = ("step", "kl", "ref_ppl", "logp_chosen", "logp_rejected", "repetition", "eos", "grammatical",
        "reward", "distinct2", "length")


def degenerate(ctx: Context, run: Run) -> None:
    """Both twins' points over the steps: degenerate.json, degenerate.png and degenerate.txt."""
    rows, samples = [], []
    before, some = ctx.before, np.array(ctx.split[1][:HELD_OUT])
    ref_logps = ctx.ref_logps[some].flatten()
    start = held_out_measures(ref_logps, ref_logps, torch.from_numpy(ctx.groups.rewards[some]))
    for s in twins(ctx.s):
        folder = ctx.beside(s).folder("dpo")
        points = [dict(step=0, **before["point"] | start)]
        points += [dict(step=row["step"] + 1, **row["eval"])
                   for row in read_rows(folder / "metrics.jsonl") if "eval" in row]
        rows += [dict(weight=s.weight, **{key: p[key] for key in KEYS}) for p in points]
        samples.append((folder / "samples.txt").read_text().split("\n\n"))
    lines = []
    for dpo_sample, naive in zip(*samples):
        naive = naive.splitlines()[-1:]
        lines += dpo_sample.splitlines() + [x.replace("after:", "w = 1:", 1) for x in naive] + [""]
    write_whole(run.path("degenerate.txt"), lambda file: file.write("\n".join(lines).encode()))
    plot_frontier.degeneration(rows, run.path("degenerate.png"))
    run.finish(lambda file: file.write(json.dumps(rows).encode()))


def report_degenerate(ctx: Context) -> None:
    folder = ctx.folder("degenerate")
    rows = read_json(folder / "degenerate.json")
    for weight, name in (("sigmoid", "DPO, w = σ(-m)"), ("constant", "the same with w = 1")):
        print(f"\n{name}\n" + "".join(f"{key:>14}" for key in KEYS))
        for row in rows:
            if row["weight"] == weight:
                cells = ("-" if row[key] is None else f"{row[key]:.5g}" for key in KEYS)
                print("".join(f"{cell:>14}" for cell in cells))
    end = [[row for row in rows if row["weight"] == w][-1] for w in ("sigmoid", "constant")]
    kl, perplexity = (end[1][key] / end[0][key] for key in ("kl", "ref_ppl"))
    print(f"\nat the end, w = 1 over DPO: KL {kl:.1f} times, perplexity under π_ref "
          f"{perplexity:.1f} times\n")
    print("\n".join((folder / "degenerate.txt").read_text().splitlines()[:15]))
    print(f"\nmore samples: {folder / 'degenerate.txt'}\npicture:      {folder / 'degenerate.png'}")
