"""Draw a finished run, or several side by side, as PNG files.

    python benchmark/figures.py runs/digits__afa__1__1700000000            # into the run's folder
    python benchmark/figures.py AFA_RUN PGD_AT_RUN --labels AFA PGD-AT     # into figures/
    python benchmark/figures.py results/vfd_adv_sweep.csv                  # the trade-offs of a sweep, into figures/

    robustness_curve.png  accuracy against the strength of the attack, and the worst case over all attacks
    weights.png           fusing weights that a run of afa.py predicts, for each layer
    statistics.png        how far an attack shifts the statistics of the features, for each layer
    features.png          contributing features that a class is inferred from, over the epochs of a run of aalp.py
    conflicts.png         share of samples whose pairing works against the classification, over its epochs
    sample_weights.png    how much each sample is paired, and what guided dropout tells about the label
    distances.png         distance to the teacher's features, over the epochs of a run of vfd_adv.py
    usefulness.png        what each feature says about the label, on clean and on adversarial images
    tradeoff.png          clean against robust accuracy on validation images, over lambda; takes more runs than 7
    threats.png           what each attacker of abnn.py leaves under each attack
    steps.png             accuracy against the steps of the attack, and
    loss_surface.png      the loss around test images, both after benchmark/audit.py
    training.png          losses, validation accuracies and learning rate, from the TensorBoard events
    examples.png          test images, attacked, and what the attack added; needs the checkpoint and the data set
"""

import importlib
import json
import logging
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.collect import on_validation, read  # noqa: E402
from common import data  # noqa: E402
from common.pgd import pgd  # noqa: E402

try:
    import matplotlib
    from matplotlib import pyplot as plt
    from PIL import Image
except ImportError as error:
    raise data.UserError(f"the figures need matplotlib ({error}): pip install -r requirements-dev.txt") from None

# Okabe & Ito's palette: told apart under every kind of colour blindness. Markers say it once more, for print in grey.
COLORS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"), "osD^vPX"
plt.rcParams.update({"backend": "Agg", "figure.dpi": 115, "figure.constrained_layout.use": True, "font.size": 11,
                     "axes.titlesize": 12, "figure.titlesize": 14, "legend.fontsize": 10, "legend.frameon": False,
                     "axes.grid": True, "grid.color": "0.88", "axes.spines.top": False, "axes.spines.right": False})
# Curves of afa.py and of abnn.py beside the model's own, which comes first.
FIXED = {"w=0": "fixed w = 0 (BN_c)", "w=0.5": "fixed w = 0.5", "w=1": "fixed w = 1 (BN_a)",
         "oracle": "oracle: best of the three", "constant": "control: constant w",
         "A": "no gradient through S (A)", "twin": "T's plain twin"}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]  # folders of finished runs, in the order of the legend, or the csv of a sweep
    out: str | None = None  # folder of the figures (None: the run's own; for several runs, figures)
    labels: list[str] | None = None  # a name for each run (None: the method's, with the seed where two are alike)


def aalp_label(args):
    """What a run of aalp.py is, from what its switches do and not from `--method`, which sets them."""
    dropout, weight = args["guided_dropout"], args["sample_weight"]
    if args["control_of"]:
        return "ALP control"
    if (dropout, weight) == ("low", "clean") and args["pairing_weight"]:
        return "AALP"
    parts = ["ALP" if args["pairing_weight"] else "AT"]
    parts += ["dropout" + f" ({dropout})" * (dropout != "low")] * (dropout != "none")
    parts += ["weights" + f" ({weight})" * (weight != "clean")] * (weight != "none")
    return " + ".join(parts)


def vfd_label(args):
    """What a run of vfd_adv.py trains: its base, and the pairs that are added to it."""
    pairs = args["lambda_adv"] > 0, args["lambda_nat"] > 0
    parts = [args["base"].upper() if args["eps"] else "undefended"]
    if any(pairs):
        name = {(True, True): "VFD", (True, False): "adv. pair", (False, True): "clean pair"}[pairs]
        parts.append(name + " (logits)" * (args["distill"] == "logits"))
    parts += ["clean statistics"] * args.get("clean_statistics", False)
    return " + ".join(parts)


def abnn_label(args):
    """What a run of abnn.py trains."""
    if args["defense"] != "abnn":
        return "undefended" if args["defense"] == "none" else "PGD-AT"
    usual = {"moments": "sample", "equalised": True, "align_weight": 0.0}
    other = [f"{k.replace('_', ' ')} {args[k]}" for k, v in usual.items() if args[k] != v]
    return ", ".join([f"ABNN {args['statistics']}", *other])


def lambda_label(args):
    """The weight of both pairs, or of each where they differ. Empty for a script that has none."""
    if "lambda_adv" not in args:
        return ""
    adv, nat = (f"{args[k]:g}" for k in ("lambda_adv", "lambda_nat"))
    return f"λ = {adv}" if adv == nat else f"λ adv. {adv}, nat. {nat}"


