"""Equal blocks: recognise layers that compute the same, so that a tower of equal blocks is planned once.

Two layers are equal if their classes, their plain attributes, their variables' shapes and dtypes and all their
inner layers are. Attributes that cannot be compared make a layer equal to itself only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import keras
import torch

from tp_planner.frontend.layer_tree import BOOKKEEPING, named_layers, named_variables, own_variables
from tp_planner.frontend.penalties import penalty_kind
from tp_planner.frontend.stretches import Wiring

_PLAIN = (int, float, str, bool, bytes, complex, type(None))
# Attributes of these kinds do not change what a call computes, or are compared in another way.
_INERT = (
    keras.Variable,
    keras.Layer,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.random.SeedGenerator,
    torch.nn.Module,
    Wiring,
)
_COMMON = BOOKKEEPING - {"_dtype_policy", "_trainable", "autocast"}  # these three matter


@dataclass(frozen=True)
class Blocks:
    """The layers with inner layers that have an equal in the model, by name.

    Equal ones have the same number in ``signatures``. ``layers`` are the block and all below it, ``variables``
    theirs, in order. No other layer holds the inner layers of a block; their ``home`` is the innermost such block.
    """

    signatures: Mapping[str, int]
    layers: Mapping[str, tuple[str, ...]]
    variables: Mapping[str, tuple[str, ...]]
    home_of_layer: Mapping[str, str]
    home_of_variable: Mapping[str, str]

    @classmethod
    def of(
        cls,
        signatures: Mapping[str, int],
        layers: Mapping[str, tuple[str, ...]],
        variables: Mapping[str, tuple[str, ...]],
    ) -> Blocks:
        """Return the blocks of these names, outer ones before those inside them."""
        home_of_layer: dict[str, str] = {}
        home_of_variable: dict[str, str] = {}
        for block in signatures:
            home_of_layer.update(dict.fromkeys(layers[block][1:], block))
            home_of_variable.update(dict.fromkeys(variables[block], block))
        return cls(signatures, layers, variables, home_of_layer, home_of_variable)

    @classmethod
    def none(cls) -> Blocks:
        """Return that no layers are equal."""
        return cls({}, {}, {}, {}, {})

    def without(self, block: str) -> Blocks:
        """Return the blocks but for this one and those equal to it."""
        number = self.signatures[block]
        return Blocks.of(
            {name: each for name, each in self.signatures.items() if each != number}, self.layers, self.variables
        )


class Signatures:
    """Numbers that are equal for equal layers of a model, by name.

    Args:
        model: the model.
        distinguish: returns what else has to be equal in a layer and all below it, by a layer's name.
        signature: returns what has to be equal in a layer itself.
    """

    def __init__(
        self,
        model: keras.Model,
        distinguish: Callable[[str], Hashable] = lambda name: None,
        signature: Callable[[keras.Layer], Hashable] | None = None,
    ) -> None:
        self._layers, self._distinguish = named_layers(model), distinguish
        self._signature = signature or layer_signature
        self._names = {id(layer): name for name, layer in self._layers.items()}
        self._numbers: dict[Hashable, int] = {}  # by what is equal
        self._known: dict[str, int] = {}

    def of(self, name: str) -> int:
        """Return the number of the layer of this name."""
        if name not in self._known:
            layer = self._layers[name]
            inner = tuple(self.of(self._names[id(child)]) for child in layer._layers)
            value = self._signature(layer), inner, self._distinguish(name)
            self._known[name] = self._numbers.setdefault(value, len(self._numbers))
        return self._known[name]


def find_blocks(model: keras.Model, signatures: Signatures | None = None) -> Blocks:
    """Return the blocks of ``model``, whose layers have these ``signatures``."""
    signatures = signatures or Signatures(model)
    layers = named_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    parents: dict[str, set[str]] = {}
    for name, layer in layers.items():
        for child in layer._layers:
            parents.setdefault(names[id(child)], set()).add(name)
    below = {name: _below(layer, names) for name, layer in list(layers.items())[1:] if layer._layers}
    alone = {name: inner for name, inner in below.items() if _is_alone(inner, parents)}
    found = {name: signatures.of(name) for name in alone}
    counts = Counter(found.values())
    numbers = {signature: number for number, signature in enumerate(counts)}
    equal = {name: inner for name, inner in alone.items() if counts[found[name]] > 1}
    keys = {id(variable): key for key, variable in named_variables(model).items()}
    own = {name: tuple(keys[id(v)] for v in own_variables(layers[name])) for inner in equal.values() for name in inner}
    return Blocks.of(
        {name: numbers[found[name]] for name in equal},
        equal,
        {block: tuple(key for name in inner for key in own[name]) for block, inner in equal.items()},
    )


def find_alike(model: keras.Model, distinguish: Callable[[str], Hashable]) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """Return for each layer those of its class with equal variables and inner layers alike, whatever else they keep.

    Each is there with all layers below it, the layer itself included. ``distinguish`` is as for ``Signatures``.
    """
    return _by_signature(model, Signatures(model, distinguish, _without_attributes))


def find_of_one_class(model: keras.Model) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """Return for each layer those of its class, with inner layers of the same classes, as ``find_alike`` does."""
    return _by_signature(model, Signatures(model, signature=type))


def _by_signature(model: keras.Model, signatures: Signatures) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    layers = named_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    alike: dict[int, list[tuple[str, ...]]] = {}
    for name, layer in layers.items():
        alike.setdefault(signatures.of(name), []).append(_below(layer, names))
    return {name: tuple(alike[signatures.of(name)]) for name in layers}


def _below(layer: keras.Layer, names: Mapping[int, str]) -> tuple[str, ...]:
    """Return the names of a layer and all layers below it, each once."""
    found: dict[str, None] = {}

    def walk(each: keras.Layer) -> None:
        name = names[id(each)]
        if name not in found:
            found[name] = None
            for child in each._layers:
                walk(child)

    walk(layer)
    return tuple(found)


def _is_alone(inner: tuple[str, ...], parents: Mapping[str, set[str]]) -> bool:
    """Whether no layer outside of a block holds one that is inside."""
    inside = set(inner)
    return all(parents[name] <= inside for name in inner[1:])


def layer_signature(layer: keras.Layer) -> Hashable:
    """Return a value that is equal for layers that compute the same, if the layers inside them do."""
    attributes = ((name, _attribute(value)) for name, value in layer.__dict__.items() if _matters(name, value))
    return *_without_attributes(layer), tuple(sorted(attributes))


def _without_attributes(layer: keras.Layer) -> tuple[Any, ...]:
    variables = tuple(_variable_signature(variable) for variable in own_variables(layer))
    return type(layer), variables, _recomputation_signature(layer)


def _matters(name: str, value: Any) -> bool:
    return (name not in _COMMON or name == "_dtype_policy") and not isinstance(value, _INERT)


def _attribute(value: Any) -> str:
    """Return an attribute as text; the identity of what cannot be compared."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, keras.DTypePolicy):
        return f"{value.compute_dtype} {value.variable_dtype}"
    if isinstance(value, keras.InputSpec):
        return repr(value)
    if isinstance(value, dict):
        items = [(str(key), _attribute(each)) for key, each in value.items() if not isinstance(each, _INERT)]
        return repr(sorted(items))
    if isinstance(value, list | tuple | set | frozenset):
        return repr([_attribute(each) for each in value if not isinstance(each, _INERT)])
    if is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{type(value).__qualname__} {_attribute(values)}"
    return f"{type(value).__qualname__} {id(value)}"


def _recomputation_signature(layer: keras.Layer) -> Hashable:
    """Return what the layer's RematScope says of it: the backward pass may run it again."""
    scope = layer._remat_mode
    return scope and (scope.mode, scope.output_size_threshold, layer.name in scope.layer_names)


def _variable_signature(variable: Any) -> Hashable:
    return (
        variable.name,
        tuple(variable.shape),
        str(variable._dtype),
        bool(variable.trainable),
        penalty_kind(variable.regularizer),
    )
