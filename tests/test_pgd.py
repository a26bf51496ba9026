"""common/pgd.py against closed forms, slow loops and two established libraries. CPU, a few seconds."""

import math
from functools import partial

import foolbox
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchattacks

from common.pgd import (
    LOSSES,
    attack_metrics,
    frame_mask,
    in_a_pass,
    kl,
    lead,
    margin,
    pgd,
    pixel_mask,
    random_corners,
    search_corners,
    square_mask,
    survivors,
    universal,
)

CLASSES, SHAPE = 5, (3, 8, 8)
EPS = 8 / 255


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


def mlp():
    return nn.Sequential(Normalize(), nn.Flatten(), nn.Linear(192, 48), nn.ReLU(), nn.Linear(48, CLASSES))


def conv_relu():
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU()]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(64, CLASSES))


def conv_bn():
    block1 = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2)]
    block2 = [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(Normalize(), *block1, *block2, nn.Flatten(), nn.Linear(64, CLASSES))


def task(n, seed):
    """Images of noisy class templates: what a small network learns in seconds and an attack then breaks."""
    templates = torch.rand(CLASSES, *SHAPE, generator=gen(77)).round() * 2 - 1
    y = torch.randint(0, CLASSES, (n,), generator=gen(seed))
    x = 0.5 + 0.06 * templates[y] + 0.2 * torch.randn(n, *SHAPE, generator=gen(seed + 1))
    return x.clamp(0, 1), y


def train(build, seed=0, steps=60):
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        net = build()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for step in range(steps):
            x, y = task(64, 100 + 2 * step)
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return net.eval()


NETS = {"mlp": mlp, "conv_relu": conv_relu, "conv_bn": conv_bn}


@pytest.fixture(scope="module")
def nets():
    return {name: train(build) for name, build in NETS.items()}


@pytest.fixture
def net(nets):
    """A trained network, checked after the test: no attack may leave a trace in it."""
    net = nets["conv_bn"]
    before = snapshot(net)
    yield net
    assert_untouched(net, before)


@pytest.fixture(scope="module")
def xy():
    x, y = task(32, 5)
    assert (x == 0).any() and (x == 1).any()  # some pixels sit on the faces of the box
    return x, y


def snapshot(net):
    return (
        [p.requires_grad for p in net.parameters()],
        [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        [m.training for m in net.modules()],
        {k: v.clone() for k, v in net.state_dict().items()},
    )


def assert_untouched(net, before):
    flags, grads, modes, state = before
    assert [p.requires_grad for p in net.parameters()] == flags
    for p, grad in zip(net.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def losses(net, x, y, loss="ce"):
    with torch.no_grad():
        return LOSSES[loss](net(x), y)


def fooled(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) != y


def norms(delta, norm):
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)


class Spy(nn.Module):
    """Records what is forwarded through a network."""

    def __init__(self, net, fail_at=None):
        super().__init__()
        self.net, self.fail_at = net, fail_at
        self.inputs, self.outputs, self.trainable = [], [], []
        self.training = net.training  # of this wrapper alone, .train() would reach into the network

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        self.trainable.append([p.requires_grad for p in self.net.parameters()])
        if len(self.inputs) == self.fail_at:
            raise RuntimeError("out of memory")
        out = self.net(x)
        self.outputs.append(out)
        return out

    @property
    def samples(self):
        return sum(len(x) for x in self.inputs)


# --- Ball and box


PER_SAMPLE = torch.linspace(0, 0.3, 32)


@pytest.mark.parametrize("eps", [1 / 255, EPS, 1.0, PER_SAMPLE, PER_SAMPLE.double().flip(0)], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_inside_ball_and_box(net, xy, norm, eps, random_start):
    x, y = xy
    for settings in (dict(), dict(restarts=2, keep_best=True), dict(loss="margin", targeted=True)):
        x_adv = pgd(
            net,
            x,
            y,
            eps=eps,
            step_size=eps / 2,
            steps=4,
            norm=norm,
            random_start=random_start,
            generator=gen(),
            **settings,
        )
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1
        size = norms(x_adv - x, norm)
        assert (size <= torch.as_tensor(eps) + 1e-6).all()
        assert (size[torch.as_tensor(eps).expand(32) > 0] > 0).all()  # it did attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_radius_is_used(net, xy, norm):
    x, y = xy
    x = x * 0.5 + 0.25  # away from the faces of the box
    x_adv = pgd(net, x, y, eps=0.1, step_size=0.025, steps=10, norm=norm, generator=gen())
    assert norms(x_adv - x, norm).min() > 0.0999


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_the_identity(net, xy, norm):
    x, y = xy
    for eps in (0, 0.0, torch.zeros(32)):
        for settings in (dict(), dict(random_start=False), dict(restarts=2), dict(keep_best=True)):
            assert torch.equal(pgd(net, x, y, eps=eps, step_size=0.1, steps=3, norm=norm, **settings), x)
    eps = torch.tensor([0.0, 0.1]).repeat(16)
    x_adv = pgd(net, x, y, eps=eps, step_size=0.1, steps=3, norm=norm)
    assert torch.equal(x_adv[::2], x[::2]) and (x_adv[1::2] != x[1::2]).flatten(1).any(1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_uniform_in_the_ball(net, norm):
    two_of_six = torch.tensor([True, True, False, False, False, False])
    for pixels, mask in ((2, None), (6, two_of_six)):
        x = torch.full((4000, 1, 1, pixels), 0.5)
        delta = (
            pgd(net, x, torch.zeros(4000).long(), eps=0.4, step_size=0, steps=0, norm=norm, mask=mask, generator=gen())
            - x
        )
        inner = (norms(delta, norm) < 0.2).float().mean()
        assert norms(delta, norm).max() > 0.39
        assert abs(inner - 0.25) < 0.03  # half the radius holds a quarter of a disc's area, and of a square's
        assert delta.mean(0).abs().max() < 0.02
        assert not delta[..., 2:].any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_masked_random_start_fills_the_ball_of_the_masked_pixels(net, xy, norm):
    x, y = xy
    x = x * 0.5 + 0.25
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :2, :3] = True  # 18 of 192 values
    size = norms(
        pgd(net, x, y, eps=0.2, step_size=0, steps=0, norm=norm, mask=mask, generator=gen()) - x, norm
    )
    assert size.max() <= 0.2 + 1e-6 and size.median() > 0.8 * 0.2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_a_number_is_no_direction(norm):
    class SometimesNan(nn.Module):
        def forward(self, x):
            return (x - 0.5).sqrt().flatten(1).nan_to_num()  # of what is below 0 the gradient is nan

    x = torch.tensor([0.2, 0.8]).view(1, 1, 1, 2).repeat(2, 1, 1, 1)
    x_adv = pgd(SometimesNan().eval(), x, torch.tensor([1, 1]), eps=0.1, step_size=0.05, steps=3, norm=norm,
                random_start=False)  # fmt: skip
    assert torch.equal(x_adv[..., 0], x[..., 0])
    torch.testing.assert_close(x_adv[..., 1], x[..., 1] - 0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_small_gradient_gives_a_step_of_full_length(norm):
    """The norm of the gradient of cross-entropy underflows from a lead of about 28 on, the gradient itself from 87."""
    net = linear(48)
    with torch.no_grad():  # from a lead of 17 on the true class has no part in the gradient: let it be the other's
        net[1].weight[1], net[1].bias[:] = -net[1].weight[0], 0
    x = torch.rand(16, 3, 4, 4, generator=gen()) * 0.4 + 0.3
    lead = net(x) @ torch.tensor([1.0, -1.0])
    y, scale = (lead < 0).long(), 60 / lead.abs().view(-1, 1)

    class Confident(nn.Module):
        def forward(self, x):
            return net(x) * scale  # a lead of 60

    settings = dict(eps=0.1, step_size=0.1, steps=1, norm=norm, random_start=False)
    torch.testing.assert_close(pgd(Confident().eval(), x, y, **settings), pgd(net, x, y, **settings))


# --- Closed forms


def linear(d, seed=3):
    layer = nn.Linear(d, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, d, generator=gen(seed)))
    return nn.Sequential(nn.Flatten(), layer).eval()


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_model_closed_form(norm, loss, random_start):
    net = linear(48)
    x, y = torch.rand(16, 3, 4, 4, generator=gen()) * 0.4 + 0.3, torch.arange(16) % 2
    # Small enough at the radius of the box, and for cross-entropy in float32 not to saturate.
    eps = torch.linspace(0.01, 0.05, 16) * (1 if norm == "linf" else 4)
    x_adv = pgd(
        net,
        x,
        y,
        eps=eps,
        step_size=eps / 4,
        steps=60,
        norm=norm,
        loss=loss,
        random_start=random_start,
        generator=gen(),
    )
    w = net[1].weight[1] - net[1].weight[0]
    dual = w.abs().sum() if norm == "linf" else w.norm()
    gain = losses(net, x_adv, y, "margin") - losses(net, x, y, "margin")
    torch.testing.assert_close(gain, (eps * dual).detach(), rtol=1e-4, atol=1e-5)
    toward = torch.where(y == 0, 1.0, -1.0)[:, None] * (w.sign() if norm == "linf" else w / w.norm())
    torch.testing.assert_close(
        (x_adv - x).flatten(1), (eps[:, None] * toward).detach(), rtol=0, atol=1e-3 * 0.2
    )


def test_linear_model_at_the_box():
    """In L-inf the box is separable as well: the optimum is the clipped corner."""
    net = linear(48)
    x, y = (
        torch.rand(16, 3, 4, 4, generator=gen()).mul(1.6).sub(0.3).clamp(0, 1),
        torch.zeros(16, dtype=torch.long),
    )
    x_adv = pgd(net, x, y, eps=0.2, step_size=0.05, steps=12, loss="margin", generator=gen())
    w = (net[1].weight[1] - net[1].weight[0]).view(1, 3, 4, 4)
    torch.testing.assert_close(x_adv, (x + 0.2 * w.sign()).clamp(0, 1).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (16, 3, 4, 4), (4, 4)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_model_masked(norm, shape):
    """The best perturbation inside the mask, reached in one step: it has its full length there."""
    net = linear(48)
    x, y = torch.rand(16, 3, 4, 4, generator=gen()) * 0.4 + 0.3, torch.zeros(16, dtype=torch.long)
    mask = torch.rand(shape, generator=gen(1)) < 0.25
    w = (net[1].weight[1] - net[1].weight[0]).view(1, 3, 4, 4).expand(16, 3, 4, 4) * mask
    dual = w.flatten(1).abs().sum(1) if norm == "linf" else w.flatten(1).norm(dim=1)
    x_adv = pgd(net, x, y, eps=0.1, step_size=0.1, steps=1, norm=norm, mask=mask, random_start=False)
    gain = losses(net, x_adv, y, "margin") - losses(net, x, y, "margin")
    torch.testing.assert_close(gain, (0.1 * dual).detach(), rtol=1e-4, atol=1e-5)


def test_fgsm_is_one_signed_step(net, xy):
    x, y = xy
    v = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(v), y, reduction="sum"), v)
    x_adv = pgd(net, x, y, eps=EPS, step_size=EPS, steps=1, random_start=False)
    torch.testing.assert_close(x_adv, (x + EPS * grad.sign()).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.5)])