class Run:
    """What a run's folder says; `method` is the part of results.json that is particular to the script."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            info = json.loads((self.path / "args.json").read_text())
            if not (self.path / "results.json").exists():
                raise data.UserError(f"the run has not finished: {path} has no results.json; "
                                     f"to continue it: python {info['script']}.py --resume {shlex.quote(str(path))}")
            self.args, self.results = info["args"], json.loads((self.path / "results.json").read_text())
            audit = self.path / "audit.json"
            self.audit = json.loads(audit.read_text()) if audit.exists() else {}
            self.method, self.eps = self.results.get("method", {}), 255 * self.results["eps"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise data.UserError(f"{path} is not the folder of a run: {type(error).__name__}: {error}") from None
        self.strengths = 255 * np.array(self.method.get("strengths", []))
        self.history = self.method.get("history", {})
        self.epochs = range(1, 1 + max(map(len, self.history.values()), default=0))
        self.learned = len({w for row in self.method.get("weight_mean", []) for w in row}) > 1  # or w is constant
        kind = "PGD-AT" if self.args.get("bn") == "single" else self.results["script"].upper().replace("_", "-")
        kind = aalp_label(self.args) if kind == "AALP" else kind
        if kind in ("VFD-ADV", "ABNN"):
            kind = (vfd_label if kind == "VFD-ADV" else abnn_label)(self.args)
        elif not self.args["eps"]:
            kind = "undefended"
        self.label, self.lambdas = kind, lambda_label(self.args)
        self.eps_label = "eps (1/255)" + ", L2 norm" * (self.args.get("norm") == "l2")

    @property
    def val(self):
        return on_validation(self.results)


def both(values):
    """What the runs share, or what each has: "digits", or "digits / svhn"."""
    return " / ".join(dict.fromkeys(map(str, values)))


def robustness_curve(runs):
    """Accuracy against eps. The huge last eps is told in a note: an axis that reaches it would hide the others."""
    fig, ax = plt.subplots(figsize=(12, 6.5))
    notes = [f"Of {both(run.results['evaluated'] for run in runs)} test samples; bands: ± one standard error"]
    end = max(float(k) for run in runs for k in run.results["robustness_curve"] if float(k) < 4 * run.eps)
    far = {}  # what lies beyond

    def line(curve, label, **style):
        x, y = np.array(sorted((float(k), 100 * v) for k, v in curve.items() if float(k) <= end)).T
        return ax.plot(x, y, label=label, clip_on=False, **style)[0].get_data()

    for run in runs:
        curve, others = run.results["robustness_curve"], run.method.get("curves", {})
        look = dict(color=run.color, marker=run.marker, linewidth=2.8, markersize=7, zorder=4)
        x, y = line(curve, run.label + ", learned w" * run.learned, **look)
        error = (y * (100 - y) / run.results["evaluated"]) ** 0.5
        ax.fill_between(x, y - error, y + error, color=run.color, alpha=0.15, linewidth=0)
        for k, v in curve.items():
            if float(k) > end:
                far.setdefault(k, []).append(f"{run.label} {100 * v:.1f} %")
        star = dict(linestyle="none", marker="*", markersize=18, color=run.color, zorder=5, clip_on=False)
        worst = 100 * run.results["checkpoints"]["best"]["worst"]
        ax.plot(run.eps, worst, markeredgecolor="white", **star,
                label=f"{run.label}, worst case over\nall attacks at eps: {worst:.1f} %")
        if control := run.method.get("constant"):
            ax.plot(run.eps, 100 * control["worst"], markerfacecolor="white", **star,
                    label=f"{run.label}, constant w,\nlikewise: {100 * control['worst']:.1f} %")
        for i, name in enumerate([name for name in FIXED if name in others], 1):
            if len(runs) == 1:  # the oracle lies on one of the others: thin and dashed, it does not hide it
                look = dict(linestyle="--") if name == "oracle" else dict(linewidth=2.4, marker=MARKERS[i])
                line(others[name], FIXED[name], color=COLORS[i], **look)
            elif name in (thin := {"w=0": "--", "w=1": ":", "constant": "-.", "A": "--"}):  # no rivals of other runs
                line(others[name], f"{run.label}, {FIXED[name]}", color=run.color, linewidth=1.2, linestyle=thin[name])
    notes += [f"at eps {k}/255, not drawn: {', '.join(values)}" for k, values in far.items()]
    for eps in (trained := sorted({round(run.eps, 4) for run in runs
                                   if run.args["eps"] and run.args.get("defense", "at") == "at"})):
        ax.axvline(eps, color="0.35", linewidth=1.2)
        ax.text(eps, 101, f"eps_max = {eps:g}", ha="center", va="bottom", fontsize=10)
    for eps in trained[-1:]:
        ax.axvspan(eps, end, color="0.5", alpha=0.12, linewidth=0)
        ax.text((eps + end) / 2, 97, "extrapolation: stronger than trained for", ha="center", va="top")
    ax.set(xlim=(0, end), ylim=(0, 100), xlabel=both(run.eps_label for run in runs), ylabel="accuracy under PGD-20")
    ax.yaxis.set_major_formatter("{x:g} %")
    ax.set_title(f"{both(run.results['dataset'] for run in runs)}: accuracy against the strength of the attack", pad=26)
    fig.legend(loc="outside right center", labelspacing=0.9)
    fig.supxlabel(fill(";  ".join(notes), 150), fontsize=10)
    return fig


def by_layer(fig, axes, layers):
    """Colours for so many layers, dark to bright from first to last, with their colour bar."""
    colors = [plt.cm.viridis(0.9 * i / max(layers - 1, 1)) for i in range(layers)]
    edges = matplotlib.colors.BoundaryNorm([i + 0.5 for i in range(layers + 1)], layers)
    fig.colorbar(plt.cm.ScalarMappable(edges, matplotlib.colors.ListedColormap(colors)), ax=axes, aspect=40, pad=0.015,
                 ticks=range(1, layers + 1, 1 + layers // 12), label="normalisation layer, from input to output")
    return colors


def weights(runs):
    """Fusing weights against eps, the self-check of AFA: they should rise from BN_c's end towards BN_a's."""
    if not (runs := [run for run in runs if run.learned]):
        return "no run predicts fusing weights"
    fig, axes = plt.subplots(len(runs), figsize=(11, 1 + 5.5 * len(runs)), squeeze=False)
    for (ax,), run in zip(axes, runs):
        x, w, sd = run.strengths, np.array(run.method["weight_mean"]), np.array(run.method["weight_sd"])
        for layer, color in enumerate(by_layer(fig, ax, w.shape[1])):
            ax.plot(x, w[:, layer], color=color, linewidth=1.6, clip_on=False)
        w, sd = w.mean(1), sd.mean(1)
        ax.fill_between(x, w - sd, w + sd, color="0.3", alpha=0.18, linewidth=0,
                        label="± standard deviation over images (mean over layers)")
        ax.plot(x, w, color="black", linewidth=3.2, marker="o", clip_on=False, label="mean over layers")
        ax.set(xlim=(0, x.max()), ylim=(0, 1), xlabel=run.eps_label, ylabel="weight w: 0 is BN_c, 1 is BN_a",
               title=f"{run.label} on {run.results['dataset']}: predicted fusing weights against the strength of the "
                     f"attack\nmean over layers {w[0]:.2f} at eps 0, {w[-1]:.2f} at eps {x[-1]:g}/255")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return fig


def statistics(runs):
    """How far an attack shifts mean and log sd of a layer's channels, averaged over images: the paper's observation."""
    if not (rows := [(run, end, run.method["statistics"][end]) for run in runs for end in ("w=0", "w=1", "model")
                     if end in run.method.get("statistics", {}) and (end, run.args.get("bn")) != ("model", "dual")]):
        return "no run has measured the statistics of its features"
    fig, axes = plt.subplots(len(rows), 2, figsize=(12, 0.8 + 3.6 * len(rows)), squeeze=False)
    colors = by_layer(fig, axes, max(len(found["shift"]) for _, _, found in rows))
    for pair, (run, end, found) in zip(axes, rows):
        path = FIXED.get(end, "").replace("fixed", ", along")
        for i, (ax, (key, share)) in enumerate(zip(pair, found["monotone_share"].items())):
            for color, shift in zip(colors, found["shift"]):
                ax.plot(run.strengths, shift[i], color=color, linewidth=1.8, marker="o", markersize=3, clip_on=False)
            ax.set_title(f"{run.label}{path}: {key.replace('log_sd', 'log standard deviation')}\n"
                         f"monotone in eps (|rho| ≥ 0.95): {100 * share:.0f} % of channels")
            ax.set(xlim=(0, run.strengths[-1]), ylim=(0, None), xlabel=run.eps_label, ylabel="shift (norm)")
    fig.suptitle(f"{both(run.results['dataset'] for run, _, _ in rows)}: how an attack shifts the feature statistics "
                 "of each layer\n(means in running standard deviations; each panel has its own scale)")
    return fig


def over_epochs(fig, axes, runs, panels):
    """Lines of `history` over the epochs. `panels`: a title, and the keys of its lines: solid, then dashed."""
    for ax, (title, keys) in zip(axes.flat, panels.items()):
        for run in runs:
            for key, dashed in zip(keys, (False, True)):
                if key not in run.history:
                    continue
                look = dict(linestyle="--", fillstyle="none") if dashed else dict(label=run.label)
                ax.plot(run.epochs, run.history[key], color=run.color, marker=run.marker, linewidth=1.8, markersize=5,
                        clip_on=False, **look)
        ax.set_title(title)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.set(xlim=(1, max(2, max(len(run.epochs) for run in runs))))
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_legend_handles_labels()[0]}
    fig.legend(handles=list(lines.values()), loc="outside right center", labelspacing=0.9)


def features(runs):
    """O1 of AALP: how few features say what the class is, of the pooled features and of the last map's positions."""
    if not (runs := [run for run in runs if "n50_map_clean" in run.history]):
        return "no run has counted the features that contribute to a class"
    fig, axes = plt.subplots(2, 2, figsize=(13, 8.5), sharex=True)
    counted = {"n50": "n50: contribute more than\nhalf of what the largest does",
               "n90": "n90: the fewest that make up\n90 % of the positive ones"}
    levels = {"features": "pooled features", "map": "positions of the last map"}
    over_epochs(fig, axes, runs, {f"{n} of the {name}": (f"{n}_{level}_clean", f"{n}_{level}_adv")
                                  for n in counted for level, name in levels.items()})
    for row, words in zip(axes, counted.values()):
        row[0].set_ylabel(words)
        for ax in row:
            ax.set_ylim(0, None)
    fig.suptitle(f"{both(run.results['dataset'] for run in runs)}: features that an image's class is inferred from, "
                 "mean over images\nsolid: clean images; dashed, hollow markers: adversarial images")
    return fig


