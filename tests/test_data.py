"""common/data.py on tiny files in the standard layouts, written here. CPU, no network."""

import errno
import hashlib
import io
import json
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.io
import torch
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from common import data
from common.data import Split, UserError, batches, draw_digits, load, steps_per_epoch, to_float

# Of the 10,000 embedded images and labels. Recompute after a change of the generator with
#   python -c "import tests.test_data as t; print(t.digest(*t.draw_digits(10_000, 0)))"
# It may not differ between machines.
DIGITS_SHA256 = "e3012b2a1b87fcbb575634f79da676e34f723586b98772bae399dcc0224d91e6"

ROOT = Path(__file__).parent.parent
rng = np.random.default_rng


def digest(x, y):
    return hashlib.sha256(np.ascontiguousarray(x).tobytes() + np.ascontiguousarray(y).tobytes()).hexdigest()


class LocalFile(io.BytesIO):
    """What urlopen returns, as far as torchvision looks at it."""

    def __init__(self, path):
        super().__init__(Path(path).read_bytes())
        self.length, self.url = len(self.getvalue()), f"file://{path}"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only file:// URLs open. The tests of downloads use them."""

    def urlopen(request, *args, **kwargs):
        url = request if isinstance(request, str) else request.full_url
        if url.startswith("file://"):
            return LocalFile(url.removeprefix("file://"))
        raise urllib.error.URLError("no network in tests")

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def assert_one_line(error, *parts):
    message = str(error.value)
    assert error.value.code == 2  # of the process, when nobody catches it
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part} is not in {message!r}"


# --- digits


@pytest.fixture(scope="module")
def digits():
    return draw_digits(10_000, seed=0)


def test_digits_are_the_same_bytes_everywhere(digits):
    assert digest(*digits) == DIGITS_SHA256


def test_digits_shapes_and_classes(digits):
    x, y = digits
    assert x.shape == (10_000, 32, 32, 3) and x.dtype == np.uint8
    assert y.shape == (10_000,) and y.dtype == np.int64
    assert set(Counter(y.tolist())) == set(range(10))
    # A class is drawn with probability 1/10: five deviations of a binomial are 150 of 10,000.
    assert all(850 < count < 1150 for count in Counter(y.tolist()).values())
    assert 0 <= x.min() < 30 and 225 < x.max() <= 255 and 100 < x.mean() < 155
    assert len(np.unique(x.reshape(len(x), -1), axis=0)) == 10_000  # no image twice, so none in two splits


