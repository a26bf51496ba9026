"""vfd_adv.py: its losses against slow versions, the teacher and its cache, the limit cases, and whole runs."""

import contextlib
import functools
import io
import json
import math
import runpy
import shlex
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from running import epochs_done, in_process, left_by_its_reader, same, start, tag_mismatches, wait_for, weights
from shortened import shorten

import vfd_adv
from benchmark.collect import rows
from common import data
from common.pgd import pgd

TINY = ("--train-size 200 --val-size 40 --test-size 10 --width 4 --epochs 2 --attack-steps 2 --eps-warmup-epochs 1 "
        "--batch-size 50 --teacher-epochs 1")
BASE = TINY + " --lambda-adv 0 --lambda-nat 0"
ARGS = vfd_adv.Args(lambda_adv=0.3, lambda_nat=0.2)


@pytest.fixture(scope="module", autouse=True)
def draw_once():
    """The digits are drawn once for all runs in this process; nothing writes to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.READERS, "digits", functools.cache(data.READERS["digits"]))
        yield


def program(arguments, runs):
    """What the script has at its end, by name, and what it printed. In this process, and with few steps where it
    measures robustness: the tests look at the training."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        shorten(patch.setattr)
        patch.setattr(sys, "argv", ["vfd_adv.py", *shlex.split(arguments), "--runs-dir", str(runs)])
        names = runpy.run_path(str(ROOT / "vfd_adv.py"), run_name="__main__")
    return names, output.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny(runs):
    return program(TINY, runs)


@pytest.fixture(scope="module")
def plain(runs):
    return program(BASE, runs)


@pytest.fixture
def x():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(seed=0, width=4):
    """A small network in eval mode with statistics of some data."""
    torch.manual_seed(seed)
    net = vfd_adv.PreActResNet("preactresnet8", width, 10).train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(16, 3, 32, 32))
    return net.eval()


# --- The losses


def test_base_losses_of_a_case_worked_out_by_hand():
    """p = (3/4, 1/4), p' = (1/2, 1/2), y = 0: KL = 3/4 log 3/2 + 1/4 log 1/2 = .130812."""
    z, z_adv, y = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2), torch.tensor([0])
    losses = {"at": 0.693147, "trades": 0.287682 + 6 * 0.130812, "mart": 0.693147 + 0.692947 + 5 * 0.130812 / 4}
    for base, loss in losses.items():
        args = replace(ARGS, base=base, beta=vfd_adv.BETA[base])
        assert vfd_adv.base_loss(z, z_adv, y, args)[0].item() == pytest.approx(loss, abs=3e-6)


def slow_base_loss(z, z_adv, y, base, beta):
    total = 0.0
    for a, b, label in zip(z.tolist(), z_adv.tolist(), y.tolist()):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b))
        kl = sum(p_k * math.log(p_k / q_k) for p_k, q_k in zip(p, q))
        if base == "at":
            total += -math.log(q[label])
        elif base == "trades":
            total += -math.log(p[label]) + beta * kl
        else:
            rival = max(v for k, v in enumerate(q) if k != label)
            total += -math.log(q[label]) - math.log(1.0001 - rival + 1e-12) + beta * kl * (1 - p[label])
    return total / len(y)


@pytest.mark.parametrize("base", ["at", "trades", "mart"])
def test_base_losses_are_their_formulas_and_have_their_gradients(base):
    g = torch.Generator().manual_seed(3)
    z, z_adv = (2 * torch.randn(6, 5, generator=g) for _ in range(2))
    y = torch.tensor([0, 4, 2, 1, 1, 3])
    args = replace(ARGS, base=base, beta=2.5)
    loss, terms = vfd_adv.base_loss(z, z_adv, y, args)
    assert loss.item() == pytest.approx(slow_base_loss(z, z_adv, y, base, 2.5), rel=1e-5)
    first, *rest = terms.values()
    torch.testing.assert_close(loss, first + 2.5 * sum(rest))
    z, z_adv = z.requires_grad_(), z_adv.requires_grad_()
    loss = vfd_adv.base_loss(z, z_adv, y, args)[0]
    gradients = torch.autograd.grad(loss, (z, z_adv), allow_unused=True)
    assert (gradients[0] is None) == (base == "at") and gradients[1].abs().max() > 1e-3
    for v, gradient in zip((z, z_adv), gradients):
        if gradient is None:
            continue
        for i, k in ((0, 0), (2, 2), (3, 4)):  # central differences of the slow version
            ends = []
            for step in (1e-3, -1e-3):
                moved = [u.detach().double().clone() for u in (z, z_adv)]
                moved[0 if v is z else 1][i, k] += step
                ends.append(slow_base_loss(*moved, y, base, 2.5))
            assert gradient[i, k].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, abs=2e-4)


