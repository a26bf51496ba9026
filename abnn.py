"""ABNN, Adaptive Batch Normalization Networks: a defense without adversarial training. A frozen substitute network sees
the same input and sends the statistics of its features to batch normalization layers of the network that classifies.

Shao-Yuan Lo and Vishal M. Patel, "Adaptive Batch Normalization Networks for Adversarial Robustness",
https://arxiv.org/abs/2405.11708

    python abnn.py                                       # embedded images, a few minutes on two CPU cores
    python abnn.py --dataset moving-digits               # embedded video
    python abnn.py --dataset cifar10 --bf16 --compile    # ResNet-18, the substitute trained on CIFAR-100, on a GPU

Embedded images, 8/255, 3 seeds: an attacker who ignores the gradient through the substitute leaves 30.7 % right, one
who follows it 0.0 %. Clean 96.5 %, adversarial training 88.5 %. Embedded video, 4/255: 91.2 and 0.4 %.
"""

import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, distributed
from common.pgd import above, attack_images, attack_metrics, frame_mask, in_a_pass, likeliest_wrong
from common.pgd import masked_attack, pgd, pgd10, robustness_curve, survivors, unbroken, universal, validate

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    # --- Run
    dataset: Literal["digits", "cifar10", "cifar100", "svhn", "tiny-imagenet", "moving-digits", "ucf101"] = "digits"
    """digits and moving-digits (video) are embedded; ucf101 is video too, and needs torchcodec"""
    preset: Literal["fast", "paper"] = "fast"  # paper: the literature's length; ucf101: clips of 40 frames, not 16
    data_dir: str = "data"  # folder of the data sets in their standard layout; downloads go there
    runs_dir: str = "runs"  # folder of the runs' folders, and of the trained substitutes: tensorboard --logdir runs
    seed: int = 1  # seed of everything random
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    bf16: bool = False  # train, and attack in training, under bfloat16 autocast; evaluation is float32
    compile: bool = False  # torch.compile the network for training: a minute or more of compiling, then faster on a GPU
    resume: str | None = None  # continue the run in this folder, with its own arguments
    eval_only: str | None = None  # evaluate a run's folder, into eval.json, or a NAME.pt, into eval_NAME.json
    # --- Data
    train_size: int | None = None  # training images or clips (None: all that validation leaves)
    val_size: int = 1000  # validation images or clips, held out of the training split
    test_size: int | None = None  # test images or clips (None: all; of digits 200, moving-digits 80, ucf101 500)
    data_on: Literal["auto", "device", "host"] = "auto"  # where training data are kept; auto: host above 60 % of a GPU
    frames: int | None = None  # frames of a clip
    split: Literal[1, 2, 3] = 1  # official split of ucf101
    # --- Optimisation
    arch: Literal["preactresnet18", "wrn-34-10", "preactresnet8", "r3d18", "conv3d"] | None = None
    """network; the last two are for video"""
    width: int | None = None  # channels of the first stage (None: 64, 160, 16 and 8 of conv3d; r3d18 has its own)
    epochs: int | None = None  # passes over the training data
    batch_size: int | None = None  # images or clips a step
    lr: float | None = None  # peak learning rate of SGD with Nesterov momentum 0.9; the maps M have a tenth
    milestones: tuple[int, ...] | None = None  # epochs after which lr falls to a tenth, e.g. 75 90; none: one cycle
    weight_decay: float | None = None  # L2 penalty on all weights
    # --- Threat model
    eps: data.Pixels | None = None  # radius of PGD, in adversarial training and in the test
    step_size: data.Pixels | None = None  # step of the training attack (None: 2.5 eps / steps: 2/255 for 10 steps)
    attack_steps: int | None = None  # steps K of the training attack, for --defense at
    norm: Literal["linf", "l2"] = "linf"  # norm that eps bounds
    eps_warmup_epochs: float | None = None  # epochs over which the training eps rises from 0, for --defense at
    attack_strength: Literal[1, 2, 4] = 1  # size of squares, frames and salt-and-pepper noise in the test
    # --- Method
    defense: Literal["none", "at", "abnn"] = "abnn"  # at: PGD adversarial training, the paper's baseline
    substitute: str | None = None  # what S was trained on: self (the same data), another data set, imagenet or kinetics
    clean_epochs: int | None = None  # epochs of clean training that each defense starts from: of T, and of S
    statistics: Literal["flat", "channel"] | None = None
    """what M sees of S: all its features, as the authors do, or the mean and std of each channel"""
    moments: Literal["sample", "batch"] = "sample"  # mean and std of one sample, or of the batch as the authors do
    equalised: bool = True  # M has variance 1 and a factor in front, as the authors' has: SGD hardly moves it
    align_weight: float = 0.0  # weight of a loss that pulls T's statistics towards those of S


