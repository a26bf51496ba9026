"""How fast are attack, training step and loader, beside bare passes of the same network and beside peers?

    python benchmark/speed.py                       # presets by device; a few minutes on a CPU
    python benchmark/speed.py --no-compile --modes bf16 --layouts channels_last --out speed.json

A time means little without its *floor*, what the passes alone take: K forward and backward passes to the
input for an attack, one more to the weights and the optimiser for a training step. Cases take turns, and a
ratio is the median over the rounds of time / floor: a machine that slows down slows both. Peers are optional:
pip install --no-deps torchattacks; pip install foolbox.
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afa  # noqa: E402
from common import data  # noqa: E402
from common.pgd import pgd  # noqa: E402

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
    """memory formats, separated by commas; AFA, peers and compiled rows take the last one only"""
    compile: bool = True
    """time compiled networks too"""
    peers: bool = True
    """time torchattacks and foolbox too, where they are installed"""
    loader: bool = True
    """time the loader too, beside torchvision's"""
    out: str | None = None
    """write the results to this .json"""


PRESETS = {
    "cpu": dict(batch_size=32, steps=3, repeats=7, compile_arch="preactresnet8"),
    "cuda": dict(batch_size=128, steps=10, repeats=15, compile_arch="preactresnet18"),
}


# --- What is timed


def input_passes(model, x, y, steps):
    """The floor of an attack: forward and backward passes to the input. Parameters come frozen."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(x).float(), y, reduction="sum"), x)


def weight_passes(net, inputs, y, optimizer):
    """The rest of a training step: a pass to the weights for each (x, w), and the optimiser."""
    loss = sum(F.cross_entropy(net(x, w).float(), y) for x, w in inputs) / len(inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def training_step(net, ends, x, y, optimizer, attack):
    """As in the scripts: PGD adversarial training, or AFA's first stage, BN_a on x_adv and BN_c on x."""
    net.eval()
    x_adv = attack(partial(net, w=1.0), x, y)
    net.train()
    weight_passes(net, [(x_adv if w else x, w) for w in ends], y, optimizer)


def torchattacks(library, steps, net, x, y):
    return library.PGD(net, eps=EPS, alpha=2.5 * EPS / steps, steps=steps, random_start=True)(x, y)


def foolbox(library, steps, net, x, y):
    attack = library.attacks.LinfPGD(abs_stepsize=2.5 * EPS / steps, steps=steps, random_start=True)
    # run() is the attack alone: calling the object adds a forward pass, to count its successes.
    model = library.PyTorchModel(net, bounds=(0, 1), device=x.device)
    return attack.run(model, x, library.criteria.Misclassification(y), epsilon=EPS)


