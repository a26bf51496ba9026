"""benchmark/collect.py names settings by what a user typed; benchmark/run.py tells by the same name what is done."""

import csv
import importlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

import aalp
import abnn
import vfd_adv
from benchmark import run
from benchmark.collect import GONE, collect, measured, read, setting
from common import data

RESULTS = sorted((ROOT / "results").glob("*.csv"))


def info(**arguments):
    """args.json of a run of aalp.py with these flags: its preset and its method fill in the rest."""
    args = aalp.Args(**arguments)
    if args.control_of:
        args = replace(args, method="alp", pairing_weight=arguments.get("pairing_weight", 0.4321))
    preset = {**aalp.PRESETS[args.dataset][args.preset], **aalp.METHODS[args.method]}
    args = replace(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    return json.loads(json.dumps({"args": asdict(args)}))


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, "default"),
    (dict(method="alp"), "--method alp"),
    (dict(method="at", seed=3), "--method at"),
    (dict(method="alp", guided_dropout="low"), "--method alp --guided-dropout low"),
    (dict(sample_weight="conflict", pairing_weight=4.0), "--pairing-weight 4.0 --sample-weight conflict"),
    (dict(control_of="runs/a", epochs=3), "--epochs 3 --control-of RUN"),
    (dict(control_of="runs/b", pairing_weight=0.3), "--control-of RUN"),
    (dict(control_of="runs/b", guided_dropout="low"), "--guided-dropout low --control-of RUN"),
    (dict(method="at", eps=0.0), "--eps 0/255 --method at"),
    (dict(dataset="cifar10", preset="paper", method="alp"), "--preset paper --method alp"),
])  # fmt: skip
def test_setting(arguments, expected):
    assert setting("aalp", info(**arguments)) == expected


def test_setting_writes_switches_as_flags_and_zeros_as_numbers():
    args = {**vars(abnn.Args()), **abnn.DIGITS, "compile": True, "equalised": False, "eps_warmup_epochs": 0.0}
    assert setting("abnn", {"args": json.loads(json.dumps(args))}) == (
        "--compile --eps-warmup-epochs 0.0 --no-equalised")


def test_what_an_earlier_version_filled_in_with_another_value_is_told():
    run = info()
    run["preset"] = ["lr", "epochs", "guided_dropout"]
    assert setting("aalp", run) == "default"
    run["args"] |= {"epochs": 3, "lr": 0.5}
    assert setting("aalp", run) == "--epochs 3 --lr 0.5"


def test_a_run_of_an_earlier_version_with_a_flag_that_is_gone_has_its_name():
    args = {**vars(abnn.Args()), **abnn.DIGITS, "gone": False}
    assert setting("abnn", {"args": json.loads(json.dumps(args))}) == "default"
    assert setting("abnn", {"args": json.loads(json.dumps(args | {"gone": True}))}) == "--gone"
    args = {**vars(vfd_adv.Args()), **vfd_adv.DIGITS, **GONE["vfd_adv"]}
    assert setting("vfd_adv", {"args": json.loads(json.dumps(args))}) == "default"
    assert setting("vfd_adv", {"args": json.loads(json.dumps(args | {"distance": "cosine"}))}) == "--distance cosine"


def results(seed, command, **own):
    """results.json of a run of aalp.py."""
    scores = dict(epoch=1, worst=0.1 * seed, clean=0.9, fgsm=0.5, pgd20=0.4, pgd50_margin=0.35, targeted=0.3)
    return dict(script="aalp", dataset="digits", seed=seed, eps=8 / 255, evaluated=20, train_seconds=1.0,
                images_per_second=2.0, device="cpu", python="3", torch="2", commit="c", robustness_curve={"0": 0.9},
                command=command, checkpoints={"best": scores, "last": scores}, **own)


