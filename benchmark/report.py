"""Write the tables of the documents from the csv files in results/, and nothing else.

    python benchmark/report.py             # rewrites docs/*.md and README.md where a number has changed
    python benchmark/report.py --check     # changes nothing; status 1 when a document disagrees with its csv

What stands between a marker and `<!-- end -->` belongs to this program:

    <!-- table: afa digits -->           a row for each setting: best checkpoint, and two columns of the last; mean and
                                         deviation over seeds
    <!-- table: afa cifar10 reduced -->  settings on part of the training images, and only those
    <!-- curve: afa digits; A; B -->     PGD-20 accuracy against eps, of the settings A and B; without them of all
    <!-- threats: abnn digits; ABNN -->  accuracy by attacker and attack
    <!-- audits: digits -->              audited runs, of all methods: what the script's attacks leave, and the audit's;
                                         also `cifar10 reduced`
    <!-- cost: speed_abnn -->            milliseconds a step, from results/speed_abnn.json of benchmark/speed.py
    <!-- ratio: speed_abnn; A; B -->     A over B of these, inside a sentence or a row
    <!-- scale: scale -->                samples a second and memory of the runs in results/scale.csv
    <!-- sweep: vfd_adv_sweep digits --> validation accuracy, clean and robust, by base, pair and lambda
    <!-- summary: digits -->             the rows of SUMMARY, of all methods; also `cifar10 reduced`
    <!-- value: afa digits; AFA; worst -->   one number, inside a sentence or a row

Fractions are shown in percent. What no csv has yet is shown as "not yet measured".
"""

import argparse
import csv
import json
import re
import signal
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
MISSING = "not yet measured"
# Names of settings, in the order of the rows; a setting without a name has its flags for one, and comes last.
NAMES = {
    "afa": {"default": "AFA", "--bn single": "PGD-AT", "--epochs 16 --bn single": "PGD-AT, 16 epochs",
            "--epochs 48 --bn single": "PGD-AT, 48 epochs", "--eps 0/255 --bn single": "undefended",
            "--gate layer": "AFA, a gate in each layer", "--finetune all": "AFA, stage 2 trains all",
            "--harden 0.0": "AFA, not hardened", "--gate-epochs 0": "AFA, the gate untrained",
            "--epochs 16 --gate-epochs 4": "AFA, twice the epochs"},
    "aalp": {"default": "AALP, both modules", "--control-of RUN": "ALP, control: mean weight of AALP",
             "--method alp": "ALP", "--method alp --guided-dropout low": "ALP + guided dropout",
             "--method alp --guided-dropout random": "ALP + random dropout",
             "--method alp --sample-weight clean": "ALP + sample weights",
             "--method at": "no pairing", "--eps 0/255 --method at": "undefended"},
    "vfd_adv": {f"{flags}{weights}".strip() or "default": f"{base}{what}"
                for base, flags in (("AT", ""), ("TRADES", "--base trades"), ("MART", "--base mart"))
                for what, weights in ((" + VFD", ""), (", adversarial pair", " --lambda-nat 0.0"),
                                      (", clean pair", " --lambda-adv 0.0"), ("", " --lambda-adv 0.0 --lambda-nat 0.0"),
                                      (" + logits", " --distill logits"),
                                      (" + VFD, lambda_0", " --lambda-adv 6.4 --lambda-nat 6.4"),
                                      (", adversarial pair, lambda_0", " --lambda-adv 6.4 --lambda-nat 0.0"))}
    | {"--epochs 36 --lambda-adv 0.0 --lambda-nat 0.0": "AT, twice the epochs",
       "--epochs 36 --lambda-adv 6.4 --lambda-nat 6.4": "AT + VFD, lambda_0, twice the epochs",
       "--base trades --beta 2.0 --lambda-adv 0.0 --lambda-nat 0.0": "TRADES, beta 2",
       "--lambda-adv 0.0 --lambda-nat 0.0 --clean-statistics": "AT, clean images in the statistics"},
    "abnn": {"default": "ABNN", "--moments batch": "ABNN, batch moments", "--statistics channel": "ABNN, channel",
             "--statistics channel --moments batch": "ABNN, channel, batch moments",
             "--statistics flat": "ABNN, flat", "--statistics flat --moments batch": "ABNN, flat, batch moments",
             "--no-equalised": "ABNN, map that learns", "--align-weight 1.0": "ABNN, alignment loss",
             "--defense at": "PGD-AT", "--defense none": "undefended",
             "--val-size 16 --test-size 64 --frames 8 --arch conv3d --epochs 15 --lr 0.02 --milestones 12 "
             "--defense none --clean-epochs 40": "undefended, conv3d"},
}  # fmt: skip
SUMMARY = (("afa", "AFA"), ("afa", "PGD-AT"), ("aalp", "AALP, both modules"), ("aalp", "ALP"),
           ("aalp", "no pairing"), ("vfd_adv", "AT + VFD"), ("vfd_adv", "AT"), ("vfd_adv", "TRADES + VFD"),
           ("vfd_adv", "TRADES"), ("vfd_adv", "MART + VFD"), ("vfd_adv", "MART"), ("abnn", "ABNN"), ("abnn", "PGD-AT"),
           ("abnn", "undefended"))  # fmt: skip
