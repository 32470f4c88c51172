"""Early: gathers that a step starts before it needs what they bring, moved in its log to where that happens.

A step is simulated with every gather where it is needed, because of equal blocks only one runs, and a gather that the
block before it starts is in neither of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

from tp_planner.ir.step import Collective, Phase
from tp_planner.ir.step_log import Began, Early, Event


def start_early(events: Sequence[Event], in_turn: Set[tuple[str, str]], ahead: int) -> list[Event]:
    """Return the events of a step with each early gather where another one, so many before it, is needed.

    Args:
        events: those of the step, in which ``Early`` is around each such gather and what belongs to it.
        in_turn: the layer and the place of the gathers that follow each other, early or not.
        ahead: how many gathers before its own use one is started.
    """
    out: list[Event | list[Event]] = []
    slots: dict[Phase, list[list[Event]]] = {"forward": [], "backward": [], "update": []}
    phase: Phase = "forward"
    waiting = iter(events)
    for event in waiting:
        if isinstance(event, Early):
            slots[phase].append([])
            out.append(slots[phase][-1])
            slots[phase][max(len(slots[phase]) - 1 - ahead, 0)] += _until_end(waiting)
            continue
        out.append(event)
        if isinstance(event, Began):
            phase = event.phase
        elif isinstance(event, Collective) and (event.layer, event.place) in in_turn and event.kind == "all_gather":
            out.append(next(waiting))  # what it brings
            slots[phase].append([])
            out.append(slots[phase][-1])
    return list(_flat(out))


def _until_end(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, Early):
            return
        yield event


def _flat(tree: Iterable[Event | list[Event]]) -> Iterator[Event]:
    for each in tree:
        if isinstance(each, list):
            yield from each
        else:
            yield each