def test_digits_depend_on_the_seed_and_nothing_else():
    state = torch.get_rng_state()
    a, b, c = draw_digits(300, 5), draw_digits(300, 5), draw_digits(300, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(*a) == digest(*b) != digest(*c)
    assert (a[0] != c[0]).mean() > 0.9 and (a[1] != c[1]).mean() > 0.5
    torch.manual_seed(99)
    assert digest(*draw_digits(300, 5)) == digest(*a)
    assert len(draw_digits(2001, 0)[0]) == 2001  # more than a chunk


def test_digits_classes_differ(digits):
    """Shape and texture are there: the nearest class mean is above chance on images it has not seen."""
    x, y = digits[0].reshape(10_000, -1).astype(np.float32), digits[1]
    means = np.stack([x[:9000][y[:9000] == c].mean(0) for c in range(10)])
    means -= means.mean(1, keepdims=True)
    assert ((x[9000:] @ means.T - (means**2).sum(1) / 2).argmax(1) == y[9000:]).mean() > 0.2


def test_load_digits(monkeypatch, capsys, tmp_path, digits):
    monkeypatch.setattr(data, "draw_digits", lambda n, seed: digits)
    d = load("digits", tmp_path / "absent")
    assert d.name == "digits" and d.classes == [str(c) for c in range(10)]
    assert [len(s.y) for s in (d.train, d.val, d.test)] == [8000, 1000, 1000]
    assert not (tmp_path / "absent").exists() and capsys.readouterr().out == ""
    x, y = digits
    held_out = {v.tobytes() for v in x[9000:]}
    assert {v.numpy().tobytes() for v in d.test.x} == held_out
    assert not held_out & {v.numpy().tobytes() for s in (d.train, d.val) for v in s.x}


# --- Splits. In this set an image's first pixel says which one it is.


@pytest.fixture
def numbered(monkeypatch):
    def images(start, n):
        number = np.arange(start, start + n)
        x = np.zeros((n, 4, 6, 3), np.uint8)
        x[:, 0, 0, 0], x[:, 0, 0, 1] = number // 256, number % 256
        return x, number % 10

    monkeypatch.setitem(
        data.READERS, "digits", lambda data_dir: (images(0, 900), images(900, 300), list("abcdefghij"), True)
    )
    return lambda **sizes: load("digits", **{"val_size": 100} | sizes)


def ids(split):
    assert (
        split.x.dtype == torch.uint8
        and split.y.dtype == torch.int64
        and split.x.shape == (len(split.y), 4, 6, 3)
    )
    number = split.x[:, 0, 0, 0].long() * 256 + split.x[:, 0, 0, 1]
    assert torch.equal(number % 10, split.y)  # labels went with their images
    return number.tolist()


def test_a_folder_where_a_trained_network_could_not_be_kept_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    kept = data.cache_file(tmp_path, "teachers", "a", {})
    kept.touch()
    monkeypatch.setattr(data.os, "access", lambda *_: False)  # who runs tests as root may write everywhere
    assert data.cache_file(tmp_path, "teachers", "a", {}) == kept  # it is there: nothing has to be written
    with pytest.raises(data.UserError, match=f"nothing can be written to {tmp_path / 'teachers'}"):
        data.cache_file(tmp_path, "teachers", "b", {})


def test_a_fraction_of_a_fraction_is_none():
    assert data.fraction(["8/255"]) == 8 / 255
    with pytest.raises(ValueError, match="8/255/2 is no number such as 8/255"):  # 8 / (255/2) is not what is meant
        data.fraction(["8/255/2"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_split_is_refused_before_any_work(part, monkeypatch):
    some, none = ((np.zeros((n, 4, 4, 3), np.uint8), np.zeros(n, np.int64)) for n in (20, 0))
    splits = (none, some) if part == "train" else (some, none)
    monkeypatch.setitem(data.READERS, "digits", lambda data_dir: (*splits, ["a"], True))
    with pytest.raises(data.UserError, match=f"digits has no image in its {part} split"):
        load("digits", val_size=5)


def test_splits_are_disjoint_and_complete(numbered):
    d = numbered()
    assert sorted(ids(d.train) + ids(d.val)) == list(range(900))
    assert sorted(ids(d.test)) == list(range(900, 1200))
    assert len(d.val.y) == 100 and len(set(d.val.y.tolist())) == 10
    assert ids(d.train) != sorted(ids(d.train))  # a subset is of all classes, in whatever order the files are


def test_val_is_fixed_and_subsets_are_nested(numbered):
    full = numbered()
    for sizes in (
        dict(train_size=1),
        dict(train_size=57),
        dict(train_size=800),
        dict(test_size=1),
        dict(test_size=300),
    ):
        d = numbered(**sizes)
        assert ids(d.val) == ids(full.val)
        assert ids(d.train) == ids(full.train)[: sizes.get("train_size")]
        assert ids(d.test) == ids(full.test)[: sizes.get("test_size")]
        assert len(d.train.y) == sizes.get("train_size", 800) and len(d.test.y) == sizes.get("test_size", 300)
    small = numbered(val_size=10)
    assert ids(small.val) == ids(full.val)[:10] and not set(ids(small.val)) & set(ids(small.train))
    assert len(numbered(val_size=899).train.y) == 1


def test_global_random_state_changes_nothing(numbered):
    first = numbered()
    np.random.seed(123)
    torch.manual_seed(123)
    assert ids(numbered().val) == ids(first.val) and ids(numbered().test) == ids(first.test)


@pytest.mark.parametrize("sizes, parts", [
    (dict(val_size=0), ("--val-size 0", "1 to 899")),
    (dict(val_size=-5), ("--val-size -5",)),
    (dict(val_size=900), ("--val-size 900", "1 to 899")),
    (dict(train_size=0), ("--train-size 0", "1 to 800")),
    (dict(train_size=-1), ("--train-size -1",)),
    (dict(train_size=801), ("--train-size 801", "1 to 800")),
    (dict(train_size=801, val_size=99), None),
    (dict(test_size=0), ("--test-size 0", "1 to 300")),
    (dict(test_size=301), ("--test-size 301", "1 to 300")),
])  # fmt: skip
def test_sizes_out_of_range(numbered, sizes, parts):
    if parts is None:
        assert len(numbered(**sizes).train.y) == 801
        return
    with pytest.raises(UserError) as error:
        numbered(**sizes)
    assert_one_line(error, "digits", *parts)


def test_user_error_prints_one_line_and_no_traceback():
    code = "from common import data; data.load('mnist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown data set 'mnist'") and done.stderr.count("\n") == 1


def test_unknown_data_set():
    with pytest.raises(UserError) as error:
        load("mnist")
    assert_one_line(error, "'mnist'", "digits", "cifar10", "cifar100", "svhn", "tiny-imagenet")


# --- Batches


def split_of(n, height=6, width=9):
    """Random images; the label of an image is its number."""
    return Split(torch.from_numpy(rng(0).integers(0, 256, (n, height, width, 3), np.uint8)), torch.arange(n))


def order(split, batch_size=4, **settings):
    return torch.cat([y for _, y in batches(split, batch_size, **settings)]).tolist()


def test_to_float():
    x = split_of(5).x
    z = to_float(x)
    assert z.shape == (5, 3, 6, 9) and z.dtype == torch.float32
    assert z.is_contiguous(memory_format=torch.channels_last)
    for value in (0, 1, 128, 255):
        assert to_float(torch.full((1, 1, 1, 3), value, dtype=torch.uint8)).eq(np.float32(value / 255)).all()
    assert torch.equal(z[2, 1], x[2, :, :, 1] / 255)
    assert torch.equal((z * 255).round().byte().permute(0, 2, 3, 1), x)


def test_a_batch():
    split = split_of(12)
    before = split.x.clone()
    for x, y in batches(split, 4, seed=0, epoch=0, pad=2, flip=True):
        assert x.shape == (4, 3, 6, 9) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == (4,) and y.dtype == torch.int64
    assert torch.equal(split.x, before)


def test_every_image_once_an_epoch():
    split = split_of(40)
    for epoch in range(3):
        assert sorted(order(split, seed=1, epoch=epoch, pad=1, flip=True)) == list(range(40))


@pytest.mark.parametrize("n, batch_size, count, size", [
    (10, 4, 2, 4), (12, 4, 3, 4), (3, 4, 1, 3), (4, 4, 1, 4), (5, 1, 5, 1), (7, 1000, 1, 7),
])  # fmt: skip
def test_the_rest_is_dropped(n, batch_size, count, size):
    epoch = list(batches(split_of(n), batch_size, seed=0, epoch=0))
    assert len(epoch) == count == steps_per_epoch(n, batch_size)
    assert all(len(x) == len(y) == size for x, y in epoch)
    seen = [v for _, y in epoch for v in y.tolist()]
    assert len(set(seen)) == len(seen) == count * size


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    split = split_of(64)

    def epoch(seed, epoch, batch_size=8):
        parts = list(batches(split, batch_size, seed=seed, epoch=epoch, pad=2, flip=True))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    x, y = epoch(3, 7)
    for _ in range(2):  # not on what was drawn before, which makes a resumed run exact
        list(batches(split, 8, seed=3, epoch=6, pad=2, flip=True))
        torch.manual_seed(1)
        state = torch.get_rng_state()
        again = epoch(3, 7)
        assert torch.equal(again[0], x) and torch.equal(again[1], y)
        assert torch.equal(torch.get_rng_state(), state)
    bigger = epoch(3, 7, batch_size=16)
    assert torch.equal(bigger[0], x) and torch.equal(bigger[1], y)  # nor on the batch size
    orders = {tuple(epoch(seed, e)[1].tolist()) for seed in range(4) for e in range(4)}
    assert len(orders) == 16
    # The augmentation of one image changes from epoch to epoch, not only its place.
    views = [to_bytes(*epoch(3, e), 0) for e in range(12)]
    assert len(set(views)) > 6
    # and it is not a function of the order alone: asking for none leaves the order
    assert order(split, seed=3, epoch=7) == y.tolist()


def to_bytes(x, y, number):
    return x[y == number].contiguous().numpy().tobytes()


def test_without_augmentation_images_are_unchanged():
    split = split_of(20)
    for x, y in batches(split, 5, seed=0, epoch=2):
        assert torch.equal(x, to_float(split.x[y]))


def slow_views(image, pad):
    """Every crop of a zero-padded image, and its mirror image, by pixel: {bytes: (dy, dx, mirrored)}."""
    height, width, _ = image.shape
    views = {}
    for dy in range(2 * pad + 1):
        for dx in range(2 * pad + 1):
            crop = np.zeros_like(image)
            for i in range(height):
                for j in range(width):
                    row, col = i + dy - pad, j + dx - pad
                    if 0 <= row < height and 0 <= col < width:
                        crop[i, j] = image[row, col]
            views[crop.tobytes()] = (dy, dx, False)
            views[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = (dy, dx, True)
    return views


@pytest.mark.parametrize("pad, flip", [(2, True), (1, False), (0, True)])
def test_crop_and_flip_against_a_slow_reference(pad, flip):
    split = split_of(30)
    references = [slow_views(image, pad) for image in split.x.numpy()]
    assert all(len(r) == 2 * (2 * pad + 1) ** 2 for r in references)
    seen = []
    for epoch in range(40):
        for x, y in batches(split, 10, seed=0, epoch=epoch, pad=pad, flip=flip):
            for image, number in zip((x * 255).round().byte().permute(0, 2, 3, 1), y.tolist(), strict=True):
                seen.append(
                    references[number][image.contiguous().numpy().tobytes()]
                )  # KeyError: no such view
    side = 2 * pad + 1
    positions = Counter((dy, dx) for dy, dx, _ in seen)
    expected = len(seen) / side**2
    assert len(positions) == side**2  # rows and columns independently, both ends of the range included
    assert all(abs(count - expected) < 5 * expected**0.5 for count in positions.values())
    mirrored = sum(m for *_, m in seen) / len(seen)
    assert abs(mirrored - 0.5) < 5 * 0.5 / len(seen) ** 0.5 if flip else mirrored == 0
    first = seen[:10]  # of one batch: each image has its own position and its own flip
    assert (len({v[:2] for v in first}) > 2 or pad == 0) and (len({v[2] for v in first}) == 2 or not flip)


# --- Files in their standard layouts


def random_images(n, seed, size=32):
    return rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def cifar_entry(x, y, key="labels"):
    return {
        "data": x.transpose(0, 3, 1, 2).reshape(len(x), 3072),
        key: [int(v) for v in y],
        "filenames": ["a.png"] * len(x),
    }


def write_cifar10(folder, per_batch=6):
    x, y = random_images(6 * per_batch, 0), np.arange(6 * per_batch) % 10
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    assert names == [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for k, name in enumerate(names):
        part = slice(k * per_batch, (k + 1) * per_batch)
        write_pickle(folder / "cifar-10-batches-py" / name, cifar_entry(x[part], y[part]))
    write_pickle(
        folder / "cifar-10-batches-py" / "batches.meta", {"label_names": [f"name{c}" for c in range(10)]}
    )
    return x, y


def write_cifar100(folder, n=110):
    x, y = random_images(n + 20, 1), np.arange(n + 20) % 100
    coarse = {"coarse_labels": [0] * n}
    write_pickle(folder / "cifar-100-python" / "train", cifar_entry(x[:n], y[:n], "fine_labels") | coarse)
    write_pickle(folder / "cifar-100-python" / "test", cifar_entry(x[n:], y[n:], "fine_labels") | coarse)
    names = {"fine_label_names": [f"fine{c}" for c in range(100)], "coarse_label_names": ["coarse"] * 20}
    write_pickle(folder / "cifar-100-python" / "meta", names)
    return x, y


def write_svhn(folder, n=30, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    x = random_images(n + 10, 2)
    y = (
        np.arange(n + 10) % 10 + 1 if labels is None else np.asarray(labels)
    )  # 1 to 10: the files call zero 10
    for name, part in (("train", slice(0, n)), ("test", slice(n, None))):
        mat = {"X": x[part].transpose(1, 2, 3, 0), "y": y[part, None].astype(np.uint8)}
        scipy.io.savemat(folder / f"{name}_32x32.mat", mat)
    return x, y


WNIDS = ["n02", "n01", "n10"]  # in the order of wnids.txt, which is not the alphabetical one


def colour(c, k):
    return (40 + 80 * c, 200 - 60 * c, 20 + 30 * k)


def write_jpeg(path, value, mode="RGB", size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    value = value if mode == "RGB" else value[0]
    PIL.Image.new(mode, (size, size), value).save(path, format="JPEG", quality=95)


def write_tiny(folder, layout="original", per_class=3):
    root = folder / "tiny-imagenet-200"
    rows = []
    for c, wnid in enumerate(sorted(WNIDS)):
        for k in range(per_class):
            mode = "L" if k == 1 else "RGB"
            write_jpeg(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", colour(c, k), mode)
            file = f"val_{(c * 7 + k * 5) % 11}_{c}{k}.JPEG"
            rows.append((file, wnid))
            place = {
                "original": root / "val" / "images",
                "rearranged": root / "val" / wnid,
                "rearranged-images": root / "val" / wnid / "images",
            }[layout]
            write_jpeg(place / file, colour(c, k), mode)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("a.JPEG\t0\t0\t63\t63\n")
    rows = sorted(rows, key=lambda row: row[0][::-1])
    (root / "val" / "val_annotations.txt").write_text("".join(f"{f}\t{c}\t0\t32\t44\t62\n" for f, c in rows))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "test" / "images").mkdir(parents=True)
    return root


def same_images(split, x, y):
    """As sets of (image, label): the reader is followed by a permutation."""
    got = sorted((v.numpy().tobytes(), int(c)) for v, c in zip(split.x, split.y, strict=True))
    return got == sorted((np.ascontiguousarray(v).tobytes(), int(c)) for v, c in zip(x, y, strict=True))


def joined(*splits):
    return Split(torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits]))


def test_cifar10(tmp_path, capsys):
    x, y = write_cifar10(tmp_path)
    d = load("cifar10", tmp_path, val_size=5)
    assert d.name == "cifar10-unofficial" and d.classes == [f"name{c}" for c in range(10)]
    assert [tuple(s.x.shape) for s in (d.train, d.val, d.test)] == [
        (25, 32, 32, 3),
        (5, 32, 32, 3),
        (6, 32, 32, 3),
    ]
    assert same_images(joined(d.train, d.val), x[:30], y[:30]) and same_images(d.test, x[30:], y[30:])
    assert all(s.x.is_contiguous() for s in (d.train, d.val, d.test))  # the files hold it as (N, 3, H, W)
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and all(line.startswith("warning:") for line in out.splitlines())
    for part in ("data_batch_3", str(tmp_path), "cifar10-unofficial", "not the official", "30 for training",
                 "6 for testing"):
        assert part in out


def test_cifar10_in_the_official_protocol(tmp_path):
    """The files of 2009 are pickles of protocol 2."""
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=2))
    assert len(load("cifar10", tmp_path, val_size=5).train.y) == 25


def test_cifar10_official(tmp_path, monkeypatch, capsys):
    x, y = write_cifar10(tmp_path)
    make_official(monkeypatch, tmp_path)
    d = load("cifar10", tmp_path, val_size=5)
    assert d.name == "cifar10" and capsys.readouterr().out == "" and same_images(d.test, x[30:], y[30:])
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    d = load("cifar10", tmp_path, val_size=5)
    assert d.name == "cifar10-unofficial" and "24 for training" in capsys.readouterr().out


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_official(monkeypatch, folder):
    """Let torchvision take the files of write_cifar10 for the official ones."""
    root = folder / "cifar-10-batches-py"
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(root / name)] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(root / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(root / "batches.meta")})