# Flags that all runs of the GPU lists, or of the reduced ones, have: not part of a name. Other values of them are.
COMMON = {"--bf16", "--compile", "--test-size 300", "--test-size 1000"}
REDUCED = {"--arch preactresnet8", "--attack-steps 3", "--train-size 7000", "--val-size 500", "--test-size 500",
          "--test-size 200", "--epochs 12", "--epochs 15", "--epochs 18", "--epochs 24",
          *(f"--eps-warmup-epochs {n}.0" for n in (3, 6, 8, 9, 12)), "--gate-epochs 2", "--teacher-epochs 10",
          *(f"--milestones {both}" for both in ("8 11", "10 13", "12 16", "16 22")),
          "--substitute svhn", "--substitute cifar10"}  # fmt: skip
COLUMNS = [*"worst clean fgsm pgd20 pgd50_margin targeted transfer".split(), "constant worst", "constant clean",
           "last worst", "last clean"]
ATTACKERS = ("worst", "A ce", "A margin", "B ce", "B margin", "C ce", "C margin", "C strong", "no gradient")
ATTACKS = ("clean", "pgd", "roa", "roa_search", "af", "af_universal", "spa", "all")
NOT_FRACTIONS = ("n50", "n90", "cka", "distance", "usefulness", "sample_weight", "weight@", "weight_sd@")
LAMBDA_0 = 6.4  # D/C of the embedded data and of reduced CIFAR-10: 64 features, ten classes


def flags_of(setting):
    return re.split(r" (?=--)", setting) if setting != "default" else []


def name_of(script, setting):
    common = COMMON | (REDUCED if "--train-size" in setting else set())
    flags = [flag for flag in flags_of(setting) if flag not in common]
    return NAMES.get(script, {}).get(" ".join(flags) or "default", " ".join(flags) or "default")


def read(source):
    """{name: rows of its seeds} of a source such as "afa digits" or "afa cifar10 reduced", in the order of NAMES.

    Data sets from files that are not the official ones are included, and their rows say so.
    """
    script, dataset, *reduced = source.split()
    groups, path = defaultdict(list), ROOT / "results" / f"{script}.csv"
    rows = csv.DictReader(path.read_text().splitlines() if path.exists() else ())
    lacking = {"script", "dataset", "setting", "seed", "checkpoint"} - set(rows.fieldnames or ())
    if path.exists() and lacking:
        # Otherwise every table of it would be rewritten as "not yet measured".
        raise SystemExit(f"error: {path} lacks the column {', '.join(sorted(lacking))}: no document is changed")
    rows = [row for row in rows if row["dataset"].removesuffix("-unofficial") == dataset
            and bool(reduced) == ("--train-size" in row["setting"])]
    run = itemgetter("setting", "dataset", "script", "seed")
    last = {run(row): row for row in rows if row["checkpoint"] == "last"}
    for row in rows:
        if row["checkpoint"] == "best":
            end = last.get(run(row), {})
            row |= {f"last {column}": end.get(column) for column in ("worst", "clean")}
            groups[row["setting"], row["dataset"], row["script"]].append(row)
    # A csv of one's own may have several scripts: never a mean over them.
    plain = [f"{own}: " * (len({k[2] for k in groups}) > 1) + name_of(script, setting) for setting, _, own in groups]
    names = [name + " (unofficial files)" * (actual != dataset) for name, (_, actual, _) in zip(plain, groups)]
    order, result = [*NAMES.get(script, {}).values()], {}
    found = zip(plain, names, groups, groups.values())
    for _, name, (setting, *_), rows in sorted(
            found, key=lambda row: order.index(row[0]) if row[0] in order else len(order)):
        # Two settings of one name are two rows: never a mean over both.
        result[name if names.count(name) == 1 else f"{name} ({setting})"] = rows
    return result


