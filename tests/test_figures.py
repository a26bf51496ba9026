"""benchmark/figures.py must draw every figure of finished runs, and answer a user's mistake in one line."""

import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from afa import AFANet, Args
from common import data

SCRIPT = Path(__file__).resolve().parent.parent / "benchmark" / "figures.py"
FIGURES = ("robustness_curve", "weights", "statistics", "training", "examples")
GRID = {"0": 0.9, "1": 0.85, "2": 0.8, "4": 0.7, "6": 0.5, "8": 0.4, "12": 0.1, "16": 0.0, "64": 0.0}
EPS, LAYERS = 8 / 255, 7
digits = functools.cache(data.READERS["digits"])


def make_run(folder, bn="dual", dataset="digits", finished=True):
    """The folder of a run of afa.py: its numbers made up, its network not trained, its files as the script's are."""
    folder.mkdir()
    args = dict(dataset=dataset, bn=bn, eps=EPS, norm="linf", arch="preactresnet8", width=4,
                data_dir=str(folder / "data"), train_size=100, val_size=100, test_size=20)
    data.save(folder / "args.json", dict(script="afa", dataset=dataset, seed=1, args=args))
    torch.manual_seed(0)
    net = AFANet(Args(**args), 10)
    data.save(folder / "best.pt", dict(script="afa", args=args, classes=10, net=net.state_dict(), epoch=2))
    with SummaryWriter(folder) as writer:
        for epoch in range(6):
            stage2 = bn == "dual" and epoch > 3
            for tag in ("fused",) if stage2 else ("robust", "clean") if bn == "dual" else ("robust",):
                writer.add_scalar(f"losses/{tag}_ce", 2 / (epoch + 1), 10 * epoch + 10)
            for tag, value in (("val/clean_acc", 0.9), ("val/robust_acc", 0.1 * epoch), ("charts/learning_rate", 0.1)):
                writer.add_scalar(tag, value, 10 * epoch + 10)
    if not finished:
        return folder
    names = ["model"] + ["w=0", "w=0.5", "w=1"] * (bn == "dual")
    weight = [[0.2 + 0.01 * layer + 0.05 * i if bn == "dual" else 1.0 for layer in range(LAYERS)] for i in range(9)]
    shift = [[[0.1 * layer * i for i in range(9)] for _ in range(2)] for layer in range(LAYERS)]
    statistic = {"monotone_share": {"mean": 0.6, "log_sd": 0.9}, "shift": shift}
    row = {"epoch": 2, "clean": 0.9, "fgsm": 0.6, "pgd20": 0.4, "pgd50_margin": 0.35, "worst": 0.3}
    method = {"curves": {name: GRID for name in names + ["oracle"] * (bn == "dual")},
              "strengths": [EPS * i / 8 for i in range(9)], "statistics": {name: statistic for name in names},
              "weight_mean": weight, "weight_sd": [[0.05] * LAYERS] * 9}
    data.save(folder / "results.json", dict(script="afa", dataset=dataset, seed=1, eps=EPS, evaluated=20,
                                            checkpoints={"best": row, "last": row}, robustness_curve=GRID,
                                            method=method))
    return folder


@pytest.fixture
def draw(monkeypatch, capsys):
    """`python benchmark/figures.py ...` in this process, where PyTorch is imported and the data set drawn already."""
    monkeypatch.setitem(data.READERS, "digits", digits)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = 0
        with matplotlib.rc_context():
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except SystemExit as exit:
                code = exit.code
            plt.close("all")
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


def refused(done, *words):
    """Exit status 2 and one line on stderr, with these words in it."""
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def check(folder, names):
    """These figures and no others are there: readable, wide enough, not too many bytes, and not empty."""
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(names)
    for path in folder.glob("*.png"):
        assert 5_000 < path.stat().st_size < 300_000, path
        with Image.open(path) as image:
            assert image.format == "PNG" and 1200 <= image.width <= 1600 and 400 <= image.height <= 1800, path
            colors = image.convert("RGB").getcolors(1 << 24)
        assert len(colors) > 20 and max(n for n, _ in colors) < 0.97 * image.width * image.height, path


@pytest.fixture(scope="module")
def afa(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "afa")


def test_one_run_draws_everything_into_its_folder(afa, draw):
    done = draw(afa)
    assert done.returncode == 0, done.stderr
    check(afa, FIGURES)
    assert done.stdout.splitlines() == [f"wrote {afa / name}.png" for name in FIGURES]


def test_several_runs_with_labels(afa, draw, tmp_path, monkeypatch):
    single = make_run(tmp_path / "single", bn="single")
    monkeypatch.chdir(tmp_path)
    done = draw(afa, single, "--labels", "AFA", "PGD-AT")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "figures", FIGURES)


def test_what_cannot_be_drawn_is_said_and_the_rest_is_drawn(draw, tmp_path):
    """A single BatchNorm has no weights, and of this data set there is a folder, but nothing in it."""
    run = make_run(tmp_path / "run", bn="single", dataset="cifar10")
    (run / "data" / "cifar-10-batches-py").mkdir(parents=True)
    for path in run.glob("events*"):
        path.unlink()
    done = draw(run, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out", ("robustness_curve", "statistics"))
    lines = done.stdout.splitlines()
    assert "no weights.png: no run predicts fusing weights" in lines
    assert any(line.startswith("no training.png: ") for line in lines)
    assert any(line.startswith("warning: no examples.png: ") and "cifar-10-batches-py" in line for line in lines)


def test_a_run_without_what_is_particular_to_a_method(afa, draw, tmp_path):
    """The schema that all scripts share is enough; an undefended network has no eps_max."""
    run = shutil.copytree(afa, tmp_path / "run", ignore=shutil.ignore_patterns("*.png", "*.pt"))
    for name, changes in (("results.json", dict(script="other", method={})), ("args.json", dict(args=dict(eps=0.0)))):
        content = json.loads((run / name).read_text())
        data.save(run / name, {**content, **changes})
    done = draw(run)
    assert done.returncode == 0, done.stderr
    check(run, ("robustness_curve", "training"))


def test_refusals(afa, draw, tmp_path):
    refused(draw(tmp_path / "missing"), "is not the folder of a run", "missing")
    unfinished = make_run(tmp_path / "unfinished", finished=False)
    refused(draw(afa, unfinished), "the run has not finished", "results.json", "--resume")
    refused(draw(afa, "--labels", "a", "b"), "--labels")
    (unfinished / "results.json").write_text("{")
    refused(draw(unfinished), "unfinished")
    (tmp_path / "file").touch()
    refused(draw(afa, "--out", tmp_path / "file"), "cannot be written")


def test_without_matplotlib(afa, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')")
    done = subprocess.run([sys.executable, SCRIPT, afa], env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True)
    refused(done, "matplotlib", "pip install -r requirements-dev.txt")