@pytest.mark.parametrize("name", NETS)
def test_pgd_beats_one_step_beats_noise(nets, name, norm, eps):
    net = nets[name]
    x, y = task(256, 9)
    clean = losses(net, x, y).mean()
    noise = losses(net, pgd(net, x, y, eps=eps, step_size=0, steps=0, norm=norm, generator=gen()), y).mean()
    single = losses(
        net, pgd(net, x, y, eps=eps, step_size=eps, steps=1, norm=norm, random_start=False), y
    ).mean()
    many = losses(
        net, pgd(net, x, y, eps=eps, step_size=eps / 4, steps=20, norm=norm, generator=gen()), y
    ).mean()
    assert noise < clean + 0.5 * (single - clean) and noise < single and single < many


# --- Losses


def test_margin_against_a_slow_loop():
    z, y = torch.randn(40, 7, generator=gen()), torch.randint(0, 7, (40,), generator=gen(1))
    for got, row, label in zip(margin(z, y).tolist(), z.tolist(), y.tolist(), strict=True):
        assert got == pytest.approx(max(v for j, v in enumerate(row) if j != label) - row[label], abs=1e-6)
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)


def slow_kl(z, reference):
    """sum_j p_j log(p_j / q_j) in double precision, one term after the other."""
    out = []
    for row, other in zip(z.double(), reference.double(), strict=True):
        q, p = (v.exp() / v.exp().sum() for v in (row, other))
        out.append(sum(p[j] * (p[j].log() - q[j].log()) for j in range(len(p))))
    return torch.stack(out)


