"""benchmark/speed.py runs and leaves complete tables. No assertion is on a time: machines differ.

What is asserted is the work: a script's step makes the passes of its floor, and no others.
"""

import json
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import speed as tool

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--arch", "preactresnet8", "--width", "4", "--batch-size", "4", "--steps", "2",
        "--repeats", "1", "--no-compile", "--script-width", "4", "--script-batch-size", "4"]  # fmt: skip


def speed(*flags):
    command = [sys.executable, "benchmark/speed.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_tables(tmp_path):
    out = tmp_path / "speed.json"
    run = speed(*TINY, "--scripts", "PGD-AT", "--evaluation-size", "4", "--peak-tflops", "1", "--out", str(out))
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["speed.json"]
    result = json.loads(out.read_text())
    assert set(result["forwards"].values()) == {2} and "pgd" in result["forwards"]
    assert all(t["ms"] > 0 and t.get("ratio", 1) > 0 for t in result["times"])
    keys = {tuple(t["key"]) for t in result["times"]}
    assert keys == {("eager", "preactresnet8", 4, mode, layout) for mode in ("fp32", "bf16")
                    for layout in ("contiguous", "channels_last")}  # fmt: skip
    assert {"pgd", "training step"} <= {t["name"] for t in result["times"] if "ratio" in t}
    steps = {(e["name"], e["mode"], e["compiled"]): e for e in result["scripts"]}
    assert set(steps) == {("PGD-AT", "fp32", False), ("PGD-AT", "bf16", False)}
    for e in steps.values():
        assert e["epoch_seconds"] == pytest.approx(49_000 // 4 * e["ms"] / 1e3)
        assert e["peak_share"] == pytest.approx(e["flops"] / (e["ms"] / 1e3) / 1e12)
    survivors, contiguous, evaluate = result["evaluation"]
    assert contiguous["passes"] == survivors["passes"]
    assert survivors["passes"] == 20 + 1 and survivors["images"] == 4 * 21  # all four are attacked, then looked at
    assert evaluate["passes"] > survivors["passes"] and evaluate["cold"] > 0
    assert result["loader"]["ours"] > 0 and result["loader"]["torchvision"] > 0
    reached = {t["target"]: t["reached"] for t in result["targets"]}
    assert len(reached) == 9 and reached["compiled pgd over torchattacks, pgd"] is None
    assert reached["host synchronisations of a script's step"] is None  # of a GPU alone
    assert all(target in run.stdout for target in reached)


@pytest.mark.parametrize("flags, message", [(("--modes", "fp16"), "--modes are fp32,bf16"),
                                            (("--scripts", "VFD"), "--scripts are PGD-AT,AFA stage 1,")])
def test_bad_input_is_refused_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark/speed.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmark" / "speed.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.fixture
def args(monkeypatch):
    def clips(*shape):
        y = np.arange(shape[0]) % 8
        x = np.random.RandomState(0).randint(0, 256, (*shape, 32, 32, 3), np.uint8)
        return (x[:60], y[:60]), (x[60:], y[60:]), [str(i) for i in range(8)], True

    monkeypatch.setattr(tool, "read_digits", lambda data_dir: clips(64))
    monkeypatch.setattr(tool, "read_moving_digits", lambda data_dir: clips(64, 8))
    return tool.Args(device="cpu", script_arch="preactresnet8", script_width=4, script_batch_size=4, steps=2, repeats=1)


ATTACK = {"eval grad 4": 2}  # K = 2, and a batch of 4
PASSES = {
    "PGD-AT": ATTACK | {"train grad 4": 1},
    "AFA stage 1": ATTACK | {"train grad 4": 2},
    "AALP": ATTACK | {"train grad 8": 1},
    "VFD at": ATTACK | {"train grad 4": 2, "teacher eval 4": 1},
    "VFD trades": ATTACK | {"train grad 4": 2, "teacher eval 4": 1, "eval 4": 1},
    "VFD mart": ATTACK | {"train grad 4": 2, "teacher eval 4": 1},
    "none": {"train grad 4": 1},
    "ABNN's AT": ATTACK | {"train grad 4": 1},
    "ABNN": {"train grad 4": 1},
    "video none": {"train grad 4": 1},
    "video AT": ATTACK | {"train grad 4": 1},
    "video ABNN": {"train grad 4": 1},
}


@pytest.mark.parametrize("row", tool.ROWS)
def test_a_step_makes_the_passes_of_its_floor_and_no_others(row, args):
    entry = tool.script_step(row, args, "fp32", False)
    assert Counter(entry["passes"]) == Counter(entry["floor_passes"]) == PASSES[row]
    # Also what hooks do not see: backward passes, weight gradients during the attack, a call of a part of the network.
    # AALP applies its last layer again, VFD at leaves out that of its clean pass.
    assert entry["flops"] == pytest.approx(entry["floor_flops"], rel=2e-3)


@pytest.mark.parametrize("added, seen", [("net(x, 1.0)", {"train grad 4": 2}), ("net.features(x, 1.0)", {})])
def test_an_added_pass_is_seen(added, seen, args, tmp_path):
    source, line = (ROOT / "afa.py").read_text(), " " * 20 + "net.train()\n"
    assert source.count(line) == 1
    path = tmp_path / "afa.py"
    path.write_text(source.replace(line, line + " " * 20 + added + "\n"))
    entry = tool.script_step("PGD-AT", args, "fp32", False, path)
    assert Counter(entry["passes"]) == Counter(PASSES["PGD-AT"] | seen)
    assert entry["flops"] > 1.05 * entry["floor_flops"]


def test_operations_are_those_of_the_passes():
    x, w = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(5, 3, 3, 3, requires_grad=True)
    one = 2 * 2 * 5 * 3 * 9 * 6 * 6  # images, channels, kernel, positions; a product and a sum each
    for inputs, passes in (((x,), 2), ((x, w), 3)):  # forward, and backward to each of them
        with tool.Operations() as operations:
            torch.autograd.grad(torch.nn.functional.conv2d(x, w).sum(), inputs)
        assert operations.total == passes * one


def test_host_synchronisations_are_counted_by_what_torch_warns():
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        for text in ("called a synchronizing CUDA operation (Triggered internally)", "another warning"):
            warnings.warn(text, stacklevel=1)
    assert tool.host_syncs(messages) == 1
