"""benchmark/speed.py runs and leaves complete tables. No assertion is on a time: machines differ."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--arch", "preactresnet8", "--width", "4", "--batch-size", "4", "--steps", "2",
        "--repeats", "1", "--no-compile"]  # fmt: skip


def speed(*flags):
    command = [sys.executable, "benchmark/speed.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_tables(tmp_path):
    out = tmp_path / "speed.json"
    run = speed(*TINY, "--out", str(out))
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["speed.json"]
    result = json.loads(out.read_text())
    assert set(result["forwards"].values()) == {2} and "pgd" in result["forwards"]
    assert all(t["ms"] > 0 and t.get("ratio", 1) > 0 for t in result["times"])
    keys = {tuple(t["key"]) for t in result["times"]}
    assert keys == {("eager", "preactresnet8", 4, mode, layout) for mode in ("fp32", "bf16")
                    for layout in ("contiguous", "channels_last")}  # fmt: skip
    names = {t["name"] for t in result["times"] if "ratio" in t}
    assert {"pgd", "training step", "AFA training step"} <= names
    assert result["loader"]["ours"] > 0 and result["loader"]["torchvision"] > 0
    reached = {t["target"]: t["reached"] for t in result["targets"]}
    assert len(reached) == 6 and reached["compiled pgd over torchattacks, pgd"] is None
    assert all(target in run.stdout for target in reached)


def test_bad_input_is_refused_in_one_line():
    run = speed("--modes", "fp16")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--modes are fp32,bf16" in run.stderr
