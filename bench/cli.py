"""The command line ``python -m bench``: one command a suite, and reports of what they leave behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from bench import command, results
from bench.compare import compare, show
from bench.report import markdown, page, terminal
from bench.results import Results, ResultsError
from bench.suite import suites

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A.json B.json", help="What is slower in B than in A, beyond the noise."),
    ] = None,
) -> None:
    """gpukern beside cuDNN, torch.compile and others: measured on a GPU, or tried on a CPU."""
    if compared is None or context.invoked_subcommand is not None:
        return
    try:
        old, new = (results.read(path) for path in compared)
        comparison = compare(old, new)
    except (ResultsError, OSError) as error:
        command.fail(error)
    show(comparison)
    raise typer.Exit(1 if comparison.worse else 0)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(help="Results files, or folders of them.")],
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="[default: report.md there]")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="[default: report.html there]")] = None,
) -> None:
    """Show results on the terminal, and write them as Markdown and as one HTML page."""
    files, skipped = find_files(paths)
    for message in skipped:
        typer.echo(f"bench: skipped {message}", err=True)
    if not files:
        command.fail("no results there")
    for _, found in files:
        terminal.show(found)
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    sections = [markdown.render(found, str(command.short(path))) for path, found in files]
    for name, target, text in (
        ("Markdown", markdown_path or folder / "report.md", "\n".join(sections)),
        ("page", html_path or folder / "report.html", page.render(files)),
    ):
        try:
            results.write_text(target, text)
        except OSError as error:
            command.fail(error)
        typer.echo(f"{name}: {command.short(target)}")


def find_files(paths: Iterable[Path]) -> tuple[list[tuple[Path, Results]], list[str]]:
    """Every results file among ``paths`` and below them, and a message for each file that is none."""
    files, skipped = [], []
    for path in paths:
        for candidate in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            try:
                files.append((candidate, results.read(candidate)))
            except (ResultsError, OSError) as error:
                skipped.append(str(error))
    return files, skipped


for suite in suites().values():
    app.command(suite.name)(command.of(suite))