def cases(key, bn, peers, args, device):
    """Rows (key, name, its floor, function that times it) of a network, and {attack: forward passes}."""
    kind, arch, width, mode, layout = key
    form = dict(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    net = afa.AFANet(afa.Args(arch=arch, width=width, bn=bn), CLASSES).to(device, **form).eval()
    x = torch.rand(args.batch_size, 3, SIZE, SIZE, device=device).contiguous(**form)
    y = net(x, 1.0).argmax(1)  # an attack that skips what is misclassified already has nothing to skip
    attack = partial(pgd, eps=EPS, step_size=2.5 * EPS / args.steps, steps=args.steps,
                     generator=torch.Generator(device).manual_seed(0))  # fmt: skip
    # A learning rate of 0 costs what any other does, and every round sees the same weights.
    optimizer = torch.optim.SGD(net.parameters(), 0.0, 0.9, nesterov=True, weight_decay=5e-4)
    model, ends, of = partial(net, w=1.0), (1.0,) if bn == "single" else (1.0, 0.0), "AFA " * (bn == "dual")
    floor = (f"{of}input passes", f"{of}weight pass{'es' * (bn == 'dual')} + SGD")
    attacks = {"pgd": partial(attack, model, x, y)} if bn == "single" else {}
    attacks |= {name: partial(peer, net, x, y) for name, peer in peers.items()}
    step = partial(training_step, net, ends, x, y, optimizer, attack)
    rows = [(floor[0], (), lambda: input_passes(model, x, y, args.steps), "eval frozen"),
            *((name, floor[:1], run, "eval") for name, run in attacks.items()),
            (floor[1], (), lambda: weight_passes(net, [(x, w) for w in ends], y, optimizer), "train"),
            (f"{of}training step", floor, step, "train")]  # fmt: skip
    rows = [(key, *row[:2], partial(timed, net, *row[2:], mode, device)) for row in rows]
    forwards = {}
    for name, run in attacks.items():  # not compiled yet: graphs run no hooks
        count = []
        hook = net.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        run()
        forwards[name] = len(count)
        hook.remove()
    if kind == "compiled":
        net.compile()
    return rows, forwards


def timed(net, run, state, mode, device):
    """Seconds of run(), which finds the network in the state it starts from."""
    # A GPU runs behind its host: without waiting the clock stops when the last kernel is launched, not done.
    # On a CPU, the CPU time of one thread: several wait for each other, and so for all that runs beside them.
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    net.train("train" in state).requires_grad_("frozen" not in state).zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16"):
        wait()
        start = clock()
        run()
        wait()
        return clock() - start


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


if __name__ == "__main__":
    args, begun = tyro.cli(Args, description=__doc__), time.time()
    device = data.device(args.device)
    if args.out and not args.out.endswith(".json"):
        raise data.UserError(f"--out {args.out}: the results are a .json")
    preset = {k: v for k, v in PRESETS[device.type].items() if getattr(args, k) is None}
    args = replace(args, **preset)
    for name, value in asdict(args).items():
        if type(value) is int and value <= 0:
            raise data.UserError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
        if name in CHOICES and not set(value.split(",")) <= set(CHOICES[name]):
            raise data.UserError(f"--{name} are {','.join(CHOICES[name])}, not {value}")
    modes, layouts, on_cpu = args.modes.split(","), args.layouts.split(","), device.type == "cpu"
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # as the scripts do: TF32 on a GPU
    torch.backends.cudnn.benchmark = True
    where = "one CPU thread" if on_cpu else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {where};", *(f"{k}={v}" for k, v in preset.items()), flush=True)
    loaders = time_loaders(args, device) if args.loader else None

    # Rows: every mode and layout; AFA, peers and compiled networks in the last layout (the scripts' own).
    peers, rows, forwards = {}, [], {}
    for attack in (torchattacks, foolbox) if args.peers else ():
        try:
            peers[attack.__name__] = partial(attack, import_module(attack.__name__), args.steps)
        except ImportError as error:
            print(f"{attack.__name__} cannot be imported, its rows are left out: {error}")
    network = (args.arch, args.width or afa.ARCHS[args.arch][0])
    wanted = [("eager", *network, mode, layout) for mode in modes for layout in layouts]
    for mode in (modes[-1:] if on_cpu else modes) if args.compile else ():
        wanted += [(kind, args.compile_arch, 64, mode, layouts[-1]) for kind in ("eager", "compiled")]
    # Past this limit, 8 by default, code runs eagerly in silence.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    for key in dict.fromkeys(wanted):
        last, start = key[4] == layouts[-1], time.time()
        new, counts = cases(key, "single", peers if last else {}, args, device)
        if last and (key[:3] == ("eager", *network) or not on_cpu):
            new += cases(key, "dual", {}, args, device)[0]
        try:
            for *_, run in new if key[0] == "compiled" else ():
                run()
        except Exception as error:  # no C++ compiler, or one that does not get along with this torch
            print(f"not compiled, rows left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        print(f"{' '.join(map(str, key))}: ready in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        rows, forwards = rows + new, forwards | counts
    seconds, start = {row[:2]: [] for row in rows}, time.time()
    for r in range(args.repeats + 1):  # round 0 warms up, and is dropped
        for key, name, _, run in rows[:: -1 if r % 2 else 1]:  # to and fro: none always follows the same
            seconds[key, name] = [*seconds[key, name], run()][-args.repeats :]
        print(f"round {r} of {args.repeats}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    same = "all the same" if set(forwards.values()) == {args.steps} else f"WARNING: not all {args.steps}"
    print("\nforward passes of one attack call:", *(f"{k} {n}," for k, n in forwards.items()), same)
    times, gains, targets = [], [], []
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
    print(f"\n{'times faster':<92}{'gain':>6}   quartiles")
    for g in gains:
        label = " ".join((g["what"] + ":", g["name"], *map(str, g["key"])))
        print(f"  {label:<90}{g['ratio']:>6.2f}   {g['q1']:.2f} {g['q3']:.2f}")
    if loaders:
        print("\nloader: {ours:,.0f} images/s, torchvision {torchvision:,.0f}".format(**loaders))

    fast_bf16 = not on_cpu or torch.cpu.get_capabilities().get("avx512_bf16", False)
    rows = [(f"{e['name']} / floor", e["ratio"]) for e in times if "ratio" in e]
    rows += [(f"{e['key'][0]} {e['what']}, {e['name']}", e["ratio"]) for e in gains]
    rows += [("loader over torchvision's", loaders["ratio"])] if loaders else []
    print(f"\n{'targets (the worst row decides)':<46}{'target':>9}{'measured':>9}   reached")
    for what, sign, limit in (
        ("pgd / floor", "<=", 1.02), ("training step / floor", "<=", 1.05),
        ("AFA training step / floor", "<=", 1.05), ("eager bf16 over fp32, training step", ">=", 1.7),
        ("compiled pgd over torchattacks, pgd", ">=", 1.5), ("loader over torchvision's", ">=", 5.0),
    ):  # fmt: skip
        values = [value for name, value in rows if name == what and (fast_bf16 or "bf16" not in what)]
        worst = (max if sign == "<=" else min)(values, default=None)
        reached = None if worst is None else worst <= limit if sign == "<=" else worst >= limit
        targets.append(dict(target=what, sign=sign, limit=limit, measured=worst, reached=reached))
        shown = "        -   not measured" if worst is None else f"{worst:>9.3f}   {('NO', 'yes')[reached]}"
        print(f"  {what:<44}{f'{sign} {limit:g}':>9}{shown}")
    print(f"\n{time.time() - begun:.0f} s")
    if args.out:
        result = dict(args=asdict(args), device=where, torch=torch.__version__, forwards=forwards)
        result |= dict(times=times, gains=gains, loader=loaders, targets=targets)
        data.save(Path(args.out), result)
