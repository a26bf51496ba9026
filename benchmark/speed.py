"""How fast are the scripts' own training steps, their evaluation, the attack and the loader, beside bare passes of
the same network and beside peers?

    python benchmark/speed.py                       # presets by device; some minutes on a CPU
    python benchmark/speed.py --no-compile --modes bf16 --layouts channels_last --out speed.json
    python benchmark/speed.py --device cuda --peak-tflops 990 --out speed.json     # 990: dense bf16 of an H100 or H200

A time means little without its *floor*, what the passes alone take: K forward and backward passes to the
input for an attack, one more to the weights and the optimiser for a training step. Cases take turns, and a
ratio is the median over the rounds of time / floor: a machine that slows down slows both. Peers are optional:
pip install --no-deps torchattacks; pip install foolbox.

A script's step is everything its loop does for a batch: gather and augmentation, learning rate, attack, loss, sums.
The script runs as it is, and is stopped after its steps; only `data.batches` is replaced, by one that takes the time.
"""

import contextlib
import copy
import functools
import io
import runpy
import shlex
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import afa  # noqa: E402
from common import data  # noqa: E402
from common.pgd import pgd, survivors  # noqa: E402

EPS, CLASSES, SIZE = 8 / 255, 10, 32
CHOICES = {"modes": ("fp32", "bf16"), "layouts": ("contiguous", "channels_last")}


@dataclass
class Args:
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    arch: Literal[tuple(afa.ARCHS)] = "preactresnet18"
    """network of the eager rows"""
    width: int | None = None
    """channels of its first stage (None: that of the architecture); compiled rows have 64"""
    compile_arch: Literal[tuple(afa.ARCHS)] | None = None
    """network of the compiled rows (None: by device; a CPU compiles a large one for minutes)"""
    batch_size: int | None = None
    """images a batch, but for the loader (None: by device)"""
    steps: int | None = None
    """steps K of the attack (None: by device)"""
    repeats: int | None = None
    """timed rounds (None: by device)"""
    modes: str = "fp32,bf16"
    """precisions, separated by commas; on a CPU compiled rows take the last one only"""
    layouts: str = "contiguous,channels_last"
    """memory formats, separated by commas; peers and compiled rows take the last one only"""
    compile: bool = True
    """time compiled networks too"""
    peers: bool = True
    """time torchattacks and foolbox too, where they are installed"""
    loader: bool = True
    """time the loader too, beside torchvision's"""
    attacks: bool = True
    """time attacks and bare steps too"""
    scripts: str | None = "all"
    """rows of the scripts' own training steps, separated by commas (None: none)"""
    script_arch: Literal[tuple(afa.ARCHS)] | None = None
    """network of images in those rows and in the evaluation (None: by device)"""
    script_width: int | None = None
    """channels of its first stage (None: that of the architecture)"""
    script_batch_size: int | None = None
    """samples a step in those rows (None: the scripts' own)"""
    script_compile: str | None = None
    """rows of those to time with --compile --bf16 too (None: PGD-AT on a GPU)"""
    evaluation_size: int | None = None
    """images that are evaluated, 0 for none (None: by device)"""
    peak_tflops: float | None = None
    """what the device can do in bf16, in 10^12 operations a second: gives the share of it that is reached"""
    out: str | None = None
    """write the results to this .json"""


PRESETS = {
    "cpu": dict(batch_size=32, steps=3, repeats=7, compile_arch="preactresnet8", script_arch="preactresnet8",
                script_compile="", evaluation_size=50),
    "cuda": dict(batch_size=128, steps=10, repeats=15, compile_arch="preactresnet18", script_arch="preactresnet18",
                 script_compile="PGD-AT", evaluation_size=500),
}


# --- What is timed


