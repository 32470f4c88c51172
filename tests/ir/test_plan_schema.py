"""The JSON Schema of plans says what ``Plan.to_json`` writes: all of it, and nothing else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import keras
import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from tests.models import CASES, USUAL
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import (
    Boundary,
    FunctionPlan,
    Gathering,
    GuessedDim,
    LayerPlan,
    PartRead,
    Plan,
    Style,
    VariablePlan,
)
from tp_planner.ir.plan_json import FORMAT_VERSION, plan_from_json
from tp_planner.ir.step import Collective, CollectiveKind, Holder, Memory, MemoryUse, Phase, Step, Work
from tp_planner.planner import make_plan

FILE = Path(__file__).resolve().parents[2] / "plans" / "plan.schema.json"
SCHEMA: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)

Json = Any


@cache
def plan_text(name: str, parts: int = 2) -> str:
    """Return the plan of a model of the zoo with an optimizer, as JSON."""
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    layout = Layout(Mesh((("batch", 1), ("model", parts))), rules)
    return make_plan(CASES[name].build(), layout, optimizer=keras.optimizers.Adam()).to_json()


def test_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_documents_name_the_format() -> None:
    """The page about plans names the version that is written."""
    page = (FILE.parent / "README.md").read_text(encoding="utf-8")
    assert f"JSON Schema (2020-12) of `Plan.to_json`, format version {FORMAT_VERSION}." in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": NaN}', "plan is not JSON: NaN is no number of JSON; write plans with plan.to_json()"),
        ("[" * 200_000, "plan is not JSON: it is nested too deeply; write plans with plan.to_json()"),
    ],
)
def test_what_no_json_has_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        plan_from_json(text)


@pytest.mark.parametrize(
    ("name", "parts"), [*((name, 2) for name in sorted(USUAL & CASES.keys())), ("llama", 1), ("gpt", 3), ("vit", 8)]
)
def test_plans_are_valid(name: str, parts: int) -> None:
    """Plans of one rank, of even and of uneven shards all are what the schema says."""
    assert [error.message for error in VALIDATOR.iter_errors(json.loads(plan_text(name, parts)))] == []


# The schema and the types


def definition(name: str) -> Mapping[str, Any]:
    return SCHEMA["$defs"][name] if name else SCHEMA


# For each definition the type it stands for, and names that differ: the type's, the schema's.
TYPES: dict[str, tuple[type, dict[str, str]]] = {
    "": (Plan, {}),
    "variable": (VariablePlan, {}),
    "boundary": (Boundary, {}),
    "function": (FunctionPlan, {}),
    "layer": (LayerPlan, {"class_name": "class"}),
    "collective": (Collective, {}),
    "memory_use": (MemoryUse, {}),
    "memory": (Memory, {}),
    "step": (Step, {}),
    "work": (Work, {}),
    "holder": (Holder, {}),
    "guessed_dim": (GuessedDim, {}),
    "gathering": (Gathering, {}),
    "part_read": (PartRead, {}),
}


@pytest.mark.parametrize("name", TYPES, ids=lambda name: name or "plan")
def test_every_field_is_in_the_schema(name: str) -> None:
    """A field that is added to a type has to be described, and one that is removed goes."""
    kind, renamed = TYPES[name]
    expected = {renamed.get(field.name, field.name) for field in fields(kind)} | (
        {"format_version", "batch_axis"} if not name else set()
    )
    assert set(definition(name)["properties"]) == expected


def test_every_object_is_closed() -> None:
    """All properties are required and no other is allowed; only FLOPs are by names of dtypes."""
    objects = {name: each for name, each in [("", SCHEMA), *SCHEMA["$defs"].items()] if each.get("type") == "object"}
    assert set(objects) == {*TYPES, "rule"}
    for each in objects.values():
        assert each["required"] == list(each["properties"])
        assert each["additionalProperties"] is False


@pytest.mark.parametrize(
    ("enum", "literal"),
    [
        (definition("layer")["properties"]["style"], Style),
        (definition("collective")["properties"]["kind"], CollectiveKind),
        (definition("phase"), Phase),
    ],
    ids=["styles", "kinds", "phases"],
)
def test_enums_are_those_of_the_types(enum: Mapping[str, Any], literal: Any) -> None:
    assert tuple(enum["enum"]) == get_args(literal)


def test_version_is_that_of_the_format() -> None:
    assert SCHEMA["properties"]["format_version"]["const"] == FORMAT_VERSION


# Damaged plans

Place = tuple[str | int, ...]


def places(data: Json, path: Place = ()) -> Iterator[tuple[Place, Json]]:
    """Yield every place in a document with its value."""
    yield path, data
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(data: Json, path: Place, change: Callable[[Json, str | int], None]) -> Json:
    """Return a copy of the document in which the container and the key at the end of the path were changed."""
    copied = copy.deepcopy(data)
    container = copied
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return copied


def put(value: Json) -> Callable[[Json, str | int], None]:
    return lambda container, key: container.__setitem__(key, value)


def take_away(container: Json, key: str | int) -> None:
    del container[key]


def refused_at(data: Json) -> str:
    error = best_match(VALIDATOR.iter_errors(data))
    assert error is not None, "the document is valid"
    return error.json_path


def first(part: str, test: Callable[[Json], bool] = lambda each: True) -> Place:
    """Return the path of the first entry of a list of the plan that passes the test."""
    data = json.loads(plan_text("gpt"))
    return part, next(index for index, each in enumerate(data[part]) if test(each))


ROW = first("layers", lambda layer: layer["style"] == "row")
COLUMN = first("layers", lambda layer: layer["style"] == "column" and layer["inputs"])

# What is changed, how, and where the schema finds it.
DAMAGES: dict[str, tuple[Place, Callable[[Json, str | int], None], Place]] = {
    "another version": (("format_version",), put(1), ("format_version",)),
    "an unknown key": (("colour",), put("red"), ()),
    "a missing key": (("layers",), take_away, ()),
    "a fingerprint that is none": (("fingerprint",), put("abc"), ("fingerprint",)),
    "a mesh as an object": (("mesh",), put({"model": 2}), ("mesh",)),
    "an axis of no devices": (("mesh", 1, 1), put(0), ("mesh", 1, 1)),
    "an axis of three entries": (("mesh", 1), put(["model", 2, 2]), ("mesh", 1)),
    "an input without a dtype": (("inputs", 0), put([[2, 16]]), ("inputs", 0)),
    "a negative size": (("inputs", 0, 0, 0), put(-1), ("inputs", 0, 0, 0)),
    "a rule's axis that is a number": (("rules", 0, "axes", 0), put(1), ("rules", 0, "axes", 0)),
    "a variable that is a sum": (("variables", 0, "placement"), put("P"), ("variables", 0, "placement")),
    "a variable without a reason": (("variables", 0, "reason"), put(""), ("variables", 0, "reason")),
    "a truth that is a number": (("variables", 0, "trainable"), put(1), ("variables", 0, "trainable")),
    "an unknown style": ((*ROW, "style"), put("diagonal"), (*ROW, "style")),
    "an unknown epilogue": ((*ROW, "epilogue_after_output"), put("bias"), (*ROW, "epilogue_after_output")),
    "no calls": ((*ROW, "calls"), put(0), (*ROW, "calls")),
    "a placement that is none": ((*ROW, "output", "forward", 0), put("S"), (*ROW, "output", "forward", 0)),
    "a dim with a zero in front": ((*ROW, "output", "forward", 0), put("S(01)"), (*ROW, "output", "forward", 0)),
    "a change to nowhere": ((*ROW, "output", "backward"), put(["R"]), (*ROW, "output", "backward")),
    "an unknown key deep inside": ((*ROW, "output", "note"), put("x"), (*ROW, "output")),
    "a boundary without a tensor": ((*COLUMN, "inputs", 0, 1, "tensor"), take_away, (*COLUMN, "inputs", 0, 1)),
    "a position that is a name": ((*COLUMN, "inputs", 0, 0), put("x"), (*COLUMN, "inputs", 0, 0)),
    "an unknown collective": (("collectives", 0, "kind"), put("gossip"), ("collectives", 0, "kind")),
    "bytes as a text": (("collectives", 0, "bytes"), put("4 KB"), ("collectives", 0, "bytes")),
    "an unknown phase": (("step", "work", 0, "phase"), put("warm-up"), ("step", "work", 0, "phase")),
    "a fraction of a byte": (
        ("step", "memory", "peak", "gradients"),
        put(0.5),
        ("step", "memory", "peak", "gradients"),
    ),
    "FLOPs of no dtype": (("step", "work", 0, "matmul_flops", "32 bits"), put(1), ("step", "work", 0, "matmul_flops")),
    "a note that is none": (("notes",), put([None]), ("notes", 0)),
}


@pytest.mark.parametrize(("path", "change", "found"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_where_it_is(path: Place, change: Callable[[Json, str | int], None], found: Place) -> None:
    data = changed(json.loads(plan_text("gpt")), path, change)
    expected = "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in found)
    assert refused_at(data) == expected


def test_every_key_is_needed_and_no_other_is_allowed() -> None:
    """Wherever a key is taken away or added, the plan is refused."""
    data = json.loads(plan_text("mlp"))
    keyed = [(path, key) for path, value in places(data) if isinstance(value, dict) for key in value]
    examples = {(tuple("" if isinstance(step, int) else step for step in path), key): path for path, key in keyed}
    for (_, key), path in examples.items():
        if path[-1:] == ("matmul_flops",):
            continue
        assert not VALIDATOR.is_valid(changed(data, (*path, key), take_away)), (path, key)
        assert not VALIDATOR.is_valid(changed(data, (*path, "other"), put(1))), path
