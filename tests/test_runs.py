"""afa.py as a program: what a run leaves behind, resuming, interruptions, and what is refused."""

import itertools
import json
import os
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from running import (
    command,
    epochs_done,
    execute,
    finished,
    finished_in_process,
    in_process,
    left_by_its_reader,
    same,
    start,
    tag_mismatches,
    wait_for,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import afa
from benchmark import audit
from common import data
from common import pgd as pgd_module
from common.pgd import pgd

TINY = ("--train-size 600 --val-size 100 --test-size 10 --width 4 --epochs 2 --gate-epochs 1 --attack-steps 2 "
        "--eps-warmup-epochs 1 --batch-size 100")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs):
    """Long enough to learn something, short enough for a test."""
    return finished("--train-size 2000 --val-size 100 --test-size 20 --width 8 --epochs 5 --gate-epochs 1 "
                    "--attack-steps 3 --eps 4/255 --eps-warmup-epochs 2 --batch-size 64", runs, whole=True)


@pytest.fixture(scope="module")
def tiny(runs):
    return finished_in_process(TINY, runs)[0]


def test_a_run_leaves_what_the_docs_promise(trained):
    run, output = trained
    results = json.loads((run / "results.json").read_text())
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "best.pt", "last.pt", "results.json"}
    assert results["script"] == "afa" and results["dataset"] == "digits" and results["evaluated"] == 20
    for row in results["checkpoints"].values():
        assert set(row) == {"epoch", "clean", "fgsm", "pgd20", "pgd50_margin", "targeted", "transfer", "worst"}
        assert all(0 <= v <= 1 for k, v in row.items() if k != "epoch")
        assert row["worst"] <= min(v for k, v in row.items() if k not in ("epoch", "worst"))
    assert set(results["robustness_curve"]) == {"0", "0.5", "1", "2", "3", "4", "6", "8", "32"}
    assert results["robustness_curve"]["0"] == results["checkpoints"]["best"]["clean"]
    assert results["robustness_curve"]["32"] < 0.1
    saved = json.loads((run / "args.json").read_text())
    assert saved["args"]["arch"] == "preactresnet8" and saved["torch"] == torch.__version__
    assert "worst" in output and "epoch 6/6" in output and str(run) in output


def test_it_learns_and_is_more_robust_than_an_undefended_network(trained, runs):
    run, _ = trained
    events = EventAccumulator(str(run)).Reload()
    losses = [e.value for e in events.Scalars("losses/clean_ce")]
    assert losses[-1] < 0.5 * losses[0]
    undefended, _ = finished_in_process("--train-size 2000 --val-size 100 --test-size 20 --width 8 --epochs 4 "
                                        "--bn single --eps 0 --batch-size 64", runs)
    again, _ = finished_in_process(f"--eval-only {undefended} --eps 4/255", runs, whole=True)
    results = [json.loads(path.read_text()) for path in (run / "results.json", undefended / "eval.json")]
    assert again is None and results[0]["eps"] == results[1]["eps"] == 4 / 255
    afa_row, plain_row = (r["checkpoints"]["last"] for r in results)
    assert plain_row["clean"] > 0.7 and plain_row["worst"] <= 0.1
    assert afa_row["clean"] > 0.7 and afa_row["worst"] > plain_row["worst"] + 0.1


