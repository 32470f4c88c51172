"""One model in several settings, as sections of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from tp_planner.ir.degrees import Degree, Setting, Sweep
from tp_planner.ir.names import fold_names, without_numbers_of
from tp_planner.report.amounts import bytes_text
from tp_planner.report.guesses import guess_lines
from tp_planner.report.sections import Section, Table

_NUMBERS = ("collectives", "wire bytes", "parameters", "peak memory", "gathered", "left early")
_TIMES = ("step", "samples/s")
_LEGEND = (
    "each row is one training step on one rank",
    "gathered: layers whose weights are stored sharded and gathered at use, which is right and slow",
    "left early: layers whose sharded output is gathered behind them",
)
_UNCOUNTED = (
    "what fits counts tensors alone: leave room for the libraries' own memory and for what an allocator cannot reuse"
)


def sweep_sections(sweep: Sweep) -> list[Section]:
    """Return the report: a row for each setting, what fits, why settings are refused and layers gathered, notes."""
    sizes = ", ".join(dict.fromkeys(str(degree.setting.size) for degree in sweep.degrees))
    facts = [f"traced with inputs {', '.join(sweep.inputs)}"] if len(sweep.inputs) == 1 else []
    replicas = any(degree.setting.replicas > 1 for degree in sweep.degrees)
    if replicas:
        facts.append("each replica has a batch of its own; zero: what they store in parts, 1 slots, 3 weights too")
    else:
        facts += [f"the layout names mesh axis {name!r} too: it has size 1 here" for name in sweep.other_axes]
    if any(each.seconds is not None for each in sweep.degrees):
        facts.append("step: estimated, not measured, the high end; samples/s: those of all replicas in it")
    facts += guess_lines(sweep.guessed)
    columns = _columns(sweep)
    timed = any(each.seconds is not None for each in sweep.degrees)
    heads = (*columns, *_NUMBERS, *(_TIMES if timed else ()), "verdict")
    rows = tuple(
        (*(cell(each.setting) for cell in columns.values()), *_cells(each, sweep, timed)) for each in sweep.degrees
    )
    table = Table(heads, rows, frozenset(heads[:-1]))
    sections = [
        Section(f"{sweep.model!r} with sizes {sizes} of mesh axis {sweep.axis!r}", (*facts, *_LEGEND), table=table),
        *_answer(sweep),
    ]
    reasons: dict[str, list[tuple[str, Sequence[tuple[str, str]]]]] = {
        "refused": [(_place(each, sweep), [("", problem) for problem in each.problems]) for each in sweep.degrees],
        "why weights are gathered": [(_place(each, sweep), each.gathered) for each in sweep.degrees],
        "why outputs are gathered": [(_place(each, sweep), each.left_early) for each in sweep.degrees],
        "notes": [(_place(each, sweep), [("", note) for note in each.notes]) for each in sweep.degrees],
    }
    sections += [Section(title, _explained(of_places)) for title, of_places in reasons.items()]
    return [section for section in sections if not section.is_empty]


def _columns(sweep: Sweep) -> dict[str, Callable[[Setting], str]]:
    """Return the columns that tell settings apart, each with its cell of a setting."""
    settings = [degree.setting for degree in sweep.degrees]
    columns: dict[str, Callable[[Setting], str]] = {sweep.axis: lambda setting: str(setting.size)}
    if any(setting.replicas > 1 for setting in settings):
        columns["replicas"] = lambda setting: str(setting.replicas)
        columns["zero"] = lambda setting: str(setting.zero)
    if any(setting.sequence is not None for setting in settings):
        columns["sequence"] = lambda setting: str(setting.sequence)
    if any(setting.sequence_parallel for setting in settings):
        columns["sequence parallel"] = lambda setting: "yes" if setting.sequence_parallel else "no"
    if any(setting.recomputed for setting in settings):
        columns["recomputed"] = lambda setting: "blocks" if setting.recomputed else "no"
    if any(setting.batch is not None for setting in settings):
        columns["batch"] = lambda setting: str(setting.batch)
    return columns


def _place(degree: Degree, sweep: Sweep) -> str:
    """Return the setting in a few words: the size of the axis, and what else differs."""
    size, *others = _columns(sweep).items()
    return " ".join([size[1](degree.setting), *(f"{name} {cell(degree.setting)}" for name, cell in others)])


def _cells(degree: Degree, sweep: Sweep, timed: bool) -> tuple[str, ...]:
    if degree.figures is None:
        return (*[""] * len(_NUMBERS + (_TIMES if timed else ())), "refused")
    figures = degree.figures
    verdict = "gathers" if degree.gathered else "divides"
    if sweep.device is not None:
        verdict += ", fits" if degree.fits(sweep.device.memory) else ", does not fit"
    return (
        str(figures.collectives),
        bytes_text(figures.wire_bytes),
        bytes_text(figures.parameter_bytes),
        bytes_text(figures.peak_bytes),
        str(len(degree.gathered)),
        str(len(degree.left_early)),
        *(_times(degree) if timed else ()),
        verdict,
    )


def _times(degree: Degree) -> tuple[str, str]:
    if degree.seconds is None:
        return "", ""
    return f"{1e3 * degree.seconds:#.4g} ms", f"{degree.samples / degree.seconds:#.4g}"


def _answer(sweep: Sweep) -> list[Section]:
    """Return what fits the device: the largest batch in each setting but for its batch."""
    if sweep.device is None:
        return []
    title = f"what fits {sweep.device.name} ({bytes_text(sweep.device.memory)})"
    cells = [(name, cell) for name, cell in _columns(sweep).items() if name != "batch"]
    answers = []
    for place, run in groupby(
        sweep.degrees, lambda degree: ", ".join(f"{name} {cell(degree.setting)}" for name, cell in cells)
    ):
        answers.append(f"{place}: {_largest(list(run), sweep.device.memory)}")
    return [Section(title, (*answers, *guess_lines(sweep.guessed), _UNCOUNTED))]


def _largest(degrees: Sequence[Degree], memory: int) -> str:
    fitting = [degree for degree in degrees if degree.fits(memory)]
    if not fitting:
        return "nothing fits"
    best = max(fitting, key=lambda degree: degree.setting.batch or 0)
    assert best.figures is not None
    left = f"{bytes_text(memory - best.figures.peak_bytes)} left"
    return f"it fits, {left}" if best.setting.batch is None else f"the largest batch is {best.setting.batch}, {left}"


def _explained(of_places: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> tuple[str, ...]:
    """Return a sentence for each reason: the settings and the layers it holds for, and the reason itself."""
    places: dict[tuple[str, str], list[str]] = {}
    for place, pairs in of_places:
        for names, reason in _alike(pairs):
            places.setdefault((names, reason), []).append(place)
    return tuple(
        f"{_at(at, len(of_places))}: {f'{names}: ' if names else ''}{reason}" for (names, reason), at in places.items()
    )


def _at(places: Sequence[str], of_all: int) -> str:
    return "everywhere" if 1 < len(places) == of_all else f"at {', '.join(places)}"


def _alike(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each reason with its names folded; reasons that differ in the numbers of their names are one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in pairs:
        groups.setdefault(without_numbers_of(name, reason), []).append((name, reason))
    alike = []
    for starred, members in groups.items():
        reason = members[0][1] if len({reason for _, reason in members}) == 1 else starred
        alike.append((", ".join(map(str, fold_names(name for name, _ in members))), reason))
    return alike
