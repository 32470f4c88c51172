"""Layout files are read whole or refused with every problem in them, and the presets fit their families."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import keras_hub
import pytest

from tests.models import CASES, Axes, Case
from tp_planner.frontend import layout_file
from tp_planner.frontend.layout_file import LayoutFile, find_layout_file, list_presets, read_layout_file
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]
GOOD_RULE = '[[rules]]\npattern = "up/kernel"\naxes = ["", "model"]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(PlanError) as caught:
        call()
    return str(caught.value)


def test_reads_name_description_and_rules_in_order(tmp_path: Path) -> None:
    """An empty string is a dim that is not sharded, a list is a dim sharded over several axes."""
    path = write(
        tmp_path,
        """
        name = "wide"
        description = "an example"
        [[rules]]
        pattern = '.*b\\d/kernel'
        axes = ["", ["batch", "model"], "model"]
        [[rules]]
        pattern = "a/bias"
        axes = ["model"]
        """,
    )

    content = read_layout_file(path)

    assert content == LayoutFile(
        "wide",
        "an example",
        (
            LayoutRule(r".*b\d/kernel", (None, ("batch", "model"), "model")),
            LayoutRule("a/bias", ("model",)),
        ),
    )


def test_reads_the_example_of_the_readme(tmp_path: Path) -> None:
    """What plans/README.md shows as the format is a layout file."""
    readme = ROOT / "plans" / "README.md"
    example = readme.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]

    assert read_layout_file(write(tmp_path, example)).rules == (
        LayoutRule(".*attention/(query|key|value)/kernel", (None, "model", None)),
        LayoutRule("(.*/)?token_embedding/embeddings", (("batch", "model"), None)),
    )


def test_name_defaults_to_that_of_the_file(tmp_path: Path) -> None:
    """Only rules are required."""
    content = read_layout_file(str(write(tmp_path, GOOD_RULE)))

    assert (content.name, content.description) == ("own", "")


def test_layout_of_a_file_on_a_mesh(tmp_path: Path) -> None:
    """The rules are kept as they are; whether they fit the mesh is for the planner to say."""
    mesh = Mesh((("model", 2),))

    layout = read_layout_file(write(tmp_path, GOOD_RULE)).on(mesh)
    shared = read_layout_file(write(tmp_path, "zero = 1\n" + GOOD_RULE)).on(mesh)

    assert layout == Layout(mesh, (LayoutRule("up/kernel", (None, "model")),))
    assert shared == replace(layout, zero=1)


ONE_PROBLEM = {
    "no rules": ('name = "x"', "rules: no rule; add a [[rules]] table with a pattern and axes"),
    "single brackets": (
        '[rules]\npattern = "up/kernel"\naxes = [""]',
        "rules: expected an array of tables, got a table; head each rule with [[rules]], in double brackets",
    ),
    "rule is no table": (
        'rules = ["up/kernel"]',
        'rules[0]: expected a table with a pattern and axes, got "up/kernel"',
    ),
    "misspelt key of the file": (
        "descripton = 'x'\n" + GOOD_RULE,
        "descripton: unknown key; closest: 'description'",
    ),
    "unknown key of the file": (
        "version = 1\n" + GOOD_RULE,
        "version: unknown key; known keys: name, description, sequence_parallel, zero, rules",
    ),
    "misspelt key of a rule": (
        GOOD_RULE + "axis = []",
        "rules[0].axis: unknown key; closest: 'axes'",
    ),
    "unknown key of a rule": (
        GOOD_RULE + "[rules.mesh]\nmodel = 2",
        "rules[0].mesh: unknown key; known keys: pattern, axes",
    ),
    "no stage of ZeRO": ("zero = true\n" + GOOD_RULE, "zero: expected 0, 1 or 3, got true"),
    "name is no string": ("name = true\n" + GOOD_RULE, "name: expected a string, got true"),
    "description is no string": (
        "description = ['x']\n" + GOOD_RULE,
        "description: expected a string, got ['x']",
    ),
    "no pattern": (
        "[[rules]]\naxes = ['']",
        'rules[0].pattern: missing; write for example pattern = ".*up/kernel"',
    ),
    "pattern is no string": (
        "[[rules]]\npattern = 3\naxes = ['']",
        "rules[0].pattern: expected a regular expression for variable paths, got 3",
    ),
    "empty pattern": (
        "[[rules]]\npattern = ''\naxes = ['']",
        'rules[0].pattern: expected a regular expression for variable paths, got ""',
    ),
    "pattern is no regular expression": (
        GOOD_RULE + "[[rules]]\npattern = 'up(/kernel'\naxes = ['']",
        (
            "rules[1].pattern: 'up(/kernel' is not a regular expression: "
            "missing ), unterminated subpattern at position 2; "
            "correct it, or escape the character with a backslash"
        ),
    ),
    "pattern stands there twice": (
        GOOD_RULE + "[[rules]]\npattern = 'x'\naxes = ['']\n" + GOOD_RULE,
        "rules[2].pattern: 'up/kernel' is the pattern of rules[0] too; remove one of them",
    ),
    "no axes": (
        "[[rules]]\npattern = 'x'",
        'rules[0].axes: missing; write one entry per dim, for example axes = ["", "model"]',
    ),
    "axes are no list": (
        "[[rules]]\npattern = 'x'\naxes = 'model'",
        'rules[0].axes: expected a list with an axis name or "" per dim, got "model"',
    ),
    "axis is no string": (
        GOOD_RULE + "[[rules]]\npattern = 'x'\naxes = ['', 3]",
        'rules[1].axes[1]: expected an axis name or "", got 3',
    ),
    "list of axes is empty": (
        "[[rules]]\npattern = 'x'\naxes = [[]]",
        'rules[0].axes[0]: expected axis names, got []; write "" for a dim that is not sharded',
    ),
    "empty name in a list of axes": (
        "[[rules]]\npattern = 'x'\naxes = [['batch', '']]",
        'rules[0].axes[0][1]: expected an axis name, got ""',
    ),
    "not TOML": (
        "name = 'x'\nrules",
        ("not valid TOML: Expected '=' after a key in a key/value pair (at end of document); correct the syntax there"),
    ),
    "a key twice": (
        "name = 'x'\nname = 'y'\n",
        "not valid TOML: Cannot overwrite a value (at line 2, column 11); correct the syntax there",
    ),
}


@pytest.mark.parametrize(("text", "message"), ONE_PROBLEM.values(), ids=ONE_PROBLEM.keys())
def test_a_problem_is_reported_with_its_place_and_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    """The message starts with the file and the path of keys and indices in it."""
    path = write(tmp_path, text)

    assert refusal(lambda: read_layout_file(path)) == f"{path}: {message}"


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    """A file with five mistakes is corrected in one go."""
    path = write(
        tmp_path,
        """
        nme = "x"
        description = 1
        [[rules]]
        pattern = "["
        axes = [1, "model", [""]]
        """,
    )

    assert refusal(lambda: read_layout_file(path)) == (
        "5 problems:"
        f"\n  - {path}: nme: unknown key; closest: 'name'"
        f"\n  - {path}: description: expected a string, got 1"
        f"\n  - {path}: rules[0].pattern: '[' is not a regular expression: "
        "unterminated character set at position 0; correct it, or escape the character with a backslash"
        f'\n  - {path}: rules[0].axes[0]: expected an axis name or "", got 1'
        f'\n  - {path}: rules[0].axes[2][0]: expected an axis name, got ""'
    )


def test_missing_file_names_the_presets(tmp_path: Path) -> None:
    """Reading takes a path; a preset's name is for find_layout_file."""
    path = tmp_path / "none.toml"

    assert refusal(lambda: read_layout_file(path)) == (
        f"{path}: no such file; give the path of a layout file, "
        f"or the name of a preset to find_layout_file ({', '.join(list_presets())})"
    )


