"""Data sets as uint8 tensors on the device, batches as tensor operations, and the plumbing around them: users' errors,
devices, folders, files, what a run prints, logs and leaves.

A data set is three `Split`s (train, val, test) of images (N, H, W, 3) uint8 and labels (N,) int64. Everything that fits
lives on the device; a batch is one gather that crops and flips on the way (no worker processes, no per-image Python).
Training images that do not fit wait in host memory, and the batches alone are copied.
The validation split is taken from *train* with a fixed seed, the same for all runs; the test split is the official one.
A video set has clips (N, T, H, W, 3) instead of images; their batches come from `clip_batches`.

`digits` is drawn by `draw_digits` below: no download, and the same bytes on every machine.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import distributed

SPLIT_SEED = 0  # of the validation split and of every subset: fixed, so that runs with different seeds are comparable


class UserError(SystemExit):
    """What the user can fix, in one line that says how. Raising it prints the line and ends the program, status 2."""

    def __init__(self, message):
        super().__init__(2)
        self.message = str(message)
        if distributed.rank() > 0:  # most likely the first process says the same, and torchrun ends this one before:
            time.sleep(3)  # one line instead of one from each
        print(f"error: {self.message}", file=sys.stderr)

    def __str__(self):
        return self.message


class Split(NamedTuple):
    x: torch.Tensor  # images (N, H, W, 3), uint8; in host memory if the split is streamed
    y: torch.Tensor  # labels (N,), int64, on the device


@dataclass
class Data:
    name: str  # "cifar10"; "cifar10-unofficial" when the files are not the official ones
    classes: list  # names, in the order of the labels
    train: Split
    val: Split
    test: Split
    augment: dict  # arguments of `batches` for the training images of this set: pad and flip, and are they streamed

    @property
    def kind(self):
        return "clips" if self.test.x.ndim == 5 else "images"


def _write(path, content):
    path = Path(path)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as f:
            if path.suffix == ".json":
                f.write(json.dumps(content, indent=1).encode())
            elif path.suffix == ".npz":
                np.savez(f, **content)
            else:
                torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):  # a file system mounted read-only refuses even to remove what is not there
            unfinished.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # to torch.save a full disk is a RuntimeError
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); what was there before is intact") from None


def save(path, content):
    """Write a .json or .pt under another name, then rename it: a file that exists is complete, whenever we die.

    Of several processes the first one writes, and all wait for it: they may read the file next. Raises UserError when
    it cannot be written (a full disk, say); what was there before is intact.
    """
    try:
        if distributed.rank() == 0:
            _write(path, content)
    except OSError as error:
        raise UserError(error) from None
    distributed.agree()


def read(path, device):
    """What `save` wrote as .pt. Raises ValueError when a byte has changed: torch itself ignores the checksums."""
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location=device, weights_only=True)


@contextmanager
def usable(path, otherwise):
    """Turn any error that a damaged or wrong file causes in here into a UserError: the path, `otherwise`, and why."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} {otherwise} ({reason})") from None


@contextmanager
def checkpoint_of(run, name, script, device):
    """The content of the checkpoint `name` in a run's folder, or of a .pt file, for a with block that makes a network
    of it. Raises UserError when there is none, when it is of another script, or when the block fails."""
    path = Path(run, name) if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: name a run's folder or a .pt file (best.pt comes with the "
                        "last stage, last.pt is there from the start)")  # fmt: skip
    with usable(path, f"is not a checkpoint that {script}.py can use"):
        state = read(path, device)
        if state["script"] != script:
            raise ValueError(f"it is of {state['script']}.py")
        yield state