def test_a_distance_worked_out_by_hand():
    s, t = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    t.requires_grad_()
    d, _ = vfd_adv.vfd_loss(s, None, t, replace(ARGS, lambda_adv=0.0, lambda_nat=1.0))
    assert d.item() == (16 + 4) / 4
    gradient = torch.autograd.grad(d, (s, t), allow_unused=True)
    assert gradient[0].abs().sum() > 0 and gradient[1] is None  # sg[phi_T(x)]


def test_vfd_loss_weighs_both_pairs_and_leaves_a_pair_of_weight_0_alone():
    g = torch.Generator().manual_seed(5)
    s, s_adv, t = (torch.rand(4, 6, generator=g) for _ in range(3))
    both, terms = vfd_adv.vfd_loss(s, s_adv, t, ARGS)
    nat = sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist())) / 24
    adv = sum((a - b) ** 2 for a, b in zip(s_adv.flatten().tolist(), t.flatten().tolist())) / 24
    assert both.item() == pytest.approx(0.3 * adv + 0.2 * nat, rel=1e-5)
    assert terms["distance_adv"].item() == pytest.approx(adv) and terms["distance_nat"].item() == pytest.approx(nat)
    alone, terms = vfd_adv.vfd_loss(None, s_adv, t, replace(ARGS, lambda_nat=0.0))
    assert alone.item() == pytest.approx(0.3 * adv) and set(terms) == {"distance_adv"}
    alone, terms = vfd_adv.vfd_loss(s, None, t, replace(ARGS, lambda_adv=0.0))
    assert alone.item() == pytest.approx(0.2 * nat) and set(terms) == {"distance_nat"}


def test_the_features_pair_gives_the_head_no_gradient_and_the_body_one(x):
    net, teacher = network(0), network(1)
    for which, head in ((1, False), (0, True)):  # features, logits
        net.zero_grad(set_to_none=True)
        s, t = net(x, return_features=True)[which], teacher(x, return_features=True)[which]
        vfd_adv.vfd_loss(s, s, t, ARGS)[0].backward()
        assert (net.fc.weight.grad is not None) == head and net.conv.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_is_its_teacher_has_no_distance_without_an_attack(x):
    net, other, y = network(0).eval(), network(1).eval(), torch.arange(8)
    seen = vfd_adv.compare(net, net, x, y, 0.0, ARGS)
    assert seen == pytest.approx({"distance_clean": 0, "distance_adv": 0, "cka_clean": 1, "cka_adv": 1}, abs=1e-5)
    f = net(x, return_features=True)[1]
    assert vfd_adv.vfd_loss(f, f, f, ARGS)[0].item() == 0
    seen = vfd_adv.compare(net, other, x, y, 8 / 255, ARGS)
    assert seen["distance_clean"] > 0.01 and seen["distance_adv"] != seen["distance_clean"]
    x_adv = pgd(net, x, y, eps=8 / 255, step_size=2 / 255, steps=10, random_start=False)
    s, t = net.features(x_adv), other.features(x)
    assert seen["distance_adv"] == pytest.approx(((s - t).square().mean() / t.var(0, False).mean()).item(), rel=1e-4)