def test_folder_is_refused(tmp_path: Path) -> None:
    """A path that cannot be read as a file is an error with the system's reason."""
    assert refusal(lambda: read_layout_file(tmp_path)) == (
        f"{tmp_path}: cannot be read (Is a directory); give a readable TOML file"
    )


def test_other_encoding_is_refused(tmp_path: Path) -> None:
    """TOML is UTF-8."""
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "Gr\xfcn"'.encode("latin-1"))

    assert refusal(lambda: read_layout_file(path)) == (f"{path}: not UTF-8 text at byte 10; save the file as UTF-8")


def test_presets_are_those_of_the_folder() -> None:
    """Presets are found by the names of their files, in order, and their name key says the same."""
    presets = list_presets()

    assert list(presets) == sorted(path.stem for path in (ROOT / "plans" / "presets").iterdir())
    assert {"gpt", "llama", "mlp"} <= set(presets)
    assert [read_layout_file(path).name for path in presets.values()] == list(presets)


def test_preset_is_found_by_name() -> None:
    """The file of the preset is returned."""
    assert find_layout_file("gpt") == list_presets()["gpt"]


def test_file_goes_before_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing path is taken as it is, even where a preset has the same name."""
    monkeypatch.chdir(tmp_path)
    Path("gpt").write_text(GOOD_RULE, encoding="utf-8")

    assert find_layout_file("gpt") == Path("gpt")
    assert find_layout_file(tmp_path / "gpt") == tmp_path / "gpt"


def test_packaged_presets_go_before_those_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has its own presets; a folder that is missing is passed over."""
    packaged, beside = tmp_path / "presets", tmp_path / "plans"
    for folder, names in ((packaged, ("b",)), (beside, ("b", "a"))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.toml").write_text(GOOD_RULE, encoding="utf-8")
    monkeypatch.setattr(layout_file, "_PRESET_FOLDERS", (tmp_path / "missing", packaged, beside))

    assert list_presets() == {"a": beside / "a.toml", "b": packaged / "b.toml"}


PRESETS = ", ".join(list_presets())
UNKNOWN_NAMES = {
    "gtp": f"'gtp' is neither a file nor a preset; closest preset: 'gpt'; presets: {PRESETS}",
    "layouts/lama.toml": (
        f"'layouts/lama.toml' is neither a file nor a preset; closest preset: 'llama'; presets: {PRESETS}"
    ),
    "resnet": f"'resnet' is neither a file nor a preset; presets: {PRESETS}",
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN_NAMES.items())
def test_unknown_name_lists_the_presets(name: str, message: str) -> None:
    """The closest preset is named where one is close."""
    assert refusal(lambda: find_layout_file(name)) == message


def test_installation_without_presets_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to choose from, so the next step is a path."""
    monkeypatch.setattr(layout_file, "_PRESET_FOLDERS", ())

    assert refusal(lambda: find_layout_file("gpt")) == (
        "'gpt' is neither a file nor a preset; no presets are installed: give the path of a layout file"
    )


# Presets and models


def hits(rules: dict[str, Axes], path: str) -> list[Axes]:
    return [axes for pattern, axes in rules.items() if re.fullmatch(pattern, path)]


def preset_rules(name: str) -> dict[str, Axes]:
    return {rule.pattern: rule.axes for rule in read_layout_file(find_layout_file(name)).rules}  # type: ignore[misc]


def assert_fits(rules: dict[str, Axes], model: keras.Model) -> None:
    """Every rule matches a variable, no variable matches two, and each rule has its variables' rank."""
    paths = [variable.path for variable in model.variables]
    unused = [pattern for pattern in rules if not any(re.fullmatch(pattern, path) for path in paths)]
    found = {variable.path: hits(rules, variable.path) for variable in model.variables}
    assert unused == []
    assert {path: axes for path, axes in found.items() if len(axes) > 1} == {}
    for variable in model.variables:
        assert all(len(axes) == len(variable.shape) for axes in found[variable.path]), variable.path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rules_of_the_zoo_fit_its_models(case: Case) -> None:
    """The hand-written layouts, which the presets are compared with, are sound themselves."""
    assert_fits(dict(case.rules), case.build())


@pytest.mark.parametrize("prefix", ["", "outer/", "my_model/backbone/"])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.preset], ids=lambda case: case.name)
def test_preset_shards_its_zoo_model_as_written_by_hand(case: Case, prefix: str) -> None:
    """Every variable gets the axes of the hand-written layout from the preset, nested or not."""
    rules, model = preset_rules(str(case.preset)), case.build()

    assert_fits(rules, model)
    for variable in model.variables:
        assert hits(rules, prefix + variable.path) == hits(dict(case.rules), variable.path), variable.path


