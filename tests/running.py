"""Running the scripts as programs, for the tests of each of them. `script` is a file name such as "aalp.py".

What a run finds of robustness is found with few steps (tests/shortened.py) unless it is to be `whole`.
"""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from shortened import shorten
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import data

read_digits = functools.cache(data.read_digits)  # drawn once for all runs of a process


def command(arguments, runs, script="afa.py", whole=False):
    program = [str(ROOT / script)] if whole else [str(ROOT / "tests" / "shortened.py"), str(ROOT / script)]
    return [sys.executable, *program, *shlex.split(arguments), "--runs-dir", str(runs)]


def start(arguments, runs, script="afa.py", whole=False, **kwargs):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small networks: threads cost more than they bring
    return subprocess.Popen(command(arguments, runs, script, whole), env=environment, **pipes, **kwargs)


def left_by_its_reader(arguments, runs, script="afa.py"):
    """What a program says on stderr whose output nobody reads after the first line. Buffered, as a user's is."""
    words = shlex.join(command(arguments, runs, script))
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", f"{words} | head -n 1"], capture_output=True, text=True, env=buffered).stderr


def finished(arguments, runs, script="afa.py", whole=False):
    """The folder that a run made, None when it continued another, and what it printed; it has to end well."""
    before = set(runs.glob("*"))
    process = start(arguments, runs, script, whole)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (run,) = set(runs.glob("*")) - before or [None]
    return run, output


def execute(arguments, runs, script, whole=False):
    """Exit status of the script in this process, without the price of starting Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.READERS, "digits", lambda data_dir: read_digits(None))
        if not whole:
            shorten(patch.setattr)
        patch.setattr(sys, "argv", [script, *shlex.split(arguments), "--runs-dir", str(runs)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            return error.code
        finally:
            torch.compiler.set_stance("default")  # a script ends in another
    return 0


def in_process(arguments, capsys, runs, script="afa.py"):
    """Exit status and what was written to stderr, in this process."""
    return execute(arguments, runs, script), capsys.readouterr().err.strip()


def finished_in_process(arguments, runs, script="afa.py", whole=False):
    """As `finished`, in this process. It needs no fixture of one test, so fixtures of a module can use it."""
    before = set(runs.glob("*"))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = execute(arguments, runs, script, whole)
    assert status == 0, output.getvalue()
    (run,) = set(runs.glob("*")) - before or [None]
    return run, output.getvalue()


def weights(path):
    return torch.load(path, weights_only=True)["net"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wait_for(run_parent, known, condition, process):
    """The new folder that fulfils the condition, as soon as it does."""
    while process.poll() is None:
        for run in set(run_parent.glob("*")) - known:
            if condition(run):
                return run
        time.sleep(0.02)
    pytest.fail(process.communicate()[0])


def epochs_done(run):
    try:
        return torch.load(run / "last.pt", weights_only=True)["epoch"]
    except FileNotFoundError:
        return -1


def tag_mismatches(document, *runs):
    """What differs between the TensorBoard tags of runs, taken together, and the table in docs/`document`, as lines."""
    found = [EventAccumulator(str(run), size_guidance={"images": 0}).Reload().Tags() for run in runs]
    kinds = {(tag, kind) for tags in found for kind in ("scalars", "images", "histograms") for tag in tags[kind]}
    tags = [tag for tag, _ in kinds]
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / document).read_text().split("## Logged metrics")[1], re.M)
    documented = [name for row in rows for name in re.findall(r"`([a-z_0-9]+/[^`]+)`", row)]
    result = [f"{tag} is not in the docs" for tag in tags
              if not any(tag == name or name.endswith("/*") and tag.startswith(name[:-1]) for name in documented)]
    result += [f"{name} is not in the run" for name in documented
               if not any(tag == name or name.endswith("/*") and tag.startswith(name[:-1]) for tag in tags)]
    result += [f"a run has no text {name}" for name in ("hyperparameters", "results")
               if not all(f"{name}/text_summary" in tags["tensors"] for tags in found)]
    # TensorBoard gives a tag to the kind that is written first and does not show the other.
    return result + [f"{tag} has two kinds" for tag in sorted({tag for tag in tags if tags.count(tag) > 1})]
