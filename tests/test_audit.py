"""benchmark/audit.py must see through fake defences, let honest networks pass, and get its numbers right."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import audit as tool  # noqa: E402
from benchmark.audit import CHECKS, audit  # noqa: E402
from common import data  # noqa: E402
from common.pgd import pgd, survivors  # noqa: E402

EPS = 8 / 255


def train(split, eps, epochs, seed=0, width=16):
    """A three-layer network; with eps > 0 trained adversarially (PGD-2, eps rising over the first half)."""
    torch.manual_seed(seed)
    layers, channels = [], 3
    for out in (width, 2 * width, 2 * width):
        layers += [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    total = epochs * data.steps_per_epoch(len(split.y), 100)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
    for epoch in range(epochs):
        for i, (x, y) in enumerate(data.batches(split, 100, seed=seed, epoch=epoch)):
            if eps:
                now = eps * min(1, 2 * (epoch * total / epochs + i) / total)
                x = pgd(net.eval(), x, y, eps=now, step_size=now / 1.6, steps=2)
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x), y).backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return net.eval()


@pytest.fixture(autouse=True)
def quicker(monkeypatch):
    for name, value in dict(curve_n=20, margin_steps=20, restarts=1, noise=10).items():  # many audits run here
        monkeypatch.setitem(tool.QUICK, name, value)


@pytest.fixture(scope="module")
def digits():
    d = data.load("digits", train_size=4000)
    return SimpleNamespace(x=data.to_float(d.test.x[:50]), y=d.test.y[:50], split=d.train,
                           train=(data.to_float(d.train.x[:1000]), d.train.y[:1000]))  # fmt: skip


@pytest.fixture(scope="module")
def undefended(digits):
    return train(digits.split, 0, 4)


@pytest.fixture(scope="module")
def surrogate(digits):
    return train(digits.split, 0, 3, seed=1)


@pytest.fixture(scope="module")
def robust(digits):
    return train(digits.split, 6 / 255, 8)


# --- Fake defences: a wrapper of a network, and the checks that must warn


class Wrapper(nn.Module):
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after
        self.eval()  # a module is born in training mode

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def quantise(x):
    return (x * 7).round() / 7


def straight_through(x):
    return x + (quantise(x) - x).detach()


class LyingGradient(torch.autograd.Function):
    """The identity, with a gradient reversed on clean images (multiples of 1/255), or all others."""

    @staticmethod
    def forward(ctx, x, on_clean):
        clean = ((255 * x - (255 * x).round()).abs() < 1e-3).flatten(1).all(1)
        ctx.save_for_backward(clean == on_clean)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0][:, None, None, None], -grad, grad), None


class RandomGradient(torch.autograd.Function):
    """The identity, with noise for a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.randn_like(grad)


def shatter(x):
    """A fine ripple: the gradient points to its next crest, and steps land anywhere on the others."""
    return x + 0.01 * torch.sin(2 * torch.pi * 255 / 4 * x)


def mask_a_class(z):
    """An eleventh class that is never predicted."""
    return F.pad(z, (0, 1), value=-1e9)


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


FAKES = {
    "saturated": (lambda net: Wrapper(net, after=lambda z: 1e4 * z),
                  {"logits in range", "gradients are there", "losses agree", "falls with eps"}),
    "quantised": (lambda net: Wrapper(net, quantise), {"gradients are there", "black box is weaker"}),
    "quantised, straight-through": (lambda net: Wrapper(net, straight_through), {"gradients are true"}),
    "shattered": (lambda net: Wrapper(net, shatter), {"attack converged"}),
    "noise": (lambda net: Wrapper(net, noisy), {"deterministic"}),
    "noise, a class masked": (lambda net: Wrapper(net, noisy, mask_a_class), {"deterministic"}),
    "noise, all logits shifted": (lambda net: Wrapper(net, noisy, lambda z: z + 1e5), {"deterministic"}),
    "gradient blocked": (lambda net: Wrapper(net, torch.detach),
                         {"gradients are there", "black box is weaker"}),
    "probabilities": (lambda net: Wrapper(net, after=lambda z: z.softmax(1)), {"outputs are logits"}),
    "batch mean": (lambda net: Wrapper(net, after=lambda z: z - z.mean(0)), {"images independent"}),
    "batch mean, a class masked": (lambda net: Wrapper(net, after=lambda z: mask_a_class(z - z.mean(0))),
                                   {"images independent"}),
    "training mode": (lambda net: Wrapper(net).train(), {"images independent"}),
    "constant": (lambda net: Wrapper(net, after=lambda z: z + 1e3 * (torch.arange(10) == 3)),
                 {"not one class"}),
    "misleads one step": (lambda net: Wrapper(net, lambda x: LyingGradient.apply(x, True)),
                          {"no catastrophic overfitting", "gradients are true"}),
    "misleads iteration": (lambda net: Wrapper(net, lambda x: LyingGradient.apply(x, False)),
                           {"iteration helps"}),
}  # fmt: skip


