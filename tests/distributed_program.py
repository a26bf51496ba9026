"""The scripts with all taken out that is not the same in two processes as in one: BatchNorm's batches and random noise.

test_distributed.py calls `run` for one process, and starts this file with torchrun for two; at the end of that, one of
them fails while the other waits for it.
"""

import contextlib
import functools
import io
import json
import runpy
import shlex
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from shortened import shorten  # noqa: E402

from common import data, distributed, pgd  # noqa: E402

# Sizes that do not divide evenly, but for the batches; a rest of each epoch is dropped.
SIZES = ("--train-size 70 --val-size 21 --test-size 3 --width 4 --epochs 2 --batch-size 16 --attack-steps 2 "
         "--eps 2/255 --lr 0.02 --eps-warmup-epochs 0 ")
RUNS = {"afa.py": SIZES + "--gate-epochs 0", "aalp.py": SIZES + "--guided-dropout none",
        "vfd_adv.py": SIZES + "--base trades --teacher-epochs 2 --teacher-lr 0.02",
        "abnn.py": SIZES + "--clean-epochs 1 --align-weight 0.1"}


@functools.cache
def few_digits():
    x, y = data.draw_digits(200, seed=0)
    return (x[:150], y[:150]), (x[150:], y[150:]), [str(d) for d in range(10)], True


def running_statistics(bn, x):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def checked_save(path, content, save=data.save):
    """All processes must hold the same weights whenever one of them saves."""
    if "net" in content:
        weights = torch.cat([v.flatten().double() for v in content["net"].values()])
        parts = distributed.gather(weights).view(distributed.world(), -1)
        assert (parts == parts[0]).all(), f"{path}: the processes have different weights"
    save(path, content)


def run(script, runs):
    """The script in this process; what it printed."""
    output = io.StringIO()
    arguments = [script, *shlex.split(RUNS[script]), "--runs-dir", str(runs)]
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.dict(data.READERS, digits=lambda data_dir: few_digits()),
            mock.patch.object(data, "save", checked_save),
            mock.patch.object(distributed, "finish", lambda: None),  # the next script goes on with these processes
            mock.patch.object(pgd, "_start", lambda x, *settings: torch.zeros_like(x)),
            mock.patch.object(torch.nn.BatchNorm2d, "forward", running_statistics),
            mock.patch.object(sys, "argv", arguments),
            mock.patch("signal.signal"),
        ):
            stack.enter_context(patch)
        shorten(lambda *what: stack.enter_context(mock.patch.object(*what)))
        stack.enter_context(contextlib.redirect_stdout(output))
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return output.getvalue()


def masks():
    """What survives noise and a small step from three starts, then towards two classes: each process attacks its share
    of each batch, with the noise that one process would give it."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(61, 3, 4, 4, generator=g)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    net[1].load_state_dict({"weight": torch.randn(5, 48, generator=g), "bias": torch.zeros(5)})
    settings = dict(eps=0.3, steps=1, step_size=0.01, restarts=3, batch_size=7)
    return [pgd.survivors(net, x, net(x).argmax(1), targets=targets, **settings).tolist() for targets in (0, 2)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start()
    found = masks()
    if distributed.rank() == 0:
        Path(sys.argv[1], "masks.json").write_text(json.dumps(found))
    for script in RUNS:
        run(script, sys.argv[1])
    if distributed.rank() == 1:
        Path(sys.argv[1], "failed").write_text(str(time.time()))
        raise ArithmeticError("on purpose")
    distributed.agree()
