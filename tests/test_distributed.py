"""Two processes on the CPU, started by torchrun, against one; and data in host memory against data on the device."""

import json
import subprocess
import sys
import time
from pathlib import Path

import distributed_program
import pytest
import torch
from conftest import ROOT
from running import finished_in_process, in_process, same, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import data, distributed

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ("--train-size 50 --val-size 21 --test-size 5 --width 4 --epochs 1 --gate-epochs 1 --attack-steps 2 "
        "--batch-size 16")


def together(*arguments):
    """Exit status and output of a program in two processes."""
    process = subprocess.run([*TWO, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    return process.returncode, process.stdout, process.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Folder of the runs of all scripts in two processes, one of which fails at the end; output; seconds to the end."""
    runs = tmp_path_factory.mktemp("two")
    status, output, errors = together(Path(distributed_program.__file__), runs)
    assert (runs / "failed").exists(), output + errors
    return runs, status, errors, time.time() - float((runs / "failed").read_text())


@pytest.mark.parametrize("script", distributed_program.RUNS)
def test_two_processes_learn_what_one_does(script, programs, tmp_path):
    distributed_program.run(script, tmp_path)
    name = f"digits__{script[:-3]}__*"
    (one,), (two,) = tmp_path.glob(name), programs[0].glob(name)  # one folder, whatever the number of processes
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (one, two))
    start = torch.cat([v.flatten().float() for v in a["net"].values()])
    assert max((v - b["net"][k]).abs().max().item() for k, v in a["net"].items()) < 1e-4 and start.isfinite().all()
    assert (a.pop("processes"), b.pop("processes")) == (1, 2) and a.keys() == b.keys()
    assert a["best"] == b["best"] and a["epoch"] == b["epoch"] == 2
    first, second = (EventAccumulator(str(run)).Reload() for run in (one, two))
    tags = [tag for tag in first.Tags()["scalars"] if tag.startswith(("losses", "train", "aalp/sample"))]
    assert sum(tag.startswith("losses") for tag in tags) >= 2 - (script == "abnn.py")
    for tag in tags:
        values = [[e.value for e in events.Scalars(tag)] for events in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4), tag
    first, second = (json.loads((run / "results.json").read_text())["checkpoints"] for run in (one, two))
    assert first == second


def test_two_processes_attack_with_the_noise_of_one(programs):
    one = distributed_program.masks()
    assert json.loads((programs[0] / "masks.json").read_text()) == one
    assert all(5 < sum(mask) < 56 for mask in one)  # another noise would leave others


def test_an_error_in_one_process_ends_all(programs):
    _, status, errors, seconds = programs
    assert status == 1 and errors.count("ArithmeticError: on purpose") == 1  # gloo may say so too, before torchrun does
    assert seconds < 30


def test_a_run_of_two_processes_is_one_run(tmp_path, capsys):
    shortened = ROOT / "tests" / "shortened.py"
    status, output, errors = together(shortened, ROOT / "afa.py", *TINY.split(), "--runs-dir", tmp_path)
    assert status == 0, errors
    (run,) = tmp_path.iterdir()
    assert {p.name for p in run.iterdir() if "tfevents" not in p.name} == {
        "args.json", "best.pt", "last.pt", "results.json"}
    assert len(list(run.glob("*tfevents*"))) == 1 and output.count("written to") == 1 and output.count("epoch 1/2") == 1
    results = json.loads((run / "results.json").read_text())
    assert results["command"].startswith("torchrun --nproc-per-node 2 afa.py --train-size")
    # One process evaluates it to the same table: an image meets the same noise.
    finished_in_process(f"--eval-only {run}", tmp_path)
    again = json.loads((run / "eval.json").read_text())
    assert again["checkpoints"] == results["checkpoints"] and again["method"]["curves"] == results["method"]["curves"]
    status, error = in_process(f"--resume {run}", capsys, tmp_path)
    assert status == 2 and "\n" not in error
    assert error.endswith("was trained by 2 processes, not 1: resume it with torchrun --nproc-per-node 2")


@pytest.fixture
def pretend(monkeypatch):
    def pretend(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world", lambda: world)

    return pretend


def split(n, *shape):
    g = torch.Generator().manual_seed(n)
    return data.Split(torch.randint(0, 256, (n, *shape, 3), generator=g, dtype=torch.uint8), torch.arange(n))


LOADERS = {"images": lambda s, **k: data.batches(s, 12, seed=1, epoch=2, pad=2, flip=True, **k),
           "clips": lambda s, **k: data.clip_batches(s, 12, seed=1, epoch=2, frames=3, flip=True, size=6, **k)}


@pytest.mark.parametrize("kind, n", [("images", 41), ("images", 12), ("clips", 25), ("clips", 9)])
def test_the_parts_of_a_batch_are_the_batch(kind, n, pretend):
    s = split(n, *[5] * (kind == "clips"), 8, 8)
    whole = list(LOADERS[kind](s))
    parts = []
    for rank in range(3):
        pretend(rank, 3)
        parts.append(list(LOADERS[kind](s)))
    assert len(whole) == max(n // 12, 1) == len(parts[0])
    for (x, y), *own in zip(whole, *parts):
        assert torch.equal(y, torch.cat([part[1] for part in own])) and len(own[0][1]) == min(12, n) // 3
        assert torch.equal(x, torch.cat([part[0] for part in own]))


@pytest.mark.parametrize("kind", LOADERS)
def test_host_and_device_give_the_same_batches(kind):
    s = split(41, *[5] * (kind == "clips"), 8, 8)
    batches = list(zip(LOADERS[kind](s), LOADERS[kind](s, streamed=True), strict=True))
    assert len(batches) == 3
    assert all(torch.equal(a, b) and a.stride() == b.stride() for pair in batches for a, b in zip(*pair))


def test_data_on_host_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setitem(data.READERS, "digits", lambda data_dir: distributed_program.few_digits())
    assert data.load("digits", val_size=10, data_on="host").augment["streamed"]
    assert "streamed" not in data.load("digits", val_size=10).augment  # auto, on a CPU
    tiny = TINY.replace("--gate-epochs 1", "--bn single")
    runs = [finished_in_process(f"{tiny} --data-on {where}", tmp_path)[0] for where in ("host", "device")]
    assert same(*(weights(run / "last.pt") for run in runs))


@pytest.mark.parametrize("n, batch_size, flag", [(100, 16, "--batch-size"), (10, 16, "--train-size")])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(n, batch_size, flag, pretend, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    pretend(1, 3)
    with pytest.raises(data.UserError, match=f"3 processes cannot share a batch of {min(n, batch_size)}.*{flag}"):
        data.steps_per_epoch(n, batch_size)
    assert data.steps_per_epoch(n, batch_size, shared=False) == max(n // batch_size, 1)  # of a run that is evaluated


def test_one_gpu_by_name_is_refused_for_several_processes(pretend):
    pretend(0, 2)
    with pytest.raises(data.UserError, match="--device cuda:1 is one GPU, and there are 2 processes"):
        data.device("cuda:1")
