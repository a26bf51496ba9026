"""The video sets: the embedded one, UCF-101 in its layout, the batches of clips, and whole runs on clips."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from running import finished_in_process, in_process

import abnn
from benchmark import audit
from common import data


@pytest.fixture(scope="module")
def moving():
    return data.draw_moving_digits(400, seed=0)


# --- The embedded set


def test_moving_digits_are_the_same_bytes_everywhere(moving):
    x, y = moving
    assert x.shape == (400, 8, 32, 32, 3) and x.dtype == np.uint8 and y.dtype == np.int64
    assert hashlib.md5(x.tobytes() + y.tobytes()).hexdigest() == "b39e66112aeb9571c523a4738b965a68"


def test_moving_digits_have_all_classes_and_the_sizes_of_the_splits(moving):
    assert set(moving[1].tolist()) == set(range(8))
    train, test, classes, official = data.read_moving_digits(None)
    assert len(train[0]) == 4000 and len(test[0]) == 500 and len(classes) == 8 and official


def test_the_label_is_the_motion(moving):
    """The shift between successive frames that explains the moving part best points where the label says."""
    x, y = moving
    grey = torch.from_numpy(x[:100]).float().mean(-1)
    still = grey.median(1).values  # what moves is somewhere else most of the time
    moved = (grey - still[:, None]).abs()
    spectrum = torch.fft.rfft2(moved)
    correlation = torch.fft.irfft2((spectrum[:, 1:] * spectrum[:, :-1].conj()), s=(32, 32)).sum(1)
    names, right = list(data.MOTIONS), 0
    for c, label in zip(correlation, y[:100]):
        dy, dx = divmod(c.argmax().item(), 32)
        dy, dx = (dy + 16) % 32 - 16, (dx + 16) % 32 - 16
        vx, vy = data.MOTIONS[names[label]]
        right += (dx * vx + dy * vy) / max((dx**2 + dy**2) ** 0.5 * (vx**2 + vy**2) ** 0.5, 1e-9) > 0.9
    assert right >= 80


def fit(x, y, net, epochs):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()


def test_a_single_frame_does_not_tell_the_class():
    """Frames of 1,000 clips, to a network that has time to learn: near the chance of 12.5 %."""
    x, y = (torch.from_numpy(v) for v in data.draw_moving_digits(1000, seed=5))
    x = data.to_float(x[torch.arange(1000), torch.arange(1000) % 8])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 5, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2),
                        nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))
    fit(x[:800], y[:800], net, 6)
    net.eval()
    assert (net(x[800:]).argmax(1) == y[800:]).float().mean() < 0.2
    assert (net(x[:800]).argmax(1) == y[:800]).float().mean() > 0.3  # it did learn, by heart


# --- Batches of clips


def split_of(n=10, frames=6, height=20, width=30):
    g = torch.Generator().manual_seed(0)
    return data.Split(torch.randint(0, 256, (n, frames, height, width, 3), dtype=torch.uint8, generator=g),
                      torch.arange(n))


def test_clips_without_augmentation_are_the_stored_ones():
    s = split_of()
    seen = {}
    for x, y in data.clip_batches(s, 5, seed=1, epoch=0, frames=6):
        assert x.shape == (5, 3, 6, 20, 30)
        seen |= {int(label): clip for label, clip in zip(y, x)}
    assert set(seen) == set(range(10))
    for i, clip in seen.items():
        assert torch.equal(clip, s.x[i].permute(3, 0, 1, 2).float() / 255)


def test_clips_start_at_random_frames_and_flip_as_a_whole():
    s, starts, flips = split_of(), set(), set()
    for epoch in range(6):
        for x, y in data.clip_batches(s, 5, seed=1, epoch=epoch, frames=4, flip=True):
            for clip, label in zip(x, y):
                stored = s.x[label].permute(3, 0, 1, 2).float() / 255
                found = [(t, f) for t in range(3) for f in (False, True)
                         if torch.equal(clip, stored[:, t : t + 4].flip(-1) if f else stored[:, t : t + 4])]
                assert len(found) == 1
                starts.add(found[0][0]), flips.add(found[0][1])
    assert starts == {0, 1, 2} and flips == {False, True}


def test_crops_are_squares_within_the_frame_and_the_same_in_all_frames():
    n, height, width = 64, 20, 30
    ramp = torch.stack(torch.broadcast_tensors(torch.arange(width) * 8, torch.arange(height)[:, None] * 8,
                                               torch.zeros(())), -1)
    s = data.Split(ramp.to(torch.uint8).expand(n, 3, height, width, 3).clone(), torch.arange(n))
    (x, _), = data.clip_batches(s, n, seed=0, epoch=0, frames=2, size=16, scale=(0.25, 1.0))
    assert x.shape == (n, 3, 2, 16, 16) and torch.allclose(x[:, :, 0], x[:, :, 1])
    across, down = x[:, 0, 0] * 255 / 8, x[:, 1, 0] * 255 / 8  # the place that each pixel comes from
    side_x, side_y = (across[:, 8, 12] - across[:, 8, 4]) * 2, (down[:, 12, 8] - down[:, 4, 8]) * 2
    torch.testing.assert_close(side_x, side_y, rtol=0.02, atol=0.05)
    assert side_x.min() < 9 and side_x.max() > 16 and side_x.min() >= 4.9 and side_x.max() <= 20.1
    assert across.min() >= 0 and across.max() <= width - 1 and across.max() > 25 and down.max() <= height - 1


def test_epochs_of_clips_depend_on_seed_and_epoch_alone():
    s = split_of()

    def epoch(seed, e):
        return torch.cat([x for x, _ in data.clip_batches(s, 5, seed=seed, epoch=e, frames=4, size=8, flip=True)])

    assert torch.equal(epoch(1, 3), epoch(1, 3))
    assert not torch.equal(epoch(1, 3), epoch(1, 4)) and not torch.equal(epoch(1, 3), epoch(2, 3))


def test_centre_clips():
    s = split_of(frames=8)
    x = data.centre_clips(s.x, 4, 20)
    assert torch.equal(x, s.x[:, ::2, :, 5:25])
    assert data.centre_clips(s.x, 3, 10).shape == (10, 3, 10, 10, 3)
    flat = torch.full((1, 4, 20, 30, 3), 77, dtype=torch.uint8)
    assert (data.centre_clips(flat, 2, 12) == 77).all()


# --- UCF-101


def write_videos(root, classes=("Archery", "Biking"), per_class=3, frames=(20, 5, 33)):
    """Real files in the layout of UCF-101, if this machine can make and read them. Their grey level is the frame's."""
    encoders = pytest.importorskip("torchcodec.encoders", exc_type=(ImportError, RuntimeError))
    for c, name in enumerate(classes):
        (root / "UCF-101" / name).mkdir(parents=True)
        for i in range(per_class):
            levels = 40 + 5 * torch.arange(frames[i], dtype=torch.uint8)
            video = levels[:, None, None, None].expand(-1, 3, 60, 80).clone()
            video[:, c] = 20
            path = root / "UCF-101" / name / f"v_{name}_g{i:02d}_c01.avi"
            encoders.VideoEncoder(video, frame_rate=25).to_file(str(path))
    (root / "ucfTrainTestlist").mkdir()
    for part, which in (("train", [0, 1]), ("test", [2])):
        lines = [f"{name}/v_{name}_g{i:02d}_c01.avi" + (f" {c + 1}" if part == "train" else "")
                 for c, name in enumerate((*classes, "Absent")) for i in which]
        (root / "ucfTrainTestlist" / f"{part}list01.txt").write_bytes("\r\n".join(lines).encode())  # CRLF as published