def test_tensorboard_has_the_documented_tags(trained):
    run, _ = trained
    assert tag_mismatches("afa.md", run) == []
    events = EventAccumulator(str(run)).Reload()
    last_step = events.Scalars("val/clean_acc")[-1].step
    assert last_step == 6 * (2000 // 64) and len(events.Scalars("val/clean_acc")) == 6
    assert {e.step for e in events.Scalars("robustness_curve/model")} == {0, 1, 2, 3, 4, 6, 8, 32}


def test_same_seed_same_weights_another_seed_others(runs):
    """Of whole AFA runs the test of resuming says the same: it compares them with an uninterrupted one."""
    small = "--train-size 200 --val-size 20 --test-size 5 --width 4 --epochs 1 --bn single --attack-steps 1 --seed "
    first, again, other = (weights(finished_in_process(small + seed, runs)[0] / "last.pt") for seed in "112")
    assert same(first, again) and not same(first, other)


def test_single_batchnorm_training_is_a_plain_pgd_loop_bit_for_bit(runs):
    """Against a loop written for this test, without validation: neither the frame nor validating changes training."""
    run, _ = finished_in_process(TINY.replace("--gate-epochs 1", "--bn single"), runs)
    args = afa.load(run, name="last.pt")[1]
    d = data.load("digits", train_size=600, val_size=100)
    torch.manual_seed(1)
    net = afa.AFANet(args, 10).to(memory_format=torch.channels_last)
    parameters = [p for name, p in net.named_parameters() if "generator" not in name]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(2_000_003 + epoch)
        for i, (x, y) in enumerate(data.batches(d.train, 100, seed=1, epoch=epoch)):
            t = epoch + (i + 0.5) / 6
            optimizer.param_groups[0]["lr"] = min(t / 2 / 0.3, (1 - t / 2) / 0.7) * 0.1
            rise = min(1.0, t)
            net.eval()
            step_size = rise * (2.5 * (8 / 255) / 2)
            x_adv = pgd(net, x, y, eps=rise * (8 / 255), step_size=step_size, steps=2, generator=generator)
            net.train()
            optimizer.zero_grad()
            F.cross_entropy(net(x_adv), y).backward()
            optimizer.step()
    assert same(weights(run / "last.pt"), net.state_dict())


def test_killed_in_the_middle_of_an_epoch_it_resumes_to_the_same_bits(tiny, runs):
    known, arguments = set(runs.glob("*")), TINY
    for epoch in (1, 2):  # in the second epoch of stage 1; resumed, in stage 2
        process = start(arguments, runs)
        run = wait_for(runs, known, lambda r, e=epoch: epochs_done(r) >= e, process)
        shown = EventAccumulator(str(run)).Reload().Scalars("val/clean_acc")  # TensorBoard follows a live run
        assert process.poll() is None and len(shown) >= epoch
        process.send_signal(signal.SIGKILL)
        process.wait()
        arguments = f"--resume {run}"
    # As a program: TensorBoard orders its files by the second of their start, and this process would take none.
    assert finished(arguments, runs)[0] is None  # no folder of its own
    assert same(weights(tiny / "last.pt"), weights(run / "last.pt"))
    assert same(weights(tiny / "best.pt"), weights(run / "best.pt"))
    first, second = (json.loads((r / "results.json").read_text()) for r in (tiny, run))
    assert first["checkpoints"] == second["checkpoints"] and first["method"] == second["method"]
    events = EventAccumulator(str(run)).Reload()
    assert [e.step for e in events.Scalars("val/clean_acc")] == [6, 12, 18]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_how_to_continue(number, status, runs):
    known = set(runs.glob("*"))
    process = start(TINY, runs)
    run = wait_for(runs, known, lambda r: epochs_done(r) >= 0, process)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == status and "Traceback" not in output
    assert f"python {ROOT / 'afa.py'} --resume {run}" in output
    net, _, state = afa.load(run, name="last.pt")
    assert state["epoch"] >= 0 and not net.training


def test_eval_only_repeats_the_results_and_writes_beside_them(tiny, runs, capsys):
    before = (tiny / "results.json").read_bytes()
    data.tune(True)
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert in_process(f"--eval-only {tiny}", capsys, runs) == (0, "")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    again = json.loads((tiny / "eval.json").read_text())
    assert again["checkpoints"] == json.loads(before)["checkpoints"]
    assert (tiny / "results.json").read_bytes() == before
    assert in_process(f"--eval-only {tiny / 'last.pt'} --test-size 20", capsys, runs) == (0, "")
    again = json.loads((tiny / "eval_last.json").read_text())
    assert list(again["checkpoints"]) == ["last"] and again["evaluated"] == 20


def test_resuming_from_the_best_epoch_would_undo_the_later_ones(tiny, runs, capsys):
    status, error = in_process(f"--resume {tiny / 'best.pt'}", capsys, runs)
    assert status == 2 and error.startswith(f"error: --resume {tiny / 'best.pt'}: a run goes on from its last.pt")


def test_outputs_that_the_shell_has_closed_stop_nothing(runs):
    words = shlex.join(command("--bn single " + TINY.replace("--epochs 2 --gate-epochs 1", "--epochs 1"), runs))
    before = set(runs.glob("*"))
    assert subprocess.run(["sh", "-c", f"exec {words} >&- 2>&-"]).returncode == 0
    (run,) = set(runs.glob("*")) - before
    assert (run / "results.json").exists()


def test_whoever_leaves_the_pipe_leaves_a_saved_epoch(runs):
    before = set(runs.glob("*"))
    error = left_by_its_reader("--bn single " + TINY.replace("--epochs 2 --gate-epochs 1", "--epochs 2"), runs)
    (run,) = set(runs.glob("*")) - before
    assert "Traceback" not in error and "to continue after the last finished epoch" in error
    assert afa.load(run, name="last.pt")[2]["epoch"] >= 1


def test_help_may_be_cut_off():
    words = f"{shlex.quote(sys.executable)} {ROOT / 'afa.py'} --help | true"
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    ended = subprocess.run(["bash", "-c", words], capture_output=True, text=True, env=unbuffered)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_script_that_the_tools_could_not_import_is_refused_before_it_trains(tmp_path):
    shutil.copy(ROOT / "afa.py", tmp_path / "afa.v2.py")
    words = [sys.executable, tmp_path / "afa.v2.py", *TINY.split(), "--runs-dir", tmp_path / "runs"]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2 and "could not import afa.v2.py" in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_resuming_by_the_checkpoint_s_name_gives_whole_results(tiny, runs, capsys):
    before = json.loads((tiny / "results.json").read_text())
    assert in_process(f"--resume {tiny / 'last.pt'}", capsys, runs) == (0, "")
    assert json.loads((tiny / "results.json").read_text())["checkpoints"] == before["checkpoints"]
    _, own, state = afa.load(tiny, name="last.pt")
    data.check_same(replace(own, resume=str(tiny)), own, state)
    assert capsys.readouterr().out == f"note: {tiny} is finished: what is left is to test it once more\n"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert data.environment(torch.device("cpu"))["commit"] is None


def test_the_commit_is_dirty_where_a_program_differs_not_where_a_table_does(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "common" / "data.py"))

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    for name in ("afa.py", "common/data.py", "results/afa.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = data.environment(torch.device("cpu"))["commit"]
    assert len(commit) >= 7 and "-" not in commit
    (tmp_path / "results" / "afa.csv").write_text("b")
    assert data.environment(torch.device("cpu"))["commit"] == commit
    (tmp_path / "common" / "data.py").write_text("b")
    assert data.environment(torch.device("cpu"))["commit"] == commit + "-dirty"
    git("checkout", "-q", ".")
    (tmp_path / "mine.py").write_text("a copy, to try something in")  # what it makes is not of this commit
    assert data.environment(torch.device("cpu"))["commit"] == commit + "-dirty"
    monkeypatch.setattr(data, "__file__", str(tmp_path / "copy" / "common" / "data.py"))
    (tmp_path / "copy" / "common").mkdir(parents=True)  # unpacked inside a repository that does not know it
    (tmp_path / "copy" / "common" / "data.py").write_text("a")
    assert data.environment(torch.device("cpu"))["commit"] is None


@pytest.mark.parametrize("collapsed", [1, 2])
@pytest.mark.parametrize("script, own", [("afa", "--bn single"), ("aalp", ""),
                                         ("vfd_adv", "--lambda-adv 0 --lambda-nat 0"),
                                         ("abnn", "--defense at --clean-epochs 1")])  # fmt: skip
def test_a_network_of_one_class_is_never_the_best_if_there_is_another(script, own, collapsed, tmp_path, monkeypatch):
    (tmp_path / "substitutes").mkdir()  # of abnn.py, and no run
    validations = []

    def survivors(model, x, y, alive=None, *, eps, **settings):
        """In the first epochs one class survives everything, later few images survive the attack, of all classes."""
        if len(y) == 60:
            validations.append(eps)
        if len(validations) <= 2 * collapsed:
            return y == y.mode().values
        return torch.arange(len(y)) % 20 < (12 if eps == 0 else 1)

    monkeypatch.setattr(pgd_module, "survivors", survivors)
    tiny = "--train-size 64 --val-size 60 --test-size 10 --width 8 --epochs 2 --batch-size 32 --attack-steps 1"
    run, _ = finished_in_process(f"{tiny} {own}", tmp_path, f"{script}.py")
    assert len(validations) == 4
    results = json.loads((run / "results.json").read_text())["checkpoints"]
    assert results["best"]["epoch"] == 2  # of epochs that do not count it is the last: of two networks of one class


def no_room():
    """Every file may grow to 1 kB only, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_full_disk_is_one_line_and_keeps_what_was_there(tiny, runs, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for file in ("best.pt", "last.pt", "args.json"):
        (copy / file).write_bytes((tiny / file).read_bytes())
    before = {p.name: p.read_bytes() for p in copy.iterdir()}

    process = start(f"--eval-only {copy}", runs, preexec_fn=no_room)
    output = process.communicate()[0]
    assert process.returncode == 2 and "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith(f"error: cannot write {copy / 'eval.json'}")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_a_full_disk_under_tensorboard_is_one_line_that_says_how_to_go_on(runs, tmp_path):
    run = finished_in_process(TINY.replace("--epochs 2 --gate-epochs 1", "--epochs 1 --gate-epochs 0"), runs)[0]
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save(state | {"epoch": 0, "best": -1.0}, run / "last.pt")  # as if it had died in its only epoch
    before = (run / "last.pt").read_bytes()
    process = start(f"--resume {run}", runs, preexec_fn=no_room)
    output = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in output, output
    assert output.strip().splitlines()[-1] == (
        f"error: a file cannot be written ([Errno 27] File too large); to continue after the last finished epoch: "
        f"python {ROOT / 'afa.py'} --resume {run}")
    assert (run / "last.pt").read_bytes() == before


def section(name):
    """The program that stands in a section of the README."""
    lines = (ROOT / "README.md").read_text().split(f"## {name}\n")[1].split("\n## ")[0].splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)


def test_the_readme_s_lines_of_python_run(tiny, monkeypatch, capsys):
    small = dict(audit.QUICK, noise=2, surrogate_steps=5, queries=5, apgd_steps=5, margin_steps=5, steps=(1, 2, 3, 4))
    monkeypatch.setattr(audit, "QUICK", small)
    names = {}
    exec(section("In Python").replace("RUN", str(tiny)), names)
    assert isinstance(names["net"], afa.AFANet) and names["args"].width == 4 and names["state"]["epoch"] >= 1
    assert (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6
    assert not (names["robust"] & ~names["clean"]).any() and names["found"]["evaluated"] == 8


def test_data_of_one_s_own_as_the_readme_says(tmp_path, runs):
    for split, n in (("train", 12), ("test", 4)):
        for i in range(n):
            path = tmp_path / "mine" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = torch.randint(0, 256, (24, 20, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(image.numpy()).save(path)
    fork = (ROOT / "afa.py").read_text()
    for old, new in (('Literal["digits", ', 'Literal["mine", "digits", '),
                     ("PRESETS = {", 'PRESETS = {\n    "mine": {"fast": FAST, "paper": PAPER},'),
                     ("SCRIPT = Path", section("Forking a script") + "\nSCRIPT = Path")):
        assert fork.count(old) == 1
        fork = fork.replace(old, new)
    (tmp_path / "myafa.py").write_text(fork)
    flags = ("--dataset mine --arch preactresnet8 --width 4 --epochs 1 --gate-epochs 1 --attack-steps 1 --val-size 4 "
             f"--data-dir {tmp_path}")
    before = set(data.READERS)
    run, output = finished_in_process(flags, runs, str(tmp_path / "myafa.py"))
    data.READERS.pop("mine")
    assert set(data.READERS) == before
    results = json.loads((run / "results.json").read_text())
    assert (results["script"], results["dataset"], results["evaluated"]) == ("myafa", "mine", 4)
    assert "images to train, validate and test: 8, 4, 4" in output


@pytest.mark.parametrize("x, y", [(np.zeros((9, 8, 8, 3), np.float32), np.zeros(9, np.int64)),
                                  (np.zeros((9, 8, 8), np.uint8), np.zeros(9, np.int64)),
                                  (np.zeros((9, 3, 8, 8), np.uint8), np.zeros(9, np.int64)),
                                  (np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.int32)),
                                  (torch.zeros(9, 8, 8, 3, dtype=torch.uint8), np.zeros(9, np.int64))])
def test_a_reader_that_returns_something_else_is_told_so(x, y, monkeypatch):
    monkeypatch.setitem(data.READERS, "mine", lambda data_dir: ((x, y), (x, y), ["a"], True))
    with pytest.raises(data.UserError, match=r"a reader returns numpy arrays, images \(N, H, W, 3\) uint8"):
        data.load("mine", val_size=1)


def test_a_run_that_was_resumed_itself_is_evaluated_by_any_number_of_processes():
    own = afa.Args(resume="runs/a")
    data.check_same(replace(own, eval_only="runs/a"), own, {"processes": 2})
    with pytest.raises(data.UserError, match="was trained by 2 processes, not 1"):
        data.check_same(own, own, {"processes": 2})


@pytest.mark.parametrize("script, own, graphs", [("afa", "--gate-epochs 1", 6), ("aalp", "", 2),
                                                 ("vfd_adv", "--teacher-epochs 1", 5), ("abnn", "--clean-epochs 1", 2)])
def test_compiled_is_training_alone_with_a_graph_for_each_of_its_batches(script, own, graphs, tmp_path, monkeypatch):
    """AFA: attack, both ends; frozen and predicted weights, the gate. AALP: attack, and a batch of twice the size. VFD:
    the teacher in training; attack, both passes, the teacher. ABNN: one for S and T, T with its layers."""
    seen = []

    def backend(graph, inputs):
        seen.append([x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (3, 32, 32)])
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **settings: setattr(
        net, "_compiled_call_impl", torch.compile(net._call_impl, backend=backend, **settings)))
    tiny = "--train-size 16 --val-size 20 --test-size 2 --width 4 --epochs 2 --batch-size 16 --attack-steps 1"
    assert execute(f"{tiny} --eps-warmup-epochs 0 --compile {own}", tmp_path, f"{script}.py") == 0
    torch._dynamo.reset()
    assert len(seen) == graphs and all(sizes and isinstance(sizes[0], int) for sizes in seen)


def test_a_run_is_not_resumed_without_its_best_epoch(tmp_path):
    own, first, later = afa.Args(resume=str(tmp_path)), {"best": -1.0}, {"best": 0.5}
    data.check_same(own, own, first)  # there was none yet
    for run in (tmp_path, tmp_path / "last.pt"):
        resumed = replace(own, resume=str(run))
        with pytest.raises(data.UserError, match="best.pt is missing"):
            data.check_same(resumed, resumed, later)
    (tmp_path / "best.pt").touch()
    data.check_same(own, own, later)


def test_a_strength_or_a_rate_that_is_never_reached_is_said(capsys):
    args = afa.Args(**afa.DIGITS)
    data.check(args)
    data.check(replace(args, epochs=3, eps=0.0))
    assert capsys.readouterr().out == ""
    data.check(replace(args, epochs=3))
    assert "eps rises for 4 epochs, and training ends after 3" in capsys.readouterr().out
    data.check(replace(args, epochs=60, milestones=(30, 75)))
    assert "the milestone 75 is not reached in 60 epochs" in capsys.readouterr().out
    data.check(replace(args, epochs=60, norm="l2", eps=0.5))
    assert capsys.readouterr().out == ""
    data.check(replace(args, epochs=60, norm="l2"))
    assert "0.0314 is a tiny radius in the L2 norm" in capsys.readouterr().out


def test_a_checkpoint_of_other_data_is_refused():
    args = replace(afa.Args(), train_size=20, val_size=10, test_size=10)
    for state, own in (({"classes": 9}, "digits with 9 classes"),
                       ({"classes": 10, "data": "digits-unofficial"}, "digits-unofficial with 10 classes")):
        with pytest.raises(data.UserError, match=f"is of {own}, and data has digits with 10: see --data-dir"):
            data.load_as(args, "cpu", state=state)
    for fine in (None, {"classes": 10}, {"classes": 10, "data": "digits"}):
        assert len(data.load_as(args, "cpu", state=fine).classes) == 10
    # Files of another origin may be what a run is to be evaluated on.
    data.load_as(replace(args, eval_only="run"), "cpu", state={"classes": 10, "data": "digits-unofficial"})


REFUSED = {
    "--eps 8": "did you mean 8/255?",
    "--eps -1/255": "--eps must be at least 0",
    "--eps 0 --step-size 1/255": "--step-size would do nothing here",
    "--seed 4294967296": "--seed must be at most 4294967295, not 4294967296",
    "--weight-decay inf": "--weight-decay must be finite, not inf",
    "--data-dir ''": "--data-dir was given an empty name",
    "--eps 300/255": "--eps 1.17647 is more than a pixel's whole range",
    "--batch-size 0": "--batch-size must be at least 1",
    "--epochs -3": "--epochs must be at least 1",
    "--width 0": "--width must be at least 1",
    "--attack-steps 0": "--attack-steps must be at least 1",
    "--gate-epochs -1": "--gate-epochs must be at least 0",
    "--gate-epochs 0 --gate layer --harden 0.5": "--gate, --harden would do nothing here: leave it out",
    "--bn single --harden 0.5": "--harden would do nothing here: leave it out",
    "--bn single --gate-epochs 5": "--gate-epochs would do nothing here",
    "--bn single --gate layer --gate-lr 0.1": "--gate, --gate-lr would do nothing here",
    "--milestones -3": "--milestones are epochs from 1 on, not -3",
    "--step-size 2": "did you mean 2/255?",
    "--lr 0": "--lr must be at least",
    "--harden 2": "--harden must be at most 1",
    "--train-size 0": "--train-size 0: digits has from 1 to 8000",
    "--train-size 9000": "--train-size 9000: digits has from 1 to 8000",
    "--val-size -5": "--val-size -5: digits has from 1 to",
    "--test-size 2000": "--test-size 2000: digits has from 1 to 1000",
    "--device cuda:77": "--device cuda:77 cannot be used",
    "--device gpu": "--device gpu cannot be used",
    "--device meta": "--device meta cannot be used",
    "--resume /nowhere": "there is no checkpoint /nowhere",
    "--resume=": "--resume and --eval-only take a run's folder, and were given an empty name",
    "--eval-only /nowhere/best.pt": "there is no checkpoint /nowhere/best.pt",
    "--resume a --eval-only b": "--resume continues a run, --eval-only evaluates one: choose",
    "--runs-dir /proc/none": "--runs-dir /proc/none cannot be used",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_work(arguments, capsys, tmp_path):
    if arguments.startswith("--runs-dir"):
        status, error = in_process("", capsys, "/proc/none")
    else:
        status, error = in_process(arguments, capsys, tmp_path)
    assert status == 2 and error.startswith("error: ") and REFUSED[arguments] in error and "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    "--dataset mnist", "--eps many", "--eps nan", "--eps 1/0", "--eps 1e400", "--unknown 1", "--gate wide", "--seed x"])
def test_what_is_no_argument_at_all_is_refused_by_the_parser(arguments, capsys, tmp_path):
    status, error = in_process(arguments, capsys, tmp_path)
    assert status == 2 and "Traceback" not in error and arguments.split()[0] in error


def test_compile_without_a_compiler_is_one_line(monkeypatch, capsys, tmp_path):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    status, error = in_process("--compile", capsys, tmp_path)
    assert status == 2 and "compiler" in error and "\n" not in error and not list(tmp_path.iterdir())


def test_data_that_is_absent_is_one_line(monkeypatch, capsys, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", offline)
    arguments = f"--dataset cifar10 --data-dir {tmp_path / 'none'}"
    status, error = in_process(arguments, capsys, tmp_path / "runs")
    assert status == 2 and "\n" not in error and "--data-dir" in error and "no network" in error


def test_checkpoints_that_do_not_fit_are_refused(tiny, capsys, tmp_path):
    state = torch.load(tiny / "last.pt", weights_only=True)
    cases = {
        "script": ({**state, "script": "aalp"}, "it is of aalp.py"),
        "architecture": ({**state, "args": {**state["args"], "width": 16}}, "size mismatch"),
        "argument": ({**state, "args": {**state["args"], "no_such": 1}}, "no_such"),
        "network": ({k: v for k, v in state.items() if k != "net"}, "KeyError"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        status, error = in_process(f"--eval-only {tmp_path / name}.pt", capsys, tmp_path)
        assert status == 2 and message in error and "\n" not in error, error
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes((tiny / "last.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    for path in (truncated, tmp_path / "text.pt"):
        status, error = in_process(f"--eval-only {path}", capsys, tmp_path)
        assert status == 2 and str(path) in error and "\n" not in error, error


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rate(runs, capsys):
    for arguments, flag in (("--lr 1e30", "--lr"), ("--finetune all --gate-lr 1e30", "--gate-lr")):
        status, error = in_process(f"{TINY.replace('--epochs 2', '--epochs 1')} {arguments}", capsys, runs)
        assert status == 2 and "\n" not in error
        assert error.startswith("error: the loss is not finite in epoch ") and f"try a lower {flag} than 1e+30" in error


def test_resuming_with_other_arguments_is_refused(tiny, capsys, runs):
    for arguments in ("--seed 5", "--eps 4/255", "--epochs 9", "--arch preactresnet18"):
        status, error = in_process(f"--resume {tiny} {arguments}", capsys, runs)
        name = arguments.split()[0].lstrip("-")
        assert status == 2 and f"had another value of {name}" in error and "\n" not in error


def test_help_can_be_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["afa.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "afa.py"), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "(default: 8/255)" in text
    assert all("--" + name.replace("_", "-") in text for name in vars(afa.Args()))


@pytest.mark.parametrize("arguments", [
    "--gate-epochs 1 --gate layer --finetune all --bf16", "--gate-epochs 1 --norm l2 --eps 128/255 --harden 0",
    "--gate-epochs 0 --milestones 1", "--gate-epochs 1 --harden 1"])
def test_every_setting_of_the_method_runs(arguments, capsys, tmp_path):
    small = "--train-size 64 --val-size 20 --test-size 5 --width 4 --epochs 2 --batch-size 32 --attack-steps 1 "
    assert in_process(small + arguments, capsys, tmp_path) == (0, "")
    (run,) = tmp_path.iterdir()
    assert json.loads((run / "results.json").read_text())["checkpoints"]["last"]["epoch"] in (2, 3)


def test_without_a_stage_2_validation_is_of_what_is_tested(tmp_path):
    small = "--train-size 1280 --val-size 200 --test-size 5 --width 8 --epochs 1 --batch-size 32 --attack-steps 1 "
    run, _ = finished_in_process(small + "--gate-epochs 0", tmp_path)
    net, args, _ = afa.load(run, name="last.pt")
    d = data.load_as(args, "cpu")
    clean = (net(data.to_float(d.val.x)).argmax(1) == d.val.y).float().mean().item()
    events = EventAccumulator(str(run)).Reload()
    assert events.Scalars("val/clean_acc")[-1].value == pytest.approx(clean)


def test_runs_of_one_second_get_folders_of_their_own(monkeypatch, capsys, tmp_path):
    ticks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 + next(ticks) / 1e6)
    small = "--train-size 30 --val-size 20 --test-size 5 --width 4 --epochs 1 --bn single --attack-steps 1"
    for _ in range(2):
        assert in_process(small, capsys, tmp_path)[0] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_batch_larger_than_the_data_is_one_batch(capsys, tmp_path):
    arguments = "--train-size 30 --val-size 20 --test-size 5 --width 4 --epochs 1 --bn single --batch-size 128"
    assert in_process(arguments, capsys, tmp_path)[0] == 0
