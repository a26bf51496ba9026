"""Try to refute a robust accuracy: strong and varied attacks, and checks that expose masked gradients.

    python benchmark/audit.py runs/digits__afa__1__1700000000             # writes audit.json into the folder
    python benchmark/audit.py runs/digits__afa__1__1700000000 --quick     # a first look in a minute or two
    audit(net, x, y, eps=8 / 255)                                         # any network of anyone, from Python

An attack gives an *upper* bound of the robust accuracy. That it fails can mean that the network resists, or
that the attack is broken, and most defences that were published and fell later had broken the attack: their
gradients vanish, shatter or are random (Athalye et al. 2018, arXiv 1802.00420). CHECKS looks for the traces
that this leaves, after the list of Carlini et al. 2019 (1902.06705) and the cases of Tramer et al. 2020
(2002.08347). To pass is no proof: an attack made for the defence at hand remains the duty of who proposes it
(`transfer_models` in a script).

Two more traces go into audit.json for figures.py to draw. `steps_curve` is the accuracy against the number of
steps: a network trained with logits pairing that looked robust to few of them fell to many (Engstrom et al.
2018, 1807.10272; Mosbach et al. 2018, 1810.12042). `surface` is the loss around a few images: where nothing is
masked, it rises evenly along the gradient's sign, and more than along random signs.
"""

import importlib
import json
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import data  # noqa: E402
from common.pgd import LOSSES, above, check_images, margin, module_of, pgd, survivors, usual_eps  # noqa: E402

CHECKS = {  # and what it means when one does not pass
    "falls with eps": "accuracy that rises with eps, or is left at an eps of 0.5: the attack fails",
    "iteration helps": "one step breaks more than twenty: the gradient leads astray",
    "attack converged": "more steps, restarts or step sizes still break many: the number is not final",
    "losses agree": "other losses and targets break far more than cross-entropy: its gradient is masked",
    "black box is weaker": "attacks without a gradient break what those that follow it cannot: it is masked",
    "gradients are there": "images without a gradient look robust to every attack that follows it",
    "gradients are true": "the loss does not change as its gradient says: steps, or a made-up backward pass",
    "outputs are logits": "softmax of softmax has small gradients: audit the network without the last one",
    "logits in range": "so large logits make cross-entropy and its gradient 0 in float32: rescale them",
    "deterministic": "needs attacks on the average over its noise (EOT), and counts lucky draws as robust",
    "images independent": "the output for an image depends on its batch: this is no classifier of images",
    "not one class": "the network has collapsed to one class: it is as robust as a constant",
    "no catastrophic overfitting": "training images resist one step but not twenty: it misleads weak attacks",
}
DRIFT = (0.04, 0.1)  # what more steps, restarts and step sizes may take: absolute, and relative to what is left
# What other losses may take, absolute or relative to the accuracy under cross-entropy: below either passes.
# Small adversarially trained networks on digits lost up to .115 and 38 %: an honest one may warn, narrowly.
MASKED = (0.05, 0.3)
USELESS = 0.01  # share of images that may have no gradient or saturated logits
BLACK_BOX = 0.005  # share of images that only black-box attacks may break

FULL = dict(n=1000, noise=50, steps=(1, 5, 20, 100), margin_steps=100, restarts=5, targets=9,
            transfer_steps=50, surrogate_steps=1500, apgd_steps=100, fab=True, queries=5000,
            curve_n=200, curve_steps=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))  # fmt: skip
QUICK = dict(n=200, noise=20, steps=(1, 5, 20, 50), margin_steps=40, restarts=2, targets=3,
             transfer_steps=20, surrogate_steps=300, apgd_steps=50, fab=False, queries=500,
             curve_n=60, curve_steps=(1, 2, 5, 10, 20, 50, 100))  # fmt: skip


# --- Parts of attacks


