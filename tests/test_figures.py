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
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import aalp as aalp_script
import abnn as abnn_script
import vfd_adv as vfd_script
from afa import AFANet, Args
from benchmark import figures
from common import data

SCRIPT = Path(__file__).resolve().parent.parent / "benchmark" / "figures.py"
FIGURES = ("robustness_curve", "weights", "statistics", "training", "examples")
OF_AALP = ("features", "conflicts", "sample_weights", "steps", "loss_surface")
OF_VFD = ("distances", "usefulness", "tradeoff")
ORDER = (*OF_AALP[:3], *OF_VFD, "threats", *OF_AALP[3:])
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
    method = {"curves": {name: GRID for name in names + ["oracle", "constant"] * (bn == "dual")},
              **({"constant": row} if bn == "dual" else {}),
              "strengths": [EPS * i / 8 for i in range(9)], "statistics": {name: statistic for name in names},
              "weight_mean": weight, "weight_sd": [[0.05] * LAYERS] * 9}
    data.save(folder / "results.json", dict(script="afa", dataset=dataset, seed=1, eps=EPS, evaluated=20,
                                            checkpoints={"best": row, "last": row}, robustness_curve=GRID,
                                            method=method))
    return folder


OBSERVED = [f"{n}_{level}_{kind}" for n in ("n50", "n90") for level in ("features", "map") for kind in ("clean", "adv")]
OBSERVED += [f"{kind}_{level}" for kind in ("conflicting", "overemphasised") for level in ("logits", "parameters")]


def make_aalp(folder, audit=True, epochs=4, **changes):
    """The folder of a run of aalp.py, like that of `make_run`. `changes` are arguments that differ from AALP's."""
    folder.mkdir()
    args = dict(dataset="digits", arch="preactresnet8", width=4, data_dir=str(folder / "data"), train_size=100,
                val_size=100, test_size=20, pairing_weight=1.0, guided_dropout="low", sample_weight="clean")
    args = vars(aalp_script.Args(**{**args, **changes}))
    data.save(folder / "args.json", dict(script="aalp", dataset="digits", seed=1, args=args))
    torch.manual_seed(0)
    net = aalp_script.build(aalp_script.Args(**args), 10)
    data.save(folder / "best.pt", dict(script="aalp", args=args, classes=10, net=net.state_dict(), epoch=2))
    with SummaryWriter(folder) as writer:
        for epoch in range(epochs):
            for tag in ("losses/clean_ce", "losses/robust_ce", "losses/pairing", "val/clean_acc", "val/robust_acc",
                        "charts/learning_rate"):
                writer.add_scalar(tag, 0.5 + 0.1 * epoch, 10 * epoch + 10)
    history = {k: [i / 20 + e / 100 for e in range(epochs)] for i, k in enumerate(OBSERVED)}
    history |= {"sample_weight": [0.2 + 0.1 * e for e in range(epochs)],
                "label_leak": [0.01 * e for e in range(epochs)],
                "weight_bins": [[float(b + e) for b in range(20)] for e in range(epochs)]}
    row = {"epoch": 2, "worst": 0.3, "clean": 0.9, "fgsm": 0.6, "pgd20": 0.4, "pgd50_margin": 0.35, "targeted": 0.3}
    method = {"curves": {"model": GRID}, "test": {k: v[-1] for k, v in history.items() if k in OBSERVED},
              "history": history, "mean_pairing_weight": 0.35}
    data.save(folder / "results.json", dict(script="aalp", dataset="digits", seed=1, eps=EPS, evaluated=20,
                                            checkpoints={"best": row, "last": row}, robustness_curve=GRID,
                                            method=method))
    if audit:
        curve = {loss: {k: 0.9 / k**power for k in (1, 2, 5, 10, 20)} for loss, power in (("ce", 0.3), ("margin", 0.4))}
        plane = [[0.1 * i + 0.01 * (j - 2) ** 2 for j in range(5)] for i in range(5)]  # i along the gradient
        data.save(folder / "audit.json", dict(eps=EPS, worst=0.25, evaluated=40,
                                              steps_curve=dict(evaluated=12, accuracy=curve),
                                              surface=dict(images=[0, 3], loss=[plane, plane])))
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
    lines = [line for line in done.stdout.splitlines() if line.startswith("wrote")]
    assert lines == [f"wrote {afa / name}.png" for name in FIGURES]
    assert [line.split(".png")[0] for line in done.stdout.splitlines() if line not in lines] == [
        f"no {name}" for name in ORDER]


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