def check(args, **own):
    """Refuse arguments outside their range: those of every script, and a script's `own`, as name=(lowest, highest).

    Arguments left at None, or at a name, are not looked at. Raises UserError. Warns of a strength or a rate that is
    never reached.
    """
    if empty := [k for k, v in vars(args).items() if v == ""]:  # a variable of the shell that is not set
        raise UserError(f"--{empty[0].replace('_', '-')} was given an empty name")
    compilers = (os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang++", "clang", "cc", "cl")
    if args.compile and not any(map(shutil.which, compilers)):
        raise UserError("--compile needs a C++ compiler, on the CPU as on a GPU: install g++, or leave it out")
    for k in ("eps", "step_size"):
        if args.norm == "linf" and (value := getattr(args, k) or 0) > 1:
            raise UserError(f"--{k.replace('_', '-')} {value:g} is more than a pixel's whole range"
                            + f": did you mean {value:g}/255?" * (value >= 2))  # fmt: skip
    ranges = {k: (1, math.inf) for k in ("width", "epochs", "batch_size", "attack_steps")}
    ranges |= {k: (0, math.inf) for k in ("eps", "eps_warmup_epochs", "weight_decay")}
    ranges |= {"seed": (0, 2**32 - 1)}  # what is made of it must fit into 64 bits
    ranges |= {k: (1e-9, math.inf) for k in ("lr", "step_size")}
    for k, (low, high) in (ranges | own).items():
        value = getattr(args, k)
        if not isinstance(value, (str, type(None))) and not low <= value <= min(high, 1e300):  # refuses nan, inf
            limit = f"at least {low:g}" if not value >= low else f"at most {high:.10g}" if high < 1e300 else "finite"
            raise UserError(f"--{k.replace('_', '-')} must be {limit}, not {value:.10g}")
    if args.eps and getattr(args, "defense", "at") == "at" and args.eps_warmup_epochs >= args.epochs:
        print(f"warning: eps rises for {args.eps_warmup_epochs:g} epochs, and training ends after {args.epochs}: see "
              "--eps-warmup-epochs")  # fmt: skip
    if args.norm == "l2" and 0 < args.eps < 0.1:
        print(f"warning: {args.eps:.3g} is a tiny radius in the L2 norm, where 128/255 is customary: see --eps")
    if args.milestones and min(args.milestones) < 1:
        raise UserError(f"--milestones are epochs from 1 on, not {min(args.milestones)}")
    if args.milestones and max(args.milestones) >= args.epochs:
        print(f"warning: the milestone {max(args.milestones)} is not reached in {args.epochs} epochs: see --milestones")


def refuse_unused(args, *names):
    """Raise UserError where one of these arguments was given: it would do nothing, and look like a result."""
    if given := [k for k in names if getattr(args, k) != getattr(type(args), k)]:
        raise UserError(f"--{', --'.join(given).replace('_', '-')} would do nothing here: leave it out")


def new_folder(parent, name):
    """Make and return parent/name, with a plus sign appended when another run of the same second has that name."""
    path = Path(parent, name)
    try:
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                with suppress(FileExistsError):  # asking whether it exists would let two runs find the same name free
                    path.mkdir()
                    break
                path = path.with_name(path.name + "+")
    except OSError as error:
        raise UserError(f"--runs-dir {parent} cannot be used: {error}") from None
    return distributed.agree(path)


def _shown(values):
    """Arguments as people write them."""
    return {k: f"{255 * v:g}/255" if k in ("eps", "step_size") and v is not None else v for k, v in values.items()}


class Run:
    """A run and its folder: what is saved, logged and printed from its first line to its results.

    `parts`, {"net": the network, "optimizer": ...} and whatever else has a state_dict, are what a checkpoint holds,
    beside the arguments and `progress`; `epochs` are those of the whole run. A run that is resumed or evaluated has a
    `folder` and a checkpoint `state`, from which parts and progress are filled. Any other makes its folder and leaves
    there, before it trains, a checkpoint to resume, and the files `beside` [(name, content)]; `preset` are the
    arguments that the user left out.

    A script uses `steps` (of an epoch), `progress` (`epoch`: how many are done), `bar` and TensorBoard's `writer`.
    Raises UserError when files cannot be written, or when processes cannot share a batch evenly.
    """

    def __init__(self, script, args, d, parts, epochs, preset, folder=None, state=None, beside=()):
        from torch.utils.tensorboard import SummaryWriter  # not above: neither --help nor a refusal needs it

        self.script, self.args, self.d, self.parts, self.epochs = script, args, d, parts, epochs
        self.preset = (state or {}).get("preset", [*preset])  # a resumed run's own: now all its arguments have a value
        self.steps = steps_per_epoch(len(d.train.y), args.batch_size, shared=not args.eval_only)
        self.images = self.steps * min(args.batch_size, len(d.train.y))  # seen in an epoch
        self.majority = d.val.y.bincount().max().item() / len(d.val.y)  # accuracy of predicting one class for all
        self.progress = dict(epoch=0, best=-1.0, train_seconds=0.0, history={})
        self.info = dict(script=script, dataset=d.name, seed=args.seed, **environment(d.val.y.device))
        if state:
            self.progress = {k: state[k] for k in self.progress}
            for k, part in parts.items():
                part.load_state_dict(state[k])
        self.folder = folder or new_folder(args.runs_dir, f"{d.name}__{script}__{args.seed}__{int(time.time())}")
        Writer = distributed.Silent if distributed.rank() or args.eval_only else SummaryWriter
        done = self.progress["epoch"] * self.steps
        self.writer = Writer(self.folder, purge_step=done + 1)  # a resumed run writes what follows again
        if not state:
            on_interrupt(self.folder)  # from here on an interruption says how to continue this run
        if not args.eval_only and not distributed.agree((self.folder / "args.json").exists()):  # or copied without
            save(self.folder / "args.json", {**self.info, "args": vars(args), "preset": self.preset})
        if not state:
            for name, content in beside:
                save(self.folder / name, content)
            rows = "\n".join(f"|{k}|{v}|" for k, v in {**_shown(vars(args)), **self.info}.items())
            self.writer.add_text("hyperparameters", "|argument|value|\n|-|-|\n" + rows)
            self.checkpoint("last.pt")
        parameters = sum(p.numel() for p in parts["net"].parameters() if p.requires_grad)
        print(f"{self.folder}: {parameters:,} parameters to train, {self.info['device']}, {d.kind} to train, validate "
              f"and test: {len(d.train.y)}, {len(d.val.y)}, {len(d.test.y)}; preset: "
              + ", ".join(f"{k} {v}" for k, v in _shown(preset).items()), flush=True)  # fmt: skip
        # With disable=None the bar is hidden where there is no terminal.
        self.bar = tqdm(total=epochs * self.steps, initial=done, disable=distributed.rank() > 0 or None)
        self.started = time.time()  # the epoch

    def checkpoint(self, name):
        """Save the run as it is now as `name` in its folder. Raises UserError as `save` does."""
        parts = {k: part.state_dict() for k, part in self.parts.items()}
        save(self.folder / name, dict(script=self.script, args=vars(self.args), data=self.d.name,
                                      classes=len(self.d.classes), processes=distributed.world(), preset=self.preset,
                                      **parts, **self.progress))  # fmt: skip

    def end_epoch(self, seconds, score, scalars, image, history=()):
        """Log an epoch, and save it. `seconds` are those of training alone. Raises UserError as `save` does.

        `scalars` {tag: number}, with those of `validate`, and `image` (3, h, w) are logged; the numbers of `history`
        are kept, a list each. Prints losses, what validation found and the speed.

        The best.pt is of the epoch with the highest `score`; until one scores more than 0, of the latest. With None an
        epoch does not count. One with hardly more clean accuracy than the largest class alone would give scores 0.
        """
        progress, epoch = self.progress, self.progress["epoch"] + 1
        if score and scalars["val/clean_acc"] <= self.majority + 0.01:
            score = 0.0  # to predict one class for everything resists all attacks, but is no classifier
        speed = self.images / seconds
        scalars = scalars | {"charts/images_per_second": speed, "charts/epoch_seconds": time.time() - self.started,
                             "charts/peak_memory_gb": peak_memory(self.d.val.y.device)}  # fmt: skip
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, epoch * self.steps)
        self.writer.add_image("attack/clean_adversarial_10x", image, epoch * self.steps)
        self.writer.flush()
        for k, v in dict(history).items():
            progress["history"].setdefault(k, []).append(v)
        progress.update(epoch=epoch, train_seconds=progress["train_seconds"] + seconds)
        if score is not None and (score > progress["best"] or progress["best"] <= 0):
            progress["best"] = score
            self.checkpoint("best.pt")
        self.checkpoint("last.pt")  # last of all: a run that dies before this repeats the epoch and finds all in place
        shown = ", ".join(f"{k} {v:.3f}" for k, v in scalars.items() if k.startswith(("losses", "val")))
        self.bar.write(f"epoch {epoch}/{self.epochs}: {shown}, {speed:.0f} {self.d.kind}/s")
        sys.stdout.flush()  # a log shows each epoch when it ends
        self.started = time.time()

    def checkpoints_to_test(self, eps):
        """What is tested: (names, state) of the best and of the last checkpoint, once where both are of the same epoch,
        or of the .pt file that --eval-only names. Raises UserError as `checkpoint_of` does."""
        self.bar.close()
        print(f"testing on {len(self.d.test.y)} {self.d.kind} at eps {255 * eps:g}/255, hundreds of steps each ...",
              flush=True)  # fmt: skip
        run, found = self.args.eval_only or self.folder, {}
        for name in ("best.pt", "last.pt") if Path(run).is_dir() else (run,):
            with checkpoint_of(run, name, self.script, "cpu") as state:
                state["net"]  # a file without a network is refused here, before the first has been tested for minutes
                found.setdefault(state["epoch"], ([], state))[0].append(Path(name).stem)
        return found.values()

    def publish(self, eps, state, table, method, lines, points=()):
        """The end of a run, whose last checkpoint is `state`. Writes results.json, with --eval-only eval.json, or
        eval_NAME.json of NAME.pt.
        Prints `table` {checkpoint: {column: number}}, the curves method["curves"] {name: {255 eps: accuracy}} and a
        method's own `lines` (tuples). Logs both tables and a method's own `points` (tag, value, x) to TensorBoard.
        """
        tested = self.args.eval_only
        name = "results" if not tested else "eval" if Path(tested).is_dir() else f"eval_{Path(tested).stem}"
        written = self.folder / f"{name}.json"
        seconds, steps, curves = state["train_seconds"], state["epoch"] * self.steps, method["curves"]
        save(written, {**self.info, "eps": eps, "evaluated": len(self.d.test.y), "checkpoints": table,
                       "robustness_curve": curves["model"], "method": method, "train_seconds": seconds,
                       "images_per_second": state["epoch"] * self.images / seconds if seconds else 0.0,
                       "peak_memory_gb": peak_memory(self.d.test.y.device)})  # fmt: skip
        lines = [("checkpoint", *next(iter(table.values()))), *((name, *row.values()) for name, row in table.items()),
                 (), ("PGD-20 at eps", *curves), *((f"{k}/255", *(curve[k] for curve in curves.values()))
                                                   for k in curves["model"]), (), *lines]  # fmt: skip
        text = "\n".join("".join(f"{v:>14.3f}" if isinstance(v, float) else f"{v:>14}" for v in line) for line in lines)
        print(text)
        self.writer.add_text("results", f"```\n{text}\n```", steps)
        points = [(f"test/{name}_{k}", v, steps) for name, row in table.items() for k, v in row.items()] + [*points]
        points += [(f"robustness_curve/{name}", v, float(k)) for name, row in curves.items() for k, v in row.items()]
        for tag, value, x_axis in points:
            # TensorBoard's axis has whole numbers only: values between them would share a point with others.
            if abs(x_axis - round(x_axis)) < 1e-3:
                self.writer.add_scalar(tag, value, round(x_axis))
        self.writer.close()
        look = f"; look at it with: tensorboard --logdir {shlex.quote(str(self.folder.parent))}"
        print(f"written to {written}" + look * (not self.args.eval_only))