def test_cka_and_distance_are_those_of_the_definitions(x):
    net, teacher, y = network(0).eval(), network(1, width=8).eval(), torch.arange(8)
    seen = vfd_adv.compare(net, teacher, x, y, 0.0, ARGS)
    assert set(seen) == {"cka_clean", "cka_adv"}  # of widths 16 and 32 there is no distance
    a, b = (m(x, return_features=True)[1].detach().double().numpy() for m in (net, teacher))
    centre = np.eye(8) - 1 / 8
    hsic = [np.trace(u @ u.T @ centre @ v @ v.T @ centre) for u, v in ((a, b), (a, a), (b, b))]
    assert seen["cka_clean"] == pytest.approx(hsic[0] / math.sqrt(hsic[1] * hsic[2]), rel=1e-3)
    teacher = network(1).eval()
    seen = vfd_adv.compare(net, teacher, x, y, 0.0, ARGS)
    s, b = a, teacher(x, return_features=True)[1].detach().double().numpy()
    assert seen["distance_clean"] == pytest.approx(((s - b) ** 2).mean() / b.var(0).mean(), rel=1e-3)


def test_usefulness_is_the_correlation_with_the_class_that_a_feature_tells():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (60,), generator=g)
    features = torch.rand(60, 4, generator=g)
    features[:, 0] = -(y == 2).float()  # tells class 2, by falling
    features[:, 1] = 7.0  # dead
    adv = features + 0.3 * torch.rand(60, 4, generator=g)
    adv[:, 0], adv[:, 1] = -features[:, 0], 7.0  # turned against its class
    result = vfd_adv.usefulness(features, adv, y, 3)
    assert result["clean"][:2] == pytest.approx([1, 0]) and result["adv"][:2] == pytest.approx([-1, 0])
    for j in (2, 3):
        c = [np.corrcoef(features[:, j], y == k)[0, 1] for k in range(3)]
        k = int(np.argmax(np.abs(c)))
        assert result["clean"][j] == pytest.approx(abs(c[k]), rel=1e-4)
        assert result["adv"][j] == pytest.approx(np.sign(c[k]) * np.corrcoef(adv[:, j], y == k)[0, 1], rel=1e-4)


# --- BatchNorm's statistics


def test_a_frozen_pass_normalises_as_any_other_and_moves_no_buffer(x):
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    vfd_adv.track_statistics(net, False)
    frozen = net(x)
    assert same(before, net.state_dict())
    vfd_adv.track_statistics(net, True)
    assert torch.equal(net(x), frozen)  # by the statistics of the batch
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if "running" in k or "num_batches" in k}


