"""Documents against the csv files: no number in a table is typed in, and none of them is old."""

import ast
import csv
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmark import report

SCRIPTS = ("afa", "aalp", "vfd_adv", "abnn")
DOCUMENTS = report.documents()


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A repository of its own: write(name, rows) makes a csv."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def write(name, rows):
        rows = [dict(script=name, checkpoint="best", dataset="digits", seed=i) | row for i, row in enumerate(rows)]
        with open(tmp_path / "results" / f"{name}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)

    return write


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_agree_with_the_csv_files(path):
    text = path.read_text()
    assert report.rewrite(text) == text, f"{path.name} disagrees with results/: run python benchmark/report.py"
    markers = re.findall(rf"<!-- (?:end|(?:{'|'.join(report.KINDS)}): .*?) -->", text)
    assert [m == "<!-- end -->" for m in markers] == [False, True] * (len(markers) // 2), "a marker without its end"


def test_every_setting_of_a_csv_is_in_a_table():
    shown = " ".join(path.read_text() for path in DOCUMENTS)
    for path in (ROOT / "results").glob("*.csv"):
        with open(path, newline="") as f:
            for dataset in {(row["dataset"], "--train-size" in row["setting"]) for row in csv.DictReader(f)}:
                source = f"{path.stem} {dataset[0].removesuffix('-unofficial')}{' reduced' * dataset[1]}"
                source = "scale" if path.stem == "scale" else source  # one table, of all data sets
                found = re.search(rf"<!-- (table|sweep|scale): {source} -->", shown)
                assert found, f"no document has a table of {source}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_in_a_script_s_docstring_are_in_its_tables(script):
    """Of digits.digit, so that 8/255 and the number of an arXiv paper are none."""
    text = (ROOT / "docs" / f"{script}.md").read_text()
    tables = " ".join(match[3] for match in report.MARKER.finditer(text))
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    for number in re.findall(r"(?<![\d.])\d{1,3}\.\d(?!\d)", docstring):
        assert re.search(rf"\| {re.escape(number)} ", tables), f"{script}.py says {number}, docs/{script}.md does not"


def test_lines_of_code_in_the_guide_are_in_the_scripts():
    blocks = re.findall(r"^```diff (\S+)(?: (\S+))?\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.M | re.S)
    assert len(blocks) == len(SCRIPTS)
    for old, new, lines in blocks:
        old, new = ((ROOT / name).read_text().splitlines() for name in (old, new or old))
        for line in lines.splitlines():
            assert line[0] in "+-" and line[1:] in (new if line[0] == "+" else old), line


def test_check_finds_a_number_that_was_changed_by_hand(tmp_path):
    for name in ("benchmark", "docs", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "benchmark" / "report.py").write_bytes((ROOT / "benchmark" / "report.py").read_bytes())
    (tmp_path / "results" / "afa.csv").write_bytes((ROOT / "results" / "afa.csv").read_bytes())
    (tmp_path / "README.md").write_text("none here\n")
    page, program = tmp_path / "docs" / "afa.md", [sys.executable, tmp_path / "benchmark" / "report.py"]
    page.write_text("before\n<!-- table: afa digits --><!-- end -->\nafter\n")
    assert subprocess.run([*program, "--check"]).returncode == 1 and "AFA" not in page.read_text()
    assert subprocess.run(program).returncode == 0
    right = page.read_text()
    assert right.startswith("before\n<!-- table") and right.endswith("<!-- end -->\nafter\n") and "| AFA |" in right
    assert subprocess.run([*program, "--check"]).returncode == 0
    page.write_text(re.sub(r"(\d)\.(\d)", r"\1.9", right, count=1) + "more\n")
    assert subprocess.run([*program, "--check"]).returncode == 1
    subprocess.run(program)
    assert page.read_text() == right + "more\n"
    table = (ROOT / "results" / "afa.csv").read_text()
    for bad, message in ((table.replace("setting", "settings", 1), "lacks the column setting"),
                         ("\ufeff" + table, "lacks the column script"),
                         (table.replace(",0.", ",about 0."), "could not convert string to float")):
        (tmp_path / "results" / "afa.csv").write_text(bad)
        ended = subprocess.run(program, capture_output=True, text=True)
        assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr
        assert page.read_text() == right + "more\n"  # no table is lost


def test_means_over_seeds_names_and_gaps(made_up):
    made_up("afa", [dict(setting="default", worst=0.1, clean=0.9), dict(setting="default", worst=0.3, clean=""),
                    dict(setting="--lr 0.2", worst=0.5, clean=""), dict(setting="default", worst=1, checkpoint="last"),
                    dict(setting="--train-size 7", worst=0.7), dict(setting="default", dataset="svhn-unofficial")])
    assert report.table("afa digits").splitlines()[2:] == [
        "| AFA |  | 2 | 20.0 ± 14.1 | 90.0 (1 of 2) |", "| --lr 0.2 |  | 1 | 50.0 |  |"]
    assert report.table("afa digits reduced").splitlines()[2:] == ["| --train-size 7 |  | 1 | 70.0 |"]
    assert "| AFA (unofficial files) |" in report.table("afa svhn")
    assert report.render("table", "afa cifar10") == report.render("table", "abnn digits") == "\n*not yet measured*\n"
    assert report.rewrite("a <!-- value: afa digits; AFA; worst --><!-- end --> b <!-- value: abnn digits; ABNN; worst "
                          "-->old<!-- end -->") == (
        "a <!-- value: afa digits; AFA; worst -->20.0 ± 14.1<!-- end --> b "
        "<!-- value: abnn digits; ABNN; worst -->not yet measured<!-- end -->")


def test_two_settings_of_one_name_are_never_averaged(made_up):
    made_up("afa", [dict(setting=f"--train-size 7000 --epochs {n}", worst=w) for n, w in ((12, 0.1), (15, 0.3))])
    above, _, _, _, *rows = report.table("afa digits reduced").splitlines()
    assert above == "All with `--train-size 7000`:"
    assert [row.split(" | ")[2:] for row in rows] == [["1", "10.0 |"], ["1", "30.0 |"]]


def test_official_and_unofficial_files_are_two_rows_and_the_summary_prefers_the_official(made_up):
    made_up("afa", [dict(setting="default", dataset="svhn-unofficial", worst=0.5),
                    dict(setting="default", dataset="svhn", worst=0.25)])
    assert list(report.read("afa svhn")) == ["AFA (unofficial files)", "AFA"]
    assert report.value("afa svhn; AFA; worst") == "25.0"
    assert report.value("afa svhn; AFA (unofficial files); worst") == "50.0"
    assert "| AFA | 1 |" in report.summary("svhn")


def test_scripts_in_one_csv_are_never_averaged(made_up, capsys):
    found = (("afa", 0.1), ("mine", 0.3), ("mine", 0.5))
    made_up("mine", [dict(script=script, setting="default", worst=worst) for script, worst in found])
    rows = [line.split(" | ")[:4] for line in report.table("mine digits").splitlines()[2:]]
    assert sorted((row[0], row[2], row[3]) for row in rows) == [
        ("| afa: default", "1", "10.0 |"), ("| mine: default", "2", "40.0 ± 14.1 |")]


def test_audits_have_a_row_for_each_run_that_was_audited(made_up):
    seen = dict(audit=0.1, audit_mode="quick", audit_evaluated=200, audit_warnings="losses agree", audit_script=0.12)
    made_up("afa", [dict(setting="default", worst=0.2, evaluated=500, seed=1, **seen),
                    dict(setting="default", worst=0.3, evaluated=500, seed=2)])
    made_up("aalp", [dict(setting="--method alp", worst=0.5, evaluated=500, seed=2, **seen)])
    assert report.audits("digits").splitlines()[2:] == [
        "| `afa.py` | AFA | 1 | 20.0 | 500 | 200 | 12.0 | 10.0 | quick | losses agree |",
        "| `aalp.py` | ALP | 2 | 50.0 | 500 | 200 | 12.0 | 10.0 | quick | losses agree |"]


def test_costs_and_their_ratios(made_up, tmp_path):
    assert "not yet measured" in report.render("cost", "speed_abnn")
    assert report.render("ratio", "speed_abnn; AT; ABNN") == "not yet measured"
    steps = [dict(name=name, mode="fp32", compiled=False, samples=8, ms=ms, ratio=1.04)
             for name, ms in (("AT", 90.0), ("ABNN", 12.0))]
    steps.append(dict(steps[1], mode="bf16", ms=1.0))
    (tmp_path / "results" / "speed_abnn.json").write_text(json.dumps({"scripts": steps}))
    assert report.cost("speed_abnn").splitlines()[2:] == ["| AT | 8 | 90.0 | 1.04 |", "| ABNN | 8 | 12.0 | 1.04 |"]
    assert report.rewrite("<!-- ratio: speed_abnn; AT; ABNN -->old<!-- end -->") == (
        "<!-- ratio: speed_abnn; AT; ABNN -->7.50<!-- end -->")


def test_scale(made_up):
    assert "not yet measured" in report.render("scale", "scale")
    speed = dict(images_per_second=123.4, peak_memory_gb=1.234, device="CPU", command="python afa.py")
    made_up("scale", [dict(speed, checkpoint=k) for k in ("best", "last")])
    assert report.scale("scale").splitlines()[2:] == ["| digits | `python afa.py` | 123 | 1.23 | CPU |"]


def test_curves_and_sweep(made_up):
    made_up("afa", [{"setting": "default", "pgd20@0": 0.9, "pgd20@16": 0.1, "w=0 pgd20@0": 1.0, "w=0 pgd20@16": 0.0}])
    assert report.curve("afa digits").splitlines() == [
        "| eps/255 | 0 | 16 |", "| - | - | - |", "| AFA | 90.0 | 10.0 |", "| AFA, w=0 | 100.0 | 0.0 |"]
    runs = {"--base mart --lambda-adv 0.64 --lambda-nat 0.64": 0.6, "--lambda-adv 6.4 --lambda-nat 6.4": 0.5,
            "--lambda-adv 0.64 --lambda-nat 0.0": 0.4, "--test-size 1 --lambda-adv 0.64 --lambda-nat 0.64": 0.7,
            "--base trades --beta 2.0 --lambda-adv 0.0 --lambda-nat 0.0": 0.3, "--lambda-adv 0.0 --lambda-nat 0.0": 0.8,
            "default": 0.1}  # the last is no part of a sweep: which weights it had is not said
    made_up("vfd_adv_sweep", [dict(setting=k, val_clean=0.9, val_robust=v) for k, v in runs.items()])
    assert report.sweep("vfd_adv_sweep digits").splitlines()[2:] == [
        "| AT | 0 | 0 | 1 | 90.0 | 80.0 |", "| AT + VFD | 0.64 | 0.1 | 1 | 90.0 | 70.0 |",
        "| AT + VFD | 6.4 | 1 | 1 | 90.0 | 50.0 |", "| AT, adversarial pair | 0.64 | 0.1 | 1 | 90.0 | 40.0 |",
        "| TRADES, beta 2.0 | 0 | 0 | 1 | 90.0 | 30.0 |", "| MART + VFD | 0.64 | 0.1 | 1 | 90.0 | 60.0 |"]


def test_table_of_attackers_from_results_json(tmp_path, made_up):
    import abnn
    from benchmark.collect import collect

    args = dict(vars(abnn.Args()), **abnn.PRESETS["digits"]["fast"])
    threats = {"worst": {"clean": 0.9, "pgd": 0.1, "all": 0.05}, "A ce": {"pgd": 0.8, "roa": 0.7},
               "C margin": {"pgd": 0.1, "spa": 0.4}, "no gradient": {"pgd": 0.9}}
    for seed in (1, 2):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        (run / "args.json").write_text(json.dumps(dict(command="python abnn.py", args=args | {"seed": seed})))
        own = json.loads(json.dumps(threats))
        own["A ce"]["roa"] += 0.1 * (seed - 1)
        (run / "results.json").write_text(json.dumps(dict(
            script="abnn", dataset="digits", seed=seed, eps=8 / 255, evaluated=20, train_seconds=1.0,
            images_per_second=2.0, device="cpu", python="3", torch="2", commit="c", robustness_curve={"0": 0.9},
            command="python abnn.py", checkpoints={k: dict(epoch=1, worst=0.1, clean=0.9) for k in ("best", "last")},
            method={"threats": own, "curves": {"model": {"8": 0.1}}})))
    rows = collect(tmp_path / "results" / "abnn.csv", [tmp_path / "run1", tmp_path / "run2"])
    assert [row["checkpoint"] for row in rows if "A ce roa" in row] == ["best", "best"]
    assert report.render("threats", "abnn digits; ABNN").strip().splitlines() == [
        "| ABNN | clean | pgd | roa | roa_search | af | af_universal | spa | all |", "| " + " | ".join("-" * 9) + " |",
        "| worst | 90.0 ± 0.0 | 10.0 ± 0.0 |  |  |  |  |  | 5.0 ± 0.0 |",
        "| A ce |  | 80.0 ± 0.0 | 75.0 ± 7.1 |  |  |  |  |  |",
        "| C margin |  | 10.0 ± 0.0 |  |  |  |  | 40.0 ± 0.0 |  |",
        "| no gradient |  | 90.0 ± 0.0 |  |  |  |  |  |  |"]
    assert report.value("abnn digits; ABNN; worst all") == "5.0 ± 0.0"
