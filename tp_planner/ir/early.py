"""Early: collectives that a step starts before it needs what they bring, put in its log where they start and end.

A step is simulated with every gather where it is needed, and every sum waited for where it begins, because of equal
blocks only one runs, and what one block starts for the next is in neither of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tp_planner.ir.step import Collective, Phase
from tp_planner.ir.step_log import Allocated, Began, Early, Event, Freed


def start_early(events: Sequence[Event], ahead: int) -> list[Event]:
    """Return the events of a step with each early gather where another one, so many before it, is needed.

    What is sent to be summed is kept until the next sum begins, or the pass ends.

    Args:
        events: those of the step, in which ``Early`` is around each early collective and what belongs to it.
        ahead: how many gathers before its own use one is started.
    """
    out: list[Event | list[Event]] = []
    slots: dict[Phase, list[list[Event]]] = {"forward": [], "backward": [], "update": []}
    phase: Phase = "forward"
    sent: dict[int, bool] = {}  # storages that travel to their sum, and whether they would have gone
    waiting = iter(events)
    for event in waiting:
        if isinstance(event, Early):
            begun = list(_until_end(waiting))
            if any(isinstance(each, Collective) and each.kind == "reduce_scatter" for each in begun):
                out += [*_gone(sent), *begun]
                sent = dict.fromkeys(_sent(begun), False)
                continue
            slots[phase].append([])
            out.append(slots[phase][-1])
            slots[phase][max(len(slots[phase]) - 1 - ahead, 0)] += begun
            continue
        if isinstance(event, Freed) and event.storage in sent:
            sent[event.storage] = True
            continue
        if isinstance(event, Began):
            phase = event.phase
            out += _gone(sent)
            sent = {}
        out.append(event)
    return list(_flat([*out, *_gone(sent)]))


def _sent(events: Sequence[Event]) -> Iterator[int]:
    """Yield the storages that are sent to be summed."""
    gone = {event.storage for event in events if isinstance(event, Freed)}
    for place, event in enumerate(events):
        if isinstance(event, Collective):
            there = [each for each in events[:place] if isinstance(each, Allocated) and each.storage not in gone]
            made = [each for each in there if each.bytes >= event.bytes]
            yield from (each.storage for each in made[-1:])


def _gone(sent: Mapping[int, bool]) -> list[Event]:
    return [Freed(storage) for storage, would_have_gone in sent.items() if would_have_gone]


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
