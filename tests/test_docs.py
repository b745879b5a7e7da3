"""README, docs/ and CONTRIBUTING: their examples run and print what is shown, their commands, links and names exist."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
from typer.testing import CliRunner

import bench.cli
import gpukern.cli
from models import resnet
from tests.documents import ROOT, Block, Command, anchors, blocks, commands, inline_code, is_shown, links

#: Beside the hidden ones, folders that no checkout has.
_MADE = {"runs", "build", "dist"}
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ROOT.iterdir()
    if top.name not in _MADE and not (top.is_dir() and top.name.startswith("."))
    for path in (top.rglob("*") if top.is_dir() else [top])
    if path.is_file()
)
#: Those that are written by hand in one piece with the README.
DOCS = sorted(
    path for path in ROOT.glob("docs/*.md") if path.name not in ("fusion-models.md", "roofline-resnet50-h100.md")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
#: But for what the benchmark writes beside its results.
ALL = [ROOT / name for name in FILES if name.endswith(".md") and not name.endswith("/report.md")]
APPS = {"gpukern": gpukern.cli.app, "python -m bench": bench.cli.app}
FILE = re.compile(r"[\w.\-]*[\w\-/]+\.(?:py|md|toml|txt|sh|json|cuh|c|yaml)|[\w\-]+(?:/[\w\-]+)*/")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def per_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=named)(test)


# ---- examples ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchvision(monkeypatch) -> None:
    """The package, or in its place our ResNet-18, which has the same layers under the same names."""
    if importlib.util.find_spec("torchvision") is None:
        stand_in = types.SimpleNamespace(models=types.SimpleNamespace(resnet18=resnet.resnet18))
        monkeypatch.setitem(sys.modules, "torchvision", stand_in)


@pytest.fixture
def as_shown(reference_mode, tmp_path, monkeypatch) -> None:
    """A folder of its own on a machine without a GPU, as the pages assume where they show what is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def python_examples(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and not block.reason]


@pytest.mark.parametrize("page", [page for page in PAGES if python_examples(page)], ids=named)
def test_python_examples_print_what_is_shown(page, torchvision, as_shown):
    """Those of a page one after the other, as somebody would type them."""
    namespace: dict[str, object] = {}
    for block in python_examples(page):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.body, f"{page.name}:\n{block.body}", "exec"), namespace)
        shown = block.output or ""
        assert is_shown(shown, printed.getvalue()), f"{page.name} shows\n{shown}\nand this was printed:\n" + (
            printed.getvalue()
        )


def shown_commands() -> Iterator[tuple[Path, Command]]:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console" and not block.reason:
                yield from ((page, command) for command in commands(block) if command.output.strip())


@pytest.mark.parametrize("page, command", list(shown_commands()), ids=lambda value: getattr(value, "line", None))
def test_commands_print_what_is_shown(page, command, as_shown):
    printed = run(command.words)
    assert is_shown(command.output, printed), f"{page.name} shows\n{command.output}\nand this was printed:\n{printed}"


def run(words: list[str]) -> str:
    if words[0] == "gpukern":
        # As wide as it must be: pages show no line that a terminal wrapped.
        with mock.patch.dict(os.environ, COLUMNS="160"):
            return CliRunner().invoke(APPS["gpukern"], words[1:]).output
    environment = dict(word.split("=", 1) for word in words if re.match(r"\w+=", word))
    program = [sys.executable, *words[len(environment) + 1 :]]
    paths = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(program, env=os.environ | paths | environment, capture_output=True, text=True).stdout


@per_page
def test_output_is_shown_only_beside_what_makes_it(page):
    """A bare block shows the output of the one before; a diagram stands alone only where the page draws packages."""
    for block in blocks(page):
        assert block.language in ("", "python", "console")
        if not block.language:
            assert page.name == "architecture.md", f"{page.name}: what makes this?\n{block.body}"
        if block.language == "console":
            assert block.body.startswith("$ ") and block.output is None


@per_page
def test_python_that_is_not_run_is_python(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.body, page.name, "exec")


def test_a_page_that_shows_something_else_is_noticed():
    assert is_shown("a 1.0e-07\n…\nb", "a 2.5e-06\nmore\nand more\nb\n")
    assert is_shown("a\n…", "a\n")
    for actual in ("a\nb c\n", "a\nb", "a 1.0e-07\nb\nc\n"):
        assert not is_shown("a 1.0e-07\n…\nb", actual)


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL, ids=named)
def test_commands_have_the_options_that_are_written(page):
    for block in blocks(page):
        for command in commands(block) if block.language == "console" else ():
            check(command.words)