def input_passes(model, x, y, steps):
    """The floor of an attack: forward and backward passes to the input. Parameters come frozen."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(x).float(), y, reduction="sum"), x)


def weight_passes(models, x, y, optimizer):
    """The rest of a training step: a pass to the weights through each of the models, and the optimiser."""
    loss = sum(F.cross_entropy(model(x).float(), y) for model in models) / len(models)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def training_step(model, net, x, y, optimizer, attack):
    """PGD adversarial training with nothing around it."""
    net.eval()
    x_adv = attack(model, x, y)
    net.train()
    weight_passes([model], x_adv, y, optimizer)


def torchattacks(library, steps, net, x, y):
    return library.PGD(net, eps=EPS, alpha=2.5 * EPS / steps, steps=steps, random_start=True)(x, y)


def foolbox(library, steps, net, x, y):
    attack = library.attacks.LinfPGD(abs_stepsize=2.5 * EPS / steps, steps=steps, random_start=True)
    # run() is the attack alone: calling the object adds a forward pass, to count its successes.
    model = library.PyTorchModel(net, bounds=(0, 1), device=x.device)
    return attack.run(model, x, library.criteria.Misclassification(y), epsilon=EPS)


def cases(key, peers, args, device):
    """Rows (key, name, its floor, function that times it) of a network, and {attack: forward passes}."""
    kind, arch, width, mode, layout = key
    form = dict(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    net = afa.AFANet(afa.Args(arch=arch, width=width, bn="single"), CLASSES).to(device, **form).eval()
    x = torch.rand(args.batch_size, 3, SIZE, SIZE, device=device).contiguous(**form)
    y = net(x, 1.0).argmax(1)  # an attack that skips what is misclassified already has nothing to skip
    attack = partial(pgd, eps=EPS, step_size=2.5 * EPS / args.steps, steps=args.steps,
                     generator=torch.Generator(device).manual_seed(0))  # fmt: skip
    model, optimizer, floor = partial(net, w=1.0), idle_optimizer(net), ("input passes", "weight pass + SGD")
    attacks = {"pgd": partial(attack, model, x, y)}
    attacks |= {name: partial(peer, net, x, y) for name, peer in peers.items()}
    rows = [(floor[0], (), lambda: input_passes(model, x, y, args.steps), "eval frozen"),
            *((name, floor[:1], run, "eval") for name, run in attacks.items()),
            (floor[1], (), lambda: weight_passes([model], x, y, optimizer), "train"),
            ("training step", floor, lambda: training_step(model, net, x, y, optimizer, attack), "train")]  # fmt: skip
    rows = [(key, *row[:2], partial(timed, net, *row[2:], mode, device)) for row in rows]
    forwards = {}
    for name, run in attacks.items():  # not compiled yet: graphs run no hooks
        with passes_of(net) as passes:
            run()
        forwards[name] = len(passes)
    if kind == "compiled":
        net.compile(dynamic=False)
    return rows, forwards


def idle_optimizer(net):
    """A learning rate of 0 costs what any other does, and every round sees the same weights."""
    params = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(params, 0.0, 0.9, nesterov=True, fused=True, weight_decay=5e-4)


@contextlib.contextmanager
def passes_of(net, name=""):
    """The passes of a network in a list, each as "[name] train|eval [grad] samples". Graphs run no hooks."""
    passes = []

    def note(module, inputs):
        mode = ["train" if module.training else "eval", *["grad"] * torch.is_grad_enabled()]
        passes.append(" ".join([*[name] * bool(name), *mode, str(len(inputs[0]))]))

    hook = net.register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


def now(device):
    """Seconds on the clock once the device has done its work."""
    # A GPU runs behind its host: without waiting the clock stops when the last kernel is launched, not done.
    # On a CPU, the CPU time of one thread: several wait for each other, and so for all that runs beside them.
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(net, run, state, mode, device, params=None):
    """Seconds of run(), which finds the network in the state it starts from; `params` are trained (None: all)."""
    net.train("train" in state).zero_grad()
    for p in net.parameters() if params is None else params:
        p.requires_grad_("frozen" not in state)
    with torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16"):
        start = now(device)
        run()
        return now(device) - start


# --- The scripts' own training steps
# Each row: script and arguments; the batches of its floor's passes to the weights, each as (how often the batch, the
# keyword arguments of the pass); does its attack have the K passes to the input; further passes without a gradient.
# What a loss does with the logits, the linear maps behind the last layer, and everything else a loop does is not in a
# floor: it is what the ratio shows. ABNN's pass contains that of S, and the adaptive layers.

ROWS = {
    "PGD-AT": ("afa", "--bn single", [(1, {})], True, ()),
    "AFA stage 1": ("afa", "", [(1, dict(w=1.0)), (1, dict(w=0.0))], True, ()),  # BN_a on x_adv, BN_c on x
    "AALP": ("aalp", "", [(2, {})], True, ()),  # one pass of x and x_adv, twice the batch
    "VFD at": ("vfd_adv", "--base at", [(1, {}), (1, {})], True, ("teacher",)),
    "VFD trades": ("vfd_adv", "--base trades", [(1, {}), (1, {})], True, ("net", "teacher")),  # net: the target
    "VFD mart": ("vfd_adv", "--base mart", [(1, {}), (1, {})], True, ("teacher",)),
    "none": ("abnn", "--defense none", [(1, {})], False, ()),
    "ABNN's AT": ("abnn", "--defense at", [(1, {})], True, ()),
    "ABNN": ("abnn", "--defense abnn", [(1, {})], False, ()),
    "video none": ("abnn", "--dataset moving-digits --defense none", [(1, {})], False, ()),
    "video AT": ("abnn", "--dataset moving-digits --defense at", [(1, {})], True, ()),
    "video ABNN": ("abnn", "--dataset moving-digits --defense abnn", [(1, {})], False, ()),
}
WARMUP = 4  # steps before the timed ones; the first counts passes and operations, the second host synchronisations
read_digits, read_moving_digits = map(functools.cache, (data.read_digits, data.read_moving_digits))


class Operations(TorchDispatchMode):
    """Floating-point operations of convolutions and matrix products, backward too. Graphs are not seen.

    torch's FlopCounterMode has hooks on modules, which autograd.grad to an image does not get past.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Enough(Exception):
    """The script has made its steps."""