# An argument left at None takes its value here.
FAST = dict(arch="preactresnet18", frames=1, epochs=30, batch_size=128, lr=0.05, milestones=(), weight_decay=5e-4,
            eps=8 / 255, attack_steps=10, eps_warmup_epochs=0.0, clean_epochs=30, statistics="flat",
            substitute="cifar100")
PAPER = {**FAST, "epochs": 100, "clean_epochs": 100, "milestones": (75, 90)}
DIGITS = {**FAST, "arch": "preactresnet8", "epochs": 8, "clean_epochs": 6, "eps_warmup_epochs": 3.0,
          "attack_steps": 5, "test_size": 200, "substitute": "self"}
MOVING = {**DIGITS, "arch": "conv3d", "frames": 8, "epochs": 4, "batch_size": 64, "lr": 0.02, "eps": 4 / 255,
          "test_size": 80, "statistics": "channel", "eps_warmup_epochs": 2.0}  # at lr .05 one S of four learned nothing
UCF101 = {**FAST, "arch": "r3d18", "frames": 16, "epochs": 10, "clean_epochs": 10, "batch_size": 16, "lr": 1e-3,
          "milestones": (7,), "weight_decay": 1e-5, "eps": 4 / 255, "statistics": "channel", "substitute": "kinetics",
          "test_size": 500}
TINY_IMAGENET = {"statistics": "channel"}  # flat maps for 64x64 images would have 170 million weights  [D2]
PRESETS = {
    "digits": {"fast": DIGITS, "paper": DIGITS},
    "cifar10": {"fast": FAST, "paper": PAPER},
    "cifar100": {"fast": {**FAST, "substitute": "cifar10"}, "paper": {**PAPER, "substitute": "cifar10"}},
    "svhn": {"fast": {**FAST, "eps_warmup_epochs": 5.0}, "paper": {**PAPER, "eps_warmup_epochs": 5.0}},
    "tiny-imagenet": {"fast": {**FAST, **TINY_IMAGENET}, "paper": {**PAPER, **TINY_IMAGENET}},
    "moving-digits": {"fast": MOVING, "paper": MOVING},
    "ucf101": {"fast": UCF101, "paper": {**UCF101, "frames": 40, "batch_size": 8, "test_size": None}},
}
SIDES = {"tiny-imagenet": 64, "ucf101": 112}  # pixels a side; of the others 32
# Side of ROA's square, width of AF's frame, number of SPA's pixels at --attack-strength 1: for 112x112 the authors' 30,
# 5 and 100, and in proportion for smaller images; larger where an undefended network withstands that.  [D6]
ATTACK_SIZES = {"digits": (14, 2, 64), "moving-digits": (9, 1, 32), "ucf101": (30, 5, 100),
                "tiny-imagenet": (17, 3, 33)}  # of the others (9, 1, 16)
PRETRAINED = {"imagenet": ("resnet18", "ResNet18_Weights.IMAGENET1K_V1"),
              "kinetics": ("r3d18", "R3D_18_Weights.KINETICS400_V1")}  # architecture, torchvision's weights


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