def test_cifar100_reads_the_fine_labels(tmp_path):
    x, y = write_cifar100(tmp_path)
    d = load("cifar100", tmp_path, val_size=10)
    assert d.name == "cifar100-unofficial" and d.classes == [f"fine{c}" for c in range(100)]
    assert same_images(joined(d.train, d.val), x[:110], y[:110]) and same_images(d.test, x[110:], y[110:])
    (tmp_path / "cifar-100-python" / "meta").unlink()
    assert len(load("cifar100", tmp_path, val_size=10).classes) == 100
    assert CIFAR100.base_folder == "cifar-100-python"


def test_svhn(tmp_path, capsys, monkeypatch):
    x, y = write_svhn(tmp_path)
    d = load("svhn", tmp_path, val_size=5)
    assert d.name == "svhn-unofficial" and "svhn-unofficial" in capsys.readouterr().out
    assert d.classes == [str(c) for c in range(10)]
    assert same_images(joined(d.train, d.val), x[:30], y[:30] % 10) and same_images(
        d.test, x[30:], y[30:] % 10
    )
    assert d.train.x.dtype == torch.uint8 and 0 in d.test.y and 10 not in d.test.y
    part = {s: ["", f"{s}_32x32.mat", md5(tmp_path / f"{s}_32x32.mat")] for s in ("train", "test")}
    monkeypatch.setattr(SVHN, "split_list", part)
    assert load("svhn", tmp_path, val_size=5).name == "svhn" and capsys.readouterr().out == ""
    for name in ("train", "test"):  # one other file is enough
        monkeypatch.setattr(SVHN, "split_list", part | {name: ["", f"{name}_32x32.mat", "0" * 32]})
        assert load("svhn", tmp_path, val_size=5).name == "svhn-unofficial"