def test_kl_against_a_slow_formula():
    z, reference = torch.randn(20, 7, generator=gen()) * 3, torch.randn(20, 7, generator=gen(1)) * 3
    torch.testing.assert_close(kl(z, reference).double(), slow_kl(z, reference), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl(z, z), torch.zeros(20))
    wrong_way = slow_kl(reference, z)
    assert (kl(z, reference) - wrong_way).abs().max() > 0.1  # the direction of the divergence matters


def test_trades_inner_attack(net, xy):
    x, _ = xy
    with torch.no_grad():
        clean = net(x)
    settings = dict(eps=EPS, step_size=EPS / 4, steps=5)
    x_adv = pgd(net, x, clean, loss="kl", generator=gen(), **settings)
    slow = pgd(net, x, clean, loss=slow_kl, generator=gen(), **settings)
    assert ((x_adv - slow).abs() > 1e-6).float().mean() < 0.001
    noise = pgd(net, x, clean, eps=EPS, step_size=0, steps=0, loss="kl", generator=gen())
    assert losses(net, x_adv, clean, "kl").mean() > 3 * losses(net, noise, clean, "kl").mean()
    # The worst of restarts is by the prediction on the clean image, its own loss next.
    several = pgd(net, x, clean, loss="kl", restarts=3, keep_best=True, generator=gen(), **settings)
    flipped = [fooled(net, v, clean.argmax(1)) for v in (x_adv, several)]
    assert (flipped[1] | ~flipped[0]).all()


def test_trades_reference_may_carry_a_graph(net, xy):
    """The clean pass of a training step serves twice: as the attack's reference and in the loss."""
    x, y = xy
    clean = net(x)
    x_adv = pgd(net, x, clean, loss="kl", eps=EPS, step_size=EPS / 4, steps=2, generator=gen())
    assert torch.equal(
        x_adv, pgd(net, x, clean.detach(), loss="kl", eps=EPS, step_size=EPS / 4, steps=2, generator=gen())
    )
    parameters = list(net.parameters())
    after = torch.autograd.grad(F.cross_entropy(clean, y), parameters)
    assert all(
        torch.equal(a, b)
        for a, b in zip(after, torch.autograd.grad(F.cross_entropy(net(x), y), parameters), strict=True)
    )


def test_callable_loss(net, xy):
    x, y = xy
    settings = dict(eps=EPS, step_size=EPS / 4, steps=5)
    for name, function in (
        ("ce", lambda z, y: -z.log_softmax(1)[range(len(y)), y]),
        ("margin", lambda z, y: margin(z, y)),
    ):
        a = pgd(net, x, y, loss=name, generator=gen(), **settings)
        b = pgd(net, x, y, loss=function, generator=gen(), **settings)
        assert ((a - b).abs() > 1e-6).float().mean() < 0.001
    ce, cw = (pgd(net, x, y, loss=loss, generator=gen(), **settings) for loss in ("ce", "margin"))
    assert not torch.equal(ce, cw)
    # Sign: the attack raises the loss it is given.
    assert (
        losses(net, pgd(net, x, y, loss=lambda z, y: -margin(z, y), **settings), y).mean()
        < losses(net, x, y).mean()
    )


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_targeted_lowers_the_targets_loss(net, xy, loss):
    x, y = xy
    target = (y + 1) % CLASSES
    settings = dict(eps=EPS, step_size=EPS / 4, steps=10, loss=loss, targeted=True)
    x_adv = pgd(net, x, target, generator=gen(), **settings)
    assert (losses(net, x_adv, target, loss) < losses(net, x, target, loss)).all()
    best = pgd(net, x, target, restarts=3, keep_best=True, generator=gen(), **settings)
    hit, hit_best = ~fooled(net, x_adv, target), ~fooled(net, best, target)
    assert hit.sum() > (~fooled(net, x, target)).sum()
    assert (hit_best | ~hit).all()
    same = hit == hit_best
    assert (losses(net, best, target, loss)[same] <= losses(net, x_adv, target, loss)[same] + 1e-5).all()


def test_loss_is_not_averaged_over_the_batch(net):
    """Dividing by the batch size would lose the gradient of a saturated sample."""
    steep = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).eval()
    with torch.no_grad():
        steep[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
    seen = []

    def record(logits, y):
        logits.register_hook(seen.append)
        return F.cross_entropy(logits, y, reduction="none")

    for n in (1, 64):
        x, y = torch.full((n, 1, 1, 1), 0.5), torch.zeros(n, dtype=torch.long)
        pgd(steep, x, y, eps=0.1, step_size=0.1, steps=1, random_start=False, loss=record)
    assert torch.equal(seen[1], seen[0].expand(64, 2))


# --- Restarts and keep_best


def worst_by_loop(net, candidates, y, objective, targeted=False):
    """The lexicographic rule in Python: fooled before not fooled, then the loss, the first one on a tie."""
    best, rank = [None] * len(y), [(-1, -math.inf)] * len(y)
    for x_adv in candidates:
        with torch.no_grad():
            logits = net(x_adv)
        predictions, values = logits.argmax(1).tolist(), objective(logits, y).tolist()
        for i, (p, v) in enumerate(zip(predictions, values, strict=True)):
            r = (int((p == y[i].item()) if targeted else (p != y[i].item())), -v if targeted else v)
            if r > rank[i]:
                best[i], rank[i] = x_adv[i], r
    return torch.stack(best)


def against(logits, y):
    """A loss at odds with fooling, so that the two keys of the rule disagree."""
    return -margin(logits, y)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["ce", against], ids=["ce", "against"])
def test_restarts_keep_the_worst(net, xy, loss, targeted):
    x, y = xy
    y = (y + 1) % CLASSES if targeted else y
    settings = dict(eps=EPS, step_size=EPS / 2, steps=2, loss=loss, targeted=targeted)
    got = pgd(net, x, y, restarts=4, generator=gen(2), **settings)
    g = gen(2)
    singles = [pgd(net, x, y, generator=g, **settings) for _ in range(4)]
    objective = LOSSES.get(loss, loss) if isinstance(loss, str) else loss
    assert torch.equal(got, worst_by_loop(net, singles, y, objective, targeted))
    assert not any(torch.equal(got, single) for single in singles)  # the choice differs from sample to sample
    succeeded = [fooled(net, v, y) ^ targeted for v in (got, singles[0])]
    assert (succeeded[0] | ~succeeded[1]).all()


