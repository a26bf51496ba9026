"""The parts of the method against slow, independent versions of themselves, and against their limit cases."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from shortened import few

import afa
from common import data
from common import pgd as pgd_module
from common.pgd import pgd

ARGS = afa.Args(**{**{k: v for k, v in afa.DIGITS.items()}, "width": 4, "bf16": False})


def make(**changes):
    """A small network whose BatchNorms have seen two kinds of data, so that their two ends differ."""
    torch.manual_seed(0)
    net = afa.AFANet(replace(ARGS, **changes), classes=10)
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.rand(16, 3, 32, 32), 0.0)
            net(torch.rand(16, 3, 32, 32) ** 3, 1.0)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-0.5, 0.5)
    return net.eval()


@pytest.fixture
def x():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_narrow_block_has_right_gradients():
    """oneDNN's own 1x1 convolution with a stride crashes here on one processor and gives wrong numbers on another."""
    torch.manual_seed(0)
    block = afa.PreActBlock(4, 8, 2, nn.BatchNorm2d).to(memory_format=torch.channels_last)
    x = torch.randn(128, 16, 16, 4).movedim(-1, 1)
    again = afa.PreActBlock(4, 8, 2, nn.BatchNorm2d).double()  # no oneDNN in double precision
    again.load_state_dict(block.state_dict())
    for net, images in ((block, x), (again, x.double())):
        out = net(images)
        assert out.shape == (128, 8, 8, 8)
        out.square().mean().backward()
    for (name, p), q in zip(block.named_parameters(), again.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_fusion_is_the_weighted_sum_of_both_batchnorms():
    norm = make().bn
    x, w = torch.randn(5, 16, 7, 3) * 3 + 1, torch.rand(5)
    expected = [(1 - w[n]) * norm.clean(x[n : n + 1])[0] + w[n] * norm.adv(x[n : n + 1])[0] for n in range(5)]
    torch.testing.assert_close(norm.fuse(x, w), torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.fuse(x, 0.3), 0.7 * norm.clean(x) + 0.3 * norm.adv(x), rtol=1e-4, atol=1e-5)


def test_fusion_has_the_gradients_of_its_formula():
    norm = make().bn.double()
    x, w = torch.randn(2, 16, 3, 2, dtype=torch.double, requires_grad=True), torch.rand(2, dtype=torch.double)
    assert torch.autograd.gradcheck(norm.fuse, (x, w.requires_grad_()))


def test_both_ends_of_the_fusion_are_the_plain_paths(x):
    net = make()
    for end in (0.0, 1.0):
        fused = net(x, torch.full((len(x), net.layers), end))
        torch.testing.assert_close(fused, net(x, end), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x, 0.0), net(x, 1.0), atol=1e-2)  # or the comparison would show nothing


def test_each_end_trains_its_own_statistics_and_affine_only(x):
    net = make().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(x, 1.0).sum().backward()
    after = net.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(".adv." in k and "running" in k or "num_batches" in k for k in moved)
    assert all(p.grad is None for name, p in net.named_parameters() if ".clean." in name or "gate." in name)
    assert all(p.grad is not None for name, p in net.named_parameters() if ".adv." in name)


def test_fused_weights_are_refused_in_training_mode(x):
    with pytest.raises(AssertionError, match="running statistics"):
        make().train()(x, 0.5)


def test_statistics_are_those_of_the_definition():
    bn = nn.BatchNorm2d(3)
    bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 6) * 2 + 0.7
    s = afa.statistics(x, bn)
    for n in range(4):
        for c in range(3):
            v = x[n, c].flatten()
            scale = (bn.running_var[c] + bn.eps).sqrt()
            torch.testing.assert_close(s[n, 0, c], (v.mean() - bn.running_mean[c]) / scale, rtol=1e-4, atol=1e-5)
            sd = (v.var(correction=0) + bn.eps).sqrt()
            torch.testing.assert_close(s[n, 1, c], (sd / scale).log(), rtol=1e-4, atol=1e-5)


