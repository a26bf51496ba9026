"""aalp.py: the method against slow, independent versions of itself and its limit cases, then whole runs."""

import json
import math
import signal
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from running import epochs_done, finished_in_process, in_process, same, start, tag_mismatches, wait_for, weights

import aalp
from common import data
from common.pgd import pgd

SCRIPT = "aalp.py"
ARGS = aalp.Args(**aalp.DIGITS | aalp.METHODS["aalp"] | {"width": 4})
TINY = ("--train-size 300 --val-size 50 --test-size 20 --width 4 --epochs 2 --attack-steps 1 --eps-warmup-epochs 1 "
        "--batch-size 50 ")


def make():
    """A small network whose BatchNorms have seen data, so that eval mode differs from initialisation."""
    torch.manual_seed(0)
    net = aalp.build(ARGS, 10).train()
    with torch.no_grad():
        for _ in range(10):
            net(torch.rand(16, 3, 32, 32) ** 2)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-0.5, 0.5)
        net.fc.weight.mul_(3)
    return net.eval()


def logits(n=40, classes=7, scale=2.0):
    """Clean and adversarial logits and labels, among them confident samples and some that the attack repaired."""
    torch.manual_seed(3)
    z, y = scale * torch.randn(n, classes), torch.randint(0, classes, (n,))
    return z, z + torch.randn(n, classes), y


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(5, 3, 32, 32, generator=g)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1)
    return x, x_adv, torch.tensor([3, 1, 4, 1, 5])


# --- Contributions


def test_contributions_sum_to_the_logit_without_its_bias(images):
    net, (x, _, y) = make(), images
    with torch.no_grad():
        z, f = net(x, return_features=True)
        c = aalp.contributions(f, net.fc.weight, y)
    expected = [[net.fc.weight[y[i], k].item() * f[i, k].item() for k in range(f.shape[1])] for i in range(len(x))]
    torch.testing.assert_close(c, torch.tensor(expected))
    torch.testing.assert_close(c.sum(1), z[range(5), y] - net.fc.bias[y], rtol=1e-4, atol=1e-5)