def conflicts(runs):
    """O2 of AALP: how often the gradient of the pairing is at odds with that of the classification."""
    if not (runs := [run for run in runs if "conflicting_logits" in run.history and run.args["eps"]
                     and run.args["pairing_weight"]]):
        return "no run pairs logits"
    fig, axes = plt.subplots(2, 2, figsize=(13, 8.5), sharex=True, sharey=True)
    kinds = {"conflicting": "conflicting: <g_ce, g_lp> < 0",
             "overemphasised": "over-emphasised: <g_ce, g_ce + g_lp> < 0"}
    levels = {"logits": "clean logits", "parameters": "parameters"}
    over_epochs(fig, axes, runs, {f"{words}\ngradients of the {name}": (f"{kind}_{level}",)
                                  for kind, words in kinds.items() for level, name in levels.items()})
    for ax in axes[:, 0]:
        ax.set(ylim=(0, 1), ylabel="share of samples")  # shared with the right column
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    fig.suptitle(f"{both(run.results['dataset'] for run in runs)}: samples whose pairing works against the "
                 "classification")
    return fig


def sample_weights(runs):
    """Distribution of the pairing's weight w in each epoch, and how much the dropout masks give the label away."""
    runs = [run for run in runs if "sample_weight" in run.history and run.args["eps"]]
    weighted = [run for run in runs if run.args["sample_weight"] != "none" and run.args["pairing_weight"]]
    leaking = [run for run in runs if run.args["guided_dropout"] != "none"]
    if not weighted and not leaking:
        return "no run weighs the pairing or drops features"
    count = len(weighted) + bool(leaking)
    fig, axes = plt.subplots(count, figsize=(11, 1 + 3.8 * count), squeeze=False)
    for (ax,), run in zip(axes, weighted):
        bins = np.array(run.history["weight_bins"])
        share = 100 * bins / bins.sum(1, keepdims=True)
        edges = np.arange(len(bins) + 1) + 0.5
        scale = matplotlib.colors.PowerNorm(0.5, 0, share.max())  # or the first epoch would hide the others
        mesh = ax.pcolormesh(edges, np.linspace(0, 1, bins.shape[1] + 1), share.T, cmap="Blues", norm=scale)
        fig.colorbar(mesh, ax=ax, pad=0.015, label="samples, in %")
        line = dict(color="white", linewidth=5), dict(color=COLORS[1], linewidth=2.4, marker="o", label="mean w")
        for look in line:  # the white one is its outline
            ax.plot(run.epochs, run.history["sample_weight"], clip_on=False, **look)
        ax.set(title=f"{run.label}: weight w of the pairing (--sample-weight {run.args['sample_weight']}), "
                     f"mean over all epochs {np.mean(run.history['sample_weight']):.2f}", ylim=(0, 1), ylabel="w")
        ax.legend(loc="lower right", frameon=True)
        ax.grid(False)
    for ax in axes[len(weighted):, 0]:
        for run in leaking:
            ax.plot(run.epochs, 100 * np.array(run.history["label_leak"]), label=run.label, color=run.color,
                    marker=run.marker, linewidth=1.8, clip_on=False)
        ax.axhline(0, color="0.35", linewidth=1.2)
        ax.set(title="label leak: training accuracy with the dropout mask minus without it", ylabel="points, of 100")
        ax.legend(loc="lower right")
        ax.set_xlim(0.5, max(len(run.epochs) for run in runs) + 0.5)
    for ax in axes[:, 0]:
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
    fig.suptitle(f"{both(run.results['dataset'] for run in dict.fromkeys(weighted + leaking))}: adaptive sample "
                 "weights and guided dropout")
    return fig