@pytest.mark.parametrize("layout", ["original", "rearranged", "rearranged-images"])
def test_tiny_imagenet(tmp_path, layout, capsys, monkeypatch):
    write_tiny(tmp_path, layout)
    listed = Path.iterdir  # in whatever order the file system has
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listed(folder), reverse=True)))
    d = load("tiny-imagenet", tmp_path, val_size=2)
    assert d.name == "tiny-imagenet-unofficial" and d.classes == sorted(WNIDS)
    assert "warning: the files in" in capsys.readouterr().out
    assert [tuple(s.x.shape) for s in (d.train, d.val, d.test)] == [
        (7, 64, 64, 3),
        (2, 64, 64, 3),
        (9, 64, 64, 3),
    ]
    for split in (joined(d.train, d.val), d.test):
        assert Counter(split.y.tolist()) == {0: 3, 1: 3, 2: 3} and split.x.dtype == torch.uint8
        for image, c in zip(split.x.int(), split.y.tolist(), strict=True):
            r, g, b = image[30, 30].tolist()
            assert abs(r - (40 + 80 * c)) < 6  # of the class that its label says
            grey = r == g == b
            assert grey or abs(g - (200 - 60 * c)) < 6 and min(abs(b - (20 + 30 * k)) for k in (0, 2)) < 6
        assert sum(1 for image in split.x if image.float().std(-1).max() == 0) == 3  # the greyscale ones