def cell(rows, column):
    """Mean ± deviation of a column over the rows of a setting; an empty text where they have none."""
    scale = 1 if column.startswith(NOT_FRACTIONS) or "usefulness" in column else 100
    try:
        values = [scale * float(row[column]) for row in rows if row.get(column)]
    except ValueError as error:
        raise SystemExit(f"error: column {column} of {rows[0]['script']}, {rows[0]['setting']}: {error}") from None
    digits = 2 if scale == 1 else 1
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    some = f" ({len(values)} of {len(rows)})" * (len(values) < len(rows))
    return f"{mean(values):.{digits}f}{spread}{some}" if values else ""


def grid(head, lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["-"] * len(head), *lines))


def table(source):
    groups = read(source)
    shown = [c for c in COLUMNS if any(row.get(c) for rows in groups.values() for row in rows)]
    lines, flags = [], {name: flags_of(rows[0]["setting"]) for name, rows in groups.items()}
    # What all rows have is said once, above the table.
    shared = [flag for flag in next(iter(flags.values()), []) if all(flag in own for own in flags.values())]
    shared = shared if len(flags) > 1 else []
    for name, rows in groups.items():
        own = " ".join(flag for flag in flags[name] if flag not in shared)
        own = f"`{own}`" if own and own != name else ""
        lines.append([name, own, len(rows), *(cell(rows, c) for c in shown)])
    above = f"All with `{' '.join(shared)}`:\n\n" if shared else ""
    return above + grid(["", "flags", "seeds", *shown], lines)


def audits(source):
    lines = [[f"`{script}.py`", name, row["seed"], cell([row], "worst"), row["evaluated"], row["audit_evaluated"],
              cell([row], "audit_script"), cell([row], "audit"), row["audit_mode"], row["audit_warnings"] or "none"]
             for script in NAMES for name, rows in read(f"{script} {source}").items()
             for row in rows if row.get("audit")]
    return grid(["script", "", "seed", "worst", "images", "images of the audit", "worst on these", "audit", "mode",
                 "warnings"], lines)


def steps(source):
    """The scripts' steps in float32 as benchmark/speed.py has found them, by name."""
    found = json.loads((ROOT / "results" / f"{source}.json").read_text())
    return {e["name"]: e for e in found["scripts"] if (e["mode"], e["compiled"]) == ("fp32", False)}


def cost(source):
    lines = [[name, e["samples"], f"{e['ms']:.1f}", f"{e['ratio']:.2f}"] for name, e in steps(source).items()]
    return grid(["", "samples a step", "ms a step", "over its bare passes"], lines)


def curve(source):
    source, *names = source.split("; ")
    groups, lines = {k: rows for k, rows in read(source).items() if not names or k in names}, []
    every = [column for rows in groups.values() for column in rows[0] if "pgd20@" in column]
    strengths = sorted({column.split("@")[1] for column in every}, key=float)
    curves = dict.fromkeys(column.split("pgd20@")[0] for column in every)  # "" is that of the model itself
    for name, rows in groups.items():
        for which in curves:
            cells = [cell(rows, f"{which}pgd20@{k}") for k in strengths]
            if any(cells):
                lines.append([f"{name}, {which}".rstrip(", "), *cells])
    return grid(["eps/255", *strengths], lines)


def threats(source):
    source, name = source.split("; ")
    rows = read(source)[name]
    lines = [[row, *(cell(rows, f"{row} {attack}") for attack in ATTACKS)] for row in ATTACKERS]
    return grid([name, *ATTACKS], [line for line in lines if any(line[1:])])


def scale(source):
    path = ROOT / "results" / f"{source}.csv"
    rows = [row for row in csv.DictReader(path.read_text().splitlines()) if row["checkpoint"] == "last"]
    lines = [[row["dataset"], f"`{row['command']}`", f"{float(row['images_per_second']):.0f}",
              f"{float(row['peak_memory_gb']):.2f}", row["device"]] for row in rows]
    return grid(["data set", "command", "samples/s", "peak memory, GB", "device"], lines)


