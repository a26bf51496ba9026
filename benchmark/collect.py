"""Gather the results.json of runs into a csv, one row per run and checkpoint. benchmark/report.py makes tables of it.

    python benchmark/collect.py results/afa.csv runs/digits__afa__*

Rows come from results.json and args.json alone, and from audit.json where benchmark/audit.py has left one; nothing is
typed in. Rows that are in the csv already are kept, and replaced where the same command was run again on the same seed.
"""

import csv
import fcntl
import importlib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

from common.data import UserError, parse

NOT_A_SETTING = {"dataset", "preset", "data_dir", "data_on", "runs_dir", "seed", "device", "resume", "eval_only"}


@dataclass
class Args:
    out: tyro.conf.Positional[Path]  # csv to write
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of finished runs
    validation: bool = False  # accuracies of the best epoch on validation images: what a sweep may choose by


# Arguments of earlier versions, gone since, at the values that say nothing. Runs with others of them keep their name.
GONE = {"afa": {"fusion": "learned"},
        "vfd_adv": {"distance": "mse", "clean_pass": "auto", "teacher_arch": None, "teacher_width": None},
        "abnn": {"substitute_arch": None, "substitute_width": None}}


def setting(script, info):
    """The arguments of a run that differ from what its data set's preset gives, as flags: its name in tables."""
    module, args = importlib.import_module(script), info["args"]
    usual = {**GONE.get(script, {}), **vars(module.Args()), **module.PRESETS[args["dataset"]][args["preset"]]}
    usual |= getattr(module, "METHODS", {}).get("alp" if args.get("control_of") else args.get("method"), {})
    usual = json.loads(json.dumps(usual))  # as args.json has it: a tuple is a list
    # What a script says that it filled in by itself, unless it does so with another value now.
    filled = {k for k in info.get("preset", []) if args[k] is None or usual.get(k) is None or args[k] == usual[k]}
    filled |= {"lr"} & set(info.get("preset", []) if args.get("base") == "mart" else [])  # half of the preset's
    skipped = NOT_A_SETTING | filled
    changed = {k: v for k, v in args.items() if k not in skipped and v != usual.get(k, False)}
    if changed.get("control_of"):  # the folder, and the weight that comes from it, are another with each seed
        changed = {k: v for k, v in changed.items() if k not in ("method", "pairing_weight")} | {"control_of": "RUN"}
    shown = {k: f"{255 * v:g}/255" if k in ("eps", "step_size") else " ".join(map(str, v)) if isinstance(v, list) else v
             for k, v in changed.items()}
    flags = [f"--{'no-' * (v is False)}{k.replace('_', '-')}" + f" {v}" * (not isinstance(v, bool))
             for k, v in shown.items()]
    processes = re.findall(r"--nproc-per-node[ =](\S+)", info.get("command", ""))  # BatchNorm sees other batches then
    flags = [f"{n} processes" for n in processes] + [f"--preset {args['preset']}"] * (args["preset"] != "fast") + flags
    return " ".join(flags) or "default"


def measured(method):
    """What the methods' own claims rest on, from results.json's `method`, as columns: fractions, counts, distances."""
    columns = {f"{row} {attack}": v for row, attacks in method.get("threats", {}).items()
               for attack, v in attacks.items()}
    columns |= {f"{name} pgd20@{k}": v for name, curve in method.get("curves", {}).items() if name != "model"
                for k, v in curve.items()}
    columns |= {f"constant {k}": v for k, v in method.get("constant", {}).items()}  # the control of afa.py
    columns |= {f"{name} monotone {k}": v for name, statistics in method.get("statistics", {}).items()
                for k, v in statistics["monotone_share"].items()}
    if any(map(any, method.get("weight_sd", ()))):  # predicted: not that of a single BatchNorm
        columns |= {f"weight@{255 * e:g}": mean(w) for e, w in zip(method["strengths"], method["weight_mean"])}
        columns |= {f"weight_sd@{255 * e:g}": mean(w) for e, w in zip(method["strengths"], method["weight_sd"])}
    columns |= {f"{net} usefulness {k}": mean(v) for net, row in method.get("usefulness", {}).items()
                for k, v in row.items()}
    columns |= {f"{k} over epochs": mean(v) for k, v in method.get("history", {}).items()
                if k.startswith(("conflicting", "overemphasised", "sample_weight", "label_leak"))}
    columns |= {"warnings": len(method["warnings"])} if "warnings" in method else {}  # of abnn.py: a white box failed
    return columns | method.get("test", {}) | method.get("distance", {})


def on_validation(results):
    """Accuracies of the best epoch on validation images, {column: fraction}; none where a script does not keep them."""
    history, epoch = results.get("method", {}).get("history", {}), results["checkpoints"]["best"]["epoch"]
    return {k: history[k][epoch - 1] for k in ("val_clean", "val_robust") if k in history}