@pytest.mark.parametrize("loss", ["ce", against], ids=["ce", "against"])
def test_keep_best_keeps_the_worst_iterate(net, xy, loss):
    x, y = xy
    settings = dict(
        eps=2 * EPS, step_size=2 * EPS, steps=5, loss=loss
    )  # long steps: the last iterate is not the worst
    spy = Spy(net)
    got = pgd(spy, x, y, keep_best=True, generator=gen(1), **settings)
    assert len(spy.inputs) == 6  # one more forward pass, for the last iterate
    objective = LOSSES.get(loss, loss) if isinstance(loss, str) else loss
    assert torch.equal(got, worst_by_loop(net, spy.inputs, y, objective))
    last = pgd(net, x, y, generator=gen(1), **settings)
    assert torch.equal(last, spy.inputs[-1]) and not torch.equal(last, got)
    assert (fooled(net, got, y) | ~fooled(net, last, y)).all()
    same = fooled(net, got, y) == fooled(net, last, y)
    assert (objective(net(got), y)[same] >= objective(net(last), y)[same]).all()


def test_cost_in_forward_passes(net, xy):
    x, y = xy
    for settings, passes in ((dict(), 7), (dict(keep_best=True), 8), (dict(restarts=2), 16)):
        spy = Spy(net)
        pgd(spy, x, y, eps=EPS, step_size=EPS / 4, steps=7, generator=gen(), **settings)
        assert len(spy.inputs) == passes


# --- One value per sample


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_per_sample_equals_each_alone(nets, xy, norm):
    net = nets["mlp"]
    x, y = xy
    eps = torch.linspace(0, 0.2, 32)
    step = eps.flip(0) / 3
    together = pgd(net, x, y, eps=eps, step_size=step, steps=4, norm=norm, loss="margin", random_start=False)
    alone = torch.cat([
        pgd(net, x[i : i + 1], y[i : i + 1], eps=eps[i].item(), step_size=step[i].item(), steps=4, norm=norm,
            loss="margin", random_start=False)  # fmt: skip
        for i in range(32)
    ])  # fmt: skip
    assert ((together - alone).abs() > 1e-5).float().mean() < 0.001
    torch.testing.assert_close(losses(net, together, y), losses(net, alone, y), rtol=1e-3, atol=1e-3)


# --- Masks


@pytest.mark.parametrize("norm, eps", [("linf", 1.0), ("l2", 2.0)])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (32, 1, 8, 8), (32, 3, 8, 8), (8, 8), (3, 1, 1)])
def test_masked_attack(net, xy, norm, eps, shape):
    x, y = xy
    mask = torch.rand(shape, generator=gen(1)) < 0.3
    mask.view(-1)[:2] = torch.tensor([True, False])
    full = mask.expand_as(x)
    for settings in (dict(), dict(random_start=False), dict(restarts=2, keep_best=True)):
        x_adv = pgd(
            net, x, y, eps=eps, step_size=eps / 4, steps=5, norm=norm, mask=mask, generator=gen(), **settings
        )
        assert torch.equal(x_adv[~full], x[~full])
        assert (x_adv[full] != x[full]).float().mean() > 0.5
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and norms(x_adv - x, norm).max() <= eps + 1e-6
        assert losses(net, x_adv, y).mean() > losses(net, x, y).mean()


def test_masks_of_nothing_and_of_everything(net, xy):
    x, y = xy
    settings = dict(eps=1, step_size=0.25, steps=3)
    assert torch.equal(pgd(net, x, y, mask=torch.zeros(1, 1, 8, 8, dtype=torch.bool), **settings), x)
    everything = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(
        pgd(net, x, y, mask=everything, generator=gen(), **settings),
        pgd(net, x, y, generator=gen(), **settings),
    )


# --- Nothing of the caller's is touched


@pytest.mark.parametrize("frozen", [0, 3, 100])
def test_model_and_arguments_are_left_alone(xy, frozen):
    net = train(conv_bn, steps=2)
    parameters = list(net.parameters())
    for p in parameters[:frozen]:
        p.requires_grad_(False)
    parameters[4].grad = torch.ones_like(parameters[4])
    net[0].train()  # an unusual pattern of modes, with no effect on the output
    net.training = True
    before = snapshot(net)
    assert any(before[2]) and not all(before[2])
    x, y = xy[0].clone().requires_grad_(), xy[1].clone()
    eps, step, mask = (
        torch.full((32,), EPS),
        torch.full((32,), EPS / 4),
        torch.ones(1, 1, 8, 8, dtype=torch.bool),
    )
    copies = [v.detach().clone() for v in (x, y, eps, step, mask)]
    for settings in (
        dict(),
        dict(random_start=False, norm="l2"),
        dict(restarts=2, keep_best=True, mask=mask, targeted=True),
    ):
        spy = Spy(net)
        x_adv = pgd(spy, x, y, eps=eps, step_size=step, steps=3, allow_train_mode=True, **settings)
        assert not any(any(flags) for flags in spy.trainable)  # frozen while it ran
        assert_untouched(net, before)
        assert all(torch.equal(v, c) for v, c in zip((x, y, eps, step, mask), copies, strict=True))
        assert x.requires_grad and x.grad is None and not x_adv.requires_grad and x_adv.grad_fn is None


def test_result_is_not_a_view_of_the_input(net, xy):
    x, y = xy[0].clone(), xy[1]
    for settings in (
        dict(steps=0, random_start=False),
        dict(steps=0, random_start=False, restarts=2),
        dict(steps=1),
    ):
        pgd(net, x, y, eps=EPS, step_size=EPS, **settings).zero_()
        assert torch.equal(x, xy[0])


@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_model_is_restored_when_it_raises(net, xy, fail_at):
    spy = Spy(net, fail_at)
    parameters = list(net.parameters())
    parameters[1].requires_grad_(False)
    try:
        before = snapshot(net)
        with pytest.raises(RuntimeError, match="out of memory"):
            pgd(spy, *xy, eps=EPS, step_size=EPS, steps=4, restarts=2)
        assert len(spy.inputs) == fail_at
        assert_untouched(net, before)
    finally:
        parameters[1].requires_grad_(True)


