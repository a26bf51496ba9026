"""What the documents say against what the code does, and the scripts against each other."""

import ast
import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT

SCRIPTS = [path for path in (ROOT / f"{name}.py" for name in ("afa", "aalp", "vfd_adv", "abnn")) if path.exists()]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmark").glob("*.sh"))]
# Names that differ between the scripts because they are the method or its frame.
METHOD_SPECIFIC = {"Args", "build", "measure", "transfer_models"}
SHARED_CONSTANTS = {"SCRIPT", "ARCHS", "ATTACKS"}
OWN_COMMENTS = {"epochs", "eps"}  # flags whose comment says what the method makes of them


def test_repeated_functions_are_identical():
    definitions = {}
    for script in SCRIPTS:
        for node in ast.parse(script.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in METHOD_SPECIFIC:
                definitions.setdefault(node.name, {})[script.name] = ast.unparse(node)
    assert "PreActResNet" in definitions and "evaluate" in definitions
    for name, versions in definitions.items():
        assert len(set(versions.values())) == 1, f"{name} differs between {', '.join(versions)}"


def test_repeated_constants_are_identical():
    versions = {name: {} for name in SHARED_CONSTANTS}
    for script in SCRIPTS:
        for node in ast.parse(script.read_text()).body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and target.id in versions:
                    versions[target.id][script.name] = ast.unparse(node.value)
    for name, values in versions.items():
        assert set(values) == {script.name for script in SCRIPTS}, f"{name} is only in {', '.join(values)}"
        assert len(set(values.values())) == 1, f"{name} differs: {values}"


def flag_comments(script):
    """What --help says of each flag: the comment behind the field, or the string below it."""
    source, comments, field = script.read_text(), {}, None
    (args,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            field = node.target.id
            comments[field] = source.splitlines()[node.end_lineno - 1][node.end_col_offset :].strip("# ")
        elif isinstance(node, ast.Expr) and not comments[field]:
            comments[field] = node.value.value
    return comments


def test_every_flag_is_described_and_means_the_same_in_each_script():
    comments = {}
    for script in SCRIPTS:
        for flag, comment in flag_comments(script).items():
            assert comment, f"{script.name} does not say what --{flag} is"
            if script.stem != "abnn":  # trains on clips too, and says so of most flags
                comments.setdefault(flag, {})[script.name] = comment
    different = {k: v for k, v in comments.items() if len(set(v.values())) > 1}
    assert "runs_dir" in comments and set(different) == OWN_COMMENTS, different


def commands():
    for path in DOCUMENTS:
        if path.suffix == ".sh":
            continue  # tests/test_collect.py has the lists, with their variables filled in
        text = path.read_text().replace("\\\n", " ")
        start = r"(?:python3?|torchrun --nproc-per-node \d+)"
        for script, arguments in re.findall(start + r" (afa|aalp|vfd_adv|abnn)\.py\b([^\n`#]*)", text):
            arguments = arguments.split("&&")[0].strip()
            if "--help" not in arguments:  # it ends the program
                yield pytest.param(script, arguments, id=f"{path.name}: {script} {arguments}")


@pytest.mark.parametrize("script, arguments", list(commands()))
def test_every_command_in_the_documents_parses(script, arguments):
    module = importlib.import_module(script)
    tyro.cli(module.Args, args=shlex.split(arguments))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_the_documents_exists(document):
    known = {"--logdir", "--nproc-per-node", "--standalone", "--show"}
    for path in [*SCRIPTS, *(ROOT / "benchmark").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known |= {"--" + node.target.id.replace("_", "-"), "--no-" + node.target.id.replace("_", "-")}
    known.add("--help")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", document.read_text())) - known
    assert not flags, f"{document.name} names flags that no program has: {flags}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_decisions_in_code_and_docs_are_the_same(script):
    code = set(re.findall(r"\bD\d+\b", script.read_text()))
    docs = set(re.findall(r"^\s*- \*\*(D\d+)\b", (ROOT / "docs" / f"{script.stem}.md").read_text(), re.M))
    assert code == docs and docs


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_argument_is_in_the_docs(script):
    text = (ROOT / "docs" / f"{script.stem}.md").read_text()
    missing = [k for k in vars(importlib.import_module(script.stem).Args()) if f"`--{k.replace('_', '-')}`" not in text]
    assert not missing


def test_functions_and_links_in_the_docs_exist():
    for document in DOCUMENTS:
        if document.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


def test_ci_runs_the_readme_s_test_command():
    line = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert line in (ROOT / "README.md").read_text()
