"""Models, layouts and inputs as the command line names them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tp_planner.cli.app import mistake
from tp_planner.ir.errors import in_one_line

if TYPE_CHECKING:
    import keras

    from tp_planner.frontend.training_loss import TrainingLoss
    from tp_planner.ir.hardware import Hardware
    from tp_planner.ir.layout import DeviceType, Layout

_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_FORMS = "give the path of a .keras file, or package.module:factory"


class Job(NamedTuple):
    """What a layout is planned for."""

    model: keras.Model
    inputs: Any
    optimizer: keras.optimizers.Optimizer | None
    loss: TrainingLoss | None


def load_job(
    text: str,
    inputs: Sequence[str] | None,
    batch: int | None,
    sequence: int | None,
    optimizer: str | None,
    loss: str | None,
) -> Job:
    """Return the model, what to trace it with, and the update and the loss of its step.

    Args:
        text: names the model.
        inputs: as ``--input`` names them; by default the model's own, with a batch and a length of these sizes.
        batch: that size, where there are no ``inputs``.
        sequence: the same, of open lengths.
        optimizer: the name of one of Keras's; by default the one that the model is compiled with.
        loss: the same.
    """
    from tp_planner.frontend.training_loss import TrainingLoss

    updating = _optimizer(optimizer)
    if loss is not None:
        TrainingLoss(loss)  # so that a name that is none of a loss is told before the model is read
    model, specs = load_model_and_inputs(text, inputs, batch, sequence)
    return Job(model, specs, updating or getattr(model, "optimizer", None), TrainingLoss.of(model, loss))


def load_model_and_inputs(
    text: str, inputs: Sequence[str] | None, batch: int | None, sequence: int | None = None
) -> tuple[keras.Model, Any]:
    """Return the model, and what to trace it with: the given inputs, or its own with these sizes of open dims."""
    require_one_way(inputs, batch, sequence)
    specs = read_inputs(inputs or ())
    model = load_model(text)
    if batch is None and sequence is None:
        return model, specs
    from tp_planner.frontend.inputs import sized_inputs

    return model, sized_inputs(model, batch, sequence)


def require_one_way(inputs: Sequence[str] | None, batch: Any, sequence: Any) -> None:
    """Raise PlanError if sizes are given as well as inputs."""
    if inputs and batch is not None:
        raise mistake("--batch and --input exclude each other; give the batch as the first size of each --input")
    if inputs and sequence is not None:
        raise mistake("--sequence and --input exclude each other; give the length as a size of each --input")


def _optimizer(name: str | None) -> keras.optimizers.Optimizer | None:
    """Return the Keras optimizer of this name, with its default settings."""
    import keras

    if name is None:
        return None
    try:
        return keras.optimizers.get(name)
    except ValueError:
        raise mistake(f"optimizer {name!r} is none of Keras's; write for example adamw, sgd or lion") from None


def load_hardware(text: str | None) -> Hardware | None:
    """Return the profile in a file, or the one of this name."""
    from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file

    return None if text is None else read_hardware_file(find_hardware_file(text))


def load_layout(
    layout: str,
    mesh: str,
    sequence_parallel: bool = False,
    devices: DeviceType | None = None,
    zero: int | None = None,
) -> Layout:
    """Return the layout in a file, or of a preset, on a mesh of such devices, sequence-parallel if either says so.

    With ``zero`` it is of that stage, and of the one that it says itself without.
    """
    from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
    from tp_planner.frontend.layout_map import read_zero
    from tp_planner.ir.mesh import parse_mesh

    read = read_layout_file(find_layout_file(layout)).on(parse_mesh(mesh))
    stage = read.zero if zero is None else read_zero(zero)
    streams = read.sequence_parallel or sequence_parallel
    return replace(read, sequence_parallel=streams, devices=devices, zero=stage)


def load_device(name: str | None) -> DeviceType | None:
    """Return the devices that ``--device`` names."""
    match name:
        case "cpu" | "cuda" | None:
            return name
    raise mistake(f"--device is {name!r}; it is cpu or cuda")


def read_inputs(texts: Sequence[str]) -> Any:
    """Return the specs that ``--input`` names, nested as a model takes them: one, several, or by name."""
    named = [_read_input(text) for text in texts]
    names = [name for name, _ in named]
    specs = [spec for _, spec in named]
    if any(names):
        if not all(names) or len(set(names)) < len(names):
            raise mistake(f"inputs {', '.join(map(repr, texts))}: give each of them a name of its own, or none a name")
        return dict(zip(names, specs, strict=True))
    return (specs[0] if len(specs) == 1 else specs) if specs else None


def _read_input(text: str) -> tuple[str | None, keras.InputSpec]:
    import keras

    match = _INPUT.fullmatch(text)
    if match is None:
        raise mistake(f"input {text!r} is not of the form [name=]size[xsize...][:dtype], e.g. 2x128:int32")
    try:
        dtype = keras.backend.standardize_dtype(match["dtype"])  # floatx where there is none
    except ValueError:
        raise mistake(f"input {text!r}: {match['dtype']!r} is no dtype; write for example int32 or float32") from None
    return match["name"], keras.InputSpec(shape=tuple(map(int, match["shape"].split("x"))), dtype=dtype)


def load_model(text: str) -> keras.Model:
    """Return the model on the meta device, where variables have shapes and no memory."""
    if text.endswith(".keras"):
        return _model_of_file(text)
    if ":" in text:
        return _model_of_factory(text)
    raise mistake(f"model {text!r} is neither; {_FORMS}")


def _model_of_file(text: str) -> Any:
    """Return the architecture in a .keras file, compiled as it was; its weights stay in the file."""
    import keras

    from tp_planner.frontend.valueless import without_values

    try:
        with zipfile.ZipFile(text) as archive:
            config = json.loads(archive.read("config.json"))
    except FileNotFoundError:
        raise mistake(f"{text}: no such file; {_FORMS}") from None
    except (OSError, zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise mistake(f"{text}: not a Keras model file ({_said(error)}); write one with model.save") from None
    settings = config.pop("compile_config", None)
    try:
        with without_values():
            model = keras.saving.deserialize_keras_object(config)
        if settings:
            _compile(model, settings)
        return model
    except Exception as error:  # layers of the file may raise anything
        raise mistake(
            f"{text}: the model cannot be built ({_said(error)}); "
            f"if it has classes of your own, name their module: tp-planner --import MODULE plan ..."
        ) from None


def _compile(model: Any, settings: Mapping[str, Any]) -> None:
    """Compile the model with what a file says of its optimizer and, where that is known here, its loss."""
    import keras

    read = keras.saving.deserialize_keras_object
    optimizer = read(settings.get("optimizer"))
    try:
        loss, weights = read(settings.get("loss")), read(settings.get("loss_weights"))
    except (TypeError, ValueError):  # a function of the user's own, which plans do without wherever it is
        loss = weights = None
    model.compile(optimizer=optimizer, loss=loss, loss_weights=weights)


def _model_of_factory(text: str) -> Any:
    import keras

    from tp_planner.frontend.valueless import without_values

    module_name, _, name = text.partition(":")
    factory = _factory(imported(module_name), name)
    try:
        with without_values():
            model = factory()
    except (Exception, SystemExit) as error:  # it is the user's code
        raise mistake(f"{text} raised {_said(error)}; it is called without arguments and returns a model") from None
    if not isinstance(model, keras.Model):
        raise mistake(f"{text} returned {type(model).__name__}; it has to return a built keras.Model")
    return model


def imported(name: str) -> Any:
    """Return the module of this name, from here or from the Python path."""
    with _importing_from_here():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                raise mistake(
                    f"there is no module {error.name!r}, here or on the Python path; run in the folder that has it"
                ) from None
            raise mistake(f"module {name!r} cannot be imported: {_said(error)}") from None
        except (Exception, SystemExit) as error:  # it is the user's code
            raise mistake(f"module {name!r} cannot be imported: {_said(error)}") from None


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _factory(module: Any, name: str) -> Any:
    factory = getattr(module, name, None)
    if callable(factory):
        return factory
    if factory is not None:
        raise mistake(f"{module.__name__}:{name} is no callable but {type(factory).__name__}; name a function")
    names = [each for each, value in vars(module).items() if callable(value)]
    close = get_close_matches(name, names, n=1)
    raise mistake(f"module {module.__name__!r} has no {name!r}" + (f"; closest: {close[0]!r}" if close else ""))


def _said(error: BaseException) -> str:
    """Return the error in one line, with the last place in the user's own files where there is one."""
    places = [
        f" ({Path(frame.filename).relative_to(Path.cwd())}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_users_own(Path(frame.filename))
    ]
    return f"{in_one_line(error)}{places[-1] if places else ''}"


def _is_users_own(path: Path) -> bool:
    inside = path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts
    return inside and not path.is_relative_to(Path(__file__).parent)
