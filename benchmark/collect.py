"""Gather the results.json of runs into a csv, one row per run and checkpoint, and print means over seeds as a table.

    python benchmark/collect.py results/afa.csv runs/digits__afa__*

Rows come from results.json and args.json alone, nothing is typed in. Rows that are in the csv already are kept, and
replaced where the same command was run again on the same seed.
"""

import csv
import importlib
import json
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

from common.data import UserError

NOT_A_SETTING = {"dataset", "preset", "data_dir", "runs_dir", "seed", "device", "resume", "eval_only"}


@dataclass
class Args:
    out: tyro.conf.Positional[Path]  # csv to write
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of finished runs
    checkpoint: str = "best"  # checkpoint of the printed table: best or last
    validation: bool = False  # accuracies of the best epoch on validation images: what a sweep may choose by


def setting(script, info):
    """The arguments of a run that differ from what its data set's preset gives, as flags: its name in tables."""
    module, args = importlib.import_module(script), info["args"]
    usual = {**vars(module.Args()), **module.PRESETS[args["dataset"]][args["preset"]]}
    usual |= getattr(module, "METHODS", {}).get(args.get("method"), {})
    usual = json.loads(json.dumps(usual))  # as args.json has it: a tuple is a list
    skipped = NOT_A_SETTING | set(info.get("preset", []))  # what a script says that it filled in by itself
    changed = {k: v for k, v in args.items() if k not in skipped and v != usual[k]}
    if changed.get("control_of"):  # the folder, and the weight that comes from it, are another with each seed
        changed = {k: v for k, v in changed.items() if k not in ("method", "pairing_weight")} | {"control_of": "RUN"}
    shown = {k: f"{255 * v:g}/255" if k in ("eps", "step_size") else v for k, v in changed.items()}
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in shown.items()]
    return " ".join(([f"--preset {args['preset']}"] if args["preset"] != "fast" else []) + flags) or "default"


def rows(run, validation):
    try:
        info, results = (json.loads((run / name).read_text()) for name in ("args.json", "results.json"))
    except FileNotFoundError as error:
        print(f"warning: left out, for it has not finished: {run} has no {Path(error.filename).name}", file=sys.stderr)
        return
    shared = {k: results[k] for k in ("script", "dataset", "seed")} | {"setting": setting(results["script"], info)}
    names = ("evaluated", "train_seconds", "images_per_second", "device", "python", "torch", "commit", "command")
    rest = {k: results[k] for k in names}
    words = shlex.split(info["command"])  # that began the run, without the folders of the machine that ran it
    for flag in ("--runs-dir", "--data-dir"):
        while flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    words = ["RUN" if before == "--control-of" else word for before, word in zip(["", *words], words)]
    k = next(i for i, word in enumerate(words) if word.endswith(".py"))  # before it python, or torchrun and its flags
    rest["command"] = shlex.join([*words[:k], Path(words[k]).name, *words[k + 1 :]])
    if validation:
        row = {k: results["method"][k] for k in ("val_clean", "val_robust")}
        yield {**shared, "checkpoint": "best", "epoch": results["checkpoints"]["best"]["epoch"], **row,
               "eps": round(255 * results["eps"], 6), **{k: v for k, v in rest.items() if k != "evaluated"}}
        return
    for name, row in results["checkpoints"].items():
        curve = {f"pgd20@{k}": v for k, v in results["robustness_curve"].items()} if name == "best" else {}
        yield {**shared, "checkpoint": name, **row, **curve, "eps": round(255 * results["eps"], 6), **rest}


def key(row):
    return tuple(str(row[k]) for k in ("script", "dataset", "setting", "seed", "checkpoint"))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    known = {}
    if args.out.exists():
        with open(args.out, newline="") as f:
            known = {key(row): row for row in csv.DictReader(f)}
    known |= {key(row): row for run in args.runs for row in rows(run, args.validation)}
    table = [known[k] for k in sorted(known)]
    if not table:
        raise UserError("no runs: name their folders")
    columns = list(dict.fromkeys(k for row in table for k in row))
    with open(args.out, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    groups = defaultdict(list)
    for row in table:
        if row["checkpoint"] == args.checkpoint:
            groups[row["dataset"], row["setting"]].append(row)
    order = "val_clean val_robust worst clean fgsm pgd20 pgd50_margin targeted transfer"
    shown = [c for c in order.split() if c in columns]
    print("| data set | setting | seeds | " + " | ".join(shown) + " |\n" + "|-" * (3 + len(shown)) + "|")
    for (dataset, name), group in groups.items():
        cells = []
        for c in shown:
            values = [100 * float(row[c]) for row in group if row.get(c) not in (None, "")]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "")
        print(f"| {dataset} | {name} | {len(group)} | " + " | ".join(cells) + " |")