class Floor:
    """The passes of a row, on a network of its own with the script's settings."""

    def __init__(self, row, names):
        _, _, self.batches, self.attacked, others = ROWS[row]
        self.args, self.device = names["args"], names["device"]
        self.mode = "bf16" if self.args.bf16 else "fp32"
        self.net = data.to_device(names["build"](self.args, len(names["d"].classes)), self.device)
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = idle_optimizer(self.net)
        self.others = [self.net if name == "net" else names[name] for name in others]

    def input_passes(self, x, y):
        for model in self.others:
            with torch.no_grad():
                model(x)
        model = partial(self.net, **self.batches[0][1])
        input_passes(model, x, y, self.args.attack_steps if self.attacked else 0)

    def weight_passes(self, x, y):
        (times, _), *_ = self.batches
        if times > 1:
            x, y = torch.cat([x] * times), torch.cat([y] * times)
        weight_passes([partial(self.net, **settings) for _, settings in self.batches], x, y, self.optimizer)

    def seconds(self, x, y):
        own = self.mode, self.device, self.params
        seconds = timed(self.net, partial(self.weight_passes, x, y), "train", *own)
        if self.attacked or self.others:
            seconds += timed(self.net, partial(self.input_passes, x, y), "eval frozen", *own)
        return seconds


def host_syncs(messages):
    return sum("synchronizing CUDA operation" in str(m.message) for m in messages)


def taking_turns(original, row, steps, result):
    """`data.batches` for a script that runs in this process: its steps and those of the floor take turns."""

    def batches(split, batch_size, **settings):
        caller = sys._getframe(1)
        names = {**caller.f_globals, **caller.f_locals}
        if names.get("run") is None:  # a teacher or a substitute, which is trained beforehand: one step will do
            yield next(original(split, batch_size, **settings))
            return
        args, net, device, floor = names["args"], names["net"], split.y.device, Floor(row, names)
        if "clip" not in original.__name__:
            settings |= dict(pad=4, flip=True)  # as on CIFAR-10
        source, teacher = original(split, batch_size, **settings), names.get("teacher")
        for i in range(steps + WARMUP):
            with contextlib.ExitStack() as stack:
                if i == 0 and not args.compile:
                    lists = [stack.enter_context(passes_of(net))]
                    lists += [stack.enter_context(passes_of(teacher, "teacher"))] if teacher is not None else []
                    flops = stack.enter_context(Operations())
                start = now(device)
                if i == 1 and device.type == "cuda":
                    messages = stack.enter_context(warnings.catch_warnings(record=True))
                    warnings.simplefilter("always")
                    stack.callback(torch.cuda.set_sync_debug_mode, "default")
                    torch.cuda.set_sync_debug_mode("warn")
                batch = next(source)
                yield batch
            end = now(device)
            x, y = batch
            if i == 0 and not args.compile:
                result["passes"], result["flops"] = sum(lists, []), flops.total
            if i == 1 and device.type == "cuda":
                result["host_syncs"] = host_syncs(messages)
            if i == 0:  # before it is compiled
                lists = [passes_of(floor.net)] + [passes_of(m, "teacher") for m in floor.others if m is not floor.net]
                with contextlib.ExitStack() as stack:
                    lists = [stack.enter_context(counted) for counted in lists]
                    flops = stack.enter_context(Operations())
                    floor.seconds(x, y)
                result["floor_passes"], result["floor_flops"] = sum(lists, []), flops.total
                if args.compile:
                    floor.net.compile(dynamic=False)
            beneath = floor.seconds(x, y)
            if i >= WARMUP:
                result.setdefault("step", []).append(end - start)
                result.setdefault("floor", []).append(beneath)
        names["run"].writer.close()
        raise Enough

    return batches


