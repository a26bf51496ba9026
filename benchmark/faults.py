"""Is anything lost when a run is killed? Kills one with kill -9 at random moments and looks at what is left.

    python benchmark/faults.py --script afa             # 50 kills, some minutes on a CPU
    python benchmark/faults.py --script abnn --kills 10

It is a tool and no test because it takes minutes: the tests kill each script once or twice. A life begins with
--resume, or anew where there is no last.pt yet. It ends at a random moment of a phase (start-up, training, validation,
saving or evaluation: the one with the fewest kills), or when the run is complete. After every kill each file that
exists must be readable: .pt with weights_only=True, and every .pt and .npz with the checksums in it. Every complete run
must be equal, bit for bit, to one that was never killed: weights, optimisers, results, steps in TensorBoard. (On a CPU:
a GPU does not add in a fixed order.)

A life is a fork of this process, which has imported what the scripts import, and attacks have one step at most:
otherwise nearly all of it would be importing and attacking, where nothing is written.
"""

import json
import logging
import os
import random
import runpy
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch._dynamo  # as an optimiser does
import torchvision  # noqa: F401, as a run does
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard  # noqa: F401  as the scripts do

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data, pgd  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("start-up", "training", "validation", "saving", "evaluation")
# A few small JPEGs in the layout of Tiny-ImageNet, so that a cache of decoded images is written, too.
TINY = ("--dataset tiny-imagenet --train-size 72 --val-size 12 --test-size 1 --arch preactresnet8 --width 2 --epochs 3 "
        "--batch-size 24 --device cpu")
OWN = {"afa": "--attack-steps 2 --gate-epochs 1", "aalp": "--attack-steps 2",
       "vfd_adv": "--attack-steps 2 --teacher-epochs 1", "abnn": "--substitute self --clean-epochs 1"}
VARYING = ("command", "train_seconds", "images_per_second", "peak_memory_gb")  # of results.json: no run repeats them
@dataclass
class Args:
    script: Literal["afa", "aalp", "vfd_adv", "abnn"] = "afa"
    """whose run is killed"""
    kills: int = 50
    """how often"""
    seed: int = 0
    """seed of the moments; they follow the clock, so no two calls kill at the same ones"""
    folder: str | None = None
    """where to work, and what is kept for a look (None: a temporary folder that is removed)"""


