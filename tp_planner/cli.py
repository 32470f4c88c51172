"""The command line: plan a model from a file or a factory, without devices and without its weights.

Keras and torch are imported inside the commands: ``--help`` stays quick, and Keras's backend can still be chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tp_planner.ir.errors import in_one_line

if TYPE_CHECKING:
    import keras

    from tp_planner.ir.plan import Plan

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_FORMS = "give the path of a .keras file, or package.module:factory"


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from tp_planner import __version__

        typer.echo(f"tp-planner {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Plan tensor parallelism for Keras models on PyTorch."""


@app.command("plan")
def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A .keras file, or package.module:factory, a callable without arguments that returns a built model.",
        ),
    ],
    layout: Annotated[
        str, typer.Option(metavar="FILE_OR_PRESET", help="A layout file, or a preset: encoder, gpt, llama, mlp, vit.")
    ],
    mesh: Annotated[str, typer.Option(metavar="AXIS=SIZE[,...]", help="The device mesh, e.g. model=8.")],
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SHAPE[:DTYPE]",
            help="An input to plan for, e.g. 2x128:int32; once for each input of a model that does not know its own.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the plan as JSON instead of as tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as JSON to FILE, too.")] = None,
) -> None:
    """Show how MODEL would be sharded: every layer, variable and collective, with the reasons.

    Needs no devices, starts no processes and allocates no weights.
    """
    with _mistakes_reported():
        _choose_backend()
        with contextlib.redirect_stdout(sys.stderr):  # a factory may print; the plan has stdout to itself
            plan = _make_plan(model, layout, mesh, input or [])
        if output is not None:
            _write(output, plan.to_json())
    if as_json:
        typer.echo(plan.to_json(), nl=False)
    else:
        _print_report(plan)


def _choose_backend() -> None:
    backend = os.environ.setdefault("KERAS_BACKEND", "torch")
    if backend != "torch":
        raise _mistake(f"KERAS_BACKEND is {backend!r}, plans are for PyTorch; unset it or set it to 'torch'")


def _make_plan(model: str, layout: str, mesh: str, inputs: Sequence[str]) -> Plan:
    from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
    from tp_planner.ir.mesh import parse_mesh
    from tp_planner.planner import make_plan

    rules = read_layout_file(find_layout_file(layout)).on(parse_mesh(mesh))
    specs = _read_inputs(inputs)
    return make_plan(_load_model(model), rules, specs)


@contextlib.contextmanager
def _mistakes_reported() -> Iterator[None]:
    """Turn what the user has to mend into a message on stderr and exit code 2."""
    from tp_planner.ir.errors import TpPlannerError

    try:
        yield
    except TpPlannerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _print_report(plan: Plan) -> None:
    from rich.console import Console

    from tp_planner.report.terminal import plan_to_renderable
    from tp_planner.report.text import plan_to_text

    console = Console()
    if console.is_terminal:
        console.print(plan_to_renderable(plan))
    else:
        typer.echo(plan_to_text(plan), nl=False)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _mistake(f"{path}: cannot be written ({error.strerror}); give --output another path") from None


def _mistake(message: str) -> Exception:
    from tp_planner.ir.errors import PlanError

    return PlanError(message)


def _read_inputs(texts: Sequence[str]) -> Any:
    """Return the specs that ``--input`` names, nested as a model takes them: one, several, or by name."""
    named = [_read_input(text) for text in texts]
    names = [name for name, _ in named]
    specs = [spec for _, spec in named]
    if any(names):
        if not all(names) or len(set(names)) < len(names):
            raise _mistake(f"inputs {', '.join(map(repr, texts))}: give each of them a name of its own, or none a name")
        return dict(zip(names, specs, strict=True))
    return (specs[0] if len(specs) == 1 else specs) if specs else None


def _read_input(text: str) -> tuple[str | None, keras.InputSpec]:
    import keras

    match = _INPUT.fullmatch(text)
    if match is None:
        raise _mistake(f"input {text!r} is not of the form [name=]size[xsize...][:dtype], e.g. 2x128:int32")
    try:
        dtype = keras.backend.standardize_dtype(match["dtype"])  # floatx where there is none
    except ValueError:
        raise _mistake(f"input {text!r}: {match['dtype']!r} is no dtype; write for example int32 or float32") from None
    return match["name"], keras.InputSpec(shape=tuple(map(int, match["shape"].split("x"))), dtype=dtype)


def _load_model(text: str) -> keras.Model:
    """Return the model on the meta device, where variables have shapes and no memory."""
    import keras

    if text.endswith(".keras"):
        load = _model_of_file
    elif ":" in text:
        load = _model_of_factory
    else:
        raise _mistake(f"model {text!r} is neither; {_FORMS}")
    with keras.device("meta"):
        return load(text)


def _model_of_file(text: str) -> Any:
    """Return the architecture in a .keras file; its weights stay in the file."""
    import keras

    try:
        with zipfile.ZipFile(text) as archive:
            config = json.loads(archive.read("config.json"))
    except FileNotFoundError:
        raise _mistake(f"{text}: no such file; {_FORMS}") from None
    except (OSError, zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise _mistake(f"{text}: not a Keras model file ({_said(error)}); write one with model.save") from None
    config.pop("compile_config", None)  # optimizer and loss do not matter to the plan
    try:
        return keras.saving.deserialize_keras_object(config)
    except Exception as error:  # layers of the file may raise anything
        raise _mistake(
            f"{text}: the model cannot be built ({_said(error)}); "
            f"if it has classes of your own, give package.module:factory instead"
        ) from None


def _model_of_factory(text: str) -> Any:
    import keras

    module_name, _, name = text.partition(":")
    factory = _factory(_imported(module_name), name)
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # it is the user's code
        raise _mistake(f"{text} raised {_said(error)}; it is called without arguments and returns a model") from None
    if not isinstance(model, keras.Model):
        raise _mistake(f"{text} returned {type(model).__name__}; it has to return a built keras.Model")
    return model


def _imported(name: str) -> Any:
    with _importing_from_here():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                raise _mistake(
                    f"there is no module {error.name!r}, here or on the Python path; run in the folder that has it"
                ) from None
            raise _mistake(f"module {name!r} cannot be imported: {_said(error)}") from None
        except (Exception, SystemExit) as error:  # it is the user's code
            raise _mistake(f"module {name!r} cannot be imported: {_said(error)}") from None


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
        raise _mistake(f"{module.__name__}:{name} is no callable but {type(factory).__name__}; name a function")
    names = [each for each, value in vars(module).items() if callable(value)]
    close = get_close_matches(name, names, n=1)
    raise _mistake(f"module {module.__name__!r} has no {name!r}" + (f"; closest: {close[0]!r}" if close else ""))


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


if __name__ == "__main__":
    main()
