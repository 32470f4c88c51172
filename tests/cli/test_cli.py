"""The command line and the reports it shows."""

from __future__ import annotations

import html
import importlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests import models
from tp_planner import __version__
from tp_planner.cli import app
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh, parse_mesh
from tp_planner.ir.names import fold_names, without_numbers_of
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.report.rows import layer_rows
from tp_planner.report.terminal import plan_to_renderable

ROOT = Path(__file__).resolve().parents[2]

FACTORIES = """
import keras

def pair(width=8):
    print("building")
    x = keras.Input((4,), name="features")
    y = keras.layers.Dense(width, activation="relu", name="up")(x)
    return keras.Model(x, keras.layers.Dense(4, name="down")(y), name="pair")

def compiled():
    model = pair()
    model.compile("adam", "mean_squared_error")
    return model

class Scale(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), name="scale")

    def call(self, x):
        return x * self.scale

def tower():
    x = y = keras.Input((4,))
    for number in range(3):
        y = keras.layers.Dense(4, name=f"block_{number}_up")(y)
    y = keras.layers.Dense(2, name="head")(y)
    return keras.Model(x, Scale(name="last")(y), name="tower")

def large():
    return pair(2**32)

class Own(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.up = keras.layers.Dense(8, name="up")
        self.down = keras.layers.Dense(4, name="down")

    def call(self, x):
        return self.down(self.up(x))

def own():
    model = Own()
    model.up.build((None, 4))
    model.down.build((None, 8))
    model.built = True
    return model

def unbuilt():
    return keras.Sequential([keras.layers.Dense(4)], name="unbuilt")

def broken():
    raise ValueError("out of\\nluck")

def nothing():
    pass

def takes(width):
    return pair(width)

size = 3
"""

