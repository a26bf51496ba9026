"""Draw a finished run, or several side by side, as PNG files.

    python benchmark/figures.py runs/digits__afa__1__1700000000                 # into the run's folder
    python benchmark/figures.py AFA_RUN PGD_AT_RUN --labels AFA PGD-AT          # into figures/

    robustness_curve.png  accuracy against the strength of the attack, and the worst case over all attacks
    weights.png           fusing weights that a run of afa.py predicts, for each layer
    statistics.png        how far an attack shifts the statistics of the features, for each layer
    training.png          losses, validation accuracies and learning rate, from the TensorBoard events
    examples.png          test images, attacked, and what was added to them

Everything comes from results.json, args.json and the events in a run's folder; only examples.png needs the
checkpoint and the data set, and is left out with a warning where one of them is missing.
"""

import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import data  # noqa: E402
from common.pgd import pgd  # noqa: E402

try:
    import matplotlib
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise data.UserError(f"the figures need matplotlib ({error}): pip install -r requirements-dev.txt") from None

# Okabe & Ito's palette: told apart under every kind of colour blindness. Markers say it once more, for print in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
STYLE = {"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 10, "figure.titlesize": 14, "figure.dpi": 120,
         "axes.grid": True, "grid.color": "0.88", "axes.axisbelow": True, "axes.spines.top": False,
         "axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False}
FIXED = {"w=0": "fixed w = 0 (BN_c)", "w=0.5": "fixed w = 0.5", "w=1": "fixed w = 1 (BN_a)",
         "oracle": "oracle: best fixed w at each eps"}
PIXELS = 255  # eps is drawn in units of 1/255


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # folders of finished runs, in the order of the legend
    out: str | None = None  # folder of the figures (None: the run's own; for several runs, figures)
    labels: list[str] | None = None  # a name for each run (None: of the method, with the seed where two are alike)


@dataclass
class Run:
    path: Path
    results: dict  # results.json
    args: dict  # the arguments in args.json
    label: str = ""
    color: str = COLORS[0]
    marker: str = MARKERS[0]

    @property
    def name(self):
        """The method: several are runs of one script under other flags."""
        if self.args.get("eps") == 0:
            return "undefended"
        return "PGD-AT" if self.args.get("bn") == "single" else self.results["script"].upper().replace("_", "-")


def read(path):
    path, content = Path(path), {}
    if not path.is_dir():
        raise data.UserError(f"there is no run {path}: name the folder that the run has written")
    for file in ("args.json", "results.json"):
        try:
            content[file] = json.loads((path / file).read_text())
        except FileNotFoundError:
            if file == "args.json":
                raise data.UserError(f"{path} is not the folder of a run: it has no args.json") from None
            raise data.UserError(f"the run has not finished: {path} has no results.json; to continue it: "
                                 f"python {content['args.json'].get('script')}.py --resume {path}") from None
        except (ValueError, OSError) as error:
            raise data.UserError(f"{path / file} cannot be read: {error}") from None
    return Run(path, content["results.json"], content["args.json"]["args"])


def eps_label(runs):
    """Label of the axis. Lengths in two norms are not comparable: read() is not told, so it is said here."""
    norms = sorted({run.args.get("norm", "linf") for run in runs})
    return "eps (1/255)" + ("" if norms == ["linf"] else f", norm {' and '.join(norms)}")


def robustness_curve(runs):
    """Accuracy against eps. The band is one standard error of a share of so many test images."""
    fig, ax = plt.subplots(figsize=(12, 6.5))
    end, beyond = 0, []

    def line(run, curve, label, band=False, **style):
        nonlocal end
        eps = run.results["eps"] * PIXELS
        k = sorted((k for k in curve if float(k) < 4 * eps), key=float)  # the huge eps is told below, not drawn
        x, y = torch.tensor([float(i) for i in k]), torch.tensor([100 * curve[i] for i in k])
        (drawn,) = ax.plot(x, y, label=label, **style)
        end = max(end, x.max().item())
        if band:
            beyond.extend(f"{run.label} {100 * curve[i]:.1f} % at eps {i}/255" for i in curve if i not in k)
            sd = (y * (100 - y) / run.results["evaluated"]).sqrt()
            ax.fill_between(x, y - sd, y + sd, color=drawn.get_color(), alpha=0.15, linewidth=0)

    for run in runs:
        curves = run.results.get("method", {}).get("curves", {})
        fixed = [name for name in FIXED if name in curves]
        label = f"{run.label}, learned w" if fixed and learned(run) else run.label
        style = dict(color=run.color, marker=run.marker, linewidth=2.8, markersize=7, zorder=4)
        line(run, run.results["robustness_curve"], label, band=True, **style)
        row = run.results["checkpoints"].get("best") or next(iter(run.results["checkpoints"].values()))
        ax.plot(255 * run.results["eps"], 100 * row["worst"], linestyle="none", marker="*", markersize=17, zorder=5,
                color=run.color, markeredgecolor="white",
                label=f"{run.label}, worst case over\nall attacks at eps: {100 * row['worst']:.1f} %")
        for i, name in enumerate(fixed if len(runs) == 1 else [n for n in fixed if n in ("w=0", "w=1")]):
            if len(runs) == 1:
                style = dict(color=COLORS[i + 1], marker=MARKERS[i + 1], linewidth=1.6, markersize=5)
                line(run, curves[name], FIXED[name], **style | ({"linestyle": "--"} if name == "oracle" else {}))
            else:  # thin: these are the ends of one run, not rivals of the others
                line(run, curves[name], f"{run.label}, {FIXED[name]}", color=run.color, linewidth=1.1, alpha=0.75,
                     linestyle=DASHES[i + 1])
    strengths = sorted({round(PIXELS * run.results["eps"], 4) for run in runs})
    for eps in strengths:
        ax.axvline(eps, color="0.35", linewidth=1.2)
        ax.text(eps, 101, f"eps_max = {eps:g}", ha="center", va="bottom", fontsize=10, color="0.25")
    if len(strengths) == 1:
        ax.axvspan(eps, end, color="0.5", alpha=0.12, linewidth=0)
        ax.text((eps + end) / 2, 97, "extrapolation: stronger than trained for", ha="center", va="top", fontsize=10)
    ax.set(xlim=(0, end), ylim=(0, 100), xlabel=eps_label(runs), ylabel="accuracy on test images under PGD-20")
    ax.yaxis.set_major_formatter(PercentFormatter())
    sets = "/".join(dict.fromkeys(run.results["dataset"] for run in runs))
    numbers = "/".join(dict.fromkeys(str(run.results["evaluated"]) for run in runs))
    ax.set_title(f"{sets}: how accuracy falls with the strength of the attack", pad=26, fontsize=14)
    fig.legend(loc="outside right center", labelspacing=0.9)
    note = f"Of {numbers} test images; the bands are ± one standard error."
    fig.supxlabel("\n".join([note] + ["Not drawn: " + ", ".join(beyond) + "."] * bool(beyond)), fontsize=10)
    return fig


def learned(run):
    """Does the run predict fusing weights? (Plain and fixed ones are constant.)"""
    mean = run.results.get("method", {}).get("weight_mean")
    return bool(mean) and max(map(max, mean)) > min(map(min, mean))


def by_layer(fig, axes, lines):
    """Colours for so many layers, dark to bright from first to last, with their colour bar."""
    colors = [plt.cm.viridis(0.92 * i / max(lines - 1, 1)) for i in range(lines)]
    scale = matplotlib.colors.BoundaryNorm([i + 0.5 for i in range(lines + 1)], lines)
    shades = plt.cm.ScalarMappable(scale, matplotlib.colors.ListedColormap(colors))
    bar = fig.colorbar(shades, ax=axes, ticks=range(1, lines + 1, 1 + lines // 12), aspect=35, pad=0.015)
    bar.set_label("layer of normalisation, from input to output")
    return colors


def weights(runs):
    """Fusing weights against eps: the self-check of AFA. They should rise from BN_c's end towards BN_a's."""
    runs = [run for run in runs if learned(run)]
    if not runs:
        return "no run predicts fusing weights"
    fig, axes = plt.subplots(len(runs), figsize=(11, 1 + 5.5 * len(runs)), squeeze=False)
    for ax, run in zip(axes[:, 0], runs):
        x = PIXELS * torch.tensor(run.results["method"]["strengths"])
        w, sd = (torch.tensor(run.results["method"][k]) for k in ("weight_mean", "weight_sd"))  # (strength, layer)
        for layer, color in enumerate(by_layer(fig, ax, w.shape[1])):
            ax.plot(x, w[:, layer], color=color, linewidth=1.4)
        mean, sd = w.mean(1), sd.mean(1)
        ax.fill_between(x, mean - sd, mean + sd, color="0.3", alpha=0.18, linewidth=0,
                        label="± standard deviation over images (mean over layers)")
        ax.plot(x, mean, color="black", linewidth=3.2, marker="o", label="mean over layers")
        ax.set(xlim=(0, x.max()), ylim=(0, 1), xlabel=eps_label([run]), ylabel="weight w: 0 is BN_c, 1 is BN_a",
               title=f"{run.label} on {run.results['dataset']}: predicted fusing weight against the strength of the "
                     f"attack\nmean over layers {mean[0]:.2f} at eps 0, {mean[-1]:.2f} at eps {x[-1]:g}/255")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return fig


def statistics(runs):
    """How far an attack shifts mean and log sd of a layer's channels, averaged over images: the paper's observation."""
    found = [(run, run.results.get("method", {}).get("statistics") or {}) for run in runs]
    rows = [(run, k, s[k]) for run, s in found for k in (("w=0", "w=1") if "w=0" in s else ("model",)) if k in s]
    if not rows:
        return "no run has measured the statistics of its features"
    fig, axes = plt.subplots(len(rows), 2, figsize=(13, 0.8 + 3.9 * len(rows)), squeeze=False)
    layers = max(len(s["shift"]) for _, _, s in rows)
    colors = by_layer(fig, axes, layers)
    for (run, end, s), pair in zip(rows, axes):
        x = PIXELS * torch.tensor(run.results["method"]["strengths"])
        for ax, key, what, i in zip(pair, ("mean", "log_sd"), ("mean", "log standard deviation"), (0, 1)):
            for layer, shift in enumerate(s["shift"]):
                ax.plot(x, shift[i], color=colors[layer], linewidth=1.8, marker="o", markersize=3)
            name = FIXED.get(end, "").replace("fixed", "along")
            ax.set_title(f"{run.label}{name and ', ' + name}: shift of the {what}\n"
                         f"monotone in eps (|rho| ≥ 0.95): {100 * s['monotone_share'][key]:.0f} % of channels")
            ax.set(xlim=(0, x.max()), xlabel=eps_label([run]), ylabel="length over a layer's channels")
            ax.set_ylim(bottom=0)
    sets = "/".join(dict.fromkeys(run.results["dataset"] for run, _, _ in rows))
    fig.suptitle(f"{sets}: how far an attack shifts the feature statistics, in running standard deviations and in nats")
    return fig


def training(runs):
    """Losses, validation accuracies and learning rate against the step. A stage begins where a loss first appears."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = {}
    for run in runs:
        accumulator = EventAccumulator(str(run.path), size_guidance={"scalars": 0, "images": 1}).Reload()
        tags = accumulator.Tags()["scalars"]
        events[run.path] = {tag: list(zip(*((e.step, e.value) for e in accumulator.Scalars(tag)))) for tag in tags}
    panels = {"losses": ("losses/",), "validation accuracy": ("val/clean_acc", "val/robust_acc"),
              "learning rate at the end of an epoch": ("charts/learning_rate",)}
    if not any(tag.startswith("losses/") for scalars in events.values() for tag in scalars):
        return "there are no TensorBoard events with losses"
    fig, axes = plt.subplots(3, figsize=(12, 9.5), sharex=True, height_ratios=(3, 3, 1.8))
    for ax, (title, prefixes) in zip(axes, panels.items()):
        tags = [tag for s in events.values() for tag in s if tag.startswith(prefixes)]
        tags = list(dict.fromkeys(tags))
        for run in runs:
            for tag, (steps, values) in ((t, s) for t, s in events[run.path].items() if t in tags):
                i = tags.index(tag) % len(COLORS)
                values = [100 * v for v in values] if prefixes[0].startswith("val") else values
                one = len(runs) == 1  # the colour tells the terms of one run apart, or else the runs
                ax.plot(steps, values, color=COLORS[i] if one else run.color, linestyle=DASHES[i % 4], linewidth=1.8,
                        marker=MARKERS[i] if one else run.marker, markersize=4,
                        label=tag.split("/")[1] if one else f"{run.label}: {tag.split('/')[1]}")
            losses = [s for t, s in events[run.path].items() if t.startswith("losses/")]
            for first in {s[0][0] for s in losses} - {min(s[0][0] for s in losses)} if losses else ():
                before = max(step for s in losses for step in s[0] if step < first)
                ax.axvline(before, color="0.35" if len(runs) == 1 else run.color, linewidth=1.2, linestyle=(0, (1, 2)))
                if ax is axes[0]:
                    ax.annotate(f"{run.label}: stage 2" if len(runs) > 1 else "stage 2", (before, 1), (4, 4),
                                xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=10)
        ax.set_title(title, loc="left")
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    axes[1].yaxis.set_major_formatter(PercentFormatter())
    axes[1].set_ylim(0, 100)
    axes[2].set_yscale("log")
    axes[2].set_xlabel("optimiser step")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.suptitle("Training: " + ", ".join(f"{run.label} on {run.results['dataset']}" for run in runs))
    return fig


def examples(runs, n=8):
    """Test images clean, under PGD-20 on the best checkpoint, and the perturbation: what an eps looks like."""
    fig = plt.figure(figsize=(12, 6.3 * len(runs)))
    for part, run in zip(fig.subfigures(len(runs), squeeze=False)[:, 0], runs):
        script = run.results["script"]
        if not (ROOT / f"{script}.py").is_file():
            return f"there is no {script}.py here to load {run.path} with"
        try:  # data.UserError has printed why: no data set (and no download), no checkpoint
            net, args, _ = importlib.import_module(script).load(run.path, "cpu")
            d = data.load(args.dataset, args.data_dir, "cpu", args.train_size, args.val_size, args.test_size)
        except data.UserError as error:
            return f"{error}"
        x, y, eps = data.to_float(d.test.x[:n]), d.test.y[:n], args.eps or run.results["eps"]
        x_adv = pgd(net, x, y, eps=eps, step_size=eps / 4, steps=20, norm=args.norm,
                    generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            clean, adversarial = (net(images).argmax(1).tolist() for images in (x, x_adv))
        axes = part.subplots(3, n, squeeze=False)
        for row, images, name in zip(axes, (x, x_adv, 0.5 + 10 * (x_adv - x)),
                                     ("clean", "adversarial", "10 x difference")):
            for ax, image in zip(row, images.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
                ax.imshow(image, interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            row[0].set_ylabel(name)
        for ax, label, before, after in zip(axes[0], y.tolist(), clean, adversarial):
            fooled = before == label != after
            ax.set_title(f"true {d.classes[label]}\nclean {d.classes[before]}\nattacked {d.classes[after]}",
                         fontsize=10, color="#C00000" if fooled else "black", weight="bold" if fooled else "normal")
        part.suptitle(f"{run.label} on {run.results['dataset']}: test images under PGD-20, eps {PIXELS * eps:g}/255; "
                      "red: the attack fools the network")
    return fig


FIGURES = (robustness_curve, weights, statistics, training, examples)


def main():
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        raise data.UserError("name the folder of a run, or of several")
    if args.labels and len(args.labels) != len(args.runs):
        raise data.UserError(f"--labels has {len(args.labels)} names for {len(args.runs)} runs")
    runs = [read(run) for run in args.runs]
    names = [run.name for run in runs]
    for name in (lambda run: f"{run.name}, seed {run.results['seed']}", lambda run: run.path.resolve().name):
        names = [name(run) if Counter(names)[old] > 1 else old for run, old in zip(runs, names)]
    for i, run in enumerate(runs):
        run.label = (args.labels or names)[i]
        run.color, run.marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
    out = Path(args.out or ("figures" if len(runs) > 1 else runs[0].path))
    matplotlib.use("Agg")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for draw in FIGURES:
            with plt.rc_context(STYLE):
                figure = draw(runs)
                if isinstance(figure, str):
                    print(f"no {draw.__name__}.png: {figure}")
                    continue
                figure.savefig(out / f"{draw.__name__}.png")
                plt.close(figure)
            print(f"wrote {out / draw.__name__}.png", flush=True)
    except OSError as error:
        raise data.UserError(f"cannot write to {out}: {error}") from None


if __name__ == "__main__":
    main()