def test_ucf101_reads_clips_of_the_official_lists(tmp_path, capsys):
    write_videos(tmp_path)
    (x, y), (x_test, y_test), classes, official = data.read_ucf101(tmp_path, frames=4)
    assert classes == ["Archery", "Biking"] and not official
    assert x.shape == (4, 8, 128, 170, 3) and x_test.shape == (2, 4, 112, 112, 3) and x.dtype == np.uint8
    order, order_test = (data._permutation(n).tolist() for n in (4, 2))  # stored as they are drawn
    assert y.tolist() == [[0, 0, 1, 1][i] for i in order] and y_test.tolist() == order_test
    level = np.asarray(x)[order.index(0), :, 60, 80].astype(int)
    assert (abs(level[:, 1] - (40 + 5 * 2 * np.arange(8))) <= 8).all() and (level[:, 0] < 40).all()
    looped = np.asarray(x)[order.index(1), :, 60, 80, 1].astype(int)  # five frames only: from the start again
    assert (abs(looped - (40 + 5 * (np.arange(8) % 5))) <= 8).all()
    tested = np.asarray(x_test)[order_test.index(0), :, 56, 56, 1].astype(int)  # 33 frames, 4 wanted: every eighth
    assert (abs(tested - (40 + 5 * 8 * np.arange(4))) <= 8).all()
    capsys.readouterr()
    again = data.read_ucf101(tmp_path, frames=4)
    assert "decoding" not in capsys.readouterr().out and np.array_equal(again[0][0], x)
    d = data.load("ucf101", tmp_path, val_size=1, frames=4)
    assert d.name == "ucf101-unofficial" and d.train.x.shape == (3, 8, 128, 170, 3)
    assert d.augment == dict(flip=True, size=112, scale=(0.25, 1.0))
    # What data in memory would be split into, and no copy: a view of the mapped file, behind the validation clip.
    assert np.array_equal(d.train.x, x[1:]) and np.array_equal(d.val.x, x[:1]) and d.train.y.tolist() == y[1:].tolist()
    assert d.train.x.storage_offset() == x[0].size and d.train.x.is_contiguous()
    few = data.load("ucf101", tmp_path, val_size=1, train_size=2, test_size=1, frames=4)
    assert np.array_equal(few.train.x, x[1:3]) and np.array_equal(few.test.x, x_test[:1])


