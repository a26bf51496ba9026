"""ABNN's layer, threat models and attacks against slow, independent versions; whole runs on images."""

import copy
import json
import shutil
import signal
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from running import epochs_done, finished_in_process, in_process, same, start, tag_mismatches, wait_for, weights

import abnn
from common import data
from common.pgd import frame_mask, survivors, universal

ARGS = abnn.Args(**{**abnn.DIGITS, "width": 4})
CLIPS = abnn.Args(**{**abnn.MOVING, "width": 2},
                  dataset="moving-digits")
TINY = ("--train-size 400 --val-size 60 --test-size 5 --width 4 --epochs 2 --clean-epochs 1 --batch-size 100 "
        "--attack-steps 1")
ALIGNED = TINY + " --align-weight 0.1"


def make(args=ARGS, **changes):
    """A small ABNN whose BatchNorms have statistics and affines of their own."""
    torch.manual_seed(0)
    net = abnn.ABNN(replace(args, **changes), classes=8)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d):
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-0.5, 0.5)
                m.running_mean.uniform_(-0.5, 0.5), m.running_var.uniform_(0.5, 2)
    return net.eval()


def inputs(n=4, clips=False, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, *([8] if clips else []), 32, 32, generator=g), torch.randint(0, 8, (n,), generator=g)


@pytest.fixture(params=["images", "clips"])
def kind(request):
    """(args, x, y), once of images and once of clips."""
    clips = request.param == "clips"
    return CLIPS if clips else ARGS, *inputs(clips=clips)


# --- The layer


@pytest.mark.parametrize("statistics", ["flat", "channel"])
@pytest.mark.parametrize("moments", ["sample", "batch"])
def test_layer_is_its_equations(statistics, moments):
    torch.manual_seed(0)
    layer = abnn.AdaptiveBN(5, (3, 4, 2), statistics, moments)
    layer.bn.weight.data.uniform_(0.5, 2), layer.bn.bias.data.uniform_(-1, 1)
    layer.bn.running_mean.uniform_(-1, 1), layer.bn.running_var.uniform_(0.5, 2)
    layer.bias.data.normal_()
    layer.eval()
    z, s = torch.randn(3, 5, 6, 7, requires_grad=True), (2 * torch.randn(3, 3, 4, 2) + 1).requires_grad_()
    out, expected = layer(z, s), torch.zeros(3, 5, 6, 7)
    for b in range(3):
        values = (s[b] if moments == "sample" else s).flatten()
        mean = values.sum() / len(values)
        std = (((values - mean) ** 2).sum() / (len(values) - 1)) ** 0.5
        f = s[b].flatten() if statistics == "flat" else torch.stack(
            [s[b, c].mean() for c in range(3)] + [s[b, c].std(correction=0) for c in range(3)])
        for c in range(5):
            gamma = (2 / len(f)) ** 0.5 * (layer.weight[c] * f).sum() + layer.bias[c]
            beta = (2 / len(f)) ** 0.5 * (layer.weight[5 + c] * f).sum() + layer.bias[5 + c]
            u = (z[b, c] - layer.bn.running_mean[c]) / (layer.bn.running_var[c] + layer.bn.eps).sqrt()
            v = std * (u * layer.bn.weight[c] + layer.bn.bias[c]) + mean
            expected[b, c] = gamma * v + beta
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    what, g = (z, s, layer.weight, layer.bias, layer.bn.weight, layer.bn.bias), torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, what, g), torch.autograd.grad(expected, what, g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clips", [False, True])
def test_layer_with_neutral_statistics_is_batchnorm(clips):
    """gamma 1, beta 0, std 1, mean 0: in training and in evaluation, on images and on clips."""
    shape = (2, 4, 4, 4) if clips else (2, 8, 8)
    layer = abnn.AdaptiveBN(6, shape, "flat", "sample")
    plain = (nn.BatchNorm3d if clips else nn.BatchNorm2d)(6)
    layer.weight.data.zero_()
    s = torch.randn(5, *shape)
    flat = s.flatten(1)
    s = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(s)
    z = torch.randn(5, 6, *shape[1:]) * 3 + 2
    for _ in range(2):
        torch.testing.assert_close(layer(z, s), plain(z), rtol=1e-4, atol=1e-5)
    layer.eval(), plain.eval()
    torch.testing.assert_close(layer(z, s), plain(z), rtol=1e-4, atol=1e-5)


def test_layer_starts_with_gamma_around_one_and_beta_around_zero_equalised_or_not():
    s, z, out = torch.randn(1, 8, 4, 4), torch.randn(2, 2000, 4, 4), []
    for equalised in (True, False):
        torch.manual_seed(0)
        layer = abnn.AdaptiveBN(2000, (8, 4, 4), "flat", "sample", equalised).eval()
        gamma, beta = F.linear(layer.factor * s.flatten(1), layer.weight, layer.bias).chunk(2, 1)
        assert abs(gamma.mean() - 1) < 0.15 and abs(beta.mean()) < 0.15
        assert gamma.std().item() == pytest.approx(2**0.5, rel=0.2)  # twice the mean square of f
        out.append(layer(z[:1], s))
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-3)  # the same function at the start


