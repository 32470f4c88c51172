"""Bad input gets one clear error that says what, where and what next, and the model stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import tp_planner
from tests.models import CASES
from tests.workers import WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.mesh import Mesh, parse_mesh
from tp_planner.ir.plan_json import FORMAT_VERSION
from tp_planner.readable_plan import Plan
from tp_planner.storage.variables import ParallelVariable
from tp_planner.training.model import applied_to

COLUMN = (None, "model")


def small(name: str = "small") -> keras.Model:
    inputs = keras.Input((4,), name="inputs")
    hidden = keras.layers.Dense(8, "relu", name="up")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="down")(hidden), name=name)


def on_mesh(rules: dict[str, Any], shape: tuple[int, ...] = (2,), names: tuple[str, ...] = ("model",)) -> Any:
    devices = [f"cpu:{number}" for number in range(int(np.prod(shape)))]
    layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(shape, names, devices=devices))
    for pattern, axes in rules.items():
        # A TensorLayout made without a mesh is not checked by Keras before it reaches us.
        layout._layout_map[pattern] = keras.distribution.TensorLayout(axes)
    return layout


def plan_small(rules: dict[str, Any], **mesh: Any) -> Plan:
    return tp_planner.plan(small(), on_mesh(rules, **mesh))


class Unknown(keras.Model):
    """A subclassed model that takes two inputs, whose shapes Keras does not remember."""

    def __init__(self) -> None:
        super().__init__(name="unknown")
        self.dense = keras.layers.Dense(4, name="dense")

    def call(self, first: Any, second: Any) -> Any:
        return self.dense(first + second)


def called_unknown() -> keras.Model:
    model = Unknown()
    model(np.zeros((2, 4), "float32"), np.zeros((2, 4), "float32"))
    return model


def compiled_without_values() -> keras.Model:
    with keras.device("meta"):
        model = small()
        model.compile(keras.optimizers.Adam(name="adam"), "mse")
    return model


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(plan_small({"up/kernel": COLUMN}).to_json())
    change(data)
    return json.dumps(data)


def _in_a_job_of_three(attempt: Callable[[], Any]) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        attempt()
    finally:
        dist.destroy_process_group()


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "not a model": (
        lambda: tp_planner.plan("gpt", on_mesh({})),  # type: ignore[arg-type]
        "expected a keras.Model, got str",
    ),
    "model not built": (
        lambda: tp_planner.plan(keras.Sequential([keras.layers.Dense(2)], name="later"), on_mesh({})),
        "model 'later' is not built, so it has no variables to plan; "
        "call it once on data or call model.build(input_shape)",
    ),
    "inputs not known": (
        lambda: tp_planner.plan(called_unknown(), on_mesh({"unknown/dense/kernel": COLUMN})),
        "model 'unknown' cannot be traced with inputs (2, 4) float32: TypeError: missing a required argument: "
        "'second'; pass plan(..., inputs=) with inputs that model(inputs) accepts",
    ),
    "inputs do not fit": (
        lambda: tp_planner.plan(small(), on_mesh({"up/kernel": COLUMN}), inputs=np.zeros((2, 5), "float32")),
        "model 'small' cannot be traced with inputs (2, 5) float32: ValueError: Input 0 with name 'inputs' of layer "
        "'small' is incompatible with the layer: expected shape=(None, 4), found shape=(2, 5); "
        "call model(inputs) on them to see whether it accepts them",
    ),
    "optimizer without values": (
        lambda: tp_planner.plan(compiled_without_values(), on_mesh({"up/kernel": COLUMN})),
        "optimizer 'adam' was made on the meta device, so its learning rate is not known; compile the model outside of "
        "keras.device('meta'), or inside of tp_planner.deferred_init()",
    ),
    "not a layout map": (
        lambda: tp_planner.plan(small(), {"up/kernel": COLUMN}),
        "expected a keras.distribution.LayoutMap, got dict; "
        "a layout file is read by tp_planner.frontend.layout_file.read_layout_file(path).on(mesh)",
    ),
    "layout map without a mesh": (
        lambda: tp_planner.plan(small(), keras.distribution.LayoutMap(None)),
        "the LayoutMap has no device mesh; make it with LayoutMap(DeviceMesh(shape, axis_names, devices))",
    ),
    "three axes larger than one": (
        lambda: plan_small({"up/kernel": COLUMN}, shape=(2, 2, 2), names=("batch", "model", "stage")),
        "mesh (batch=2, model=2, stage=2) has 2 axes larger than 1 besides 'batch', over which the batch is split; "
        "layers are split over one: give all but one of 'model', 'stage' size 1, or name another batch_axis",
    ),
    "batch axis that the mesh has not": (
        lambda: tp_planner.plan(small(), on_mesh({"up/kernel": COLUMN}), batch_axis="data"),
        "batch_axis is 'data', the mesh has 'model'; name one of these",
    ),
    "pattern is no regular expression": (
        lambda: plan_small({"up/(kernel": COLUMN}),
        "layout rule 'up/(kernel' is not a regular expression: missing ), unterminated subpattern at position 3; "
        "escape special characters",
    ),
    "unknown axis": (
        lambda: plan_small({"up/kernel": (None, "modle")}),
        "layout rule 'up/kernel' -> (None, modle) names mesh axis 'modle', the mesh has 'model'; "
        "use one of these or None",
    ),
    "axis used twice": (
        lambda: plan_small({"up/kernel": ("model", "model")}),
        "layout rule 'up/kernel' -> (model, model) uses mesh axis 'model' twice; an axis can shard one dim of a tensor",
    ),
    "too few entries": (
        lambda: plan_small({"up/kernel": ("model",)}),
        "layout rule 'up/kernel' -> (model) has 1 entries, variable 'up/kernel' of shape (4, 8) has 2 dims; "
        "write one entry per dim",
    ),
    "too many entries": (
        lambda: plan_small({".*/bias": (None, "model")}),
        "2 problems:\n"
        "  - layout rule '.*/bias' -> (None, model) has 2 entries, variable 'up/bias' of shape (8,) has 1 dims; "
        "write one entry per dim\n"
        "  - layout rule '.*/bias' -> (None, model) has 2 entries, variable 'down/bias' of shape (4,) has 1 dims; "
        "write one entry per dim",
    ),
    "two rules for one variable": (
        lambda: plan_small({"up/.*l": COLUMN, ".*/kernel": COLUMN}),
        "variable 'up/kernel' matches 2 layout rules: 'up/.*l', '.*/kernel'; make each path match at most one",
    ),
    "two rules for one output": (
        lambda: plan_small({"up/kernel": COLUMN, "up/out.*": COLUMN, "u./output": COLUMN}),
        "output 'up/output' matches 2 layout rules: 'up/out.*', 'u./output'; make each path match at most one",
    ),
    "no rule matches": (
        lambda: plan_small({"upp/kernel": COLUMN}),
        "layout rule 'upp/kernel' matches no variable; closest: 'up/kernel'",
    ),
    "a rule of an old map matches a part": (
        lambda: plan_small({"kernel": COLUMN}),
        "layout rule 'kernel' matches no variable as a whole, but a part of 'up/kernel'; "
        "Keras matches whole paths: write '.*kernel.*' or the full path",
    ),
    "several problems": (
        lambda: plan_small({"up/kernel": ("modle", None), "[": ("model",)}),
        "2 problems:\n"
        "  - layout rule 'up/kernel' -> (modle, None) names mesh axis 'modle', the mesh has 'model'; "
        "use one of these or None\n"
        "  - layout rule '[' is not a regular expression: unterminated character set at position 0; "
        "escape special characters",
    ),
    "problems of every kind": (
        lambda: plan_small({"[": ("model",), "up/bias": COLUMN, "upp/kernel": COLUMN}),
        "3 problems:\n"
        "  - layout rule '[' is not a regular expression: unterminated character set at position 0; "
        "escape special characters\n"
        "  - layout rule 'up/bias' -> (None, model) has 2 entries, variable 'up/bias' of shape (8,) has 1 dims; "
        "write one entry per dim\n"
        "  - layout rule 'upp/kernel' matches no variable; closest: 'up/kernel'",
    ),
    "mesh without sizes": (
        lambda: parse_mesh("model"),
        "mesh 'model' is not of the form axis=size[,axis=size...], e.g. batch=1,model=8",
    ),
    "mesh with words for sizes": (
        lambda: parse_mesh("model=two"),
        "mesh 'model=two' is not of the form axis=size[,axis=size...], e.g. batch=1,model=8",
    ),
    "mesh of size zero": (
        lambda: parse_mesh("model=0"),
        "mesh axis 'model' has size 0; sizes are integers of at least 1",
    ),
    "mesh axis named twice": (
        lambda: parse_mesh("model=2,model=4"),
        "mesh axis 'model' is named twice; axis names are unique",
    ),
    "mesh without axes": (lambda: Mesh(()), "a mesh needs at least one axis; write for example model=8"),
    "plan is not JSON": (
        lambda: Plan.from_json("model=8"),
        "plan is not JSON: Expecting value: line 1 column 1 (char 0); write plans with plan.to_json()",
    ),
    "JSON is not a plan": (
        lambda: Plan.from_json("[]"),
        "JSON document is not a plan: it has no format_version; write plans with plan.to_json()",
    ),
    "plan of another version": (
        lambda: Plan.from_json(damaged(lambda data: data.update(format_version=99))),
        f"plan has format version 99, this tp_planner reads {FORMAT_VERSION}; plan the model again",
    ),
    "plan without variables": (
        lambda: Plan.from_json(damaged(lambda data: data.pop("variables"))),
        "plan is damaged (KeyError: 'variables'); plan the model again",
    ),
    "plan with a wrong local shape": (
        lambda: Plan.from_json(damaged(lambda data: data["variables"][0].update(local_shape=[4, 3]))),
        "plan is damaged (ValueError: local shape [4, 3] of 'up/kernel' is not S(1) of [4, 8]); plan the model again",
    ),
    "plan with an unknown placement": (
        lambda: Plan.from_json(damaged(lambda data: data["variables"][0].update(placement="X"))),
        "plan is damaged (ValueError: 'X' is no placement; expected 'R', 'P' or 'S(dim)'); plan the model again",
    ),
    "plan in a job of another size": (
        lambda: _in_a_job_of_three(lambda: plan_small({"up/kernel": COLUMN})),
        "this process belongs to a job of 3 ranks and cannot plan for 2; plan in a process without a process group",
    ),
    "no process group": (
        lambda: tp_planner.parallelize(small(), on_mesh({"up/kernel": COLUMN})),
        "the mesh has 2 devices but this is one process without a process group; "
        "start it with torchrun --nproc-per-node=2 your_script.py",
    ),
    "restoring a plain model": (
        lambda: tp_planner.restore(small()),
        "model 'small' is not parallelized; there is nothing to restore",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case: str) -> None:
    """The whole message is what a user needs."""
    attempt, message = REFUSALS[case]
    with pytest.raises(tp_planner.PlanError) as refusal:
        attempt()
    assert str(refusal.value) == message


def test_world_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh that is not of the size that torchrun started is refused, with both numbers."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.parallelize(small(), on_mesh({"up/kernel": COLUMN}))
    assert str(refusal.value) == (
        "the mesh has 2 devices, the job has 4 processes; "
        "start torchrun with --nproc-per-node=2 or make a mesh of 4 devices"
    )


# On the ranks


def refused(attempt: str) -> tuple[str, bool]:
    """Return what a refused call says on this rank, and whether the model is as it was before."""
    model = small()
    tp_planner_state = {key: variable.numpy() for key, variable in named_variables(model).items()}
    rules: dict[str, Any] = {"up/kernel": COLUMN}
    if attempt == "twice":
        model = tp_planner.parallelize(model, layout_map(rules))
        return _message(lambda: tp_planner.parallelize(model, layout_map(rules))), applied_to(model) is not None
    if attempt == "different plans":
        rules = {"up/kernel": COLUMN} if dist.get_rank() == 0 else {"down/kernel": COLUMN}
    if attempt == "one bad rank" and dist.get_rank() == 1:
        rules = {"upp/kernel": COLUMN}
    if attempt == "plan of another model":
        other = tp_planner.plan(CASES["mlp"].build(), layout_map({"up/kernel": COLUMN}))
        return _message(lambda: tp_planner.parallelize(model, other)), _plain(model, tp_planner_state)
    if attempt == "model without values":
        with keras.device("meta"):
            model = small()
        return _message(lambda: tp_planner.parallelize(model, layout_map(rules))), applied_to(model) is None
    if attempt == "mesh too small":
        return _message(lambda: tp_planner.parallelize(model, on_mesh(rules, shape=(1,)))), _plain(
            model, tp_planner_state
        )
    return _message(lambda: tp_planner.parallelize(model, layout_map(rules))), _plain(model, tp_planner_state)


def failure_while_applying() -> tuple[str, bool, bool]:
    """Return the error of an apply that breaks off, and whether model and function are as before."""
    from unittest import mock

    from tp_planner.layers import styles

    case = CASES["gpt"]
    model = case.build("float64")
    before = {key: variable.numpy() for key, variable in named_variables(model).items()}
    x, _ = case.batch(np.random.default_rng(0), 2)
    expected = model(x).detach()
    hook = styles.LayerCalls.hook

    def failing(self: Any, layer: keras.Layer, undo: Any) -> None:
        if layer.name == "block_1_down":
            raise MemoryError("no room for block_1_down")
        hook(self, layer, undo)

    plan = tp_planner.plan(model, layout_map(case.rules))
    with mock.patch.object(styles.LayerCalls, "hook", failing):
        message = _message(lambda: tp_planner.parallelize(model, plan))
    return message, _plain(model, before), bool((model(x) == expected).all())


def _message(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (tp_planner.TpPlannerError, MemoryError) as error:
        return str(error)
    return "not refused"


def _plain(model: keras.Model, before: dict[str, np.ndarray]) -> bool:
    variables = named_variables(model)
    same = all(np.array_equal(variables[key].numpy(), value) for key, value in before.items())
    classes = not any(isinstance(variable, ParallelVariable) for variable in variables.values())
    hooks = not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model._flatten_layers())
    return same and classes and hooks and applied_to(model) is None


# In the parent


def test_ranks_with_different_plans(pools: Callable[[int], WorkerPool]) -> None:
    """All ranks refuse together, with the same words."""
    results = pools(2).run(refused, "different plans")
    assert results[0] == results[1]
    message, plain = results[0]
    assert message.startswith("ranks made different plans (rank 0: ")
    assert message.endswith("build the same model with the same layout on all of them")
    assert plain


def test_a_problem_on_one_rank(pools: Callable[[int], WorkerPool]) -> None:
    """If one rank cannot plan, the others hear its words instead of waiting for it."""
    (zero, plain_zero), (one, plain_one) = pools(2).run(refused, "one bad rank")
    assert one == "layout rule 'upp/kernel' matches no variable; closest: 'up/kernel'"
    assert zero == f"rank 1 cannot parallelize the model: {one}"
    assert plain_zero
    assert plain_one


REFUSALS_IN_A_JOB = {
    "twice": "model 'small' is parallelized already; call tp_planner.restore(model) first",
    "plan of another model": (
        "the plan was made for another model than 'small': variables or layers differ; "
        "make it again with tp_planner.plan(model, layout_map)"
    ),
    "model without values": (
        "model 'small' was built on the meta device, so that 'up/kernel' and 3 other variables hold no values; "
        "give parallelize weights=, or build the model under tp_planner.deferred_init() to have initializers run"
    ),
    "mesh too small": (
        "the mesh has 1 devices, the job has 2 processes; "
        "start torchrun with --nproc-per-node=1 or make a mesh of 2 devices"
    ),
}


@pytest.mark.parametrize("attempt", REFUSALS_IN_A_JOB)
def test_refusal_in_a_job(pools: Callable[[int], WorkerPool], attempt: str) -> None:
    """All ranks refuse with the same words, and the model is as it was."""
    for message, as_before in pools(2).run(refused, attempt):
        assert message == REFUSALS_IN_A_JOB[attempt]
        assert as_before


def test_a_failure_while_applying_is_undone(pools: Callable[[int], WorkerPool]) -> None:
    """Whatever breaks off an apply, the model is plain again and computes the same."""
    for message, plain, same in pools(2).run(failure_while_applying):
        assert message == "no room for block_1_down"
        assert plain
        assert same