def test_training_goes_on_after_an_attack(net, xy):
    x, y = xy
    parameters = list(net.parameters())
    before = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
    pgd(net, x, y, eps=EPS, step_size=EPS, steps=2)
    after = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- Refusals


def test_refuses_a_model_in_training_mode(xy):
    net = train(conv_bn, steps=2)
    call = partial(pgd, net, *xy, eps=EPS, step_size=EPS, steps=3)
    call()
    net[2].train()  # one layer is enough
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\).*allow_train_mode=True"):
        call()
    with pytest.raises(ValueError, match="training mode"):
        pgd(partial(net), *xy, eps=EPS, step_size=EPS, steps=3)
    seen = net[2].num_batches_tracked.item()
    call(allow_train_mode=True)
    assert net[2].num_batches_tracked.item() == seen + 3 and net[2].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.long])
def test_refuses_images_that_cannot_hold_a_perturbation(net, xy, dtype):
    with pytest.raises(ValueError, match=f"x must be float32 or float64.*{dtype}"):
        pgd(net, xy[0].to(dtype), xy[1], eps=EPS, step_size=EPS, steps=1)


@pytest.mark.parametrize("settings, message", [
    (dict(norm="l1"), "norm must be 'linf' or 'l2', not 'l1'"),
    (dict(norm="Linf"), "norm must be"),
    (dict(loss="cross_entropy"), "loss must be one of ce, margin, kl or a function, not 'cross_entropy'"),
    (dict(loss=None), "loss must be one of"),
    (dict(steps=-1), "steps must not be negative"),
    (dict(restarts=0), "restarts at least 1"),
    (dict(eps=8), "did you mean 8/255"),
    (dict(eps=-1 / 255), "eps is a radius in pixels"),
    (dict(eps=torch.rand(31)), r"one value per sample.*\(31,\)"),
    (dict(step_size=torch.rand(32, 1)), r"one value per sample.*\(32, 1\)"),
])  # fmt: skip
def test_refuses_bad_arguments(net, xy, settings, message):
    with pytest.raises(ValueError, match=message):
        pgd(net, *xy, **dict(eps=EPS, step_size=EPS, steps=1) | settings)


@pytest.mark.parametrize("change, message", [
    (lambda x: 2 * x - 1, r"images must be in \[0, 1\].*put the normalisation into the network"),
    (lambda x: 255 * x, r"images must be in \[0, 1\]"),
    (lambda x: x.masked_fill(x > 0.5, float("nan")), r"images must be in \[0, 1\]"),
])
def test_survivors_refuse_images_outside_the_box(net, xy, change, message):
    survivors(net, xy[0][:0], xy[1][:0], eps=EPS, steps=1)  # none is fine
    with pytest.raises(ValueError, match=message):
        survivors(net, change(xy[0]), xy[1], eps=EPS, steps=1)


def test_refuses_an_eps_of_grey_levels_and_what_is_no_module(net, xy):
    with pytest.raises(ValueError, match="did you mean 8/255"):
        survivors(net, *xy, eps=8, steps=1)
    survivors(net, *xy, eps=2.0, steps=1, norm="l2")
    with pytest.raises(ValueError, match="eps is a radius in pixels, not -0.1"):
        survivors(net, *xy, eps=torch.linspace(-0.1, 0.1, len(xy[0])), steps=1)
    for attack in (pgd, survivors):
        with pytest.raises(ValueError, match="must be an nn.Module or a functools.partial of one, not function"):
            attack(lambda x: net(x), *xy, eps=EPS, step_size=EPS, steps=1)