def script_step(row, args, mode, compiled, path=None):
    """One row of the scripts' table, of the script as it is; `path` is another file than ROOT's."""
    script, flags, *_ = ROWS[row]
    video, size, steps = "moving-digits" in flags, args.script_batch_size, args.repeats
    size = size or (64 if video else 128)
    argv = [*shlex.split(flags), "--device", args.device, "--epochs", "1", "--val-size", "20", "--test-size", "1",
            "--train-size", str(size * (steps + WARMUP)), "--batch-size", str(size), "--attack-steps", str(args.steps)]
    if not video:
        argv += ["--arch", args.script_arch]
        argv += ["--width", str(args.script_width)] if args.script_width else []
    argv += {"vfd_adv": ["--teacher-epochs", "1"], "abnn": ["--clean-epochs", "1"]}.get(script, [])
    argv += ["--bf16"] * (mode == "bf16") + ["--compile"] * compiled
    result, handler = dict(name=row, mode=mode, compiled=compiled), signal.getsignal(signal.SIGINT)
    readers = {"digits": lambda _: read_digits(None), "moving-digits": lambda _, **options: read_moving_digits(None)}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        stack.enter_context(mock.patch.dict(data.READERS, readers))
        for name in ("batches", "clip_batches"):
            turns = taking_turns(getattr(data, name), row, steps, result)
            stack.enter_context(mock.patch.object(data, name, turns))
        stack.enter_context(mock.patch.object(sys, "argv", [f"{script}.py", *argv, "--runs-dir", folder]))
        stack.callback(signal.signal, signal.SIGINT, handler)
        stack.callback(torch._dynamo.reset)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            runpy.run_path(str(path or ROOT / f"{script}.py"), run_name="__main__")
        except Enough:
            pass
        except SystemExit as error:  # the script's own refusal, which it has printed
            raise data.UserError(f"{script}.py {shlex.join(argv)} ended: {error}") from None
    step, floor = result.pop("step"), result.pop("floor")
    return result | dict(samples=size, ms=1e3 * median(step), floor_ms=1e3 * median(floor), **ratio(step, floor))


# --- Evaluation


def evaluation(args, device):
    """Rows of survivors() and evaluate(), float32 as after training. Floor: as many passes, of as many images each.

    Images have strengths from 1/16 to 16 times 8/255, so that some fall early and batches shrink as they do in a run.
    `cold`: the first call over its floor; on a GPU it holds the choice of algorithms for every new batch size.
    """
    data.tune(False, exact=True)
    form = dict(memory_format=torch.channels_last)
    net = afa.AFANet(afa.Args(arch=args.script_arch, width=args.script_width, bn="single"), CLASSES)
    net = net.to(device, **form).eval()
    x = torch.rand(args.evaluation_size, 3, SIZE, SIZE, device=device).contiguous(**form)
    eps = EPS * 2 ** torch.linspace(-4, 4, len(x), device=device)
    with torch.no_grad():
        y = torch.cat([net(part).argmax(1) for part in x.split(500)])
    clean = torch.ones_like(y, dtype=torch.bool)
    nchw, x_nchw = copy.deepcopy(net).to(memory_format=torch.contiguous_format), x.contiguous()
    runs = {"survivors": (net, lambda: survivors(net, x, y, clean, eps=eps, steps=20)),
            # Over the same floor, in channels_last: which format is faster where a GPU multiplies in full float32?
            "survivors, contiguous": (nchw, lambda: survivors(nchw, x_nchw, y, clean, eps=eps, steps=20)),
            "evaluate": (net, lambda: afa.evaluate(net, x, y, eps, "linf"))}  # last: it takes longest  # fmt: skip
    for name, (model, run) in runs.items():
        with passes_of(model) as seen:
            cold = timed(model, run, "eval", "fp32", device)
        passes, a, b = [p.rsplit(" ", 1) for p in seen], [], []

        def beneath(passes=passes):
            for kind, n in passes:
                part, label = x[: int(n)], y[: int(n)]
                if "grad" in kind:
                    input_passes(net, part, label, 1)
                else:
                    with torch.no_grad():
                        net(part)

        for _ in range(min(args.repeats, 3) + 1):  # each is hundreds of passes
            a.append(timed(model, run, "eval", "fp32", device))
            b.append(timed(net, beneath, "eval frozen", "fp32", device))
        a, b = a[1:], b[1:]
        yield dict(name=name, passes=len(passes), images=sum(int(n) for _, n in passes), ms=1e3 * median(a),
                   cold=cold / median(b), **ratio(a, b))  # fmt: skip
    data.tune(True)