def cache_file(runs_dir, kind, name, key, content=()):
    """runs_dir/kind/name__hash.pt, its folder made: where a trained network is kept for later runs to find.

    The hash is of `key`, all that would change the network, of the tensors `content`, and of the number of
    processes. Raises UserError when the folder cannot be made.
    """
    key = key | ({"processes": distributed.world()} if distributed.world() > 1 else {})
    digest = hashlib.sha256(json.dumps(key).encode())
    for tensor in content:
        digest.update(tensor.cpu().numpy())
    path = Path(runs_dir, kind, f"{name}__{digest.hexdigest()[:12]}.pt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs-dir {runs_dir} cannot be used: {error}") from None
    if not path.exists() and not os.access(path.parent, os.W_OK):  # now, not when the network has been trained
        raise UserError(f"--runs-dir {runs_dir} cannot be used: nothing can be written to {path.parent}")
    return path


def check_writable(folder):
    """Raise UserError for the folder of a run, if there is one, in which nothing can be written."""
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: copy it to where that is possible, and name the copy")


def parse(Args, doc, **kwargs):
    """The command line as an `Args`, by tyro."""
    if {"-h", "--help"} & {*sys.argv} and hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave early
    return tyro.cli(Args, description=doc, **kwargs)


def arguments(Args, doc, load, free_in_test=()):
    """(args, folder, net, state) of a script's command line: with --resume or --eval-only the named run's own arguments
    where no flag says otherwise, its folder, and what the script's `load` gives; for a new run folder, net and state
    are None.

    Raises UserError where both are given, where the folder is read-only, as `check_same` does, and where a new run's
    script could not be imported. From here on an interruption prints one line.
    """
    args = parse(Args, doc)
    run = args.resume or args.eval_only
    if args.resume and args.eval_only:
        raise UserError("--resume continues a run, --eval-only evaluates one: choose")
    if "" in (args.resume, args.eval_only):  # a variable of the shell that is not set
        raise UserError("--resume and --eval-only take a run's folder, and were given an empty name")
    path = Path(run or ".")
    folder = path if path.is_dir() else path.parent
    if args.resume and path.suffix == ".pt" and path.name != "last.pt":
        raise UserError(f"--resume {run}: a run goes on from its last.pt, name its folder; to start from other weights "
                        "is another run")  # fmt: skip
    if run:
        check_writable(folder)
    for name in ("stdout", "stderr"):  # None where the shell has closed it, as with >&-
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    on_interrupt(folder if args.resume else None)
    if not run and "." in Path(sys.argv[0]).stem:
        raise UserError(f"benchmark/audit.py could not import {Path(sys.argv[0]).name}: leave one dot in its name")
    if not run:
        return args, None, None, None
    net, own, state = load(run, name="last.pt" if args.resume else "best.pt")
    args = parse(Args, doc, default=own)  # again: flags given now override the run's own
    check_same(args, own, state, free_in_test)
    return args, folder, net, state


def check_same(args, own, state, free_in_test=()):
    """Raise UserError unless `args` are the arguments `own` of the run that they resume or evaluate, but for those
    that say where and how to work; and unless a run is resumed by as many processes as its checkpoint is of, and with
    its best epoch so far beside it.

    With other processes the noise, and the batches of BatchNorm, would not be those of the run any more.
    """
    free = ["resume", "eval_only", "device", "data_dir", "data_on", "runs_dir", "compile"]
    free += ["eps", "norm", "test_size", *free_in_test] if args.eval_only else []
    run, processes = args.eval_only or args.resume, state.get("processes", 1)  # a run may have been resumed itself
    if changed := [k for k, v in vars(own).items() if k not in free and getattr(args, k) != v]:
        raise UserError(f"{run} had another value of {', '.join(changed)}: leave it out, or start a new run")
    best = Path(run) / "best.pt" if Path(run).is_dir() else Path(run).with_name("best.pt")
    if not args.eval_only and state.get("best", -1) > -1 and not best.exists():
        raise UserError(f"{best} is missing: it is the best of the epochs so far, copy it from where last.pt was")
    if not args.eval_only and processes != distributed.world():
        raise UserError(f"{run} was trained by {processes} process{'es'[: 2 * (processes > 1)]}, not "
                        f"{distributed.world()}: resume it with {distributed.launcher(processes)}")  # fmt: skip
    if not args.eval_only and Path(run, "results.json").exists():
        print(f"note: {run} is finished: what is left is to test it once more", flush=True)


def on_interrupt(run_dir):
    """From here on Ctrl-C (status 130), SIGTERM (143), a disk that TensorBoard finds full, too little memory and any
    other error (status 1) end the program with a line that says how to go on: with the run in `run_dir`, once there is
    one and it has a checkpoint."""

    def how_to_go_on():
        if run_dir and (run_dir / "last.pt").exists():
            again = f"{distributed.launcher()} {shlex.join([sys.argv[0], '--resume', str(run_dir)])}"
            return f"to continue after the last finished epoch: {again}"
        return "there is nothing to continue: start it again"

    def interrupted(number, _):
        print(f"\ninterrupted; {how_to_go_on()}", flush=True)
        signal.signal(number, signal.SIG_DFL)  # a second one need not wait for the end
        raise SystemExit(128 + number)

    def failed(kind, error, trace):
        # A full disk, of files written by others than `save`, and a full memory need no traceback.
        reason = ""
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"error: a file cannot be written ({error}); "
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            said = ". ".join(str(error).split(". ")[:2]) or kind.__name__  # a GPU's message goes on for lines
            reason = f"error: out of memory ({said}): a smaller --batch-size or --width takes less; "
        elif not isinstance(error, BrokenPipeError):  # of `| head`, say
            distributed.show(kind, error, trace)
        if threading.current_thread() is not threading.main_thread():
            return  # a thread's error is raised again in the main one
        if isinstance(error, BrokenPipeError):  # what is left to be written goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if reason or run_dir or isinstance(error, BrokenPipeError):
            print(reason + how_to_go_on(), file=sys.stderr)

    signal.signal(signal.SIGINT, interrupted)
    if distributed.world() == 1:  # what torchrun ends with it may be waiting for others, and would not get to this
        signal.signal(signal.SIGTERM, interrupted)
    sys.excepthook = failed
    threading.excepthook = lambda e: failed(e.exc_type, e.exc_value, e.exc_traceback)