class GroupNet(nn.Module):
    """Five groups, pooling, a linear layer: (N, 3, [frames,] H, W) in [0, 1] to logits (N, classes).

    r3d18 and resnet18 are torchvision's, pretrained if `weights` are given, with a new last layer; conv3d, five
    convolutions, is small and fast, for the embedded video.
    """

    def __init__(self, arch, width, classes, weights=None):
        super().__init__()
        video = arch != "resnet18"
        mean, std = {"resnet18": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # those of the pretraining data
                     "r3d18": ((0.432, 0.395, 0.376), (0.228, 0.221, 0.217))}.get(arch, ([0.5], [0.25]))
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, *[1] * (2 + video)), persistent=False)
        if arch == "conv3d":
            channels = [3, *((width or 8) * multiple for multiple in (1, 2, 4, 8, 8))]
            layers = zip(channels, channels[1:], [(1, 2, 2), 1, (1, 2, 2), 2, 2])
            self.groups = nn.ModuleList(nn.Sequential(nn.Conv3d(a, b, 3, stride, 1, bias=False), nn.BatchNorm3d(b),
                                                      nn.ReLU()) for a, b, stride in layers)
        else:
            import torchvision  # here, as in data.environment

            net = torchvision.models.get_model(arch.replace("r3d", "r3d_"), weights=weights)
            stem = net.stem if video else nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            self.groups = nn.ModuleList([stem, net.layer1, net.layer2, net.layer3, net.layer4])
        self.fc = nn.Linear(channels[-1] if arch == "conv3d" else 512, classes)

    def stem(self, x):
        return self.groups[0]((x - self.mean) / self.std)

    def head(self, z):
        return self.fc(z.flatten(2).mean(2))

    def forward(self, x):
        x = self.stem(x)
        for group in self.groups[1:]:
            x = group(x)
        return self.head(x)


def plain_network(arch, width, classes):
    return PreActResNet(arch, width, classes) if arch in ARCHS else GroupNet(arch, width, classes)


def network_of_s(args):
    """(architecture, width) of S: of the weights that torchvision has, or those of T."""
    return (PRETRAINED[args.substitute][0], None) if args.substitute in PRETRAINED else (args.arch, args.width)


def groups_of(net, arch):
    """The groups of a network as functions, with a tap after each, and its head: head(group5(... group1(x))) is net(x).

    Stem and four stages; preactresnet8 and wrn-34-10 have three stages, and four taps.
    """
    if isinstance(net, GroupNet):
        return [net.stem, *net.groups[1:]], net.head

    def stem(net, x):
        return net.conv((x - 0.5) / 0.25)

    def head(net, z):
        return net.fc(F.relu(net.bn(z)).mean((2, 3)))

    n = ARCHS[arch][3]
    stages = [nn.Sequential(*net.blocks[i : i + n]) for i in range(0, len(net.blocks), n)]
    return [partial(stem, net), *stages], partial(head, net)  # in a closure a deep copy would keep the old network


# --- Method
# paper          here                      meaning
# T, S           target, substitute        the network that classifies, and the frozen one that sends statistics
# z_t, z_s       z, s                      features of the same group of T and of S (N, C, [frames,] H, W)
# f              f                         z_s, a row per sample (N, D), or the statistics of its channels
# M, b           AdaptiveBN.weight, .bias  linear map from f to gamma and beta
# A, B, C        rows of the final table   threat models: gradient through T alone, from T's plain twin, through both
# D1, D2, ...    docs/abnn.md              our decisions where the paper leaves the choice open


def channel_moments(v):
    """Mean and variance (N, C) of each channel of v (N, C, ...), in float32."""
    v, dims = v.float(), tuple(range(2, v.ndim))
    mean = v.mean(dims, keepdim=True)
    return mean.flatten(1), (v - mean).square().mean(dims)  # on small maps a CPU's torch.var is ten times slower


def mean_std(mean, var, positions, moments):
    """Mean and unbiased standard deviation of each sample (N, 1), or of the batch (1, 1).  [D3]

    From the mean and variance (N, C) of channels of `positions` values each: the variance of all the values is the mean
    of the channels' variances plus the variance of their means.
    """
    dims = 1 if moments == "sample" else (0, 1)
    whole = mean.mean(dims, keepdim=True)
    n = mean.numel() // whole.numel() * positions  # values in a sample, or in the batch
    var = (var.mean(dims, keepdim=True) + (mean - whole).square().mean(dims, keepdim=True)) * n / max(n - 1, 1)
    return whole, root(var)


def root(var):
    return var.clamp_min(1e-12).sqrt()  # at 0 (a channel that is off) the gradient of sqrt is infinite


