"""Reads for the figures: the points of a frontier.jsonl, the steps and evaluations of a run.

Numbers and names are checked here, so that no figure needs to check them. It needs no torch.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from support.runs import (UserError, first_ten, hash_of_files, read_json, read_rows,
                          reading)

KEYS = ("preset model method setting seed step temperature reward reward_se kl kl_se kl_mc "
        "kl_mc_se length eos distinct2 repetition grammatical ref_ppl win ess "
        "seconds samples rewards kls").split()  # of every line of frontier.jsonl
HUGE = 1e39  # more than a float32 holds, so no run has logged it


def number(x, low: float = -HUGE) -> float:
    """x itself. ValueError if it is a text, a boolean, NaN, or not from low to HUGE."""
    if type(x) not in (int, float) or not low <= x <= HUGE:
        raise ValueError(f"{x!r} is no number from {low:g} to {HUGE:g}")
    return x


def numbers(values: dict, keys: Sequence[str]) -> dict:
    """The values of these keys. KeyError or ValueError if one is no number, or is a negative
    standard error. None means that there is no such measure, and is kept."""
    return {key: x if (x := values[key]) is None else number(x, 0 if key.endswith("_se") else -HUGE)
            for key in keys}


def setting_value(setting: str) -> float:
    """0.1 for "beta=0.1" and for "beta=0.1 rate=0.0007"; 0 for a method without a setting."""
    return float(setting.partition("=")[2].partition(" ")[0] or 0)


def read_points(path: Path) -> list[dict]:
    """The points of a frontier.jsonl, or of the one in a folder, in the order of the file.

    Skips lines that hold no point, and points whose preset or number of prompts differs from that
    of most points. A sentence on stderr names the skipped lines. UserError if there is no file, or
    no point in it.
    """
    remedy = "run `python train.py --stage frontier`"
    with reading(path):
        path = path / "frontier.jsonl" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"there is no file {path}: {remedy}")
        lines = path.read_bytes().splitlines()
    points = {i: p for i, line in enumerate(lines, 1) if (p := point_of(line))}
    if not points:
        raise UserError(f"{path} holds no point: give another, or {remedy}")
    kinds = {i: (p["preset"], len(p["rewards"])) for i, p in points.items()}
    usual, _ = Counter(kinds.values()).most_common(1)[0]
    kept = {i: p for i, p in points.items() if kinds[i] == usual}
    if skipped := [i for i in range(1, len(lines) + 1) if i not in kept]:
        print(f"skipped {len(skipped)} of {len(lines)} lines of {path}, which hold no point of "
              f"this frontier: {first_ten(skipped)}", file=sys.stderr)
    return list(kept.values())


def point_of(line: bytes) -> dict | None:
    """The point on a line. None if it is not JSON, lacks a key, or lacks a number or a name."""
    try:
        point = json.loads(line)
        numbers(point, "kl_mc win ess seconds samples".split())
        known = numbers(point, "seed step temperature kl kl_se reward reward_se".split())
        for x in (*known.values(), *point["rewards"], *point["kls"],
                  setting_value(point["setting"])):
            number(x)
        whole = point.keys() >= set(KEYS) and len(point["rewards"]) == len(point["kls"]) > 1
        whole &= 0 <= (point["win"] or 0) <= 1
        for name in (point[key] for key in "preset model method setting".split()):
            whole &= len(name) < 100 and name.isprintable() and "$" not in name  # $: a formula
        return point if whole else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


DPO_LOGGED = [*"loss margin reward_chosen reward_rejected accuracy".split(),
              *(f"weight_{p}" for p in (5, 25, 50, 75, 95))]  # in every step's row
PPO_LOGGED = "reward kl beta explained_variance clip_fraction".split()


def read_curves(folder: Path) -> tuple[dict, list[dict], list[dict], list[dict]]:
    """A DPO or PPO run: its title and settings; its steps; its evaluations; and in the order of KL
    the points of the optimum that have at least 2 effective samples per prompt.

    The evaluation at step 0 and the optimum stand in the folder of the run's groups, beside this
    folder. UserError where the folder holds no such run, or a file is damaged.
    """
    metrics, measures = folder / "metrics.jsonl", "kl kl_se reward reward_se".split()
    rows = read_rows(metrics)
    steps = [row for row in rows if "eval" not in row]
    keys = [k for k in (DPO_LOGGED, PPO_LOGGED) if steps and k[-1] in steps[0]]
    if not keys:
        raise UserError(f"{folder} holds no run of dpo or ppo: give the folder of such a run, or of"
                        " a frontier")
    with reading(folder / "config.json"):
        config = read_json(folder / "config.json")
        about, settings = config["about"], config["settings"]
        used = dict(beta=1e-9, num_completions=1) if keys[0] is DPO_LOGGED else dict(ppo_target=0)
        run = {key: number(settings[key], low) for key, low in used.items()}
        run |= dict(stage=str(about.get("stage")), loss=str(settings.get("loss")),
                    title=str(about.get("title", folder.name)))
        made_from, groups = config["parents"]["groups"], []
    for path in folder.parent.glob("groups*/config.json"):
        with suppress(UserError), reading(path):  # a damaged folder holds another run's groups
            if hash_of_files(read_json(path)["files"]) == made_from:
                groups.append(path.parent)
    if not groups:
        raise UserError(f"no folder {folder.parent / 'groups*'} holds the groups of this run: "
                        "repeat the command that made the run, and it makes them again")
    reference_json = groups[0] / "reference.json"
    with reading(reference_json):
        reference = read_json(reference_json)
        evals = [numbers(reference["point"], measures) | dict(step=0, accuracy=None)]
        optimum = [numbers(p, ("kl", "reward", "ess")) for p in reference["optimum"]]
        optimum = sorted((p for p in optimum if p["ess"] >= 2), key=lambda p: p["kl"])
    with reading(metrics):
        evals += [numbers(dict(accuracy=None) | row["eval"] | dict(step=row["step"] + 1),
                          ["step", "accuracy", *measures]) for row in rows if "eval" in row]
        for row in steps:
            for key in keys[0]:
                number(row[key])
    return run, steps, evals, optimum
