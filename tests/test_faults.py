"""What goes wrong around a run: interruptions, full disks, damaged files. docs/reliability.md has the whole table."""

import errno
import importlib
import random
import signal
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from running import execute, in_process, start
from test_data import LocalFile, md5, no_network, read_only_mount, write_cifar10, write_svhn
from test_video import layout
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10, SVHN

from benchmark import faults
from common import data

SCRIPTS = ("afa", "aalp", "vfd_adv", "abnn")
assert no_network  # a fixture of this module too: it patches each test


def write_checkpoint(path, script):
    """What `load` of a script asks for, of an untrained network."""
    module = importlib.import_module(script)
    args = dict(arch="preactresnet8", width=2) | (dict(defense="none", frames=1) if script == "abnn" else {})
    net = module.build(module.Args(**args), 10)
    data.save(path, dict(script=script, args=dict(dataset="digits", **args), classes=10, net=net.state_dict()))
    return module, net


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --- Checkpoints


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flipped_bit_of_a_weight_is_refused(script, tmp_path):
    path = tmp_path / "last.pt"
    module, net = write_checkpoint(path, script)
    assert torch.equal(module.load(path)[0].fc.weight, net.fc.weight)
    flip(path, path.read_bytes().index(net.fc.weight.detach().numpy().tobytes()))
    assert not torch.equal(torch.load(path, weights_only=True)["net"]["fc.weight"], net.fc.weight)  # torch takes it
    with pytest.raises(data.UserError, match=f"last.pt is not a checkpoint that {script}.py can use") as error:
        module.load(path)
    assert "is damaged" in str(error.value) and "\n" not in str(error.value)
    if script == "vfd_adv":
        with pytest.raises(data.UserError, match="last.pt cannot be the teacher of a run"):
            module.load_teacher(path, module.Args(), 10, "cpu")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_of_an_earlier_version_is_refused_with_the_argument_that_is_gone(script, tmp_path, capsys):
    path = tmp_path / "last.pt"
    write_checkpoint(path, script)
    state = torch.load(path, weights_only=True)
    data.save(path, state | {"args": {**state["args"], "old_flag": 1}})
    for flag in ("--eval-only", "--resume"):
        status, error = in_process(f"{flag} {path}", capsys, tmp_path, f"{script}.py")
        assert status == 2 and "last.pt is not a checkpoint that" in error and "'old_flag'" in error
        assert "\n" not in error


def test_wherever_a_bit_flips_the_content_is_right_or_refused(tmp_path):
    path, content = tmp_path / "a.pt", {"net": {"w": torch.arange(500.0)}, "epoch": 3, "args": {"lr": 0.1}}
    data.save(path, content)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        flip(path, rng.randrange(len(whole)))
        try:
            read = data.read(path, "cpu")
        except Exception:
            refused += 1
        else:
            assert faults.bits(read) == faults.bits(content)
        path.write_bytes(whole)
    assert 90 < refused < 150  # what is left is padding, and dates