def test_an_equalised_map_moves_by_two_over_d_of_what_the_other_does():
    s, z, moved = torch.randn(3, 8, 4, 4), torch.randn(3, 5, 4, 4), []
    for equalised in (True, False):
        torch.manual_seed(0)
        layer = abnn.AdaptiveBN(5, (8, 4, 4), "flat", "sample", equalised).eval()
        (grad,) = torch.autograd.grad(layer(z, s).square().sum(), layer.weight)
        moved.append(layer.factor * grad)  # of A as it acts, by a step of SGD of rate 1
    torch.testing.assert_close(moved[0], 2 / 128 * moved[1], rtol=1e-3, atol=1e-3)


def test_statistics_of_maps_of_a_single_position_are_finite():
    layer = abnn.AdaptiveBN(5, (3, 1, 1), "channel", "sample").eval()
    z, s = torch.randn(2, 5, 4, 4), torch.randn(2, 3, 1, 1, requires_grad=True)
    out = layer(z, s)
    assert out.isfinite().all() and torch.autograd.grad(out.sum(), s)[0].isfinite().all()


# --- The network


def test_groups_are_the_network():
    x, _ = inputs()
    clips, _ = inputs(clips=True)
    for arch, width, images in (("preactresnet8", 4, x), ("preactresnet18", 4, x), ("wrn-34-10", 16, x),
                                ("resnet18", None, x), ("conv3d", 2, clips), ("r3d18", None, clips[:1])):
        net = abnn.plain_network(arch, width, 10).eval()
        groups, head = abnn.groups_of(net, arch)
        out = images
        with torch.no_grad():
            for group in groups:
                out = group(out)
            assert len(groups) == (4 if arch in ("preactresnet8", "wrn-34-10") else 5)
            torch.testing.assert_close(head(out), net(images))


