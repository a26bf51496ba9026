"""Training steps as a GPU must find them: nothing in one waits for the device, or brings a tensor from the host.

They run on meta tensors, which have shapes and no values: what reads one (`.item()`, an `if`, a mask as an index)
raises. A tensor of the host among them would be a copy, or an error, on a GPU; operations that see one are collected.
Of the optimizer's step, which is torch's, nothing is seen: it keeps the parameters from before.
"""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT
from running import execute
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import data

SMALL = "--arch preactresnet8 --width 4 --train-size 12 --val-size 8 --test-size 4 --batch-size 4 --attack-steps 2"
CASES = [
    ("afa.py", "--epochs 2 --eps-warmup-epochs 1"),
    ("afa.py", "--epochs 1 --gate-epochs 2 --eps-warmup-epochs 0"),  # the second epoch is stage 2
    ("afa.py", "--epochs 1 --gate-epochs 2 --eps-warmup-epochs 0 --gate layer --finetune all"),
    ("aalp.py", "--eps-warmup-epochs 1"),
    ("aalp.py", "--eps-warmup-epochs 1 --dropout-label predicted --sample-weight conflict"),
    ("aalp.py", "--eps-warmup-epochs 1 --guided-dropout random"),
    ("vfd_adv.py", "--eps-warmup-epochs 1 --teacher-epochs 1"),
    ("vfd_adv.py", "--eps-warmup-epochs 1 --teacher-epochs 1 --base trades"),
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


def steps_on_meta(script, flags, runs):
    """Run a script until two steps of its second epoch are made on meta tensors: what `Host` saw of them."""
    host, made = Host(), torch.tensor

    def copied(*args, **kwargs):  # it makes its values on the host, of which a dispatch mode sees nothing
        host.seen.append("torch.tensor")
        return made(*args, **kwargs)

    def on_meta(original):
        def batches(split, batch_size, *, epoch, **settings):
            names = {**sys._getframe(1).f_globals, **sys._getframe(1).f_locals}
            if names.get("run") is None or epoch == 0:  # a teacher or a substitute is trained as it is, and so is the
                yield from original(split, batch_size, epoch=epoch, **settings)  # first epoch: it may be another stage
                return
            for net in ("net", "teacher"):
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
        patch(data, "batches", on_meta(data.batches))
        patch(data, "clip_batches", on_meta(data.clip_batches))
        patch(torch, "autocast", lambda kind, *args, **kwargs: autocast(kind.replace("meta", "cpu"), *args, **kwargs))
        with pytest.raises(Enough):
            execute(f"{SMALL} {flags}", runs, script)
    return host


@pytest.mark.parametrize("script, flags", CASES, ids=[f"{script} {flags}" for script, flags in CASES])
def test_a_step_stays_on_the_device(script, flags, tmp_path):
    host = steps_on_meta(script, flags, tmp_path)
    assert host.total > 200 and not host.seen


def mutated(added, folder):
    """aalp.py with a line `added` to its step, in another folder."""
    source, line = (ROOT / "aalp.py").read_text(), " " * 12 + "optimizer.zero_grad()\n"
    assert source.count(line) == 1
    path = folder / "aalp.py"
    path.write_text(source.replace(line, f"{' ' * 12}{added}\n{line}"))
    return path


@pytest.mark.parametrize("added", ["loss.item()", "if loss > 0: pass", "x[y == 0]", "y.cpu()", "y.tolist()",
                                   "x * torch.rand(len(x), 1, 1, 1)"])
def test_what_would_wait_or_mixes_devices_raises(added, tmp_path):
    with pytest.raises(RuntimeError, match="meta"):
        steps_on_meta(mutated(added, tmp_path), "--eps-warmup-epochs 1", tmp_path)


def test_what_comes_from_the_host_is_seen(tmp_path):
    path = mutated("torch.tensor([1.0], device=x.device)", tmp_path)
    assert steps_on_meta(path, "--eps-warmup-epochs 1", tmp_path).seen