def test_controls_of_all_seeds_are_one_setting_without_the_folders_of_the_machine(tmp_path, monkeypatch, capsys):
    for seed in (1, 2, 3):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        of = ("--control-of ", "--control_of ", "--control-of=")[seed - 1]
        command = f"python aalp.py --data-dir=/d {of}runs/{seed} --seed {seed} --runs-dir {tmp_path}"
        (folder / "args.json").write_text(json.dumps(
            {"command": command} | info(seed=seed, control_of=f"runs/{seed}", pairing_weight=seed / 10)))
        (folder / "results.json").write_text(json.dumps(results(seed, command)))
    words = ["collect.py", tmp_path / "out.csv", *sorted(tmp_path.glob("run*"))]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    runpy.run_path(str(ROOT / "benchmark" / "collect.py"), run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'out.csv'}: 6 rows\n"
    with open(tmp_path / "out.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {(r["dataset"], r["setting"], r["targeted"]) for r in rows} == {("digits", "--control-of RUN", "0.3")}
    assert {(r["seed"], r["worst"]) for r in rows} == {("1", "0.1"), ("2", "0.2"), ("3", str(0.1 * 3))}
    assert [r["command"] for r in rows if r["checkpoint"] == "best"] == [
        "python aalp.py --control-of RUN --seed 1", "python aalp.py --control_of RUN --seed 2",
        "python aalp.py --control-of=RUN --seed 3"]


def test_a_run_that_takes_the_place_of_another_is_said(tmp_path, capsys):
    for name in "ab":
        make_run(tmp_path / name)
    for _again in range(2):
        assert len(collect(tmp_path / "out.csv", [tmp_path / "a"])) == 2
    assert capsys.readouterr().err == ""
    collect(tmp_path / "out.csv", [tmp_path / "a", tmp_path / "b"])
    assert f"{tmp_path / 'b'} has the script, data, flags and seed of {tmp_path / 'a'}" in capsys.readouterr().err


def test_slips_are_one_line(tmp_path):
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    for out, runs, message in ((tmp_path / "no" / "x.csv", [tmp_path], "there is no folder"),
                               (tmp_path, [tmp_path], "is not a csv of results"),
                               (tmp_path / "foreign.csv", [tmp_path], "is not a csv of results"),
                               (tmp_path / "x.csv", ["/nope"], "/nope is no folder of a run")):
        with pytest.raises(data.UserError, match=message):
            collect(out, runs)
    folder = make_run(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("one line\n")
    for out, message in ((tmp_path / "notes.txt", "is not a csv of results"), ("/dev/null", "a folder or a device")):
        with pytest.raises(data.UserError, match=message):
            collect(out, [folder])
    assert (tmp_path / "notes.txt").read_text() == "one line\n" and Path("/dev/null").is_char_device()
    (tmp_path / "link.csv").symlink_to(tmp_path / "kept.csv")
    assert len(collect(tmp_path / "link.csv", [folder])) == 2 and (tmp_path / "link.csv").is_symlink()
    with pytest.raises(data.UserError, match="which does not keep validation accuracies"):
        collect(tmp_path / "x.csv", [folder], validation=True)
    for text in ("{", "{}", "[]", '{"eps": null}'):
        (folder / "audit.json").write_text(text)
        with pytest.raises(data.UserError, match="audit.json cannot be read"):
            collect(tmp_path / "x.csv", [folder])
    good = {name: (folder / name).read_text() for name in ("args.json", "results.json")}
    for name, text in (("results.json", "{}"), ("results.json", "[]"), ("args.json", "{"),
                       ("results.json", good["results.json"].replace('"robustness_curve"', '"gone"')),
                       ("results.json", good["results.json"].replace('"aalp"', '"gone"')),
                       ("args.json", good["args.json"].replace("aalp.py", "aalp"))):
        for each, content in good.items():
            (folder / each).write_text(content)
        (folder / name).write_text(text)
        with pytest.raises(data.UserError, match="has no valid args.json or results.json"):
            collect(tmp_path / "x.csv", [folder])


def make_run(folder, seed=1):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"command": "python aalp.py"} | info(seed=seed)))
    (folder / "results.json").write_text(json.dumps(results(seed, "python aalp.py")))
    return folder


AUDIT = dict(worst=0.05, evaluated=10, quick=True, autoattack=None, warnings=[], eps=8 / 255, norm="linf", epoch=1)


