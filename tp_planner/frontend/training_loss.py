"""Training loss: the loss that a model is trained with, as Keras computes it, on targets made for its outputs."""

from __future__ import annotations

from typing import Any

import keras
import torch
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileLoss

from tp_planner.ir.errors import PlanError

# Losses whose targets are indices of the outputs' last dim; of all others of Keras they are like the outputs.
OF_INDICES = (keras.losses.sparse_categorical_crossentropy,)


class TrainingLoss:
    """A loss, or several, as ``Model.compile`` takes them.

    Args:
        loss: a loss or its name, or a list or dict of these.
        weights: the factors of several losses.
        output_names: the names of the model's outputs, where they have names.

    Raises:
        PlanError: if a name is none of a loss of Keras.
    """

    def __init__(self, loss: Any, weights: Any = None, output_names: Any = None) -> None:
        self._arguments = loss, weights
        self._output_names = output_names
        given = [each for each in keras.tree.flatten(loss) if each is not None]
        self.name = ", ".join(dict.fromkeys(map(_name, given)))

    @classmethod
    def of(cls, model: keras.Model, loss: Any = None) -> TrainingLoss | None:
        """Return the given loss, by default that of Keras which the model is compiled with; None if there is none."""
        names = getattr(model, "output_names", None)
        if loss is not None:
            return cls(loss, None, names)
        compiled = getattr(model, "_compile_loss", None)
        if compiled is None or not all(map(_is_of_keras, keras.tree.flatten(compiled._user_loss))):
            return None
        return cls(compiled._user_loss, compiled._user_loss_weights, names)

    @property
    def reads_shards(self) -> bool:
        """Whether it is one cross-entropy, which can be computed where each rank has a part of the logits."""
        given = [each for each in keras.tree.flatten(self._arguments[0]) if each is not None]
        return len(given) == 1 and is_cross_entropy_of_logits(given[0])

    def __call__(self, outputs: Any) -> torch.Tensor:
        """Return the loss of a model's outputs, all targets being zero.

        Raises ValueError for a loss that is not Keras's: it may keep what it is called on, or build layers from it.
        """
        foreign = [each for each in keras.tree.flatten(self._arguments[0]) if not _is_of_keras(each)]
        if foreign:
            raise ValueError("it is no loss of Keras")
        compiled, takes_indices = self._built(outputs)
        targets = [
            leaf.new_zeros(leaf.shape[:-1], dtype=torch.int32) if indices else _zeros_like(leaf)
            for leaf, indices in zip(keras.tree.flatten(outputs), takes_indices, strict=True)
        ]
        result: torch.Tensor = compiled(keras.tree.pack_sequence_as(outputs, targets), outputs)
        return result

    def takes_indices(self, outputs: Any) -> list[bool]:
        """Return, for each of a model's flattened outputs, whether its targets are indices of its last dim."""
        return self._built(outputs)[1]

    def _built(self, outputs: Any) -> tuple[CompileLoss, list[bool]]:
        compiled = CompileLoss(*self._arguments, output_names=self._output_names)
        compiled.build(outputs, outputs)
        of_indices = {tuple(each.path) for each in compiled._flat_losses if _takes_indices(each.loss)}
        return compiled, [tuple(path) in of_indices for path, _ in keras.tree.flatten_with_path(outputs)]


def is_cross_entropy_of_logits(loss: Any) -> bool:
    """Whether a loss is a cross-entropy of Keras over the last dim of logits."""
    if not isinstance(loss, LossFunctionWrapper) or loss.fn not in (*OF_INDICES, keras.losses.categorical_crossentropy):
        return False
    options = loss._fn_kwargs
    of_keras = type(loss).call is LossFunctionWrapper.call
    return of_keras and bool(options.get("from_logits", False)) and options.get("axis", -1) == -1


def _name(loss: Any) -> str:
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):  # Keras chooses one by the shapes
        return "crossentropy"
    try:
        found = keras.losses.get(loss)
    except ValueError:
        raise PlanError(
            f"loss {loss!r} is unknown; give a Keras loss or the name of one, such as 'sparse_categorical_crossentropy'"
        ) from None
    return str(getattr(found, "__name__", type(found).__name__))


def _is_of_keras(loss: Any) -> bool:
    """Whether a loss, or its name, is Keras's own, and computes with a function of Keras."""
    if loss is None or isinstance(loss, str):
        return True
    function = getattr(loss, "fn", loss)
    modules = [getattr(each, "__module__", None) or type(each).__module__ for each in (loss, function)]
    return all(module.partition(".")[0] in ("keras", "keras_hub") for module in modules)


def _zeros_like(output: Any) -> Any:
    return output.new_zeros(output.shape) if isinstance(output, torch.Tensor) else output


def _takes_indices(loss: Any) -> bool:
    return getattr(loss, "fn", None) in OF_INDICES
