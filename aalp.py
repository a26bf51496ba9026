"""AALP, Adaptive Adversarial Logits Pairing: adversarial training that also pulls the logits of an image and of its
attacked version together. Guided dropout thins out the features that say little about the class, and each sample's
pairing is weighted by how well it is classified already.

Shangxi Wu et al., "Adaptive Adversarial Logits Pairing", https://arxiv.org/abs/2005.11904

    python aalp.py                                       # embedded data, a few minutes on two CPU cores
    python aalp.py --dataset cifar10 --bf16 --compile    # PreActResNet-18, 30 epochs, on a GPU

Embedded data, 8/255, 3 seeds, worst case over all attacks: 82.3 % (ALP: 82.8, without pairing: 56.7), clean 88.2 %.
"""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, distributed
from common.pgd import attack_images, attack_metrics, pgd, pgd10, robustness_curve, survivors, usual_eps, validate

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    # --- Run
    dataset: Literal["digits", "cifar10", "cifar100", "svhn", "tiny-imagenet"] = "digits"  # digits is embedded
    preset: Literal["fast", "paper"] = "fast"  # one cycle; paper: the literature's length and milestones
    data_dir: str = "data"  # folder of the data sets in their standard layout; downloads go there
    runs_dir: str = "runs"  # folder of the runs' folders: tensorboard --logdir runs
    seed: int = 1  # seed of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    bf16: bool = False  # train, and attack in training, under bfloat16 autocast; evaluation is float32
    compile: bool = False  # torch.compile the network for training: a minute or more of compiling, then faster on a GPU
    resume: str | None = None  # continue the run in this folder, with its own arguments
    eval_only: str | None = None  # evaluate a run's folder, into eval.json, or a NAME.pt, into eval_NAME.json
    # --- Data
    train_size: int | None = None  # training images (None: all that validation leaves)
    val_size: int = 1000  # validation images, held out of the training split
    test_size: int | None = None  # test images (None: all, of digits 500)
    data_on: Literal["auto", "device", "host"] = "auto"  # where training data are kept; auto: host above 60 % of a GPU
    # --- Optimisation
    arch: Literal["preactresnet18", "wrn-34-10", "preactresnet8"] | None = None  # network
    width: int | None = None  # channels of the first stage (None: 64, 160 and 16, in the order above)
    epochs: int | None = None  # passes over the training images
    batch_size: int = 128  # images a step
    lr: float | None = None  # peak learning rate of SGD with Nesterov momentum 0.9
    milestones: tuple[int, ...] | None = None  # epochs after which lr falls to a tenth, e.g. 75 90; none: one cycle
    weight_decay: float = 5e-4  # L2 penalty on all weights
    # --- Threat model
    eps: data.Pixels = 8 / 255  # radius of the attacks. 0: undefended network
    step_size: data.Pixels | None = None  # step of the training attack (None: 2.5 eps / steps: 2/255 for 10 steps)
    attack_steps: int | None = None  # steps K of the training attack, each one more pass of the network
    norm: Literal["linf", "l2"] = "linf"  # norm that eps bounds
    eps_warmup_epochs: float | None = None  # epochs over which the training eps rises from 0
    # --- Method
    method: Literal["at", "alp", "aalp"] = "aalp"  # sets what is None of the next three; at: no pairing, lambda 0
    pairing_weight: float | None = None  # lambda; it multiplies a mean over the classes, where others have a sum
    guided_dropout: Literal["low", "high", "random", "none"] | None = None  # which contributions are thinned out
    sample_weight: Literal["clean", "adv", "min", "conflict", "none"] | None = None  # w, what relaxes the pairing
    dropout_ratio: float = 0.5  # r, share of a sample's features that guided dropout selects
    dropout_prob: float = 0.5  # p, probability of a selected feature to be zeroed
    dropout_label: Literal["true", "predicted"] = "true"  # the class that the contributions are for
    control_of: str | None = None  # ALP at lambda * mean(w) of this AALP run: is less pairing all that AALP does?


# An argument left at None takes its value here.
FAST = dict(arch="preactresnet18", attack_steps=10, lr=0.1, eps_warmup_epochs=0.0, epochs=30, milestones=(),
            pairing_weight=0.5)