def train_surrogate(x, y, classes, steps, seed=0, batch_size=128, width=32):
    """The undefended network to transfer attacks from: four convolutions, trained plainly on (x, y)."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        layers, channels = [], x.shape[1]
        for stride, out in ((2, width), (1, width), (2, 2 * width), (2, 2 * width)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
        net = net.to(x.device)
        optimizer = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for _ in range(steps):
            index = torch.randint(len(x), (batch_size,), device=x.device)
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


class OfClips(nn.Module):
    """A network of clips (N, 3, T, H, W) on images (N, 3, T * H, W), frame below frame: the attacks know images only.

    The surrogate then sees shapes but no motion, so its attacks are weak where motion is the class.
    """

    def __init__(self, net, frames):
        super().__init__()
        self.net, self.frames = net, frames

    def forward(self, x):
        return self.net(x.unflatten(2, (self.frames, -1)))


class Average(nn.Module):
    """Mean logits of several passes: the gradient's expectation over noise (EOT, Athalye et al. 2018)."""

    def __init__(self, net, passes=10):
        super().__init__()
        self.net, self.passes = net, passes

    def forward(self, x):
        return torch.stack([self.net(x) for _ in range(self.passes)]).mean(0)


def autoattack(net, classes, eps, norm, effort, seed, device):
    """The attacks of AutoAttack, standard version (Croce & Hein 2020, arXiv 2003.01690), by name.

    `pyautoattack` 0.2.0 is the authors' code of APGD, FAB and Square behind a rewritten front end. Read in
    its source: "standard" is APGD on cross-entropy, APGD on the targeted DLR loss, FAB-T (each 100 steps, 1
    restart, the latter two 9 targets) and Square (5000 queries on the margin), each on what the one before
    left. That is the published version. The attacks are driven from here because the front end does not say
    which of them broke an image. Targets are counted from the second largest logit on: the default of 9
    runs past the last class of a network with fewer than 10.
    """
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    common = dict(norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=seed, device=device)
    steps, targets, queries = effort["apgd_steps"], min(effort["targets"], classes - 1), effort["queries"]
    attacks = {"apgd-ce": APGDAttack(net, n_iter=steps, **common)}
    if classes > 3:  # the targeted DLR loss is a ratio that takes four logits
        attacks["apgd-t"] = APGDAttack_targeted(net, n_iter=steps, n_target_classes=targets, **common)
    if effort["fab"]:
        attacks["fab-t"] = FABAttack_PT(net, n_iter=steps, targeted=True, n_target_classes=targets, **common)
    attacks["square"] = SquareAttack(net, n_queries=queries, resc_schedule=queries < 5000, **common)
    return attacks


def gap(a, b):
    """Largest absolute difference of two tensors; infinities of the same sign, as of masked classes, do not differ."""
    return torch.where(a == b, 0.0, a - b).abs().max().item()


@torch.no_grad()
def logits_of(net, x, batch_size):
    return torch.cat([net(part).float() for part in x.split(batch_size)])


def input_gradient(net, x, y, loss, batch_size):
    """Gradients of each image's loss with respect to its pixels, or a string: why there are none."""
    parts = []
    for x_part, y_part in zip(x.split(batch_size), y.split(batch_size), strict=True):
        x_part = x_part.detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                total = LOSSES[loss](net(x_part).float(), y_part).sum()
                parts.append(torch.autograd.grad(total, x_part)[0])
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return torch.cat(parts)


def steps_curve(net, x, y, attacked, steps, *, loss, batch_size, **settings):
    """One long attack, watched: {k: mask (N,) of those in `attacked` that no iterate up to the k-th has fooled}.

    It starts at the image itself: then its first k steps are the attack of k steps, the points are nested, and
    all of them together cost what the last one does.
    """
    masks = {k: attacked.clone() for k in steps}

    def watched(z, y, right):  # pgd evaluates the loss before each step, and with keep_best after the last one
        right.append((z.argmax(1) == y) & (right[-1] if right else True))
        return LOSSES[loss](z, y)

    for index in attacked.nonzero().squeeze(1).split(batch_size) if attacked.any() else ():
        right = []  # right[k]: after k steps
        pgd(net, x[index], y[index], steps=max(steps), loss=partial(watched, right=right), random_start=False,
            keep_best=True, **settings)  # fmt: skip
        for k in steps:
            masks[k][index] = right[k]
    return masks


