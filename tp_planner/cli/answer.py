"""What the commands that answer with a report share: stdout is the answer's alone, as text, tables or JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tp_planner.cli.app import choose_backend, mistakes_reported

if TYPE_CHECKING:
    from tp_planner.report.sections import Section

JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, with exact numbers, instead of in tables.")]


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Choose the backend and report mistakes; what a factory prints meanwhile goes to stderr.

    Where stderr is a terminal it shows what is being done.
    """
    from rich.console import Console

    from tp_planner.progress import listening

    console = Console(stderr=True)
    with mistakes_reported():
        choose_backend()
        with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
            if console.is_terminal:
                status = stack.enter_context(console.status("reading the model"))
                stack.enter_context(listening(status.update))
            yield


def show(value: Any, sections: Sequence[Section], as_json: bool) -> None:
    """Write the value as JSON, or its report: in colour where stdout is a terminal."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(value), indent=1, sort_keys=True))
    else:
        show_sections(sections)


def show_sections(sections: Sequence[Section]) -> None:
    """Write a report: in colour where stdout is a terminal."""
    from rich.console import Console

    from tp_planner.report.sections import sections_to_renderable, sections_to_text

    console = Console()
    if console.is_terminal:
        console.print(sections_to_renderable(sections))
    else:
        typer.echo(sections_to_text(sections), nl=False)