def test_a_changed_video_is_decoded_again_and_a_damaged_one_is_named(tmp_path, capsys):
    write_videos(tmp_path)
    data.read_ucf101(tmp_path, frames=4)
    path = tmp_path / "UCF-101" / "Biking" / "v_Biking_g00_c01.avi"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(data.UserError, match="v_Biking_g00_c01.avi cannot be decoded"):
        data.read_ucf101(tmp_path, frames=4)
    assert not list((tmp_path / "ucf101-clips").glob("*.tmp"))


def layout(root):
    """The layout of UCF-101 with empty files: enough for what is refused before decoding."""
    (root / "UCF-101" / "Archery").mkdir(parents=True), (root / "ucfTrainTestlist").mkdir()
    for i in (1, 2):
        (root / "UCF-101" / "Archery" / f"v_Archery_g0{i}_c01.avi").write_bytes(b"")
    (root / "ucfTrainTestlist" / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\n")
    (root / "ucfTrainTestlist" / "testlist01.txt").write_text("Archery/v_Archery_g02_c01.avi\n")


def test_ucf101_without_torchcodec_or_ffmpeg_is_one_line(tmp_path, monkeypatch):
    layout(tmp_path)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # an import of it fails
    with pytest.raises(data.UserError, match="pip install torchcodec") as error:
        data.read_ucf101(tmp_path)
    assert "\n" not in str(error.value)

    class NoFFmpeg:
        def __getattr__(self, name):
            raise RuntimeError("Could not load libtorchcodec. Likely causes:\n 1. FFmpeg is not properly installed")

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", NoFFmpeg())
    with pytest.raises(data.UserError, match="install FFmpeg") as error:
        data.read_ucf101(tmp_path)
    assert "\n" not in str(error.value)


def test_ucf101_that_is_not_there_or_has_no_lists_is_one_line(tmp_path):
    with pytest.raises(data.UserError, match="UCF-101 is not there: unpack"):
        data.read_ucf101(tmp_path)
    layout(tmp_path)
    with pytest.raises(data.UserError, match="trainlist02.txt"):
        data.read_ucf101(tmp_path, split=2)
    (tmp_path / "ucfTrainTestlist" / "testlist01.txt").write_text("Biking/v_Biking_g02_c01.avi\n")
    with pytest.raises(data.UserError, match="none of the videos in .*testlist01.txt"):
        data.read_ucf101(tmp_path)


# --- Runs


TINY = ("--dataset moving-digits --train-size 96 --val-size 16 --test-size 4 --width 2 --epochs 1 --clean-epochs 1 "
        "--batch-size 32 --attack-steps 1")


@pytest.fixture(autouse=True, scope="module")
def few_clips(request):
    """The whole set takes seconds to draw, again in each run."""
    patch = pytest.MonkeyPatch()
    x, y = data.draw_moving_digits(240, seed=1)
    patch.setitem(data.READERS, "moving-digits", lambda data_dir, frames=8, split=1: (
        (x[:200], y[:200]), (x[200:], y[200:]), list(data.MOTIONS), True))
    yield
    patch.undo()


def test_a_run_on_clips_end_to_end(tmp_path, capsys):
    (tmp_path / "substitutes").mkdir()
    run, output = finished_in_process(TINY, tmp_path, "abnn.py")
    results = json.loads((run / "results.json").read_text())
    assert results["dataset"] == "moving-digits" and results["evaluated"] == 4 and "clips to train" in output
    assert results["method"]["threats"]["C margin"].keys() == {"pgd", "roa", "roa_search", "af", "af_universal", "spa"}
    assert in_process(f"--eval-only {run}", capsys, tmp_path, "abnn.py")[0] == 0
    assert json.loads((run / "eval.json").read_text())["checkpoints"] == results["checkpoints"]


def test_adversarial_training_on_clips_runs(tmp_path):
    (tmp_path / "substitutes").mkdir()
    run, _ = finished_in_process(TINY + " --defense at --eps-warmup-epochs 0", tmp_path, "abnn.py")
    assert json.loads((run / "results.json").read_text())["eps"] == pytest.approx(4 / 255)


def test_the_audit_of_a_run_on_clips(tmp_path, monkeypatch):
    """The attacks see images, frame below frame; the network sees the same clips."""
    (tmp_path / "substitutes").mkdir()
    run, _ = finished_in_process(TINY + " --defense none", tmp_path, "abnn.py")
    seen = {}
    monkeypatch.setattr(audit, "audit", lambda net, x, y, eps, norm, **more: seen.update(
        more, net=net, x=x, y=y, eps=eps) or {"verdict": ""})
    monkeypatch.setattr("sys.argv", ["benchmark/audit.py", str(run), "--device", "cpu"])
    audit.main()
    net, args, _ = abnn.load(run)
    d = data.load_as(args, "cpu")
    clips = data.to_float(d.test.x)
    assert seen["x"].shape == (4, 3, 8 * 32, 32) and seen["eps"] == pytest.approx(4 / 255)
    assert torch.equal(seen["y"], d.test.y) and torch.equal(seen["x"][:, :, 32:64], clips[:, :, 1])
    with torch.no_grad():
        assert torch.equal(seen["net"](seen["x"]), net(clips))
    x, y = seen["train"]
    assert x.shape[1:] == seen["x"].shape[1:] and len(x) == len(y) == len(d.train.y)
    assert torch.equal(y, d.train.y)