def test_the_kill_tool_sees_damage_and_differences(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        data.save(tmp_path / run / "last.pt", {"net": {"w": torch.ones(9)}, "args": {"runs_dir": run},
                                               "train_seconds": float(ord(run))})
        data.save(tmp_path / run / "results.json", {"clean": 0.5, "command": run})
        writer = SummaryWriter(tmp_path / run)
        writer.add_scalar("val/clean_acc", 0.5, 3)
        writer.close()
    a, b = tmp_path / "a", tmp_path / "b"
    assert faults.unreadable(tmp_path) == [] and faults.differences(a, b) == []
    flip(b / "last.pt", (b / "last.pt").read_bytes().index(torch.ones(9).numpy().tobytes()))
    (b / "results.json").write_text('{"clean": 0.')
    assert [line.split(":")[0] for line in faults.unreadable(tmp_path)] == [str(b / "last.pt"), str(b / "results.json")]
    data.save(b / "results.json", {"clean": 0.25, "command": "b"})
    assert faults.differences(a, b) == ["last.pt", "results.json"]


def test_two_runs_that_find_the_same_name_free_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as both see it who ask at the same time
    assert [data.new_folder(tmp_path / "runs", "a").name for _ in range(3)] == ["a", "a+", "a++"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_read_only_run_is_refused_before_it_is_evaluated_or_continued(script, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "last.pt", script)
    monkeypatch.setattr(data, "load", lambda *args, **options: pytest.fail("it went on to the data"))
    monkeypatch.setattr(data.os, "access", lambda path, mode: False)
    for flag in ("--eval-only", "--resume"):
        status, error = in_process(f"{flag} {tmp_path / 'last.pt'}", capsys, tmp_path, f"{script}.py")
        assert status == 2 and error.startswith(f"error: {tmp_path} cannot be written to") and "\n" not in error


# --- Ctrl-C


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_before_there_is_anything_to_resume_says_so(script, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "last.pt", script)
    monkeypatch.setattr(data, "load", lambda *args, **options: signal.raise_signal(signal.SIGINT))
    for arguments in ("", f"--eval-only {tmp_path / 'last.pt'}"):
        assert execute(arguments, tmp_path / "runs", f"{script}.py") == 130
        assert "interrupted; there is nothing to continue" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_after_any_error_the_last_line_says_how_to_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["afa.py"])
    again = f"to continue after the last finished epoch: python afa.py --resume {tmp_path}"
    for checkpoint, line in ((False, "there is nothing to continue: start it again"), (True, again)):
        if checkpoint:
            (tmp_path / "last.pt").touch()
        data.on_interrupt(tmp_path)
        sys.excepthook(RuntimeError, RuntimeError("any"), None)
        assert capsys.readouterr().err.splitlines() == ["RuntimeError: any", line]
        full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB")
        sys.excepthook(type(full), full, None)
        assert capsys.readouterr().err.splitlines() == [
            "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): a smaller --batch-size or "
            f"--width takes less; {line}"]
    data.on_interrupt(None)  # no run yet: the traceback alone
    sys.excepthook(RuntimeError, RuntimeError("early"), None)
    assert capsys.readouterr().err.splitlines() == ["RuntimeError: early"]


def test_more_memory_than_there_is_is_one_line(tmp_path):
    small = "--train-size 30 --val-size 20 --test-size 5 --bn single --width"
    process = start(f"{small} 1000000", tmp_path)  # 36 TB in a single tensor
    output = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: out of memory (") and "allocate 36000000000000 bytes" in output
    assert output.endswith("takes less; there is nothing to continue: start it again\n")
    assert not list(tmp_path.iterdir())


# --- Downloads


def test_what_a_killed_download_leaves_is_not_used(tmp_path, monkeypatch):
    write_svhn(tmp_path / "source")
    files = {part: [(tmp_path / "source" / f"{part}_32x32.mat").as_uri(), f"{part}_32x32.mat",
                    md5(tmp_path / "source" / f"{part}_32x32.mat")] for part in ("train", "test")}
    monkeypatch.setattr(SVHN, "split_list", files)
    folder, at_the_kill = tmp_path / "data", []

    def read(self, size=-1):
        if self.tell():
            at_the_kill.extend(path.name for path in folder.glob("*.mat"))  # kill -9 leaves what is there now
            raise KeyboardInterrupt
        return super(LocalFile, self).read(min(size, 1000))

    with monkeypatch.context() as patch:
        patch.setattr(LocalFile, "read", read)
        with pytest.raises(KeyboardInterrupt):
            data.load("svhn", folder, val_size=5)
    assert at_the_kill == [] and list(folder.iterdir()) == []
    assert data.load("svhn", folder, val_size=5).name == "svhn"
    assert sorted(path.name for path in folder.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


def test_what_a_killed_extraction_leaves_is_not_used(tmp_path, monkeypatch):
    """Two of five batches, complete ones: nothing in them shows that three are missing."""
    source = tmp_path / "source" / CIFAR10.base_folder
    write_cifar10(tmp_path / "source")

    def download(self):
        target = Path(self.root, CIFAR10.base_folder)
        target.mkdir(parents=True)
        for name in ("batches.meta", "data_batch_1", "data_batch_2", "test_batch"):
            (target / name).write_bytes((source / name).read_bytes())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CIFAR10, "download", download)
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar10", tmp_path / "data", val_size=5)
    with pytest.raises(data.UserError, match="CIFAR10 is not in .* no network"):
        data.load("cifar10", tmp_path / "data", val_size=5)


def test_an_archive_that_is_there_is_used_and_another_run_may_be_first(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "source")
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "cifar.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "source").rglob("*_batch*"):
            file.write(path, path.relative_to(tmp_path / "source"))
    seen = []

    def fetch(folder):
        seen.append((folder / "cifar.zip").read_bytes())
        zipfile.ZipFile(folder / "cifar.zip").extractall(folder)
        if len(seen) == 2:  # the other run ends first
            data._download("CIFAR10", tmp_path / "data", CIFAR10.base_folder, "cifar.zip", fetch)

    for _ in range(2):
        data._download("CIFAR10", tmp_path / "data", CIFAR10.base_folder, "cifar.zip", fetch)
    assert seen == 3 * [archive.read_bytes()]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [CIFAR10.base_folder, "cifar.zip"]
    assert len(data.load("cifar10", tmp_path / "data", val_size=5).train.y) == 25


# --- A changed byte in the data


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-batches-py/data_batch_2"), ("svhn", "test_32x32.mat")])
def test_a_changed_pixel_of_an_official_file_is_noticed_and_the_file_named(name, file, tmp_path, monkeypatch, capsys):
    (write_cifar10 if name == "cifar10" else write_svhn)(tmp_path)
    root = tmp_path / CIFAR10.base_folder
    if name == "cifar10":
        monkeypatch.setattr(CIFAR10, "train_list", [[n, md5(root / n)] for n, _ in CIFAR10.train_list])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(root / "test_batch")]])
        monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(root / "batches.meta")})
    else:
        monkeypatch.setattr(SVHN, "split_list", {part: ["", f"{part}_32x32.mat", md5(tmp_path / f"{part}_32x32.mat")]
                                                 for part in ("train", "test")})
    assert data.load(name, tmp_path, val_size=5).name == name and capsys.readouterr().out == ""
    flip(tmp_path / file, (tmp_path / file).stat().st_size // 2)
    assert data.load(name, tmp_path, val_size=5).name == f"{name}-unofficial"
    assert f"not the published files: {Path(file).name}\n" in capsys.readouterr().out


# --- The decoded clips of UCF-101


class Video:
    """In the place of torchcodec's decoder: ten frames, each of another colour."""

    decoded = []

    def __init__(self, path, num_ffmpeg_threads):
        Video.decoded.append(path)

    def __len__(self):
        return 10

    def get_frames_at(self, at):
        return types.SimpleNamespace(data=torch.tensor(at)[:, None, None, None].expand(-1, 3, 120, 160).byte() * 20)


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Reads them, and counts the videos decoded."""
    layout(tmp_path)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=Video))

    def read():
        Video.decoded.clear()
        (x, _), (x_test, _), _, _ = data.read_ucf101(tmp_path, frames=2)
        return np.array(x), np.array(x_test), len(Video.decoded)

    return read


def test_a_changed_byte_in_the_kept_clips_is_decoded_again(clips, tmp_path):
    x, x_test, decoded = clips()
    assert decoded == 2 and x[0, :, 60, 80, 0].tolist() == [0, 40, 80, 120] and clips()[2] == 0
    for name in ("train1_4.npy", "test1_2.npy"):
        flip(tmp_path / "ucf101-clips" / name, 9000)
        again, again_test, decoded = clips()
        assert decoded == 1 and np.array_equal(again, x) and np.array_equal(again_test, x_test)


def test_a_full_disk_while_clips_are_kept_is_one_line(clips, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args):
            self.file, self.left = open(*args), 200_000

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            self.left -= memoryview(content).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(data, "open", lambda path, mode: Full(path, mode) if "w" in mode else open(path, mode),
                      raising=False)
        for _ in range(2):  # the training clips do not fit, and nothing of them is left in the way
            with pytest.raises(data.UserError, match="cannot be kept in .*No space left") as error:
                clips()
            assert "\n" not in str(error.value) and list((tmp_path / "ucf101-clips").iterdir()) == []
    assert clips()[2] == 2


def test_clips_in_a_folder_mounted_read_only_are_one_line(clips, tmp_path, monkeypatch):
    (tmp_path / "ucf101-clips").mkdir()
    with monkeypatch.context() as patch:
        read_only_mount(patch)
        with pytest.raises(data.UserError, match="cannot be kept in .*Read-only file system.*--data-dir"):
            clips()
    linked = tmp_path / "writable"  # what the line advises
    linked.mkdir()
    for name in ("UCF-101", "ucfTrainTestlist"):
        (linked / name).symlink_to(tmp_path / name)
    assert len(data.read_ucf101(linked, frames=2)[0][0]) == 1
    assert (linked / "ucf101-clips" / "train1_4.npy").exists()
