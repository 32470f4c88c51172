"""Inputs: sizes that a model leaves open are taken from where they are known, or guessed and said to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import keras
import pytest

from tests import models
from tp_planner.frontend.inputs import known_inputs, sized_inputs
from tp_planner.ir.errors import PlanError
from tp_planner.ir.plan import GuessedDim
from tp_planner.report.guesses import guess_lines


class Declaring:
    """A model as far as its inputs go: their shapes by name, and a preprocessor."""

    name = "declaring"

    def __init__(self, shapes: dict[str, tuple[int | None, ...]], **sizes: int) -> None:
        self._inputs_struct = {
            name: keras.KerasTensor(shape, dtype="int32", name=f"{name}_tensor") for name, shape in shapes.items()
        }
        self.preprocessor = SimpleNamespace(**sizes) if sizes else None


TEXT = {"token_ids": (None, None), "padding_mask": (None, None)}
SEQ_2_SEQ = {"encoder_token_ids": (None, None), "decoder_token_ids": (None, None)}
MASKED = {"token_ids": (None, None), "mask_positions": (None, None)}
IMAGES = {"images": (None, None, None, 3)}


@pytest.mark.parametrize(
    ("model", "shapes", "guessed"),
    [
        (Declaring(TEXT), [(2, 16), (2, 16)], {0: 2, 1: 2}),
        (Declaring(TEXT, sequence_length=64), [(2, 64), (2, 64)], {0: 2}),
        (
            Declaring(SEQ_2_SEQ, encoder_sequence_length=32, decoder_sequence_length=8),
            [(2, 32), (2, 8)],
            {0: 2},
        ),
        (Declaring(MASKED, sequence_length=64, mask_selection_length=9), [(2, 64), (2, 9)], {0: 2}),
        (Declaring(IMAGES, sequence_length=64), [(2, 16, 16, 3)], {0: 1, 1: 1, 2: 1}),
        (Declaring({"x": (4, 8)}), [(4, 8)], {}),
    ],
)
def test_sizes_are_taken_from_where_they_are_known(model: Any, shapes: list[Any], guessed: dict[int, int]) -> None:
    """A preprocessor knows lengths; what nobody knows is guessed, and counted here by dim."""
    arguments, guesses = known_inputs(model)
    assert [tuple(spec.shape) for spec in arguments.tensors] == shapes
    dims = [guess.dim for guess in guesses]
    assert {dim: dims.count(dim) for dim in sorted(set(dims))} == guessed


def test_sizes_that_are_given_leave_nothing_to_guess() -> None:
    """A batch and a length are those of all inputs but of those with a length of their own."""
    model: Any = Declaring(MASKED, sequence_length=64, mask_selection_length=9)
    arguments, guesses = known_inputs(model, sized_inputs(model, batch=4, length=4096))
    assert [tuple(spec.shape) for spec in arguments.tensors] == [(4, 4096), (4, 9)]
    assert guesses == ()


def test_length_that_no_input_has_is_refused() -> None:
    """A model of fixed lengths, or of images, has none to set."""
    with pytest.raises(PlanError) as caught:
        sized_inputs(models.mlp(), length=32)
    assert str(caught.value) == ("no input of model 'mlp' has an open length, dim 1 (features ?x16); build it with one")


def test_guesses_are_said_with_what_to_do() -> None:
    """The lines name sizes, dims and inputs, and what to do."""
    guessed = [GuessedDim(name, dim, size) for name in ("ids", "mask") for dim, size in ((0, 2), (1, 16))]
    assert guess_lines(guessed) == [
        "GUESSED SIZES: batch 2 (dim 0 of ids, mask), 16 (dim 1 of ids, mask)",
        "memory and time are for these: plan with the sizes you train with (inputs=; --batch, --sequence or --input)",
    ]
    assert guess_lines([]) == []