def audited(run, results, args):
    """What benchmark/audit.py has left of the best checkpoint, on how many images, what the script's own attacks leave
    of these, and what it warned of. Nothing where it was at another eps or norm, or of another epoch."""
    path = Path(run) / "audit.json"
    if not path.exists():
        return {}
    best = results["checkpoints"]["best"]["epoch"]
    try:
        found = json.loads(path.read_text())
        if (round(255 * found["eps"], 4), found["norm"], found.get("epoch", best)) != (
                round(255 * results["eps"], 4), args["norm"], best):  # fmt: skip
            print(f"warning: {path} is at another eps or norm, or of another epoch, and left out", file=sys.stderr)
            return {}
        mode = "quick" if found["quick"] else "full" if found["autoattack"] is not None else "without AutoAttack"
        return {"audit": found["worst"], "audit_mode": mode, "audit_evaluated": found["evaluated"],
                "audit_warnings": "; ".join(found["warnings"]), "audit_script": found.get("script_worst")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): make it again") from None


def rows(run, validation=False):
    """The rows of a run's folder, a list of dicts. Where a file of it is missing, none, and a warning."""
    try:
        info, results = (json.loads((Path(run) / name).read_text()) for name in ("args.json", "results.json"))
        return [*_rows(run, info, results, validation)]
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        print(f"warning: left out, for it has {'not finished' if missing == 'results.json' else 'lost a file'}: "
              f"{run} has no {missing}", file=sys.stderr)  # fmt: skip
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{run} has no valid args.json or results.json, or its script is not here: "
                        f"{type(error).__name__}: {error}") from None  # fmt: skip


def _rows(run, info, results, validation):
    shared = {k: results[k] for k in ("script", "dataset", "seed")} | {"setting": setting(results["script"], info)}
    names = ("evaluated", "train_seconds", "images_per_second", "peak_memory_gb", "device", "python", "torch", "commit",
             "command")
    rest = {k: results.get(k) for k in names}  # runs of earlier versions did not measure their memory
    words = shlex.split(info["command"])  # that began the run, without the folders of the machine that ran it
    folder = re.compile(r"--(runs|data)[-_]dir(=.*)?")
    words = [word for before, word in zip(["", *words], words)
             if not folder.fullmatch(word) and not ("=" not in before and folder.fullmatch(before))]  # fmt: skip
    words = ["RUN" if re.fullmatch("--control[-_]of", before) else re.sub("^(--control[-_]of=).*", r"\1RUN", word)
             for before, word in zip(["", *words], words)]  # fmt: skip
    k = [word.endswith(".py") for word in words].index(True)  # before it python, or torchrun and its flags
    rest["command"] = shlex.join([*words[:k], Path(words[k]).name, *words[k + 1 :]])
    eps, method = {"eps": round(255 * results["eps"], 6)}, results.get("method", {})
    if validation:
        if not (row := on_validation(results)):
            raise UserError(f"{run} is of {results['script']}.py, which does not keep validation accuracies")
        yield {**shared, "checkpoint": "best", "epoch": results["checkpoints"]["best"]["epoch"], **row, **eps,
               **{k: v for k, v in rest.items() if k != "evaluated"}}
    else:
        for name, row in results["checkpoints"].items():
            curve = {f"pgd20@{k}": v for k, v in results["robustness_curve"].items()} if name == "best" else {}
            own = {**measured(method), **audited(run, results, info["args"])} if name == "best" else {}
            yield {**shared, "checkpoint": name, **row, **curve, **eps, **rest, **own}


def key(row):
    return tuple(str(row[k]) for k in ("script", "dataset", "setting", "seed", "checkpoint"))


def read(path):
    """The rows of a csv by their key, each {column: text}; none where there is no file."""
    if not Path(path).exists():
        return {}
    try:
        with open(path, newline="") as f:
            table = csv.DictReader(f)
            if table.fieldnames and "setting" not in table.fieldnames:
                raise KeyError("setting")
            return {key(row): row for row in table}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a csv of results ({type(error).__name__}: {error}): it comes first, then the "
                        "folders of runs") from None  # fmt: skip


def writable(out):
    """`out`, of links the file that they lead to. Raises UserError where no csv can be written."""
    out = Path(out).resolve()
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for {out.name}")
    if out.exists() and not out.is_file():  # a file renamed to /dev/null would take its place
        raise UserError(f"{out} is not a csv of results but a folder or a device")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.name} cannot be written to {out.parent}")
    return out


def collect(out, runs, validation=False):
    """Add the rows of the runs' folders to the csv. Returns all its rows."""
    out = writable(out)
    lock = os.open(out.parent, os.O_RDONLY)  # lists of runs may write the same csv: they take turns
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _collect(out, runs, validation)
    finally:
        os.close(lock)


def _collect(out, runs, validation):
    known, new = read(out), {}
    for run in runs:
        if not Path(run).is_dir():
            raise UserError(f"{run} is no folder of a run")
        found = {key(row): row for row in rows(run, validation)}
        if twice := [new[k] for k in found if k in new]:
            print(f"warning: {run} has the script, data, flags and seed of {twice[0]}, and takes its place: give a "
                  "variant a flag or a file of its own", file=sys.stderr)  # fmt: skip
        new |= dict.fromkeys(found, run)
        known |= found
    table = [known[k] for k in sorted(known)]
    if not table:
        raise UserError("no runs: name their folders")
    columns = list(dict.fromkeys(k for row in table for k in row))
    unfinished = Path(f"{out}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", newline="") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        os.replace(unfinished, out)  # a list of runs may be killed at any time
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written ({error.strerror}); what was there before is intact") from None
    return table


if __name__ == "__main__":
    args = parse(Args, __doc__)
    print(f"{args.out}: {len(collect(args.out, args.runs, args.validation))} rows")