PRESETS = ", ".join(sorted(path.stem for path in (ROOT / "plans" / "presets").glob("*.toml")))
PAIR = """\
Plan for 'pair' on mesh (model=2): layers are split over 'model', 2 ranks
traced with inputs 2x4 float32
R: whole on every rank; S(d): sharded on dim d; P: a summand on every rank

  layer  style   variable  shape  stored  per rank  boundaries
  up     column  kernel    4x8    S(1)    4x4       out S(1)
                 bias      8      S(0)    4
  down   row     kernel    8x4    S(0)    4x4       in S(1)
                 bias      4      R       4         out P->R, then bias

variables: 4, 3 of them sharded
bytes of variables: 304 in the model, 160 on rank 0

collectives of one training step: 1 (1 all_reduce)
  times  phase    collective  layer  where   bytes each  sent each
  1      forward  all_reduce  down   output  32          32

memory of rank 0 in one training step, no optimizer named, no loss of Keras named: 392 B at the peak, backward
  at the peak: parameters 160 B, gradients 160 B, optimizer 0 B, activations 36 B, temporaries 36 B
  each at its own largest: parameters 160 B, gradients 160 B, optimizer 0 B, activations 68 B, temporaries 96 B
  GUESSED SIZES: batch 2 (dim 0 of features)
  memory and time are for these: plan with the sizes you train with (inputs=; --batch, --sequence or --input)

why layers are computed so
  column: an output dim of the weight is sharded
      up
  row: a contracted dim of the weight is sharded
      down

why variables are stored so
  S(1): rule '(.*[/_])?(up|gate|fc1)/kernel' -> (None, model)
      up/kernel
  S(0): rule '(.*[/_])?(up|gate|fc1)/bias' -> (model)
      up/bias
  S(0): rule '(.*[/_])?(down|fc2)/kernel' -> (model, None)
      down/kernel
  R: no layout rule names it
      down/bias
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of factories; the command line runs there."""
    (tmp_path / "shop.py").write_text(FACTORIES)
    (tmp_path / "late.py").write_text("import keras\n\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name in ("shop", "late"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of the command line."""
    result = CliRunner().invoke(app, arguments, env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def plan_of(model: keras.Model, preset: str, parts: int = 2) -> Plan:
    return make_plan(model, read_layout_file(find_layout_file(preset)).on(Mesh((("model", parts),))))


def plan_of_case(name: str, **sizes: int) -> Plan:
    case = models.CASES[name]
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in case.rules.items())
    return make_plan(case.build(**sizes), Layout(parse_mesh("model=2"), rules))


# Plans


def test_plan_is_shown_as_text(shop: Path) -> None:
    """Outside a terminal the report is plain text, whole and alone on stdout; what a factory prints goes to stderr."""
    code, stdout, stderr = run("plan", "shop:pair", "--layout", "mlp", "--mesh", "model=2")
    assert stdout == PAIR
    assert (code, stderr) == (0, "building\n")


@pytest.mark.parametrize("name", ["mlp", "gpt", "encoder", "vit", "llama"])
def test_json_is_the_plan_of_the_model_on_a_device(name: str) -> None:
    """A model built on the meta device has the same plan as one with weights, byte for byte."""
    code, stdout, _ = run("plan", f"tests.models:{name}", "--layout", name, "--mesh", "model=2", "--json")
    assert code == 0
    assert stdout == plan_of(models.CASES[name].build(), name).to_json()


def test_model_file_is_planned_without_its_weights(tmp_path: Path) -> None:
    """A .keras file has the plan of the model that was saved, even where its weights are gone."""
    model, path, stripped = models.gpt(), tmp_path / "gpt.keras", tmp_path / "stripped.keras"
    model.save(path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(stripped, "w") as part:
        part.writestr("config.json", whole.read("config.json"))
    for file in (path, stripped):
        keras.utils.clear_session()  # numbers the names of MultiHeadAttention's own layers as in a new process
        code, stdout, _ = run("plan", str(file), "--layout", "gpt", "--mesh", "model=4", "--json")
        assert code == 0
        assert stdout == plan_of(model, "gpt", 4).to_json()


def test_output_is_a_file_that_reads_back(shop: Path) -> None:
    """--output writes the plan as JSON, beside the report on stdout."""
    layout = str(find_layout_file("mlp"))
    code, stdout, _ = run("plan", "shop:pair", "--layout", layout, "--mesh", "model=2", "--output", "plan.json")
    text = (shop / "plan.json").read_text()
    assert (code, stdout) == (0, PAIR)
    assert Plan.from_json(text).to_json() == text
    assert str(Plan.from_json(text)) == PAIR


@pytest.mark.parametrize(
    ("model", "inputs", "traced"),
    [
        ("shop:pair", [], "2x4 float32"),
        ("shop:pair", ["7x4"], "7x4 float32"),
        ("shop:own", ["5x3x4:float32"], "5x3x4 float32"),
        ("tests.models:encoder", ["tokens=1x16:int32", "padding_mask=1x16:bool"], "1x16 bool, 1x16 int32"),
    ],
)
def test_inputs_are_those_of_the_model_or_given(shop: Path, model: str, inputs: list[str], traced: str) -> None:
    """A model is traced with its own inputs; --input gives others, or those of a model that knows none."""
    options = [part for text in inputs for part in ("--input", text)]
    code, stdout, _ = run("plan", model, "--layout", "gpt", "--mesh", "model=2", *options)
    assert code == 0
    assert stdout.splitlines()[1] == f"traced with inputs {traced}"


# Mistakes

FORMS = "give the path of a .keras file, or package.module:factory"
CALLED = "it is called without arguments and returns a model"

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no device": (["shop.keras", "--device", "gpu"], "--device is 'gpu'; it is cpu or cuda"),
    "no model": (["shop.py"], f"model 'shop.py' is neither; {FORMS}"),
    "no file": (["gone.keras"], f"gone.keras: no such file; {FORMS}"),
    "no model file": (
        ["text.keras"],
        "text.keras: not a Keras model file (BadZipFile: File is not a zip file); write one with model.save",
    ),
    "no config in the file": (
        ["empty.keras"],
        "empty.keras: not a Keras model file (KeyError: \"There is no item named 'config.json' in the archive\"); "
        "write one with model.save",
    ),
    "no module": (
        ["shops:pair"],
        "there is no module 'shops', here or on the Python path; run in the folder that has it",
    ),
    "module that fails": (
        ["late:pair"],
        "module 'late' cannot be imported: ZeroDivisionError: division by zero (late.py, line 3)",
    ),
    "no factory": (["shop:pear"], "module 'shop' has no 'pear'; closest: 'pair'"),
    "factory that is none": (["shop:size"], "shop:size is no callable but int; name a function"),
    "factory that fails": (["shop:broken"], f"shop:broken raised ValueError: out of luck (shop.py, line 52); {CALLED}"),
    "factory with arguments": (
        ["shop:takes"],
        f"shop:takes raised TypeError: takes() missing 1 required positional argument: 'width'; {CALLED}",
    ),
    "factory without a model": (
        ["shop:nothing"],
        "shop:nothing returned NoneType; it has to return a built keras.Model",
    ),
    "model that is not built": (
        ["shop:unbuilt"],
        "model 'unbuilt' is not built, so it has no variables to plan; "
        "call it once on data or call model.build(input_shape)",
    ),
    "inputs not known": (
        ["shop:own"],
        "the inputs of subclassed model 'own' are not known; "
        "pass plan(..., inputs=) with an example batch or keras.InputSpec",
    ),
    "input": (
        ["shop:own", "--input", "2 by 4"],
        "input '2 by 4' is not of the form [name=]size[xsize...][:dtype], e.g. 2x128:int32",
    ),
    "dtype": (
        ["shop:own", "--input", "2x4:int3"],
        "input '2x4:int3': 'int3' is no dtype; write for example int32 or float32",
    ),
    "input names": (
        ["shop:own", "--input", "x=2x4", "--input", "2x4"],
        "inputs 'x=2x4', '2x4': give each of them a name of its own, or none a name",
    ),
    "layout": (
        ["shop:pair", "--layout", "mpl"],
        f"'mpl' is neither a file nor a preset; closest preset: 'mlp'; presets: {PRESETS}",
    ),
    "layout that matches nothing": (
        ["shop:pair", "--layout", "other.toml"],
        "layout rule 'left/kernel' matches no variable; closest: 'up/kernel'",
    ),
    "layout with problems": (
        ["shop:pair", "--layout", "wrong.toml"],
        "2 problems:\n"
        "  - layout rule 'up/kernel' -> (None, heads) names mesh axis 'heads', the mesh has 'model'; "
        "use one of these or None\n"
        "  - layout rule 'down/kernel' -> (heads, None) names mesh axis 'heads', the mesh has 'model'; "
        "use one of these or None",
    ),
    "mesh": (
        ["shop:pair", "--mesh", "eight"],
        "mesh 'eight' is not of the form axis=size[,axis=size...], e.g. batch=1,model=8",
    ),
    "mesh that is too large": (
        ["shop:pair", "--mesh", "model=1000000"],
        "mesh (model=1000000) has 1000000 devices; plans are for 65536 at most",
    ),
    "output": (
        ["shop:pair", "--output", "gone/plan.json"],
        "gone/plan.json: cannot be written (No such file or directory); give --output another path",
    ),
}

WRONG_LAYOUT = """
[[rules]]
pattern = "up/kernel"
axes = ["", "heads"]
[[rules]]
pattern = "down/kernel"
axes = ["heads", ""]
"""


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_reported(shop: Path, arguments: list[str], message: str) -> None:
    """A mistake of the user ends with one message on stderr and exit code 2, and nothing on stdout."""
    (shop / "text.keras").write_text("no zip")
    with zipfile.ZipFile(shop / "empty.keras", "w"):
        pass
    (shop / "other.toml").write_text('[[rules]]\npattern = "left/kernel"\naxes = ["", "model"]\n')
    (shop / "wrong.toml").write_text(WRONG_LAYOUT)
    defaults = ["--layout", "mlp"] if "--layout" not in arguments else []
    defaults += ["--mesh", "model=2"] if "--mesh" not in arguments else []
    code, stdout, stderr = run("plan", *arguments, *defaults)
    assert stderr.removeprefix("building\n") == f"error: {message}\n"
    assert (code, stdout) == (2, "")


def test_file_with_unknown_classes_names_the_way_out(tmp_path: Path) -> None:
    """A .keras file with classes that nothing has imported is refused with what to do instead."""
    path = tmp_path / "own.keras"
    config = '{"module": "nowhere.else", "class_name": "Own", "config": {}, "registered_name": "Own"}'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
    code, _, stderr = run("plan", str(path), "--layout", "mlp", "--mesh", "model=2")
    assert code == 2
    assert stderr.startswith(f"error: {path}: the model cannot be built (")
    advice = "if it has classes of your own, name their module: tp-planner --import MODULE plan ..."
    assert stderr.endswith(f"); {advice}\n")


def test_modules_are_imported_for_the_classes_of_a_file(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with classes of one's own is read once their module is imported, which registers them."""
    text = """
import keras
@keras.saving.register_keras_serializable("own")
class Twice(keras.layers.Layer):
    def call(self, x):
        return x + x
"""
    (shop / "twice.py").write_text(text)
    monkeypatch.syspath_prepend(shop)
    x = keras.Input((4,))
    own = keras.Model(x, keras.layers.Dense(4, name="up")(importlib.import_module("twice").Twice()(x)))
    own.save("own.keras")

    def forget() -> None:
        del sys.modules["twice"], keras.saving.get_custom_objects()["own>Twice"]

    forget()
    assert run("--import", "twice", "paths", "own.keras") == (0, "up/kernel  4x4\nup/bias    4\n", "")
    forget()


def test_paths_are_what_rules_can_name(shop: Path) -> None:
    """They are listed without a layout: in text equal ones of many blocks at once, in JSON each."""
    code, stdout, _ = run("paths", "shop:tower")
    assert (code, stdout.splitlines()) == (
        0,
        [
            "block_[0-2]_up/kernel  4x4",
            "block_[0-2]_up/bias    4",
            "head/kernel            4x2",
            "head/bias              2",
            "last/scale             scalar",
        ],
    )
    code, stdout, _ = run("paths", "shop:pair", "--json")
    paths = {"up/kernel": [4, 8], "up/bias": [8], "down/kernel": [8, 4], "down/bias": [4]}
    assert (code, json.loads(stdout)) == (0, paths)


def compiled_pair() -> keras.Model:
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(4, name="down")(keras.layers.Dense(8, name="up")(x)))
    model.compile("adam", "mean_squared_error")
    return model


def distance(truth: Any, found: Any) -> Any:
    return keras.ops.mean(truth - found)


@pytest.mark.parametrize("source", ["file", "factory"])
def test_step_is_that_of_a_compiled_model(shop: Path, source: str) -> None:
    """The plan of a compiled model has its optimizer and loss, from a file too, unless others are named."""
    model = "shop:compiled"
    if source == "file":
        compiled_pair().save("compiled.keras")
        model = "compiled.keras"
    layout = ["--layout", "mlp", "--mesh", "model=2"]
    step = json.loads(run("plan", model, *layout, "--json")[1])["step"]
    assert (step["optimizer"], step["loss"]) == ("Adam", "mean_squared_error")
    named = json.loads(run("plan", model, *layout, "--json", "--optimizer", "sgd", "--loss", "mae")[1])["step"]
    assert (named["optimizer"], named["loss"]) == ("SGD", "mean_absolute_error")


def test_file_compiled_with_a_loss_of_its_own_is_planned_without(shop: Path) -> None:
    """A loss that no module here has is left out, as one of a model at hand is."""
    model = compiled_pair()
    model.compile("adam", distance)
    model.save("compiled.keras")
    step = json.loads(run("plan", "compiled.keras", "--layout", "mlp", "--mesh", "model=2", "--json")[1])["step"]
    assert (step["optimizer"], step["loss"]) == ("Adam", "")


def test_estimate_is_on_the_page(shop: Path) -> None:
    """The page has the estimate that the text ends with."""
    layout = ["--layout", "mlp", "--mesh", "model=2", "--optimizer", "adam"]
    code, stdout, _ = run("plan", "shop:pair", *layout, "--hardware", "h100", "--html", "page.html")
    assert code == 0
    estimate = stdout[stdout.index("estimated, not measured") :].rstrip()
    assert html.escape(estimate) in (shop / "page.html").read_text("utf-8")


def test_other_backends_are_refused(shop: Path) -> None:
    """Keras has to run on torch."""
    arguments = ("plan", "shop:pair", "--layout", "mlp", "--mesh", "model=2")
    code, _, stderr = run(*arguments, env={"KERAS_BACKEND": "jax"})
    assert code == 2
    assert stderr == "error: KERAS_BACKEND is 'jax', plans are for PyTorch; unset it or set it to 'torch'\n"


def test_version_is_shown() -> None:
    """--version names the package's version."""
    assert run("--version") == (0, f"tp-planner {__version__}\n", "")


# A process of its own


def in_process(code: str, folder: Path) -> str:
    """Return what Python prints that runs ``code`` in ``folder``, with no backend chosen for Keras."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_process_plans_what_no_machine_holds(shop: Path) -> None:
    """The command chooses Keras's backend itself, and plans 128 GiB of weights in less than 2 GiB of memory."""
    code = """if True:
        import resource, sys
        from tp_planner.cli import main
        sys.argv = ["tp-planner", "plan", "shop:large", "--layout", "mlp", "--mesh", "model=8"]
        try:
            main()
        except SystemExit as exit:
            assert not exit.code, exit
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    *report, kibibytes = in_process(code, shop).splitlines()
    assert "bytes of variables: 154618822672 in the model, 19327352848 on rank 0" in report
    assert int(kibibytes) < 2 * 2**20


def test_help_imports_neither_keras_nor_torch(tmp_path: Path) -> None:
    """Help is there at once."""
    code = """if True:
        import sys
        from tp_planner.cli import main
        sys.argv = ["tp-planner", "plan", "--help"]
        try:
            main()
        except SystemExit as exit:
            assert not exit.code, exit
        print(sorted({"keras", "torch", "rich.console"} & set(sys.modules)))
    """
    *shown, imported = in_process(code, tmp_path).splitlines()
    assert "Show how MODEL would be sharded" in "\n".join(shown)
    assert imported == "[]"


# Reports


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], []),
        (["up", "down", "up"], ["up", "down"]),
        (["block_0/up", "block_0/down", "block_1/up", "block_1/down"], ["block_[0-1]/up", "block_[0-1]/down"]),
        (["a3", "a1", "a2", "b", "a5"], ["a[1-3,5]", "b"]),
        (["dense", "dense_1", "dense_2"], ["dense", "dense_[1-2]"]),
        (["s0/b0", "s0/b1", "s1/b0", "s1/b1"], ["s[0-1]/b[0-1]"]),
        (["s0/b0", "s0/b1", "s1/b1"], ["s0/b0", "s[0-1]/b1"]),
        (["run007", "run008"], ["run007", "run008"]),
    ],
)
def test_names_are_folded(names: list[str], folded: list[str]) -> None:
    """Names that differ in numbers only are one, which stands for exactly these."""
    found = fold_names(names)
    assert [str(name) for name in found] == folded
    assert sorted(member for name in found for member in name.members) == sorted(set(names))


def test_reasons_lose_the_numbers_of_their_layer_only() -> None:
    """What is no numbered word of the layer's name stays."""
    reason = "'block_1/up' of shape (1, 3) is not 'block_12' and not 'up1'"
    assert without_numbers_of("block_1/up", reason) == "'block_*/up' of shape (1, 3) is not 'block_12' and not 'up1'"


@pytest.mark.parametrize(
    ("case", "sizes"), [("gpt", {"blocks": 1}), ("vit", {"blocks": 1}), ("tied", {}), ("subclassed", {"blocks": 1})]
)
def test_every_variable_is_in_one_row(case: str, sizes: dict[str, int]) -> None:
    """No variable is missing from the table of layers, and none is in it twice."""
    plan = plan_of_case(case, **sizes)
    shown = [variable[0] for row in layer_rows(plan) for variable in row.variables]
    assert sorted(shown) == sorted(variable.key.rpartition("/")[2] for variable in plan.variables)


def test_variables_of_layers_that_are_never_called_are_shown() -> None:
    """Dropout layers keep a seed beside the model; it has a row too."""
    plan = plan_of(models.gpt(blocks=1, dropout=0.1), "gpt")
    seeds = [row for row in layer_rows(plan) if any(cells[0] == "seed_generator_state" for cells in row.variables)]
    assert sum(len(row.variables) for row in seeds) == 3


def test_equal_blocks_are_one_row() -> None:
    """The report of a model does not grow with its number of equal blocks."""
    few, many = (str(plan_of_case("gpt", blocks=blocks)).splitlines() for blocks in (2, 5))
    assert len(few) == len(many)
    query = next(line for line in many if line.strip().startswith("block_[0-4]_attention/query "))
    assert " ".join(query.split()) == "block_[0-4]_attention/query column kernel 32x4x8 S(1) 32x2x8 in R, grad P->R"
    assert "  5      backward  all_reduce  block_[0-4]_attention/query             input   4096        4096" in many


def test_reasons_of_equal_blocks_are_one() -> None:
    """What closes the same region in every block is said once, without the blocks' numbers."""
    lines = str(plan_of(models.llama(), "llama", 4)).splitlines()
    start = lines.index("why layers are computed so")
    reasons = "\n".join(lines[start : lines.index("why variables are stored so")])
    assert reasons.count("works on each batch entry and head alone") == 1
    assert "'llama_backbone/transformer_layer_*/self_attention'" in reasons
    assert "      llama_backbone/transformer_layer_[0-1]/self_attention/query" in reasons


def test_terminal_shows_what_the_text_says() -> None:
    """In a terminal the report has colours and the same words, brackets of names included."""
    plan, output = plan_of_case("tied"), io.StringIO()
    Console(file=output, width=200, no_color=True).print(plan_to_renderable(plan))
    words = output.getvalue().split()
    assert [word for word in str(plan).split() if word not in words] == []
    assert "[reverse]" in words


def test_terminal_is_recognised(shop: Path) -> None:
    """Colours come where stdout is a terminal."""
    forced = {"FORCE_COLOR": "1", "COLUMNS": "120", "NO_COLOR": ""}
    code, stdout, _ = run("plan", "shop:pair", "--layout", "mlp", "--mesh", "model=2", env=forced)
    assert code == 0
    assert "\x1b[32mcolumn" in stdout