def test_contributions_are_gradient_times_activation(images):
    net, (x, _, y) = make(), images
    f = net.features(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(net.fc(f)[range(5), y].sum(), f)
    torch.testing.assert_close(aalp.contributions(f, net.fc.weight, y), grad * f)


# --- Guided dropout


def dropout(c, seed=0, **changes):
    return aalp.guided_dropout(c, replace(ARGS, **changes), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("direction", ["low", "high"])
def test_dropout_selects_exactly_the_lowest_or_highest_and_nothing_else(direction, ratio):
    c = torch.randn(6, 31, generator=torch.Generator().manual_seed(2))
    mask = dropout(c, guided_dropout=direction, dropout_ratio=ratio, dropout_prob=1.0)
    for row, factors in zip(c.tolist(), mask.tolist()):
        order = sorted(range(31), key=lambda k: row[k] if direction == "low" else -row[k])
        selected = set(order[: round(31 * ratio)])
        assert factors == [0.0 if k in selected else 1.0 for k in range(31)]


@pytest.mark.parametrize("p", [0.2, 0.5, 0.75])
def test_dropout_zeroes_with_probability_p_and_scales_the_survivors(p):
    c = torch.randn(400, 40, generator=torch.Generator().manual_seed(2))
    mask = dropout(c, dropout_ratio=0.3, dropout_prob=p)
    selected = torch.zeros_like(c, dtype=torch.bool).scatter(1, c.argsort(1)[:, :12], True)
    assert (mask[~selected] == 1).all()
    zero = mask[selected] == 0
    torch.testing.assert_close(mask[selected][~zero], torch.full((int((~zero).sum()),), 1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / selected.sum().item())
    assert abs(zero.float().mean().item() - p) < 4 * deviation
    per_feature = torch.stack([(mask == 0)[:, k][selected[:, k]].float().mean() for k in range(40)])
    assert (per_feature - p).abs().max() < 0.3  # each feature has its own coin, and each sample too
    assert len(mask[:, c.argsort(1)[0, 0]].unique()) > 1


def test_dropout_is_the_identity_at_p_0_and_finite_at_p_1():
    c = torch.randn(50, 16)
    assert torch.equal(dropout(c, dropout_prob=0.0), torch.ones_like(c))
    gone = dropout(c, dropout_prob=1.0)
    assert gone.unique().tolist() == [0, 1] and ((gone == 0).sum(1) == 8).all()
    assert (dropout(c, dropout_prob=1.0, dropout_ratio=1.0) == 0).all()


def test_random_dropout_differs_by_sample_and_ignores_the_contributions():
    c = torch.arange(64.0).repeat(200, 1)
    mask = dropout(c, guided_dropout="random", dropout_prob=1.0)
    assert ((mask == 0).sum(1) == 32).all() and len(mask.unique(dim=0)) == 200
    share = (mask == 0).float().mean(0)
    assert 0.3 < share.min() and share.max() < 0.7
    assert torch.equal(mask, dropout(-c, guided_dropout="random", dropout_prob=1.0))
    assert not torch.equal(mask, dropout(c, seed=1, guided_dropout="random", dropout_prob=1.0))


# --- Loss and weights


def slow_loss(z, z_adv, y, w, pairing_weight):
    total = 0
    for i in range(len(y)):
        ce, ce_adv = (torch.logsumexp(v[i], 0) - v[i, y[i]] for v in (z, z_adv))
        squares = sum((z[i, k] - z_adv[i, k]) ** 2 for k in range(z.shape[1]))
        total = total + ce / 2 + ce_adv / 2 + pairing_weight * w[i] * squares / z.shape[1]
    return total / len(y)


def test_the_loss_and_its_gradient_are_those_of_the_formula():
    z, z_adv, y = (v.double() if v.is_floating_point() else v for v in logits())
    args, w = replace(ARGS, pairing_weight=0.7), torch.rand(len(y), dtype=torch.double)
    z.requires_grad_(), z_adv.requires_grad_()
    loss, terms = aalp.aalp_loss(z, z_adv, y, w, args)
    expected = slow_loss(z, z_adv, y, w.tolist(), 0.7)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (z, z_adv)), torch.autograd.grad(expected, (z, z_adv))):
        torch.testing.assert_close(a, b)  # into both branches
    assert set(terms) == {"clean_ce", "robust_ce", "pairing"}
    torch.testing.assert_close(terms["pairing"], (z - z_adv).pow(2).sum(1).mean() / 7)  # without w and lambda
    torch.testing.assert_close(terms["clean_ce"], slow_loss(z, z, y, [0] * len(y), 0))
    torch.testing.assert_close(terms["robust_ce"], slow_loss(z_adv, z_adv, y, [0] * len(y), 0))


def test_without_pairing_weight_the_loss_is_mixed_adversarial_training():
    z, z_adv, y = logits()
    loss, _ = aalp.aalp_loss(z, z_adv, y, torch.ones(len(y)), replace(ARGS, pairing_weight=0.0))
    assert torch.equal(loss, 0.5 * F.cross_entropy(z, y) + 0.5 * F.cross_entropy(z_adv, y))


def test_an_image_paired_with_itself_has_no_pairing_in_one_training_batch(images):
    x, _, y = images
    net = make().train()
    z, z_adv = net(torch.cat([x, x])).chunk(2)
    assert aalp.aalp_loss(z, z_adv, y, torch.ones(5), ARGS)[1]["pairing"] < 1e-10
    z, z_adv = net(torch.cat([x, images[1]])).chunk(2)
    assert aalp.aalp_loss(z, z_adv, y, torch.ones(5), ARGS)[1]["pairing"] > 1e-3


@pytest.mark.parametrize("kind", ["clean", "adv", "min", "none"])
def test_sample_weights_are_probabilities_of_the_class(kind):
    z, z_adv, y = logits()
    w = aalp.sample_weights(z.requires_grad_(), z_adv.requires_grad_(), y, replace(ARGS, sample_weight=kind))
    assert w.shape == (40,) and not w.requires_grad
    for i, c in enumerate(y.tolist()):
        clean, adv = (math.exp(v[c]) / sum(math.exp(u) for u in v) for v in (z[i].tolist(), z_adv[i].tolist()))
        expected = {"clean": clean, "adv": adv, "min": min(clean, adv), "none": 1.0}[kind]
        assert w[i].item() == pytest.approx(expected, rel=1e-4)


def terms_at_the_clean_logits(z, z_adv, y, pairing_weight):
    """Gradients of both terms of one sample's loss with respect to its clean logits, by autograd."""
    z = z.clone().requires_grad_()
    ce = 0.5 * (torch.logsumexp(z, 0) - z[y])
    lp = pairing_weight * (z - z_adv).square().sum() / len(z)
    return torch.autograd.grad(ce, z)[0], torch.autograd.grad(lp, z)[0]


def test_logit_gradients_are_those_of_autograd():
    z, z_adv, y = logits()
    fast = aalp.logit_gradients(z, z_adv, y, 0.7)
    slow = [terms_at_the_clean_logits(z[i], z_adv[i], y[i], 0.7) for i in range(len(y))]
    for f, s in zip(fast, zip(*slow)):
        torch.testing.assert_close(f, torch.stack(s))
    of_each = torch.rand(len(y), 1)
    fast = aalp.logit_gradients(z, z_adv, y, of_each)[1]
    slow = [terms_at_the_clean_logits(z[i], z_adv[i], y[i], of_each[i, 0])[1] for i in range(len(y))]
    torch.testing.assert_close(fast, torch.stack(slow))


def test_conflict_weight_is_the_largest_that_is_not_overemphasised():
    z, z_adv, y = logits(n=150)
    args = replace(ARGS, sample_weight="conflict", pairing_weight=2.0)
    w = aalp.sample_weights(z.requires_grad_(), z_adv, y, args)
    assert not w.requires_grad
    kinds = set()
    for i in range(len(y)):
        g_ce, g_lp = terms_at_the_clean_logits(z[i].detach(), z_adv[i], y[i], 2.0)
        grid = torch.linspace(0, 1, 2001)
        allowed = grid[(g_ce @ g_ce) + grid * (g_ce @ g_lp) >= 0]
        assert w[i].item() == pytest.approx(allowed.max().item(), abs=1e-3)
        kinds.add("whole" if w[i] == 1 else "less")
    assert kinds == {"whole", "less"}  # or half of it would be untested
    sure = torch.tensor([[200.0, 0.0, 0.0]])  # cross-entropy has no gradient here: nothing to work against
    assert aalp.sample_weights(sure, -sure, torch.tensor([0]), args).item() == 1


def test_with_the_conflict_weight_nothing_counts_as_overemphasised():
    """The weight puts samples on the edge, where rounding decides on which side a scalar product falls."""
    for scale in (1, 4):
        z, z_adv, y = logits(n=2000, scale=scale)
        w = aalp.sample_weights(z, z_adv, y, replace(ARGS, sample_weight="conflict", pairing_weight=2.0))
        g_ce, g_lp = aalp.logit_gradients(z, z_adv, y, 2.0 * w[:, None])
        assert (w < 1).float().mean() > 0.1
        assert not aalp.conflicts((g_ce * g_lp).sum(1), g_ce.square().sum(1))["overemphasised"].any()


def test_conflicts_are_signs_of_scalar_products():
    z, z_adv, y = logits(n=200)
    gradients = [terms_at_the_clean_logits(z[i], z_adv[i], y[i], 3.0) for i in range(len(y))]
    g_ce, g_lp = aalp.logit_gradients(z, z_adv, y, 3.0)
    found = aalp.conflicts((g_ce * g_lp).sum(1), g_ce.square().sum(1))
    assert found["conflicting"].tolist() == [bool(a @ b < 0) for a, b in gradients]
    assert found["overemphasised"].tolist() == [bool(a @ (a + b) < 0) for a, b in gradients]
    assert 0 < found["overemphasised"].sum() < found["conflicting"].sum() < 200


# --- The two observations


def slow_concentration(c):
    result = {"n50": [], "n90": []}
    for row in c.double().tolist():
        positive = sorted((v for v in row if v > 0), reverse=True)
        result["n50"].append(sum(v > 0.5 * positive[0] for v in positive) if positive else 0)
        result["n90"].append(next((n for n in range(len(positive) + 1) if sum(positive[:n]) >= 0.9 * sum(positive)), 0))
    return result


def test_concentration_counts_the_features_that_matter():
    c = torch.randn(50, 33, generator=torch.Generator().manual_seed(5))
    fast = aalp.concentration(c)
    assert {k: v.tolist() for k, v in fast.items()} == slow_concentration(c)
    by_hand = torch.tensor([[8.0, 1.0, 1.0, -9.0], [-1, -2, -3, -4], [0, 0, 0, 7], [2, 2, 2, 2]])
    fast = aalp.concentration(by_hand)
    assert fast["n50"].tolist() == [1, 0, 1, 4] and fast["n90"].tolist() == [2, 0, 1, 4]


@pytest.mark.parametrize("kind", ["clean", "conflict", "none"])
def test_observations_are_those_of_slow_versions(kind, images, monkeypatch):
    net, (x, x_adv, y), lam = make(), images, 2048.0  # so large that w decides what is over-emphasised
    args = replace(ARGS, sample_weight=kind, pairing_weight=lam)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    monkeypatch.setattr(aalp, "pgd10", lambda *_, **__: x_adv)
    seen = aalp.observe(net, x, y, 8 / 255, args)
    assert same(before, net.state_dict()) and all(p.grad is None for p in net.parameters())

    expected, levels = {}, {"logits": [], "parameters": []}
    for name, batch in (("clean", x), ("adv", x_adv)):
        features, places = [], []
        for i in range(len(x)):
            with torch.no_grad():
                maps, z = net.maps(batch[i : i + 1])[0], net(batch[i : i + 1])[0]
            c = net.fc.weight[y[i]].detach()[:, None, None] * maps / (maps.shape[1] * maps.shape[2])
            torch.testing.assert_close(c.sum(), z[y[i]] - net.fc.bias[y[i]].detach(), rtol=1e-4, atol=1e-4)
            features.append(c.sum((1, 2))), places.append(c.flatten())
        for level, c in (("features", features), ("map", places)):
            expected |= {f"{k}_{level}_{name}": sum(v) / 5 for k, v in slow_concentration(torch.stack(c)).items()}

    with torch.no_grad():
        z, z_adv = net(x), net(x_adv)
    w = aalp.sample_weights(z, z_adv, y, args)
    for i in range(len(x)):
        levels["logits"].append(terms_at_the_clean_logits(z[i], z_adv[i], y[i], lam * w[i].item()))
        gradients = []
        for term in ("ce", "pairing"):
            net.zero_grad()
            z_i, z_adv_i = net(x[i : i + 1])[0], net(x_adv[i : i + 1])[0]
            if term == "ce":
                loss = -0.5 * (F.log_softmax(z_i, 0)[y[i]] + F.log_softmax(z_adv_i, 0)[y[i]])
            else:
                loss = lam * w[i].item() / 10 * (z_i - z_adv_i).square().sum()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        levels["parameters"].append(gradients)
    for level, pairs in levels.items():
        expected[f"conflicting_{level}"] = sum(bool(a @ b < 0) for a, b in pairs) / 5
        margins = [(a @ (a + b) / (a @ a)).item() for a, b in pairs]
        if kind == "conflict" and level == "logits":  # on the edge by construction: never over it
            assert min(margins) > -1e-5
            margins = [max(m, 0) for m in margins]
        expected[f"overemphasised_{level}"] = sum(m < 0 for m in margins) / 5
    assert seen == pytest.approx(expected)


def test_the_observations_above_see_both_outcomes(images, monkeypatch):
    net, (x, x_adv, y) = make(), images
    monkeypatch.setattr(aalp, "pgd10", lambda *_, **__: x_adv)
    some, none = (aalp.observe(net, x, y, 8 / 255, replace(ARGS, sample_weight="none", pairing_weight=v))
                  for v in (1e4, 0.0))
    assert some["overemphasised_logits"] == some["conflicting_logits"] > 0
    assert some["overemphasised_parameters"] == some["conflicting_parameters"] > 0
    assert not any(v for k, v in none.items() if k.startswith(("conflicting", "overemphasised")))


# --- Whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny(runs):
    return finished_in_process(TINY, runs, SCRIPT)[0]


@pytest.fixture(scope="module")
def alp(runs):
    return finished_in_process(TINY + "--method alp", runs, SCRIPT)[0]


def results(run, name="results.json"):
    return json.loads((run / name).read_text())


def trained_by_hand(run):
    """Weights, and mean w of each epoch, of a loop written for this test. What the mask and w are made from are
    numbers here, without a history that a gradient could follow."""
    args = aalp.load(run, name="last.pt")[1]
    d = data.load("digits", train_size=300, val_size=50)
    torch.manual_seed(1)
    net = aalp.PreActResNet("preactresnet8", 4, 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    means = []
    for epoch in range(2):
        generator, used = torch.Generator().manual_seed(2_000_003 + epoch), []
        for i, (x, y) in enumerate(data.batches(d.train, 50, seed=1, epoch=epoch)):
            t = epoch + (i + 0.5) / 6
            optimizer.param_groups[0]["lr"] = min(t / 2 / 0.3, (1 - t / 2) / 0.7) * 0.1
            rise = min(1.0, t)
            net.eval()
            x_adv = pgd(net, x, y, eps=rise * (8 / 255), step_size=rise * (2.5 * (8 / 255)), steps=1,
                        generator=generator)
            net.train()
            f = net.features(torch.cat([x, x_adv]))
            w, factors = torch.ones(50), torch.ones_like(f)
            if args.method == "aalp":
                w = net.fc(f)[:50].softmax(1)[range(50), y].detach().clone()
                coins = torch.rand(50, 16, generator=generator)
                for n in range(50):
                    c = [(net.fc.weight[y[n], k] * f[n, k]).item() for k in range(16)]
                    for k in sorted(range(16), key=c.__getitem__)[:8]:
                        factors[n, k] = factors[n + 50, k] = 2.0 if coins[n, k] >= 0.5 else 0.0
            z, z_adv = net.fc(f * factors).chunk(2)
            loss = 0.5 * F.cross_entropy(z, y) + 0.5 * F.cross_entropy(z_adv, y)
            if args.pairing_weight:
                loss = loss + args.pairing_weight * (w * (z - z_adv).square().mean(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            used += w.tolist()
        means.append(sum(used) / len(used))
    return net.state_dict(), means


def test_training_is_a_loop_with_constant_masks_and_weights_bit_for_bit(tiny):
    """So nothing trains through the mask, the contributions or w, and neither frame nor validation changes training."""
    by_hand, means = trained_by_hand(tiny)
    assert same(weights(tiny / "last.pt"), by_hand)
    assert results(tiny)["method"]["history"]["sample_weight"] == pytest.approx(means)


def test_without_its_two_modules_it_is_alp_bit_for_bit(tiny, alp, runs):
    run, _ = finished_in_process(TINY + "--guided-dropout none --sample-weight none", runs, SCRIPT)
    assert same(weights(run / "last.pt"), weights(alp / "last.pt"))
    assert not same(weights(run / "last.pt"), weights(tiny / "last.pt"))


def test_without_pairing_it_is_mixed_adversarial_training_bit_for_bit(alp, runs):
    mixed, unpaired = (finished_in_process(TINY + method, runs, SCRIPT)[0]
                       for method in ("--method at", "--method alp --pairing-weight 0"))
    by_hand, _ = trained_by_hand(mixed)
    assert same(weights(mixed / "last.pt"), by_hand) and same(weights(unpaired / "last.pt"), by_hand)
    assert not same(weights(alp / "last.pt"), by_hand)
    assert results(mixed)["method"]["mean_pairing_weight"] == 0


def test_a_run_leaves_what_the_docs_promise(tiny):
    content = results(tiny)
    assert {p.name for p in tiny.iterdir() if "tfevents" not in p.name} == {
        "args.json", "best.pt", "last.pt", "results.json"}
    assert content["script"] == "aalp" and content["dataset"] == "digits" and content["evaluated"] == 20
    for row in content["checkpoints"].values():
        assert set(row) == {"epoch", "worst", "clean", "fgsm", "pgd20", "pgd50_margin", "targeted"}
        assert all(0 <= v <= 1 for k, v in row.items() if k != "epoch")
        assert row["worst"] <= min(v for k, v in row.items() if k not in ("epoch", "worst"))
    assert content["checkpoints"]["last"]["epoch"] == 2
    assert set(content["robustness_curve"]) == {"0", "1", "2", "4", "6", "8", "12", "16", "64"}
    assert content["robustness_curve"] == content["method"]["curves"]["model"]
    assert content["robustness_curve"]["0"] == content["checkpoints"]["best"]["clean"]
    observed = {f"{n}_{level}_{kind}" for n in ("n50", "n90") for level in ("features", "map")
                for kind in ("clean", "adv")}
    observed |= {f"{k}_{level}" for k in ("conflicting", "overemphasised") for level in ("logits", "parameters")}
    method = content["method"]
    assert set(method) == {"curves", "test", "history", "mean_pairing_weight"} and set(method["test"]) == observed
    assert set(method["history"]) == observed | {"sample_weight", "label_leak", "weight_bins"}
    assert all(len(v) == 2 for v in method["history"].values())
    assert [sum(v) for v in method["history"]["weight_bins"]] == [300, 300]
    saved = json.loads((tiny / "args.json").read_text())["args"]
    assert (saved["guided_dropout"], saved["sample_weight"], saved["pairing_weight"]) == ("low", "clean", 1.0)


def test_tensorboard_has_the_documented_tags(tiny):
    assert tag_mismatches("aalp.md", tiny) == []


def test_the_network_in_eval_mode_knows_nothing_of_the_settings(tiny, runs, tmp_path):
    """A plain forward pass: what guided dropout is set to changes nothing, and calls do not differ."""
    d = data.load("digits", test_size=20)
    x, y = data.to_float(d.test.x), d.test.y
    net, args, state = aalp.load(tiny)
    with torch.no_grad():
        z = net(x)
        out = net.conv((x - 0.5) / 0.25)
        for block in net.blocks:
            out = block(out)
        plain = F.relu(net.bn(out)).mean((2, 3)) @ net.fc.weight.T + net.fc.bias
        torch.testing.assert_close(z, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(z, net(x))
        for changes in (dict(guided_dropout="none"), dict(guided_dropout="high", dropout_prob=1.0, dropout_ratio=1.0)):
            torch.save({**state, "args": asdict(replace(args, **changes))}, tmp_path / "other.pt")
            assert torch.equal(z, aalp.load(tmp_path / "other.pt")[0](x))
    finished_in_process(f"--eval-only {tiny}", runs, SCRIPT, whole=True)
    row = results(tiny, "eval.json")["checkpoints"]["best"]
    assert row["clean"] == (plain.argmax(1) == y).sum().item() / 20
    assert aalp.evaluate(net, x, y, 8 / 255, "linf") == {k: v for k, v in row.items() if k != "epoch"}


def test_killed_in_the_middle_of_an_epoch_it_resumes_to_the_same_bits(tiny, runs):
    known = set(runs.glob("*"))
    process = start(TINY, runs, SCRIPT)
    run = wait_for(runs, known, lambda r: epochs_done(r) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "results.json").exists()
    assert finished_in_process(f"--resume {run}", runs, SCRIPT)[0] is None
    assert same(weights(tiny / "last.pt"), weights(run / "last.pt"))
    assert same(weights(tiny / "best.pt"), weights(run / "best.pt"))
    first, second = results(tiny), results(run)
    assert first["checkpoints"] == second["checkpoints"] and first["method"] == second["method"]


def test_eval_only_repeats_the_results(tiny, capsys, runs):
    before = (tiny / "results.json").read_bytes()
    assert in_process(f"--eval-only {tiny}", capsys, runs, SCRIPT) == (0, "")
    first, again = results(tiny), results(tiny, "eval.json")
    assert again["checkpoints"] == first["checkpoints"] and again["robustness_curve"] == first["robustness_curve"]
    assert again["method"] == first["method"] and again["train_seconds"] == first["train_seconds"]
    assert (tiny / "results.json").read_bytes() == before


def test_the_control_pairs_with_the_mean_weight(tiny, alp, runs):
    history = results(tiny)["method"]["history"]["sample_weight"]
    mean = sum(history) / len(history)
    assert 0 < mean < 1 and aalp.control(tiny, "digits") == pytest.approx(1.0 * mean)
    assert aalp.control(alp, "digits") == 1
    run, _ = finished_in_process(TINY + f"--control-of {tiny}", runs, SCRIPT)
    args = aalp.load(run)[1]
    assert (args.method, args.guided_dropout, args.sample_weight) == ("alp", "none", "none")
    assert args.pairing_weight == aalp.control(tiny, "digits") == aalp.control(run, "digits")
    assert not same(weights(run / "last.pt"), weights(alp / "last.pt"))


def test_the_control_of_what_is_no_run_is_refused(tiny, tmp_path, capsys):
    for content in ("no json", "{}", '{"method": {}}', "[]", "null"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(data.UserError, match="not the folder of a finished run of aalp.py") as error:
            aalp.control(tmp_path, "digits")
        assert "\n" not in str(error.value)
    with pytest.raises(data.UserError):
        aalp.control(tiny / "last.pt", "digits")
    with pytest.raises(data.UserError, match="needs no control on cifar10"):
        aalp.control(tiny, "cifar10")


REFUSED = {
    "--control-of ''": "--control-of was given an empty name",
    "--pairing-weight inf": "--pairing-weight must be finite",
    "--dropout-prob 1.5": "--dropout-prob must be at most 1",
    "--method alp --dropout-prob 0.9": "--dropout-prob would do nothing here: leave it out",
    "--method at --sample-weight clean": "--sample-weight would do nothing here",
    "--guided-dropout random --dropout-label predicted": "--dropout-label would do nothing here",
    "--dropout-ratio -1": "--dropout-ratio must be at least 0",
    "--pairing-weight -1": "--pairing-weight must be at least 0",
    "--pairing-weight nan": "--pairing-weight must be",
    "--control-of /nowhere": "--control-of /nowhere: not the folder of a finished run",
    "--control-of /nowhere --pairing-weight 1": "--control-of is ALP with a --pairing-weight of its own",
    "--control-of /nowhere --sample-weight clean": "leave out --pairing-weight, --sample-weight",
    "--control-of /nowhere --method at": "--control-of is ALP",
    "--eps 8": "did you mean 8/255?",
    "--resume /nowhere": "there is no checkpoint /nowhere",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_work(arguments, capsys, tmp_path):
    status, error = in_process(arguments, capsys, tmp_path, SCRIPT)
    assert status == 2 and error.startswith("error: ") and REFUSED[arguments] in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_resuming_with_another_method_is_refused(tiny, capsys, runs):
    for arguments in ("--method alp", "--sample-weight adv", "--dropout-prob 0.1", "--pairing-weight 2"):
        status, error = in_process(f"--resume {tiny} {arguments}", capsys, runs, SCRIPT)
        name = arguments.split()[0].lstrip("-").replace("-", "_")
        assert status == 2 and f"had another value of {name}" in error and "\n" not in error


@pytest.mark.parametrize("arguments", [
    "--guided-dropout high --sample-weight adv", "--guided-dropout random --sample-weight min --milestones 1",
    "--dropout-label predicted --sample-weight conflict", "--bf16 --dropout-prob 1", "--norm l2 --eps 128/255",
    "--eps 0 --method at"])
def test_every_setting_of_the_method_runs(arguments, capsys, tmp_path):
    small = "--train-size 64 --val-size 20 --test-size 5 --width 4 --epochs 2 --batch-size 32 --attack-steps 1 "
    assert in_process(small + arguments, capsys, tmp_path, SCRIPT) == (0, "")
    (run,) = tmp_path.iterdir()
    content = results(run)
    assert content["checkpoints"]["last"]["epoch"] == 2
    assert content["eps"] == (128 / 255 if "l2" in arguments else 8 / 255)
    w = content["method"]["history"]["sample_weight"]
    assert len(w) == 2 and all(0 <= v <= 1 for v in w)


def test_it_learns_and_the_pairing_warms_up_by_itself(runs):
    run, _ = finished_in_process("--train-size 600 --val-size 50 --test-size 20 --width 8 --epochs 4 --attack-steps 1 "
                                 "--eps 2/255 --eps-warmup-epochs 2 --batch-size 50", runs, SCRIPT)
    content = results(run)
    w = content["method"]["history"]["sample_weight"]
    assert w[-1] > w[0] + 0.1  # p_y rises
    assert content["checkpoints"]["last"]["clean"] > 0.3  # of the whole network, though half of it trained at a time
