"""Replay: calls of a model from their tape instead of its layers' code; ``jit_compile=True`` asks for it.

Keras's default lets it be done, which ``automatic.py`` is about.

Of each sort of call (shapes, dtypes, training or not) the first two are taped: layers make what they keep in the first.
The others run the second tape's program, if code did the same in both, and left nothing behind that it did not before;
else a third is taped. A program makes the same torch functions, boundaries and collectives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import get_autocast_scope
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_planner.frontend.calling import leaves_no_trace
from tp_planner.regions.calls import run_at_once, running
from tp_planner.regions.left_out import watching
from tp_planner.replay.automatic import Automatic
from tp_planner.replay.program import Program, Step, Writing, compiled
from tp_planner.replay.same_steps import difference
from tp_planner.replay.tape import Tape
from tp_planner.replay.what_stays import Attributes, look_for_what_stays
from tp_planner.storage.log import logger

MOST_CALLS = 3  # of one sort that are taped
MOST_PROGRAMS = 64  # of one model; further sorts of calls run as ever
PLAIN_ARGUMENTS = (bool, int, float, str, type(None))


# The methods whose calls may be replayed, of those that a model has; of KerasHub's tasks those that generate a token.
REPLAYED = ("call", "call_with_cache", "call_decoder_with_cache")


def replaying(
    model: keras.Model,
    method: str,
    layers: Mapping[str, keras.Layer],
    makes_again: bool = False,
    in_parts: bool = False,
    write: Writing = compiled,
    automatic: bool = False,
) -> Callable[..., Any]:
    """Return what replaces a method of a model, one of ``REPLAYED``.

    Args:
        model: a parallel model.
        method: the method's name.
        layers: the model's layers by name.
        makes_again: whether what is gathered of the residual stream, or cast, is not to be kept for the backward pass.
        in_parts: whether that holds for weights, too; the plan says what of them is kept by what the code keeps.
        write: makes programs of steps.
        automatic: whether nobody has asked for it.
    """
    plain, asked = getattr(model, method), model.jit_compile  # which Keras changes while it calls models
    what = f"model {model.name!r}" if method == "call" else f"{method} of model {model.name!r}"
    programs: dict[Hashable, Program] = {}
    taped: dict[Hashable, list[Sequence[Step]]] = {}  # of the calls before
    refused: set[Hashable] = set()

    def forget() -> None:
        for each in (programs, taped, refused):
            each.clear()

    unasked = Automatic(model, what, layers, forget) if automatic else None

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [keras.ops.convert_to_tensor(leaf) if _is_numbers(leaf) else leaf for leaf in leaves]
        tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
        key = None if _is_special() else _sort_of_call(leaves, tensors, structure)
        if key is None or key in refused or (key not in taped and len(taped) == MOST_PROGRAMS):
            return plain(*args, **kwargs)
        if unasked is not None and not unasked.lets(key):
            return plain(*args, **kwargs)
        program = programs.get(key)
        if program is not None:
            gradients = torch.is_grad_enabled()
            try:
                with watching() if makes_again or in_parts else contextlib.nullcontext():
                    return program(*tensors)
            except BaseException:
                torch._C._set_grad_enabled(gradients)  # the program may have switched them off
                raise
        args, kwargs = tree_unflatten(leaves, structure)
        before = Attributes(layers)
        with Tape(tensors) as tape:
            output = plain(*args, **kwargs)
        calls = taped.setdefault(key, [])
        if calls:
            look_for_what_stays(tape, before, layers, output)
            other = difference(calls[-1], tape.steps)
            if other and len(calls) == MOST_CALLS - 1:
                tape.fail(f"code is not the same in each call: {other}")
            # Nobody has asked for other rounding, nor do all ranks know alike when this one's calls are replayed: the
            # same functions in the same order have autograd communicate in the same order.
            program = None if other else tape.program(output, write, rewrites=not (in_parts or automatic))
            if tape.problem:
                refused.add(key)
                tell = logger.warning if unasked is None else logger.info
                tell("[ModelParallel] jit_compile=%r does nothing for %s: %s", asked or "auto", what, tape.problem)
            elif program is not None:
                programs[key] = program
        calls.append(tape.steps)
        if key in programs or key in refused:
            calls.clear()
        return output

    return call


def _is_special() -> bool:
    """Whether a call is made for something else than its values here and now: for shapes, a tape, a recomputation."""
    in_backward = torch._C._current_graph_task_id() != -1
    transformed = torch._C._functorch.maybe_current_level() is not None  # by torch.func
    return leaves_no_trace() or in_backward or transformed or running.run is not run_at_once


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf"


def _sort_of_call(leaves: Sequence[Any], tensors: Sequence[torch.Tensor], structure: Any) -> Hashable | None:
    """Return what calls with the same program have in common; None for arguments of which nothing is known.

    Args:
        leaves: the arguments, flattened.
        tensors: those of them that are tensors, each once.
        structure: how the leaves are nested.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    parts: list[Hashable] = []
    for leaf in leaves:
        if type(leaf) is torch.Tensor and not hasattr(leaf, "_keras_mask"):
            form = leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
            parts.append((places[id(leaf)], form))
        elif type(leaf) in PLAIN_ARGUMENTS:
            parts.append((type(leaf), leaf))
        else:
            return None
    scope = get_autocast_scope()
    modes = (
        running.keeping is not None,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch.get_default_dtype(),
        keras.config.floatx(),
        keras.config.is_flash_attention_enabled(),
    )
    return structure, tuple(parts), None if scope is None else scope.dtype, modes, _call_context()


def _call_context() -> Hashable:
    """Return what layers are told by the calls around them, such as whether these are calls in training."""
    context = global_state.get_global_attribute("current_call_ctx")
    told = {} if context is None else {name: each for name, each in vars(context).items() if name != "entry_layer"}
    return tuple(sorted((name, repr(each)) for name, each in told.items()))