def device(name):
    """The torch.device of auto, cpu, cuda or cuda:N. Raises UserError when it cannot be used.

    With several processes, each takes the GPU with its number on its machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world() > 1 and name.startswith("cuda:"):
        raise UserError(f"--device {name} is one GPU, and there are {distributed.world()} processes: leave it out")
    try:
        if distributed.world() > 1 and name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        probe = torch.zeros(1, device=name)
        probe.item()  # a device without numbers, as meta, is none to train on
        found = probe.device
        if found.type == "cuda":  # the current one too, or torch.compile would take memory on the first
            torch.cuda.set_device(found)
        return found
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on about all its backends
        raise UserError(f"--device {name} cannot be used: {reason}") from None


def to_device(net, device):
    """`net` on the device, in channels_last: the memory format in which convolutions are fastest, and x is."""
    video = any(p.ndim == 5 for p in net.parameters())
    return net.to(device, memory_format=torch.channels_last_3d if video else torch.channels_last)


def tune(training, exact=False):
    """Search for the fastest convolutions and run compiled graphs in training, whose batches have few sizes. Elsewhere
    each size, precision and flag would cost another search, of seconds, and another graph, of minutes.

    Published numbers are `exact`: full float32 instead of the TF32 that a GPU multiplies with otherwise.
    """
    torch.backends.cudnn.benchmark = training
    torch.backends.cudnn.allow_tf32 = not exact
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.compiler.set_stance("default" if training else "force_eager")
    torch._dynamo.config.recompile_limit = 64  # for modes and flags: beyond it goes eager, silently


def track(things, title):
    """The things, one by one; on a terminal a bar shows how far they are."""
    return tqdm(things, title, leave=False, disable=distributed.rank() > 0 or None)


def means(sums, epoch, lr, flag="--lr"):
    """An epoch's sums on the device, {tag: tensor}, as numbers: means over the processes. Raises UserError when one is
    not finite: the rate `lr`, of the argument `flag`, is too high."""
    found = {k: distributed.mean(v).item() for k, v in sums.items()}
    if not all(math.isfinite(v) for v in found.values()):
        raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a lower {flag} than {lr:g}, "
                        "or smaller weights of the losses")
    return found


def peak_memory(device):
    """The most memory so far in GB: of tensors on a GPU, of the whole process on the CPU (0 where it is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def environment(device):
    """What a result came from: the command, the device, the versions and the commit (None outside a git checkout), with
    -dirty appended when a program differs from it; the tables that a list of runs fills may differ."""
    import torchvision  # not above: it takes as long as torch itself, and neither --help nor a refusal needs it

    git = f"git -C {shlex.quote(str(Path(__file__).resolve().parent.parent))}"
    changed = f'$({git} status --porcelain --untracked-files=all -- "*.py")'  # a copy of a script counts too
    git = f'{git} ls-files --error-unmatch common >&2 && {git} describe --always && (test -z "{changed}" || echo dirty)'
    return dict(
        command=f"{distributed.launcher()} {Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
        commit="-".join(subprocess.run(git, shell=True, capture_output=True, text=True).stdout.split()) or None,
    )  # fmt: skip


def fraction(words):
    """The number of one word, as 8/255, 7.5/255 or .5. Raises ValueError where it is none."""
    above, _, below = words[0].partition("/")
    if "/" in below:  # Fraction("255/2") is a number: 8/255/2 would be 16/255
        raise ValueError(f"{words[0]} is no number such as 8/255")
    try:
        return float(Fraction(above) / Fraction(below or 1))  # Fraction("7.5/255") is refused
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"{words[0]} is no finite number") from None


# The type of an argument in pixels, written and shown as people do: 8/255. Argument parsers know no fractions.
Pixels = Annotated[float, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="N/255", instance_from_str=fraction, is_instance=lambda value: isinstance(value, float),
    str_from_instance=lambda value: [f"{255 * value:g}/255"])]  # fmt: skip


def _permutation(n):
    return np.random.RandomState(SPLIT_SEED).permutation(n)


def load(name, data_dir="data", device="cpu", train_size=None, val_size=1000, test_size=None, data_on="auto",
         **options):  # fmt: skip
    """The data set `name`, with a validation split of `val_size` images held out of train.

    A size takes that many from the start of a permutation that is the same for every run, training images those after
    the validation images; None takes all. Files are read in their standard layout from `data_dir` and downloaded to
    it, with their checksum verified, when they are not there. Training images stay in host memory with
    `data_on="host"`, and with "auto" where they would take more than 60 % of the free memory of a GPU. `options` are
    those of the data set's reader. Raises UserError with one line that says what to do.
    """
    device = torch.device(device)
    if name not in READERS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(READERS)}")
    with distributed.first_alone():  # a reader may download and decode
        (x, y), (x_test, y_test), classes, official = READERS[name](Path(data_dir), **options)
    for images, labels in ((x, y), (x_test, y_test)):  # the reader may be your own
        if getattr(images, "dtype", None) != np.uint8 or images.ndim < 4 or images.shape[-1] != 3 \
                or getattr(labels, "dtype", None) != np.int64 or labels.shape != images.shape[:1]:
            raise UserError(f"{name}: a reader returns numpy arrays, images (N, H, W, 3) uint8 and labels (N,) int64")
    for part, labels in (("train", y), ("test", y_test)):
        if not len(labels):
            raise UserError(f"{name} has no image in its {part} split")
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise UserError(f"{name}: a label of the {part} split is not in 0..{len(classes) - 1}: files are damaged")
    missing = sorted(set(range(len(classes))) - set(y.tolist()))
    if missing:
        print(f"warning: {name} has no training image of class {', '.join(classes[c] for c in missing)}")
    for what, size, available in (("--val-size", val_size, len(y) - 1), ("--test-size", test_size, len(y_test)),
                                  ("--train-size", train_size, len(y) - val_size)):  # fmt: skip
        if size is not None and not 1 <= size <= available:
            raise UserError(f"{what} {size}: {name} has from 1 to {available} images for that")
    train_size = len(y) - val_size if train_size is None else train_size
    streamed = data_on == "host"
    if data_on == "auto" and device.type == "cuda":
        streamed = train_size * x[:1].nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]

    def split(images, labels, start, size, device_of_x=device):
        rows = slice(start, None if size is None else start + size)
        if not isinstance(images, np.memmap):  # one is stored in that order: a slice of the file takes no memory
            rows = torch.from_numpy(_permutation(len(labels)))[rows]
        x = torch.from_numpy(images)[rows].contiguous()  # a transposed file would cost each batch its memory format
        return Split(x.to(device_of_x), torch.from_numpy(labels)[rows].to(device))

    if not official:
        print(f"warning: the files in {data_dir} have the layout of {name} but are not the official ones ({len(y)} for "
              f"training, {len(y_test)} for testing): results are named {name}-unofficial")  # fmt: skip
    augment = AUGMENT.get(name, dict(pad=4, flip=True)) | ({"streamed": True} if streamed else {})
    return Data(name if official else f"{name}-unofficial", classes,
                split(x, y, val_size, train_size, torch.device("cpu") if streamed else device),
                split(x, y, 0, val_size), split(x_test, y_test, 0, test_size), augment)  # fmt: skip


VIDEO = ("moving-digits", "ucf101")  # the sets of clips


def load_as(args, device, data_dir=None, state=None):
    """The data set that the arguments of a script, or of a run, ask for; `data_dir` replaces theirs. Raises UserError
    when it is not the one of the checkpoint `state`."""
    options = dict(frames=args.frames, split=args.split) if args.dataset in VIDEO else {}
    d = load(args.dataset, data_dir or args.data_dir, device, args.train_size, args.val_size, args.test_size,
             args.data_on, **options)  # fmt: skip
    if state and (state["classes"] != len(d.classes) or not args.eval_only and state.get("data", d.name) != d.name):
        raise UserError(f"the checkpoint is of {state.get('data', args.dataset)} with {state['classes']} classes, and "
                        f"{data_dir or args.data_dir} has {d.name} with {len(d.classes)}: see --data-dir")  # fmt: skip
    return d


# --- Batches


def to_float(x):
    """uint8 images (N, H, W, 3) to floats (N, 3, H, W) in [0, 1], in memory format channels_last as they are; clips
    (N, T, H, W, 3) to (N, 3, T, H, W). What is floats already is returned as it is."""
    return x if x.is_floating_point() else x.movedim(-1, 1).float().div_(255)


