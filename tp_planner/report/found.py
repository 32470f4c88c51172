"""What a search for a layout found, as sections of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tp_planner.ir.found import CandidateFigures, FoundFigures
from tp_planner.report.amounts import bytes_text
from tp_planner.report.sections import Section, Table


def found_sections(found: FoundFigures) -> list[Section]:
    """Return what was found and how good it is, beside the other layouts that were planned."""
    heads = ("layout", "step", "to the program", "collectives", "sent", "variables", "peak")
    rows = [_row("found", found.best), _row("nothing sharded", found.whole)]
    rows += [_row(f"runner-up {number}", each) for number, each in enumerate(found.runners_up, 1)]
    title = f"a layout for {found.model} on {found.mesh}, for {found.hardware}"
    table = Table(heads, tuple(rows), frozenset(heads[1:]))
    return [Section(title, sentences=tuple(_sentences(found)), table=table)]


def meshes_sections(tried: Sequence[tuple[str, FoundFigures | None, str]]) -> list[Section]:
    """Return what was found on each mesh, or why nothing was: (mesh, what was found, problem)."""
    heads = ("mesh", "step", "sent", "peak", "problem")
    rows = []
    for mesh, found, problem in tried:
        cells = ("", "", "")
        if found is not None:
            figures = found.best.figures
            cells = (_milliseconds(found.best.seconds), bytes_text(figures.wire_bytes), bytes_text(figures.peak_bytes))
        rows.append((mesh, *cells, problem))
    between_nodes = "what replicas send between nodes is priced by the links between them"
    return [Section("meshes", (between_nodes,), table=Table(heads, tuple(rows), frozenset(heads[1:4])))]


def _sentences(found: FoundFigures) -> Iterator[str]:
    takes = f"estimated, not measured: a training step takes {_milliseconds(found.best.seconds)} (the high end)"
    if found.best.beyond:
        takes += f" with {' and '.join(found.best.beyond)}, and {_milliseconds(found.proven.seconds)} without"
        yield f"{takes}; what follows is of the layout without"
    else:
        yield takes
    if found.bound is None or found.gap is None:
        yield "optimality gap not known: a plan takes less than the program said, so it may ask too much of others, too"
    else:
        yield f"no layout that shards whole dims, equal blocks alike, takes less than {_milliseconds(found.bound)}"
        yield f"optimality gap {found.gap:.2%}, as the solver proves of the program that was searched"
    yield f"of the plan's step the program said {found.proven.program_seconds / found.proven.seconds - 1:+.2%}"
    yield from found.notes


def _row(name: str, each: CandidateFigures) -> tuple[str, ...]:
    return (
        ", ".join((name, *each.beyond)),
        _milliseconds(each.seconds),
        "" if each.beyond else f"{each.program_seconds / each.seconds - 1:+.2%}",
        str(each.figures.collectives),
        bytes_text(each.figures.wire_bytes),
        bytes_text(each.figures.parameter_bytes),
        bytes_text(each.figures.peak_bytes),
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:#.4g} ms"
