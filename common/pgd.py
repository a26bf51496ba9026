"""Projected gradient descent, and the attacks that are PGD with other settings.

| attack                     | call                                                                     |
|----------------------------|--------------------------------------------------------------------------|
| FGSM                       | `steps=1, step_size=eps, random_start=False`                             |
| PGD-K (Madry et al. 2018)  | `steps=K` with the default `loss="ce"`                                   |
| CW-style                   | `loss="margin"` (the margin of Carlini & Wagner 2017, inside the ball)   |
| TRADES' inner attack       | `loss="kl"`, with the clean logits in place of `y`                       |
| multi-targeted             | `survivors(..., targets=k)`, with the loss `lead`                        |
| patch, frame, few pixels   | `masked_attack(...)`: `mask=...` and `eps=1`                             |
| one frame for all inputs   | `universal(...)`                                                         |

Images live in [0,1], going in and coming out. Input normalisation belongs inside the network: then eps always means
pixels, and no attack can clip in the wrong space.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import distributed
from common.data import to_float, track


def margin(logits, y):
    """max_{j != y} z_j - z_y per sample, (N,): positive exactly where the sample is misclassified.

    Unlike cross-entropy its gradient does not vanish where the network is confident (Carlini & Wagner 2017, eq. f6).
    """
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - true


def kl(logits, reference_logits):
    """KL(softmax(reference) || softmax(logits)) per sample, (N,): the inner attack of TRADES (Zhang et al. 2019)."""
    log_p, log_q = F.log_softmax(reference_logits.float(), 1), F.log_softmax(logits, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def lead(logits, y, target):
    """z_t - z_y per sample, (N,), for target classes t (N,): the loss of a multi-targeted attack.

    The margin may get stuck between two classes; this keeps to one (Gowal et al. 2019, arXiv 1910.09338).
    """
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


LOSSES = {"ce": partial(F.cross_entropy, reduction="none"), "margin": margin, "kl": kl}


def _per_sample(value, x):
    """A float or a tensor (N,) in a shape that broadcasts over x (N, C, ...)."""
    if isinstance(value, (int, float)):
        return value  # stays on the host: a tensor would cost a transfer to the device
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if value.ndim not in (0, 1) or value.ndim == 1 and len(value) != len(x):
        raise ValueError(f"eps and step_size are floats or one value per sample ({len(x)}), not {tuple(value.shape)}")
    return value if value.ndim == 0 else value.view(-1, *[1] * (x.ndim - 1))


def usual_eps(norm):
    """The radius in pixels at which a network is tested that was trained without attacks."""
    return 8 / 255 if norm == "linf" else 128 / 255


def check_images(x, eps, norm="linf"):
    """Raise ValueError for images that are not in [0, 1] and for an eps that is no radius in pixels; uint8 is fine.

    Normalised images would be silently cut off at 0 and 1, and the result would look like robustness.
    """
    if x.is_floating_point() and len(x) and not (x.min() >= 0 and x.max() <= 1):  # in this form it refuses nan too
        raise ValueError(f"images must be in [0, 1], not in [{x.min():g}, {x.max():g}]: put the normalisation into the "
                         "network, as in nn.Sequential(Normalize(mean, std), network).eval()")  # fmt: skip
    for radius in torch.as_tensor(eps).aminmax():
        _check_eps(float(radius), norm)


def _check_eps(eps, norm):
    if not 0 <= eps <= (1 if norm == "linf" else math.inf):
        raise ValueError(f"eps is a radius in pixels, not {eps:g}: did you mean {abs(eps):g}/255?")


def module_of(model):
    """The nn.Module behind `model`. Raises ValueError where there is none: its modes and parameters matter here."""
    module = model.func if isinstance(model, partial) else model
    if not isinstance(module, nn.Module):
        raise ValueError(f"the model must be an nn.Module or a functools.partial of one, not {type(model).__name__}: "
                         "as in nn.Sequential(Normalize(mean, std), network).eval()")  # fmt: skip
    return module


def _l2(v):
    """Euclidean norm of each sample, in a shape that broadcasts over v; never zero, so that one may divide by it."""
    return v.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (v.ndim - 1))


def _largest_is_1(grad):
    """Each sample of a gradient (N, ...) over its largest entry: the squares of small ones would underflow."""
    return grad / grad.abs().amax(tuple(range(1, grad.ndim)), keepdim=True).clamp_min(1e-37)


def _direction(grad, norm):
    """Where a step goes: the signs of the gradient, or the gradient at length 1. Where it is nan, nowhere."""
    if norm == "linf":
        return grad.sign()  # of nan it is 0
    grad = _largest_is_1(grad.nan_to_num(0.0))  # or a confident network, of a small gradient, would look robust
    return grad / _l2(grad)


def _start(x, eps, norm, mask, generator):
    """A uniform draw from the eps ball around 0, of the masked pixels if there is a mask."""
    noise = torch.empty_like(x)
    if norm == "linf":
        return noise.uniform_(-1, 1, generator=generator) * eps
    noise.normal_(generator=generator)
    if mask is not None:
        noise = noise * mask  # before the norm is taken, or the start shrinks with the mask
    # Volume grows as r^d, so the radius of a uniform point is U^(1/d): in d = 3072 nearly always close to eps.
    d = x.shape[1:].numel() if mask is None else mask.expand_as(x).flatten(1).sum(1)
    radius = torch.rand(len(x), device=x.device, generator=generator) ** (1 / d)
    return noise / _l2(noise) * _per_sample(radius, x) * eps


def pgd(model, x, y, *, eps, step_size, steps, norm="linf", loss="ce", random_start=True, restarts=1, keep_best=False,
        targeted=False, mask=None, generator=None, allow_train_mode=False):  # fmt: skip
    """Adversarial examples for `model` within `eps` of `x` (Madry et al. 2018, arXiv 1706.06083).

    Args:
        model: an `nn.Module`, or `functools.partial` of one, that maps images to logits (N, classes).
        x: images (N, C, ...), floats in [0, 1].
        y: labels (N,); the target labels if `targeted`; reference logits (N, classes) for `loss="kl"`.
        eps: radius of the ball in pixels, a float or one value per sample (N,). 0 returns x.
        step_size: length of a step in pixels, a float or one value per sample (N,).
        steps: number of gradient steps; each costs one forward and one backward pass.
        norm: "linf" (sign steps) or "l2" (normalised gradient steps).
        loss: "ce", "margin", "kl", or a function (logits, y) -> (N,). The attack raises it, or lowers it if `targeted`.
        random_start: begin at a uniform draw from the ball instead of at x; or the draw itself, a tensor like x.
        restarts: independent random starts; the worst result of each sample is kept.
        keep_best: keep the worst iterate of each sample, not the last one. Costs one more forward pass.
        mask: boolean, broadcastable to x: only pixels where it is True may change.
        generator: `torch.Generator` on x's device for the random starts.
        allow_train_mode: attack a network in training mode: BatchNorm then mixes the samples of the batch and every
            step moves its running statistics.

    Returns:
        x_adv (N, C, ...), detached, in [0, 1].

    Worst means: fooled before not fooled, then by the loss. Parameters are frozen during the attack and restored to
    what they were. Modes, `.grad` and the arguments are left alone. Raises ValueError for bad arguments, for a model in
    training mode, and for a model without a gradient from its output to its input. Checking that x is in [0, 1] would
    stall a GPU: `check_images` does it.
    """
    module = module_of(model)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function, not {loss!r}")
    if isinstance(eps, (int, float)):
        _check_eps(eps, norm)
    if steps < 0 or restarts < 1:
        raise ValueError(f"steps must not be negative and restarts at least 1, not {steps} and {restarts}")
    if x.dtype not in (torch.float32, torch.float64):
        # A bf16 image cannot hold x + delta: rounding alone leaves the ball by 2.8e-3. Autocast the network instead.
        raise ValueError(f"x must be float32 or float64 in [0, 1], not {x.dtype}")
    if not allow_train_mode and any(m.training for m in module.modules()):
        raise ValueError("the model is in training mode: call .eval() before an attack (of a wrapper too: a new one "
                         "begins in training mode), or pass allow_train_mode=True")  # fmt: skip
    loss_fn = loss if callable(loss) else LOSSES[loss]
    sign = -1.0 if targeted else 1.0
    x, y, eps, step_size = x.detach(), y.detach(), _per_sample(eps, x), _per_sample(step_size, x)
    label = y if y.ndim == 1 else y.argmax(1)

    def project(x_adv):  # in place: overwrites x_adv
        delta = x_adv.sub_(x)
        if mask is not None:
            delta.mul_(mask)
        if norm == "linf":
            delta.clamp_(-eps, eps)
        else:
            delta.mul_((eps / _l2(delta)).clamp(max=1.0))
        return delta.add_(x).clamp_(0.0, 1.0)

    keeping = keep_best or restarts > 1
    best, best_score = x, torch.full((len(x),), -torch.inf, device=x.device)
    best_fooled = torch.zeros_like(label, dtype=torch.bool)

    def keep_worse(x_adv, logits, objective):
        nonlocal best, best_score, best_fooled
        prediction, objective = logits.argmax(1), objective.float()
        fooled = prediction == label if targeted else prediction != label
        # Lexicographic order as tensor operations: no synchronisation with the host.
        worse = (fooled & ~best_fooled) | ((fooled == best_fooled) & (objective > best_score))
        best = torch.where(worse.view(-1, *[1] * (x.ndim - 1)), x_adv, best)
        best_score, best_fooled = torch.where(worse, objective, best_score), best_fooled | fooled

    # Frozen parameters save the weight gradients. In eager mode autograd.grad prunes them by itself, under
    # torch.compile it does not. Only what was trainable may be made trainable again: a caller may train a part.
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        for _restart in range(restarts):
            if torch.is_tensor(random_start):
                x_adv = project(x + random_start)
            else:
                x_adv = project(x + _start(x, eps, norm, mask, generator)) if random_start else x.clone()
            for _step in range(steps):
                x_adv = x_adv.detach().requires_grad_()
                with torch.enable_grad():
                    logits = model(x_adv)
                    objective = sign * loss_fn(logits.float(), y)
                    # Summed, never averaged: a mean shrinks every gradient by the batch size, towards underflow.
                    total, grad = objective.sum(), None
                    if total.requires_grad:
                        (grad,) = torch.autograd.grad(total, x_adv, allow_unused=True)
                    if grad is None:
                        raise ValueError("the model's output has no gradient with respect to its input")
                with torch.no_grad():
                    if keep_best:
                        keep_worse(x_adv.detach(), logits, objective)
                    if mask is not None:
                        grad = grad * mask  # before the norm is taken: the step has its full length inside the mask
                    x_adv = project(_direction(grad, norm).mul_(step_size).add_(x_adv.detach()))
            if keeping:
                with torch.no_grad():
                    logits = model(x_adv)
                    keep_worse(x_adv, logits, sign * loss_fn(logits.float(), y))
    finally:
        for p in trainable:
            p.requires_grad_(True)
    return best if keeping else x_adv.detach()


def in_a_pass(x):
    """How many samples of x are attacked at a time: 500 images of 32x32, or as many pixels of larger ones and clips."""
    return max(500 * 3 * 32**2 // max(x[:1].numel(), 1), 16)


@torch.no_grad()
def likeliest_wrong(model, x, y, k, batch_size=None):
    """The k wrong classes that `model` finds likeliest, (k, N), the likeliest first; fewer where there are fewer."""
    logits = torch.cat([model(to_float(part)).float() for part in x.split(batch_size or in_a_pass(x))])
    return logits.scatter(1, y[:, None], float("inf")).argsort(1, descending=True)[:, 1 : k + 1].T


def survivors(model, x, y, alive=None, *, eps, steps, step_size=None, relative_step=0.25, restarts=1, targets=0,
              source=None, seed=0, batch_size=None, **settings):  # fmt: skip
    """Which samples stay correctly classified under `pgd`: a boolean mask (N,). With `steps=0`, without an attack.

    Only samples marked in `alive` (N,) are attacked, in each restart those that survived the ones before: what is
    broken stays broken. step_size None is `relative_step` * eps. With `targets=k` each restart is k
    attacks with the loss `lead`, one towards each of the k wrong classes likeliest without an attack. `source` is
    another model to craft on, for a transfer attack. The other `settings` are those of `pgd`, the same for all samples;
    eps and step_size may be one value per sample. A misclassified sample that an attack happens to repair counts as a
    survivor: pass the clean mask as `alive`. `x` may be uint8 as in a data set: floats are made for `batch_size`
    samples at a time (None: `in_a_pass`).

    Several processes must call this together. Each attacks its share, with the noise that one process would give it,
    and all return the whole mask.
    """
    check_images(x, eps, settings.get("norm", "linf"))
    eps = torch.as_tensor(eps, dtype=to_float(x[:1]).dtype, device=x.device).expand(len(x))
    step_size = relative_step * eps if step_size is None else step_size
    step_size = torch.as_tensor(step_size, dtype=eps.dtype, device=x.device).expand(len(x))
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device) if alive is None else alive.clone()
    generator = torch.Generator(x.device).manual_seed(seed)
    source = model if source is None else source  # an empty nn.Sequential is false
    random_start = settings.pop("random_start", steps > 0)  # no steps means no attack, not one with noise
    if any(m.training for m in module_of(model).modules()):  # pgd looks at the source only
        raise ValueError("the model is in training mode: call .eval() before an attack (of a wrapper too)")
    goals = likeliest_wrong(model, x, y, targets, batch_size) if targets else [None]
    for goal in [goal for _ in range(restarts) for goal in goals]:
        for i in alive.nonzero().squeeze(1).split(batch_size or in_a_pass(x)) if alive.any() else ():
            start, mine = random_start, distributed.share(len(i))
            if random_start is True:  # drawn for all of them: a sample's noise is the same with any number of processes
                whole = to_float(x[i])
                start = _start(whole, _per_sample(eps[i], whole), settings.get("norm", "linf"), settings.get("mask"),
                               generator)[mine]  # fmt: skip
            if not len(i := i[mine]):
                continue
            if goal is not None:
                settings["loss"] = partial(lead, target=goal[i])
            x_adv = pgd(source, to_float(x[i]), y[i], eps=eps[i], step_size=step_size[i], steps=steps,
                        random_start=start, generator=generator, **settings)  # fmt: skip
            with torch.no_grad():
                alive[i] = model(x_adv).argmax(1) == y[i]
        alive = distributed.everywhere(alive)
    return alive


def above(a, b):
    """Is accuracy `a` above `b` (masks of the same images) by more than two standard errors?"""
    return (a.sum() - b.sum()).item() > 2 * (a != b).sum().item() ** 0.5


def validate(model, x, y, eps, norm="linf", n=None, clean_model=None):
    """Fractions of x (N, ...), floats or uint8, that are right without an attack and, of the first n (None: of all),
    under PGD-10: {"val/clean_acc", "val/robust_acc"}. `clean_model` counts the former, where it is another one."""
    alive = survivors(model, x, y, eps=0, steps=0)
    clean = alive if clean_model is None else survivors(clean_model, x, y, eps=0, steps=0)
    robust = survivors(model, x[:n], y[:n], alive[:n], eps=eps, steps=10, norm=norm)
    return {f"val/{k}_acc": mask.sum().item() / len(mask) for k, mask in (("clean", clean), ("robust", robust))}


def pgd10(model, x, y, eps, norm="linf"):
    """PGD-10 without a random start: examples to watch a network with, the same each time."""
    return pgd(model, x, y, eps=eps, step_size=eps / 4, steps=10, norm=norm, random_start=False)


def robustness_curve(model, x, y, eps, norm="linf", batch_size=None):
    """Accuracy under PGD-20 against its strength, from counts: {255 eps as text: fraction}, for 0 to 8 times `eps`.

    At 8 eps next to nothing should be left: an attack that fails there fails everywhere.
    """
    clean, curve = survivors(model, x, y, eps=0, steps=0, batch_size=batch_size), {}
    for f in track((0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 8), "robustness curve"):
        e = eps * f  # of 8/255: 0 1 2 4 6 8 12 16 64
        radius = min(e, 1.0) if norm == "linf" else e  # 1 covers all images
        alive = survivors(model, x, y, clean, eps=radius, steps=20, norm=norm, batch_size=batch_size) if e else clean
        curve[f"{255 * e:.4g}"] = alive.sum().item() / len(y)
    return curve


def attack_metrics(model, x, y, x_adv):
    """What an attack did to a batch, as numbers: where robustness looks too good, one of these looks odd."""
    x = x.detach().requires_grad_()
    with torch.no_grad():
        logits_adv = model(x_adv).float()
    with torch.enable_grad():
        logits = model(x).float()
        loss, loss_adv = (F.cross_entropy(z, y, reduction="sum") for z in (logits, logits_adv))
        (grad,) = torch.autograd.grad(loss, x)
    correct, fooled = logits.argmax(1) == y, logits_adv.argmax(1) != y
    return {
        "loss_gain": (loss_adv - loss).item() / len(x),
        "flip_rate": (correct & fooled).sum().item() / max(correct.sum().item(), 1),  # of what was correct before
        "zero_grad_share": (grad == 0).float().mean().item(),
        "linf_norm": (x_adv - x).abs().max().item(),
        "l2_norm": (x_adv - x).flatten(1).norm(dim=1).mean().item(),
    }


def attack_images(x, x_adv, n=8):
    """One image (3, h, w) of rows: the first n of x (of clips the first frames), of x_adv, 10 x their difference."""
    from torchvision.utils import make_grid  # here, as in data.environment

    rows = torch.cat([x[:n], x_adv[:n], (0.5 + 10 * (x_adv - x)[:n]).clamp(0, 1)])
    return make_grid(rows if x.ndim == 4 else rows[:, :, 0], nrow=len(x[:n]))


# --- Masks, and where to put them. x are images (N, C, H, W) or clips (N, C, T, H, W), in which every frame has a place
# of its own.


def _frames(x):
    return (len(x),) if x.ndim == 4 else (len(x), x.shape[2])


def random_corners(side, x, generator=None):
    """Upper left corners (N, [T,] 2), row and column, of squares that lie inside x (side at most H, W)."""
    rows, columns = (torch.randint(n - side + 1, _frames(x), device=x.device, generator=generator)
                     for n in x.shape[-2:])  # fmt: skip
    return torch.stack([rows, columns], -1)


def square_mask(corners, side, x):
    """The squares with upper left corners (N, [T,] 2), boolean (N, 1, [T,] H, W)."""
    rows, columns = ((i >= c) & (i < c + side) for i, c in (
        (torch.arange(n, device=x.device), corners[..., k, None]) for k, n in enumerate(x.shape[-2:])))  # fmt: skip
    return (rows[..., :, None] & columns[..., None, :]).unsqueeze(1)


def frame_mask(width, x):
    """The border, `width` pixels wide, boolean (H, W)."""
    mask = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    mask[width : x.shape[-2] - width, width : x.shape[-1] - width] = False
    return mask


def pixel_mask(count, x, generator=None):
    """`count` random pixels, boolean (N, 1, [T,] H, W)."""
    score = torch.rand(*_frames(x), x.shape[-2:].numel(), device=x.device, generator=generator)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count).indices, True)
    return mask.unflatten(-1, x.shape[-2:]).unsqueeze(1)


def search_corners(model, x, y, side, loss="ce", candidates=20):
    """Corners (N, [T,] 2) of squares by gradient search (Wu et al. 2020, arXiv 1909.09552).

    Of the windows with the largest squared gradient, the one where a grey square raises the loss most. In a clip the
    k-th best windows of all frames are tried together.
    """
    x, loss_fn = x.detach().requires_grad_(), loss if callable(loss) else LOSSES[loss]
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(loss_fn(model(x).float(), y).sum(), x)
    stride = max(side // 4, 1)
    heat = F.avg_pool2d(_largest_is_1(grad).square().sum(1).reshape(-1, 1, *x.shape[-2:]), side, stride)
    best = heat.flatten(1).topk(min(candidates, heat[0].numel())).indices.T  # (candidates, N [* T])
    corners = stride * torch.stack([best // heat.shape[-1], best % heat.shape[-1]], -1).unflatten(1, _frames(x))
    with torch.no_grad():
        tried = [loss_fn(model(x.masked_fill(square_mask(c, side, x), 0.5)).float(), y) for c in corners]
    return corners[torch.stack(tried).argmax(0), torch.arange(len(x), device=x.device)]


class _Pasted(nn.Module):
    """Maps one image or clip (1, C, ...) to the logits of all of x with its masked pixels pasted into them."""

    def __init__(self, model, x, mask):
        super().__init__()
        self.model, self.x, self.mask = model, x, mask
        self.net = module_of(model)  # pgd looks at its parameters and modes
        self.training = False

    def forward(self, pasted):
        return self.model(torch.where(self.mask, pasted, self.x))


def universal(model, x, y, mask, *, steps, step_size=0.05, loss="ce", generator=None):
    """One image or clip (1, C, ...) whose masked pixels, pasted into all of x, raise the loss; from noise, without a
    bound. Learn it on other samples than those it is tested on."""
    return pgd(_Pasted(model, x, mask), torch.full_like(x[:1], 0.5), y, eps=1.0, step_size=step_size, steps=steps,
               mask=mask, loss=loss, generator=generator)  # fmt: skip


def masked_attack(name, model, x, y, size, *, steps=30, loss="ce", frame=None, generator=None, keep_best=False):
    """x_adv for x (N, C, [T,] H, W): some pixels take any value, by `steps` steps of .05.

    | name           | pixels                                                         | size   | start  |
    |----------------|----------------------------------------------------------------|--------|--------|
    | `roa`          | a square at a random place (Wu et al. 2020, arXiv 1909.09552)  | side   | grey   |
    | `roa_search`   | a square where the gradient says                               | side   | grey   |
    | `af`           | the border (Zajac et al. 2019, arXiv 1812.04599)               | width  | random |
    | `af_universal` | the border, from `frame` (1, C, ...), which `universal` learns | width  |        |
    | `spa`          | random pixels, "salt and pepper"                               | number | black  |

    With `steps=0` nothing is optimised: a grey square (`roa_search` still looks at the gradient for its place), a
    border of noise, black pixels.
    """
    attack = partial(pgd, model, y=y, eps=1.0, step_size=0.05, steps=steps, loss=loss, generator=generator,
                     keep_best=keep_best)  # fmt: skip
    if name == "af":
        return attack(x, mask=frame_mask(size, x))
    if name == "af_universal":
        return torch.where(frame_mask(size, x), frame, x)
    if name == "spa":
        mask, colour = pixel_mask(size, x, generator), 0.0
    else:
        search = name == "roa_search"
        corners = search_corners(model, x, y, size, loss) if search else random_corners(size, x, generator)
        mask, colour = square_mask(corners, size, x), 0.5
    return attack(x.masked_fill(mask, colour), mask=mask, random_start=False)


def unbroken(attack, model, x, y, alive, *, target=None, **how):
    """Which samples of the mask `alive` (N,) `model` still gets right after attack(x, y, **how), whatever that is.

    x are floats or uint8, `in_a_pass` at a time. With `target`, classes (N,), by the loss `lead` towards them.
    With several processes, each draws for its share.
    """
    alive = alive.clone()
    mine = alive.nonzero().squeeze(1)[distributed.share(int(alive.sum()))]
    for i in mine.split(in_a_pass(x)) if len(mine) else ():
        how |= {} if target is None else {"loss": partial(lead, target=target[i])}
        x_adv = attack(to_float(x[i]), y[i], **how)
        with torch.no_grad():
            alive[i] = model(x_adv).argmax(1) == y[i]
    return distributed.everywhere(alive)