@torch.no_grad()
def loss_surface(net, x, y, gradient, eps, norm, batch_size, points=21, seed=0):
    """Cross-entropy (N, points, points) at x + a g + b r, clamped to the box, for a (rows) and b from -eps to eps.

    g is the sign of `gradient` and r a random sign (Engstrom et al. 2018); in the L2 norm, both of length 1.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    r = torch.randint(0, 2, x.shape, device=x.device, generator=generator) * 2.0 - 1
    g = gradient.nan_to_num().sign()
    if norm == "l2":
        g, r = (v / v.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None] for v in (g, r))
    a, b = torch.meshgrid(*[torch.linspace(-eps, eps, points, device=x.device)] * 2, indexing="ij")
    a, b = (v.reshape(-1, 1, 1, 1) for v in (a, b))
    loss = [F.cross_entropy(logits_of(net, (x[i] + a * g[i] + b * r[i]).clamp(0, 1), batch_size),
                            y[i].expand(points**2), reduction="none") for i in range(len(x))]  # fmt: skip
    return torch.stack(loss).view(len(x), points, points).nan_to_num(0, 1e9, 0)


def allowed_drift(accuracy, n):
    """What longer attacks may take from `accuracy`: DRIFT, and two standard errors, for few images scatter more."""
    drift = min(DRIFT[0], max(DRIFT[1] * accuracy, USELESS))
    return drift + 2 * (drift * (1 - drift) / n) ** 0.5


def overfits(clean, fgsm, pgd20):
    """Do accuracies on training images show catastrophic overfitting? Not where one step breaks most of them too."""
    return fgsm >= 0.5 * clean and (fgsm - pgd20 > 0.25 or pgd20 < 0.5 * fgsm)


def share(mask):
    return round(mask.double().mean().item(), 6) if len(mask) else 0.0


def pixels(eps, norm):
    return f"{255 * eps:.4g}/255" if norm == "linf" else f"{eps:.4g} (L2)"


# --- The audit


def audit(net, x, y, eps=8 / 255, norm="linf", *, quick=False, train=None, surrogate=None, others=None,
          use_autoattack=True, batch_size=250, seed=0, log=print):  # fmt: skip
    """Attack `net` in every way known here, and check that the attacks worked.

    Args:
        net: an nn.Module that maps images (N, C, H, W) in [0, 1] to logits. It is left as it was.
        x, y: images, floats in [0, 1], and their labels (N,).
        eps, norm: radius of the ball in pixels; "linf" or "l2".
        quick: fewer steps, restarts, targets and queries, and no FAB: a first look, not a result.
        train: images and labels of the training split. A surrogate learns from them, and catastrophic
            overfitting is looked for there, where it happens.
        surrogate: an undefended network to transfer from, in the place of one trained here.
        others: models to craft on as well, a list or {name: list}. Paths through the same weights are known to a
            white-box attacker; other networks count as a black box, like the surrogate.
        use_autoattack: run AutoAttack, if `pyautoattack` is installed.
        log: what takes the lines of the report.

    Returns:
        The content of audit.json. `worst`, the share of images that no attack broke, is the robust accuracy.
        `steps_curve`: shares of the first `evaluated` images that PGD from the image itself has not fooled after
        so many steps, for both losses. `surface`: `loss_surface` of the images at these indices.
    """
    effort, device, n, began = QUICK if quick else FULL, x.device, len(x), time.time()
    module = module_of(net)
    check_images(x, eps, norm)
    if x.dtype != torch.float32:
        raise ValueError(f"images must be float32 in [0, 1], not {x.dtype}: AutoAttack takes nothing else")
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # rounding to 10 bits would show up as false gradients
    buffers = [(b, b.clone()) for b in module.buffers()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:  # no attack needs the gradients of the weights
        p.requires_grad_(False)
    training = [m for m in module.modules() if m.training]  # a finding; the attacks go on, in eval mode
    for m in training:
        m.training = False
    common = dict(eps=eps, norm=norm, batch_size=batch_size, seed=seed)
    attacks, checks, notes, white, black = {}, {}, [], [], []
    curve, surface = {}, None

    def record(name, attack, attacked=None, group=white, among=n):
        """Run `attack(attacked) -> mask of those still correct`. Images not attacked count as broken, or not at
        all if they come after the first `among`."""
        started, attacked = time.time(), clean if attacked is None else attacked
        still = attack(attacked) if attacked.any() else attacked
        group.append(torch.cat([still[:among], clean[among:]]))
        worst = torch.stack(white + black).all(0)
        count, accuracy, seconds = attacked.sum().item(), share(still[:among]), round(time.time() - started, 2)
        attacks[name] = dict(attacked=count, accuracy=accuracy, worst_so_far=share(worst), seconds=seconds,
                             black_box=group is black)  # fmt: skip
        log(f"{name:<28}{count:>9}{accuracy:>10.3f}{share(worst):>8.3f}{seconds:>9.1f}s")
        return group[-1]

    def by(images=x, labels=y, **settings):
        """PGD as an attack for `record`: the settings are those of common.pgd.survivors."""
        return lambda attacked: survivors(net, images, labels, attacked, **{**common, **settings})

    def by_each(perturb):
        """`perturb(index) -> x_adv` as an attack. What it returns counts only inside the ball and the box."""

        def attack(attacked):
            attacked = attacked.clone()
            for index in attacked.nonzero().squeeze(1).split(batch_size) if attacked.any() else ():
                x_adv = perturb(index).detach()
                delta = (x_adv - x[index]).flatten(1)
                size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
                valid = (size <= eps * (1 + 1e-5) + 1e-6) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
                attacked[index] = ~valid | (logits_of(net, x_adv, batch_size).argmax(1) == y[index])
            return attacked

        return attack

    def long(loss):
        """The longest attack of all as one for `record`; on the way it fills in `curve`."""

        def attack(attacked):
            steps, settings = effort["curve_steps"], dict(eps=eps, step_size=eps / 4, norm=norm, batch_size=batch_size)
            curve[loss] = steps_curve(net, x, y, attacked, steps, loss=loss, **settings)
            return curve[loss][steps[-1]]

        return attack

    def library(attack):
        def perturb(index):
            with torch.random.fork_rng([device] if x.is_cuda else []), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of zero gradients: the checks below say more
                return attack.perturb(x[index].contiguous(), y[index])  # its .view refuses channels_last

        return by_each(perturb)

    def check(name, passed, **numbers):
        numbers = {k: v if not isinstance(v, float) or isfinite(v) else None for k, v in numbers.items()}
        checks[name] = dict(status="PASS" if passed else "WARN", means=CHECKS[name], numbers=numbers)

    try:
        z = logits_of(net, x, batch_size)
        clean, classes = z.argmax(1) == y, z.shape[1]
        largest, second = z.topk(2).values.unbind(1)
        lead = largest - second
        # What a difference between logits is held against: the largest lead, and rounding. Not the largest logit: of a
        # class that is masked with -1e9, or of a constant added to all, it would hide any noise.
        scale, size = (v[v.isfinite()].abs().max().item() if v.isfinite().any() else 0.0 for v in (lead, largest))
        jitter = max(gap(z, logits_of(net, x, batch_size)) for _ in range(3))
        randomised = jitter > 1e-5 * scale + 1e-6 * size
        some = (clean if clean.any() else ~clean).nonzero().squeeze(1)[:250]
        gradients = {k: input_gradient(net, x[some], y[some], k, batch_size) for k in ("ce", "margin")}
        blocked = next((g for g in gradients.values() if isinstance(g, str)), None)

        # Attacks. Each attacks all images that are classified correctly, so that its accuracy can be
        # compared; only the rows with a "+" attack what the row above left: a convergence or a worst case is
        # all they are for.
        log(f"{'attack':<28}{'attacked':>9}{'accuracy':>10}{'worst':>8}{'time':>10}")
        record("clean", lambda attacked: clean, torch.ones_like(clean))
        noise = by(steps=0, random_start=True, restarts=effort["noise"])
        record(f"noise, {effort['noise']} draws", noise, group=black)
        if blocked is None:
            fgsm = record("fgsm", by(steps=1, step_size=eps, random_start=False))
            steps = effort["steps"]
            ce = [record(f"pgd-{k} ce", by(steps=k, step_size=eps if k == 1 else eps / 4)) for k in steps]
            left_ce = ce[-1]
            for name, size in (("eps/10", eps / 10), ("eps", eps)):
                more = by(steps=steps[-1], step_size=size, seed=seed + 1)
                left_ce = record(f"+ pgd-{steps[-1]} ce, step {name}", more, left_ce)
            if randomised:
                record("pgd-20 ce, eot 10", by(steps=20, source=Average(net).eval()))
            k, restarts = effort["margin_steps"], effort["restarts"]
            cw = left = record(f"pgd-{k} margin", by(steps=k, loss="margin"))
            for name, size in (("eps/4", eps / 4), ("eps/10", eps / 10), ("eps", eps)):
                more = by(steps=k, loss="margin", step_size=size, restarts=restarts, seed=seed + 1)
                left = record(f"+ {restarts} restarts, step {name}", more, left)
            converged = left
            targets = min(effort["targets"], classes - 1)
            record(f"+ targeted, {targets} classes", by(steps=k, targets=targets), left)
            watched, last = min(n, effort["curve_n"]), effort["curve_steps"][-1]
            first = clean & (torch.arange(n, device=device) < watched)
            long_ce, _ = (record(f"{last} steps {loss}, first {watched}", long(loss), first, among=watched)
                          for loss in ("ce", "margin"))
            others = others if isinstance(others, dict) else {"": others or ()}
            for name, models in others.items():
                for i, source in enumerate(models):
                    same = module_of(source) is module
                    title = f"{name or ('same weights' if same else 'other network')} {i}"
                    for loss in ("ce", "margin"):
                        transfer = by(steps=effort["transfer_steps"], loss=loss, source=source)
                        record(f"{title}, {loss}", transfer, group=white if same else black)
        if surrogate is None and train is not None:
            surrogate = train_surrogate(*train, classes, effort["surrogate_steps"], seed)
        if surrogate is not None:
            record("transfer", by(steps=effort["transfer_steps"], source=surrogate), group=black)
            accuracy = share(logits_of(surrogate, x, batch_size).argmax(1) == y)
            notes.append(f"transfer is from an undefended network of clean accuracy {accuracy:.3f}")
        if train is None:
            notes.append("no training images: overfitting was looked for on these images"
                         + ", and nothing was transferred from another network" * (surrogate is None))  # fmt: skip
        members, standard = {}, None
        try:
            members = autoattack(net, classes, eps, norm, effort, seed, device) if use_autoattack else {}
        except ImportError:
            notes.append("AutoAttack did not run: pyautoattack is missing; pip install pyautoattack")
        left = clean
        for name, attack in members.items():
            if name == "square":  # on all images too: its accuracy is that under a black-box attack
                left = left & record(f"square, {effort['queries']} queries", library(attack), group=black)
            elif blocked is None:
                left = record(name if name == "apgd-ce" else f"+ {name}", library(attack), left)
        if members and (quick or blocked is not None):
            why = "quick mode" if quick else "no gradient"
            notes.append(f"only parts of AutoAttack ran ({why}): do not compare with published numbers")
        elif members and "apgd-t" not in members:
            notes.append(f"only parts of AutoAttack ran: its targeted loss takes four classes, and there are {classes}")
        elif members:
            standard = share(left)
            notes.append(f"AutoAttack, standard version: {standard:.3f}")
        curve = {loss: {k: share(mask[:watched]) for k, mask in masks.items()} for loss, masks in curve.items()}
        if curve:
            shown = (f"{loss} " + " ".join(f"{v:.3f}" for v in points.values()) for loss, points in curve.items())
            notes.append(f"after {', '.join(map(str, effort['curve_steps']))} steps from the image itself: "
                         + "; ".join(shown))  # fmt: skip

        # Checks.
        seen, unseen, worst = (torch.stack(masks).all(0) for masks in (white, black, white + black))
        if blocked is None:
            # A larger ball holds the smaller one. In the ball of 0.5 (L2: half the diagonal of the box) every
            # image can become the same grey, and an attack that works leaves nothing.
            grid = [min(eps * f, 1.0) if norm == "linf" else eps * f for f in (0.25, 0.5, 1, 2, 4, 8)]
            grid.append(0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5)
            balls = [clean, *(by(eps=e, steps=20)(clean) for e in grid)]
            rises = any(above(b, a) for a, b in zip(balls[:-2], balls[1:-1], strict=True))
            check("falls with eps", not rises and share(balls[-1]) <= 0.02,
                  **{pixels(e, norm): share(mask) for e, mask in zip((0, *grid), balls, strict=True)})  # fmt: skip
            pgd20, best_ce = ce[2], torch.stack([*ce, left_ce, long_ce]).all(0)
            check("iteration helps", not above(pgd20, fgsm), fgsm=share(fgsm), pgd20=share(pgd20))
            drift = dict(steps=share(pgd20 & ~ce[-1]), step_sizes_ce=share(ce[-1] & ~left_ce),
                         restarts_and_step_sizes=share(cw & ~converged))  # fmt: skip
            early = min(100, last // 5)
            many = max((points[early] - points[last] for points in curve.values()), default=0.0)
            allowed, allowed_many = (allowed_drift(share(best_ce), count) for count in (n, watched))
            check("attack converged", max(drift.values()) <= allowed and many <= allowed_many, **drift,
                  **{f"steps_{early}_to_{last}": round(many, 6)}, allowed=round(allowed, 4))  # fmt: skip
            check("losses agree", share(best_ce & ~seen) <= max(MASKED[0], MASKED[1] * share(best_ce)),
                  pgd_ce=share(best_ce), all_white_box=share(best_ce & seen))  # fmt: skip
            # Wong et al. 2020, 2001.03994. (An undefended network falls to both, and some of it to twenty
            # steps only.)
            xt, yt = (t[:n] for t in train) if train is not None else (x, y)
            on_train = partial(by, xt, yt)(eps=0, steps=0)(torch.ones_like(yt, dtype=torch.bool))
            one = share(by(xt, yt, steps=1, step_size=eps, random_start=False)(on_train))
            twenty = share(by(xt, yt, steps=20)(on_train))
            check("no catastrophic overfitting", not overfits(share(on_train), one, twenty),
                  clean=share(on_train), fgsm=one, pgd20=twenty)  # fmt: skip
            none = {k: share(((g == 0) | ~g.isfinite()).flatten(1).all(1)) for k, g in gradients.items()}
            check("gradients are there", max(none.values()) <= USELESS,
                  none_ce=none["ce"], none_margin=none["margin"])  # fmt: skip
            few = some[:4]
            losses = loss_surface(net, x[few], y[few], gradients["ce"][:4], eps, norm, batch_size, seed=seed)
            surface = dict(images=few.tolist(), loss=[[[float(f"{v:.4g}") for v in row] for row in plane]
                                                      for plane in losses.tolist()])  # fmt: skip
            # A step of h along its sign should change the margin by h |g|_1. What is behind a
            # straight-through estimator moves in jumps, or not at all. (The margin: the gradient of
            # cross-entropy may underflow.)
            g, h = gradients["margin"], 1e-4
            inner = x[some].clamp(h, 1 - h)
            up, down = (logits_of(net, inner + s * g.sign(), batch_size) for s in (h, -h))
            change = margin(up, y[some]) - margin(down, y[some])
            ratio = (change / (2 * h * g.flatten(1).abs().sum(1))).nan_to_num(0, 0, 0)
            agree = share((ratio > 0.5) & (ratio < 2))
            check("gradients are true", agree >= 0.8, agree=agree, median_ratio=ratio.median().item())
        only = (seen & ~unseen).sum().item()
        check("black box is weaker", only <= max(1, BLACK_BOX * n), broken_by_black_box_only=only)
        finite, rows = z.isfinite().all().item(), z.sum(1)
        probabilities = ((z >= 0).all() & ((rows - 1).abs() < 1e-3).all()).item()
        check("outputs are logits", finite and not probabilities, finite=finite, probabilities=probabilities)
        # In float32 a probability rounds to 1 from a lead of 17 on (as some images' do in undefended networks), and the
        # others underflow from 87 to 104.
        check("logits in range", share(lead > 87) <= USELESS and share(lead > 17) <= 0.5,
              confidence_is_1=share(lead > 17), others_are_0=share(lead > 87))  # fmt: skip
        check("deterministic", not randomised, largest_difference=jitter, largest_lead=scale)
        k, mode = min(n, 32), "training: call .eval(), of a wrapper too" if training else "eval"
        try:  # alone, and among others
            company = logits_of(net, torch.cat([1 - x[:k], x[:k]]), 2 * k)[k:]
            alone = logits_of(net, x[:k], 1)
            apart = max(gap(z[:k], other) for other in (alone, company))
        except (RuntimeError, ValueError):  # what normalises by the batch may refuse a batch of one
            apart = float("inf")
        check("images independent", not training and apart <= 1e-4 * scale + 3e-6 * size + 2 * jitter,
              largest_difference=apart, mode=mode)  # fmt: skip
        majority, robust = y.bincount().max().item() / n, y[worst]
        if majority > 0.9:
            notes.append(f"{majority:.0%} of these images are of one class: a constant would look robust. Shuffle them")
        one_class = robust.bincount().max().item() / len(robust) if len(robust) >= 10 else 0.0
        check("not one class", share(clean) > majority + 0.01 and one_class <= max(0.9, majority + 0.1),
              clean=share(clean), majority=majority, largest_class_of_the_robust=one_class)  # fmt: skip
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        for p in trainable:
            p.requires_grad_(True)
        for b, saved in buffers:
            b.copy_(saved)
        for m in training:
            m.training = True

    for name in CHECKS.keys() - checks.keys():
        check(name, False, impossible=f"no gradient reaches the input ({blocked})")
    checks = {name: checks[name] for name in CHECKS}  # in this order
    warned = [name for name in checks if checks[name]["status"] == "WARN"]
    verdict = f"robust accuracy {share(worst):.3f} at {pixels(eps, norm)} on {n} images"
    if warned:
        count = f"{len(warned)} warning{'s' * (len(warned) > 1)}"
        verdict = f"DO NOT TRUST {verdict}: {count} ({', '.join(warned)})"
    else:
        verdict += f" stands: {len(checks)} checks passed"
        verdict += ", quick mode" * quick + ", without AutoAttack" * (not members)
    log("\n" + "\n".join(f"note: {note}" for note in notes) + "\n" * bool(notes))
    for name, c in checks.items():
        numbers = [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in c["numbers"].items()]
        log(f"{c['status']}  {name:<29}{', '.join(f'{k} {v}' for k, v in numbers)}")
        if c["status"] == "WARN":
            log(f"      {c['means']}")
    log(f"\nverdict: {verdict}")
    return dict(eps=eps, norm=norm, evaluated=n, quick=quick, clean=share(clean), worst=share(worst),
                autoattack=standard, attacks=attacks, checks=checks, warnings=warned, notes=notes,
                verdict=verdict, seconds=round(time.time() - began, 1),
                steps_curve=dict(evaluated=watched, accuracy=curve) if curve else None, surface=surface)  # fmt: skip


# --- Command line


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """a run's folder, whose best.pt is audited, or a .pt file"""
    quick: bool = False
    """fewer images, steps, targets and queries: a first look"""
    eps: str | None = None
    """radius of the ball, as in 8/255 (None: the run's own, or 8/255 if it was trained without attacks)"""
    norm: Literal["linf", "l2"] | None = None
    """norm of the ball (None: the run's own)"""
    n: int | None = None
    """test images: the first so many (None: 1000, with --quick 200)"""
    autoattack: bool = True
    """run AutoAttack (needs pyautoattack)"""
    batch_size: int = 250
    """images in a pass"""
    seed: int = 0
    """seed of the attacks and of the surrogate"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    data_dir: str | None = None
    """folder of the data sets (None: where the run had them)"""


def script_of(run):
    """The module that made a run's folder or a .pt file."""
    path = run / "args.json" if run.is_dir() else run
    if not path.is_file():
        raise data.UserError(f"there is no {path}: name a run's folder or a .pt file")
    try:
        is_json = path.suffix == ".json"
        content = json.loads(path.read_text()) if is_json else torch.load(path, "cpu", weights_only=True)
        script = content["script"]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise data.UserError(f"{path} cannot be read ({reason})") from None
    if "." in script or not (ROOT / f"{script}.py").is_file():  # a module's name has no dot
        raise data.UserError(f"{path} is from {script}.py, which is not in {ROOT}")
    return importlib.import_module(script)