# --- Loader


def time_loaders(args, device):
    """Images per second of common.data.batches, and of torchvision's data set, transforms and DataLoader."""
    images = torch.randint(0, 256, (50_000, SIZE, SIZE, 3), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (len(images),))
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    class Synthetic(datasets.CIFAR10):  # its __getitem__, on arrays that come from no file
        def __init__(self):
            self.data, self.targets, self.target_transform = images.numpy(), labels.tolist(), None
            crop, flip = transforms.RandomCrop(SIZE, padding=4), transforms.RandomHorizontalFlip()
            self.transform = transforms.Compose([crop, flip, transforms.ToTensor()])

    split = data.Split(images.to(device), labels.to(device))
    loader = torch.utils.data.DataLoader(Synthetic(), 128, shuffle=True, num_workers=2, drop_last=True,
                                         pin_memory=device.type == "cuda")  # fmt: skip

    def speed(batches, first, last):
        for i in range(last):
            if i == first:
                wait()
                start = time.perf_counter()
            next(batches)[0].to(device, non_blocking=True)
        wait()
        return (last - first) * 128 / (time.perf_counter() - start)

    a, b = [], []
    for r in range(args.repeats + 1):  # ours for a whole epoch: what it prepares at its start counts
        a.append(speed(data.batches(split, 128, seed=0, epoch=r, pad=4, flip=True), 0, len(loader)))
        b.append(speed(iter(loader), 8, 68))  # the workers have started, and what they had ready is used up
    return dict(ours=median(a[1:]), torchvision=median(b[1:]), **ratio(a[1:], b[1:]))


def ratio(above, below):
    """Median and quartiles of the quotients, round by round."""
    values = 2 * [a / b for a, b in zip(above, below, strict=True)]  # twice: one round has quartiles too
    return dict(zip(("q1", "ratio", "q3"), quantiles(values, n=4, method="inclusive"), strict=True))


def show_step(entry):
    """A line of the scripts' table; of PGD-AT also an epoch of CIFAR-10, and the rate of operations."""
    line = "  {:<44}{ms:>9.1f}{ratio:>9.3f}   {q1:.3f} {q3:.3f}".format(
        f"{entry['name']}, {entry['mode']}{' compiled' * entry['compiled']}", **entry)  # fmt: skip
    if "host_syncs" in entry:
        line += f", {entry['host_syncs']} host syncs"
    if "epoch_seconds" in entry:
        line += ", a CIFAR-10 epoch {epoch_seconds:.1f} s, {tflops:.3g} TFLOP/s".format(**entry)
    if "peak_share" in entry:
        line += f", {entry['peak_share']:.1%} of the peak"
    print(line, flush=True)


