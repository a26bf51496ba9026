"""Run the commands on stdin, `python SCRIPT FLAGS` a line, that have no row in a csv yet; add the rows of each run when
it is finished.

    echo python afa.py --seed 1 | python benchmark/run.py results/afa.csv
    bash benchmark/afa.sh digits --dry-run          # prints what is left to run

With `--audit quick` or `--audit full` each run that has no audit yet gets one (benchmark/audit.py), of the best
checkpoint; runs in the csv too, as long as their folders are there.

A list that was killed is started again and goes on where it was. What is done is told by script, data set, setting and
seed, as benchmark/collect.py does; files that are not the official ones of a data set (`svhn-unofficial`) count for it.
A finished folder in the commands' --runs-dir is collected and not run again: to repeat a run, delete its rows and its
folder. `--control-of RUN` means the run of the same command without it, which is run first if its folder is gone.
"""

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

from benchmark.audit import FULL, QUICK  # noqa: E402
from benchmark.collect import collect, read, rows, setting, writable  # noqa: E402
from common.data import UserError  # noqa: E402
from common.data import parse as parse_arguments  # noqa: E402


@dataclass
class Args:
    out: tyro.conf.Positional[Path]  # csv of the results
    dry_run: bool = False  # print the commands that would run, and run none
    audit: Literal["no", "quick", "full"] = "no"  # audit the runs, and add that to their rows
    also: str = ""  # flags for all commands, as in --also="--data-dir /data --device cuda:1"
    validation: bool = False  # accuracies on validation images, as in benchmark/collect.py


DAMAGED = set()  # results of runs that were warned of


def identity(script, dataset, name, seed):
    return script, dataset.removesuffix("-unofficial"), name, str(seed)


def parse(words):
    """(identity, folder of its runs, device) of the command `words`: python, script, flags. Ends the program if it is
    bad."""
    script = Path(words[1]).stem if len(words) > 1 else ""
    if words[0] != "python" or not (ROOT / f"{script}.py").is_file():
        raise UserError(f"a list has lines `python SCRIPT.py FLAGS`, with a script of {ROOT}, not: {shlex.join(words)}")
    args = tyro.cli(import_module(script).Args, args=words[2:], prog=words[1])
    filled = [k for k, v in asdict(args).items() if v is None]  # the script will do it
    info = {"args": json.loads(json.dumps(asdict(args))), "preset": filled}
    return identity(script, args.dataset, setting(script, info), args.seed), Path(args.runs_dir), args.device


def finished(wanted, runs_dir):
    """The latest finished run of this identity, or None. Warns of a damaged folder, once."""
    found = []
    for path in runs_dir.glob(f"*__{wanted[0]}__{wanted[3]}__*/results.json"):
        try:
            info, results = (json.loads(file.read_text()) for file in (path.with_name("args.json"), path))
            same = identity(wanted[0], info["args"]["dataset"], setting(wanted[0], info), info["seed"]) == wanted
            if results["checkpoints"]["best"] and same:
                found.append(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if path not in DAMAGED:
                print(f"warning: {path.parent} is passed over: {type(error).__name__}: {error}", file=sys.stderr)
            DAMAGED.add(path)
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def execute(words):
    """Run a command, python and a script of this repository; a bad status ends the list."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    command = [sys.executable, ROOT / words[1], *words[2:]]
    if status := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:  # stdin is the list
        print(f"the list ends here: status {status} from {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(status)


def audited(row, mode):
    """Has the row of a best checkpoint the audit that is asked for, of as many images, or a better one?"""
    if mode == "no":
        return True
    enough = ["full", "without AutoAttack", *["quick"] * (mode == "quick")]
    n = (QUICK if mode == "quick" else FULL)["n"]
    return row.get("audit_mode") in enough and int(row["audit_evaluated"]) >= min(n, int(row["evaluated"]))


def run(words, args, folders):
    """Run a command unless its run is finished; its rows go into the csv, its folder into `folders`, by identity."""
    wanted, runs_dir, device = parse(words)
    if wanted in folders:
        return
    folder = finished(wanted, runs_dir)
    if not folder and "--control-of RUN" in (line := shlex.join(words)):
        first = shlex.split(line.replace(" --control-of RUN", ""))
        run(first, args, folders)
        words = [str(folders[parse(first)[0]]) if word == "RUN" else word for word in words]
    if args.dry_run:
        print(f"# finished: {folder}" if folder else shlex.join(words))
    elif not folder:
        execute(words)
        if not (folder := finished(wanted, runs_dir)):
            raise UserError(f"{shlex.join(words)} left no finished run in {runs_dir}")
    if not args.dry_run:
        if args.audit != "no" and not audited(rows(folder)[0], args.audit):  # the best checkpoint comes first
            flags = ["--device", device] * (device != "auto") + ["--quick"] * (args.audit == "quick")
            execute(["python", "benchmark/audit.py", str(folder), *flags])
        collect(args.out, [folder], args.validation)
    folders[wanted] = folder or "RUN"


def main(args, lines):
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not args.dry_run:
        writable(args.out)
    try:
        commands = [shlex.split(line) + shlex.split(args.also) for line in lines]
    except ValueError as error:
        raise UserError(f"a line of the list, or --also, cannot be read: {error}") from None
    # Rows without the audit that is asked for count as missing if it can be had: the run's folder is there.
    done = {identity(*k[:4]): audited(row, args.audit) for k, row in read(args.out).items() if k[4] != "last"}
    left, folders = [], {}
    for words in commands:
        wanted, runs_dir, _ = parse(words)
        if wanted not in done or not done[wanted] and finished(wanted, runs_dir):
            left.append(words)
    print(f"{len(left)} of {len(commands)} runs are missing in {args.out}", file=sys.stderr)
    for words in left:
        run(words, args, folders)


if __name__ == "__main__":
    args = parse_arguments(Args, __doc__)
    signal.signal(signal.SIGINT, lambda *_: None)  # the script at work says how to go on; its status ends the list
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave early
    main(args, sys.stdin.read().splitlines())