SIZES = {"vocabulary_size": 32, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
GROUPED = {**SIZES, "num_query_heads": 4, "num_key_value_heads": 2}
HUB_BACKBONES = {
    "GPT2Backbone": ("gpt", {**SIZES, "num_heads": 4, "max_sequence_length": 8}),
    "BertBackbone": ("encoder", {**SIZES, "num_heads": 4, "max_sequence_length": 8}),
    "RobertaBackbone": ("encoder", {**SIZES, "num_heads": 4, "max_sequence_length": 8}),
    "ViTBackbone": (
        "vit",
        {
            "image_shape": (8, 8, 3),
            "patch_size": 4,
            "num_layers": 2,
            "num_heads": 4,
            "hidden_dim": 16,
            "mlp_dim": 32,
        },
    ),
    "LlamaBackbone": ("llama", GROUPED),
    "MistralBackbone": ("llama", GROUPED),
    "Qwen3Backbone": ("llama", {**GROUPED, "head_dim": 8}),
}


@pytest.mark.parametrize(("name", "preset", "sizes"), [(name, *row) for name, row in HUB_BACKBONES.items()])
def test_preset_fits_the_backbones_of_keras_hub(name: str, preset: str, sizes: dict[str, object]) -> None:
    """Every rule is used on the backbones that plans/README.md names, and both blocks are sharded."""
    rules = preset_rules(preset)
    model = getattr(keras_hub.models, name)(**sizes)

    assert_fits(rules, model)
    row_parallel = [v.path for v in model.variables if hits(rules, v.path) and v.path.endswith("output/kernel")]
    assert len(row_parallel) == 2


@pytest.mark.parametrize("preset", list(list_presets()))
def test_presets_leave_the_bias_of_row_parallel_layers_replicated(preset: str) -> None:
    """Such a bias is added once, after the all-reduce."""
    rules = preset_rules(preset)

    for path in ("attention/attention_output/bias", "down/bias", "feedforward_output_dense/bias", "fc2/bias"):
        assert hits(rules, f"block_0/{path}") == []