def test_the_gate_starts_at_nine_tenths_for_every_image(x):
    for gate in ("probe", "layer"):
        net, record = make(gate=gate), []
        net(x, record=record)
        assert len(record) == net.layers == 7
        for _, w in record:
            torch.testing.assert_close(w, torch.full((len(x),), 0.9))


def test_the_gate_is_trained_and_reads_every_image_by_itself(x):
    for gate in ("probe", "layer"):
        net = make(gate=gate)
        for m in net.modules():
            if isinstance(m, afa.Gate):
                nn.init.normal_(m.fc2.weight)
        torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=1e-4, atol=1e-4)
        net(x, record=(record := []))
        assert torch.stack([w for _, w in record]).std(1).min() > 0  # weights differ between images
        x_ = x.clone().requires_grad_()
        (through,) = torch.autograd.grad(F.cross_entropy(net(x_), torch.zeros(6, dtype=torch.long)), x_)
        w = torch.stack([w.detach() for _, w in record], 1)
        (past,) = torch.autograd.grad(F.cross_entropy(net(x_, w), torch.zeros(6, dtype=torch.long)), x_)
        assert not torch.allclose(through, past, atol=1e-6)  # the attack sees the gate


def test_single_batchnorm_is_a_plain_network_bit_for_bit(x):
    single = make(bn="single")
    plain = afa.PreActResNet("preactresnet8", 4, 10)
    state = {k: v for k, v in single.state_dict().items() if ".adv." not in k and "gate." not in k}
    plain.load_state_dict({k.replace(".clean.", "."): v for k, v in state.items()})
    plain.eval()
    for w in (None, 0.0, 1.0):
        assert torch.equal(single(x, w), plain(x))
    single.train(), plain.train()
    assert torch.equal(single(x, 1.0), plain(x))


@pytest.mark.parametrize("gate", ["probe", "layer"])
def test_a_gate_that_has_not_learned_is_a_constant_weight(gate, x):
    net = make(gate=gate)
    assert torch.allclose(net(x), net(x, 0.9), atol=1e-5)


