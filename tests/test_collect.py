"""benchmark/collect.py names settings by what a user typed, so that the seeds of one setting fall into one row."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import aalp
from benchmark.collect import setting

ROOT = Path(__file__).resolve().parent.parent


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
    (dict(method="at", eps=0.0), "--eps 0/255 --method at"),
    (dict(dataset="cifar10", preset="paper", method="alp"), "--preset paper --method alp"),
])  # fmt: skip
def test_setting(arguments, expected):
    assert setting("aalp", info(**arguments)) == expected


def test_table_leads_with_the_worst_case_and_puts_controls_of_all_seeds_into_one_row(tmp_path):
    for seed in (1, 2, 3):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        command = f"python aalp.py --control-of runs/{seed} --seed {seed} --runs-dir {tmp_path}"
        (run / "args.json").write_text(json.dumps(
            {"command": command} | info(seed=seed, control_of=f"runs/{seed}", pairing_weight=seed / 10)))
        scores = dict(epoch=1, worst=0.1 * seed, clean=0.9, fgsm=0.5, pgd20=0.4, pgd50_margin=0.35, targeted=0.3)
        (run / "results.json").write_text(json.dumps(dict(
            script="aalp", dataset="digits", seed=seed, eps=8 / 255, evaluated=20, train_seconds=1.0,
            images_per_second=2.0, device="cpu", python="3", torch="2", commit="c", robustness_curve={"0": 0.9},
            command=command,
            checkpoints={"best": scores, "last": scores})))
    words = [sys.executable, ROOT / "benchmark" / "collect.py", tmp_path / "out.csv", *sorted(tmp_path.glob("run*"))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, row = done.stdout.splitlines()
    assert head == "| data set | setting | seeds | worst | clean | fgsm | pgd20 | pgd50_margin | targeted |"
    assert row == "| digits | --control-of RUN | 3 | 20.0 ± 10.0 | " + " | ".join(
        f"{v} ± 0.0" for v in (90.0, 50.0, 40.0, 35.0, 30.0)) + " |"
    with open(tmp_path / "out.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6 and {r["targeted"] for r in rows} == {"0.3"} and "--runs-dir" not in rows[0]["command"]
