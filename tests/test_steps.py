"""Training steps as a GPU must find them: nothing in one waits for the device, or brings a tensor from the host.

They run on meta tensors, which have shapes and no values: what reads one (`.item()`, an `if`, a mask as an index)
raises. A tensor of the host among them would be a copy, or an error, on a GPU; operations that see one are collected.
Of the optimizer's step, which is torch's, nothing is seen: it keeps the parameters from before.
"""

import contextlib
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import data

SMALL = "--arch preactresnet8 --width 4 --val-size 8 --batch-size 4 --attack-steps 2"
CASES = [
    ("afa.py", "--epochs 2 --eps-warmup-epochs 1"),
    ("afa.py", "--epochs 1 --gate-epochs 2 --eps-warmup-epochs 0"),  # the second epoch is stage 2
    ("afa.py", "--epochs 1 --gate-epochs 2 --eps-warmup-epochs 0 --gate layer --finetune all"),
    ("aalp.py", "--eps-warmup-epochs 1"),
    ("aalp.py", "--eps-warmup-epochs 1 --guided-dropout random --dropout-label predicted --sample-weight conflict"),
    ("vfd_adv.py", "--eps-warmup-epochs 1 --teacher-epochs 1"),
    ("vfd_adv.py", "--eps-warmup-epochs 1 --teacher-epochs 1 --base trades --teacher-width 6 --distance cosine"),
    ("vfd_adv.py", "--eps-warmup-epochs 1 --teacher-epochs 1 --base mart --norm l2"),
    ("abnn.py", "--clean-epochs 1"),
    ("abnn.py", "--clean-epochs 1 --defense at --eps-warmup-epochs 1"),
    ("abnn.py", "--clean-epochs 1 --moments batch --statistics channel --no-equalised --align-weight 1"),
    ("abnn.py", "--clean-epochs 1 --dataset moving-digits --arch conv3d"),
]


class Enough(Exception):
    """The script has made its steps."""


class Host(TorchDispatchMode):
    """Operations that read or make a tensor in host memory, by name."""

    def __init__(self):
        super().__init__()
        self.seen, self.total = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += 1
        if any(t.device.type == "cpu" for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)):
            self.seen.append(str(func))
        return out


def read(*shape):
    y = np.arange(24) % 8
    x = np.random.RandomState(0).randint(0, 256, (24, *shape, 32, 32, 3), np.uint8)
    return (x[:20], y[:20]), (x[20:], y[20:]), [str(i) for i in range(8)], True


def steps_on_meta(path, flags, runs):
    """Run a script until two steps of its second epoch are made on meta tensors: what `Host` saw of them."""
    host, made = Host(), torch.tensor

    def copied(*args, **kwargs):  # it makes its values on the host, of which a dispatch mode sees nothing
        host.seen.append("torch.tensor")
        return made(*args, **kwargs)

    def on_meta(original):
        def batches(split, batch_size, *, epoch, **settings):
            names = {**sys._getframe(1).f_globals, **sys._getframe(1).f_locals}
            if names.get("bar") is None or epoch == 0:  # a teacher or a substitute is trained as it is, and so is the
                yield from original(split, batch_size, epoch=epoch, **settings)  # first epoch: it may be another stage
                return
            for net in ("net", "teacher", "projection"):
                if isinstance(names.get(net), torch.nn.Module):
                    names[net].to("meta")
            source = original(data.Split(*(t.to("meta") for t in split)), batch_size, epoch=epoch, **settings)
            for _ in range(2):
                batch = next(source)
                with host, mock.patch.object(torch, "tensor", copied):
                    yield batch
            raise Enough

        return batches

    autocast = torch.autocast  # knows no meta tensors
    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        # Else a parameter would keep its type of memory, and only be filled anew.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(mock.patch.dict(data.READERS, {"digits": lambda data_dir: read(),
                                                           "moving-digits": lambda data_dir, **options: read(8)}))
        patch(data, "batches", on_meta(data.batches))
        patch(data, "clip_batches", on_meta(data.clip_batches))
        patch(torch, "autocast", lambda kind, *args, **kwargs: autocast(kind.replace("meta", "cpu"), *args, **kwargs))
        patch(sys, "argv", [str(path), *flags.split(), "--runs-dir", str(runs), "--test-size", "4"])
        patch(data, "on_interrupt", lambda run_dir: None)
        with pytest.raises(Enough):
            runpy.run_path(str(path), run_name="__main__")
    return host


@pytest.mark.parametrize("script, flags", CASES, ids=[f"{script} {flags}" for script, flags in CASES])
def test_a_step_stays_on_the_device(script, flags, tmp_path):
    host = steps_on_meta(ROOT / script, f"{SMALL} {flags}", tmp_path)
    assert host.total > 200 and not host.seen


@pytest.mark.parametrize("added", ["loss.item()", "if loss > 0: pass", "x[y == 0]", "y.cpu()", "y.tolist()",
                                   "x * torch.rand(len(x), 1, 1, 1)", "torch.tensor([1.0], device=x.device)"])
def test_what_would_wait_is_seen(added, tmp_path):
    source, line = (ROOT / "aalp.py").read_text(), " " * 12 + "optimizer.zero_grad()\n"
    assert source.count(line) == 1
    path = tmp_path / "aalp.py"
    path.write_text(source.replace(line, f"{' ' * 12}{added}\n{line}"))
    try:
        host = steps_on_meta(path, f"{SMALL} --eps-warmup-epochs 1", tmp_path)
    except (RuntimeError, NotImplementedError) as error:
        assert "meta" in str(error)
    else:
        assert host.seen