def distances(runs):
    """D6 of VFD-Adv: how far a network's features are from those that its teacher has for the clean image."""
    if not (runs := [run for run in runs if "cka_clean" in run.history]):
        return "no run has a teacher to measure the distance to"
    fig, axes = plt.subplots(1, 2, figsize=(13, 5.8), squeeze=False)
    over_epochs(fig, axes, runs, {
        "squared error over the variance of the teacher's\n(1: no nearer than a constant; log scale)":
            ("distance_clean", "distance_adv"),
        "linear CKA, blind to rotation and scale\n(1: the same)": ("cka_clean", "cka_adv")})
    error, cka = axes[0]
    error.set(yscale="log", ylabel="distance to the teacher")
    error.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    error.yaxis.set_major_formatter("{x:g}")
    error.yaxis.set_minor_formatter("")
    error.axhline(1, color="0.35", linewidth=1.2, zorder=1)
    cka.set(ylim=(0, 1), ylabel="similarity to the teacher")
    logits = any(run.args["distill"] == "logits" for run in runs) * " (where logits are distilled: of the logits)"
    fig.suptitle(f"{both(run.results['dataset'] for run in runs)}: features of training images against the teacher's "
                 f"for the clean image{logits}\nsolid: clean images; dashed, hollow markers: adversarial images")
    return fig