def steps_per_epoch(n, batch_size, shared=True):
    """Full batches in n images: the rest of an epoch is dropped, or is the only batch when batch_size exceeds n.

    Raises UserError when several processes cannot share a batch evenly, where they are to (`shared`).
    """
    if shared and (size := min(batch_size, n)) % distributed.world():
        raise UserError(f"{distributed.world()} processes cannot share a batch of {size} evenly: choose another "
                        f"{'--batch-size' if size == batch_size else '--train-size'}")  # fmt: skip
    return max(n // batch_size, 1)


def _slices(n, batch_size):
    """Of each batch of an epoch, the slice that is this process's share."""
    steps, share = steps_per_epoch(n, batch_size), distributed.share(min(batch_size, n))
    return [slice(i * batch_size + share.start, i * batch_size + share.stop) for i in range(steps)]


def _fetch(x, rows, device, streamed):
    """Yield x[r] on the device for each r in `rows`.

    From host memory a thread gathers one batch ahead and copies it without waiting, which takes pinned memory. Pinning
    all of x would gain nothing: the rows of a batch have to be brought together first.
    """
    if not streamed:
        yield from (x[r] for r in rows)
        return

    def gather(r):
        batch = torch.empty(len(r), *x.shape[1:], dtype=x.dtype, pin_memory=device.type == "cuda")
        return torch.index_select(x, 0, r, out=batch).to(device, non_blocking=True)

    # A new thread starts on the first GPU, and would take memory there too.
    begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=begin) as thread:
        ahead = thread.submit(gather, rows[0])
        for r in rows[1:]:
            batch, ahead = ahead.result(), thread.submit(gather, r)
            yield batch
        yield ahead.result()


AUGMENT = {"digits": dict(pad=0, flip=False), "svhn": dict(pad=4, flip=False),  # a mirrored 2 is no digit
           "moving-digits": dict(flip=False),  # nor is a mirrored motion the same motion
           "ucf101": dict(flip=True, size=112, scale=(0.25, 1.0))}  # fmt: skip


def batches(split, batch_size, *, seed, epoch, pad=0, flip=False, streamed=False):
    """One shuffled epoch of (x, y): floats (B, 3, H, W) in [0, 1] and labels (B,), on the device of the labels.

    Each image is cropped at its own random position from its zero-padded version (`pad` pixels a side) and flipped with
    probability 1/2 (`flip`). Order and augmentation depend on (seed, epoch) alone: that makes resuming exact. With
    several processes, each gets a part of every batch.
    """
    n, height, width, _ = split.x.shape
    device, slices = split.y.device, _slices(n, batch_size)
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # on the CPU: the same epoch on every device
    order = torch.randperm(n, generator=g)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n), generator=g)
    mirrored = torch.randint(0, 2, (n,), generator=g).bool()
    rows = order.to(split.x.device)
    order, dy, dx, mirrored = (t.to(device) for t in (order, dy, dx, mirrored))  # one transfer an epoch
    size = slices[0].stop - slices[0].start
    padded = torch.zeros(size, height + 2 * pad, width + 2 * pad, 3, dtype=torch.uint8, device=device)
    # Every crop of every padded image as a view, [image, dy, dx]: picking one copies rows of pixels, not single ones.
    a, b, c, d = padded.stride()
    crops = padded.as_strided((size, 2 * pad + 1, 2 * pad + 1, height, width, 3), (a, b, c, b, c, d))
    image = torch.arange(size, device=device)
    for s, x in zip(slices, _fetch(split.x, [rows[s] for s in slices], device, streamed)):
        if pad:
            padded[:, pad : pad + height, pad : pad + width] = x
            x = crops[image, dy[s], dx[s]]
        if flip:
            x = torch.where(mirrored[s, None, None, None], x.flip(2), x)
        yield to_float(x), split.y[order[s]]


def clip_batches(split, batch_size, *, seed, epoch, frames, flip=False, size=None, scale=(1.0, 1.0),
                 streamed=False):  # fmt: skip
    """One shuffled epoch of (x, y) of clips: floats (B, 3, frames, H, W) in [0, 1] and labels (B,).

    Each clip starts at a random frame. With `size` it is cropped to a random square, the same in all frames, whose
    side is `scale` of the shorter side (both ends included), resized to size x size. `flip` is that of `batches`.
    Order, augmentation and parts are those of `batches`.
    """
    n, stored, height, width, _ = split.x.shape
    device, slices = split.y.device, _slices(n, batch_size)
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=g)
    first = torch.randint(0, stored - frames + 1, (n,), generator=g)
    mirrored = torch.randint(0, 2, (n,), generator=g).bool()
    u = torch.rand(3, n, generator=g)
    order, first, mirrored, u = (t.to(device) for t in (order, first, mirrored, u))  # one transfer an epoch
    side = min(height, width) * (scale[0] + (scale[1] - scale[0]) * u[0])
    left, top = u[1] * (width - side), u[2] * (height - side)
    # The frames of a batch as rows of one long film.
    rows = ((order * stored + first)[:, None] + torch.arange(frames, device=device)).to(split.x.device)
    for s, x in zip(slices, _fetch(split.x.flatten(0, 1), [rows[s].flatten() for s in slices], device, streamed)):
        index, x = order[s], x.unflatten(0, (-1, frames))
        if size:
            # grid_sample puts -1 and 1 at the outer edges of a frame.
            at = (torch.arange(size, device=device) + 0.5) / size * side[s, None]
            at_x, at_y = ((at + left[s, None]) * 2 / width - 1), ((at + top[s, None]) * 2 / height - 1)
            grid = torch.stack(torch.broadcast_tensors(at_x[:, None, :], at_y[:, :, None]), -1)
            planes = x.permute(0, 1, 4, 2, 3).flatten(1, 2).float().div_(255)
            x = torch.nn.functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
            # In the network's memory format: else every pass of an attack would bring it there.
            x = x.unflatten(1, (frames, 3)).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        else:
            x = to_float(x)
        if flip:
            x = torch.where(mirrored[s, None, None, None, None], x.flip(-1), x)
        yield x, split.y[index]


def centre_clips(x, frames, size):
    """Stored clips (N, T, H, W, 3) as they are tested, (N, frames, size, size, 3), uint8.

    Frames at equal distances from the first one on; the largest square in the middle, resized.
    """
    x = x[:, :: x.shape[1] // frames][:, :frames]
    height, width = x.shape[2:4]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = x[:, :, top : top + side, left : left + side]
    if side == size:
        return x
    parts = [_resize(clip, size, size) for clip in x]  # one clip at a time: their floats need not fit
    return torch.stack(parts)


def _resize(frames, height, width):
    """Frames (T, H, W, 3) uint8 to (T, height, width, 3), with antialiasing."""
    frames = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear",
                                             antialias=True)  # fmt: skip
    return frames.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# --- Readers: each returns (x, y) of train, (x, y) of test, the class names, and whether these are the official files


def _md5(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


def _official(files):
    """Are `files` {path: md5} the published ones? Prints those that are not: a changed byte shows nowhere else."""
    others = [path.name for path, md5 in files.items() if not path.exists() or _md5(path) != md5]
    if others:
        print(f"warning: by their md5 these are not the published files: {', '.join(others)}")
    return not others


def _damaged(path, error, remove=None):
    return UserError(f"{path} cannot be read ({type(error).__name__}: {error}): it is truncated or corrupt; "
                     f"put an intact copy in its place, or delete {remove or 'it'} to download it again")  # fmt: skip


def _download(what, data_dir, name, archive, fetch):
    """Let fetch(folder) make `name` in a folder of its own, then rename it into data_dir: what is there is complete,
    whether a run is killed or several download at a time. An archive that is already there is used.
    """
    there = data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=data_dir) as folder:
            if (data_dir / archive).exists():
                Path(folder, archive).symlink_to((data_dir / archive).resolve())
            fetch(Path(folder))
            try:
                os.replace(Path(folder, name), data_dir / name)
            except OSError:
                if not (data_dir / name).is_dir():  # unless another run was first
                    raise
    except Exception as error:  # network, disk and checksum errors have no common base class here
        with suppress(OSError):
            if not there:
                data_dir.rmdir()  # a mistyped path leaves nothing behind
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} is not in {data_dir.resolve()} and its download failed ({reason}); put "
                        "the files there yourself or name their folder with --data-dir") from None  # fmt: skip