def sweep(source):
    lines, order = [], sorted(NAMES["vfd_adv"].values(), key=lambda name: (name[:2] != "AT", "MART" in name, len(name)))
    for rows in read(source).values():
        flags = flags_of(rows[0]["setting"])
        weights = [float(flag.split()[1]) for flag in flags if flag.startswith("--lambda-")]
        if len(weights) < 2:
            continue
        # The name is that of the setting with the usual weights, where these are not 0.
        plain = [flag for flag in flags if not re.match(r"--(beta|val-size|test-size|lambda-\S+ (?!0\.0$))", flag)]
        name = name_of("vfd_adv", " ".join(plain) or "default")
        beta = "".join(flag.split()[1] for flag in flags if flag.startswith("--beta "))
        shown = [f"{max(weights):g}", f"{max(weights) / LAMBDA_0:g}", len(rows)]
        shown += [cell(rows, f"val_{kind}") for kind in ("clean", "robust")]
        place = order.index(name) if name in order else len(order)
        key = place, name, float(beta or "inf"), max(weights)
        lines.append((key, [name + f", beta {beta}" * bool(beta), *shown]))
    head = ["", "lambda", "in units of lambda_0", "seeds", "clean", "robust"]
    return grid(head, [line for _, line in sorted(lines)])


def summary(source):
    lines, shown = [], ("clean", "pgd20", "worst")
    for script, wanted in SUMMARY:
        groups = read(f"{script} {source}")
        # A baseline of another length, and data from other files, have that in their name.
        likewise = re.compile(rf"{re.escape(wanted)}(, \d+ epochs)?( \(unofficial files\))?")
        name = max([wanted, *filter(likewise.fullmatch, groups)],
                   key=lambda name: (name in groups, "unofficial" not in name, len(name)))
        rows = groups.get(name, [])
        cells = [cell(rows, c) for c in shown] if rows else [MISSING, "", ""]
        lines.append([f"[`{script}.py`](docs/{script}.md)", name, len(rows) or "", *cells])
    return grid(["script", "", "seeds", *shown], lines)


def value(source):
    source, name, column = source.split("; ")
    return cell(read(source).get(name, []), column)


def ratio(source):
    source, above, below = source.split("; ")
    found = steps(source)
    return f"{found[above]['ms'] / found[below]['ms']:.2f}"


KINDS = {f.__name__: f for f in (table, audits, cost, curve, threats, scale, sweep, summary, ratio, value)}
MARKER = re.compile(rf"<!-- ({'|'.join(KINDS)}): ([^>]*?) -->(.*?)<!-- end -->", re.S)


def render(kind, source):
    """What belongs between the marker and its end."""
    try:
        text = KINDS[kind](source)
    except (KeyError, FileNotFoundError):  # no run, and no csv, of this name
        text = ""
    if kind in ("value", "ratio"):
        return text or MISSING
    return f"\n{text}\n" if text.count("\n") > 1 else f"\n*{MISSING}*\n"


def rewrite(text):
    def fill(match):
        kind, source, _ = match.groups()
        return f"<!-- {kind}: {source} -->{render(kind, source)}<!-- end -->"

    return MARKER.sub(fill, text)


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--show", metavar="MARKER", help='print one table and end, as "table: afa digits"')
    args, stale = parser.parse_args(), []
    if args.show:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may leave early
        kind, _, source = args.show.partition(": ")
        if kind not in KINDS or not source:
            parser.error(f"--show takes a kind and a source, as \"table: afa digits\"; kinds: {', '.join(KINDS)}")
        try:
            print(render(kind, source).strip())
        except ValueError:  # of what unpacks the source
            parser.error(f"{args.show}: the source of {kind} is written as in --help")
        raise SystemExit(0)
    before = {path: path.read_text() for path in documents()}
    after = {path: rewrite(text) for path, text in before.items()}  # all of them first: an error changes none
    for path in before:
        if after[path] != before[path]:
            stale.append(path.relative_to(ROOT))
            if not args.check:
                path.write_text(after[path])
    for path in stale:
        print(f"{path} {'disagrees with the csv files in results/' if args.check else 'rewritten'}")
    raise SystemExit(1 if args.check and stale else 0)
