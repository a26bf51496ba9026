"""AFA, Adaptive Feature Alignment: one network for every attack strength. Each BatchNorm becomes two, one for clean
and one for adversarial features, and a small gate predicts for each image how to fuse them.

Kai Zhao et al., "Adaptive Feature Alignment for Adversarial Training", https://arxiv.org/abs/2105.15157

    python afa.py                                       # embedded data, 10 to 15 minutes on two CPU cores
    python afa.py --dataset cifar10 --bf16 --compile    # PreActResNet-18, 30 epochs, on a GPU

Embedded data, 8/255, 3 seeds: 90.3 % clean, 69.6 % under PGD-20, 52.8 % in the worst case (PGD-AT: 87.7, 84.6, 83.8).
With a constant weight for all images in place of the predicted ones: 88.8 % clean, 68.3 % in the worst case.
"""

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
    epochs: int | None = None  # epochs of adversarial training, stage 1
    batch_size: int = 128  # images a step
    lr: float | None = None  # peak learning rate of SGD with Nesterov momentum 0.9
    milestones: tuple[int, ...] | None = None  # epochs after which lr falls to a tenth, e.g. 75 90; none: one cycle
    weight_decay: float = 5e-4  # L2 penalty on all weights
    # --- Threat model
    eps: data.Pixels = 8 / 255  # radius of the attacks; to AFA the largest strength. 0: undefended network
    step_size: data.Pixels | None = None  # step of the training attack (None: 2.5 eps / steps: 2/255 for 10 steps)
    attack_steps: int | None = None  # steps K of the training attack, each one more pass of the network
    norm: Literal["linf", "l2"] = "linf"  # norm that eps bounds
    eps_warmup_epochs: float | None = None  # epochs over which the training eps rises from 0
    # --- Method
    bn: Literal["dual", "single"] = "dual"  # single: plain PGD adversarial training, the baseline
    gate: Literal["probe", "layer"] = "probe"  # w from a first pass along BN_c, or in each layer from its input
    gate_epochs: int | None = None  # epochs of stage 2, which trains the gate. 0: w stays at 0.9
    gate_lr: float = 3e-3  # peak learning rate of Adam in stage 2
    harden: float = 0.25  # share of the attacks of stage 2 with w frozen at 0, 1/2 or 1
    finetune: Literal["gate", "all"] = "gate"  # what stage 2 trains; the network at a tenth of the rate


# An argument left at None takes its value here.
FAST = dict(arch="preactresnet18", attack_steps=10, lr=0.1, eps_warmup_epochs=0.0, epochs=30, gate_epochs=8,
            milestones=())
PAPER = {**FAST, "epochs": 110, "gate_epochs": 25, "milestones": (100, 105)}
DIGITS = {**FAST, "arch": "preactresnet8", "attack_steps": 5, "eps_warmup_epochs": 4.0, "epochs": 8, "gate_epochs": 2,
          "test_size": 500}
PRESETS = {
    "digits": {"fast": DIGITS, "paper": DIGITS},
    "cifar10": {"fast": FAST, "paper": PAPER},
    "cifar100": {"fast": FAST, "paper": PAPER},
    "svhn": {"fast": {**FAST, "lr": 0.05, "eps_warmup_epochs": 5.0},  # at full eps from the start it predicts one class
             "paper": {**PAPER, "lr": 0.01, "epochs": 60, "gate_epochs": 15, "milestones": (50, 55)}},
    "tiny-imagenet": {"fast": FAST, "paper": {**PAPER, "epochs": 100, "milestones": (75, 90)}},
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
# paper          here                               meaning
# eps_max        args.eps                           the largest attack strength that is trained for
# BN_c, BN_a     DualBN.clean, DualBN.adv           clean (strength 0) and adversarial (eps_max) end of a layer
# w_n            w                                  fusing weight of image n, in [0, 1]: 0 is BN_c, 1 is BN_a
# f_c, f_a, f_w  net(x, 0.0), net(x, 1.0), net(x)   the network along one end, and (by default) with predicted weights
# x_eps          stage2_attack(...)                 examples of all strengths from 0 to eps_max
# D1, D2, ...    docs/afa.md                        our decisions where the abstract leaves the choice open
#
# Stage 1 trains the network: L = 1/2 CE(f_c(x), y) + 1/2 CE(f_a(x_adv), y), each BatchNorm on its own kind of data.
# Stage 2 freezes it and trains the gate on attacks of every strength: L = CE(f_w(x_eps), y).


def statistics(x, bn):
    """What the paper watches: mean and log standard deviation of each channel of each image, (N, C, H, W) -> (N, 2, C).

    In units of the running statistics of `bn`, so that all channels weigh alike, and in float32 under autocast too: the
    shift that an attack causes is small beside the mean.  [D2]
    """
    with torch.autocast(x.device.type, enabled=False):
        x, running_var = x.float(), bn.running_var + bn.eps
        mean = x.mean((2, 3))
        var = (x - mean[..., None, None]).square().mean((2, 3))  # on small maps a CPU's torch.var is ten times slower
        mean = (mean - bn.running_mean) / running_var.sqrt()
        return torch.stack([mean, 0.5 * ((var + bn.eps) / running_var).log()], 1)


class Gate(nn.Module):
    """Statistics (N, d) -> fusing weights (N, layers): FC, ReLU, FC, sigmoid.  [D2]"""

    def __init__(self, d, layers, hidden=64):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, layers)
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, math.log(0.9 / 0.1))  # starts at w = 0.9 for all: near BN_a, the safe end

    def forward(self, s):
        with torch.autocast(s.device.type, enabled=False):
            return torch.sigmoid(self.fc2(F.relu(self.fc1(s.float()))))