PAPER = {**FAST, "epochs": 100, "milestones": (75, 90)}
DIGITS = {**FAST, "arch": "preactresnet8", "attack_steps": 5, "eps_warmup_epochs": 4.0, "epochs": 12,
          "pairing_weight": 1.0, "test_size": 500}
PRESETS = {
    "digits": {"fast": DIGITS, "paper": DIGITS},
    "cifar10": {"fast": FAST, "paper": PAPER},
    "cifar100": {"fast": FAST, "paper": PAPER},
    "svhn": {"fast": {**FAST, "lr": 0.05, "eps_warmup_epochs": 5.0},  # at full eps from the start it predicts one class
             "paper": {**PAPER, "lr": 0.01}},
    "tiny-imagenet": {"fast": FAST, "paper": PAPER},
}
METHODS = {  # what --method sets, and nothing else: the ablation is `--method alp --guided-dropout low` and so on
    "at": dict(pairing_weight=0.0, guided_dropout="none", sample_weight="none"),
    "alp": dict(guided_dropout="none", sample_weight="none"),
    "aalp": dict(guided_dropout="low", sample_weight="clean"),
}


# --- Network

ARCHS = {  # base width; channels of stem and stages in multiples of it; blocks per stage; strides of stem and stages
    "preactresnet18": (64, 1.0, (1, 2, 4, 8), 2, (1, 1, 2, 2, 2)),  # He et al. 2016, arXiv 1603.05027
    "wrn-34-10": (160, 0.1, (1, 2, 4), 5, (1, 1, 2, 2)),  # Zagoruyko & Komodakis 2016, arXiv 1605.07146
    "preactresnet8": (16, 1.0, (1, 2, 4), 1, (2, 1, 2, 2)),  # small and fast, for the embedded data
}


