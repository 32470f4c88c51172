"""The contract: what a plan says a training step communicates, against what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction

from tp_planner.ir.errors import ContractError
from tp_planner.ir.placement import Shape
from tp_planner.ir.step import Collective


@dataclass(frozen=True, slots=True)
class Recording:
    """One training step as it ran on one rank: the model's inputs (shape, dtype name) and the collectives in order.

    ``updates`` is False for a micro-step whose gradients the optimizer only added up.
    """

    inputs: tuple[tuple[Shape, str], ...]
    collectives: tuple[Collective, ...]
    updates: bool = True


def check_contract(
    inputs: Sequence[tuple[Shape, str]],
    planned: Sequence[Collective],
    recorded: Recording,
    unequal: Set[str] = frozenset(),
) -> None:
    """Raise ContractError with the first difference between what was planned and what ran.

    On the way forward the order counts too; on the way back it follows from the loss, which a plan does not know.
    Where the batch is another than the planned one, what crosses a boundary may have as many bytes as planned, or so
    many times more or fewer; what does not depend on inputs has as many.

    Args:
        inputs: shape and dtype name of the inputs that the plan was made for.
        planned: the plan's collectives.
        recorded: what ran.
        unequal: variables of which a plan, which is that of rank 0, has the largest part: other ranks may move less.
    """
    factor = _batch_factor(inputs, recorded.inputs)
    for position, (each, found) in enumerate(zip(planned, recorded.collectives, strict=False)):
        if each.phase != "forward" or found.phase != "forward":
            break
        if _signed(each) != _signed(found):
            raise ContractError(
                f"collective {position + 1} of the step should be {_said(each)} but was {_said(found)}{_why(found)}"
            )
    _check_counts(planned, recorded.collectives)
    _check_sizes(planned, recorded.collectives, factor, unequal)


def _check_counts(planned: Sequence[Collective], ran: Sequence[Collective]) -> None:
    expected, found = Counter(map(_signed, planned)), Counter(map(_signed, ran))
    for each in planned:
        if found[_signed(each)] < expected[_signed(each)]:
            raise ContractError(f"{_said(each)} is in the plan, and did not run{_next_step(each)}")
    for each in ran:
        known = expected[_signed(each)]
        if found[_signed(each)] > known > 0:
            raise ContractError(
                f"{_said(each)} ran {found[_signed(each)]} times, and is in the plan {known} times; "
                f"record one training step, of one forward and one backward pass"
            )
        if not known:
            raise ContractError(f"{_said(each)} ran, and is not in the plan{_why(each)}{_next_step(each)}")


def _check_sizes(planned: Sequence[Collective], ran: Sequence[Collective], factor: Fraction, unequal: Set[str]) -> None:
    sizes: dict[Collective, list[int]] = {}
    for each in planned:
        sizes.setdefault(_signed(each), []).append(each.bytes)
    for each in ran:
        known = sizes[_signed(each)]
        factors = (Fraction(1), factor) if each.of_activation else (Fraction(1),)
        fitting = [size for size in known if each.bytes in [size * times for times in factors]]
        if not fitting and each.place in unequal:
            fitting = [size for size in known if each.bytes < size]
        if not fitting:
            allowed = dict.fromkeys(str(size * times) for size in known for times in factors)
            raise ContractError(f"{_said(each)} moved {each.bytes} bytes, not {' or '.join(allowed)}")
        known.remove(fitting[0])


def _next_step(collective: Collective) -> str:
    if collective.cause:
        return ""
    if collective.phase == "update":
        return "; plan with optimizer=, the one that makes the update"
    if collective.phase == "backward":
        return "; plan again if layers were frozen since, or with loss=, the one that is trained with"
    return ""


def _signed(collective: Collective) -> Collective:
    """Return the collective without what may depend on the batch, or says the same in words."""
    return replace(collective, bytes=0, reason="", behind=(), once=False)


def _batch_factor(planned: Sequence[tuple[Shape, str]], found: Sequence[tuple[Shape, str]]) -> Fraction:
    """Return how many times larger the batch is than the planned one."""
    same_but_batch = len(planned) == len(found) and all(
        one[1:] == other[1:] and len(one) == len(other) for (one, _), (other, _) in zip(planned, found, strict=True)
    )
    factors = {
        Fraction(other[0], one[0]) for (one, _), (other, _) in zip(planned, found, strict=False) if one and other
    }
    if not found:
        raise ContractError("the model was not called while the step was recorded; call it inside tp_planner.record")
    if not same_but_batch or len(factors) > 1:
        raise ContractError(
            f"the step ran on inputs {_shapes(found)}, the plan was made for {_shapes(planned)}; "
            f"plan with inputs=, an example batch, to compare the two"
        )
    return factors.pop() if factors else Fraction(1)


def _said(collective: Collective) -> str:
    text = f"{collective.phase} {collective.kind} over {collective.axis!r}"
    text += f" of layer {collective.layer!r}" if collective.layer else ""
    return text + (f" ({collective.place})" if collective.place else "")


def _why(collective: Collective) -> str:
    return f": {collective.cause} caused it" if collective.cause else ""


def _shapes(inputs: Sequence[tuple[Shape, str]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape)) or 'scalar'} {dtype}" for shape, dtype in inputs)