def test_tiny_imagenet_leftovers_of_rearranging(tmp_path):
    """Scripts that move the images to class folders may leave the empty folder, and its annotations."""
    root = write_tiny(tmp_path, "rearranged")
    (root / "val" / "images").mkdir()
    assert len(load("tiny-imagenet", tmp_path, val_size=2).test.y) == 9


# --- Downloads


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-imagenet"])
def test_missing_files(tmp_path, name):
    folder = tmp_path / "nothing" / "here"
    with pytest.raises(UserError) as error:
        load(name, folder)
    assert_one_line(error, folder, "--data-dir", "download failed", "no network in tests")


def test_missing_second_file(tmp_path):
    write_svhn(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(UserError) as error:
        load("svhn", tmp_path, val_size=5)
    assert_one_line(error, tmp_path, "test_32x32.mat", "--data-dir")
    for part in ("test_batch", "data_batch_1"):
        write_cifar10(tmp_path)
        for path in (tmp_path / "cifar-10-batches-py").glob(
            "test_batch" if part == "test_batch" else "data_batch_*"
        ):
            path.unlink()
        with pytest.raises(UserError) as error:
            load("cifar10", tmp_path, val_size=5)
        assert_one_line(error, tmp_path / "cifar-10-batches-py", part, "--data-dir")


@pytest.mark.parametrize("intact", [True, False])
def test_cifar10_is_downloaded_and_verified(tmp_path, monkeypatch, intact):
    source, folder = tmp_path / "source", tmp_path / "data"
    x, y = write_cifar10(source)
    make_official(monkeypatch, source)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "url", archive.as_uri())
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive) if intact else "0" * 32)
    if intact:
        d = load("cifar10", folder, val_size=5)
        assert d.name == "cifar10" and same_images(d.test, x[30:], y[30:])
    else:
        with pytest.raises(UserError) as error:
            load("cifar10", folder, val_size=5)
        assert_one_line(error, folder, "corrupted", "--data-dir")