class Blocked(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.training = False

    def forward(self, x, scale=1.0):
        return self.net(x.detach()) * scale


def test_refuses_a_model_without_a_gradient(net, xy):
    x, y = xy
    call = partial(pgd, eps=EPS, step_size=EPS, steps=1)
    with pytest.raises(ValueError, match="no gradient with respect to its input"):
        call(Blocked(net), x, y)
    # Something else of the graph requires a gradient, the input still does not get one.
    with pytest.raises(ValueError, match="no gradient with respect to its input"):
        call(partial(Blocked(net), scale=torch.ones(1, requires_grad=True)), x, y)
    with pytest.raises(ValueError, match="no gradient with respect to its input"):
        call(Blocked(net), x, net(x), loss="kl")


# --- Where it runs: partial models, generators, no_grad, autocast, float64, memory formats, compile


def test_partial_models(net, xy):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.eval()

        def forward(self, x, w=0.0):
            return self.net(x) * w

    x, y = xy
    settings = dict(eps=EPS, step_size=EPS / 4, steps=4)
    got = pgd(partial(Scaled(), w=1.0), x, y, generator=gen(), **settings)
    assert torch.equal(got, pgd(net, x, y, generator=gen(), **settings))
    spy = Spy(net)
    pgd(partial(spy), x, y, **settings)
    assert not any(any(flags) for flags in spy.trainable)  # the module inside is frozen too


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_generator(net, xy, norm):
    x, y = xy
    settings = dict(eps=EPS, step_size=EPS / 4, steps=2, norm=norm, restarts=2)
    state = torch.get_rng_state()
    a, b, c = (pgd(net, x, y, generator=gen(seed), **settings) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not torch.equal(a, c)
    g = gen(1)
    assert not torch.equal(pgd(net, x, y, generator=g, **settings), pgd(net, x, y, generator=g, **settings))
    pgd(net, x, y, random_start=False, **settings)
    assert torch.equal(torch.get_rng_state(), state)  # nothing random, nothing drawn


def test_works_under_no_grad(net, xy):
    x, y = xy
    settings = dict(eps=EPS, step_size=EPS / 4, steps=3, restarts=2, keep_best=True)
    outside = pgd(net, x, y, generator=gen(), **settings)
    with torch.no_grad():
        inside = pgd(net, x, y, generator=gen(), **settings)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, outside) and torch.is_grad_enabled()


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.5)])
def test_works_under_autocast(net, xy, norm, eps):
    x, y = xy
    spy = Spy(net)
    parameters = list(net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = pgd(spy, x, y, eps=eps, step_size=eps / 4, steps=5, norm=norm, restarts=2, generator=gen())
        # The casts of frozen weights must not be found in autocast's cache by the training pass that follows.
        grads = torch.autograd.grad(F.cross_entropy(net(x_adv).float(), y), parameters)
    assert {z.dtype for z in spy.outputs} == {torch.bfloat16} and {v.dtype for v in spy.inputs} == {
        torch.float32
    }
    assert x_adv.dtype == torch.float32 and norms(x_adv - x, norm).max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert sum(g.abs().sum() for g in grads) > 0
    full = pgd(net, x, y, eps=eps, step_size=eps / 4, steps=5, norm=norm, restarts=2, generator=gen())
    clean, low, high = (losses(net, v, y).mean() for v in (x, x_adv, full))
    assert low - clean > 0.9 * (high - clean) > 0


def test_trades_reference_in_bfloat16(net, xy):
    """Logits of an autocast clean pass are compared in float32: nothing is rounded a second time."""
    reference = net(xy[0]).detach().bfloat16()
    z = reference.float() + 0.1 * torch.randn(reference.shape, generator=gen())
    torch.testing.assert_close(kl(z, reference), kl(z, reference.float()), rtol=1e-5, atol=1e-6)


def test_float64(nets, xy):
    net = train(mlp).double()
    x, y = xy[0].double(), xy[1]
    x_adv = pgd(net, x, y, eps=EPS, step_size=EPS / 4, steps=4, restarts=2, keep_best=True, generator=gen())
    assert x_adv.dtype == torch.float64 and (x_adv - x).abs().max() <= EPS + 1e-12


def test_channels_last(net, xy):
    x, y = xy
    settings = dict(eps=EPS, step_size=EPS / 4, steps=5, random_start=False)
    a = pgd(net, x, y, **settings)
    b = pgd(net, x.to(memory_format=torch.channels_last), y, **settings)
    assert b.is_contiguous(memory_format=torch.channels_last)
    assert ((a - b).abs() > 1e-6).float().mean() < 0.01
    torch.testing.assert_close(losses(net, a, y), losses(net, b, y), rtol=1e-2, atol=1e-2)


def test_other_shapes():
    """Not only images: features (N, D) and video (N, C, T, H, W)."""
    for shape in ((6,), (3, 2, 4, 4)):
        net = linear(math.prod(shape))
        x, y = torch.rand(8, *shape, generator=gen()), torch.arange(8) % 2
        for norm in ("linf", "l2"):
            x_adv = pgd(
                net,
                x,
                y,
                eps=torch.full((8,), 0.1),
                step_size=0.05,
                steps=3,
                norm=norm,
                restarts=2,
                generator=gen(),
            )
            assert x_adv.shape == x.shape and norms(x_adv - x, norm).max() <= 0.1 + 1e-6
            assert (losses(net, x_adv, y) > losses(net, x, y)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_samples(net, norm):
    x, y = torch.empty(0, *SHAPE), torch.empty(0, dtype=torch.long)
    assert pgd(net, x, y, eps=EPS, step_size=EPS, steps=2, norm=norm, restarts=2).shape == x.shape


def test_compiled_model(nets, xy):
    net = nets["mlp"]
    compiled = torch.compile(net, backend="eager")
    settings = dict(eps=EPS, step_size=EPS / 4, steps=3, keep_best=True)
    x, y = xy
    assert torch.equal(
        pgd(compiled, x, y, generator=gen(), **settings), pgd(net, x, y, generator=gen(), **settings)
    )
    assert all(p.requires_grad for p in net.parameters())


# --- survivors


@pytest.fixture(scope="module")
def many():
    return task(96, 21)


def weak(**settings):
    """Strong enough to fool some, weak enough to leave some."""
    return dict(eps=0.5 * EPS, step_size=0.25 * EPS, steps=2) | settings


def test_survivors_without_steps_are_the_clean_accuracy(net, many):
    x, y = many
    correct = ~fooled(net, x, y)
    assert 0 < correct.sum() < len(y)
    for eps in (0, EPS, 1.0):  # whatever the radius: no noise is added
        assert torch.equal(survivors(net, x, y, eps=eps, steps=0), correct)


def test_survivors_equal_brute_force(net, many):
    x, y = many
    settings = weak(eps=6 * EPS, step_size=0.2 * EPS)  # the random start decides, so that restarts differ
    alive = ~fooled(net, x, y)
    g = gen(7)
    counts = [alive.sum().item()]
    for _ in range(3):
        keep = [i for i in range(len(y)) if alive[i]]
        x_adv = pgd(net, x[keep], y[keep], generator=g, **settings)
        alive = torch.zeros(len(y), dtype=torch.bool)
        for i, good in zip(keep, (~fooled(net, x_adv, y[keep])).tolist(), strict=True):
            alive[i] = good
        counts.append(alive.sum().item())
    assert counts[0] > counts[1] > 0 and counts[3] < counts[1]
    before = ~fooled(net, x, y)
    got = survivors(net, x, y, before, restarts=3, seed=7, **settings)
    assert got.dtype == torch.bool and torch.equal(got, alive)
    assert torch.equal(before, ~fooled(net, x, y))  # the argument is left alone
    once = survivors(net, x, y, before, seed=7, **settings)
    assert once.sum().item() == counts[1] and (once | ~got).all()  # a restart only removes
    assert torch.equal(once, survivors(net, x, y, before, seed=7, **settings))


def test_only_those_alive_are_attacked(net, many):
    x, y = many
    alive = torch.zeros(len(y), dtype=torch.bool)
    alive[1::4] = True
    spy = Spy(net)
    got = survivors(spy, x, y, alive, batch_size=10, **weak())
    assert not got[~alive].any()
    assert (
        spy.samples == alive.sum() * 3 and max(len(v) for v in spy.inputs) == 10
    )  # two steps and the verdict
    spy = Spy(net)
    survivors(spy, x, y, alive, restarts=2, batch_size=10, **weak())
    assert 0 < got.sum() < alive.sum() and spy.samples == (alive.sum() + got.sum()) * 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_none_alive(net, many, norm):
    spy = Spy(net)
    got = survivors(spy, *many, torch.zeros(96, dtype=torch.bool), norm=norm, restarts=2, **weak())
    assert not got.any() and spy.samples == 0


@pytest.mark.parametrize("shape, n", [((3, 32, 32), 500), ((32, 32, 3), 500), ((3, 64, 64), 125),
                                      ((3, 8, 32, 32), 62), ((3, 16, 112, 112), 16), ((64, 64, 3), 125)])
def test_large_samples_are_attacked_a_few_at_a_time(shape, n):
    assert in_a_pass(torch.empty(1000, *shape, device="meta")) == in_a_pass(torch.empty(2, *shape, device="meta")) == n
    assert in_a_pass(torch.empty(0, *shape)) > 0
    if shape == (3, 64, 64):
        seen = []
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 2)).eval()
        net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        survivors(net, torch.rand(150, *shape), torch.zeros(150, dtype=torch.long), eps=0, steps=0)
        assert seen == [125, 25]