def test_stage2_examples_have_every_strength_and_leave_the_network_alone(monkeypatch):
    net, attacked = make(), []

    def counted(model, x, *rest, **settings):
        attacked.append((model, len(x)))
        return pgd(model, x, *rest, **settings)

    monkeypatch.setattr(afa, "pgd", counted)
    net.requires_grad_(False)
    for p in net.gate.parameters():
        p.requires_grad_(True)
    trainable = [p.requires_grad for p in net.parameters()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = 0.25 + 0.5 * torch.rand(64, 3, 32, 32), torch.randint(0, 10, (64,))
    x_adv = afa.stage2_attack(net, x, y, ARGS, torch.Generator().manual_seed(0))
    strength = (x_adv - x).abs().amax((1, 2, 3))
    assert (strength == 0).sum() == 16
    (frozen, share), (whole, others) = attacked  # and those that stay as they are cost nothing
    assert share == round(48 * ARGS.harden) and share + others == 48
    assert whole is net and set(frozen.keywords["w"].unique().tolist()) <= {0.0, 0.5, 1.0}
    assert ((strength > 0.99 * ARGS.eps) & (strength < 1.001 * ARGS.eps)).sum() >= 16
    inside = strength[(strength > 0) & (strength < 0.98 * ARGS.eps)]
    assert len(inside) >= 20 and inside.min() < 0.3 * ARGS.eps and inside.max() > 0.7 * ARGS.eps
    assert [p.requires_grad for p in net.parameters()] == trainable
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_evaluate_counts_and_takes_the_worst_of_each_example():
    d = data.load("digits", train_size=4000, val_size=100, test_size=60)
    x, y = data.to_float(d.test.x), d.test.y
    torch.manual_seed(0)
    net = afa.PreActResNet("preactresnet8", 8, 10)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for x_, y_ in data.batches(d.train, 64, seed=0, epoch=0):
        optimizer.zero_grad()
        F.cross_entropy(net(x_), y_).backward()
        optimizer.step()
    net.eval()
    row = afa.evaluate(net, x, y, 1 / 255, "linf", others=[net])
    clean = net(x).argmax(1) == y
    fgsm = net(pgd(net, x, y, eps=1 / 255, step_size=1 / 255, steps=1, random_start=False)).argmax(1) == y
    assert row["clean"] == pytest.approx(clean.float().mean().item())
    assert row["fgsm"] == pytest.approx((clean & fgsm).float().mean().item())
    assert row["clean"] > 0.5 and row["worst"] <= min(v for k, v in row.items() if k != "worst")
    assert set(row) == {"clean", "fgsm", "pgd20", "pgd50_margin", "targeted", "transfer", "worst"}


def test_measure_reports_a_perfect_and_an_absent_trend(monkeypatch):
    """Spearman's rho in measure() against scipy, by way of the share of channels that it calls monotone."""
    from scipy.stats import spearmanr

    monkeypatch.setattr(pgd_module, *few("survivors", 2))  # of the curves
    net = make()
    x, y = torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))
    result = afa.measure(net, x, y, (x, y), 8 / 255, ARGS)
    assert set(result["curves"]) == {"model", "w=0", "w=0.5", "w=1", "oracle", "constant"}
    assert len(result["strengths"]) == 9 and len(result["weight_mean"][0]) == net.layers
    shares = {}
    for name, model in {"model": net, "w=0": partial(net, w=0.0)}.items():
        means = []
        for eps in result["strengths"]:
            x_adv = pgd(model, x, y, eps=eps, step_size=eps / 4, steps=10, random_start=False)
            model(x_adv, record=(record := []))
            means.append(torch.cat([s.mean(0) for s, _ in record], 1).detach())  # (2, channels)
        stack = torch.stack(means)
        rho = [abs(spearmanr(torch.cat([torch.arange(9.0)[:, None], stack[:, i]], 1)).statistic[0, 1:]) for i in (0, 1)]
        shares[name] = [sum(r >= 0.95 for r in row) / len(row) for row in rho]
        assert list(result["statistics"][name]["monotone_share"].values()) == pytest.approx(shares[name], abs=1e-6)
    for name in ("w=0", "w=0.5", "w=1"):
        assert all(result["curves"]["oracle"][k] >= v for k, v in result["curves"][name].items())


def test_the_control_has_the_mean_of_the_predicted_weights(monkeypatch):
    monkeypatch.setattr(pgd_module, *few("survivors", 2))
    monkeypatch.setattr(afa, *few("survivors", 2))
    net = make()
    torch.nn.init.normal_(net.gate.fc2.weight)  # weights that differ from image to image
    (x, y), known = ((torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(2))
    x_adv = afa.pgd10(net, *known, 8 / 255)
    with torch.no_grad():
        weights = torch.cat([net.predict_weights(known[0]), net.predict_weights(x_adv)])
        constant = weights.mean(0, keepdim=True)
        assert weights.std(0).max() > 0.01
        assert torch.allclose(net(x, constant), net(x, constant.expand(8, -1)), atol=1e-6)
    with mock.patch.object(afa, "evaluate", wraps=afa.evaluate) as evaluate:
        result = afa.measure(net, x, y, known, 8 / 255, ARGS)
    assert torch.allclose(evaluate.call_args.args[0].keywords["w"], constant, atol=1e-6)
    right = (net(x, constant).argmax(1) == y).float().mean().item()
    assert result["constant"]["clean"] == result["curves"]["constant"]["0"] == pytest.approx(right)
    assert {"worst", *afa.ATTACKS} < set(result["constant"]) and "constant" not in result["statistics"]
    without = {k: v for k, v in result["curves"].items() if k not in ("model", "oracle", "constant")}
    assert result["curves"]["oracle"] == {k: max(v[k] for v in without.values()) for k in without["w=0"]}


@pytest.mark.parametrize("arch, parameters", [("preactresnet18", 11_172_170), ("wrn-34-10", 46_160_474)])
def test_networks_are_those_of_the_literature(arch, parameters):
    """By their number of parameters, as public code that trains the same networks has it."""
    with torch.device("meta"):
        net = afa.PreActResNet(arch, None, 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