class AdaptiveBN(nn.Module):
    """v = std(z_s) BN(z_t) + mean(z_s);  [gamma, beta] = M f + b;  z_t' = gamma v + beta, per sample and channel.

    M starts with variance 2 / D: gamma around 1 and beta around 0, both already noisy with f. Equalised, the weights
    have variance 1 and are scaled where they are used: a step of SGD then moves M by 2 / D of what it otherwise would,
    next to nothing.  [D5] `shape` is that of one sample's z_s.
    """

    def __init__(self, channels, shape, statistics, moments, equalised=True):
        super().__init__()
        self.statistics, self.moments = statistics, moments
        self.bn = (nn.BatchNorm3d if len(shape) == 4 else nn.BatchNorm2d)(channels)
        d = math.prod(shape) if statistics == "flat" else 2 * shape[0]
        std = (2 / d) ** 0.5
        self.weight = nn.Parameter(torch.randn(2 * channels, d) * (1 if equalised else std))
        self.factor = std if equalised else 1
        self.bias = nn.Parameter(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, z, s):
        """z (N, C, [frames,] h, w) of T and s (N, C_s, [frames,] h_s, w_s) of S to features of the shape of z."""
        mean_c, var_c = channel_moments(s)
        mean, std = mean_std(mean_c, var_c, s[0, 0].numel(), self.moments)
        # channel: statistics in the usual sense of the word, and a few % of the weights  [D2]
        f = s.flatten(1) if self.statistics == "flat" else torch.cat([mean_c, root(var_c)], 1)
        gamma, beta = F.linear(self.factor * f, self.weight, self.bias).chunk(2, 1)  # to scale f is cheaper
        # gamma (std u + mean) + beta as one multiplication and one addition of the large tensor u = BN(z).
        scale, shift = (v.to(z.dtype).view(-1, z.shape[1], *[1] * (z.ndim - 2))
                        for v in (gamma * std, gamma * mean + beta))
        return torch.addcmul(shift, self.bn(z), scale)


class ABNN(nn.Module):
    """T with an adaptive layer after each group, S, and T's plain twin: T as it was before the layers went in.

    S and the twin are frozen and always in eval mode; the twin is there for threat model B alone.  [D4, D5]
    """

    def __init__(self, args, classes):
        super().__init__()
        self.target, self.twin = (plain_network(args.arch, args.width, classes) for _ in range(2))
        self.substitute = plain_network(*network_of_s(args), 1)
        self.substitute.fc = nn.Identity()  # its classifier is not used
        self.groups, self.head = groups_of(self.target, args.arch)
        self.taps, _ = groups_of(self.substitute, args.arch)
        self.norms = nn.ModuleList()
        frames = [args.frames] * (args.dataset in data.VIDEO)
        z = s = torch.zeros(1, 3, *frames, *[SIDES.get(args.dataset, 32)] * 2)
        self.eval()
        with torch.no_grad():  # zeros, for the shapes
            for group, tap in zip(self.groups, self.taps, strict=True):
                z, s = group(z), tap(s)
                self.norms.append(AdaptiveBN(z.shape[1], s.shape[1:], args.statistics, args.moments, args.equalised))
        self.train()
        self.substitute.requires_grad_(False)
        self.twin.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.substitute.eval()
        self.twin.eval()
        return self

    def forward(self, x, detach=False, record=None):
        """Logits (N, classes). `detach`: S sees the same x, but no gradient goes through it (threat model A).

        Appends (z_t, z_s) of each tap to the list `record`.
        """
        z, s = x, x.detach() if detach else x  # S is frozen: with x detached, S needs no gradient
        for group, tap, norm in zip(self.groups, self.taps, self.norms):
            z, s = group(z), tap(s)
            if record is not None:
                record.append((z, s))
            z = norm(z, s)
        return self.head(z)


def distance(record):
    """Sum over the taps of (mean_t - mean_s)^2 + (std_t - std_s)^2, averaged over samples.  [D1]"""
    pairs = [[torch.cat(mean_std(*channel_moments(v), v[0, 0].numel(), "sample"), 1) for v in pair] for pair in record]
    return sum((t - s).square().sum(1).mean() for t, s in pairs)


def training_loss(net, x, y, args, rise=1.0, generator=None):
    """Loss of a batch, its terms unweighted, and the logits; net in training mode.  [D1]

    Cross-entropy on clean images (`none`, `abnn`), or on PGD examples within rise * eps (`at`).
    """
    if args.defense == "at":
        net.eval()  # the attack sees the running statistics, as at test time, and moves none of them
        step_size = args.step_size or 2.5 * args.eps / args.attack_steps
        x = pgd(net, x, y, eps=rise * args.eps, step_size=rise * step_size, steps=args.attack_steps,
                norm=args.norm, generator=generator)
        net.train()
    record = []
    logits = net(x, record=record) if args.defense == "abnn" and args.align_weight else net(x)
    loss = F.cross_entropy(logits.float(), y)
    terms = {"robust_ce" if args.defense == "at" else "clean_ce": loss}
    if record:
        terms["distance"] = distance(record)
        loss = loss + args.align_weight * terms["distance"]
    return loss, terms, logits


