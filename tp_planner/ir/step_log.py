"""The log of a training step: storages, kernels and collectives in order, and what they come to.

A log may say that a block does again what an equal one did; ``unfold`` writes that out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from tp_planner.ir.step import Collective, Memory, MemoryUse, Phase, StorageKind, Work

PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
_NO_NAMES: Mapping[str, str] = {}


# Tuples, because a log has tens of thousands of them.
class Allocated(NamedTuple):
    """A storage of ``bytes`` came to be, which stands for so many equal ones."""

    storage: int
    bytes: int
    times: int = 1


class Freed(NamedTuple):
    """A storage is gone."""

    storage: int


class Origin(NamedTuple):
    """Where a storage came to be: by which op, in which layer's call or on the way back through it, for what tensor."""

    layer: str
    op: str
    dtype: str
    shape: tuple[int, ...]


_UNKNOWN = Origin("", "", "", ())


class Kernel(NamedTuple):
    """An op computed, ``times`` times: FLOPs of matrix products by dtype, and bytes read and written each time."""

    phase: Phase
    dtype: str
    flops: int
    bytes: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class Began:
    """The phase began."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Early:
    """What is started early begins or ends here: in a real step it happens before the log says."""

    begins: bool


_END = Began("update")


class Arrived(NamedTuple):
    """The gradient of a variable, a storage, is complete."""

    variable: str
    storage: int


@dataclass(frozen=True, slots=True)
class Edge:
    """The forward or backward pass of a block begins or ends; ``call`` is the block's call.

    ``gradients`` are the storages of the gradients that arrive where a backward pass begins, by output; ``made`` those
    of what is handed on where a pass ends: outputs by position, or gradients by the input that they are of.
    """

    call: int
    phase: Phase
    begins: bool
    gradients: tuple[tuple[int, int], ...] = ()
    made: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Again:
    """Here a block does again in this phase what another did; see ``Edge``."""

    call: int
    phase: Phase
    gradients: tuple[tuple[int, int], ...] = ()
    made: tuple[tuple[int, int], ...] = ()


Event = Allocated | Freed | Kernel | Collective | Began | Early | Arrived | Edge | Again


@dataclass(frozen=True, slots=True)
class Twin:
    """The block that ``Again`` stands for: whose call, and what its layers, variables and tensors are called now."""

    call: int
    names: Mapping[str, str]


@dataclass
class StepLog:
    """Events in order, and what each storage is for and where it came to be, where that is known.

    ``twins`` are storages of blocks that do again what another did: that one's storage, and the names of the block.
    """

    events: list[Event] = field(default_factory=list)
    kinds: dict[int, StorageKind] = field(default_factory=dict)
    origins: dict[int, Origin] = field(default_factory=dict)
    twins: dict[int, tuple[int, Mapping[str, str]]] = field(default_factory=dict)
    storages: int = 0
    block: int = 1  # bytes of which the device's allocator gives multiples

    def allocate(self, size: int, kind: StorageKind | None = None, times: int = 1) -> int:
        """Note a new storage of ``size`` bytes, which stands for so many equal ones, and return its number."""
        number = self.storages
        self.storages += 1
        if kind is not None:
            self.kinds[number] = kind
        self.events.append(Allocated(number, -(-size // self.block) * self.block, times))
        return number

    def origin(self, storage: int) -> Origin:
        """Return where a storage came to be; nothing is said of one of which that is not known."""
        twin, names = self.twins.get(storage, (storage, _NO_NAMES))
        origin = self.origins.get(twin) or self.origins.get(storage, _UNKNOWN)
        return origin._replace(layer=names.get(origin.layer, origin.layer))


def collectives_of(log: StepLog) -> tuple[Collective, ...]:
    """Return the collectives in order of execution."""
    return tuple(event for event in log.events if isinstance(event, Collective))


def work_of(log: StepLog) -> tuple[Work, ...]:
    """Return what was computed in each phase that ran."""
    flops: dict[Phase, Counter[str]] = {phase: Counter() for phase in PHASES}
    moved: Counter[Phase] = Counter()
    ops: Counter[Phase] = Counter()
    for event in log.events:
        if isinstance(event, Kernel):
            ops[event.phase] += event.times
            moved[event.phase] += event.bytes * event.times
            if event.flops:
                flops[event.phase][event.dtype] += event.flops * event.times
    return tuple(
        Work(phase, tuple(sorted(flops[phase].items())), moved[phase], ops[phase]) for phase in PHASES if ops[phase]
    )


def memory_of(log: StepLog) -> Memory:
    """Return each kind's largest use and the uses at the peak."""
    kinds: tuple[StorageKind, ...] = get_args(StorageKind)
    use, largest, peak = (dict.fromkeys(kinds, 0) for _ in range(3))
    sizes: dict[int, int] = {}
    total, highest, grows = 0, -1, False
    phase: Phase = "forward"
    peak_phase: Phase = "forward"
    for event in (*log.events, _END):
        if isinstance(event, Allocated):
            kind = log.kinds.get(event.storage, "temporaries")
            sizes[event.storage] = size = event.bytes * event.times
            use[kind] += size
            total += size
            grows = True
            if use[kind] > largest[kind]:
                largest[kind] = use[kind]
            continue
        if grows and isinstance(event, Freed | Began):  # so far there was more and more
            grows = False
            if total > highest:
                highest, peak, peak_phase = total, use.copy(), phase
        if isinstance(event, Freed):
            size = sizes.pop(event.storage)
            use[log.kinds.get(event.storage, "temporaries")] -= size
            total -= size
        elif isinstance(event, Began):
            phase = event.phase
    return Memory(MemoryUse(**largest), MemoryUse(**peak), peak_phase)