def usefulness(runs):
    """D7 of VFD-Adv: above, does an attack turn a network's features? Below, which network has more predictive ones?"""
    networks = {}  # values to name and look: a teacher that several runs share is there once
    for name in ("teacher", "student"):
        for run in runs:
            if found := run.method.get("usefulness", {}).get(name):
                key = (name, *(() if name == "teacher" else (run.label,)), *np.round(found["clean"] + found["adv"], 6))
                look = dict(color="0.45", marker="*") if name == "teacher" else dict(color=run.color, marker=run.marker)
                networks.setdefault(key, ([], np.array([found["clean"], found["adv"]]), look))[0].append(run.label)
    if not networks:
        return "no run has measured how useful its features are"
    shared = sum(key[0] == "teacher" for key in networks) < 2
    columns = max(2, min(4, len(networks)))
    rows = -(-len(networks) // columns)
    fig = plt.figure(figsize=(13, 4 + 4 * rows))
    above, below = fig.subfigures(2, height_ratios=(rows, 0.85), hspace=0.03)
    axes = above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(networks):]:
        ax.remove()
    curves = below.subplots(1, 2, sharey=True)
    low = min(-0.1, min(values.min() for _, values, _ in networks.values()) - 0.05)
    for ax, (key, (labels, (clean, adv), look)) in zip(axes.flat, networks.items()):
        teacher = key[0] == "teacher"
        name = labels[0] if not teacher else "teacher" if shared else f"teacher of\n{', '.join(labels)}"
        ax.plot((0, 1), (0, 1), color="0.35", linewidth=1.2, linestyle=":")
        ax.axhline(0, color="0.35", linewidth=1.2)
        ax.axhspan(low, 0, color="0.5", alpha=0.12, linewidth=0)
        ax.scatter(clean, adv, s=60 if teacher else 24, alpha=0.65, linewidths=0, **look)
        ax.set_title(f"{fill(name, 32)}\nmean {clean.mean():.2f} clean, {adv.mean():.2f} adv.\n"
                     f"turned by the attack: {100 * (adv < 0).mean():.0f} %", fontsize=11)
        ax.set(xlim=(0, 1), ylim=(low, 1), xticks=(0, 0.25, 0.5, 0.75, 1))
        ax.xaxis.set_major_formatter("{x:g}")
        for curve, values in zip(curves, (clean, adv)):
            at = (np.arange(len(values)) + 0.5) / len(values)
            curve.plot(100 * at, np.sort(values)[::-1], color=look["color"], linewidth=3.5 if teacher else 2,
                       linestyle="--" if teacher else "-", label=name.replace("\n", " "))
    for i, ax in enumerate(axes.flat[:len(networks)]):
        ax.xaxis.set_tick_params(labelbottom=True)
        if i % columns == 0:
            ax.set_ylabel("on adversarial images")
        if i + columns >= len(networks):
            ax.set_xlabel("on clean images")
    for ax, kind in zip(curves, ("clean", "adversarial")):
        ax.axhline(0, color="0.35", linewidth=1.2, zorder=1)
        ax.set(xlim=(0, 100), ylim=(low, 1), title=f"sorted, on {kind} images", xlabel="features, from the most useful")
        ax.xaxis.set_major_formatter("{x:g} %")
        ax.yaxis.set_tick_params(labelleft=True)
    curves[0].set_ylabel("correlation with the label")
    below.legend(*curves[0].get_legend_handles_labels(), loc="outside right center", labelspacing=0.9)
    tested = both(min(run.results["evaluated"], 1000) for run in runs if run.method.get("usefulness"))
    above.suptitle(f"{both(run.results['dataset'] for run in runs)}: correlation of each feature with the label, on "
                   f"{tested} test images\nbelow the diagonal: weaker under attack; shaded: turned against its class")
    return fig


# Arguments that may differ along a line of tradeoff(): its axis, the seed, and what changes nothing about training.
ALONG = {"lambda_adv", "lambda_nat", "seed", "preset", "data_dir", "data_on", "runs_dir", "device", "compile", "resume",
         "eval_only", "test_size"}
DISTILLING = {"distill", "teacher", "teacher_epochs", "teacher_lr"}  # nothing at 0


def rows_of_sweep(path):
    """{data set: rows of a csv of validation accuracies, with what tradeoff() looks at in a run}."""
    runs = {}
    if not (rows := read(path)):
        raise data.UserError(f"{path} is no sweep: it has no rows, or is not there")
    for row in rows.values():
        if "val_clean" not in row or row["script"] != "vfd_adv":
            raise data.UserError(f"{path} is no sweep of vfd_adv.py: its rows have no accuracies on validation images")
        module, words = importlib.import_module(row["script"]), shlex.split(row["command"] or "")
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is None:
            raise data.UserError(f"{path} is damaged: the row of seed {row['seed']}, {row['setting']} has no command")
        args = tyro.cli(module.Args, args=words[script + 1 :])
        preset = {**module.PRESETS[args.dataset][args.preset], "beta": module.BETA[args.base]}
        args = {k: preset.get(k) if v is None else v for k, v in asdict(args).items()}
        if args["lambda_adv"] is None or args["lambda_nat"] is None:
            raise data.UserError(f"{path} has a row without the weights that are compared: {row['command']}")
        try:
            accs = {k: float(row[k]) for k in ("val_clean", "val_robust")}
        except ValueError as error:
            raise data.UserError(f"{path} is damaged: {error} in the row of {row['command']}") from None
        runs.setdefault(row["dataset"], []).append(SimpleNamespace(args=args, results=row, val=accs))
    return runs


def lines_over_lambda(runs):
    """{name: {weights: runs}}, where runs differ in lambda, or without distillation in beta, and in the seed alone.

    A base without distillation begins each line, whatever is distilled there and from which teacher. The weights are
    (lambda_adv, lambda_nat), or (beta,).
    """
    plain, lines, over_beta = {}, {}, {}
    for run in runs:
        if "lambda_adv" not in run.args or not run.val:
            continue
        at = adv, nat = run.args["lambda_adv"], run.args["lambda_nat"]
        other = {k: str(v) for k, v in run.args.items() if k not in ALONG}
        own = tuple((k, other.pop(k)) for k in sorted(DISTILLING) if k in other)
        pair = "" if adv and nat else "adversarial pair" if adv else "clean pair"
        key = tuple(sorted(other.items()))
        group = lines.setdefault((key, own, pair), {}) if any(at) else plain.setdefault(key, {})
        group.setdefault(at, []).append(run)
        if not any(at):
            key = tuple(sorted(other.items() - {("beta", other["beta"])}))
            over_beta.setdefault((key, (), "over β"), {}).setdefault((run.args["beta"],), []).append(run)
    lines = {key: plain.get(key[0], {}) | points for key, points in lines.items()} | over_beta
    named = {}
    lines = [(dict(key + own), pair, dict(sorted(points.items()))) for (key, own, pair), points in lines.items()
             if len(points) > 1]
    bases = ["at", "trades", "mart"]
    for line, pair, points in sorted(lines, key=lambda line: (bases.index(line[0]["base"]), line[1])):
        rivals = [rival for rival, *_ in lines if rival["base"] == line["base"]]
        varying = [f"{k} {v}" for k, v in line.items() if len({rival.get(k, v) for rival in rivals}) > 1]
        named[", ".join([line["base"].upper(), *[pair] * bool(pair), *varying])] = points
    return named