def runs_of(*folders):
    runs = [figures.Run(folder) for folder in folders]
    for run, color, marker in zip(runs, figures.COLORS, figures.MARKERS):
        run.color, run.marker = color, marker
    return runs


def drawn(ax):
    """Values of the lines of a panel, in the order in which they were drawn."""
    return [line.get_ydata() for line in ax.lines]


@pytest.mark.parametrize(("changes", "label"), [
    ({}, "AALP"),
    (dict(method="aalp", guided_dropout="random"), "ALP + dropout (random) + weights"),
    (dict(method="alp", guided_dropout="none", sample_weight="none"), "ALP"),
    (dict(method="alp", sample_weight="none"), "ALP + dropout"),
    (dict(method="alp", guided_dropout="none"), "ALP + weights"),
    (dict(method="alp", guided_dropout="none", sample_weight="conflict"), "ALP + weights (conflict)"),
    (dict(method="alp", guided_dropout="none", sample_weight="none", control_of="runs/x"), "ALP control"),
    (dict(method="at", guided_dropout="none", sample_weight="none", pairing_weight=0.0), "AT"),
    (dict(eps=0.0), "undefended"),
])  # fmt: skip
def test_labels_of_aalp_runs(changes, label, tmp_path):
    info = dict(script="aalp", args=vars(aalp_script.Args(**{
        "pairing_weight": 1.0, "guided_dropout": "low", "sample_weight": "clean", **changes})))
    data.save(tmp_path / "args.json", info)
    data.save(tmp_path / "results.json", dict(script="aalp", eps=EPS))
    assert figures.Run(tmp_path).label == label