@pytest.mark.parametrize("intact", [True, False])
def test_tiny_imagenet_is_downloaded_and_verified(tmp_path, monkeypatch, intact):
    root = write_tiny(tmp_path / "source")
    archive = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for path in root.rglob("*"):
            z.write(path, path.relative_to(root.parent))
    monkeypatch.setattr(data, "TINY_IMAGENET", (archive.as_uri(), md5(archive) if intact else "0" * 32))
    folder = tmp_path / "data"
    if intact:
        assert len(load("tiny-imagenet", folder, val_size=2).test.y) == 9
    else:
        with pytest.raises(UserError) as error:
            load("tiny-imagenet", folder, val_size=2)
        assert_one_line(error, folder, "corrupted", "--data-dir")


# --- Damage


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def html(path):
    path.write_bytes(b"<html>404 Not Found</html>")


@pytest.mark.parametrize("damage", [halve, empty, html])
@pytest.mark.parametrize("name, file", [
    ("cifar10", "cifar-10-batches-py/data_batch_2"),
    ("cifar10", "cifar-10-batches-py/test_batch"),
    ("cifar10", "cifar-10-batches-py/batches.meta"),
    ("cifar100", "cifar-100-python/train"),
    ("svhn", "train_32x32.mat"),
    ("svhn", "test_32x32.mat"),
    ("tiny-imagenet", "tiny-imagenet-200/train/n01/images/n01_2.JPEG"),
    ("tiny-imagenet", "tiny-imagenet-200/val/images/val_0_00.JPEG"),
])  # fmt: skip
def test_damaged_file_is_named(tmp_path, name, file, damage):
    WRITERS[name](tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError) as error:
        load(name, tmp_path, val_size=2)
    assert_one_line(error, tmp_path / file, "truncated or corrupt")


def test_many_damaged_images_are_one_line(tmp_path, capfd):
    root = write_tiny(tmp_path, per_class=20)
    for path in (root / "train").rglob("*.JPEG"):
        halve(path)
    with pytest.raises(UserError) as error:
        load("tiny-imagenet", tmp_path, val_size=2)
    assert_one_line(error, "n01_0.JPEG")
    assert capfd.readouterr().err.count("\n") <= 1


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "tiny-imagenet": write_tiny,
}


@pytest.mark.parametrize("file, value", [
    ("data_batch_1", ["not", "a", "dictionary"]),
    ("data_batch_1", np.zeros(3)),
    ("data_batch_1", {"labels": [1] * 6}),
    ("data_batch_1", {"data": np.zeros((6, 3072), np.uint8)}),
    ("data_batch_1", {"data": np.zeros((6, 3071), np.uint8), "labels": [1] * 6}),
    ("data_batch_1", {"data": np.zeros((6, 3072), np.uint8), "labels": [1] * 5}),
    ("data_batch_1", {"data": np.zeros((6, 3072), np.uint8), "labels": ["cat"] * 6}),
    ("batches.meta", {"names": []}),
    ("batches.meta", None),
], ids=range(9))  # fmt: skip
def test_pickles_with_other_contents_are_named(tmp_path, file, value):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / file
    write_pickle(path, value)
    with pytest.raises(UserError) as error:
        load("cifar10", tmp_path, val_size=2)
    assert_one_line(error, path)