@pytest.mark.parametrize("other", [{}, {"eps": 1 / 255}, {"norm": "l2"}, {"epoch": 7}], ids=str)
def test_an_audit_of_something_else_is_no_part_of_a_row(other, tmp_path, capsys):
    (make_run(tmp_path / "run") / "audit.json").write_text(json.dumps(AUDIT | other))
    rows = collect(tmp_path / "x.csv", [tmp_path / "run"])
    assert [row.get("audit") for row in rows] == [None if other else 0.05, None]
    assert ("another eps or norm, or of another epoch" in capsys.readouterr().err) == bool(other)


def test_lists_that_write_one_csv_at_the_same_time_lose_no_row(tmp_path):
    folders = [make_run(tmp_path / f"run{seed}", seed) for seed in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:  # the lock is that of an open file: it holds between threads as well
        [*pool.map(lambda folder: collect(tmp_path / "x.csv", [folder]), folders)]
    assert len(read(tmp_path / "x.csv")) == 16


def test_what_the_claims_rest_on_becomes_columns():
    method = {"threats": {"worst": {"clean": 0.9, "all": 0.1}, "A ce": {"roa": 0.5}},
              "curves": {"model": {"8": 0.4}, "w=0": {"8": 0.3}}, "constant": {"worst": 0.2},
              "statistics": {"w=0": {"monotone_share": {"mean": 0.7}}},
              "strengths": [0.0, 8 / 255], "weight_mean": [[0.2, 0.4], [0.6, 0.8]],
              "weight_sd": [[0.0, 0.0], [0.0, 0.1]],
              "usefulness": {"student": {"clean": [0.2, 0.4]}}, "distance": {"cka_adv": 0.6},
              "test": {"n50_map_adv": 7.0}, "history": {"conflicting_logits": [0.0, 1.0], "val_clean": [0.1]}}
    assert measured(method) == {
        "worst clean": 0.9, "worst all": 0.1, "A ce roa": 0.5, "w=0 pgd20@8": 0.3, "w=0 monotone mean": 0.7,
        "constant worst": 0.2, "weight@0": pytest.approx(0.3), "weight@8": pytest.approx(0.7), "weight_sd@0": 0.0,
        "weight_sd@8": pytest.approx(0.05), "student usefulness clean": pytest.approx(0.3),
        "conflicting_logits over epochs": 0.5, "n50_map_adv": 7.0, "cka_adv": 0.6}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_command_is_known_by_the_key_of_its_row(path, tmp_path):
    """What benchmark/run.py makes of a command is what benchmark/collect.py made of its args.json."""
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert len(collect(copy, [])) == len(read(path)) and copy.read_bytes() == path.read_bytes()
    known = {k[:4]: row["command"] for k, row in read(path).items()}
    assert known
    for wanted, command in known.items():
        assert run.parse(shlex.split(command))[0] == run.identity(*wanted), command


FAKE = """import shutil, sys
from pathlib import Path
words = sys.argv[1:]
with open("log", "a") as f:
    print(*words, file=f)
seed = words[words.index("--seed") + 1]
if Path("broken").exists() and seed == "2":
    sys.exit(3)
shutil.copytree("made/" + seed + "control" * ("--control-of" in words),
                f"runs/digits__aalp__{seed}__{len(list(Path('runs').glob('*')))}")
"""


def test_a_list_that_stopped_goes_on_where_it_was(tmp_path, monkeypatch, capfd):
    (tmp_path / "aalp.py").write_text(FAKE)
    (tmp_path / "broken").touch()
    for seed in (1, 2):
        for name, own in ((f"{seed}", {}), (f"{seed}control", dict(control_of="runs/a"))):
            folder = tmp_path / "made" / name
            folder.mkdir(parents=True)
            (folder / "args.json").write_text(json.dumps(
                {"command": "python aalp.py", "seed": seed} | info(seed=seed, **own)))
            (folder / "results.json").write_text(json.dumps(results(seed, "python aalp.py")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    lines = [f"python aalp.py --seed {seed}{flags}" for seed in (1, 2) for flags in ("", " --control-of RUN")]
    out, log = tmp_path / "out.csv", tmp_path / "log"

    with pytest.raises(SystemExit) as stop:
        run.main(run.Args(out), lines)
    ran = ["--seed 1", "--seed 1 --control-of runs/digits__aalp__1__0", "--seed 2"]
    assert stop.value.code == 3 and log.read_text().splitlines() == ran
    assert {(k[2], k[3]) for k in read(out)} == {("default", "1"), ("--control-of RUN", "1")}

    capfd.readouterr()
    run.main(run.Args(out, dry_run=True), lines)
    shown = capfd.readouterr()
    assert shown.out.splitlines() == lines[2:] and "2 of 4 runs" in shown.err
    run.main(run.Args(out, dry_run=True), ["", " # finished: runs/a", *lines])
    assert "2 of 4 runs" in capfd.readouterr().err
    for i, content in enumerate(("{", "{}")):
        (stray := tmp_path / "runs" / f"digits__aalp__2__stray{i}").mkdir()
        for name in ("args.json", "results.json"):
            (stray / name).write_text(content)
    run.main(run.Args(out, dry_run=True), lines[2:])
    shown = capfd.readouterr()
    assert shown.out.splitlines() == lines[2:] and shown.err.count("stray") == 2
    for i in (0, 1):
        shutil.rmtree(tmp_path / "runs" / f"digits__aalp__2__stray{i}")

    (tmp_path / "broken").unlink()
    run.main(run.Args(out), lines)
    ran += ["--seed 2", "--seed 2 --control-of runs/digits__aalp__2__2"]
    assert log.read_text().splitlines() == ran
    out.unlink()  # the folders are there still: they are collected, and nothing runs
    run.main(run.Args(out), lines)
    run.main(run.Args(out), lines)
    assert log.read_text().splitlines() == ran and len(read(out)) == 8


@pytest.mark.parametrize(("lines", "also", "message"), [
    (["afa.py --seed 1"], "", "a list has lines `python SCRIPT.py FLAGS`"),
    (["python"], "", "a list has lines `python SCRIPT.py FLAGS`"),
    (["python nothere.py"], "", "a list has lines `python SCRIPT.py FLAGS`"),
    (["python benchmark/audit.py runs/a"], "", "a list has lines `python SCRIPT.py FLAGS`"),
    (["python afa.py --data-dir 'a"], "", "a line of the list, or --also, cannot be read"),
    (["python afa.py"], "--data-dir 'a", "a line of the list, or --also, cannot be read"),
    (["python afa.py"], "", "there is no folder")])
def test_a_bad_list_is_refused_before_any_run(lines, also, message, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "execute", lambda words: pytest.fail("a run began"))
    out = tmp_path / "x.csv" if "folder" not in message else tmp_path / "no" / "x.csv"
    with pytest.raises(data.UserError, match=message):
        run.main(run.Args(out, also=also), lines)


def test_an_audit_runs_on_the_device_of_its_run(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "finished", lambda *_: tmp_path)
    monkeypatch.setattr(run, "rows", lambda folder: [{}])
    monkeypatch.setattr(run, "collect", lambda *_: None)
    monkeypatch.setattr(run, "execute", lambda words: ran.append(words[2:]))
    ran = []
    run.main(run.Args(tmp_path / "out.csv", audit="quick", also="--device cuda:1"), ["python aalp.py"])
    assert ran == [[str(tmp_path), "--device", "cuda:1", "--quick"]]


FAKE_AUDIT = """import json, sys
from pathlib import Path
with open("log", "a") as f:
    print("audit", *sys.argv[2:], file=f)
Path(sys.argv[1], "audit.json").write_text(json.dumps(dict(
    worst=0.05, evaluated=20, quick="--quick" in sys.argv, autoattack=0.05, warnings=["a", "b c"], eps=8 / 255,
    norm="linf", epoch=1)))
"""


@pytest.mark.parametrize("audit, images, of, enough", [
    ("quick", 200, 500, "quick"), ("quick", 100, 500, ""), ("quick", 100, 100, "quick"), ("", "", 500, ""),
    ("full", 500, 500, "quick full"), ("full", 250, 500, "quick"), ("full", 1000, 10000, "quick full")])
def test_an_audit_of_few_images_is_not_the_one_that_a_list_asks_for(audit, images, of, enough):
    row = {"audit_mode": audit, "audit_evaluated": str(images), "evaluated": str(of)}
    assert [mode for mode in ("quick", "full") if run.audited(row, mode)] == enough.split()
    assert run.audited(row, "no")


def test_a_list_audits_its_runs_and_those_in_the_csv_once(tmp_path, monkeypatch, capfd):
    (tmp_path / "aalp.py").write_text(FAKE)
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "audit.py").write_text(FAKE_AUDIT)
    for seed in (1, 2):
        folder = tmp_path / "made" / str(seed)
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"command": "python aalp.py", "seed": seed} | info(seed=seed)))
        (folder / "results.json").write_text(json.dumps(results(seed, "python aalp.py")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    out, lines = tmp_path / "out.csv", ["python aalp.py --seed 1", "python aalp.py --seed 2"]
    run.main(run.Args(out), lines[:1])
    for _ in range(2):
        run.main(run.Args(out, audit="quick"), lines)
    assert (tmp_path / "log").read_text().splitlines() == ["--seed 1", "audit --quick", "--seed 2", "audit --quick"]
    found = {(k[3], k[4]): (row["audit"], row["audit_mode"], row["audit_evaluated"], row["audit_warnings"])
             for k, row in read(out).items()}
    assert found["1", "best"] == found["2", "best"] == ("0.05", "quick", "20", "a; b c")
    assert found["1", "last"] == ("", "", "", "")
    for mode in ("full", "full", "quick"):  # a quick one is not enough for the first, and more than enough for the last
        run.main(run.Args(out, audit=mode), lines[:1])
    assert (tmp_path / "log").read_text().splitlines()[4:] == ["audit"]
    path = next(tmp_path.glob("runs/*__1__*/audit.json"))  # one at another radius is not what was asked for
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eps": 1 / 255}))
    kept = out.read_text()
    out.unlink()
    run.main(run.Args(out, audit="quick"), lines[:1])
    assert (tmp_path / "log").read_text().splitlines()[5:] == ["audit --quick"]
    out.write_text(kept)

    shutil.rmtree(tmp_path / "runs")  # a run that was audited stays done, and one whose folder is gone is not repeated
    out.write_text(out.read_text().replace("0.05", ""))
    capfd.readouterr()
    run.main(run.Args(out, audit="quick"), lines)
    assert "0 of 2 runs" in capfd.readouterr().err


LISTS = {name: parts.split() for name, parts in (
    ("afa", "digits cifar10 svhn gpu"), ("aalp", "digits cifar10 svhn gpu"),
    ("vfd_adv", "digits sweep sweep-cifar10 cifar10 svhn gpu"), ("abnn", "digits video cifar10 svhn gpu"))}


@pytest.mark.parametrize("name", LISTS)
def test_every_command_of_the_lists_parses_and_no_two_are_the_same_run(name, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexec cat\n")  # in the place of benchmark/run.py
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ROOT / "benchmark" / f"{name}.sh"
    for part in LISTS[name]:
        shown = subprocess.run(["bash", script, part], capture_output=True, text=True, env=environment)
        lines = shown.stdout.splitlines()
        assert shown.returncode == 0 and len(lines) == len(set(lines)) > 0, shown
        # One seed, and one of the data sets that share their flags.
        others = ("--seed 2", "--seed 3", "--dataset cifar100", "--dataset tiny-imagenet")
        lines = [line for line in lines if not any(w in line for w in others)]
        names = set()
        for line in lines:
            words = shlex.split(line)
            assert words[:2] == ["python", f"{name}.py"]
            tyro.cli(importlib.import_module(name).Args, args=words[2:])
            names.add(run.parse(words)[0])
        assert len(names) == len(lines), part
    refused = subprocess.run(["bash", script, "nothing"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and refused.stderr.startswith("error: no list nothing: choose ")