def optimizer_of(net, args):
    """SGD; the maps M and b have a tenth of the rate.  [D5]"""
    maps = [p for m in net.modules() if isinstance(m, AdaptiveBN) for p in (m.weight, m.bias)]
    rest = [p for p in net.parameters() if p.requires_grad and not any(p is q for q in maps)]
    groups = [dict(params=rest, peak=args.lr)] + ([dict(params=maps, peak=args.lr / 10)] if maps else [])
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True, weight_decay=args.weight_decay)


def train_epoch(net, optimizer, d, args, epoch, bar=None):
    """Train for an epoch; its randomness follows from (seed, epoch). Means of losses and accuracy, {tag: number}."""
    data.tune(True)  # searching for fast convolutions pays in training, with its few batch sizes
    net.train()
    sums, steps = defaultdict(float), data.steps_per_epoch(len(d.train.y), args.batch_size)
    # With several processes each draws noise of its own.
    generator = torch.Generator(d.train.y.device).manual_seed(distributed.seed(2_000_003 * args.seed + epoch))
    of_video = dict(frames=args.frames) if args.dataset in data.VIDEO else {}
    batches = data.clip_batches if of_video else data.batches
    for i, (x, y) in enumerate(batches(d.train, args.batch_size, seed=args.seed, epoch=epoch, **d.augment, **of_video)):
        t = epoch + (i + 0.5) / steps  # epochs, at the middle of the step
        if args.milestones:
            factor = 0.1 ** sum(t >= m for m in args.milestones)
        else:  # one cycle: up for 30 % of the steps, then down to 0
            factor = min(t / args.epochs / 0.3, (1 - t / args.epochs) / 0.7)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        rise = min(1.0, t / args.eps_warmup_epochs) if args.eps_warmup_epochs else 1.0
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            loss, terms, logits = training_loss(net, x, y, args, rise, generator)
        optimizer.zero_grad()
        loss.backward()
        distributed.average_gradients(optimizer)
        optimizer.step()
        for k, v in terms.items():  # the sums stay on the device: reading one here would stall it
            sums[f"losses/{k}"] += v.detach() / steps
        name = "train/robust_acc" if args.defense == "at" else "train/clean_acc"
        sums[name] += (logits.argmax(1) == y).float().mean() / steps
        if bar is not None:
            bar.update()
    distributed.average_statistics(net)
    data.tune(False)
    return data.means(sums, epoch, args.lr)


# Where S, and the T that training starts from, come from. To understand the method, go on at `build`.


def pretrained(name, classes):
    """The network of PRETRAINED with the weights that torchvision has for it, and a new last layer."""
    arch, weights = PRETRAINED[name]
    with data.downloading(weights, f"--substitute {name}", "use --substitute self"):
        return GroupNet(arch, None, classes, weights)


def clean_network(args, d, device):
    """A plain network trained on the clean images of d; later calls read it from runs_dir/substitutes.  [D4]

    The file is a checkpoint like those of a run with --defense none.
    """
    args = replace(args, defense="none", epochs=args.clean_epochs)
    start = "kinetics" if (args.substitute, args.arch) == ("kinetics", "r3d18") else None
    kept = ("arch", "width", "epochs", "batch_size", "lr", "milestones", "weight_decay", "train_size", "val_size",
            "bf16", "frames", "split", "seed")  # all that changes the network, beside the data
    key = {"script": SCRIPT, "data": d.name, "start": start, **{k: getattr(args, k) for k in kept}}
    content = (d.train.y, d.train.x if d.kind == "images" else d.train.x[:64])  # all clips would be many bytes to read
    path = data.cache_file(args.runs_dir, "substitutes", f"{d.name}__{args.arch}__{args.seed}", key, content)
    if distributed.agree(path.exists()):
        return load(path, device)[0]
    torch.manual_seed(args.seed)
    net = data.to_device(pretrained(start, len(d.classes)) if start else build(args, len(d.classes)), device)
    if args.compile:
        net.compile(dynamic=False)
    optimizer = optimizer_of(net, args)
    for epoch in range(args.epochs):
        means = train_epoch(net, optimizer, d, args, epoch)
        print(f"clean training of {path.stem}: epoch {epoch + 1}/{args.epochs}, loss {means['losses/clean_ce']:.3f}, "
              f"training accuracy {means['train/clean_acc']:.3f}", flush=True)
    data.save(path, dict(script=SCRIPT, args=asdict(args), classes=len(d.classes), net=net.state_dict(),
                         optimizer=optimizer.state_dict(), epoch=args.epochs, best=-1.0, train_seconds=0.0, history={}))
    return net.eval()