def test_runs_of_aalp_side_by_side(draw, tmp_path):
    plain = dict(guided_dropout="none", sample_weight="none")
    folders = make_aalp(tmp_path / "a"), make_aalp(tmp_path / "b", audit=False, pairing_weight=0.0, epochs=2, **plain)
    done = draw(*folders, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out", ("robustness_curve", *OF_AALP, "training", "examples"))
    with matplotlib.rc_context():
        numbers_of(*runs_of(*folders))
        plt.close("all")


def make_vfd(folder, weight=0.64, teacher=True, epochs=3, checkpoint=False, accs=(0.8, 0.5), seed=1, **changes):
    """The folder of a run of vfd_adv.py, like that of `make_run`; `weight` is both lambdas."""
    folder.mkdir(parents=True)
    args = dict(arch="preactresnet8", width=4, data_dir=str(folder / "data"), train_size=100, val_size=100,
                test_size=20, lambda_adv=weight, lambda_nat=weight, beta=0.0, seed=seed)
    args = vars(vfd_script.Args(**{**args, **changes}))
    data.save(folder / "args.json", dict(script="vfd_adv", dataset="digits", seed=seed, args=args))
    history = {"val_clean": [accs[0]] * epochs, "val_robust": [accs[1]] * epochs}
    useful = {"student": {"clean": [0.2, 0.6, 0.4], "adv": [0.1 + weight / 10, 0.3, -0.1]}}
    method = {"curves": {"model": GRID}}
    if teacher:
        keys = ("cka_clean", "distance_clean", "cka_adv", "distance_adv")
        history |= {k: [0.1 + i / 10 + e / 100 + weight / 10 for e in range(epochs)] for i, k in enumerate(keys)}
        useful = {"teacher": {"clean": [0.9, 0.5, 0.7], "adv": [-0.5, -0.1, 0.2]}} | useful
        method |= {"teacher": {"test_clean": 0.99, "arch": "preactresnet8", "width": 4, "val_clean": 0.98},
                   "distance": {k: history[k][-1] for k in keys}}
    row = {"epoch": 2, "worst": 0.3, "clean": 0.9, "fgsm": 0.6, "pgd20": 0.4, "pgd50_margin": 0.35, "targeted": 0.3}
    data.save(folder / "results.json", dict(script="vfd_adv", dataset="digits", seed=seed, eps=EPS, evaluated=20,
                                            checkpoints={"best": row, "last": row}, robustness_curve=GRID,
                                            method=method | {"history": history, "usefulness": useful}))
    if checkpoint:
        net = vfd_script.build(vfd_script.Args(**args), 10)
        data.save(folder / "best.pt", dict(script="vfd_adv", args=args, classes=10, net=net.state_dict(), epoch=2))
        with SummaryWriter(folder) as writer:
            for epoch in range(epochs):
                for tag in ("losses/robust_ce", "losses/distance_adv", "val/robust_acc", "charts/learning_rate"):
                    writer.add_scalar(tag, 0.5 + 0.1 * epoch, 10 * epoch + 10)
    return folder


@pytest.mark.parametrize(("changes", "label"), [
    (dict(lambda_adv=0.0, lambda_nat=0.0), "AT"),
    (dict(lambda_adv=0.0, lambda_nat=0.0, base="trades"), "TRADES"),
    (dict(lambda_adv=0.0, lambda_nat=0.0, clean_statistics=True), "AT + clean statistics"),
    (dict(lambda_adv=0.0, lambda_nat=0.0, eps=0.0), "undefended"),
    (dict(eps=0.0), "undefended + VFD"),
    (dict(base="mart"), "MART + VFD"),
    (dict(lambda_nat=0.0), "AT + adv. pair"),
    (dict(lambda_adv=0.0), "AT + clean pair"),
    (dict(distill="logits"), "AT + VFD (logits)"),
    (dict(clean_statistics=True), "AT + VFD + clean statistics"),
])  # fmt: skip
def test_labels_of_vfd_runs(changes, label, tmp_path):
    data.save(tmp_path / "args.json", dict(script="vfd_adv", args=vars(vfd_script.Args(
        **{"lambda_adv": 0.5, "lambda_nat": 0.5, **changes}))))
    data.save(tmp_path / "results.json", dict(script="vfd_adv", eps=EPS))
    assert figures.Run(tmp_path).label == label


def test_runs_of_vfd_side_by_side(draw, tmp_path):
    folders = (make_vfd(tmp_path / "a", checkpoint=True), make_vfd(tmp_path / "b", weight=1.92, accs=(0.9, 0.4)),
               make_vfd(tmp_path / "c", weight=0.0, teacher=False, accs=(0.7, 0.6), checkpoint=True))
    done = draw(*folders[::2], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out", ("robustness_curve", *OF_VFD, "training", "examples"))
    with matplotlib.rc_context():
        numbers_of_vfd(*runs_of(*folders))
        plt.close("all")


def numbers_of_vfd(low, high, at):
    error, cka = figures.distances([low, high, at]).axes  # AT has no teacher
    for ax, key in ((error, "distance"), (cka, "cka")):
        expected = [run.history[f"{key}_{kind}"] for run in (low, high) for kind in ("clean", "adv")]
        assert all(np.allclose(a, b) for a, b in zip(drawn(ax)[:4], expected, strict=True))
        assert [line.get_linestyle() for line in ax.lines[:4]] == ["-", "--"] * 2
    assert len(cka.lines) == 4 and np.allclose(drawn(error)[4], 1)
    assert figures.distances([at]) == "no run has a teacher to measure the distance to"
    saved = high.history.pop("distance_clean"), high.history.pop("distance_adv")  # as for features of another width
    figure = figures.distances([low, high])
    assert [len(ax.lines) for ax in figure.axes] == [3, 4]
    high.history["distance_clean"], high.history["distance_adv"] = saved

    high.label = "other"
    panels = figures.usefulness([low, high, at]).axes
    *panels, clean, adv = panels
    assert [ax.get_title().split("\n")[0] for ax in panels] == ["teacher", low.label, "other", at.label]
    assert "mean 0.70 clean, -0.13 adv." in panels[0].get_title() and panels[0].get_title().endswith(": 67 %")
    found = [low.method["usefulness"]["teacher"], *(run.method["usefulness"]["student"] for run in (low, high, at))]
    for ax, values, *curves in zip(panels, found, drawn(clean), drawn(adv)):
        assert np.allclose(ax.collections[-1].get_offsets().T, [values["clean"], values["adv"]])
        assert np.allclose(curves, [sorted(values[k])[::-1] for k in ("clean", "adv")])
    high.method["usefulness"]["teacher"] = {"clean": [0.5] * 3, "adv": [0.1] * 3}  # another teacher is drawn too
    titles = [ax.get_title() for ax in figures.usefulness([low, high, at]).axes]
    assert sum(title.startswith("teacher of") for title in titles) == 2
    assert isinstance(figures.usefulness([]), str)

    (ax,) = figures.tradeoff([high, at, low]).axes
    (bars,) = ax.containers  # in the order of lambda, in percent, with the errors of 100 images
    assert np.allclose(bars.lines[0].get_data(), [[70, 80, 90], [60, 50, 40]])
    across = bars.lines[2][0].get_segments()
    assert np.allclose([s[1][0] - s[0][0] for s in across], [200 * (p * (1 - p) / 100) ** 0.5 for p in (0.7, 0.8, 0.9)])
    assert {tuple(np.round(text.xy)): text.get_text() for text in ax.texts} == {
        (70, 60): "λ = 0", (80, 50): "λ = 0.64", (90, 40): "λ = 1.92"}
    assert ax.get_xlim()[0] > 60 and ax.get_xlim()[1] < 95
    assert "differ in lambda" in figures.tradeoff([low]) and "differ in lambda" in figures.tradeoff([])


def test_lines_of_the_tradeoff(tmp_path):
    """Seeds are averaged; another base, beta, layer or pair is another line; the base alone is in all of its own."""
    changes = [dict(weight=0.0, accs=(0.7, 0.6), teacher=False), dict(weight=0.0, accs=(0.8, 0.4), seed=2),
               dict(), dict(lambda_nat=0.0), dict(distill="logits"), dict(base="trades", beta=6.0),
               dict(base="trades", beta=6.0, weight=0.0), dict(base="trades", beta=3.0, weight=0.0)]
    runs = runs_of(*(make_vfd(tmp_path / str(i), **more) for i, more in enumerate(changes)))
    lines = figures.lines_over_lambda([*runs, *runs_of(make_vfd(tmp_path / "mart", base="mart"))])
    points = {name: {at: len(group) for at, group in line.items()} for name, line in lines.items()}
    assert points == {
        "AT, distill features": {(0, 0): 2, (0.64, 0.64): 1}, "AT, distill logits": {(0, 0): 2, (0.64, 0.64): 1},
        "AT, adversarial pair, distill features": {(0, 0): 2, (0.64, 0): 1},
        "TRADES": {(0, 0): 1, (0.64, 0.64): 1}, "TRADES, over β": {(3,): 1, (6,): 1}}  # fmt: skip
    with matplotlib.rc_context():
        together, *alone = figures.tradeoff(runs).axes
        titles = [ax.get_title() for ax in alone]
        assert set(titles) == {*points} and titles[-1] == "TRADES, over β" and len(together.containers) == 5
        assert np.allclose(alone[0].containers[0].lines[0].get_xydata()[0], [75, 50])
        assert {"λ adv. 0.64, nat. 0", "β = 3"} < {text.get_text() for ax in alone for text in ax.texts}
        heights = sorted(text.xyann[1] for text in alone[-1].texts)
        assert min(np.diff(heights)) > 0.08 and 0 <= heights[0] and heights[-1] <= 1  # two of the points are one
        plt.close("all")


def test_tradeoff_of_a_csv(draw, tmp_path):
    """A sweep's rows are enough: its runs may be gone. Presets fill in what the commands leave out."""
    head = "script,dataset,setting,seed,checkpoint,val_clean,val_robust,command"
    flags = {"at 0": "--lambda-adv 0 --lambda-nat 0", "at 1": "--lambda-adv 1 --lambda-nat 1 --data-on host",
             "trades": "--base trades --lambda-adv 0 --lambda-nat 0 --beta 6",
             "beta": "--base trades --lambda-adv=0 --lambda-nat=0 --beta 2"}
    rows = [f"vfd_adv,digits,{k},{seed},best,{0.5 + seed / 10},0.{i + 1},torchrun -m x vfd_adv.py --seed {seed} {v}"
            for i, (k, v) in enumerate(flags.items()) for seed in (1, 2)]
    csv = tmp_path / "sweep.csv"
    csv.write_text("\n".join([head, *rows]))
    (runs,) = figures.rows_of_sweep(csv).values()
    means = {name: {at: np.mean([[*run.val.values()] for run in group], 0).round(3).tolist()
                    for at, group in line.items()} for name, line in figures.lines_over_lambda(runs).items()}
    assert means == {"AT": {(0, 0): [0.65, 0.1], (1, 1): [0.65, 0.2]},
                     "TRADES, over β": {(2,): [0.65, 0.4], (6,): [0.65, 0.3]}}
    done = draw(csv, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tradeoff_digits.png"]
    csv.write_text("\n".join([head, rows[0].replace("--lambda-nat 0", "")]))
    refused(draw(csv), "without the weights", str(csv))
    csv.write_text("\n".join([head, rows[0]]))
    refused(draw(csv), "no two runs", str(csv))
    csv.write_text("\n".join([head.replace("val_", ""), rows[0]]))
    refused(draw(csv), "no sweep", str(csv))
    refused(draw(tmp_path / "none.csv"), "no sweep", "none.csv")


def make_abnn(folder, **changes):
    """The folder of a run of abnn.py, like that of `make_run`."""
    folder.mkdir()
    args = {**abnn_script.DIGITS, "width": 4,
            "train_size": 100, "val_size": 100, "test_size": 20, "data_dir": str(folder / "data"), **changes}
    args = abnn_script.Args(**args)
    data.save(folder / "args.json", dict(script="abnn", dataset="digits", seed=1, args=vars(args)))
    torch.manual_seed(0)
    net = abnn_script.build(args, 10)
    data.save(folder / "best.pt", dict(script="abnn", args=vars(args), classes=10, net=net.state_dict(), epoch=2))
    row = {"epoch": 2, "worst": 0.3, "clean": 0.9, "fgsm": 0.6, "pgd20": 0.4, "pgd50_margin": 0.35, "targeted": 0.3}
    attacks = {k: 0.1 * i for i, k in enumerate(abnn_script.KINDS)}
    threats = {"worst": {"clean": 0.9, **attacks, "all": 0.0}, "A ce": attacks, "C ce": attacks,
               "no gradient": {k: v for k, v in attacks.items() if k != "roa_search"}}
    curves = {"model": GRID} | ({"A": GRID, "twin": GRID} if args.defense == "abnn" else {})
    data.save(folder / "results.json", dict(
        script="abnn", dataset="digits", seed=1, eps=EPS, evaluated=20, checkpoints={"best": row, "last": row},
        robustness_curve=GRID, method={"threats": threats, "curves": curves}))
    return folder


def test_runs_of_abnn(draw, tmp_path):
    run, plain = make_abnn(tmp_path / "abnn"), make_abnn(tmp_path / "none", defense="none")
    done = draw(run)
    assert done.returncode == 0, done.stderr
    check(run, ("robustness_curve", "threats", "examples"))
    with matplotlib.rc_context():
        both = runs_of(run, plain)
        ax, other, bar = figures.threats(both).axes
        written = [text.get_text() for text in ax.texts]
        assert written[:8] == ["90.0", "0.0", "10.0", "20.0", "30.0", "40.0", "50.0", "0.0"] and len(written) == 25
        assert [label.get_text() for label in ax.get_yticklabels()] == ["worst", "A ce", "C ce", "no gradient"]
        assert "ABNN flat" in ax.get_title() and "undefended" in other.get_title()
        (ax,) = figures.robustness_curve(both).axes
        labels = [line.get_label() for line in ax.lines]
        assert "ABNN flat, no gradient through S (A)" in labels and not any("twin" in label for label in labels)
        assert not ax.texts  # no eps_max: it was not trained with attacks
        plt.close("all")


@pytest.mark.parametrize(("changes", "label"), [
    ({}, "ABNN flat"),
    (dict(statistics="channel", moments="batch"), "ABNN channel, moments batch"),
    (dict(equalised=False, align_weight=1.0), "ABNN flat, equalised False, align weight 1.0"),
    (dict(defense="none"), "undefended"),
    (dict(defense="at"), "PGD-AT"),
])  # fmt: skip
def test_labels_of_abnn_runs(changes, label):
    assert figures.abnn_label(vars(abnn_script.Args(**{**abnn_script.DIGITS, **changes}))) == label


def test_more_runs_than_colours_are_for_the_tradeoff(afa, draw, tmp_path):
    folders = [make_vfd(tmp_path / str(i), weight=i / 10, accs=(0.8, 0.4 + i / 100)) for i in range(8)]
    done = draw(*folders, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out", ("tradeoff",))
    assert "no distances.png: it takes at most 7 runs" in done.stdout.splitlines()
    refused(draw(*[afa] * 8), "one to 7 folders", "lambda")


def numbers_of(full, at):
    history, audit = full.history, full.audit
    axes = figures.features([full, at]).axes
    for ax, key in zip(axes, ("n50_features", "n50_map", "n90_features", "n90_map")):
        expected = [run.history[f"{key}_{kind}"] for run in (full, at) for kind in ("clean", "adv")]
        assert all(np.allclose(a, b) for a, b in zip(drawn(ax), expected, strict=True))
    axes = figures.conflicts([full, at]).axes  # no pairing in AT
    for ax, key in zip(axes, OBSERVED[-4:], strict=True):
        assert len(ax.lines) == 1 and np.allclose(drawn(ax), history[key])
    assert figures.conflicts([at]) == "no run pairs logits"

    figure = figures.sample_weights([full, at])
    map_, leak = figure.axes[:2]
    shares = map_.collections[0].get_array().reshape(20, 4)
    assert np.allclose(shares.sum(0), 100) and np.allclose(shares[:, 0], 100 * np.arange(20) / 190)
    assert all(np.allclose(values, history["sample_weight"]) for values in drawn(map_))
    assert np.allclose(drawn(leak)[0], [0, 1, 2, 3]) and len(leak.lines) == 2  # the other is 0
    assert isinstance(figures.sample_weights([at]), str)

    (ax,) = figures.steps([full, at]).axes
    assert ax.get_xscale() == "log" and len(ax.lines) == 2
    for line, points in zip(ax.lines, audit["steps_curve"]["accuracy"].values()):
        assert np.allclose(line.get_xdata(), [1, 2, 5, 10, 20])
        assert np.allclose(line.get_ydata(), [100 * v for v in points.values()])
    assert "audit.py" in figures.steps([at]) and "audit.py" in figures.loss_surface([at])

    panels = [ax for ax in figures.loss_surface([full, at]).axes if "image" in ax.get_title()]
    assert [ax.get_title().split(":")[0] for ax in panels] == ["image 0", "image 3"]
    assert "to the right +0.2,\nup or down at most +0.04" in panels[0].get_title()
    for collection in panels[0].collections[:1]:  # bright where the loss is high: at the right, along the gradient
        low, high = (collection.get_paths()[i].vertices[:, 0].mean() for i in (0, -2))
        assert low < -0.3 and high > 0.3


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