@pytest.mark.parametrize("mat", [
    {"y": np.ones((5, 1))},
    {"X": np.zeros((32, 32, 3, 5), np.uint8)},
    {"X": np.zeros((32, 32, 3, 5), np.uint8), "y": np.ones((4, 1))},
    {"X": np.zeros((32, 32, 15), np.uint8), "y": np.ones((5, 1))},
    {"X": np.random.rand(32, 32, 3, 5), "y": np.ones((5, 1))},  # floats in [0, 1] would all become 0
], ids=["no X", "no y", "lengths", "shape", "floats"])  # fmt: skip
def test_mat_files_with_other_contents_are_named(tmp_path, mat):
    write_svhn(tmp_path)
    scipy.io.savemat(tmp_path / "train_32x32.mat", mat)
    with pytest.raises(UserError) as error:
        load("svhn", tmp_path, val_size=2)
    assert_one_line(error, tmp_path / "train_32x32.mat")


def test_labels_out_of_range(tmp_path):
    write_cifar10(tmp_path)
    for label in (10, -1):
        path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
        write_pickle(path, cifar_entry(random_images(3, 0), [0, label, 2]))
        with pytest.raises(UserError) as error:
            load("cifar10", tmp_path, val_size=2)
        assert_one_line(error, "cifar10", "train", "0..9")
    write_cifar10(tmp_path)
    write_pickle(
        tmp_path / "cifar-10-batches-py" / "test_batch", cifar_entry(random_images(3, 0), [0, 11, 2])
    )
    with pytest.raises(UserError) as error:
        load("cifar10", tmp_path, val_size=2)
    assert_one_line(error, "cifar10", "test", "0..9")


def test_svhn_labels_out_of_range(tmp_path):
    write_svhn(tmp_path, labels=[1] * 20 + [13] * 20)
    with pytest.raises(UserError) as error:
        load("svhn", tmp_path, val_size=2)
    assert_one_line(error, "svhn", "0..9")


def test_tiny_imagenet_unknown_class_in_the_annotations(tmp_path):
    root = write_tiny(tmp_path)
    path = root / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n10", "n99", 1))
    with pytest.raises(UserError) as error:
        load("tiny-imagenet", tmp_path, val_size=2)
    assert_one_line(error, "tiny-imagenet", "0..2")


def test_tiny_imagenet_damaged_annotations(tmp_path):
    root = write_tiny(tmp_path)
    path = root / "val" / "val_annotations.txt"
    for content in (path.read_bytes() + b"val_9.JPEG", b"\xff\xfe\x80\x00binary"):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load("tiny-imagenet", tmp_path, val_size=2)
        assert_one_line(error, path)


def test_tiny_imagenet_incomplete(tmp_path):
    root = write_tiny(tmp_path)
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(UserError) as error:
        load("tiny-imagenet", tmp_path, val_size=2)
    assert_one_line(error, root, "val", "--data-dir")
    (root / "val").mkdir()
    with pytest.raises(UserError) as error:
        load("tiny-imagenet", tmp_path, val_size=2)
    assert_one_line(error, root, "9 training and 0 validation")


def test_tiny_imagenet_image_of_another_size(tmp_path):
    root = write_tiny(tmp_path)
    path = root / "train" / "n10" / "images" / "n10_0.JPEG"
    write_jpeg(path, (1, 2, 3), size=32)
    with pytest.raises(UserError) as error:
        load("tiny-imagenet", tmp_path, val_size=2)
    assert_one_line(error, path)


def test_a_class_without_images_warns(tmp_path, capsys):
    write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(1, 6):
        write_pickle(folder / f"data_batch_{i}", cifar_entry(random_images(8, i), [0, 1, 2, 4, 5, 6, 8, 9]))
    load("cifar10", tmp_path, val_size=2)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "no training image" in line]
    assert warning.startswith("warning:") and "name3, name7" in warning and "name1" not in warning


