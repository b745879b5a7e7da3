"""The command line ``python -m bench``: one command a suite, and reports of what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench import command, results
from bench.compare import compare, show
from bench.report import markdown, page, terminal
from bench.results import ResultsError
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
    files = list(results.read_all(paths, lambda message: typer.echo(f"bench: skipped {message}", err=True)))
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


for suite in suites().values():
    app.command(suite.name)(command.of(suite))