def check_substitute(args):
    """Refuse an S that does not fit T.  [D4]"""
    source, video, arch = args.substitute, args.dataset in data.VIDEO, network_of_s(args)[0]
    images = set(data.READERS) - {args.dataset, *data.VIDEO} if not video else ()
    if source not in ("self", *PRETRAINED, *images):
        raise data.UserError(f"--substitute {source} is not for {args.dataset}: use self"
                             f"{' or kinetics' if video else ', imagenet or another set of images'}")
    if (arch in ("r3d18", "conv3d")) != video:
        raise data.UserError(f"--substitute {source} ({arch}) does not fit {args.dataset}: one is of images, the other "
                             "of video")
    if source == "imagenet" and len(ARCHS[args.arch][2]) < 4:
        raise data.UserError(f"S ({arch}) has 5 groups and T ({args.arch}) has 4: use --arch preactresnet18")
    if source == "self":
        print("note: the substitute learned from the same data as the target: a weaker premise than the paper's, whose "
              "substitute knows other data", flush=True)


def assemble(net, args, d, device):
    """Fill an ABNN with a trained S, and with a T that was trained without the layers.  [D4, D5]"""
    if args.substitute in PRETRAINED:
        substitute = pretrained(args.substitute, 1)
    elif args.substitute == "self":
        substitute = clean_network(replace(args, seed=args.seed + 1000), d, device)
    else:
        args_s = replace(args, dataset=args.substitute, test_size=None)
        substitute = clean_network(args_s, data.load_as(args_s, device), device)
    net.substitute.load_state_dict({k: v for k, v in substitute.state_dict().items() if not k.startswith("fc.")})
    clean = clean_network(args, d, device).state_dict()
    net.target.load_state_dict(clean)
    net.twin.load_state_dict(clean)


def build(args, classes):
    """The network, untrained: `load` fills it from a checkpoint."""
    return ABNN(args, classes) if args.defense == "abnn" else plain_network(args.arch, args.width, classes)


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


# Kinds of attack. Each is PGD; what differs is the mask and the bound. With steps=0 each is its control without a
# gradient: noise in the ball, a grey square, a frame of noise, black pixels.  [D6]
KINDS = ("pgd", "roa", "roa_search", "af", "af_universal", "spa")


def sizes(args):
    """Side of the square, width of the frame, number of pixels: the strength multiplies areas, and widths.  [D6]"""
    square, width, pixels = ATTACK_SIZES.get(args.dataset, (9, 1, 16))
    k = args.attack_strength
    return {"roa": min(round(square * k**0.5), SIDES.get(args.dataset, 32)), "af": k * width, "spa": k * pixels}


def craft(name, source, x, y, args, generator, **how):
    """x_adv for x (N, 3, [frames,] H, W) by one of KINDS on the model `source`: in the ball, or in a mask.  [D6]"""
    if name == "pgd":
        return pgd(source, x, y, eps=args.eps, step_size=args.eps / 4, norm=args.norm, generator=generator,
                   **{"steps": 20, **how})
    return masked_attack(name, source, x, y, sizes(args)[name.split("_")[0]], generator=generator, **how)


def threat_models(net):
    """What each attacker follows the gradient of: A through T alone, B through T's plain twin, C through all.  [D7]"""
    return {"A": partial(net, detach=True), "B": net.twin, "C": net} if isinstance(net, ABNN) else {"C": net}


def transfer_models(net, args):
    """What the column `transfer` is crafted on, in the test and in benchmark/audit.py."""
    return [model for name, model in threat_models(net).items() if name != "C"]