@contextmanager
def downloading(weights, flag, instead):
    """torchvision downloads its `weights`, of this name, in here: the first process, then the others find them. Raises
    UserError with the `flag` that wants them, where to put them, and what to do `instead`."""
    try:
        with distributed.first_alone():
            yield
    except Exception as error:  # network and disk errors have no common base class here
        from torchvision.models import get_weight  # here, as in environment

        url = get_weight(weights).url
        path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
        raise UserError(f"the weights of {flag} cannot be downloaded ({type(error).__name__}: {error}): put {url} at "
                        f"{path}, or {instead}") from None  # fmt: skip


def _read_cifar(data_dir, dataset, label_key, names_key):
    folder = data_dir / dataset.base_folder
    if not folder.is_dir():
        _download(dataset.__name__, data_dir, dataset.base_folder, dataset.filename,
                  lambda folder: dataset(folder, download=True))
    wanted = {**dict(dataset.train_list), **dict(dataset.test_list), dataset.meta["filename"]: dataset.meta["md5"]}

    def read(name):
        try:
            with open(folder / name, "rb") as f:
                return pickle.load(f, encoding="latin1")
        except Exception as error:
            raise _damaged(folder / name, error, folder) from None

    def images(parts):
        present = [name for name, _ in parts if (folder / name).exists()]
        if not present:
            raise UserError(f"{folder} has none of {', '.join(name for name, _ in parts)}: "
                            "delete the folder to download it, or name another one with --data-dir")  # fmt: skip
        x, y = [], []
        for name in present:
            entry = read(name)
            try:
                x.append(np.asarray(entry["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                y.append(np.asarray(entry[label_key], np.int64).reshape(len(x[-1])))
            except Exception as error:
                raise _damaged(folder / name, error, folder) from None
        return np.concatenate(x), np.concatenate(y)

    meta = folder / dataset.meta["filename"]
    classes = map(str, range(100 if "fine" in label_key else 10))
    if meta.exists():
        entry = read(meta.name)
        if not isinstance(entry, dict) or names_key not in entry:
            raise _damaged(meta, KeyError(names_key), folder)
        classes = entry[names_key]
    train, test = images(dataset.train_list), images(dataset.test_list)
    return train, test, list(classes), _official({folder / name: md5 for name, md5 in wanted.items()})


def read_cifar10(data_dir):
    from torchvision.datasets import CIFAR10

    return _read_cifar(data_dir, CIFAR10, "labels", "label_names")


def read_cifar100(data_dir):
    from torchvision.datasets import CIFAR100

    return _read_cifar(data_dir, CIFAR100, "fine_labels", "fine_label_names")


def read_svhn(data_dir):
    import scipy.io
    from torchvision.datasets import SVHN

    parts, files = [], {}
    for split in ("train", "test"):
        _, filename, md5 = SVHN.split_list[split]
        path = data_dir / filename
        if not path.exists():
            _download(f"SVHN ({filename})", data_dir, filename, filename,
                      lambda folder, split=split: SVHN(folder, split=split, download=True))
        try:
            mat = scipy.io.loadmat(path)
            x = np.ascontiguousarray(mat["X"].transpose(3, 0, 1, 2))
            y = mat["y"].astype(np.int64).reshape(len(x))
            y[y == 10] = 0  # the files call the digit zero 10
            if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3):
                raise ValueError(f"X holds {x.dtype} of shape {mat['X'].shape}")
        except Exception as error:
            raise _damaged(path, error) from None
        files[path] = md5
        parts.append((x, y))
    return *parts, [str(d) for d in range(10)], _official(files)


TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")


def read_tiny_imagenet(data_dir):
    """The original layout (val/images, val_annotations.txt) and the rearranged one (val/<class>/...); test is val."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = data_dir / "tiny-imagenet-200"
    if not root.is_dir():
        url, md5 = TINY_IMAGENET
        _download("Tiny-ImageNet", data_dir, root.name, url.split("/")[-1],
                  lambda folder: download_and_extract_archive(url, folder, md5=md5))
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(f"{root} has no folder {part}: delete it to download the data again, or see --data-dir")
    classes = sorted(d.name for d in (root / "train").iterdir() if d.is_dir())
    number = {wnid: i for i, wnid in enumerate(classes)}
    train = [(path, number[c]) for c in classes for path in sorted((root / "train" / c).rglob("*.JPEG"))]
    annotations = root / "val" / "val_annotations.txt"
    if annotations.exists() and any((root / "val" / "images").glob("*.JPEG")):
        try:
            rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
            val = [(root / "val" / "images" / file, number.get(c, -1)) for file, c in rows]
        except ValueError as error:  # not text, or a line cut off
            raise _damaged(annotations, error, root) from None
    else:
        val = [(path, number[c]) for c in classes for path in sorted((root / "val" / c).rglob("*.JPEG"))]
    if not train or not val:
        raise UserError(f"{root} has {len(train)} training and {len(val)} validation images: it is not complete")
    official = len(classes) == 200 and len(train) == 100_000 and len(val) == 10_000
    return _decode(train, root / "train.npz"), _decode(val, root / "val.npz"), classes, official


def _decode(files, cache):
    """Decode image files once; later starts read the cache. It is complete when it is there (renamed into place)."""
    from PIL import Image

    names = hashlib.md5("\n".join(f"{path.name} {y}" for path, y in files).encode()).hexdigest()
    try:
        with np.load(cache) as stored:
            if str(stored["names"]) == names:
                return stored["x"], stored["y"]
    except Exception:  # absent, unreadable or of other files: decode again
        pass

    def one(entry):  # an error is returned and raised below: one line for the user, however many files are damaged
        try:
            with Image.open(entry[0]) as image:
                if image.size != (64, 64):
                    raise ValueError(f"{image.size[0]}x{image.size[1]} pixels instead of 64x64")
                return np.asarray(image.convert("RGB"))  # about one image in fifty is greyscale
        except Exception as error:
            return error

    print(f"decoding {len(files)} images of {cache.parent} (once)", flush=True)
    with ThreadPoolExecutor() as pool:
        x = list(pool.map(one, files))
    for image, (path, _) in zip(x, files, strict=True):
        if isinstance(image, Exception):
            raise _damaged(path, image, cache.parent)
    x = np.stack(x)
    y = np.array([label for _, label in files], np.int64)
    try:
        _write(cache, dict(x=x, y=y, names=names))
    except OSError as error:  # a read-only folder or a full disk costs the cache, nothing else
        print(f"warning: the decoded images are not kept for the next start: {error}")
    return x, y


# --- The embedded data set
# A digit of a 5x7 font under a random affine map, with a stray stroke, on a smooth coloured background, with noise: the
# shape is a *robust* feature. In one image of seven the glyph is that of a random class, so that shape alone does not
# suffice. Over it lies a texture, a pattern of signs that belongs to the class, of an amplitude that differs from image
# to image (0 to 13/255): *predictive, and only partly robust*, like much of what networks find in photographs. Plain
# training relies on the texture (96 % clean) and falls to 2 % at an eps of 4/255; adversarial training at 8/255 makes
# do with the shape (88 % clean); what lies between the two is what the methods are about.
# All arithmetic that decides a byte is on integers, or on floats that hold integers exactly: rounding cannot differ
# between processors, and the checksum in the tests holds everywhere.

FONT = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..
"""
CELL = 8  # texels per cell of the font in the lookup table


def _glyphs():
    """Coverage (11, 80, 80) in 0..255 of the ten digits and a bar, upsampled and softened by integer box filters."""
    table = torch.zeros(11, 10, 10, dtype=torch.int64)
    for r, row in enumerate(FONT.split("\n")[1:-1]):
        for d, cells in enumerate(row.split()):
            table[d, r + 1, 2:7] = torch.tensor([c == "#" for c in cells])
    table[10, 4, 2:8] = 1
    table = table.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2) * 255
    for _ in range(2):
        for dim in (1, 2):
            table = sum(table.roll(shift, dim) for shift in (-2, -1, 0, 1, 2)) // 5
    return table


def _noise(table, shape, generator):
    """Entries of `table` (256,), drawn at random; of several ways to look them up this is the fastest."""
    drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return table.index_select(0, drawn.int().flatten()).view(shape)


def draw_digits(n, seed):
    """n images (n, 32, 32, 3) uint8 and their labels (n,) int64, as numpy arrays. Takes about 0.2 ms an image."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):  # uniform integers, both ends included
        return torch.randint(low, high + 1, shape, generator=g)

    glyphs = _glyphs().int()
    normal = NormalDist(0, 0.03 * 255 * 64)
    noise_of = torch.tensor([round(normal.inv_cdf((k + 0.5) / 256)) for k in range(256)], dtype=torch.int32)
    radians = [math.radians(degrees) for degrees in range(-180, 181)]
    cosine, sine = (torch.tensor([round(1024 * f(r)) for r in radians]) for f in (math.cos, math.sin))
    # Smooth interpolation of 4 grid values to 32 pixels; the weights of a pixel are integers that add up to 64.
    ramp = [round(64 * (3 * t * t - 2 * t**3)) for t in ((k + 0.5) / 10.67 % 1 for k in range(32))]
    upsample = torch.zeros(32, 4, dtype=torch.float64)
    for k, weight in enumerate(ramp):
        cell = min(int((k + 0.5) / 10.67), 2)
        upsample[k, cell], upsample[k, cell + 1] = 64 - weight, weight
    signs = torch.randint(0, 2, (10, 4, 4, 3), generator=torch.Generator().manual_seed(4)) * 2 - 1
    texture = signs.repeat(1, 8, 8, 1).to(torch.int32)

    images, labels = [], []
    for start in range(0, n, 2000):
        m = min(2000, n - start)
        y = draw(0, 9, m)
        shown = torch.where(draw(0, 99, m) < 15, draw(0, 9, m), y)
        grid = draw(64, 191, m, 3, 4, 4).to(torch.float64)
        # In units of 1/64 of a grey level, here and below. Products of small integers: exact in float64 in any order.
        canvas = ((upsample @ grid @ upsample.T).to(torch.int32) // 64).permute(0, 2, 3, 1).contiguous()
        for stroke in (True, False):
            degrees, x0, y0 = (180, 13, 13) if stroke else (12, 3, 2)
            angle = 180 + draw(-degrees, degrees, m)
            texels = draw(2340, 3000, m)  # table texels per pixel, in 1/1024: a font cell is 2.4 to 3.5 pixels
            shear = draw(-154, 154, m)
            c, s = cosine[angle] * texels >> 10, sine[angle] * texels >> 10
            # 32 bits are enough from here on, and take half the time of 64.
            affine = c + (s * shear >> 10), s, -s + (c * shear >> 10), c
            m00, m01, m10, m11 = (t.int()[:, None, None] for t in affine)
            j = (torch.arange(32) * 2 - 31 - 2 * draw(-x0, x0, m)[:, None]).int()[:, None, :]
            i = (torch.arange(32) * 2 - 31 - 2 * draw(-y0, y0, m)[:, None]).int()[:, :, None]
            u = (m00 * j + m01 * i >> 11) + 36
            v = (m10 * j + m11 * i >> 11) + 36
            inside = (u >= 0) & (u < 80) & (v >= 0) & (v < 80)
            which = torch.full((m,), 10) if stroke else shown
            texel = ((which.int()[:, None, None] * 80 + v) * 80 + u) * inside  # its place in the table, or any
            coverage = glyphs.take(texel.long()) * inside
            # Per channel, one sign for all three.
            contrast = 64 * draw(*((48, 96) if stroke else (90, 150)), m, 3) * (2 * draw(0, 1, m, 1) - 1)
            canvas += (coverage[..., None] * contrast.int()[:, None, None]).floor_divide_(255)
        amplitude = draw(0, 52, m).to(torch.int32)  # of the texture: 0 to 13 grey levels, in quarters
        canvas.addcmul_(texture[y], 16 * amplitude[:, None, None, None])
        canvas += _noise(noise_of, canvas.shape, g)
        images.append((canvas + 32 >> 6).clamp_(0, 255).to(torch.uint8))
        labels.append(y)
    return torch.cat(images).numpy(), torch.cat(labels).numpy()


def read_digits(data_dir):
    del data_dir  # nothing is read
    x, y = draw_digits(10_000, seed=0)
    return (x[:9000], y[:9000]), (x[9000:], y[9000:]), [str(d) for d in range(10)], True


# --- The embedded video set
# A soft digit moves in one of eight directions over a smooth coloured background with two digits that stand still. It
# leaves the frame on one side and returns on the other, and starts anywhere: a single frame says nothing of the class,
# only the order of the frames does. What is said of integers above holds here too.

MOTIONS = {"east": (64, 0), "southeast": (45, 45), "south": (0, 64), "southwest": (-45, 45), "west": (-64, 0),
           "northwest": (-45, -45), "north": (0, -64), "northeast": (45, -45)}  # fmt: skip
CLIP = (8, 32)  # frames of a clip, pixels a side


def draw_moving_digits(n, seed):
    """n clips (n, 8, 32, 32, 3) uint8 and their labels (n,) int64, as numpy arrays. Takes about 0.6 ms a clip."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):  # uniform integers, both ends included
        return torch.randint(low, high + 1, shape, generator=g)

    frames, size = CLIP
    glyphs, directions = _glyphs().to(torch.int16), torch.tensor(list(MOTIONS.values()))
    normal = NormalDist(0, 0.02 * 255)
    noise_of = torch.tensor([round(normal.inv_cdf((k + 0.5) / 256)) for k in range(256)], dtype=torch.int16)
    ramp = torch.tensor([min(k, size - 1 - k) for k in range(size)])  # of the background: up and down again

    def coverage(digit, place):
        """Of digits (m,) at `place` (m, T, 2), x and y in 1/64 pixel, on the torus: (m, T, size, size) in 0..255."""
        at = 64 * torch.arange(size) - place[..., None]  # (m, T, 2, size)
        texel = ((at + 32 * size) % (64 * size) - 32 * size) * 9 // 128 + 40  # 4.5 texels a pixel
        inside = (texel >= 0) & (texel < 80)
        u, v = texel.clamp(0, 79).unbind(2)
        found = glyphs.take(((digit[:, None, None] * 80 + v) * 80)[..., :, None] + u[..., None, :])
        return found * (inside[:, :, 1, :, None] & inside[:, :, 0, None, :])

    clips, labels = [], []
    for start in range(0, n, 250):
        m = min(250, n - start)
        y = draw(0, len(MOTIONS) - 1, m)
        slope = draw(-3, 3, m, 1, 2, 3)  # grey levels a pixel along x and y, per channel
        base = draw(80, 175, m, 1, 1, 1, 3)
        canvas = (base + slope[:, :, None, None, 0] * ramp[:, None] + slope[:, :, None, None, 1] * ramp[:, None, None])
        canvas = canvas.expand(m, frames, size, size, 3).to(torch.int16).clone()
        t = torch.arange(frames)[:, None]
        for moving in (False, False, True):
            place = draw(0, 64 * size - 1, m, 1, 2)
            speed = draw(32, 56, m, 1, 1)  # in 1/16 pixel a frame: 2 to 3.5 pixels
            if moving:
                place = place + t * speed * directions[y][:, None] // 16
            contrast = draw(70, 130, m, 3) * (2 * draw(0, 1, m, 1) - 1)  # one sign for the three channels
            shape = coverage(draw(0, 9, m), place) >> 1  # 0 to 127: the product fits 16 bits
            canvas += shape[..., None] * contrast[:, None, None, None].to(torch.int16) >> 7
        canvas += _noise(noise_of, canvas.shape, g)
        clips.append(canvas.clamp_(0, 255).to(torch.uint8))
        labels.append(y)
    return torch.cat(clips).numpy(), torch.cat(labels).numpy()


def read_moving_digits(data_dir, frames=CLIP[0], split=1):
    del data_dir, split  # nothing is read
    if frames != CLIP[0]:
        raise UserError(f"--frames {frames}: the clips of moving-digits have {CLIP[0]}")
    x, y = draw_moving_digits(4500, seed=0)
    return (x[:4000], y[:4000]), (x[4000:], y[4000:]), list(MOTIONS), True


# --- UCF-101


def read_ucf101(data_dir, frames=16, split=1):
    """One clip of each video of an official split, as torchvision lays it out: UCF-101/, ucfTrainTestlist/.

    Test clips have `frames` frames of 112x112: every floor(n / frames)-th of the n frames, from the first on, repeated
    from the start where a video is too short. Training clips have twice as many, at half the distance, of 128x170, for
    `clip_batches` to crop from.
    """
    from torchvision.datasets import UCF101

    root, lists = data_dir / "UCF-101", data_dir / "ucfTrainTestlist"
    if not root.is_dir() or not lists.is_dir():
        missing = lists if root.is_dir() else root
        raise UserError(f"{missing} is not there: unpack UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip from "
                        f"https://www.crcv.ucf.edu/data/UCF101.php in {data_dir}, or see --data-dir")  # fmt: skip
    paths = sorted(root.rglob("*.avi"))
    # Made-up metadata: without it torchvision opens all videos, at every start, for the clips that we do not use.
    metadata = dict(video_paths=[str(p) for p in paths], video_pts=[torch.zeros(1, dtype=torch.int64)] * len(paths),
                    video_fps=[25.0] * len(paths))  # fmt: skip
    files = {}
    for part in ("train", "test"):
        try:
            dataset = UCF101(root, lists, 1, fold=split, train=part == "train", _precomputed_metadata=metadata)
        except Exception as error:  # no videos at all, no or damaged lists
            raise UserError(f"{data_dir} is no UCF-101 ({type(error).__name__}: {error}): see --data-dir") from None
        files[part] = [dataset.samples[i] for i in dataset.indices]
        if not files[part]:
            raise UserError(f"{root} has none of the videos in {lists / f'{part}list{split:02d}.txt'}")
        # Kept in the order in which splits are taken: they are then slices of one file, which all processes map.
        files[part] = [files[part][i] for i in _permutation(len(files[part]))]
    official = len(files["train"]) + len(files["test"]) == 13_320 and len(dataset.classes) == 101
    cache = data_dir / "ucf101-clips"
    train = _decode_clips(files["train"], cache / f"train{split}_{2 * frames}", 2 * frames, 128, 170)
    test = _decode_clips(files["test"], cache / f"test{split}_{frames}", frames, 112, 112)
    return train, test, dataset.classes, official


def _decode_clips(files, cache, frames, height, width):
    """One clip of each of the `files`, decoded once; later starts map the cache, complete when its .json is there.

    Scaled by the shorter side, then cut out of the middle. The clips stay on the disk until they are asked for. The
    .json has a checksum of each, which every start verifies.
    """
    known = [[Path(path).name, Path(path).stat().st_size, label] for path, label in files]
    shape = (len(files), frames, height, width, 3)
    clips, index = cache.with_suffix(".npy"), cache.with_suffix(".json")
    with suppress(Exception):  # absent, unreadable or of other files: decode again
        stored = json.loads(index.read_text())
        if stored["files"] == known:
            x = np.load(clips, mmap_mode="c")
            with ThreadPoolExecutor() as pool:
                if x.shape == shape and list(pool.map(zlib.crc32, x)) == stored["crc32"]:
                    return x, np.array([label for _, label in files], np.int64)
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception as error:  # without FFmpeg's libraries the import fails with a RuntimeError
        install = "pip install torchcodec" if isinstance(error, ImportError) else "install FFmpeg (apt install ffmpeg)"
        reason = str(error).strip().splitlines()[0].rstrip(":.")
        raise UserError(f"ucf101 is decoded by torchcodec, which cannot be used here ({reason}): {install}") from None

    def one(entry):  # an error is returned and raised below, as in _decode
        try:
            video = VideoDecoder(entry[0], num_ffmpeg_threads=1)
            n = len(video)
            at = [i % n for i in range(0, frames * max(n // frames, 1), max(n // frames, 1))]
            picked = video.get_frames_at(sorted(set(at)))  # each once, in order: going back costs a seek
            place = {frame: i for i, frame in enumerate(sorted(set(at)))}
            clip = picked.data.permute(0, 2, 3, 1)
            h, w = clip.shape[1:3]
            scale = max(height / h, width / w)
            clip = _resize(clip, max(round(h * scale), height), max(round(w * scale), width))
            top, left = (clip.shape[1] - height) // 2, (clip.shape[2] - width) // 2
            return clip[[place[i] for i in at], top : top + height, left : left + width].numpy()
        except Exception as error:
            return error

    print(f"decoding {len(files)} videos to {clips}, {math.prod(shape) / 1e9:.1f} GB (once)", flush=True)
    unfinished = clips.with_suffix(f".{os.getpid()}.tmp")
    try:
        clips.parent.mkdir(parents=True, exist_ok=True)
        # Written, not mapped: to a mapped file a full disk is a bus error, which ends the program without a word.
        with open(unfinished, "wb") as file, ThreadPoolExecutor() as pool:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
            checksums = []
            for (path, _), clip in zip(files, pool.map(one, files)):
                if isinstance(clip, Exception):
                    reason = (str(clip).strip() or type(clip).__name__).splitlines()[0]
                    raise UserError(f"{path} cannot be decoded ({reason}): put an intact copy in its place")
                clip = np.ascontiguousarray(clip)
                file.write(clip)
                checksums.append(zlib.crc32(clip))
            file.flush()
            os.fsync(file.fileno())
        index.unlink(missing_ok=True)  # the old index must not vouch for the new clips
        os.replace(unfinished, clips)
        _write(index, dict(files=known, crc32=checksums))
    except OSError as error:
        raise UserError(f"the decoded clips cannot be kept in {clips.parent} ({error}): make room there, or name with "
                        "--data-dir a folder that has it, with links to UCF-101 and ucfTrainTestlist") from None
    finally:
        with suppress(OSError):  # as in _write
            unfinished.unlink(missing_ok=True)
    return np.load(clips, mmap_mode="c"), np.array([label for _, label in files], np.int64)


READERS = {"digits": read_digits, "cifar10": read_cifar10, "cifar100": read_cifar100, "svhn": read_svhn,
           "tiny-imagenet": read_tiny_imagenet, "moving-digits": read_moving_digits,
           "ucf101": read_ucf101}  # fmt: skip