def test_survivors_do_not_depend_on_the_batch_size(net, many):
    x, y = many
    masks = [survivors(net, x, y, batch_size=b, random_start=False, **weak()) for b in (96, 32, 7)]
    assert torch.equal(masks[0], ~fooled(net, pgd(net, x, y, random_start=False, **weak()), y))
    assert all((mask != masks[0]).sum() <= 1 for mask in masks)  # rounding differs with the batch size


def test_survivors_of_a_transfer_attack(net, nets, many):
    x, y = many
    source, target = Spy(nets["mlp"]), Spy(net)
    got = survivors(target, x, y, source=source, **weak())
    x_adv = pgd(nets["mlp"], x, y, generator=gen(0), **weak())
    assert torch.equal(got, ~fooled(net, x_adv, y))
    assert target.samples == 96 and source.samples == 96 * 2
    assert got.sum() > survivors(net, x, y, **weak()).sum()  # weaker than the white box


def test_survivors_refuse_training_mode_of_either_model(nets, many):
    training = train(conv_bn, steps=1).train()
    for model, source in ((training, nets["mlp"]), (nets["mlp"], training), (training, None)):
        with pytest.raises(ValueError, match="training mode"):
            survivors(model, *many, source=source, **weak())
    assert training[2].num_batches_tracked == 1


def test_survivors_of_targeted_attacks_equal_a_loop_over_targets(net, many):
    x, y = many
    with torch.no_grad():
        logits = net(x)
    alive = logits.argmax(1) == y
    order = [[c for c in logits[i].argsort(descending=True).tolist() if c != y[i]] for i in range(len(y))]
    got = {k: survivors(net, x, y, alive, targets=k, random_start=False, **weak()) for k in (1, 3, 4, 9)}
    expected = alive.clone()
    for k in range(CLASSES - 1):
        target = torch.tensor([row[k] for row in order])
        for i in range(len(y)):
            towards = lambda z, y, t=target[i]: z[:, t] - z[0, y]  # noqa: E731
            x_adv = pgd(net, x[i : i + 1], y[i : i + 1], loss=towards, random_start=False, **weak())
            expected[i] &= net(x_adv).argmax(1)[0] == y[i]
        if k + 1 in got:
            assert torch.equal(got[k + 1], expected)
    assert torch.equal(got[9], got[4]) and got[4].sum() < got[1].sum() < alive.sum()  # no more targets than classes


def test_lead_is_the_difference_of_two_logits():
    z = torch.tensor([[1.0, 2.0, 4.0], [0.5, -1.0, 3.0]])
    assert torch.equal(lead(z, torch.tensor([0, 2]), torch.tensor([2, 1])), torch.tensor([3.0, -4.0]))


def test_survivors_with_an_eps_per_sample(net, many):
    x, y = many
    eps = torch.zeros(96)
    eps[::3], eps[1::3] = 4 * EPS, 0.5 * EPS
    correct = ~fooled(net, x, y)
    for step_size in (None, eps / 4):
        got = survivors(net, x, y, correct, eps=eps, step_size=step_size, steps=8, batch_size=11)
        assert torch.equal(got[2::3], correct[2::3])  # eps 0
        assert not got[::3].any() and got[1::3].any()
    assert torch.equal(
        survivors(net, x, y, eps=EPS, steps=4), survivors(net, x, y, eps=EPS, step_size=EPS / 4, steps=4)
    )


# --- attack_metrics


def test_attack_metrics(net, many):
    x, y = many
    x_adv = pgd(net, x, y, generator=gen(), **weak())
    got = attack_metrics(net, x, y, x_adv)
    correct = [i for i in range(96) if not fooled(net, x, y)[i]]
    gain = (losses(net, x_adv, y) - losses(net, x, y)).mean().item()
    assert got["loss_gain"] == pytest.approx(gain, rel=1e-4)
    assert got["flip_rate"] == fooled(net, x_adv, y)[correct].sum().item() / len(correct) > 0
    assert got["linf_norm"] == pytest.approx(0.5 * EPS, abs=1e-6)
    assert got["l2_norm"] == pytest.approx(sum(v.norm().item() for v in x_adv - x) / 96, rel=1e-5)
    assert got["zero_grad_share"] < 0.01
    nothing = attack_metrics(net, x, y, x)
    assert nothing["loss_gain"] == nothing["flip_rate"] == nothing["linf_norm"] == nothing["l2_norm"] == 0


def test_attack_metrics_see_masked_gradients(many):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.training = linear(192), False

        def forward(self, x):
            return self.net((x * 8).round() / 8)

    x, y = many[0], many[1] % 2
    assert attack_metrics(Quantised(), x, y, x)["zero_grad_share"] == 1


# --- Agreement with established libraries, random start off
# Some average the loss or keep delta: at a batch that is not a power of two, or where a gradient is about
# zero, a sign may differ. Hence batches of 32 and 64, the share of pixels that differ, and the losses.


def assert_agree(net, ours, theirs, x, y):
    assert (ours - x).abs().max() > 1e-3
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.001
    torch.testing.assert_close(losses(net, ours, y), losses(net, theirs, y), rtol=1e-3, atol=1e-3)
    assert torch.equal(fooled(net, ours, y), fooled(net, theirs, y))