def evaluate_threats(net, x, y, known, args):
    """Accuracies {row: {attack: accuracy}} and warnings; x are floats or uint8.  [D7]

    Rows: `worst`, the per-image minimum of the others; `no gradient`; threat model and loss; `C strong`. All but the
    last attack every image that is right without an attack, at the same positions, so that they can be compared.
    Universal frames are learned on `known` (x, y).
    """
    rows = {"no gradient": (net, dict(steps=0))}
    rows |= {f"{threat} {loss}": (source, dict(loss=loss)) for threat, source in threat_models(net).items()
             for loss in ("ce", "margin")}
    strong = [dict(loss="margin", steps=100)] * 2 + [dict(target=goal) for goal in likeliest_wrong(net, x, y, 9)]
    clean = survivors(net, x, y, eps=0, steps=0)
    table, warnings = {"worst": {"clean": clean.sum().item() / len(y)}}, []
    everything = clean
    for name in data.track(KINDS, "kinds of attack"):
        alive = {}
        for row, (source, how) in rows.items():
            if name == "roa_search" and row == "no gradient":
                continue  # without a gradient there is no search
            generator = torch.Generator(x.device).manual_seed(0)
            if name == "af_universal":
                border = frame_mask(sizes(args)["af"], known[0])
                how = {**how, "frame": universal(source, *known, border, generator=generator, **{"steps": 50, **how})}
            attack = partial(craft, name, source, args=args, generator=generator)
            alive[row] = unbroken(attack, net, x, y, clean, **how)
        white, generator = alive["C ce"] & alive["C margin"], torch.Generator(x.device).manual_seed(1)
        if name != "af_universal":  # more steps, other places and goals, against what the rows before leave
            attack = partial(craft, name, net, args=args, generator=generator, keep_best=True)
            for how in strong:
                white = unbroken(attack, net, x, y, white, **how)
            alive["C strong"] = white
        warnings += [f"{name}: the white box C leaves {white.float().mean():.3f}, but {row} {mask.float().mean():.3f}: "
                     "the attack under C fails, and its accuracy is no evidence"
                     for row, mask in alive.items() if row[0] != "C" and above(white, mask)]
        alive["worst"] = torch.stack([*alive.values()]).all(0)
        everything = everything & alive["worst"]
        for row, mask in alive.items():
            table.setdefault(row, {})[name] = mask.sum().item() / len(y)
    table["worst"]["all"] = everything.sum().item() / len(y)
    return table, warnings


def verdict(table, classes):
    """What the attackers leave, in a plain sentence."""
    clean = table["worst"]["clean"]
    if clean <= 1.5 / classes:
        return f"right on {clean:.3f} without an attack, hardly more than by guessing: there is nothing to defend"
    broken = [name for name in KINDS if table["worst"][name] <= 0.02]
    if not broken:
        least = min(table["worst"][name] for name in KINDS)
        return f"in the worst case over all attackers at least {least:.3f} is left under each attack"
    shown = [row for row in table if row[:2] in ("A ", "B ") and any(table[row][name] > 0.1 for name in broken)]
    return (f"nothing is left in the worst case of {', '.join(broken)}"
            + (f": what the rows {', '.join(shown)} show is attackers who do not follow the gradient through S, not "
               "robustness" if shown else ""))


