"""Verdict: how far a parallel model is from one device: which differences are rounding, and where errors begin."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tp_planner.ir.plan import Plan
from tp_planner.ir.plan_json import plan_hash

Kind = Literal["output", "gradient at", "loss", "metric", "gradient of", "weight", "slot"]
IN_LAYERS = ("output", "gradient at")  # kinds of tensors that layers return; of the others each rank has the whole
Judgement = Literal["equal", "rounding", "error", "error in its dtype"]

TOLERANCE = 1e-9  # relative, in float64: rounding of a reordered sum is about 1e-12, whatever is wrong is far more
CHANCE = 1e3  # how many times as large, or as small, as precision alone would have it, a rounding may be
LARGEST = 1e4  # of a rounding, where no other precision was tried, in units of the dtype's
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7, "float16": 2.0**-10}
BEFORE, INFERENCE = "before", "inference"  # phases
FIRST_PLACE = "call 1, output 0"


@dataclass(frozen=True, slots=True)
class Event:
    """Which tensor of a run it is. ``name`` is a layer's or a variable's; ``place`` tells a layer's calls apart."""

    phase: str  # BEFORE, INFERENCE, "step 1", ...
    kind: Kind
    name: str
    place: str = ""

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place and self.place != FIRST_PLACE else ""
        return (
            f"{self.kind} {self.name!r}{where}, {self.phase}"
            if self.kind not in ("loss", "metric")
            else (f"{self.name}, {self.phase}")
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor of the parallel model is from that of one device.

    ``error`` is the largest difference of two elements over the largest element, infinite where shapes differ or one
    side has no such tensor. ``disagreement`` is the same between ranks that should hold equal values.
    """

    event: Event
    error: float
    disagreement: float
    placement: str


@dataclass(frozen=True, slots=True)
class Judged:
    """One tensor: its differences, relative to its largest element, and what they are.

    ``narrow`` is that in the model's own dtype, whose rounding is ``epsilon``, ``wide`` that in float64, if known.
    ``disagreement`` is that between ranks which should hold equal values. ``rounding`` is how far one device in the
    model's dtype is from one device in float64, if known: what the lengths of this tensor's sums, and of all before it,
    make of the dtype's epsilon.
    """

    event: Event
    narrow: float
    wide: float | None
    disagreement: float
    placement: str
    epsilon: float
    rounding: float | None = None

    @property
    def units(self) -> float | None:
        """How many times as large as one device's own rounding the difference is; about 1 is as good as it gets."""
        return None if self.rounding is None else self.narrow / max(self.rounding, self.epsilon)

    @property
    def judgement(self) -> Judgement:
        """Rounding falls with the precision; an error stays, or is there in the model's own dtype alone."""
        if self.wide is None:
            is_wrong = max(self.narrow, self.disagreement) > LARGEST * self.epsilon
            return "error" if is_wrong else "rounding" if self.narrow else "equal"
        if max(self.wide, self.disagreement) > TOLERANCE:
            return "error"
        if self.narrow > CHANCE * self.epsilon * max(self.wide / EPSILON["float64"], 1):
            return "error in its dtype"
        return "rounding" if max(self.narrow, self.wide) else "equal"

    @property
    def is_wrong(self) -> bool:
        """Whether the difference is more than rounding."""
        return self.judgement in ("error", "error in its dtype")


def judge(
    narrow: Iterable[Difference],
    wide: Iterable[Difference] | None,
    dtype: str,
    rounding: Mapping[Event, float] | None = None,
) -> tuple[Judged, ...]:
    """Return what the differences in ``dtype`` and in float64 come to, in order; those in float64 may be unknown.

    ``rounding`` has that of one device, by event.
    """
    before = {each.event: each for each in narrow}
    return tuple(
        Judged(
            event=each.event,
            narrow=before[each.event].error,
            wide=None if wide is None else each.error,
            disagreement=math.inf if _copies_differ(before[each.event]) else each.disagreement,
            placement=each.placement,
            epsilon=EPSILON[dtype],
            rounding=None if rounding is None else rounding.get(each.event),
        )
        for each in (before.values() if wide is None else wide)
        if each.event in before
    )


def _copies_differ(difference: Difference) -> bool:
    return difference.disagreement == math.inf


@dataclass(frozen=True)
class Verdict:
    """Whether a model under a plan is the same function as on one device; ``print`` shows it.

    ``tensors`` has every tensor that was compared: outputs of all layers and gradients at them, loss, metrics,
    gradients of variables, their values and the optimizer's after the steps. ``readers`` are the layers that take a
    layer's output, ``owners`` the layers of variables. ``failure`` is what a rank failed with, after which nothing was
    compared.
    """

    plan: Plan
    dtype: str  # the model's own
    tensors: tuple[Judged, ...]
    readers: dict[Event, list[str]]
    owners: dict[str, str]
    failure: str = ""

    @property
    def is_same(self) -> bool:
        """Whether no rank has failed, and all differences are rounding."""
        return not self.failure and not any(each.is_wrong for each in self.tensors)

    @property
    def wrong(self) -> list[Judged]:
        """The tensors that differ by more than rounding, in the order in which they were computed."""
        return [each for each in self.tensors if each.is_wrong]

    @cached_property
    def begins(self) -> Beginning | None:
        """Where the model begins to differ; None if it does not."""
        if not self.wrong:
            return None
        first = min(self.wrong, key=lambda each: (_phase_order(each.event.phase), _KINDS.index(each.event.kind)))
        name = first.event.name
        if first.event.kind == "gradient at":
            return Beginning(first, self._where_gradients_come_from(first.event) or (name,))
        return Beginning(first, (self.layer_of(name),))

    def layer_of(self, name: str) -> str:
        """Return the layer that a variable belongs to, and a layer for its own name."""
        return self.owners.get(name, name)

    def _where_gradients_come_from(self, event: Event) -> tuple[str, ...]:
        """Return the layers that read the output whose gradient this is: those that the plan has do anything to it."""
        readers = self.readers.get(Event(event.phase, "output", event.name, event.place), ())
        styles = {layer.layer: layer.style for layer in self.plan.layers}
        parallel = tuple(reader for reader in readers if styles.get(reader, "replicated") != "replicated")
        return parallel or tuple(readers)

    def to_json(self) -> str:
        """Return all of it as JSON text with sorted keys."""
        begins = self.begins
        data = {
            "same": self.is_same,
            "dtype": self.dtype,
            "failure": self.failure,
            "plan": plan_hash(self.plan),
            "begins": None if begins is None else {"layers": begins.layers, "at": str(begins.first.event)},
            "tensors": [
                {
                    "phase": each.event.phase,
                    "kind": each.event.kind,
                    "name": each.event.name,
                    "place": each.event.place,
                    "placement": each.placement,
                    "own dtype": _number(each.narrow),
                    "float64": _number(each.wide),
                    "between ranks": _number(each.disagreement),
                    "rounding of one device": _number(each.rounding),
                    "is": each.judgement,
                }
                for each in self.tensors
            ],
        }
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a model begins to differ: the first tensor, and the layers at which that may have come in."""

    first: Judged
    layers: tuple[str, ...]


# What comes first of what is wrong in one phase. Values after the step stand for gradients that were wrong.
_KINDS = ("output", "loss", "metric", "gradient at", "gradient of", "weight", "slot")


def _phase_order(phase: str) -> int:
    return {BEFORE: -1, INFERENCE: 0}[phase] if phase in (BEFORE, INFERENCE) else int(phase.removeprefix("step "))


def _number(value: float | None) -> float | str | None:
    return value if value is None or value < math.inf else "infinite"