class DualBN(nn.Module):
    """Two complete BatchNorms, each with its own statistics and its own affine, and their fusion per image.  [D1]"""

    def __init__(self, channels, args):
        super().__init__()
        self.clean = nn.BatchNorm2d(channels)
        self.adv = nn.BatchNorm2d(channels) if args.bn == "dual" else self.clean  # single: one under both names
        self.gate = Gate(2 * channels, 1) if args.bn == "dual" and args.gate == "layer" else None
        self.layer = None  # the column of w that belongs to this layer, set by AFANet

    def forward(self, x, w, record=None):
        """x (N, C, H, W); w a float, a tensor (N, layers), or None for this layer's own gate (`--gate layer`).

        Appends (statistics of x, w) to the list `record`.
        """
        s = statistics(x, self.clean) if record is not None or w is None else None
        if w is None:
            w = self.gate(s.flatten(1))[:, 0]
        elif torch.is_tensor(w):
            w = w[:, self.layer]
        if record is not None:
            record.append((s, w))
        if not torch.is_tensor(w) and w in (0.0, 1.0):
            return self.adv(x) if w else self.clean(x)  # one end alone: in training each sees only its own data
        return self.fuse(x, w)

    def fuse(self, x, w):
        """y_n = (1 - w_n) BN_c(x_n) + w_n BN_a(x_n): in eval mode both are affine maps of x, and so is the sum."""
        assert not self.training, "weights between 0 and 1 need running statistics: call .eval() first"
        scale_c, scale_a = (bn.weight / (bn.running_var + bn.eps).sqrt() for bn in (self.clean, self.adv))
        shift_c = self.clean.bias - scale_c * self.clean.running_mean
        shift_a = self.adv.bias - scale_a * self.adv.running_mean
        w = w[:, None] if torch.is_tensor(w) else w
        scale, shift = torch.lerp(scale_c, scale_a, w), torch.lerp(shift_c, shift_a, w)  # (N, C), or (C,) for one w
        scale, shift = (t.to(x.dtype).view(-1, x.shape[1], 1, 1) for t in (scale, shift))
        return torch.addcmul(shift, x, scale)


class AFANet(PreActResNet):
    """A PreActResNet of DualBNs: w and record reach them through the blocks, as their `extra`."""

    def __init__(self, args, classes):
        super().__init__(args.arch, args.width, classes, partial(DualBN, args=args))
        norms = [m for m in self.modules() if isinstance(m, DualBN)]
        for layer, norm in enumerate(norms):
            norm.layer = layer
        self.layers = len(norms)
        self.probe = args.bn == "dual" and args.gate == "probe"
        if self.probe:
            self.gate = Gate(2 * sum(norm.clean.num_features for norm in norms), self.layers)
        self.default_w = None if args.bn == "dual" else 1.0

    def predict_weights(self, x):
        """The probe pass: statistics of all layers along BN_c, where an attack shows, to weights (N, layers).  [D2]"""
        record = []
        self.features(x, 0.0, record)
        return self.gate(torch.cat([s.flatten(1) for s, _ in record], 1))

    def forward(self, x, w=None, record=None):
        """Logits (N, classes). w: a float for all, or a tensor (N, layers), or (1, layers) for all images. None: the
        predicted weights, or 1 with a single BatchNorm."""
        w = self.default_w if w is None else w
        if w is None and self.probe:
            w = self.predict_weights(x)
        return self.fc(self.features(x, w, record))