def test_a_deep_copy_has_nothing_of_the_original(kind):
    args, x, _ = kind
    net = make(args)
    twin, before = copy.deepcopy(net), net(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(x).any() and same(dict(a=net(x)), dict(a=before))


def test_gradients_reach_the_input_through_both_networks_in_c_and_through_the_target_in_a(kind):
    args, x, y = kind
    net = make(args)

    def gradient(model):
        v = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(v), y), v)[0]

    through_both, through_target = gradient(net), gradient(partial(net, detach=True))
    # Independently: S looks at another tensor of the same values.
    copy, v = x.clone().requires_grad_(), x.clone().requires_grad_()
    z, s = v, copy
    for group, tap, norm in zip(net.groups, net.taps, net.norms):
        z, s = group(z), tap(s)
        z = norm(z, s)
    of_target, of_substitute = torch.autograd.grad(F.cross_entropy(net.head(z), y), (v, copy))
    torch.testing.assert_close(through_target, of_target, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(through_both, of_target + of_substitute, rtol=1e-3, atol=1e-7)
    assert of_substitute.abs().max() > 1e-6 and not torch.allclose(through_both, through_target, rtol=1e-2)
    assert torch.equal(net(x), net(x, detach=True))  # the same network, only its gradient differs


def test_prediction_does_not_depend_on_the_batch_with_moments_per_sample(kind):
    args, x, _ = kind
    for moments in ("sample", "batch"):
        net = make(args, moments=moments)
        x = x * torch.linspace(0.1, 1, len(x)).view(-1, *[1] * (x.ndim - 1))  # so that the samples differ
        alone = torch.cat([net(x[i : i + 1]) for i in range(len(x))])
        assert torch.allclose(net(x), alone, rtol=1e-4, atol=1e-5) == (moments == "sample")


def test_training_moves_the_target_and_leaves_substitute_and_twin_alone(kind):
    args, x, y = kind
    net = make(args, align_weight=0.5).train()
    optimizer = abnn.optimizer_of(net, args)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(2):
        loss, terms, _ = abnn.training_loss(net, x, y, replace(args, align_weight=0.5))
        torch.testing.assert_close(loss, terms["clean_ce"] + 0.5 * terms["distance"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for k, v in net.state_dict().items():
        frozen = k.startswith(("substitute.", "twin."))
        assert torch.equal(v, before[k]) == frozen, k
    assert net.training and net.target.training and not net.substitute.training and not net.twin.training
    groups = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in groups for p in net.parameters() if p.requires_grad)
    for m in net.norms:
        assert groups[id(m.weight)] == groups[id(m.bias)] == pytest.approx(args.lr / 10)
        assert groups[id(m.bn.weight)] == args.lr


def test_distance_is_its_definition():
    torch.manual_seed(0)
    record = [(torch.randn(3, 2, 4, 4), 2 * torch.randn(3, 5, 2, 2) + 1),
              (torch.rand(3, 4, 1, 1), torch.rand(3, 6, 1, 2))]
    expected = sum(((z[i].mean() - s[i].mean()) ** 2 + (z[i].std() - s[i].std()) ** 2) / 3
                   for z, s in record for i in range(3))
    torch.testing.assert_close(abnn.distance(record), expected)


# --- The attacks


def test_sizes_grow_in_area_with_the_strength():
    ucf = abnn.Args(**abnn.UCF101, dataset="ucf101")
    at = {k: abnn.sizes(replace(ucf, attack_strength=k)) for k in (1, 2, 4)}
    assert [at[k]["af"] for k in (1, 2, 4)] == [5, 10, 20] and [at[k]["spa"] for k in (1, 2, 4)] == [100, 200, 400]
    assert [at[k]["roa"] for k in (1, 2, 4)] == [30, 42, 60]
    for dataset in abnn.PRESETS:  # the largest leave a part of the image as it is
        largest, side = abnn.sizes(replace(ARGS, dataset=dataset, attack_strength=4)), abnn.SIDES.get(dataset, 32)
        assert largest["roa"] < side and 2 * largest["af"] < side and 2 * largest["spa"] < side**2


@pytest.mark.parametrize("name", abnn.KINDS)
def test_attacks_keep_to_their_masks_and_to_the_box(name, kind):
    args, x, y = kind
    x = 0.25 + x / 2  # so that every pixel can be seen to change
    net, size = make(args), abnn.sizes(args)
    for steps in (3, 0):
        if steps == 0 and name == "roa_search":
            continue
        g = torch.Generator().manual_seed(0)
        frame = universal(net, x, y, frame_mask(size["af"], x), steps=steps, generator=g)
        how = dict(frame=frame) if name == "af_universal" else {}
        x_adv = abnn.craft(name, net, x, y, args, g, steps=steps, **how)
        changed = (x_adv != x).any(1)  # (N, [T,] H, W)
        changed = changed if changed.ndim == 4 else changed[:, None]
        assert x_adv.shape == x.shape and 0 <= x_adv.min() and x_adv.max() <= 1
        if name == "pgd":
            assert (x_adv - x).abs().max() <= args.eps + 1e-6 and changed.float().mean() > 0.9
        elif name.startswith("af"):
            border = torch.ones(32, 32, dtype=torch.bool)
            border[size["af"] : -size["af"], size["af"] : -size["af"]] = False
            assert not (changed & ~border).any() and changed[..., border].float().mean() > 0.99
            if name == "af_universal":  # one frame for all
                assert (x_adv[..., border] == x_adv[:1, ..., border]).all()
        elif name == "spa":
            assert (changed.sum((2, 3)) == size["spa"]).all()
            assert changed.shape[1] == 1 or (changed[:, 0] != changed[:, 1]).any()
            if steps == 0:
                assert (x_adv.movedim(1, -1)[(x_adv != x).any(1)] == 0).all()
        else:
            for one in changed.flatten(0, 1):
                i, j = one.nonzero().T
                side = size["roa"]  # a pixel or two may be grey before and after
                assert one.sum() > 0.9 * side**2 and i.max() - i.min() < side and j.max() - j.min() < side
            if steps == 0:
                assert (x_adv.movedim(1, -1)[(x_adv != x).any(1)] == 0.5).all()


def test_no_gradient_twins_need_no_gradient():
    class Blocked(nn.Module):
        def forward(self, x):
            raise AssertionError("the model was asked")

    x, y = inputs()
    g = torch.Generator().manual_seed(0)
    for name in ("pgd", "roa", "af", "spa"):
        assert (abnn.craft(name, Blocked().eval(), x, y, ARGS, g, steps=0) != x).any()
    universal(Blocked().eval(), x, y, frame_mask(2, x), steps=0, generator=g)


@pytest.fixture(scope="module")
def undefended():
    """A plainly trained network and test images."""
    d = data.load("digits", train_size=3000, val_size=200, test_size=40)
    args = replace(ARGS, defense="none", batch_size=32, epochs=1, lr=0.1)
    torch.manual_seed(0)
    net = abnn.build(args, 10)
    optimizer = abnn.optimizer_of(net, args)
    means = abnn.train_epoch(net, optimizer, d, args, 0)
    assert 0 < means["losses/clean_ce"] < 2 and means["train/clean_acc"] > 0.3
    known = data.to_float(d.val.x[:40]), d.val.y[:40]
    return net.eval(), data.to_float(d.test.x), d.test.y, known, args


def test_an_undefended_network_falls_under_every_attack(undefended):
    """The calibration: an attack that a plain network survives would say nothing of a defense."""
    net, x, y, known, args = undefended
    table, warnings = abnn.evaluate_threats(net, x, y, known, args)
    assert table["worst"]["clean"] > 0.5
    assert set(table) == {"worst", "C ce", "C margin", "C strong", "no gradient"}
    for name in abnn.KINDS:
        limit = 0.5 * table["worst"]["clean"] if name == "af_universal" else 0.15  # one frame for all is weaker
        assert table["worst"][name] <= limit, name
        assert table["worst"][name] <= min(row[name] for row in table.values() if name in row)
    assert table["worst"]["all"] <= min(table["worst"][name] for name in abnn.KINDS)
    assert not warnings and abnn.verdict(table, 10).startswith("nothing is left")


def test_table_of_threats_agrees_with_pgd_alone(undefended, monkeypatch):
    monkeypatch.setattr(abnn, "KINDS", ("pgd",))
    net, x, y, known, args = undefended
    table, _ = abnn.evaluate_threats(net, x, y, known, replace(args, eps=2 / 255))
    clean = survivors(net, x, y, eps=0, steps=0)
    for loss in ("ce", "margin"):
        expected = survivors(net, x, y, clean, eps=2 / 255, steps=20, loss=loss).float().mean().item()
        assert table[f"C {loss}"]["pgd"] == pytest.approx(expected)


def test_the_strong_white_box_goes_on_where_the_others_end(undefended, monkeypatch):
    """Of what cross-entropy and margin leave together it breaks more, and only that; towards every wrong class too."""
    monkeypatch.setattr(abnn, "KINDS", ("spa",))
    net, x, y, known, args = undefended
    args = replace(args, attack_strength=1)
    monkeypatch.setitem(abnn.ATTACK_SIZES, "digits", (14, 2, 12))  # few pixels: there is something left to break
    seen, craft = [], abnn.craft

    def spied(name, source, x, y, args, generator, **how):
        seen.append((len(x), how))
        return craft(name, source, x, y, args, generator, **how)

    monkeypatch.setattr(abnn, "craft", spied)
    table, _ = abnn.evaluate_threats(net, x, y, known, args)
    row = {k: v["spa"] for k, v in table.items()}
    assert 0 < row["C strong"] < min(row["C ce"], row["C margin"]) and row["worst"] == row["C strong"]
    sizes, hows = zip(*seen[3:])  # after both losses and no gradient
    assert list(sizes) == sorted(sizes, reverse=True) and sizes[0] <= len(y) * min(row["C ce"], row["C margin"]) + 1e-6
    assert [how.get("steps") for how in hows] == [100, 100] + 9 * [None] and all(how["keep_best"] for how in hows)
    targets = torch.stack([how["loss"].keywords["target"][0] for how in hows[2:]])
    assert len(set(targets.tolist())) >= 5 and sizes[-1] >= row["C strong"] * len(y) - 1e-6


def test_a_white_box_that_fails_is_warned_of(undefended, monkeypatch):
    """A network with a vanishing gradient in C, and its true one in A: what a failed attack looks like."""
    monkeypatch.setattr(abnn, "KINDS", ("pgd",))
    net, x, y, known, args = undefended

    class Hidden(abnn.ABNN):
        def __init__(self):
            nn.Module.__init__(self)
            self.net, self.twin = net, net

        def forward(self, x, detach=False):
            return self.net(x) if detach else self.net(x.detach() + 0 * x)

        def train(self, mode=True):
            return nn.Module.train(self, mode)

    _, warnings = abnn.evaluate_threats(Hidden().eval(), x, y, known, args)
    assert any(w.startswith("pgd: the white box C leaves") and "A ce" in w for w in warnings)


def test_verdict_says_what_is_left():
    row = dict.fromkeys(abnn.KINDS, 0.0)
    table = {"worst": {**row, "clean": 0.9}, "A ce": {**row, "pgd": 0.5}, "A margin": row, "B ce": row, "C ce": row,
             "C margin": row}
    assert "nothing is left" in abnn.verdict(table, 10) and "rows A ce show" in abnn.verdict(table, 10)
    strong = dict.fromkeys(abnn.KINDS, 0.4)
    strong = {**table, "C ce": strong, "C margin": strong, "worst": {**strong, "clean": 0.9, "spa": 0.3}}
    assert abnn.verdict(strong, 10).endswith("at least 0.300 is left under each attack")
    assert "nothing to defend" in abnn.verdict({**table, "worst": {**row, "clean": 0.12}}, 10)
    assert "nothing to defend" not in abnn.verdict({**table, "worst": {**row, "clean": 0.12}}, 100)


# --- Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny(runs):
    (runs / "substitutes").mkdir()  # or it would count as a new run
    return finished_in_process(ALIGNED, runs, "abnn.py")


def test_a_run_leaves_its_results(tiny, runs):
    run, output = tiny
    results = json.loads((run / "results.json").read_text())
    assert {p.name for p in run.iterdir() if "tfevents" not in p.name} == {
        "args.json", "best.pt", "last.pt", "results.json"}
    method = results["method"]
    assert set(method["threats"]) == {
        "worst", "no gradient", "C strong", *(f"{t} {k}" for t in "ABC" for k in ("ce", "margin"))}
    for row in method["threats"].values():
        assert all(0 <= v <= 1 for v in row.values())
    assert method["verdict"] in output and "weaker premise" in output
    for row in results["checkpoints"].values():
        assert set(row) == {"epoch", "clean", "fgsm", "pgd20", "pgd50_margin", "targeted", "transfer", "worst"}
    assert len(list((runs / "substitutes").glob("*.pt"))) == 2
    assert set(tag_mismatches("abnn.md", run)) == {  # those of adversarial training
        "losses/robust_ce is not in the run", "train/robust_acc is not in the run"}


def test_the_checkpoint_can_be_evaluated_anywhere(tiny, runs, tmp_path, capsys):
    run, _ = tiny
    results = json.loads((run / "results.json").read_text())
    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    status, error = in_process(f"--eval-only {copy}", capsys, tmp_path / "none", "abnn.py")
    assert status == 0, error
    again = json.loads((copy / "eval.json").read_text())
    assert again["checkpoints"] == results["checkpoints"]
    assert again["method"]["threats"] == results["method"]["threats"]
    assert again["method"]["history"] == results["method"]["history"] != {}
    net, args, _ = abnn.load(copy)
    assert isinstance(net, abnn.ABNN) and not net.training and args.substitute == "self"


def test_substitutes_are_kept_and_a_damaged_file_is_refused(tiny, runs, capsys, tmp_path):
    files = {p.name: p.stat().st_mtime_ns for p in (runs / "substitutes").iterdir()}
    folder, output = finished_in_process(ALIGNED.replace("--epochs 2", "--epochs 1"), runs, "abnn.py")
    assert {p.name: p.stat().st_mtime_ns for p in (runs / "substitutes").iterdir()} == files
    assert "clean training" not in output
    shutil.copytree(runs / "substitutes", tmp_path / "substitutes")
    for path in (tmp_path / "substitutes").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    status, error = in_process(TINY, capsys, tmp_path, "abnn.py")
    assert status == 2 and "is not a checkpoint" in error and "\n" not in error


@pytest.mark.parametrize("args", [ARGS, CLIPS], ids=["images", "clips"])
def test_changed_data_have_another_clean_network(args, monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(abnn, "train_epoch", lambda *args: trained.append(args) or defaultdict(float))
    args = replace(args, runs_dir=str(tmp_path), train_size=50, val_size=10, test_size=5, clean_epochs=1)
    d = data.load_as(args, "cpu")
    for _ in range(2):
        abnn.clean_network(args, d, "cpu")
    assert len(trained) == 1
    d.train.x[0, 0, 0] ^= 1
    abnn.clean_network(args, d, "cpu")
    assert len(trained) == 2


def test_a_run_starts_from_the_kept_target_and_substitute(tiny, runs):
    run, output = finished_in_process(f"{TINY} --epochs 1 --statistics channel --moments batch --bf16", runs, "abnn.py")
    for net in (abnn.load(tiny[0])[0], abnn.load(run)[0]):  # in bfloat16 others are trained
        for part, seed in ((net.twin, 1), (net.substitute, 1001)):
            kept = [weights(path) for path in (runs / "substitutes").glob(f"digits__preactresnet8__{seed}__*.pt")]
            kept = [{k: v for k, v in one.items() if k in part.state_dict()} for one in kept]
            assert [same(part.state_dict(), one) for one in kept].count(True) == 1
    assert "weaker premise" in output  # it learned from the target's data


@pytest.mark.parametrize("defense", ["none", "at"])
def test_other_defenses_start_from_the_same_network(defense, tiny, runs, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)  # it stays where it starts
    run, output = finished_in_process(f"{TINY} --epochs 1 --test-size 2 --defense {defense}", runs, "abnn.py")
    assert "clean training" not in output
    assert same(dict(abnn.load(run)[0].named_parameters()), dict(abnn.load(tiny[0])[0].twin.named_parameters()))


def test_adversarial_training_runs_and_has_a_white_box_only(tiny, runs):
    run, output = finished_in_process(TINY + " --epochs 1 --defense at", runs, "abnn.py")
    method = json.loads((run / "results.json").read_text())["method"]
    assert set(method["threats"]) == {"worst", "C ce", "C margin", "C strong", "no gradient"}


def test_a_kept_substitute_can_be_evaluated_like_any_checkpoint(tiny, runs, capsys, tmp_path):
    path = tmp_path / shutil.copy(next((runs / "substitutes").glob("digits__preactresnet8__1__*.pt")), tmp_path)
    status, error = in_process(f"--eval-only {path} --test-size 4", capsys, tmp_path / "none", "abnn.py")
    assert status == 0, error
    assert json.loads(path.with_name(f"eval_{path.stem}.json").read_text())["evaluated"] == 4


def test_killed_it_resumes_to_the_same_bits(tiny, runs):
    known = set(runs.glob("*"))
    process = start(ALIGNED, runs, "abnn.py")
    run = wait_for(runs, known, lambda r: epochs_done(r) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished_in_process(f"--resume {run}", runs, "abnn.py")
    assert same(weights(tiny[0] / "last.pt"), weights(run / "last.pt"))
    first, second = (json.loads((r / "results.json").read_text()) for r in (tiny[0], run))
    assert first["checkpoints"] == second["checkpoints"]
    assert first["method"]["threats"] == second["method"]["threats"]
    assert first["method"]["history"] == second["method"]["history"]


REFUSED = {
    "--eps 8": "did you mean 8/255?",
    "--align-weight -1": "--align-weight must be at least 0",
    "--eps 0": "an undefended network is --defense none",
    "--frames 5": "--frames would do nothing here",
    "--dataset moving-digits --split 2": "--split would do nothing here",
    "--substitute ''": "--substitute was given an empty name",
    "--step-size 1/255": "--step-size would do nothing here",
    "--defense at --substitute self --moments batch": "--substitute, --moments would do nothing here",
    "--dataset ucf101 --defense at --substitute self --data-dir nowhere": "UCF-101 is not there",
    "--dataset moving-digits --arch r3d18 --width 8": "r3d18 has a width of its own",
    "--clean-epochs 0": "--clean-epochs must be at least 1",
    "--arch conv3d": "--arch conv3d is not for digits",
    "--dataset moving-digits --arch preactresnet8": "is not for moving-digits",
    "--dataset moving-digits --frames 5": "--frames 5: the clips of moving-digits have 8",
    "--substitute digits": "--substitute digits is not for digits",
    "--substitute ucf101": "--substitute ucf101 is not for digits",
    "--substitute kinetics": "does not fit digits: one is of images",
    "--dataset moving-digits --substitute imagenet": "does not fit moving-digits",
    "--dataset moving-digits --substitute digits": "--substitute digits is not for moving-digits: use self or kinetics",
    "--substitute imagenet": "S (resnet18) has 5 groups and T (preactresnet8) has 4",
    "--substitute /nowhere": "--substitute /nowhere is not for digits: use self, imagenet or another set of images",
    "--resume a --eval-only b": "choose",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_work(arguments, capsys, tmp_path):
    status, error = in_process(arguments, capsys, tmp_path, "abnn.py")
    assert status == 2 and error.startswith("error: ") and REFUSED[arguments] in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch, capsys, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    arguments = TINY.replace("--width 4", "--width 2") + " --arch preactresnet18 --substitute imagenet"
    status, error = in_process(arguments, capsys, tmp_path, "abnn.py")
    assert status == 2 and "no network" in error and "resnet18" in error and "\n" not in error


def test_torchvision_s_weights_fit_the_groups(monkeypatch):
    """With made-up weights in the place of the downloaded ones: every tensor of the groups gets its own."""
    for name, arch, model in (("imagenet", "resnet18", "resnet18"), ("kinetics", "r3d18", "r3d_18")):
        from torchvision.models import get_model, get_weight

        source = get_model(model, num_classes={"imagenet": 1000, "kinetics": 400}[name])
        monkeypatch.setattr(type(get_weight(abnn.PRETRAINED[name][1])), "get_state_dict",
                            lambda *args, source=source, **kwargs: source.state_dict())
        assert abnn.PRETRAINED[name][0] == arch
        net = abnn.pretrained(name, 5).eval()
        assert net.fc.out_features == 5
        source.fc, net.fc = nn.Identity(), nn.Identity()
        x = torch.rand(1, 3, *([4] if name == "kinetics" else []), 32, 32)
        torch.testing.assert_close(net(x), source.eval()((x - net.mean) / net.std))