if __name__ == "__main__":
    args, begun = data.parse(Args, __doc__), time.time()
    device = data.device(args.device)
    if args.out and not args.out.endswith(".json"):
        raise data.UserError(f"--out {args.out}: the results are a .json")
    preset = {k: v for k, v in PRESETS[device.type].items() if getattr(args, k) is None}
    args = replace(args, **preset)
    for name, value in asdict(args).items():
        if type(value) in (int, float) and value <= 0 and (name, value) != ("evaluation_size", 0):
            raise data.UserError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
        if name in CHOICES and not set(value.split(",")) <= set(CHOICES[name]):
            raise data.UserError(f"--{name} are {','.join(CHOICES[name])}, not {value}")
    modes, layouts, on_cpu = args.modes.split(","), args.layouts.split(","), device.type == "cpu"
    wanted_rows = {name: [*ROWS] if value == "all" else [row for row in (value or "").split(",") if row]
                   for name, value in (("scripts", args.scripts), ("script-compile", args.script_compile))}  # fmt: skip
    for name, chosen in wanted_rows.items():
        if not set(chosen) <= set(ROWS):
            raise data.UserError(f"--{name} are {','.join(ROWS)}, not {','.join(chosen)}")
    torch.set_num_threads(1)
    data.tune(True)
    where = "one CPU thread" if on_cpu else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {where};", *(f"{k}={v}" for k, v in preset.items()), flush=True)
    result = dict(args=asdict(args), device=where, torch=torch.__version__, forwards={}, times=[], gains=[], scripts=[],
                  failed=[], evaluation=[], loader=None, targets=[])  # fmt: skip
    result["command"] = data.environment(device)["command"].replace("speed.py", "benchmark/speed.py", 1)

    def keep():  # after each part: who stops this after some minutes has what was measured until then
        if args.out:
            data.save(Path(args.out), result)

    keep()

    # The scripts' steps. Operations are the eager network's: graphs are not counted.
    settings = [(row, "bf16", True) for row in wanted_rows["script-compile"]]  # first: most depends on them
    settings += [(row, mode, False) for row in wanted_rows["scripts"] for mode in modes]
    if settings:
        print(f"\n{'steps of the scripts':<46}{'ms':>9}{'x floor':>9}   quartiles")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for row, mode, compiled in settings:
        try:
            entry = script_step(row, args, mode, compiled)
        except Exception as error:  # the others are not lost for one row; the exit status tells
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            result["failed"].append(f"{row}, {mode}{' compiled' * compiled}: {reason}")
            print(f"  {result['failed'][-1]}", flush=True)
            continue
        if row == "PGD-AT":
            rate = entry["floor_flops"] / entry["ms"] / 1e9
            epoch = data.steps_per_epoch(49_000, entry["samples"]) * entry["ms"] / 1e3
            entry |= dict(epoch_seconds=epoch, tflops=rate)
            entry |= dict(peak_share=rate / args.peak_tflops) if args.peak_tflops else {}
        result["scripts"].append(entry)
        show_step(entry)
        keep()

    if args.evaluation_size:
        print(f"\n{'evaluation, float32':<46}{'ms':>9}{'x floor':>9}   quartiles")
        for entry in evaluation(args, device):
            print("  {name:<44}{ms:>9.1f}{ratio:>9.3f}   {q1:.3f} {q3:.3f}, {passes} passes of {images} images in all, "
                  "first call {cold:.2f} x floor".format(**entry), flush=True)
            result["evaluation"].append(entry)
            keep()

    result["loader"] = loaders = time_loaders(args, device) if args.loader else None
    if loaders:
        print("\nloader: {ours:,.0f} images/s, torchvision {torchvision:,.0f}".format(**loaders))
        keep()

    # Attacks. Rows: every mode and layout; peers and compiled networks in the last layout (the scripts' own).
    peers, rows, forwards = {}, [], result["forwards"]
    for attack in (torchattacks, foolbox) if args.peers and args.attacks else ():
        try:
            peers[attack.__name__] = partial(attack, import_module(attack.__name__), args.steps)
        except ImportError as error:
            print(f"{attack.__name__} cannot be imported, its rows are left out: {error}")
    network = (args.arch, args.width or afa.ARCHS[args.arch][0])
    wanted = [("eager", *network, mode, layout) for mode in modes for layout in layouts]
    for mode in (modes[-1:] if on_cpu else modes) if args.compile else ():
        wanted += [(kind, args.compile_arch, 64, mode, layouts[-1]) for kind in ("eager", "compiled")]
    for key in dict.fromkeys(wanted) if args.attacks else ():
        start = time.time()
        new, counts = cases(key, peers if key[4] == layouts[-1] else {}, args, device)
        try:
            for *_, run in new if key[0] == "compiled" else ():
                run()
        except Exception as error:  # no C++ compiler, or one that does not get along with this torch
            print(f"not compiled, rows left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        print(f"{' '.join(map(str, key))}: ready in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        rows = rows + new
        forwards |= counts
    seconds, start = {row[:2]: [] for row in rows}, time.time()
    for r in range(args.repeats + 1 if rows else 0):  # round 0 warms up, and is dropped
        for key, name, _, run in rows[:: -1 if r % 2 else 1]:  # to and fro: none always follows the same
            seconds[key, name] = [*seconds[key, name], run()][-args.repeats :]
        print(f"round {r} of {args.repeats}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    if rows:
        same = "all the same" if set(forwards.values()) == {args.steps} else f"WARNING: not all {args.steps}"
        print("\nforward passes of one attack call:", *(f"{k} {n}," for k, n in forwards.items()), same)
    times, gains, targets = result["times"], result["gains"], result["targets"]
    for key, name, floor, _ in rows:
        if not times or key != times[-1]["key"]:
            print(f"\n{' '.join(map(str, key)):<46}{'ms':>9}{'x floor':>9}   quartiles")
        entry = dict(key=key, name=name, ms=1e3 * median(seconds[key, name]))
        if floor:
            entry |= ratio(seconds[key, name], map(sum, zip(*(seconds[key, f] for f in floor), strict=True)))
        shown = "{ratio:>9.3f}   {q1:.3f} {q3:.3f}".format(**entry) if floor else "    floor"
        print(f"  {name:<44}{entry['ms']:>9.1f}{shown}")
        times.append(entry)
        others = {"bf16 over fp32": (*key[:3], "fp32", key[4]), "compiled over eager": ("eager", *key[1:]),
                  "channels_last over contiguous": (*key[:4], "contiguous")}  # fmt: skip
        pairs = {what: (other, name) for what, other in others.items() if floor and other != key}
        pairs |= {f"pgd over {peer}": (key, peer) for peer in peers if name == "pgd"}
        gains += [dict(what=what, key=key, name=name, **ratio(seconds[pair], seconds[key, name]))
                  for what, pair in pairs.items() if name not in peers and pair in seconds]  # fmt: skip
    if gains:
        print(f"\n{'times faster':<92}{'gain':>6}   quartiles")
    for g in gains:
        label = " ".join((g["what"] + ":", g["name"], *map(str, g["key"])))
        print(f"  {label:<90}{g['ratio']:>6.2f}   {g['q1']:.2f} {g['q3']:.2f}")

    fast_bf16 = not on_cpu or torch.cpu.get_capabilities().get("avx512_bf16", False)
    values = [(f"{e['name']} / floor", e["ratio"]) for e in times if "ratio" in e]
    values += [(f"{e['key'][0]} {e['what']}, {e['name']}", e["ratio"]) for e in gains]
    values += [("a script's step / floor", e["ratio"]) for e in result["scripts"]]
    values += [("host synchronisations of a script's step", e["host_syncs"])
               for e in result["scripts"] if "host_syncs" in e]  # fmt: skip
    values += [("evaluation / floor", e["ratio"]) for e in result["evaluation"] if "contiguous" not in e["name"]]
    values += [("loader over torchvision's", loaders["ratio"])] if loaders else []
    found = {(e["name"], e["mode"], e["compiled"]): e["ms"] for e in result["scripts"]}
    values += [("--compile --bf16 over fp32, a script's step", found[name, "fp32", False] / ms)
               for (name, _, compiled), ms in found.items()
               if compiled and (name, "fp32", False) in found and not on_cpu]  # fmt: skip
    print(f"\n{'targets (the worst row decides)':<46}{'target':>9}{'measured':>9}   reached")
    for what, sign, limit in (
        ("pgd / floor", "<=", 1.03), ("training step / floor", "<=", 1.05),
        ("a script's step / floor", "<=", 1.08), ("evaluation / floor", "<=", 1.05),
        ("host synchronisations of a script's step", "<=", 0),
        ("eager bf16 over fp32, training step", ">=", 1.7), ("--compile --bf16 over fp32, a script's step", ">=", 2.5),
        ("compiled pgd over torchattacks, pgd", ">=", 1.5), ("loader over torchvision's", ">=", 5.0),
    ):  # fmt: skip
        rated = [value for name, value in values if name == what and (fast_bf16 or "bf16" not in what)]
        worst = (max if sign == "<=" else min)(rated, default=None)
        reached = None if worst is None else worst <= limit if sign == "<=" else worst >= limit
        targets.append(dict(target=what, sign=sign, limit=limit, measured=worst, reached=reached))
        shown = "        -   not measured" if worst is None else f"{worst:>9.3f}   {('NO', 'yes')[reached]}"
        print(f"  {what:<44}{f'{sign} {limit:g}':>9}{shown}")
    print(f"\n{time.time() - begun:.0f} s")
    keep()
    sys.exit(bool(result["failed"]))