def tradeoff(runs):
    """Clean against robust accuracy over lambda, and over beta without distillation. On validation images: they may be
    chosen by what is seen here."""
    if not (lines := lines_over_lambda(runs)):
        return "no two runs of vfd_adv.py differ in lambda and in nothing else"
    panels = [[name] for name in lines]
    panels = panels if len(lines) == 1 else [list(lines), *panels]  # all for the comparison, and each close up
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, squeeze=False,
                             figsize=(16 if columns > 2 else 13, 1.2 + (4.6 if rows > 1 else 5.8) * rows))
    for ax in axes.flat[len(panels):]:
        ax.remove()
    looks = {name: dict(color=COLORS[i % 7], marker=MARKERS[i % 7]) for i, name in enumerate(lines)}
    for ax, names in zip(axes.flat, panels):
        ends = []
        for name in names:
            # (points, 2): means over the seeds. All seeds see the same images: their number makes no error smaller.
            accs = [np.array([[*run.val.values()] for run in group]) for group in lines[name].values()]
            size = next(iter(lines[name].values()))[0].args["val_size"]
            error = 100 * np.array([(acc * (1 - acc) / size).mean(0) ** 0.5 for acc in accs])
            points = 100 * np.array([acc.mean(0) for acc in accs])
            ends += [points - error, points + error]
            bars = ax.errorbar(*points.T, xerr=error[:, 0], yerr=error[:, 1], linewidth=1.8, markersize=8, label=name,
                               elinewidth=1, **looks[name])
            for bar in bars[2]:
                bar.set_alpha(0.3)
            for (x, y), weight in zip(points, lines[name]):
                if weight == (0, 0):
                    ax.plot(x, y, color="white", marker=looks[name]["marker"], markersize=8, zorder=4,
                            markeredgecolor=looks[name]["color"], markeredgewidth=1.8)
        low, high = np.concatenate(ends).min(0), np.concatenate(ends).max(0)
        margin = np.maximum(0.05 * (high - low), 0.1)
        ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]),
               title=names[0] if len(names) == 1 else "all, on one scale",
               xlabel="clean accuracy", ylabel="robust accuracy (PGD-10)")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g} %")
        if len(names) > 1:
            continue
        order = np.argsort(points[:, 1], kind="stable")  # labels stand in a column, apart, in the order of the points
        gap = min(0.09, 1 / len(order))
        heights = (points[order, 1] - ax.get_ylim()[0]) / np.ptp(ax.get_ylim())
        heights = np.maximum.accumulate(heights - gap * np.arange(len(order))) + gap * np.arange(len(order))
        heights = np.minimum(heights, 1 - gap * np.arange(len(order))[::-1])
        for i, height in zip(order, heights):
            weight, group = list(lines[name].items())[i]
            text = lambda_label(group[0].args) if len(weight) > 1 else f"β = {weight[0]:g}"
            ax.annotate(text, points[i], (1.02, height), "data", "axes fraction", va="center", fontsize=10,
                        arrowprops=dict(arrowstyle="-", color="0.45", linewidth=0.8, shrinkA=0, shrinkB=5))
    if len(lines) > 1:
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    used = [run for points in lines.values() for group in points.values() for run in group]
    over_beta = any(len(weight) == 1 for points in lines.values() for weight in points)
    fig.suptitle(f"{both(run.results['dataset'] for run in used)}: clean against robust accuracy over the weight λ of "
                 "the distillation" + ", and over β without it" * over_beta)
    sizes, seeds = both(run.args["val_size"] for run in used), both(run.results["seed"] for run in used)
    numbers = sorted({len(group) for points in lines.values() for group in points.values()})
    means = f": means of {' to '.join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))}"
    fig.supxlabel(f"{sizes} validation images, best epoch;  bars: ± one standard error;  hollow: λ = 0, the base "
                  f"alone;  seed {seeds}" + means * ("/" in seeds), fontsize=10)
    return fig


def threats(runs):
    """Accuracy by attacker (rows) and attack (columns): what is left under A and B and gone under C was hidden."""
    runs = [run for run in runs if "threats" in run.method]
    if not runs:
        return "no run has a table of attackers (abnn.py)"
    heights = [len(run.method["threats"]) for run in runs]
    fig, axes = plt.subplots(len(runs), 1, figsize=(12, 1.6 * len(runs) + 0.5 * sum(heights)), squeeze=False,
                             height_ratios=heights)
    for ax, run in zip(axes[:, 0], runs):
        table = run.method["threats"]
        columns = list(table["worst"])
        values = np.array([[100 * row.get(k, np.nan) for k in columns] for row in table.values()])
        image = ax.pcolormesh(values, cmap="viridis", vmin=0, vmax=100, edgecolors="white", linewidth=2)
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                ax.text(j + 0.5, i + 0.5, f"{value:.1f}", ha="center", va="center",
                        color="white" if value < 55 else "black", weight="bold" if i == 0 else "normal")
        ax.set_xticks(np.arange(len(columns)) + 0.5, [k.replace("_", "\n") for k in columns])
        ax.set_yticks(np.arange(len(table)) + 0.5, list(table))
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.grid(False)
        ax.set_title(f"{run.results['dataset']}, {run.label}: accuracy by attacker and attack, of "
                     f"{run.results['evaluated']} test samples")
    fig.colorbar(image, ax=axes[:, 0], label="accuracy", format="{x:g} %", pad=0.02)
    fig.supxlabel("A: no gradient through S;  B: from T's plain twin;  C: full white box;  "
                  "worst: per sample over all rows;  all: over all attacks", fontsize=10)
    return fig