def check(words: list[str]) -> None:
    """AssertionError, or the error of the command line's parser, for words that could not be typed like this."""
    assert all(is_file(name) for name in re.findall(r"tests/[\w/]+\.py", " ".join(words))), words
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    program, arguments = words[0], words[1:]
    if program in APPS:
        parse(APPS[program], arguments)
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    elif program == "torchrun":
        assert (arguments[0], arguments[2]) == ("--nproc-per-node", "-m"), words
        check_module(arguments[3], arguments[4:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in arguments if "=" not in word), words
    elif program.endswith("pip"):
        _, _, extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
            assert f"\n{extra} = [" in extras.partition("\n\n")[0], words
    elif program == "bash":
        assert (ROOT / arguments[0]).exists(), words
    else:
        assert program in ("python", ".venv/bin/pre-commit"), f"what is {program}?"


def check_module(module: str, arguments: list[str]) -> None:
    if f"python -m {module}" in APPS:
        parse(APPS[f"python -m {module}"], arguments)
        return
    source = Path(importlib.util.find_spec(module).origin).read_text()
    for option in (word for word in arguments if word.startswith("--")):
        assert option in source or option.removeprefix("--").replace("-", "_") in source, (module, option)


def parse(app: typer.Typer, arguments: list[str]) -> None:
    """What the command line does before it calls anything: an error for unknown commands, options and values."""
    command, name = typer.main.get_command(app), ""
    while hasattr(command, "commands"):
        if arguments and arguments[0].startswith("-"):
            command.make_context(name, arguments)
            return
        context = command.make_context(name, list(arguments), resilient_parsing=True)
        name, found, rest = command.resolve_command(context, arguments)
        assert found, f"no command {arguments}"
        command, arguments = found, rest
    command.make_context(name, list(arguments))


@pytest.mark.parametrize(
    "line, said",
    [
        ("gpukern fuse model --no-such", "--no-such"),
        ("gpukern fuse model", "input"),
        ("gpukern absent", "absent"),
        ("gpukern explain linear 8x8 many", "integer"),
        ("python -m bench conv --absent", "--absent"),
        ("python -m bench.publish --absent", "--absent"),
        ("make absent", "absent"),
        ("make test PYTEST_ARGS=tests/test_absent.py", "absent"),
        ("pip install -e '.[absent]'", "absent"),
        ("bash bench/absent.sh", "absent"),
        ("absent", "absent"),
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(line, said):
    with pytest.raises(Exception, match=said):
        check(Command(line, "").words)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {link}"


@per_page
def test_files_that_are_named_exist(page):
    for code in inline_code(page):
        if FILE.fullmatch(code) and "<" not in code:
            assert is_file(code.rstrip("/")), f"{page.name}: there is no {code}"


def is_file(name: str) -> bool:
    """Whether a file or folder of the repository ends in ``name``, or one that a program makes."""
    made = ("runs/", "README.txt")
    return name.startswith(made) or any(f"/{name}" in f"/{path}" for path in FILES)


@per_page
def test_names_of_gpukern_can_be_imported(page):
    for code in inline_code(page):
        for name in re.findall(r"^(?:from )?(gpukern(?:\.\w+)+)", code):
            assert resolves(name), f"{page.name}: there is no {name}"
        for module in re.findall(r"python -m ([\w.]+)", code):
            assert importlib.util.find_spec(module), f"{page.name}: there is no {module}"
        for target in re.findall(r"^make ([a-z-]+)", code):
            check(["make", target])


def resolves(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return True
    with contextlib.suppress(ImportError):
        return hasattr(importlib.import_module(module), attribute)
    return False


@per_page
def test_environment_variables_are_read_somewhere(page):
    source = "".join((ROOT / name).read_text() for name in FILES if name.endswith((".py", ".sh")))
    for variable in re.findall(r"\bGPUKERN_\w+", page.read_text()):
        assert variable in source, f"{page.name}: nothing reads {variable}"


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    readme = ROOT / "README.md"
    assert len(readme.read_bytes()) <= 10_000 and len(readme.read_text().splitlines()) <= 160


def test_every_page_is_in_the_index():
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= set(links(ROOT / "docs" / "README.md"))