def by_hand(base, clean_pass=False, teacher=None, lambda_adv=0.0, lambda_nat=0.0):
    """The network from a loop written for this test: of the plain base; of AT with a clean pass; of AT with VFD."""
    d = data.load("digits", train_size=200, val_size=40)
    torch.manual_seed(1)
    net = vfd_adv.PreActResNet("preactresnet8", 4, 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    peak = 0.05 if base == "mart" else 0.1
    for epoch in range(2):
        generator = torch.Generator().manual_seed(2_000_003 + epoch)
        for i, (x, y) in enumerate(data.batches(d.train, 50, seed=1, epoch=epoch)):
            t = epoch + (i + 0.5) / 4
            optimizer.param_groups[0]["lr"] = min(t / 2 / 0.3, (1 - t / 2) / 0.7) * peak
            rise = min(1.0, t)
            settings = dict(eps=rise * (8 / 255), step_size=rise * (2.5 * (8 / 255) / 2), steps=2, generator=generator)
            net.eval()
            if base == "trades":
                x_adv = pgd(net, x, net(x), loss="kl", **settings)
            else:
                x_adv = pgd(net, x, y, **settings)
            net.train()
            norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
            if teacher is not None:
                for m in norms:
                    m.momentum = 0.0  # batch statistics, no step of the running ones
                clean = net.features(x)
                for m in norms:
                    m.momentum = 0.1
            z = net(x) if clean_pass or base != "at" else None
            z_adv, adv = net(x_adv, return_features=True)
            args = replace(ARGS, base=base, beta={"at": 0.0, "trades": 6.0, "mart": 5.0}[base])
            loss = F.cross_entropy(z_adv, y) if base == "at" else vfd_adv.base_loss(z, z_adv, y, args)[0]
            if teacher is not None:
                target = teacher.features(x)
                adv, nat = (((f - target) ** 2).mean() for f in (adv, clean))
                loss = loss + (lambda_adv * adv + lambda_nat * nat)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("base", ["at", "trades", "mart"])
def test_without_distillation_every_base_is_a_plain_loop_bit_for_bit(base, tmp_path):
    names, output = program(f"{BASE} --base {base}", tmp_path)
    assert same(weights(names["run"].folder / "last.pt"), by_hand(base))
    assert names["teacher"] is None and "training the teacher" not in output and not (tmp_path / "teachers").exists()


@pytest.mark.parametrize("lambda_adv, lambda_nat", [(0.3, 0.1), (0, 0.2)])
def test_with_distillation_at_is_a_plain_loop_too(lambda_adv, lambda_nat, tiny, runs):
    names, _ = program(f"{TINY} --lambda-adv {lambda_adv} --lambda-nat {lambda_nat}", runs)
    expected = by_hand("at", False, tiny[0]["teacher"], lambda_adv, lambda_nat)
    for k, v in weights(names["run"].folder / "last.pt").items():
        if "num_batches" not in k:  # momentum 0 counts the pass
            assert torch.equal(v, expected[k]), k


def test_the_control_with_a_clean_pass_and_no_loss(plain, tmp_path):
    """It is the loop with a clean pass, and that pass moves the statistics."""
    found = weights(program(f"{BASE} --clean-statistics", tmp_path)[0]["run"].folder / "last.pt")
    assert same(found, by_hand("at", True)) and not same(found, weights(plain[0]["run"].folder / "last.pt"))


def test_at_s_extra_clean_pass_counts_for_no_statistics_with_a_loss_on_it_either(tmp_path):
    """One step of AT with both pairs: the buffers are those of one pass of x_adv through the first network."""
    one = TINY.replace("--epochs 2", "--epochs 1").replace("--train-size 200", "--train-size 50") + " --lambda-nat 1"
    for control, passes in (("", 1), (" --clean-statistics", 2)):
        names, _ = program(one + control, tmp_path)
        assert names["net"].bn.num_batches_tracked == passes
    assert all(m.track_running_stats for m in names["net"].modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("base, passes", [("at --lambda-nat 0", 1), ("at", 2), ("trades", 2), ("mart", 2)])
def test_a_step_costs_the_documented_passes(base, passes, tiny, runs):
    """K with an input gradient, 1 or 2 of the student in training mode, 1 of the teacher, for TRADES 1 more."""
    count = dict.fromkeys(("attack", "training", "teacher", "reference"), 0)

    def hook(module, inputs, output):
        if type(module).__name__ != "PreActResNet" or len(inputs[0]) != 50:  # only batches of the training have 50
            return
        if inputs[0].requires_grad:
            count["attack"] += 1
        elif module.training:
            count["training"] += 1
        else:
            count["reference" if any(p.requires_grad for p in module.parameters()) else "teacher"] += 1

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        output = program(f"{TINY} --base {base}", runs)[1]  # tiny has put the teacher into the cache
    finally:
        handle.remove()
    assert "training the teacher" not in output
    steps = 8
    expected = dict(attack=2 * steps, training=passes * steps, teacher=steps, reference=steps * (base == "trades"))
    assert count == expected


# --- The teacher


def test_the_teacher_is_trained_frozen_kept_and_reused(tiny, runs):
    names, output = tiny
    (cached,) = (runs / "teachers").glob("*.pt")
    assert "training the teacher" in output and f"teacher {cached}: clean accuracy" in output
    teacher, kept = names["teacher"], weights(names["run"].folder / "teacher.pt")
    assert same(teacher.state_dict(), weights(cached)) and same(kept, weights(cached))  # neither weights nor buffers
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    written = cached.stat().st_mtime_ns
    again, output = program(TINY, runs)
    assert "training the teacher" not in output and cached.stat().st_mtime_ns == written
    assert same(weights(again["run"].folder / "last.pt"), weights(names["run"].folder / "last.pt"))
    assert again["method"] == names["method"]


def test_the_teacher_is_another_network_than_the_student_at_its_start(tiny, runs):
    args = replace(tiny[0]["args"], teacher_epochs=1, teacher_lr=1e-9, runs_dir=str(runs / "start"))
    d = tiny[0]["d"]
    teacher = weights(vfd_adv.vanilla_teacher(args, d))
    torch.manual_seed(args.seed)
    assert not torch.allclose(teacher["conv.weight"], vfd_adv.build(args, 10).conv.weight, atol=1e-3)


def test_whatever_changes_the_teacher_changes_its_name(tiny, runs, monkeypatch):
    args, d = tiny[0]["args"], tiny[0]["d"]
    known = vfd_adv.vanilla_teacher(args, d)
    monkeypatch.setattr(vfd_adv, "PreActResNet", None)  # training one would fail
    others = dict(base="mart", eps=4 / 255, epochs=9, lr=0.3), dict(lambda_adv=7.0, val_size=9)
    for same_one in (replace(args, **other) for other in others):
        assert vfd_adv.vanilla_teacher(same_one, d) == known
    changes = dict(teacher_epochs=3, arch="wrn-34-10", seed=2, teacher_lr=0.2, batch_size=40, weight_decay=0.0,
                   bf16=True, width=5, runs_dir=str(runs / "other"))
    for name, value in changes.items():
        with pytest.raises(TypeError, match="NoneType"):
            vfd_adv.vanilla_teacher(replace(args, **{name: value}), d)
    for train in (data.Split(d.train.x[:150], d.train.y[:150]), data.Split(d.train.x, d.train.y.flip(0))):
        with pytest.raises(TypeError, match="NoneType"):  # fewer images, other labels
            vfd_adv.vanilla_teacher(args, replace(d, train=train))


def test_the_teacher_learns(tmp_path):
    d = data.load("digits", train_size=2000, val_size=300)
    args = replace(ARGS, width=8, arch="preactresnet8", teacher_epochs=5, teacher_lr=0.1, runs_dir=str(tmp_path))
    teacher, state = vfd_adv.load_teacher(vfd_adv.vanilla_teacher(args, d), args, 10, "cpu")
    accuracy = (teacher(data.to_float(d.val.x)).argmax(1) == d.val.y).float().mean()
    assert accuracy > 0.6 and state["args"] == dict(dataset="digits", arch="preactresnet8", width=8)


def test_a_run_can_be_the_teacher_and_a_base_be_compared_with_it(plain, tmp_path):
    names, output = program(f"{BASE.replace('--teacher-epochs 1', '')} --teacher {plain[0]['run'].folder}", tmp_path)
    assert f"teacher {plain[0]['run'].folder}: clean accuracy" in output and "it is no vanilla network" in output
    assert same(names["teacher"].state_dict(), weights(plain[0]["run"].folder / "best.pt"))
    # It only looks on.
    assert same(weights(names["run"].folder / "last.pt"), weights(plain[0]["run"].folder / "last.pt"))
    results = json.loads((names["run"].folder / "results.json").read_text())
    assert "transfer" in results["checkpoints"]["best"] and len(results["method"]["history"]["cka_adv"]) == 2
    assert results["method"]["distance"]["distance_clean"] == pytest.approx(0, abs=1e-5)  # best.pt against itself


def test_a_teacher_that_does_not_fit_is_refused_in_one_line(tiny, capsys, tmp_path):
    good = torch.load(tiny[0]["run"].folder / "teacher.pt", weights_only=True)
    cases = {
        "classes": ({**good, "classes": 100}, "it is of digits with 100 classes"),
        "dataset": ({**good, "args": {**good["args"], "dataset": "svhn"}}, "it is of svhn with 10 classes"),
        "width": ({**good, "args": {**good["args"], "width": 8}}, "size mismatch"),
        "keys": ({**good, "net": {f"body.{k}": v for k, v in good["net"].items()}}, "Missing key"),
        "list": ([1, 2], "TypeError"),
        "nothing": ({}, "KeyError"),
    }
    for name, (content, _) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
    whole = (tiny[0]["run"].folder / "teacher.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    messages = {f"{k}.pt": v for k, (_, v) in cases.items()} | {"cut.pt": "(", "empty": "No such file"}
    for name, message in messages.items():
        with pytest.raises(data.UserError) as error:
            vfd_adv.load_teacher(tmp_path / name, tiny[0]["args"], 10, "cpu")
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"error: {tmp_path / name}") and message in line and "\n" not in line, line
        assert error.value.code == 2
    given = TINY.replace("--teacher-epochs 1", f"--teacher {tmp_path / 'cut.pt'}")
    status, error = in_process(given, capsys, tmp_path / "runs", "vfd_adv.py")
    assert status == 2 and "cut.pt cannot be the teacher" in error and not (tmp_path / "runs").exists()


def test_a_damaged_teacher_in_the_cache_is_named(tiny, capsys, tmp_path):
    (cached,) = tiny[0]["run"].folder.parent.joinpath("teachers").glob("*.pt")
    broken = tmp_path / "teachers" / cached.name
    broken.parent.mkdir()
    broken.write_bytes(cached.read_bytes()[:3000])
    status, error = in_process(TINY, capsys, tmp_path, "vfd_adv.py")
    assert status == 2 and error.startswith(f"error: {broken} cannot be the teacher") and "\n" not in error


REFUSED = {
    "--teacher ''": "--teacher was given an empty name",
    "--lambda-adv -1": "--lambda-adv must be at least 0",
    "--lambda-nat nan": "--lambda-nat must be at least 0",
    "--base trades --beta -1": "--beta must be at least 0",
    "--beta 6": "--beta would do nothing here: leave it out",
    "--teacher a --teacher-epochs 9": "--teacher-epochs would do nothing here",
    "--lambda-adv 0 --lambda-nat 0 --distill logits": "--distill would do nothing here",
    "--teacher-epochs 0": "--teacher-epochs must be at least 1",
    "--base trades --clean-statistics": "--clean-statistics would do nothing here",
    "--base mart --clean-statistics": "--clean-statistics would do nothing here",
    "--eps 8": "did you mean 8/255?",
    "--resume /nowhere": "there is no checkpoint /nowhere",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_work(arguments, capsys, tmp_path):
    status, error = in_process(arguments, capsys, tmp_path, "vfd_adv.py")
    assert status == 2 and error.startswith("error: ") and REFUSED[arguments] in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_the_teacher_is_trained(capsys):
    status, error = in_process(TINY, capsys, "/proc/none", "vfd_adv.py")
    assert status == 2 and "--runs-dir /proc/none cannot be used" in error and "\n" not in error


# --- Whole runs


def test_a_run_leaves_what_the_docs_promise(tiny):
    names, output = tiny
    run = names["run"].folder
    found = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert found == {"args.json", "best.pt", "last.pt", "results.json", "teacher.pt"}
    results = json.loads((run / "results.json").read_text())
    for row in results["checkpoints"].values():
        assert row["worst"] <= min(v for k, v in row.items() if k not in ("epoch", "worst")) and "transfer" in row
    method, d = results["method"], 16
    seen = {"cka_clean", "cka_adv", "distance_clean", "distance_adv"}
    assert set(method["history"]) == seen | {"val_clean", "val_robust"}
    assert all(len(v) == 2 for v in method["history"].values())
    epoch = results["checkpoints"]["best"]["epoch"]
    majority = names["y_val"].bincount().max().item() / len(names["y_val"])
    scores = [robust * (clean > majority + 0.01)  # an epoch of one class for everything does not count
              for clean, robust in zip(method["history"]["val_clean"], method["history"]["val_robust"])]
    assert scores[epoch - 1] == max(scores)
    assert {k: len(v) for row in method["usefulness"].values() for k, v in row.items()} == {"clean": d, "adv": d}
    assert set(method["usefulness"]) == {"teacher", "student"}
    assert set(method["distance"]) == seen
    assert set(method["teacher"]) == {"dataset", "arch", "width", "val_clean", "test_clean"}
    saved = json.loads((run / "args.json").read_text())["args"]
    assert saved["lambda_adv"] == saved["lambda_nat"] == pytest.approx(vfd_adv.LAMBDA * d / 10)  # of D / K
    assert "lambda_adv 0.048," in output and "worst" in output


def test_tensorboard_and_the_docs_have_the_same_tags(tiny, runs):
    """The tags of the three bases together are those of the table, no more and no fewer."""
    others = [program(f"{TINY} --epochs 1 --base {base}", runs)[0]["run"].folder for base in ("trades", "mart")]
    assert tag_mismatches("vfd_adv.md", tiny[0]["run"].folder, *others) == []


def test_a_teacher_with_another_number_of_features_has_logits_to_teach(runs, tmp_path, capsys):
    wide = program(f"{BASE} --epochs 1 --eps 0 --width 6", runs)[0]["run"].folder
    given = f"{TINY.replace('--teacher-epochs 1', '')} --epochs 1 --teacher {wide}"
    status, error = in_process(given, capsys, tmp_path, "vfd_adv.py")
    assert status == 2 and "--teacher has 24 features and the network 16" in error and not list(tmp_path.iterdir())
    names, output = program(f"{given} --distill logits", runs)
    assert "no vanilla network" not in output
    seen = json.loads((names["run"].folder / "results.json").read_text())["method"]["distance"]
    assert set(seen) == {f"{k}_{kind}" for k in ("cka", "distance") for kind in ("clean", "adv")}


@pytest.mark.parametrize("arguments", [
    "--base trades --distill logits", "--base trades --distill features --bf16",
    "--base mart --norm l2 --eps 128/255 --milestones 1", "--eps 0 --lambda-nat 0"])
def test_other_settings_of_the_method_run(arguments, runs):
    names, _ = program(f"{TINY} {arguments}", runs)
    results = json.loads((names["run"].folder / "results.json").read_text())
    assert results["checkpoints"]["last"]["epoch"] == 2
    assert all(math.isfinite(v) for v in results["method"]["distance"].values())
    # Under autocast a pass without a gradient may leave its casts of the weights to the next one, cut from the weights.
    assert len(names["optimizer"].state) == len(list(names["net"].parameters()))
    if "logits" in arguments:
        assert names["args"].lambda_adv == vfd_adv.LAMBDA  # they have no width that a default should follow


def test_killed_it_resumes_to_the_same_bits_without_the_cache(tiny, tmp_path):
    longer = TINY.replace("--train-size 200", "--train-size 500")
    process = start(longer, tmp_path, "vfd_adv.py")
    run = wait_for(tmp_path, {tmp_path / "teachers"}, lambda r: epochs_done(r) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "results.json").exists()  # it was in the second epoch, or about to test
    for cached in (tmp_path / "teachers").glob("*.pt"):
        cached.unlink()
    resumed, output = program(f"--resume {run}", tmp_path)
    assert "training the teacher" not in output
    whole, _ = program(longer, tmp_path)
    for name in ("last.pt", "best.pt"):
        assert same(weights(whole["run"].folder / name), weights(run / name))
    assert whole["method"] == resumed["method"] and whole["table"] == resumed["table"]
    again, _ = program(f"--eval-only {run}", tmp_path)
    assert again["table"] == whole["table"]
    (run / "teacher.pt").unlink()
    with pytest.raises(data.UserError, match="teacher.pt is missing: copy it from where last.pt was"):
        program(f"--resume {run}", tmp_path)


def test_three_files_are_enough_to_go_on_and_give_the_whole_folder_of_the_same_run(tiny, tmp_path, capsys):
    run = tiny[0]["run"].folder
    for name in ("last.pt", "best.pt", "teacher.pt"):
        shutil.copy(run / name, tmp_path)
    assert in_process(f"--resume {tmp_path}", capsys, tmp_path, "vfd_adv.py") == (0, "")
    (row, _), (other, _) = rows(tmp_path), rows(run)
    columns = ("setting", "seed", "worst", "clean", "pgd20@8")
    assert [row[k] for k in columns] == [other[k] for k in columns] and "--resume" in row["command"]


def test_whoever_leaves_the_pipe_while_the_teacher_is_trained_is_told(tmp_path):
    error = left_by_its_reader(f"{TINY} --teacher-epochs 3", tmp_path, "vfd_adv.py")
    assert error == "there is nothing to continue: start it again\n"


def test_ctrl_c_while_the_teacher_is_trained_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    batches = data.batches

    def interrupted_batches(*args, epoch, **settings):
        for i, batch in enumerate(batches(*args, epoch=epoch, **settings)):
            if (epoch, i) == (1, 2):
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(data, "batches", interrupted_batches)
    arguments = shlex.split(f"{TINY} --teacher-epochs 2 --runs-dir {tmp_path}")
    monkeypatch.setattr(sys, "argv", ["vfd_adv.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "vfd_adv.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert end.value.code == 130 and "teacher, epoch 1/2" in output and "there is nothing to continue" in output
    assert [p.name for p in tmp_path.iterdir()] == ["teachers"] and not list((tmp_path / "teachers").iterdir())