def steps(runs):
    """Accuracy against the steps of one long attack: what still falls at its end has not been measured yet."""
    if not (runs := [run for run in runs if run.audit.get("steps_curve")]):
        return "no run has a curve over the steps of an attack: benchmark/audit.py makes it"
    fig, ax = plt.subplots(figsize=(12, 6.5))
    for run in runs:
        for loss, points in run.audit["steps_curve"]["accuracy"].items():
            x, y = [int(k) for k in points], [100 * v for v in points.values()]
            look = dict(linestyle="-") if loss == "ce" else dict(linestyle="--", fillstyle="none")
            ax.plot(x, y, color=run.color, marker=run.marker, linewidth=2, markersize=7, clip_on=False,
                    label=f"{run.label}, {dict(ce='cross-entropy').get(loss, loss)}", **look)
    ticks = sorted({int(k) for run in runs for k in run.audit["steps_curve"]["accuracy"]["ce"]})
    ax.set(xscale="log", xlim=(1, max(*ticks, 2)), ylim=(0, 100), xlabel="steps of PGD, from the image itself",
           ylabel="accuracy: fooled at no step so far")
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g} %")
    ax.set_title(f"{both(run.results['dataset'] for run in runs)}: accuracy against the number of steps", pad=14)
    fig.legend(loc="outside right center", labelspacing=0.9)
    notes = [f"{run.label} {100 * run.audit['worst']:.1f} % of {run.audit['evaluated']}" for run in runs]
    used = [both(f"{255 * run.audit['eps']:.4g}/255" for run in runs),
            both(run.audit["steps_curve"]["evaluated"] for run in runs)]
    text = "eps {}, the first {} test images; worst case of the whole audit: ".format(*used) + ", ".join(notes)
    fig.supxlabel(fill(text, 150), fontsize=10)
    return fig


def loss_surface(runs):
    """Cross-entropy around test images. Masked gradients show: no rise to the right, ripples, or more rise upwards."""
    if not (runs := [run for run in runs if run.audit.get("surface")]):
        return "no run has a loss surface: benchmark/audit.py makes it"
    columns = max(len(run.audit["surface"]["loss"]) for run in runs)
    fig, axes = plt.subplots(len(runs), columns, figsize=(13, 1.4 + 3 * len(runs)), sharex=True, sharey=True,
                             squeeze=False)
    for row, run in zip(axes, runs):
        row[0].set_ylabel(f"{run.label}\nrandom signs")
        for ax, image, loss in zip(row, run.audit["surface"]["images"], run.audit["surface"]["loss"]):
            loss = np.array(loss)  # rows: along the gradient
            at, middle = np.linspace(-1, 1, len(loss)), len(loss) // 2
            along, across = (max(ends) - loss[middle, middle] for ends in (loss[-1:, middle], loss[middle, [0, -1]]))
            filled = ax.contourf(at, at, loss.T, 14, cmap="cividis")
            ax.contour(at, at, loss.T, 14, colors="white", linewidths=0.5, alpha=0.6)
            bar = fig.colorbar(filled, ax=ax, pad=0.03, shrink=0.9)
            bar.ax.tick_params(labelsize=8)
            bar.locator = matplotlib.ticker.MaxNLocator(5)
            bar.update_ticks()
            ax.plot(0, 0, marker="+", color="white", markersize=11, markeredgewidth=2)
            ax.set_title(f"image {image}: to the right {along:+.2g},\nup or down at most {across:+.2g}", fontsize=9.5)
            ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")
            ax.grid(False)
    for ax in axes[-1]:
        ax.set_xlabel("gradient's sign")
    sizes = both(f"eps = {255 * run.audit['eps']:.4g}/255" for run in runs)
    fig.suptitle(f"{both(run.results['dataset'] for run in runs)}: cross-entropy around test images (axes in units of "
                 f"{sizes}; each panel has its own scale)")
    return fig


