"""Whole runs on a device that is not the CPU (card.py): training, validation, test, resuming and the audit keep to one
device, with the numbers of a run on the CPU."""

import json
import sys

import numpy as np
import pytest
import torch
from card import card
from running import execute, same, weights

import benchmark.audit as tool
from common import data

SMALL = "--train-size 96 --val-size 16 --test-size 4 --batch-size 8 --attack-steps 2 --eps 2/255"
IMAGES, VIDEO = f"{SMALL} --arch preactresnet8 --width 8", f"{SMALL} --dataset moving-digits"
CASES = [  # and whether it is audited too
    ("afa.py", f"{IMAGES} --epochs 1 --gate-epochs 1 --eps-warmup-epochs 1", False),
    ("afa.py", f"{IMAGES} --epochs 1 --gate-epochs 1 --eps-warmup-epochs 1 --gate layer --finetune all", False),
    ("aalp.py", f"{IMAGES} --epochs 2 --eps-warmup-epochs 1 --norm l2 --data-on host --sample-weight conflict", False),
    ("vfd_adv.py", f"{IMAGES} --epochs 2 --eps-warmup-epochs 1 --teacher-epochs 2", True),
    ("vfd_adv.py", f"{IMAGES} --epochs 2 --eps-warmup-epochs 1 --teacher-epochs 1 --base trades", False),
    ("abnn.py", f"{IMAGES} --epochs 1 --clean-epochs 2 --defense none", False),
    ("abnn.py", f"{VIDEO} --frames 2 --arch conv3d --width 4 --epochs 1 --clean-epochs 3", False),
]
FEW = dict(noise=1, steps=(1, 2, 3), margin_steps=2, restarts=1, targets=1, transfer_steps=1, surrogate_steps=2,
           apgd_steps=3, queries=3, curve_n=4, curve_steps=(1, 5))  # fmt: skip


def easy(n, seed, *frames):
    """Images, or clips, of four colours: a network learns them in a few steps, and resists a little."""
    rng = np.random.RandomState(seed)
    y = rng.randint(4, size=n)
    colours = np.array([[40, 40, 200], [40, 200, 40], [200, 40, 40], [200, 200, 200]])[y]
    x = colours.reshape(n, *[1] * (2 + len(frames)), 3) + rng.randint(-30, 31, (n, *frames, 32, 32, 3))
    return x.astype(np.uint8), y.astype(np.int64)


@pytest.fixture(autouse=True)
def easy_data(monkeypatch):
    def read(data_dir, frames=None, split=None):
        shape = () if frames is None else (frames,)
        return easy(120, 0, *shape), easy(8, 1, *shape), list("abcd"), True

    monkeypatch.setattr("running.read_digits", read)  # that of the scripts, and below that of the audit
    for name in ("digits", "moving-digits"):
        monkeypatch.setitem(data.READERS, name, read)
    for name, value in FEW.items():
        monkeypatch.setitem(tool.QUICK, name, value)


def whole(script, flags, audit, folder, monkeypatch, interrupted=False):
    """A run, perhaps `interrupted` after an epoch and resumed, and its audit: its folder, and what was found."""
    end_epoch = data.Run.end_epoch

    def stop(*args):
        end_epoch(*args)
        raise InterruptedError

    if interrupted:
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(data.Run, "end_epoch", stop)
            execute(flags, folder, script)
        flags = f"--resume {next(folder.glob('*__1__*'))}"
    assert execute(flags, folder, script) == 0
    (run,) = folder.glob("*__1__*")
    found = [json.loads((run / "results.json").read_text())["checkpoints"]]
    if audit:
        monkeypatch.setattr(sys, "argv", ["audit.py", str(run), "--quick", "--device", folder.name])
        tool.main()
        attacks = json.loads((run / "audit.json").read_text())["attacks"]
        found.append({name: attack["accuracy"] for name, attack in attacks.items()})
    return run, found


@pytest.mark.parametrize("script, flags, audit", CASES, ids=range(len(CASES)))
def test_a_run_keeps_to_its_device(script, flags, audit, tmp_path, monkeypatch):
    cpu, expected = whole(script, f"{flags} --device cpu", audit, tmp_path / "cpu", monkeypatch)
    with card():
        run, found = whole(script, f"{flags} --device meta", audit, tmp_path / "meta", monkeypatch, interrupted=True)
    assert found == expected and same(weights(run / "last.pt"), weights(cpu / "last.pt"))
    assert expected[0]["best"]["clean"] > 0.5  # otherwise the attacks would have had nothing to do


def test_what_mixes_devices_raises():
    with card():
        x = torch.zeros(2, device="meta")
        assert (x + 1).tolist() == [1, 1] and x[torch.tensor([0])].device.type == "meta"
        with pytest.raises(RuntimeError, match="of the device and of the host"):
            x + torch.zeros(2)
        with pytest.raises(RuntimeError, match="generator of another device"):
            torch.rand(2, device="meta", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="generator of another device"):
            torch.rand(2, generator=torch.Generator("meta"))
    assert torch.zeros(2, device="meta").is_meta