def unfold(log: StepLog, twins: Mapping[int, Twin]) -> StepLog:
    """Return the log with every ``Again`` written out: storages of its own, and the names of its block.

    Its kernels stand where the twin's are, so many times more.

    Args:
        log: what was recorded.
        twins: by call, whom a block repeats.
    """
    return _Unfolding(log, twins).run()


class _Unfolding:
    def __init__(self, log: StepLog, twins: Mapping[int, Twin]) -> None:
        self.log, self.twins = log, twins
        self.out = StepLog(kinds=dict(log.kinds), origins=dict(log.origins), storages=log.storages, block=log.block)
        self.freed = {event.storage for event in log.events if isinstance(event, Freed)}
        self.freed_forward = _freed_before_backward(log.events)
        self.freed_with = _freed_with_repeats(log.events)
        self.spans = _spans(log.events)
        self.gone: set[int] = set()  # storages of the log that went earlier than it says
        self.arrived: dict[int, dict[int, int]] = {}  # by call of a block that ran: output -> storage of its gradient
        self.made: dict[tuple[int, Phase], dict[int, int]] = {}  # by call that ran: position -> storage handed on
        for event in log.events:
            if isinstance(event, Edge):
                self.arrived.setdefault(event.call, {}).update(event.gradients)
                self.made.setdefault((event.call, event.phase), {}).update(event.made)
        outputs = {storage for (_, phase), made in self.made.items() if phase == "forward" for storage in made.values()}
        self.returned = outputs.union(*(self._gradients_of_inputs(*key) for key in self.spans))
        self.own: dict[tuple[int, ...], dict[int, int]] = {}  # by chain: what the twin hands on -> what the block does
        self.handed_on: dict[tuple[int, ...], dict[int, int]] = {}  # the same, until the backward pass
        self.early: dict[tuple[int, ...], set[int]] = {}  # by chain: storages that came to be before the log says so
        self.copies: dict[tuple[int, ...], dict[int, int]] = {}  # by chain of repeating calls: storage -> its copy
        self.written: Counter[tuple[int, int]] = Counter()  # spans, and how often they were written again
        self.besides: dict[tuple[int, int], list[Event]] = {}  # by span: its events, without kernels and its ends

    def run(self) -> StepLog:
        for event in self.log.events:
            if isinstance(event, Again):
                self._again(event, (), _NO_NAMES)
            elif isinstance(event, Allocated) and event.storage in self.early.get((), ()):
                self.early[()].remove(event.storage)
            elif isinstance(event, Freed) and event.storage in self.gone:
                self.gone.remove(event.storage)
            elif not isinstance(event, Edge):
                self.out.events.append(event)
        self._count_kernels()
        return self.out

    def _count_kernels(self) -> None:
        """Let each kernel count for those of the blocks that do the same."""
        times: Counter[int] = Counter()
        for (start, end), number in self.written.items():
            times.update(dict.fromkeys(range(start, end), number))
        kernels = iter([times[place] for place, event in enumerate(self.log.events) if isinstance(event, Kernel)])
        self.out.events = [
            event._replace(times=event.times * (1 + next(kernels))) if isinstance(event, Kernel) else event
            for event in self.out.events
        ]

    def _gradients_of_inputs(self, call: int, phase: Phase) -> set[int]:
        """Return the storages that the backward pass of a block makes and hands on."""
        start, end = self.spans[call, phase]
        inside = self.log.events[start:end]
        made = {event.storage for event in inside if isinstance(event, Allocated)}
        gone = {event.storage for event in inside if isinstance(event, Freed)}
        held = {storage for storage in made - gone if self.log.kinds.get(storage) != "gradients"}
        return held if phase == "backward" else set()

    def _write(self, span: tuple[int, int], chain: tuple[int, ...], names: Mapping[str, str]) -> None:
        """Write what a span has besides kernels once more, with storages of its own and these names."""
        self.written[span] += 1
        if span not in self.besides:
            inside = self.log.events[slice(*span)]
            self.besides[span] = [event for event in inside if not isinstance(event, Kernel | Edge | Began)]
        early = self.early.setdefault(chain, set())
        for event in self.besides[span]:
            if isinstance(event, Allocated):
                if event.storage in early:
                    early.remove(event.storage)
                else:
                    self._allocated_again(event, chain, (event.storage, names))
            elif isinstance(event, Freed):
                self._freed_again(event, chain)
            elif isinstance(event, Again):
                self._again(event, chain, names)
            elif isinstance(event, Arrived):
                copy = self.copies[chain][event.storage]
                self.out.events.append(Arrived(names.get(event.variable, event.variable), copy))
            else:
                self.out.events.append(_renamed(event, names) if isinstance(event, Collective) else event)

    def _again(self, event: Again, chain: tuple[int, ...], names: Mapping[str, str]) -> None:
        twin = self.twins[event.call]
        span = self.spans.get((twin.call, event.phase))
        if span is None:
            return
        own_names = {**names, **{old: names.get(new, new) for old, new in twin.names.items()}}
        inner = (*chain, event.call)
        self._take_gradients(event, twin.call, inner)
        handed_on = self.made.get((twin.call, event.phase), {})
        self.own[inner] = {handed_on[position]: own for position, own in event.made if position in handed_on}
        if event.phase == "forward":
            self.handed_on[inner] = self.own[inner].copy()
        else:
            self._let_go_as_twin(inner)
        self._write(span, inner, own_names)
        self._let_go(inner, self.freed if event.phase == "backward" else self.freed_forward)

    def _take_gradients(self, event: Again, twin: int, chain: tuple[int, ...]) -> None:
        """Let the gradients that arrive go when the twin lets go of its own."""
        arriving = dict(event.gradients)
        copies = self.copies.setdefault(chain, {})
        for output, storage in self.arrived.get(twin, {}).items():
            # Inside a repeated block they are that block's own copies, and go as it says.
            if output in arriving and len(chain) == 1:
                copies[storage] = arriving[output]

    def _let_go_as_twin(self, chain: tuple[int, ...]) -> None:
        """Let what the block handed on, and only its own backward pass still needs, go where its twin's does."""
        copies, freed = self.copies.setdefault(chain, {}), self.freed_with.get(chain[-1], ())
        for storage, own in self.handed_on.pop(chain, {}).items():
            if own in freed and len(chain) == 1:
                copies[storage] = own

    def _freed_again(self, event: Freed, chain: tuple[int, ...]) -> None:
        copy = self.copies[chain].pop(event.storage, None)
        if copy is not None and copy not in self.gone:
            self.out.events.append(Freed(copy))
            if copy < self.log.storages:
                self.gone.add(copy)

    def _allocated_again(self, event: Allocated, chain: tuple[int, ...], twin: tuple[int, Mapping[str, str]]) -> None:
        """Let a storage come to be for a block that does again what ``twin``, a storage with names, says."""
        if event.storage in self.own[chain]:
            own = Allocated(self.own[chain].pop(event.storage), event.bytes, event.times)
            self._allocate_early(own, chain[:-1], twin)
        elif event.storage not in self.returned:
            kind = self.log.kinds.get(event.storage)
            copy = self.copies[chain][event.storage] = self.out.allocate(event.bytes, kind, event.times)
            self.out.twins[copy] = twin

    def _allocate_early(self, event: Allocated, chain: tuple[int, ...], twin: tuple[int, Mapping[str, str]]) -> None:
        """Let what a block hands on come to be when its twin makes it, and not when the block has ended."""
        self.early.setdefault(chain, set()).add(event.storage)
        if chain:
            self._allocated_again(event, chain, twin)
        else:
            self.out.events.append(event)
            self.out.twins[event.storage] = twin

    def _let_go(self, chain: tuple[int, ...], storages: Set[int]) -> None:
        """Free what a block still holds when it ends, if its twin lets go of it a little later."""
        copies = self.copies.get(chain, {})
        for storage in [each for each in copies if each in storages]:
            copy = copies.pop(storage)
            if copy >= self.log.storages:
                self.out.events.append(Freed(copy))