def measure(net, x, y, known, args, classes):
    """What each attacker leaves; PGD-20 accuracy against eps of the network, under threat model A, and of the twin."""
    models = {"model": net}
    if isinstance(net, ABNN):
        models |= {"A": partial(net, detach=True), "twin": net.twin}
    threats, warnings = evaluate_threats(net, x, y, known, args)
    return {"curves": {name: robustness_curve(model, x, y, args.eps, args.norm) for name, model in models.items()},
            "threats": threats, "warnings": warnings, "verdict": verdict(threats, classes), "sizes": sizes(args)}


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
    args, folder, net, state = data.arguments(Args, __doc__, load, free_in_test=["attack_strength"])
    given, video = args, args.dataset in data.VIDEO
    if not state:
        unused = ["frames"] * (not video) + ["split"] * (args.dataset != "ucf101")
        unused += ["step_size"] * (args.defense != "at")
        if args.defense != "abnn":  # on ucf101 --substitute says where T starts, too  [D5]
            unused += ["substitute"] * (args.dataset != "ucf101" or args.substitute not in ("self", "kinetics"))
            unused += ["statistics", "moments", "equalised", "align_weight"]
        data.refuse_unused(args, *unused)
    args = replace(args, **{k: v for k, v in PRESETS[args.dataset][args.preset].items() if getattr(args, k) is None})
    if args.eps == 0:
        raise data.UserError("--eps 0: here eps is what the test attacks with; an undefended network is --defense none")
    data.check(args, eps=(1e-9, math.inf), frames=(1, math.inf), clean_epochs=(1, math.inf), align_weight=(0, math.inf))
    if (args.arch in ("r3d18", "conv3d")) != video:
        raise data.UserError(f"--arch {args.arch} is not for {args.dataset}: one is of images, the other of video")
    if args.width and args.arch == "r3d18":
        raise data.UserError("r3d18 has a width of its own: leave --width out")
    if args.defense == "abnn" and not state:
        check_substitute(args)
    preset = {k: v for k, v in asdict(args).items() if v != getattr(given, k)}

    # Data, network, optimiser.
    device = data.device(args.device)
    d = data.load_as(args, device, state=state)
    # Both stay uint8; floats are made of a few at a time: of all ucf101 test clips they would take up to 23 GB.
    (x_val, y_val), (x_test, y_test) = d.val, d.test
    if video:
        x_val = data.centre_clips(x_val, args.frames, SIDES.get(args.dataset, 32))
    few = min(256, 2 * in_a_pass(x_val))  # samples to watch training with
    torch.manual_seed(args.seed)
    net = data.to_device(net if state else build(args, len(d.classes)), device)
    if not state and args.defense == "abnn":
        assemble(net, args, d, device)
    elif not state:
        net.load_state_dict(clean_network(args, d, device).state_dict())  # all defenses start from the same T  [D5]
    if args.compile:
        net.compile(dynamic=False)  # a graph for each batch size: one for all sizes would be slower
    optimizer = optimizer_of(net, args)
    choose_by = "val/robust_acc" if args.defense == "at" else "val/clean_acc"  # the best epoch

    # Training.
    run = data.Run(SCRIPT, args, d, {"net": net, "optimizer": optimizer}, args.epochs, preset, folder, state)
    for epoch in range(run.progress["epoch"], 0 if args.eval_only else args.epochs):
        started = time.time()
        scalars = train_epoch(net, optimizer, d, args, epoch, run.bar)
        seconds = time.time() - started

        # Validation under the full white box. Robust accuracy chooses the best epoch only for `at`: otherwise
        # few samples will do.
        net.eval()
        val = validate(net, x_val, y_val, args.eps, args.norm, n=None if args.defense == "at" else few)
        x_few, y_few = data.to_float(x_val[:few]), y_val[:few]
        x_adv = pgd10(net, x_few, y_few, args.eps, args.norm)
        scalars |= val | {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        scalars |= {f"attack/{k}": v for k, v in attack_metrics(net, x_few, y_few, x_adv).items()}
        history = {}
        if args.defense == "abnn":  # how far the statistics of T are from those of S: does it learn to align them?
            for kind, images in (("clean", x_few), ("adv", x_adv)):
                with torch.no_grad():
                    net(images, record=(record := []))
                history[f"distance_{kind}"] = distance(record).item()
        scalars |= {f"abnn/{k}": v for k, v in history.items()}
        run.end_epoch(seconds, val[choose_by], scalars, attack_images(x_few, x_adv), history)

    # Final evaluation: the test split, for the first and only time.
    data.tune(False, exact=True)
    table, others = {}, transfer_models(net, args)
    for names, state in run.checkpoints_to_test(args.eps):  # the best, then the last
        net.load_state_dict(state["net"])
        if not table:  # what the method is about: of the best alone
            known = data.to_float(x_val[: min(100, few)]), y_val[: min(100, few)]
            method = measure(net, x_test, y_test, known, args, len(d.classes))
        row = evaluate(net, x_test, y_test, args.eps, args.norm, others)
        table |= dict.fromkeys(names, {"epoch": state["epoch"], **row})  # the best may be the last
    method["history"], threats = state["history"], method["threats"]
    columns = ("clean", *KINDS, "all")
    lines = [(args.defense, *columns), *((k, *(row.get(name, "") for name in columns)) for k, row in threats.items()),
             (), *((f"warning: {w}",) for w in method["warnings"]), (method["verdict"],)]
    run.publish(args.eps, state, table, method, lines)
    distributed.finish()