def stage2_attack(net, x, y, args, generator):
    """Examples of every strength: a quarter of the batch at eps 0, a quarter at eps_max, half uniform between.  [D3]

    The attack goes through the gate and its probe pass, so that the gate learns against an adversary who fools it too,
    and uses the margin loss: a gate soon misleads cross-entropy. A share `harden` is crafted with w frozen at 0, 1/2
    or 1, by an adversary who ignores the gate.  [D4]

    At least 10 steps, each of 2.5 eps / steps: --step-size is for stage 1.
    """
    n, steps = len(x), max(args.attack_steps, 10)  # a gate soon learns what a weaker attack overlooks
    rest = n - n // 4  # the last quarter needs no attack: the batch comes in random order
    eps = args.eps * torch.rand(rest, device=x.device, generator=generator)
    full = torch.randperm(rest, device=x.device, generator=generator)[: n // 4]
    eps.index_fill_(0, full, args.eps)  # an assignment would copy the number from the host, and wait
    cut = round(args.harden * rest)
    w = torch.randint(0, 3, (cut, 1), device=x.device, generator=generator).expand(-1, net.layers) / 2
    x_adv = x.clone()
    for model, i in ((partial(net, w=w), slice(0, cut)), (net, slice(cut, rest))):
        if i.start < i.stop:
            x_adv[i] = pgd(model, x[i], y[i], eps=eps[i], step_size=2.5 / steps * eps[i], steps=steps,
                           norm=args.norm, loss="margin", generator=generator)
    return x_adv


def build(args, classes):
    """The network, untrained: `load` fills it from a checkpoint."""
    return AFANet(args, classes)


# --- Evaluation

ATTACKS = {  # columns of the final table, as settings of survivors()
    "fgsm": dict(steps=1, relative_step=1.0, random_start=False),
    "pgd20": dict(steps=20),
    "pgd50_margin": dict(steps=50, loss="margin", restarts=5),  # robustness to cross-entropy alone is no evidence
    "targeted": dict(steps=20, targets=9),  # towards each of the nine likeliest wrong classes
}
FROZEN = (0.0, 0.5, 1.0)  # weights w at which the gate cannot interfere with an attack  [D5]


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


def transfer_models(net, args):
    """What the column `transfer` is crafted on, in the test and in benchmark/audit.py."""
    return [partial(net, w=w) for w in FROZEN] if args.bn == "dual" else []


@torch.no_grad()
def fusing_weights(net, x):
    """The predicted weights of images (N, 3, H, W), (N, layers), with either kind of gate."""
    net(x, record=(record := []))
    return torch.stack([w for _, w in record], 1)


@torch.no_grad()
def measure(net, x, y, known, eps, args):
    """What the paper claims, against the strength of the attack: accuracy, weights, feature statistics.  [D6]

    The control has the same weights for every image: the mean of those predicted for the images `known` (x, y) and
    their PGD-10 examples.  [D8]
    """
    models = {"model": net} | {f"w={w:g}": partial(net, w=w) for w in FROZEN if args.bn == "dual"}
    curves = {name: robustness_curve(model, x, y, eps, args.norm) for name, model in models.items()}
    result = {"curves": curves, "strengths": [eps * i / 8 for i in range(9)], "statistics": {}}
    if args.bn == "dual":  # the oracle is told eps and takes the best of the three: the bar for a learned weight
        curves["oracle"] = {k: max(curves[name][k] for name in curves if name != "model") for k in curves["model"]}
        both = [fusing_weights(net, images) for images in (known[0], pgd10(net, *known, eps, args.norm))]
        control = partial(net, w=torch.cat(both).mean(0, keepdim=True))
        curves["constant"] = robustness_curve(control, x, y, eps, args.norm)
        result["constant"] = evaluate(control, x, y, eps, args.norm)
    x, y = x[:256], y[:256]
    for name, model in models.items():
        records = []
        for e in result["strengths"]:
            records.append([])
            model(pgd10(model, x, y, e, args.norm), record=records[-1])
        layers = [torch.stack([s.mean(0) for s, _ in layer]).cpu() for layer in zip(*records)]  # (9, 2, C)
        # Spearman's rho with eps, of n = 9 values without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d = rank differences.
        order = torch.arange(9)[:, None, None]
        rho = torch.cat([1 - (v.argsort(0).argsort(0) - order).square().sum(0) / 120 for v in layers], 1)
        rho = rho * torch.cat([v[0] != v[-1] for v in layers], 1)  # what does not move is not monotone
        result["statistics"][name] = {
            "monotone_share": dict(zip(("mean", "log_sd"), (rho.abs() >= 0.95).float().mean(1).tolist())),
            "shift": [(v - v[0]).norm(dim=2).T.tolist() for v in layers]}  # [layer][mean, log_sd][strength]
        if name == "model":
            w = [torch.stack([torch.as_tensor(w).expand(len(x)) for _, w in record], 1) for record in records]
            result["weight_mean"] = [v.mean(0).tolist() for v in w]
            result["weight_sd"] = [v.std(0, correction=int(len(x) > 1)).tolist() for v in w]
    return result


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
    dual = args.bn == "dual"
    if not state:
        unused = ["step_size"] * (args.eps == 0) + ["gate_epochs"] * (not dual)
        unused += ["gate", "gate_lr", "harden", "finetune"] * (not dual or args.gate_epochs == 0)
        data.refuse_unused(args, *unused)
    preset = {k: v for k, v in PRESETS[args.dataset][args.preset].items() if getattr(args, k) is None}
    args = replace(args, **preset)
    data.check(args, gate_epochs=(0, math.inf), gate_lr=(1e-9, math.inf), harden=(0, 1))

    # Data, network, optimisers.
    device = data.device(args.device)
    d = data.load_as(args, device, state=state)
    x_val, y_val, x_test, y_test = data.to_float(d.val.x), d.val.y, data.to_float(d.test.x), d.test.y
    torch.manual_seed(args.seed)
    net = data.to_device(net if state else build(args, len(d.classes)), device)
    if args.compile:
        net.compile(dynamic=False)  # a graph for each batch size: one for all sizes would be slower
    gate = [p for name, p in net.named_parameters() if "gate." in name]
    body = [p for name, p in net.named_parameters() if "gate." not in name]
    optimizers = {1: torch.optim.SGD([dict(params=body, peak=args.lr)], momentum=0.9, nesterov=True, fused=True,
                                     weight_decay=args.weight_decay)}
    if dual:
        slow = [dict(params=body, peak=args.gate_lr / 10)] if args.finetune == "all" else []
        optimizers[2] = torch.optim.Adam([dict(params=gate, peak=args.gate_lr), *slow])
    stages = [1] * args.epochs + [2] * (args.gate_epochs if dual else 0)
    eps_test = args.eps or usual_eps(args.norm)  # an undefended network is tested like the others

    # Training.
    parts = {"net": net, **{f"optimizer{stage}": optimizer for stage, optimizer in optimizers.items()}}
    run = data.Run(SCRIPT, args, d, parts, len(stages), preset, folder, state)
    for epoch in range(run.progress["epoch"], 0 if args.eval_only else len(stages)):
        stage, started, sums = stages[epoch], time.time(), defaultdict(float)
        first, length = (0, args.epochs) if stage == 1 else (args.epochs, args.gate_epochs)
        net.requires_grad_(stage == 1 or args.finetune == "all")  # stage 2 trains the gate alone, or everything
        for p in gate:
            p.requires_grad_(stage == 2)
        data.tune(True)  # searching for fast convolutions pays in training, with its few batch sizes
        # All randomness follows from (seed, epoch); with several processes each draws noise of its own.
        generator = torch.Generator(device).manual_seed(distributed.seed(2_000_003 * args.seed + epoch))
        for i, (x, y) in enumerate(data.batches(d.train, args.batch_size, seed=args.seed, epoch=epoch, **d.augment)):
            t = epoch - first + (i + 0.5) / run.steps  # epochs into the stage, at the middle of the step
            if stage == 2:
                factor = 0.5 + 0.5 * math.cos(math.pi * t / length)
            elif args.milestones:
                factor = 0.1 ** sum(t >= m for m in args.milestones)
            else:  # one cycle: up for 30 % of the steps, then down to 0
                factor = min(t / length / 0.3, (1 - t / length) / 0.7)
            for group in optimizers[stage].param_groups:
                group["lr"] = factor * group["peak"]
            net.eval()  # the attack sees the running statistics, as at test time, and moves none of them
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                if stage == 1:
                    rise = min(1.0, t / args.eps_warmup_epochs) if args.eps_warmup_epochs else 1.0
                    step_size = args.step_size or 2.5 * args.eps / args.attack_steps
                    x_adv = pgd(partial(net, w=1.0), x, y, eps=rise * args.eps, step_size=rise * step_size,
                                steps=args.attack_steps if args.eps else 0, norm=args.norm, generator=generator)
                    net.train()
                    # Both terms of the loss; with a single BatchNorm the adversarial one alone.
                    logits = {"robust": net(x_adv, 1.0)}
                    if dual:
                        logits["clean"] = net(x, 0.0)
                else:  # the only term; BatchNorm stays in eval mode
                    logits = {"fused": net(stage2_attack(net, x, y, args, generator))}
                losses = {k: F.cross_entropy(z.float(), y) for k, z in logits.items()}
                loss = sum(losses.values()) / len(losses)
            optimizers[stage].zero_grad()
            loss.backward()
            distributed.average_gradients(optimizers[stage])
            optimizers[stage].step()
            for k, z in logits.items():  # the sums stay on the device: reading one here would stall it
                sums[f"losses/{k}_ce"] += losses[k].detach() / run.steps
                sums[f"train/{k}_acc"] += (z.argmax(1) == y).float().mean() / run.steps
            run.bar.update()
        scalars = data.means(sums, epoch, *((args.lr, "--lr") if stage == 1 else (args.gate_lr, "--gate-lr")))
        distributed.average_statistics(net)
        seconds = time.time() - started
        data.tune(False)

        # Validation: before the last stage each end on its own kind of data, then the whole model on both.
        net.eval()
        clean_model, model = (partial(net, w=0.0), partial(net, w=1.0)) if stage < stages[-1] else (None, net)
        val = validate(model, x_val, y_val, eps_test, args.norm, clean_model=clean_model)
        # AFA is for all strengths: clean and robust accuracy both count, in the last stage.  [D7]
        score = sum(val.values()) / 2 if dual else val["val/robust_acc" if args.eps else "val/clean_acc"]
        x_few, y_few = x_val[:256], y_val[:256]
        x_adv = pgd10(model, x_few, y_few, eps_test, args.norm)
        scalars |= val | {"charts/learning_rate": optimizers[stage].param_groups[0]["lr"]}
        scalars |= {f"attack/{k}": v for k, v in attack_metrics(model, x_few, y_few, x_adv).items()}
        if stage == 2:
            for kind, images in (("clean", x_few), ("adv", x_adv)):
                weights = fusing_weights(net, images)
                scalars[f"afa/weight_{kind}"] = weights.mean().item()
                # A tag of its own: under the scalar's a histogram would hide it.
                run.writer.add_histogram(f"afa/weights_{kind}", weights, (epoch + 1) * run.steps)
        run.end_epoch(seconds, score if stage == stages[-1] else None, scalars, attack_images(x_few, x_adv))

    # Final evaluation: the test split, for the first and only time.
    data.tune(False, exact=True)
    table, others = {}, transfer_models(net, args)
    for names, state in run.checkpoints_to_test(eps_test):  # the best, then the last
        net.load_state_dict(state["net"])
        if not table:  # what the method is about: of the best alone
            method = measure(net, x_test, y_test, (x_val[:256], y_val[:256]), eps_test, args)
        row = evaluate(net, x_test, y_test, eps_test, args.norm, others)
        table |= dict.fromkeys(names, {"epoch": state["epoch"], **row})  # the best may be the last
    at, lines, points = [255 * e for e in method["strengths"]], [], []
    if dual:
        lines = [("control", *method["constant"]), ("constant w", *method["constant"].values()), (), ("mean w at eps",)]
        for e, weights in zip(at, method["weight_mean"]):
            lines.append((f"{e:.4g}/255", sum(weights) / len(weights)))
            points += [(f"afa/weight/layer{layer}", w, e) for layer, w in enumerate(weights)]
    for name, statistic in method["statistics"].items():
        for what, layers in zip(("mean", "log_sd"), zip(*statistic["shift"])):  # shift: [layer][mean, log_sd][strength]
            points += [(f"afa/shift_{what}/{name}", sum(v) / len(v), e) for e, *v in zip(at, *layers)]
    run.publish(eps_test, state, table, method, lines, points)
    distributed.finish()