def write_images(folder):
    """Three classes of random images: 150 for training, 12 for testing."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 50), ("val", 4)):
        for c in range(3):
            path = folder / "tiny-imagenet-200" / part / f"n{c:02d}"
            path.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (4, 4, 3), np.uint8) // 2 + 40 * c
                Image.fromarray(pixels).resize((64, 64)).save(path / f"{i:02d}.JPEG")


def run_script(script, arguments):
    """The script in this process, which says on standard output which phase begins. Does not return."""

    def announce(module, name, phase):
        function = getattr(module, name)

        def announced(*args, **kwargs):
            os.write(1, f"@{phase}\n".encode())
            return function(*args, **kwargs)

        setattr(module, name, announced)

    announce(data, "batches", "training")
    announce(data, "_write", "saving")
    announce(pgd, "survivors", "validation")
    attack = pgd.pgd
    pgd.pgd = lambda *args, steps, **kwargs: attack(*args, steps=min(steps, 1), **kwargs)
    sys.argv = [f"{script}.py", *arguments]
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def live(script, arguments, target=None):
    """({phase: [seconds]}, the phase in which it was killed) of one life; None when it came to its end before.

    `target` is (phase, the how manyth, delay in seconds), or None. Raises when the script failed.
    """
    time.sleep(1 - time.time() % 1)  # TensorBoard orders the files of a run by the second of their start
    reader, writer = os.pipe()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        os.dup2(writer, 1), os.dup2(writer, 2)
        os.close(reader), os.close(writer)
        run_script(script, arguments)
    os.close(writer)
    phase, begun, tested, deadline, rest = "start-up", time.monotonic(), False, None, b""
    seconds, seen, output = defaultdict(list), Counter([phase]), []
    while True:
        if target and deadline is None and (phase, seen[phase]) == target[:2]:
            deadline = begun + target[2]
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([reader], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            return seconds, phase
        if not (part := os.read(reader, 1 << 16)):
            break
        *lines, rest = (rest + part).split(b"\n")
        for line in (line.decode() for line in lines):
            tested |= line.startswith("testing on")
            new = "evaluation" if line.startswith("testing on") else line[1:] if line[:1] == "@" else None
            new = "evaluation" if tested and new == "validation" else new
            if new and (new != phase or new == "saving"):
                seconds[phase].append(time.monotonic() - begun)
                phase, begun = new, time.monotonic()
                seen[phase] += 1
            output.append(line)
    os.close(reader)
    seconds[phase].append(time.monotonic() - begun)
    if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"{script}.py {shlex.join(arguments)} ended with {status}:\n" + "\n".join(output))
    return seconds, None


def unreadable(folder):
    """Lines on the files below `folder` that exist and cannot be read; unfinished ones (.tmp) do not count."""
    lines = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".pt", ".npz"):
                with zipfile.ZipFile(path) as file:
                    if bad := file.testzip():
                        raise ValueError(f"{bad} is damaged")
                if path.suffix == ".pt":
                    torch.load(path, weights_only=True)
        except Exception as error:
            lines.append(f"{path}: {type(error).__name__}: {error}")
    return lines


def bits(value):
    """A checkpoint's content, with its tensors as bytes."""
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items() if k not in VARYING}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return (str(value.dtype), value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value


def differences(run, whole):
    """Names of what differs between two complete runs."""
    found = []
    for name in sorted({path.name for path in [*run.iterdir(), *whole.iterdir()] if path.suffix in (".pt", ".json")}):
        if name != "args.json":  # it has the command
            try:
                a, b = (torch.load(path / name, weights_only=True) if name.endswith(".pt") else
                        json.loads((path / name).read_text()) for path in (run, whole))
                for content in (a, b):
                    for place in ("runs_dir", "resume"):
                        content.get("args", {}).pop(place, None)
                found += [name] if bits(a) != bits(b) else []
            except FileNotFoundError:
                found.append(name)
    steps = [[e.step for e in EventAccumulator(str(path)).Reload().Scalars("val/clean_acc")] for path in (run, whole)]
    return found + ["steps in TensorBoard"] * (steps[0] != steps[1])


def main(args, folder):
    data_dir, rng, number = folder / "data", random.Random(args.seed), 0
    write_images(data_dir)
    fresh = [*shlex.split(f"{TINY} {OWN[args.script]}"), "--data-dir", str(data_dir), "--runs-dir"]

    def only(runs):
        return next(iter(runs.glob("tiny-imagenet-unofficial__*")), None)

    print(f"{args.script}: a run that is not killed ...", flush=True)
    durations, _ = live(args.script, [*fresh, str(folder / "whole")])
    whole = only(folder / "whole")
    print("; ".join(f"{phase} {len(durations[phase])} x {sum(durations[phase]) / len(durations[phase]):.3f} s"
                    for phase in PHASES))
    print(f"{'kill':>4} {'phase':11} {'after':>8}  files, all of them readable", flush=True)
    killed, faults, leftovers, complete = Counter(), [], 0, 0
    while sum(killed.values()) < args.kills or only(folder / f"runs{number}"):
        runs = folder / f"runs{number}"
        run = only(runs)
        resumable = run and (run / "last.pt").exists()
        if run and not resumable:  # killed between making the folder and last.pt: there is nothing to continue
            shutil.rmtree(run)
        target = None
        if sum(killed.values()) < args.kills:
            phase = min(PHASES, key=lambda name: killed[name])
            length = durations["start-up"][0] if phase == "start-up" else max(durations[phase])
            target = phase, rng.randint(1, min(len(durations[phase]), 4)), rng.uniform(0, length)
        again = ["--resume", str(run), "--data-dir", str(data_dir)]
        seconds, phase = live(args.script, again if resumable else [*fresh, str(runs)], target)
        durations |= seconds  # a machine with other work on it changes its pace
        faults += (bad := unreadable(folder))
        if phase:
            killed[phase] += 1
            files = ", ".join(sorted(path.name for path in folder.joinpath(f"runs{number}").rglob("*")
                                     if path.suffix in (".pt", ".json", ".tmp")))
            print(f"{sum(killed.values()):4} {phase:11} {target[2]:6.3f} s  {files}", *bad, sep="\n     ", flush=True)
        else:
            complete += 1
            differ = differences(only(runs), whole)
            faults += [f"{only(runs)}: not equal to the run that was not killed: {', '.join(differ)}"] * bool(differ)
            print(f"     complete: {'differs: ' + ', '.join(differ) if differ else 'equal to the one not killed'}",
                  flush=True)
            leftovers += len(list(folder.rglob("*.tmp")))
            for path in [*folder.rglob("*.npz"), *folder.rglob("*.tmp")]:
                path.unlink()  # the next run decodes again
            number += 1
    print("; ".join(f"{phase}: {killed[phase]} kills" for phase in PHASES))
    print(f"{sum(killed.values())} kills, {complete} complete runs, {leftovers} unfinished .tmp files left behind; "
          + (f"{len(faults)} FAULTS:\n" + "\n".join(faults) if faults else "everything readable, every run equal"))
    return 1 if faults else 0


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says of each restart that it purges repeated steps
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(args, Path(args.folder or temporary).resolve()))
