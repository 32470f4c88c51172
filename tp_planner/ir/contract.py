"""The contract: what a plan says a training step communicates, against what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from tp_planner.ir.errors import ContractError
from tp_planner.ir.placement import Shape
from tp_planner.ir.step import Collective


@dataclass(frozen=True, slots=True)
class Recording:
    """One training step as it ran on one rank: the model's inputs (shape, dtype name) and the collectives in order."""

    inputs: tuple[tuple[Shape, str], ...]
    collectives: tuple[Collective, ...]


def check_contract(inputs: Sequence[tuple[Shape, str]], planned: Sequence[Collective], recorded: Recording) -> None:
    """Raise ContractError with the first difference between what was planned and what ran.

    On the way forward the order counts too; on the way back it follows from the loss, which a plan does not know.
    Where the batch is another than the planned one, a collective moves as many bytes as planned, or so many times
    more or fewer.

    Args:
        inputs: shape and dtype name of the inputs that the plan was made for.
        planned: the plan's collectives.
        recorded: what ran.
    """
    factor = _batch_factor(inputs, recorded.inputs)
    expected = [_signed(each) for each in planned]
    ran = [_signed(each) for each in recorded.collectives]
    sizes = {_signed(each): each.bytes for each in planned}
    for position, (each, found) in enumerate(zip(planned, recorded.collectives, strict=False)):
        if each.phase != "forward" or found.phase != "forward":
            break
        if _signed(each) != _signed(found):
            raise ContractError(
                f"collective {position + 1} of the step should be {_said(each)} but was {_said(found)}{_why(found)}"
            )
    missing, extra = Counter(expected) - Counter(ran), Counter(ran) - Counter(expected)
    for each in planned:
        if missing[_signed(each)]:
            raise ContractError(f"{_said(each)} is in the plan, and did not run")
    for found in recorded.collectives:
        if extra[_signed(found)]:
            raise ContractError(f"{_said(found)} ran, and is not in the plan{_why(found)}")
        size = sizes[_signed(found)]
        if found.bytes not in (size, size * factor):
            expected_sizes = dict.fromkeys((str(size), str(size * factor)))
            raise ContractError(f"{_said(found)} moved {found.bytes} bytes, not {' or '.join(expected_sizes)}")


def _signed(collective: Collective) -> Collective:
    """Return the collective without what may depend on the batch, or says the same in words."""
    return replace(collective, bytes=0, reason="")


def _batch_factor(planned: Sequence[tuple[Shape, str]], found: Sequence[tuple[Shape, str]]) -> Fraction:
    """Return how many times larger the batch is than the planned one."""
    same_but_batch = len(planned) == len(found) and all(
        one[1:] == other[1:] and len(one) == len(other) for (one, _), (other, _) in zip(planned, found, strict=True)
    )
    factors = {
        Fraction(other[0], one[0]) for (one, _), (other, _) in zip(planned, found, strict=False) if one and other
    }
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