def keeps(path, new, args):
    """Is there an audit in `path` that `new` must not replace: of full effort, or at the run's own eps and norm?"""
    try:
        old = json.loads(path.read_text())
        ranks = [(r["norm"] == args.norm and abs(r["eps"] - (args.eps or usual_eps(args.norm))) < 1e-9, not r["quick"],
                  r["autoattack"] is not None, r["evaluated"]) for r in (old, new)]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return ranks[0] > ranks[1] and old.get("epoch") == new["epoch"]


def main():
    a = data.parse(Args, __doc__)
    data.on_interrupt(None)
    run = Path(a.run)
    script = script_of(run)
    try:
        eps = None if a.eps is None else data.fraction([a.eps])
    except ValueError:
        raise data.UserError(f"--eps {a.eps} is not a number such as 8/255") from None
    if a.batch_size < 1 or a.n is not None and a.n < 1:
        raise data.UserError("--batch-size and --n must be at least 1")
    if not 0 <= a.seed < 2**32:
        raise data.UserError(f"--seed must be from 0 to 2^32 - 1, not {a.seed}")
    folder = run if run.is_dir() else run.parent
    data.check_writable(folder)
    device = data.device(a.device)
    data.tune(False, exact=True)  # as in a script's test
    net, args, state = script.load(a.run, device)
    norm = a.norm or args.norm
    if eps is not None and (eps <= 0 or norm == "linf" and eps > 1):
        hint = f": did you mean {a.eps}/255?" * (eps > 0)
        raise data.UserError(f"--eps {a.eps} is outside (0, 1], the range of a pixel{hint}")
    d = data.load_as(args, device, a.data_dir, {"classes": state["classes"]})
    n = a.n or (QUICK if a.quick else FULL)["n"]
    video = args.dataset in data.VIDEO
    x, y = d.test.x[:n], d.test.y[:n]
    x_train = d.train.x[: 2_000 if video else 20_000].to(device)  # training data may be in host memory
    if video:
        x_train = data.centre_clips(x_train, args.frames, x.shape[2])
        net, x, x_train = OfClips(net, args.frames).eval(), x.flatten(1, 2), x_train.flatten(1, 2)
    x = data.to_float(x)
    if a.norm not in (None, args.norm) and eps is None:
        raise data.UserError(f"--norm {a.norm} is not the run's own, and needs an --eps: in l2 128/255 is customary")
    eps = eps or args.eps or usual_eps(norm)
    others = [] if video else getattr(script, "transfer_models", lambda *_: [])(net, args)
    if hasattr(script, "load_teacher") and (teacher := folder / "teacher.pt").exists():
        others = [script.load_teacher(teacher, args, len(d.classes), device)[0]]
    print(f"{run}: {script.__name__} on {d.name}, first {len(y)} of {len(d.test.y)} test images, {norm} "
          f"{pixels(eps, norm)}, {device}")  # fmt: skip
    own = script.evaluate(net, x, y, eps, norm, others, a.batch_size)["worst"]
    print(f"on these images the script's own attacks leave {own:.3f}\n")
    result = audit(net, x, y, eps, norm, quick=a.quick, use_autoattack=a.autoattack, seed=a.seed,
                   train=(data.to_float(x_train), d.train.y[: len(x_train)]), batch_size=a.batch_size,
                   others=others, log=partial(print, flush=True))  # fmt: skip
    about = dict(script=script.__name__, dataset=d.name, checkpoint="best.pt" if run.is_dir() else run.name,
                 epoch=state["epoch"], command=shlex.join(["python", *sys.argv]), torch=torch.__version__)  # fmt: skip
    result = {**about, **result, "script_worst": own}
    path = run / "audit.json" if run.is_dir() else run.with_name(f"audit_{run.stem}.json")
    if keeps(path, result, args):
        path = path.with_name(f"{path.stem}_other.json")
        print(f"the audit that is there is stronger, or at the run's own eps: this one goes to {path.name}")
    data.save(path, result)


if __name__ == "__main__":
    main()