@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize("name", NETS)
class TestAgreement:
    def test_torchattacks_pgd(self, nets, name, n):
        net, (x, y) = nets[name], task(n, 31)
        theirs = torchattacks.PGD(net, eps=EPS, alpha=2 / 255, steps=10, random_start=False)(x, y)
        assert_agree(
            net, pgd(net, x, y, eps=EPS, step_size=2 / 255, steps=10, random_start=False), theirs, x, y
        )

    def test_torchattacks_fgsm(self, nets, name, n):
        net, (x, y) = nets[name], task(n, 32)
        theirs = torchattacks.FGSM(net, eps=EPS)(x, y)
        assert_agree(net, pgd(net, x, y, eps=EPS, step_size=EPS, steps=1, random_start=False), theirs, x, y)

    def test_torchattacks_pgd_l2(self, nets, name, n):
        net, (x, y) = nets[name], task(n, 33)
        theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=10, random_start=False)(x, y)
        ours = pgd(net, x, y, eps=0.5, step_size=0.1, steps=10, norm="l2", random_start=False)
        # Its 1e-10 in the denominator tells on saturated samples: a looser tolerance, the same verdicts.
        assert ((ours - theirs).abs() > 1e-4).float().mean() < 0.001
        torch.testing.assert_close(losses(net, ours, y), losses(net, theirs, y), rtol=1e-3, atol=1e-3)
        assert torch.equal(fooled(net, ours, y), fooled(net, theirs, y))

    @pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.5)])
    def test_foolbox_pgd(self, nets, name, n, norm, eps):
        net, (x, y) = nets[name], task(n, 34)
        attack = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
        flags = [p.requires_grad for p in net.parameters()]
        theirs, *_ = attack(abs_stepsize=eps / 4, steps=10, random_start=False)(
            foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=eps
        )
        net.zero_grad(set_to_none=True)  # foolbox leaves gradients in the parameters
        assert flags == [p.requires_grad for p in net.parameters()]
        ours = pgd(net, x, y, eps=eps, step_size=eps / 4, steps=10, norm=norm, random_start=False)
        assert_agree(net, ours, theirs, x, y)


# --- Masks


@pytest.mark.parametrize("shape", [(3, 3, 20, 12), (3, 3, 4, 20, 12)])
def test_masks_are_squares_frames_and_pixels(shape):
    """Of images and of clips, which are not square: rows and columns must not be mixed up."""
    x = torch.zeros(shape)
    corners = random_corners(5, x, gen())
    mask = square_mask(corners, 5, x)
    assert corners.shape == (3, *shape[2:-2], 2) and mask.shape == (3, 1, *shape[2:])
    for one, (row, column) in zip(mask.flatten(0, -3), corners.flatten(0, -2).tolist()):
        expected = torch.zeros(20, 12, dtype=torch.bool)
        expected[row : row + 5, column : column + 5] = True
        assert torch.equal(one, expected) and expected.sum() == 25
    many = random_corners(5, torch.zeros(3000, 3, 20, 12), gen())
    assert many.amin(0).tolist() == [0, 0] and many.amax(0).tolist() == [15, 7]
    assert frame_mask(2, x).sum() == 20 * 12 - 16 * 8 and not frame_mask(2, x)[2:18, 2:10].any()
    assert frame_mask(10, x).all() and not frame_mask(0, x).any()
    pixels = pixel_mask(7, x, gen())
    assert pixels.shape == mask.shape and (pixels.sum((-2, -1)) == 7).all()
    assert len(set(map(tuple, pixels.flatten(0, -3).flatten(1).int().tolist()))) == pixels.flatten(0, -3).shape[0]


class Planted(nn.Module):
    """Two logits: the second grows as the pixels of a planted square, one for each frame, leave 1."""

    def __init__(self, corners, side, like, scale=1.0):
        super().__init__()
        self.register_buffer("mask", square_mask(corners, side, like).float())
        self.scale = scale

    def forward(self, x):
        away = ((1 - x) * self.mask).flatten(1).sum(1) / self.mask[0].sum()
        return self.scale * torch.stack([torch.zeros_like(away), away + 0.001 * (1 - x).flatten(1).mean(1)], 1)


@pytest.mark.parametrize("scale", [1.0, 1e-25])  # the square of the second gradient underflows
@pytest.mark.parametrize("clips", [False, True])
def test_gradient_search_finds_a_planted_square(clips, scale):
    x, y = torch.ones(3, 3, *([4] if clips else []), 32, 32), torch.zeros(3, dtype=torch.long)
    corners = 2 * torch.randint(0, 12, (3, *([4] if clips else []), 2), generator=gen(3))
    net = Planted(corners, 9, x, scale).eval()
    found = search_corners(net, x, y, 9, "margin")
    assert found.shape == corners.shape and torch.equal(found, corners)
    assert all(p.grad is None for p in net.parameters()) and not x.requires_grad


def test_gradient_search_keeps_the_window_where_grey_hurts_most():
    """Two windows: the one with the larger gradient is grey already, so that a grey square does nothing there."""
    x = torch.zeros(1, 3, 16, 16)
    left, right = (square_mask(torch.tensor([[4, column]]), 4, x) for column in (0, 8))
    x = x.masked_fill(left, 0.5)

    class Net(nn.Module):
        def forward(self, x):
            out = (2 * left * x).flatten(1).mean(1) + (right * x).flatten(1).mean(1)
            return torch.stack([torch.zeros_like(out), out], 1)

    assert search_corners(Net().eval(), x, torch.tensor([0]), 4, "margin").tolist() == [[4, 8]]
    assert search_corners(Net().eval(), x, torch.tensor([0]), 4, "margin", candidates=1).tolist() == [[4, 0]]


def test_universal_is_one_for_all_and_raises_the_loss_of_all(net, xy):
    x, y = xy
    mask = frame_mask(2, x)
    before = F.cross_entropy(net(torch.where(mask, torch.full_like(x[:1], 0.5), x)), y)
    found = universal(net, x, y, mask, steps=20, generator=gen())
    assert found.shape == x[:1].shape and 0 <= found.min() and found.max() <= 1
    assert torch.equal(found[..., ~mask], torch.full_like(found[..., ~mask], 0.5))
    assert F.cross_entropy(net(torch.where(mask, found, x)), y) > before
    start = universal(net, x, y, mask, steps=0, generator=gen())
    assert F.cross_entropy(net(torch.where(mask, found, x)), y) > F.cross_entropy(net(torch.where(mask, start, x)), y)
    # Slowly: the sum of the loss over all x, by the image that they share.
    shared = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(torch.where(mask, shared, x)), y, reduction="sum"), shared)
    one = universal(net, x, y, mask, steps=1, generator=gen())
    torch.testing.assert_close(one, torch.where(mask, (start + 0.05 * grad.sign()).clamp(0, 1), start))
    assert all(p.requires_grad for p in net.parameters())