def _freed_with_repeats(events: Iterable[Event]) -> dict[int, set[int]]:
    """Return what goes as soon as a block that does not run has gone backward, by its call."""
    freed: dict[int, set[int]] = {}
    call: int | None = None
    for event in events:
        if isinstance(event, Again) and event.phase == "backward":
            call = event.call
        elif isinstance(event, Freed) and call is not None:
            freed.setdefault(call, set()).add(event.storage)
        elif not isinstance(event, Allocated | Edge):
            call = None
    return freed


def _freed_before_backward(events: Iterable[Event]) -> set[int]:
    freed: set[int] = set()
    for event in events:
        if isinstance(event, Freed):
            freed.add(event.storage)
        elif isinstance(event, Began) and event.phase == "backward":
            break
    return freed


def _spans(events: Iterable[Event]) -> dict[tuple[int, Phase], tuple[int, int]]:
    """Return where each block that ran begins and ends in each phase."""
    starts: dict[tuple[int, Phase], int] = {}
    spans: dict[tuple[int, Phase], tuple[int, int]] = {}
    open_backward: dict[tuple[int, Phase], int] = {}
    last = 0
    for position, event in enumerate(events):
        last = position + 1
        if isinstance(event, Edge):
            key = event.call, event.phase
            if event.begins:
                starts.setdefault(key, position + 1)
                open_backward[key] = position + 1
            else:
                spans[key] = starts[key], position
                open_backward.pop(key, None)
        elif isinstance(event, Began) and event.phase == "update":
            for key in list(open_backward):
                spans[key] = open_backward.pop(key), position
    spans.update({key: (start, last) for key, start in open_backward.items()})
    return spans


def _renamed(collective: Collective, names: Mapping[str, str]) -> Collective:
    place = collective.place
    words, bracket, tensor = place.partition(" (")
    renamed = f"{words} ({names.get(tensor[:-1], tensor[:-1])})" if bracket else names.get(place, place)
    return replace(collective, layer=names.get(collective.layer, collective.layer), place=renamed)