# --- The cache of decoded images


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Loads it, and counts the images decoded."""
    root = write_tiny(tmp_path)
    opened = []
    original = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda path: opened.append(path) or original(path))

    def read():
        opened.clear()
        d = load("tiny-imagenet", tmp_path, val_size=2)
        return d, len(opened)

    read.root = root
    return read


def equal(a, b):
    pairs = ((a.train, b.train), (a.val, b.val), (a.test, b.test))
    return all(torch.equal(s.x, t.x) and torch.equal(s.y, t.y) for s, t in pairs)


def leftovers(root):
    return [path.name for path in root.iterdir() if path.is_file() and path.suffix not in (".npz", ".txt")]


def test_second_start_reads_the_cache(tiny, capsys):
    first, decoded = tiny()
    assert decoded == 18 and "decoding 9 images" in capsys.readouterr().out
    assert sorted(path.name for path in tiny.root.glob("*.npz")) == ["train.npz", "val.npz"]
    second, decoded = tiny()
    assert decoded == 0 and equal(first, second) and "decoding" not in capsys.readouterr().out
    assert leftovers(tiny.root) == []


def one_array(path):
    with open(path, "wb") as f:
        np.save(f, np.zeros(3))


def other_arrays(path):
    np.savez(path, x=np.zeros(3))


@pytest.mark.parametrize("damage", [halve, empty, one_array, other_arrays])
def test_a_broken_cache_is_ignored_and_replaced(tiny, damage):
    first, _ = tiny()
    damage(tiny.root / "train.npz")
    second, decoded = tiny()
    assert decoded == 9 and equal(first, second)
    assert tiny()[1] == 0


def test_a_cache_of_other_files_is_replaced(tiny):
    first, _ = tiny()
    write_jpeg(tiny.root / "train" / "n01" / "images" / "n01_3.JPEG", (9, 9, 9))
    second, decoded = tiny()
    assert decoded == 10 and len(second.train.y) == len(first.train.y) + 1
    annotations = tiny.root / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("n01", "n02"))
    third, decoded = tiny()
    assert decoded == 9 and Counter(third.test.y.tolist()) == {1: 6, 2: 3}


def test_cache_is_renamed_when_complete(tiny, monkeypatch):
    replaced = []
    original = data.os.replace

    def replace(source, target):
        source, target = Path(source), Path(target)
        assert source.parent == target.parent and not target.exists()
        with np.load(source) as stored:
            assert len(stored["x"]) == len(stored["y"]) == 9
        replaced.append(target.name)
        original(source, target)

    monkeypatch.setattr(data.os, "replace", replace)
    tiny()
    assert replaced == ["train.npz", "val.npz"] and leftovers(tiny.root) == []


def no_rename(monkeypatch):
    def replace(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(data.os, "replace", replace)


def read_only_mount(monkeypatch):
    """On a file system mounted read-only even the removal of a file that is not there fails with EROFS."""

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def read_only_open(path, mode="r", *args, **kwargs):
        return open(path, mode, *args, **kwargs) if mode in ("r", "rb") else refuse(path)

    monkeypatch.setattr(data, "open", read_only_open, raising=False)
    monkeypatch.setattr(data.os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)


def full_disk(monkeypatch):
    def savez(file, **arrays):
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.np, "savez", savez)


@pytest.mark.parametrize("obstacle", [no_rename, read_only_mount, full_disk])
def test_no_cache_is_only_a_warning(tiny, monkeypatch, capsys, obstacle):
    with monkeypatch.context() as patch:
        obstacle(patch)
        first, _ = tiny()
    out = capsys.readouterr().out
    assert len(re.findall("warning: .*decoded images", out)) == 2
    assert list(tiny.root.glob("*.npz")) == [] and leftovers(tiny.root) == []
    second, decoded = tiny()
    assert decoded == 18 and equal(first, second)


# --- Files that are complete when they exist


@pytest.mark.parametrize("file", ["results.json", "best.pt"])
def test_save(tmp_path, file):
    path = tmp_path / file
    for content in ({"a": [1, 2.5]}, {"b": None}):
        data.save(path, content)
        assert content == (json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path))
    assert [p.name for p in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), RuntimeError("unexpected pos 64\nat"), RuntimeError()],
    ids=["OSError", "RuntimeError", "empty"],
)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "best.pt"
    data.save(path, {"old": 1})

    def half(content, f):
        f.write(b"PK")
        assert torch.load(path) == {"old": 1}  # until the new one is complete
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError) as raised:
        data.save(path, {"new": 1})
    assert_one_line(raised, "cannot write", path)
    assert torch.load(path) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_a_write_that_cannot_work_leaves_nothing(tmp_path):
    data.save(tmp_path / "args.json", {"old": 1})
    with pytest.raises(TypeError):  # a mistake of ours, not of the user
        data.save(tmp_path / "args.json", {"new": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["args.json"]
    assert json.loads((tmp_path / "args.json").read_text()) == {"old": 1}


def test_a_write_to_a_read_only_mount_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        read_only_mount(patch)
        with pytest.raises(UserError) as error:
            data.save(tmp_path / "results.json", {})
    assert_one_line(error, "cannot write", tmp_path / "results.json", "Read-only file system")