FLAT = {"quantised", "saturated"}  # their gradient is 0, and so is the first direction of the surface


@pytest.mark.parametrize("name", FAKES)
def test_fake_defence_is_exposed(name, digits, undefended, surrogate):
    wrap, expected = FAKES[name]
    fake = wrap(undefended)
    before = {k: v.clone() for k, v in fake.state_dict().items()}
    lines = []
    result = audit(fake, digits.x, digits.y, EPS, quick=True, train=digits.train, surrogate=surrogate,
                   use_autoattack=False, log=lines.append)  # fmt: skip
    assert fake.training == undefended.training == (name == "training mode")
    undefended.eval()
    assert expected <= set(result["warnings"]), result["warnings"]
    assert lines[-1].startswith("\nverdict: DO NOT TRUST robust accuracy ")
    assert all(torch.equal(v, before[k]) for k, v in fake.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in fake.parameters())
    json.dumps(result, allow_nan=False)
    if name in FLAT:
        assert all(row == plane[0] for plane in result["surface"]["loss"] for row in plane[1:])
    elif name == "gradient blocked":
        assert result["surface"] is result["steps_curve"] is None


def test_every_check_has_a_fake_that_trips_it():
    assert set().union(*(expected for _, expected in FAKES.values())) == set(CHECKS)