class PreActBlock(nn.Module):
    """Pre-activation residual block. `extra`: further inputs of the normalisation layers (plain BatchNorm has none)."""

    def __init__(self, in_channels, channels, stride, norm):
        super().__init__()
        self.bn1, self.bn2 = norm(in_channels), norm(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same_shape = in_channels == channels and stride == 1
        self.shortcut = None if same_shape else nn.Conv2d(in_channels, channels, 1, bias=False)
        self.stride = stride

    def forward(self, x, *extra):
        out = F.relu(self.bn1(x, *extra))
        # Every stride-th pixel, then the 1x1 convolution: one with a stride and few channels writes past its memory on
        # a CPU (github.com/uxlfoundation/oneDNN/issues/6035).
        shortcut = x if self.shortcut is None else self.shortcut(F.avg_pool2d(out, 1, self.stride))
        out = F.relu(self.bn2(self.conv1(out), *extra))
        return self.conv2(out) + shortcut


class PreActResNet(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to logits (N, classes). `norm(channels)` makes a normalisation layer."""

    def __init__(self, arch, width, classes, norm=nn.BatchNorm2d):
        super().__init__()
        base, stem, stages, blocks, strides = ARCHS[arch]
        width = width or base
        channels = max(round(stem * width), 1)
        self.conv = nn.Conv2d(3, channels, 3, strides[0], 1, bias=False)
        self.blocks = nn.ModuleList()
        for multiple, stride in zip(stages, strides[1:]):
            for i in range(blocks):
                self.blocks.append(PreActBlock(channels, multiple * width, stride if i == 0 else 1, norm))
                channels = multiple * width
        self.bn = norm(channels)
        self.fc = nn.Linear(channels, classes)

    def maps(self, x, *extra):
        """Feature maps (N, channels, h, w) of the last convolution, after BatchNorm and ReLU."""
        out = self.conv((x - 0.5) / 0.25)  # normalisation is inside the network, so that eps always means pixels
        for block in self.blocks:
            out = block(out, *extra)
        return F.relu(self.bn(out, *extra))

    def features(self, x, *extra):
        """Pooled features (N, channels), input of the last layer."""
        return self.maps(x, *extra).mean((2, 3))

    def forward(self, x, return_features=False):
        features = self.features(x)
        logits = self.fc(features)
        return (logits, features) if return_features else logits


# --- Method
# paper        here                       meaning
# x, x'        x, x_adv                   an image, and its PGD example
# z, z'        z, z_adv                   their logits (N, C), C classes
# f            features                   pooled features (N, d), input of the last linear layer, whose weights are W
# c            contributions              what each feature adds to the logit of the class (N, d)
# r, p         args.dropout_ratio, _prob  share of the features selected, and how likely each of these is zeroed
# lambda, w    args.pairing_weight, w     weight of the pairing, and its factor for each sample
# O1, O2       concentration, conflicts   the paper's two observations
# D1, D2, ...  docs/aalp.md               our decisions where the abstract leaves the choice open


def contributions(features, weight, y):
    """c_k = W[y, k] f_k, (N, d): gradient times activation in closed form; they sum to z_y - b_y.  [D2]"""
    return weight[y] * features


def guided_dropout(c, args, generator):
    """Factors for the features (N, d). In each sample the share r with the lowest contributions is selected, and each
    of these zeroed with probability p or else scaled by 1/(1-p). `high` and `random` select others.  [D3]
    """
    if args.guided_dropout == "random":
        score = torch.rand(c.shape, device=c.device, generator=generator)
    else:
        score = c if args.guided_dropout == "low" else -c
    selected = score.topk(round(args.dropout_ratio * c.shape[1]), largest=False).indices
    kept = torch.rand(c.shape, device=c.device, generator=generator) >= args.dropout_prob
    kept = kept.float() / max(1 - args.dropout_prob, 1e-9)  # with p = 1 none is kept
    return torch.ones_like(kept).scatter(1, selected, kept.gather(1, selected))


def logit_gradients(z, z_adv, y, pairing_weight):
    """Gradients of both parts of a sample's loss with respect to its clean logits: g_ce, g_lp (N, C).

    From logits (N, C), labels (N,), and lambda w as `pairing_weight`, a number or (N, 1).

    Of the clean branch alone: over both, <g_ce, g_lp> is proportional to (p' - p).(z' - z) and never negative.  [D5]
    """
    g_ce = 0.5 * (z.softmax(1) - F.one_hot(y, z.shape[1]))  # half, as in aalp_loss
    return g_ce, 2 * pairing_weight / z.shape[1] * (z - z_adv)


def conflicts(ce_lp, ce_ce):
    """O2 from <g_ce, g_lp> and <g_ce, g_ce> (N,): does the pairing work against the classification, and does it win?

    A pairing with <g_ce, g_ce + g_lp> < 0 is over-emphasised: a step along both would raise the cross-entropy.  [D5]
    """
    edge = -1e-5 * ce_ce  # `--sample-weight conflict` puts samples on the boundary: rounding must not count
    return {"conflicting": ce_lp < 0, "overemphasised": ce_lp + ce_ce < edge}


def sample_weights(z, z_adv, y, args):
    """w (N,) from unmasked logits, without a gradient: a network must not gain by being unsure.  [D4]"""
    z, z_adv = z.detach(), z_adv.detach()
    clean, adv = (logits.softmax(1).gather(1, y[:, None]).squeeze(1) for logits in (z, z_adv))
    if args.sample_weight == "conflict":  # the largest weight up to 1 that is not over-emphasised on the clean logits
        g_ce, g_lp = logit_gradients(z, z_adv, y, args.pairing_weight)
        against = -(g_ce * g_lp).sum(1)
        return torch.where(against <= 0, 1, (g_ce.square().sum(1) / against.clamp_min(1e-30)).clamp(max=1))
    weights = {"clean": clean, "adv": adv, "min": torch.minimum(clean, adv), "none": torch.ones_like(clean)}
    return weights[args.sample_weight]


def aalp_loss(z, z_adv, y, w, args):
    """mean_i [CE(z_i, y_i) / 2 + CE(z'_i, y_i) / 2 + lambda w_i ||z_i - z'_i||^2 / C], and its terms unweighted.

    ALP (Kannan et al. 2018, arXiv 1803.06373) is w = 1, with a gradient into both branches; lambda = 0 is mixed
    adversarial training.  [D1]
    """
    pairing = (z - z_adv).square().mean(1)
    terms = {"clean_ce": F.cross_entropy(z, y), "robust_ce": F.cross_entropy(z_adv, y), "pairing": pairing.mean()}
    loss = 0.5 * terms["clean_ce"] + 0.5 * terms["robust_ce"] + args.pairing_weight * (w * pairing).mean()
    return loss, terms


def control(run, dataset):
    """lambda * mean(w) of a finished AALP run on the same data set.  [D6]"""
    try:
        results = json.loads(Path(run, "results.json").read_text())
        own, weight = results["dataset"], float(results["method"]["mean_pairing_weight"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise data.UserError(f"--control-of {run}: not the folder of a finished run of {SCRIPT}.py ({error})") from None
    if own.removesuffix("-unofficial") != dataset or weight == 0:
        raise data.UserError(f"--control-of {run}: a run on {own} with mean pairing weight {weight:g} needs no control "
                             f"on {dataset}")
    return weight


def build(args, classes):
    """The network, untrained: `load` fills it from a checkpoint."""
    return PreActResNet(args.arch, args.width, classes)


# --- Evaluation

ATTACKS = {  # columns of the final table, as settings of survivors()
    "fgsm": dict(steps=1, relative_step=1.0, random_start=False),
    "pgd20": dict(steps=20),
    "pgd50_margin": dict(steps=50, loss="margin", restarts=5),  # robustness to cross-entropy alone is no evidence
    "targeted": dict(steps=20, targets=9),  # towards each of the nine likeliest wrong classes
}


def evaluate(net, x, y, eps, norm, others=(), batch_size=None):
    """Accuracies of the final table, from counts over all of x. First `worst`, their per-example minimum.

    `others` are models to transfer from: the column `transfer` is PGD-20 with both losses on each of them.
    """
    clean = survivors(net, x, y, eps=0, steps=0, batch_size=batch_size)
    attack = partial(survivors, net, x, y, clean, eps=eps, norm=norm, batch_size=batch_size)
    alive = {"clean": clean, **{name: attack(**settings) for name, settings in data.track(ATTACKS.items(), "attacks")}}
    if others:
        masks = [attack(steps=20, loss=loss, source=other) for other in others for loss in ("ce", "margin")]
        alive["transfer"] = torch.stack(masks).all(0)
    alive = {"worst": torch.stack([*alive.values()]).all(0), **alive}
    return {name: mask.sum().item() / len(y) for name, mask in alive.items()}


def concentration(c):
    """O1, of contributions (N, d): how few features carry the class.

    n50 (N,): how many features contribute more than half of the largest contribution. n90 (N,): the fewest features
    that make up 90 % of the sum of positive contributions.
    """
    c = c.clamp_min(0)
    sums = c.sort(1, descending=True).values.cumsum(1)
    n90 = (sums < 0.9 * sums[:, -1:]).sum(1) + (sums[:, -1] > 0)
    return {"n50": (c > 0.5 * c.amax(1, keepdim=True)).sum(1), "n90": n90}


def observe(net, x, y, eps, args):
    """O1 and O2 on images (N, 3, H, W), in eval mode, and on their PGD-10 examples, as numbers: counts of features, and
    shares of samples.  [D5]"""
    x_adv = pgd10(net, x, y, eps, args.norm)
    result, logits = {}, []
    for kind, images in (("clean", x), ("adv", x_adv)):
        with torch.no_grad():
            maps = net.maps(images)
            logits.append(net.fc(maps.mean((2, 3))))
            c_maps = net.fc.weight[y][:, :, None, None] * maps / maps[0, 0].numel()  # their sums are those of features
        for level, c in (("features", c_maps.sum((2, 3))), ("map", c_maps.flatten(1))):
            result |= {f"{k}_{level}_{kind}": v.float().mean().item() for k, v in concentration(c).items()}
    lambda_w = args.pairing_weight * sample_weights(*logits, y, args)
    g_ce, g_lp = logit_gradients(*logits, y, lambda_w[:, None])
    products = {"logits": ((g_ce * g_lp).sum(1), g_ce.square().sum(1))}
    params, rows = [p for p in net.parameters() if p.requires_grad], []
    for i in range(min(len(x), 64)):  # one at a time: gradients of samples, not of their mean
        z = net.fc(net.features(torch.stack([x[i], x_adv[i]])))
        ce, pairing = F.cross_entropy(z, y[i].repeat(2)), lambda_w[i] * (z[0] - z[1]).square().mean()
        g_ce, g_lp = (torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=v is ce)])
                      for v in (ce, pairing))
        rows.append(torch.stack([g_ce @ g_lp, g_ce @ g_ce]))
    products["parameters"] = torch.stack(rows, 1)
    for level, (ce_lp, ce_ce) in products.items():
        result |= {f"{k}_{level}": v.float().mean().item() for k, v in conflicts(ce_lp, ce_ce).items()}
    return result


def measure(net, x, y, eps, args):
    """Accuracy against the strength of the attack, and the two observations on test images."""
    return {"curves": {"model": robustness_curve(net, x, y, eps, args.norm)},
            "test": observe(net, x[:256], y[:256], eps, args)}


def load(run, device="cpu", name="best.pt"):
    """(net, args, state) of the checkpoint `name` in a run's folder, or of a .pt file; net in eval mode."""
    with data.checkpoint_of(run, name, SCRIPT, device) as state:
        args = Args(**state["args"])
        net = build(args, state["classes"])
        net.load_state_dict(state["net"])
    return data.to_device(net, device).eval(), args, state


if __name__ == "__main__":
    # Arguments. A run that is continued or evaluated brings its own; for a new one folder, net and state are None.
    distributed.start()  # with torchrun: one process for each GPU
    args, folder, net, state = data.arguments(Args, __doc__, load)
    if args.control_of and not state:
        if args.pairing_weight is not None or args.sample_weight is not None or args.method == "at":
            raise data.UserError("--control-of is ALP with a --pairing-weight of its own, the same for all samples: "
                                 "leave out --pairing-weight, --sample-weight and --method at")
        args = replace(args, method="alp", pairing_weight=control(args.control_of, args.dataset))
    preset = {**PRESETS[args.dataset][args.preset], **METHODS[args.method]}  # a method's own value goes first
    preset = {k: v for k, v in preset.items() if getattr(args, k) is None}
    args = replace(args, **preset)
    if not state:
        unused = ["step_size"] * (args.eps == 0) + ["dropout_ratio", "dropout_prob"] * (args.guided_dropout == "none")
        unused += ["dropout_label"] * (args.guided_dropout in ("none", "random"))
        unused += ["sample_weight"] * (args.pairing_weight == 0 and "sample_weight" not in preset)
        data.refuse_unused(args, *unused)
    data.check(args, pairing_weight=(0, math.inf), dropout_ratio=(0, 1), dropout_prob=(0, 1))

    # Data, network, optimiser.
    device = data.device(args.device)
    d = data.load_as(args, device, state=state)
    x_val, y_val, x_test, y_test = data.to_float(d.val.x), d.val.y, data.to_float(d.test.x), d.test.y
    torch.manual_seed(args.seed)
    net = data.to_device(net if state else build(args, len(d.classes)), device)
    if args.compile:
        net.compile(dynamic=False)  # a graph for each batch size: one for all sizes would be slower
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, nesterov=True, fused=True,
                                weight_decay=args.weight_decay)
    x_seen, y_seen = data.to_float(d.train.x[:256].to(device)), d.train.y[:256]  # from the training split  [D5]
    eps_test = args.eps or usual_eps(args.norm)  # an undefended network is tested like the others
    choose_by = "val/robust_acc" if args.eps else "val/clean_acc"  # the best epoch

    # Training.
    run = data.Run(SCRIPT, args, d, {"net": net, "optimizer": optimizer}, args.epochs, preset, folder, state)
    for epoch in range(run.progress["epoch"], 0 if args.eval_only else args.epochs):
        started, sums, weights = time.time(), defaultdict(float), []
        data.tune(True)  # searching for fast convolutions pays in training, with its few batch sizes
        # All randomness follows from (seed, epoch); with several processes each draws noise of its own.
        generator = torch.Generator(device).manual_seed(distributed.seed(2_000_003 * args.seed + epoch))
        for i, (x, y) in enumerate(data.batches(d.train, args.batch_size, seed=args.seed, epoch=epoch, **d.augment)):
            t = epoch + (i + 0.5) / run.steps  # epochs, at the middle of the step
            if args.milestones:
                factor = 0.1 ** sum(t >= m for m in args.milestones)
            else:  # one cycle: up for 30 % of the steps, then down to 0
                factor = min(t / args.epochs / 0.3, (1 - t / args.epochs) / 0.7)
            optimizer.param_groups[0]["lr"] = factor * args.lr
            net.eval()  # the attack sees the running statistics, as at test time, and moves none of them
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                rise = min(1.0, t / args.eps_warmup_epochs) if args.eps_warmup_epochs else 1.0
                step_size = args.step_size or 2.5 * args.eps / args.attack_steps
                x_adv = pgd(net, x, y, eps=rise * args.eps, step_size=rise * step_size,
                            steps=args.attack_steps if args.eps else 0, norm=args.norm, generator=generator)
                net.train()
                # Both halves in one batch: they share the BatchNorm statistics, as in the code of ALP's authors.
                logits, features = net(torch.cat([x, x_adv]), return_features=True)
                z, z_adv = logits.float().chunk(2)
                masked, masked_adv = z, z_adv  # until dropout makes another pair
                w = sample_weights(z, z_adv, y, args)
                if args.guided_dropout != "none":
                    label = y if args.dropout_label == "true" else z.argmax(1)
                    c = contributions(features[: len(x)].detach(), net.fc.weight.detach(), label)
                    mask = guided_dropout(c, args, generator)
                    # The same mask for x and x': the pairing compares one sub-network with itself.
                    masked, masked_adv = net.fc(features * mask.repeat(2, 1)).float().chunk(2)
                loss, terms = aalp_loss(masked, masked_adv, y, w, args)
            optimizer.zero_grad()
            loss.backward()
            distributed.average_gradients(optimizer)
            optimizer.step()
            for k, v in terms.items():  # the sums stay on the device: reading one here would stall it
                sums[f"losses/{k}"] += v.detach() / run.steps
            for k, v in (("train/clean", z), ("train/robust", z_adv), ("aalp/masked", masked)):
                sums[f"{k}_acc"] += (v.argmax(1) == y).float().mean() / run.steps
            weights.append(w)
            run.bar.update()
        scalars = data.means(sums, epoch, args.lr)
        scalars["aalp/label_leak"] = scalars.pop("aalp/masked_acc") - scalars["train/clean_acc"]  # through the mask
        distributed.average_statistics(net)
        seconds = time.time() - started
        data.tune(False)

        # Validation, and the paper's two observations on images of the training split.
        net.eval()
        val = validate(net, x_val, y_val, eps_test, args.norm)
        weights = distributed.gather(torch.cat(weights))
        seen = observe(net, x_seen, y_seen, eps_test, args) | {"sample_weight": weights.mean().item()}
        also = {"label_leak": scalars["aalp/label_leak"], "weight_bins": torch.histc(weights, 20, 0, 1).tolist()}
        x_few, y_few = x_val[:256], y_val[:256]
        x_adv = pgd10(net, x_few, y_few, eps_test, args.norm)
        scalars |= val | {"charts/learning_rate": factor * args.lr}
        scalars |= {f"attack/{k}": v for k, v in attack_metrics(net, x_few, y_few, x_adv).items()}
        scalars |= {f"aalp/{k}": v for k, v in seen.items()}
        # A tag of its own: under the scalar's a histogram would hide it.
        run.writer.add_histogram("aalp/sample_weights", weights, (epoch + 1) * run.steps)
        run.end_epoch(seconds, val[choose_by], scalars, attack_images(x_few, x_adv), seen | also)

    # Final evaluation: the test split, for the first and only time.
    data.tune(False, exact=True)
    table = {}
    for names, state in run.checkpoints_to_test(eps_test):  # the best, then the last
        net.load_state_dict(state["net"])
        if not table:  # what the method is about: of the best alone
            method = measure(net, x_test, y_test, eps_test, args)
        row = evaluate(net, x_test, y_test, eps_test, args.norm)
        table |= dict.fromkeys(names, {"epoch": state["epoch"], **row})  # the best may be the last
    tested, weights = method["test"], state["history"].get("sample_weight", [])
    method |= {"history": state["history"],
               "mean_pairing_weight": args.pairing_weight * sum(weights) / max(len(weights), 1)}
    o1, o2 = ("n50_features", "n90_features", "n50_map", "n90_map"), ("conflicting", "overemphasised")
    lines = [("O1, test", "clean", "adversarial"), *((k, tested[k + "_clean"], tested[k + "_adv"]) for k in o1), (),
             ("O2, test", "logits", "parameters"), *((k, tested[k + "_logits"], tested[k + "_parameters"]) for k in o2)]
    run.publish(eps_test, state, table, method, lines)
    distributed.finish()