def training(runs):
    """Losses, validation accuracies and learning rate against the step. A stage ends where one of the losses ends."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each run that was continued
    fig, axes = plt.subplots(3, figsize=(12, 9.5), sharex=True, height_ratios=(3, 3, 1.8))
    panels = {"losses/": [], "val/": [], "charts/learning_rate": []}  # tags; its place there is the look of a tag
    ends = set()
    for run in runs:
        events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
        for ax, (prefix, tags) in zip(axes, panels.items()):
            series = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag.startswith(prefix)}
            tags += [tag for tag in series if tag not in tags]
            for tag, points in series.items():
                i, label = tags.index(tag) % 7, f"{run.label}: " * (len(runs) > 1) + tag.split("/")[1]
                look = dict(color=COLORS[i], marker=MARKERS[i])
                if len(runs) > 1:  # then colour and marker tell the runs apart, and dashes the tags
                    look = dict(color=run.color, marker=run.marker, linestyle=("-", "--", ":", "-.")[i % 4])
                ax.plot([e.step for e in points], [e.value for e in points], lw=1.8, ms=4, label=label, **look)
            last = {points[-1].step for points in series.values()}
            ends |= {step for step in last if step < max(last)} if prefix == "losses/" else set()
    if not panels["losses/"]:
        return "there are no TensorBoard events in the folder"
    note = any(run.learned for run in runs) * " (AFA: in stage 1 each end on its own data, in stage 2 the whole model)"
    for ax, title in zip(axes, ("losses", f"validation accuracy{note}", "learning rate at the end of an epoch")):
        ax.set_title(title, loc="left")
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
        for step in ends:
            ax.axvline(step, color="0.35", linewidth=1.2, linestyle=":")
            axes[0].annotate("stage 2", (step, 1), (3, 3), ("data", "axes fraction"), "offset points", fontsize=10)
    axes[1].set_ylim(0, 1)
    axes[1].yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes[2].set(yscale="log", xlabel="optimiser step")
    fig.suptitle(f"Training of {both(run.label for run in runs)} on {both(run.results['dataset'] for run in runs)}")
    return fig


def examples(runs):
    """Test images clean, under PGD-20 on the best checkpoint, and the perturbation: what an eps looks like."""
    tall = any("threats" in run.method for run in runs)
    fig = plt.figure(figsize=(12, (10.4 if tall else 5.6) * len(runs)))
    for part, run in zip(fig.subfigures(len(runs), squeeze=False)[:, 0], runs):
        if not (run.path / "best.pt").exists():
            return f"{run.path} has no best.pt"
        try:
            module = importlib.import_module(run.results["script"])
            net, args, _ = module.load(run.path, "cpu")
            d = data.load_as(args, "cpu")
        except (data.UserError, ImportError) as error:
            return str(error)
        x, y, eps = data.to_float(d.test.x[:8]), d.test.y[:8], run.results["eps"]
        x_adv = pgd(net, x, y, eps=eps, step_size=eps / 4, steps=20, norm=args.norm, random_start=False)
        predictions = zip(y.tolist(), *(net(images).argmax(1).tolist() for images in (x, x_adv)))
        rows = {"clean": x, "adversarial": x_adv, "10 x difference": (0.5 + 10 * (x_adv - x)).clamp(0, 1)}
        if hasattr(module, "craft"):  # the attacks within a mask, too
            generator = torch.Generator().manual_seed(0)
            rows |= {k: module.craft(k, net, x, y, args, generator) for k in module.KINDS[1:] if k != "af_universal"}
        axes = part.subplots(len(rows), len(x), squeeze=False, subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
        for row, (name, images) in zip(axes, rows.items()):
            row[0].set_ylabel(name)
            images = images[:, :, 0] if images.ndim == 5 else images  # first frames
            for ax, image in zip(row, images.permute(0, 2, 3, 1).numpy()):
                ax.imshow(image, interpolation="nearest")
        for ax, classes in zip(axes[0], predictions):
            fooled = dict(color="#C00000", weight="bold") if classes[0] == classes[1] != classes[2] else {}
            ax.set_title("true {}\nclean → {}\nadv. → {}".format(*(d.classes[i] for i in classes)), size=10, **fooled)
        part.suptitle(f"{run.label} on {run.results['dataset']}: PGD-20 at {run.eps:g}/255 (red: fools the network)")
    return fig


def save(figure, path, lines=True):
    """Write the figure; with `lines` as a picture of few colours, which takes a third of the bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        if lines:
            Image.open(path).convert("RGB").quantize(256, dither=0).save(path)
    except OSError as error:
        raise data.UserError(f"{path} cannot be written: {error}") from None
    print(f"wrote {path}", flush=True)


def draw_sweep(path, out):
    """The trade-offs of a csv, one figure for each data set."""
    for dataset, runs in rows_of_sweep(path).items():
        if isinstance(figure := tradeoff(runs), str):
            raise data.UserError(f"{path}, {dataset}: {figure}")
        save(figure, out / f"tradeoff_{dataset}.png")


if __name__ == "__main__":
    args = data.parse(Args, __doc__)
    data.on_interrupt(None)
    if len(args.runs) == 1 and args.runs[0].endswith(".csv"):
        draw_sweep(args.runs[0], Path(args.out or "figures"))
        raise SystemExit(0)
    if not args.runs or len(args.labels or args.runs) != len(args.runs):
        raise data.UserError(f"name one to {len(COLORS)} folders of runs, and as many --labels or none")
    runs = [Run(path) for path in args.runs]
    if (many := len(runs) > len(COLORS)) and not lines_over_lambda(runs):
        raise data.UserError(f"name one to {len(COLORS)} folders of runs: more are for tradeoff.png alone, and here no "
                             "two differ in lambda and in nothing else")
    lambdas = {label: {run.lambdas for run in runs if run.label == label} for label in {run.label for run in runs}}
    names = [run.label + f", {run.lambdas}" * (len(lambdas[run.label]) > 1) for run in runs]
    for i, (run, name) in enumerate(zip(runs, names)):
        name += f", seed {run.results['seed']}" * (names.count(name) > 1)
        run.label, run.color, run.marker = args.labels[i] if args.labels else name, COLORS[i % 7], MARKERS[i % 7]
    out = Path(args.out or ("figures" if len(runs) > 1 else runs[0].path))
    for draw in (robustness_curve, weights, statistics, features, conflicts, sample_weights, distances, usefulness,
                 tradeoff, threats, steps, loss_surface, training, examples):
        path = out / f"{draw.__name__}.png"
        figure = f"it takes at most {len(COLORS)} runs" if many and draw is not tradeoff else draw(runs)
        if isinstance(figure, str):
            print("warning: " * (draw is examples) + f"no {path.name}: {figure}", flush=True)
            continue
        save(figure, path, lines=draw not in (sample_weights, loss_surface, examples))