def detour(plane):
    """How far the loss travels along the gradient's sign, for each bit that it gets ahead: 1 where it only rises."""
    path = plane[:, plane.shape[1] // 2]
    return path.diff().abs().sum() / (path.max() - path.min())


@pytest.mark.parametrize("x, eps, message", [
    (torch.rand(4, 1, 8, 8) * 2 - 1, EPS, "the normalisation into the network"),
    (torch.rand(4, 1, 8, 8), 8, "did you mean 8/255"),
])
def test_what_would_look_like_robustness_is_refused(x, eps, message):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        audit(net, x, y, eps, quick=True)
    with pytest.raises(ValueError, match="must be an nn.Module"):
        audit(lambda x: net(x), x, y, EPS, quick=True)


def test_grey_images_with_a_surrogate(monkeypatch):
    monkeypatch.setitem(tool.QUICK, "surrogate_steps", 3)
    x, y = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval()
    result = audit(net, x, y, EPS, quick=True, train=(x, y), use_autoattack=False, log=lambda line: None)
    assert "transfer" in result["attacks"]


def test_thresholds_bind_where_little_is_left():
    """Of 22 % on 200 images four points and chance would be a third: a check that lets that pass checks nothing."""
    assert tool.allowed_drift(0.8, 200) == pytest.approx(0.04 + 2 * (0.04 * 0.96 / 200) ** 0.5)
    assert tool.allowed_drift(0.22, 200) == pytest.approx(0.022 + 2 * (0.022 * 0.978 / 200) ** 0.5)
    assert 0 < tool.allowed_drift(0.0, 200) < 0.025
    assert tool.overfits(clean=0.47, fgsm=0.28, pgd20=0.1) and tool.overfits(0.9, 0.8, 0.5)
    assert not tool.overfits(clean=0.47, fgsm=0.28, pgd20=0.22)
    assert not tool.overfits(clean=0.96, fgsm=0.13, pgd20=0.0)  # undefended


def test_shattered_gradients_show_in_the_surface_and_over_the_steps(digits, undefended):
    fake = FAKES["shattered"][0](undefended)
    x, y = digits.x[:40], digits.y[:40]
    clean = survivors(undefended, x, y, eps=0, steps=0) & survivors(fake, x, y, eps=0, steps=0)
    planes, late = {}, {}
    for name, net in (("honest", undefended), ("fake", fake)):
        gradient = tool.input_gradient(net, x[:4], y[:4], "ce", 40)
        planes[name] = tool.loss_surface(net, x[:4], y[:4], gradient, EPS, "linf", 40)
        masks = tool.steps_curve(net, x, y, clean, (5, 50), loss="ce", batch_size=40, eps=EPS, step_size=EPS / 4)
        late[name] = (masks[5] & ~masks[50]).sum().item()
    honest, broken = (torch.stack([detour(p) for p in planes[name]]) for name in ("honest", "fake"))
    assert (honest < 1.2).all() and (broken > 1.5).all()
    assert late["fake"] >= late["honest"] + 4  # the one that falls only in the end


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_surface_on_a_linear_network(norm):
    """Its loss is that of the logits plus what both directions add to them, where the box does not cut them off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    x, y, eps = 0.3 + 0.4 * torch.rand(2, 3, 4, 4), torch.tensor([0, 2]), 0.1
    x[0, 0, 0, 0] = 1  # one step out of the box
    gradient = tool.input_gradient(net, x, y, "ce", 8)
    result = tool.loss_surface(net, x, y, gradient, eps, norm, 7, points=5)
    assert result.shape == (2, 5, 5)
    length = 1 if norm == "linf" else 48**-0.5
    at = [eps * length * v for v in (-1, -0.5, 0, 0.5, 1)]
    g = gradient.sign()
    for i in range(2):
        for a in range(5):
            image = (x[i] + at[a] * g[i]).clamp(0, 1)[None]
            assert result[i, a, 2].item() == pytest.approx(F.cross_entropy(net(image), y[i : i + 1]).item(), rel=1e-5)
        across = result[i, 2, [0, 4]] - result[i, 2, 2]
        assert 0 < across.abs().max() < result[i, 4, 2] - result[i, 2, 2]
    assert torch.equal(result, tool.loss_surface(net, x, y, gradient, eps, norm, 7, points=5))


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_steps_curve_is_separate_attacks_in_one_run(loss, digits, undefended):
    x, y, steps = digits.x[:50], digits.y[:50], (1, 2, 5, 12)
    attacked = survivors(undefended, x, y, eps=0, steps=0)
    attacked[::7] = False
    settings = dict(eps=EPS / 2, step_size=EPS / 8)
    masks = tool.steps_curve(undefended, x, y, attacked, steps, loss=loss, batch_size=20, **settings)
    assert list(masks) == list(steps)
    for k in steps:  # keep_best: an image that any iterate fooled has fallen
        alone = survivors(undefended, x, y, attacked, steps=k, loss=loss, random_start=False, keep_best=True,
                          **settings)  # fmt: skip
        assert torch.equal(masks[k], alone)
    counts = [masks[k].sum().item() for k in steps]
    assert attacked.sum().item() > counts[0] > counts[-1] and counts == sorted(counts, reverse=True)
    assert not (masks[12] & ~attacked).any()


# --- Honest networks


def test_honest_network_passes_with_autoattack(digits, robust, surrogate):
    lines = []
    result = audit(robust, digits.x, digits.y, EPS / 2, quick=True, train=digits.train, surrogate=surrogate,
                   log=lines.append)  # fmt: skip
    assert result["warnings"] == []
    assert 0.25 < result["worst"] <= min(a["accuracy"] for a in result["attacks"].values())
    assert result["clean"] > 0.7
    assert {"fgsm", "transfer", "apgd-ce", "+ apgd-t", "square, 500 queries"} <= set(result["attacks"])
    assert result["autoattack"] is None and any("only parts of AutoAttack" in line for line in lines)  # quick
    assert lines[-1].endswith(f"on 50 images stands: {len(CHECKS)} checks passed, quick mode")
    json.dumps(result, allow_nan=False)


def test_undefended_network_masks_nothing_and_has_no_robustness(digits, undefended, surrogate):
    result = audit(undefended, digits.x, digits.y, EPS, quick=True, train=digits.train, surrogate=surrogate,
                   use_autoattack=False, log=lambda line: None)  # fmt: skip
    assert result["warnings"] == []
    assert result["clean"] > 0.8 and result["worst"] < 0.1
    curve, few = result["steps_curve"], result["steps_curve"]["evaluated"]
    assert few == min(50, tool.QUICK["curve_n"]) and list(curve["accuracy"]) == ["ce", "margin"]
    for points in curve["accuracy"].values():
        assert tuple(points) == tool.QUICK["curve_steps"]
        values = list(points.values())
        assert values == sorted(values, reverse=True) and values[0] > 0.4 > values[-1]
    row = result["attacks"][f"100 steps ce, first {few}"]
    assert row["accuracy"] == curve["accuracy"]["ce"][100] and 0 < row["attacked"] <= few
    surface = result["surface"]
    assert torch.tensor(surface["loss"]).shape == (4, 21, 21) and len(surface["images"]) == 4
    assert {"+ pgd-50 ce, step eps/10", "+ pgd-50 ce, step eps", "+ targeted, 3 classes"} <= set(result["attacks"])


@pytest.mark.parametrize("after", [mask_a_class, lambda z: F.pad(z, (0, 20), value=-torch.inf), lambda z: z + 1e4])
def test_large_logits_alone_make_no_network_random(after, digits, undefended):
    result = audit(Wrapper(undefended, after=after), digits.x, digits.y, EPS, quick=True, use_autoattack=False,
                   log=lambda line: None)  # fmt: skip
    assert not {"deterministic", "images independent"} & set(result["warnings"])


def test_another_network_is_a_black_box_and_one_path_through_the_weights_is_not(digits, undefended, surrogate):
    """Behind a random gradient, white-box attacks fail: what another network's examples break must show."""
    fake = Wrapper(undefended, RandomGradient.apply)
    result = audit(fake, digits.x, digits.y, EPS, quick=True, use_autoattack=False, log=lambda line: None,
                   others=[fake, surrogate])  # fmt: skip
    black = {name: row["black_box"] for name, row in result["attacks"].items()}
    assert not black["same weights 0, ce"] and black["other network 1, ce"] and black["other network 1, margin"]
    assert "black box is weaker" in result["warnings"]


def test_images_of_one_class_and_few_classes_are_said():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval()
    x, y = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    result = audit(net, x, y, EPS, quick=True, use_autoattack=False, log=lambda line: None)
    assert "not one class" in result["warnings"]
    assert any("100% of these images are of one class" in note for note in result["notes"])
    with pytest.raises(ValueError, match="images must be float32"):
        audit(net.double(), x.double(), y, EPS, quick=True)


def test_autoattack_of_three_classes_is_not_the_standard_version(monkeypatch):
    small = dict(noise=1, margin_steps=1, restarts=1, targets=2, apgd_steps=2, queries=2, curve_steps=(1, 2, 5, 10))
    for name, value in small.items():
        monkeypatch.setitem(tool.FULL, name, value)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval()
    x = torch.rand(4, 3, 16, 16)
    result = audit(net, x, net(x).argmax(1), 1e-4, log=lambda line: None)
    assert result["autoattack"] is None and any("takes four classes, and there are 3" in n for n in result["notes"])


def test_models_of_the_same_weights_are_attacked_too(digits, undefended):
    """A network behind a false gradient: who crafts on the path through its weights breaks it."""
    fake = Wrapper(undefended, lambda x: LyingGradient.apply(x, False))
    result = audit(fake, digits.x, digits.y, EPS, quick=True, use_autoattack=False, log=lambda line: None,
                   others={"path": [undefended]})  # fmt: skip
    accuracy = {name: row["accuracy"] for name, row in result["attacks"].items()}
    assert accuracy["path 0, margin"] < 0.15 < accuracy["pgd-20 ce"] - 0.15
    assert "transfer" not in result["attacks"]  # neither a surrogate nor data to train one
    assert any("nothing was transferred from another network" in note for note in result["notes"])


def test_missing_pyautoattack_is_one_line_and_the_rest_runs(digits, undefended, surrogate, monkeypatch):
    for name in ("", ".autopgd_base", ".fab_pt", ".square"):
        monkeypatch.setitem(sys.modules, f"pyautoattack{name}", None)
    lines = []
    x, y = digits.x[:20], digits.y[:20]
    result = audit(undefended, x, y, EPS, quick=True, surrogate=surrogate, log=lines.append)
    assert sum("pip install pyautoattack" in line for line in "\n".join(lines).split("\n")) == 1
    assert set(result["checks"]) == set(CHECKS) and result["autoattack"] is None
    assert not any("apgd" in name or "square" in name for name in result["attacks"])
    assert "no training images: overfitting was looked for on these images" in result["notes"]


def test_autoattack_is_the_published_one():
    """The attacks are set up by hand: in every setting as the library's own standard version sets them up."""
    from pyautoattack import AutoAttack

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).eval()
    theirs = AutoAttack(net, norm="Linf", eps=EPS, seed=0, version="standard")
    ours = tool.autoattack(net, 10, EPS, "linf", tool.FULL, 0, "cpu")
    names = {"apgd-ce": "apgd", "apgd-t": "apgd_targeted", "fab-t": "fab", "square": "square"}
    assert list(ours) == theirs.attacks_to_run == list(names)
    theirs.fab.targeted = True  # as the front end does when it runs FAB-T
    for name, attribute in names.items():
        expected = {k: v for k, v in vars(getattr(theirs, attribute)).items() if k != "logger"}
        assert {k: v for k, v in vars(ours[name]).items() if k != "logger"} == expected
    four = tool.autoattack(net, 4, EPS, "linf", tool.FULL, 0, "cpu")
    assert four["apgd-t"].n_target_classes == four["fab-t"].n_target_classes == 3
    # The targeted DLR loss takes four logits.
    assert "apgd-t" not in tool.autoattack(net, 3, EPS, "linf", tool.FULL, 0, "cpu")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_numbers_on_a_linear_network(norm):
    """The margin to class j falls by eps times the dual norm of w_y - w_j, away from the box."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)).eval()
    with torch.no_grad():
        net[1].weight.normal_(generator=g)
        net[1].weight.sub_(net[1].weight.mean(1, keepdim=True))  # or one class would win for all grey images
        net[1].bias.zero_()
    x = 0.4 + 0.2 * torch.rand(150, 3, 8, 8, generator=g)
    y = net(x).argmax(1)
    y[:10] = (y[:10] + 1) % 3  # ten mistakes
    z, w = net(x).detach(), net[1].weight.detach()
    eps = {"linf": 0.003, "l2": 0.03}[norm]
    reach = eps * (w[y][:, None] - w).norm(p=1 if norm == "linf" else 2, dim=2)
    beaten = z.gather(1, y[:, None]) - z <= reach
    expected = (~beaten.scatter(1, y[:, None], False)).all(1)
    result = audit(net, x, y, eps, norm, quick=True, use_autoattack=norm == "linf", log=lambda line: None)
    assert 0.2 < expected.double().mean() < 0.8
    assert result["worst"] == pytest.approx(expected.double().mean().item(), abs=1e-6)
    assert result["clean"] == pytest.approx(140 / 150, abs=1e-6)
    assert result["checks"]["gradients are true"]["status"] == "PASS"


# --- Command line

SCRIPT = """
import torch
from types import SimpleNamespace
from afa import evaluate
def load(run, device):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 10))
    return net.to(device).eval(), SimpleNamespace(
        dataset="digits", data_dir="data", data_on="auto", train_size=500, val_size=9, test_size=50,
        eps=2 / 255, norm="linf", eval_only=None), {"classes": 10, "epoch": 3}
