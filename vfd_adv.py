"""VFD-Adv, Vanilla Feature Distillation: adversarial training that also draws the features of an image and of its
attacked version to those of a vanilla network, which knows what is predictive and nothing of robustness.

Guodong Cao et al., "Vanilla Feature Distillation for Improving the Accuracy-Robustness Trade-Off in Adversarial
Training", https://arxiv.org/abs/2206.02158

    python vfd_adv.py                                       # embedded data, a few minutes on two CPU cores
    python vfd_adv.py --dataset cifar10 --bf16 --compile    # PreActResNet-18, 30 epochs, on a GPU

Embedded data, 8/255, 3 seeds, worst case: AT 79.3 %, with VFD 79.5 %; clean 87.9 % both. TRADES 81.5 and 81.9 %.
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
from common.pgd import attack_images, attack_metrics, kl, pgd, pgd10, robustness_curve, survivors, usual_eps, validate

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
    base: Literal["at", "trades", "mart"] = "at"  # adversarial training that the distillation is added to
    beta: float | None = None  # weight of the KL term of trades and mart (None: 6 and 5)
    lambda_adv: float | None = None  # weight of d(S(x'), T(x)) (None: 0.03 D/C, see D2 in the docs; printed)
    lambda_nat: float | None = None  # weight of d(S(x), T(x)) (None: likewise). Both 0: the plain base, no teacher
    distill: Literal["features", "logits"] = "features"  # what is paired: input or output of the last layer
    clean_statistics: bool = False  # control for at: a clean pass moves BatchNorm's statistics too, as in the others
    teacher: str | None = None  # a run's folder or .pt file with a plain network (None: train one, or reuse it)
    teacher_epochs: int | None = None  # its passes over the training images, plain cross-entropy, one cycle
    teacher_lr: float | None = None  # peak learning rate of that


# An argument left at None takes its value here.
FAST = dict(arch="preactresnet18", attack_steps=10, lr=0.1, eps_warmup_epochs=0.0, epochs=30, milestones=(),
            teacher_epochs=30, teacher_lr=0.1)
PAPER = {**FAST, "epochs": 110, "milestones": (100, 105), "teacher_epochs": 100}
DIGITS = {**FAST, "arch": "preactresnet8", "attack_steps": 5, "eps_warmup_epochs": 3.0, "epochs": 8,
          "teacher_epochs": 6, "test_size": 500}
PRESETS = {
    "digits": {"fast": DIGITS, "paper": DIGITS},
    "cifar10": {"fast": FAST, "paper": PAPER},
    "cifar100": {"fast": FAST, "paper": PAPER},
    "svhn": {"fast": {**FAST, "lr": 0.05, "eps_warmup_epochs": 5.0},  # at full eps from the start it predicts one class
             "paper": {**PAPER, "lr": 0.01, "teacher_lr": 0.01}},
    "tiny-imagenet": {"fast": FAST, "paper": PAPER},
}
BETA = {"at": 0.0, "trades": 6.0, "mart": 5.0}
LAMBDA = 0.03  # both lambdas, in units of lambda_0: from a sweep on embedded data, within its noise  [D2]


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
# paper        here                    meaning
# x, x'        x, x_adv                an image, and its PGD example
# S, T         net, teacher            the network trained; the vanilla network, frozen, in eval mode
# phi          phi, phi_adv, phi_t     pooled features (N, D), input of the last layer: of S for x, x', of T for x
# z, z'        z, z_adv, z_t           logits (N, C) of S for x and x', and of T for x; C classes
# s, s', t     s, s_adv, taught        what is paired: the phi, or with `--distill logits` the logits
# beta         args.beta               weight of the base's own regulariser
# lambda       args.lambda_adv, _nat   weights of the two pairs
# lambda_0     unit, in the main part  the unit of these weights: D/C where features are paired, 1 for logits
# D1, D2, ...  docs/vfd_adv.md         our decisions where the abstract leaves the choice open


def base_loss(z, z_adv, y, args):
    """Loss of the base on logits (N, C), and its terms unweighted; `at` ignores z.

    at: CE(z', y) (Madry et al. 2018). trades: CE(z, y) + beta mean_i KL(p_i || p'_i) (Zhang et al. 2019).
    mart: BCE(z', y) + beta mean_i [KL(p_i || p'_i) (1 - p_i[y_i])], where BCE adds to the cross-entropy a term
    -log(1 - max_{k != y} p'[k]), with the constants of its authors' code (Wang et al. 2020).
    """
    if args.base == "at":
        terms = {"robust_ce": F.cross_entropy(z_adv, y)}
        return terms["robust_ce"], terms
    if args.base == "trades":
        terms = {"clean_ce": F.cross_entropy(z, y), "kl": kl(z_adv, z).mean()}  # a gradient into both branches
        return terms["clean_ce"] + args.beta * terms["kl"], terms
    wrong = z_adv.softmax(1).scatter(1, y[:, None], 0).amax(1)
    unsure = 1 - z.softmax(1).gather(1, y[:, None]).squeeze(1)
    terms = {"boosted_ce": F.cross_entropy(z_adv, y) - (1.0001 - wrong + 1e-12).log().mean(),
             "weighted_kl": (kl(z_adv, z) * unsure).mean()}
    return terms["boosted_ce"] + args.beta * terms["weighted_kl"], terms


def vfd_loss(s, s_adv, t, args):
    """L_VFD = lambda_adv d(s', t) + lambda_nat d(s, t), of phi or logits (N, D) of S(x'), S(x), T(x); unweighted terms.

    d is the squared error, a mean over batch and dimensions.  [D1] A pair of weight 0 is skipped: there may be no S(x).
    """
    pairs = {"distance_adv": (args.lambda_adv, s_adv), "distance_nat": (args.lambda_nat, s)}
    terms = {k: (v - t.detach()).square().mean() for k, (weight, v) in pairs.items() if weight}
    return sum(pairs[k][0] * d for k, d in terms.items()), terms


def track_statistics(net, on):
    """Let passes in training mode move BatchNorm's running statistics or not: they use the batch's anyway.  [D5]"""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = on


def vanilla_teacher(args, d):
    """Path of the vanilla network that the arguments ask for; it is trained now if it is not in the cache.  [D3]"""
    arch, width = args.arch, args.width or ARCHS[args.arch][0]
    own = dict(dataset=args.dataset, arch=arch, width=width, seed=args.seed, epochs=args.teacher_epochs,
               lr=args.teacher_lr, batch_size=args.batch_size, weight_decay=args.weight_decay, bf16=args.bf16)
    name = f"{d.name}__{arch}__{width}__{args.seed}"
    path = data.cache_file(args.runs_dir, "teachers", name, own, d.train)  # a stale one is never found
    if distributed.agree(path.exists()):
        return path
    print(f"training the teacher, a vanilla {arch} of width {width}, once for all runs like this one", flush=True)
    seed = 500_000 + args.seed  # with the student's seed, it would start from the student's weights
    torch.manual_seed(seed)
    teacher = data.to_device(PreActResNet(arch, width, len(d.classes)), d.train.y.device)
    if args.compile:
        teacher.compile(dynamic=False)
    optimizer = torch.optim.SGD(teacher.parameters(), args.teacher_lr, momentum=0.9, nesterov=True, fused=True,
                                weight_decay=args.weight_decay)
    steps = data.steps_per_epoch(len(d.train.y), args.batch_size)
    data.tune(True)  # searching for fast convolutions pays in training, with its few batch sizes
    for epoch in range(args.teacher_epochs):  # one cycle, as below
        for i, (x, y) in enumerate(data.batches(d.train, args.batch_size, seed=seed, epoch=epoch, **d.augment)):
            t = (epoch + (i + 0.5) / steps) / args.teacher_epochs
            optimizer.param_groups[0]["lr"] = min(t / 0.3, (1 - t) / 0.7) * args.teacher_lr
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
                loss = F.cross_entropy(teacher(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            distributed.average_gradients(optimizer)
            optimizer.step()
        last = data.means({"loss": loss}, epoch, args.teacher_lr, "--teacher-lr")["loss"]
        print(f"teacher, epoch {epoch + 1}/{args.teacher_epochs}: last loss {last:.3f}", flush=True)
    distributed.average_statistics(teacher)
    data.tune(False)
    data.save(path, dict(script="teacher", args=own, classes=len(d.classes), net=teacher.state_dict()))
    return path


def load_teacher(path, args, classes, device):
    """(T, state): a teacher, or a run of any script with a plain PreActResNet, frozen and in eval mode."""
    path = Path(path, "best.pt") if Path(path).is_dir() else Path(path)
    with data.usable(path, f"cannot be the teacher of a run on {args.dataset} with {classes} classes"):
        state = data.read(path, device)
        own = {k: state["args"][k] for k in ("dataset", "arch", "width")}
        if (own["dataset"], state["classes"]) != (args.dataset, classes):
            raise ValueError(f"it is of {own['dataset']} with {state['classes']} classes")
        teacher = PreActResNet(own["arch"], own["width"], classes)
        teacher.load_state_dict(state["net"])
        if state["script"] != "teacher" and state["args"]["eps"] and state["args"].get("defense") != "none":
            print(f"note: {path} was trained against attacks: it is no vanilla network", flush=True)
    state = dict(script="teacher", args=own, classes=classes, net=state["net"])
    return data.to_device(teacher, device).eval().requires_grad_(False), state


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


def compare(net, teacher, x, y, eps, args):
    """How far S's outputs (N, d) for x and for PGD-10's x' are from T's (N, D) for x, in eval mode, as numbers.  [D6]

    distance: the squared error over the variance of T's in the batch, so that their constant mean reaches 1. cka:
    linear CKA, 1 for the same up to rotation and scale (Kornblith et al. 2019, arXiv 1905.00414).
    """
    result, which = {}, 1 if args.distill == "features" else 0  # of (logits, features)
    x_adv = pgd10(net, x, y, eps, args.norm)
    with torch.no_grad():
        t = teacher(x, return_features=True)[which]
        for kind, images in (("clean", x), ("adv", x_adv)):
            s = net(images, return_features=True)[which]
            a, b = s - s.mean(0), t - t.mean(0)
            cka = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-12)
            result[f"cka_{kind}"] = cka.item()
            if s.shape == t.shape:  # a --teacher that is only looked at may be of another width
                result[f"distance_{kind}"] = ((s - t).square().mean() / b.square().mean().clamp_min(1e-12)).item()
    return result


def usefulness(features, features_adv, y, classes):
    """Each feature's correlation with the label, (d,) on clean and on adversarial inputs, from features (N, d).  [D7]

    On clean inputs max_k |corr(f_j, 1[y = k])|; on adversarial ones the correlation with that same class, with the
    sign that makes the clean one positive. Negative: the attack has turned the feature against its class. The
    usefulness of Ilyas et al. 2019 (arXiv 1905.02175), for more than two classes.
    """
    label = F.one_hot(y, classes).double()
    label = F.normalize(label - label.mean(0), dim=0)
    clean, adv = (F.normalize(f.double() - f.double().mean(0), dim=0).T @ label for f in (features, features_adv))
    k = clean.abs().argmax(1, keepdim=True)
    clean, adv = clean.gather(1, k).squeeze(1), adv.gather(1, k).squeeze(1)
    return {"clean": clean.abs().tolist(), "adv": (adv * clean.sign()).tolist()}


def measure(net, teacher, x, y, eps, args):
    """Accuracy against the strength of the attack; usefulness of the features and distances to T on test images."""
    result = {"curves": {"model": robustness_curve(net, x, y, eps, args.norm)}, "usefulness": {}}
    if teacher is not None:
        result["teacher"] = {"test_clean": survivors(teacher, x, y, eps=0, steps=0).sum().item() / len(y)}
    x, y = x[:1000], y[:1000]
    for name, model in (("teacher", teacher), ("student", net)):
        if model is None:
            continue
        x_adv = torch.cat([pgd10(model, *part, eps, args.norm) for part in zip(x.split(250), y.split(250))])
        with torch.no_grad():
            features = [torch.cat([model.features(part) for part in v.split(250)]) for v in (x, x_adv)]
        result["usefulness"][name] = usefulness(*features, y, model.fc.out_features)
    if teacher is not None:
        result["distance"] = compare(net, teacher, x[:256], y[:256], eps, args)
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
    if not state:
        unused = ["step_size"] * (args.eps == 0) + ["beta" if args.base == "at" else "clean_statistics"]
        # Without distillation, the distance to a --teacher is measured even so.
        unused += ["distill"] * (args.lambda_adv == args.lambda_nat == 0 and args.teacher is None)
        if args.teacher is not None:
            unused += ["teacher_epochs", "teacher_lr"]
        data.refuse_unused(args, *unused)
    preset = {**PRESETS[args.dataset][args.preset], "beta": BETA[args.base]}
    preset["lr"] *= 0.5 if args.base == "mart" else 1.0  # at the others' rate it loses classes on the way  [D8]
    preset = {k: v for k, v in preset.items() if getattr(args, k) is None}
    args = replace(args, **preset)
    data.check(args, beta=(0, math.inf), lambda_adv=(0, math.inf), lambda_nat=(0, math.inf),
               teacher_epochs=(1, math.inf), teacher_lr=(1e-9, math.inf))

    # Data, teacher, network, optimiser.
    device = data.device(args.device)
    d = data.load_as(args, device, state=state)
    x_val, y_val, x_test, y_test = data.to_float(d.val.x), d.val.y, data.to_float(d.test.x), d.test.y
    data.tune(False)  # no tuning yet: evaluation has batches of many sizes
    teacher, beside = None, []
    if args.teacher or args.lambda_adv != 0 or args.lambda_nat != 0:  # a weight left at None is not 0
        path = folder / "teacher.pt" if state else args.teacher or vanilla_teacher(args, d)
        if state and not path.exists():
            raise data.UserError(f"{path} is missing: copy it from where last.pt was, or from teachers/ in --runs-dir")
        teacher, teacher_state = load_teacher(path, args, len(d.classes), device)
        beside = [("teacher.pt", teacher_state)]  # kept with the run: resuming needs it, and the cache may be emptied
        teacher_val = survivors(teacher, x_val, y_val, eps=0, steps=0).float().mean().item()
        print(f"teacher {path}: clean accuracy {teacher_val:.3f} on validation images", flush=True)
        # lambda_0: a mean over D features then weighs as much per coordinate as one over C logits.  [D2]
        unit = teacher.fc.in_features / len(d.classes) if args.distill == "features" else 1.0
        missing = {k: round(LAMBDA * unit, 6) for k in ("lambda_adv", "lambda_nat") if getattr(args, k) is None}
        args, preset = replace(args, **missing), preset | missing
    distilling = args.lambda_adv > 0 or args.lambda_nat > 0
    torch.manual_seed(args.seed)  # after the teacher: whether it was trained now or earlier makes no difference
    net = data.to_device(net if state else build(args, len(d.classes)), device)
    if distilling and args.distill == "features" and net.fc.in_features != teacher.fc.in_features:
        raise data.UserError(f"--teacher has {teacher.fc.in_features} features and the network {net.fc.in_features}: "
                             "give the network the teacher's --arch and --width, or --distill logits")
    if args.compile:
        net.compile(dynamic=False)  # a graph for each batch size: one for all sizes would be slower
        if teacher is not None:
            teacher.compile(dynamic=False)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, nesterov=True, fused=True,
                                weight_decay=args.weight_decay)
    x_seen, y_seen = data.to_float(d.train.x[:256].to(device)), d.train.y[:256]  # from the training split  [D6]
    clean_statistics = args.base != "at" or args.clean_statistics
    eps_test = args.eps or usual_eps(args.norm)  # an undefended network is tested like the others
    choose_by = "val/robust_acc" if args.eps else "val/clean_acc"  # the best epoch

    # Training.
    parts = {"net": net, "optimizer": optimizer}
    run = data.Run(SCRIPT, args, d, parts, args.epochs, preset, folder, state, beside)
    for epoch in range(run.progress["epoch"], 0 if args.eval_only else args.epochs):
        started, sums = time.time(), defaultdict(float)
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
                target = y
                if args.base == "trades":  # its attack moves the prediction away from that for x
                    with torch.no_grad():
                        target = net(x).float()
                # The base's own attack: the teacher plays no part in it.  [D4]
                x_adv = pgd(net, x, target, eps=rise * args.eps, step_size=rise * step_size,
                            steps=args.attack_steps if args.eps else 0, norm=args.norm,
                            loss="kl" if args.base == "trades" else "ce", generator=generator)
                net.train()
                # Two passes, the clean one first, as in the code of the authors of TRADES and MART. There both move
                # the running statistics. AT has no clean pass of its own: one that the clean pair adds must not move
                # them, for whatever clean images in them do would look like an effect of the pair.  [D5]
                z = phi = None
                if clean_statistics or args.lambda_nat:
                    track_statistics(net, clean_statistics)
                    z, phi = (v.float() for v in net(x, return_features=True))
                    track_statistics(net, True)
                z_adv, phi_adv = (v.float() for v in net(x_adv, return_features=True))
                loss, terms = base_loss(z, z_adv, y, args)
                if distilling:
                    with torch.no_grad():
                        z_t, phi_t = (v.float() for v in teacher(x, return_features=True))
                    s, s_adv, taught = (phi, phi_adv, phi_t) if args.distill == "features" else (z, z_adv, z_t)
                    extra, distances = vfd_loss(s, s_adv, taught, args)
                    loss, terms = loss + extra, terms | distances
            optimizer.zero_grad()
            loss.backward()
            distributed.average_gradients(optimizer)
            optimizer.step()
            for k, v in terms.items():  # the sums stay on the device: reading one here would stall it
                sums[f"losses/{k}"] += v.detach() / run.steps
            for k, v in (("clean", z), ("robust", z_adv)):
                if v is not None:
                    sums[f"train/{k}_acc"] += (v.argmax(1) == y).float().mean() / run.steps
            run.bar.update()
        scalars = data.means(sums, epoch, args.lr)
        distributed.average_statistics(net)
        seconds = time.time() - started
        data.tune(False)

        # Validation, and the distances to the teacher on images of the training split.
        net.eval()
        val = validate(net, x_val, y_val, eps_test, args.norm)
        seen = {} if teacher is None else compare(net, teacher, x_seen, y_seen, eps_test, args)
        x_few, y_few = x_val[:256], y_val[:256]
        x_adv = pgd10(net, x_few, y_few, eps_test, args.norm)
        scalars |= val | {"charts/learning_rate": factor * args.lr}
        scalars |= {f"attack/{k}": v for k, v in attack_metrics(net, x_few, y_few, x_adv).items()}
        scalars |= {f"vfd/{k}": v for k, v in seen.items()}
        history = seen | {"val_clean": val["val/clean_acc"], "val_robust": val["val/robust_acc"]}
        run.end_epoch(seconds, val[choose_by], scalars, attack_images(x_few, x_adv), history)

    # Final evaluation: the test split, for the first and only time.
    data.tune(False, exact=True)
    table, others = {}, [] if teacher is None else [teacher]
    for names, state in run.checkpoints_to_test(eps_test):  # the best, then the last
        net.load_state_dict(state["net"])
        if not table:  # what the method is about: of the best alone
            method = measure(net, teacher, x_test, y_test, eps_test, args)
        row = evaluate(net, x_test, y_test, eps_test, args.norm, others)
        table |= dict.fromkeys(names, {"epoch": state["epoch"], **row})  # the best may be the last
    method["history"] = state["history"]
    lines = [("test", "clean", "adversarial")]
    lines += [(f"{k}'s use", *(sum(v) / len(v) for v in row.values())) for k, row in method["usefulness"].items()]
    if teacher is not None:
        method["teacher"] |= {**teacher_state["args"], "val_clean": teacher_val}
        seen = method["distance"]
        lines += [(k, seen[k + "_clean"], seen[k + "_adv"]) for k in ("cka", "distance") if k + "_clean" in seen]
    run.publish(eps_test, state, table, method, lines)
    distributed.finish()