def transfer_models(net, args):
    return [net]
"""


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    (tmp_path / "scriptofatest.py").write_text(SCRIPT)
    monkeypatch.setitem(tool.QUICK, "surrogate_steps", 10)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark/audit.py", *map(str, words)])
        tool.main()

    yield call
    sys.modules.pop("scriptofatest", None)


def test_command_line_writes_audit_json(command_line, tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"script": "scriptofatest"}')
    command_line(tmp_path, "--quick", "--n", 30, "--eps", "1/255", "--no-autoattack", "--device", "cpu")
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["script"] == "scriptofatest" and result["evaluated"] == 30
    assert result["eps"] == pytest.approx(1 / 255) and result["epoch"] == 3
    assert "same weights 0, ce" in result["attacks"] and "transfer" in result["attacks"]
    output = capsys.readouterr().out
    assert f"the script's own attacks leave {result['script_worst']:.3f}" in output
    assert result["worst"] <= result["script_worst"] + 0.1 and output.rstrip().endswith(result["verdict"])
    assert not list(tmp_path.glob("*.tmp"))
    kept = (tmp_path / "audit.json").read_text()  # at another eps than the run's: the next one takes its place
    command_line(tmp_path, "--quick", "--n", 20, "--no-autoattack", "--device", "cpu")
    assert (own := (tmp_path / "audit.json").read_text()) != kept and not (tmp_path / "audit_other.json").exists()
    for words in (["--n", 10], ["--n", 20, "--eps", "1/255"]):  # weaker, and of something else
        command_line(tmp_path, "--quick", "--no-autoattack", "--device", "cpu", *words)
        assert json.loads((tmp_path / "audit_other.json").read_text())["evaluated"] == words[1]
        assert "this one goes to audit_other.json" in capsys.readouterr().out
    assert (tmp_path / "audit.json").read_text() == own
    torch.save({"script": "scriptofatest"}, tmp_path / "last.pt")
    command_line(tmp_path / "last.pt", "--quick", "--n", 10, "--no-autoattack")
    assert json.loads((tmp_path / "audit_last.json").read_text())["eps"] == pytest.approx(2 / 255)
    command_line(tmp_path / "last.pt", "--quick", "--n", 4, "--eps", "40/255", "--no-autoattack")  # 8 eps is over 1


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "there is no nowhere: name a run's folder or a .pt file"),
    (["{tmp}"], "there is no {tmp}/args.json: name a run's folder or a .pt file"),
    (["{tmp}/broken.pt"], "broken.pt cannot be read ("),
    (["{tmp}/other.pt"], "other.pt is from nothere.py, which is not in"),
    (["{tmp}/good.pt", "--eps", "8"], "--eps 8 is outside (0, 1], the range of a pixel: did you mean 8/255?"),
    (["{tmp}/good.pt", "--eps", "300/255"], "--eps 300/255 is outside (0, 1]"),
    (["{tmp}/good.pt", "--eps=-1/255"], "--eps -1/255 is outside (0, 1], the range of a pixel"),
    (["{tmp}/good.pt", "--eps", "1/0"], "--eps 1/0 is not a number such as 8/255"),
    (["{tmp}/good.pt", "--eps", "8/255/2"], "--eps 8/255/2 is not a number such as 8/255"),
    (["{tmp}/good.pt", "--norm", "l2"], "--norm l2 is not the run's own, and needs an --eps"),
    (["{tmp}/good.pt", "--n", "0"], "--batch-size and --n must be at least 1"),
    (["{tmp}/good.pt", "--seed", "4294967296"], "--seed must be from 0 to 2^32 - 1, not 4294967296"),
    (["{tmp}/dot.pt"], "dot.pt is from afa.v2.py, which is not in"),
    (["{tmp}/good.pt", "--device", "abacus"], "--device abacus cannot be used: "),
])  # fmt: skip
def test_mistakes_are_one_line(words, message, command_line, tmp_path, capsys):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    torch.save({"script": "nothere"}, tmp_path / "other.pt")
    torch.save({"script": "afa.v2"}, tmp_path / "dot.pt")
    torch.save({"script": "scriptofatest"}, tmp_path / "good.pt")
    with pytest.raises(SystemExit) as stop:
        command_line(*(word.format(tmp=tmp_path) for word in words))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error and "Traceback" not in error
    assert error.count("\n") == 1
