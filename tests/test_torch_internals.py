"""Private names of torch: all that the package uses are listed here, and what else there is; this torch has them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tp_planner

PACKAGE = Path(tp_planner.__file__).parent

# By name: what to do in a version of torch that lacks it.
INTERNALS: dict[str, str] = {
    "torch._C.DisableTorchFunction": "torch._C.DisableTorchFunctionSubclass, with the modes popped",
    "torch._C.DisableTorchFunctionSubclass": "torch._C.DisableTorchFunction",
    "torch._C._AutoDispatchBelowAutograd": "torch.no_grad around a call of the op on detached tensors",
    "torch._C._are_functorch_transforms_active": "torch.autograd.Function.apply, which asks the same",
    "torch._C._autograd._top_saved_tensors_default_hooks": "none: hooks of others would be passed over",
    "torch._C._current_autograd_node": "the node whose hook by Node.register_prehook has run last",
    "torch._C._current_graph_task_id": "a flag that hooks of the loss and of the last gradient set and take back",
    "torch._C._dispatch_has_kernel_for_dispatch_key": "none: FakeTensorMode as it is, without the short way for views",
    "torch._C._distributed_c10d.FileStore": "torch.distributed.FileStore",
    "torch._C._distributed_c10d.HashStore": "torch.distributed.HashStore",
    "torch._C._distributed_c10d.PrefixStore": "torch.distributed.PrefixStore",
    "torch._C._distributed_c10d.Store": "torch.distributed.Store",
    "torch._C._functorch.is_functorch_wrapped_tensor": "torch._functorch's own test of wrapped tensors",
    "torch._C._functorch.maybe_current_level": "torch.func's own test of whether one of its transforms runs",
    "torch._C._is_any_autocast_enabled": "torch.is_autocast_enabled for the types of devices that torch has",
    "torch._C._set_throw_on_mutable_data_ptr": "FakeTensor's own constructor",
    "torch._C._set_warn_deprecated_on_mutable_data_ptr": "FakeTensor's own constructor",
    "torch._C._set_grad_enabled": "torch.set_grad_enabled, which is a context manager too",
    "torch._C._storage_Use_Count": "none: sums of programs in memory of their own",
    "torch._C._will_engine_execute_node": "a hook of the node itself",
    "torch.Tensor._make_subclass": "FakeTensor's own constructor",
    "torch.Tensor._make_wrapper_subclass": "none: a tensor that stands for shards is made by it",
    "torch._foreach_mul": "clones of the tensors, one by one",
    "torch._fused_adam_": "torch._foreach ops, as in torch.optim's own Adam",
    "torch._fused_sgd_": "torch._foreach ops, as in torch.optim's own SGD",
    "torch._ops.OpOverload": "type(torch.ops.aten.add.Tensor)",
    "torch._subclasses.fake_tensor.FakeTensor": "none: plans are made on them",
    "torch._subclasses.fake_tensor.FakeTensorMode": "none: plans are made under it",
    "torch._subclasses.fake_tensor.in_kernel_invocation_manager": "FakeTensorMode as it is, without the short way",
    "torch.autograd.Variable._execution_engine": "a hook of the last gradient, or of the parameters' accumulation",
    "torch.autograd._engine_run_backward": "a mode of torch functions that stays on inside of them",
    "torch.autograd._get_sequence_nr": "the sequence number of a node that is made for it",
    "torch.distributed._functional_collectives.AsyncCollectiveTensor": "none: DTensor returns them",
    "torch.distributed.distributed_c10d._get_default_store": "a store that is given to init_process_group",
    "torch.distributed.tensor._dispatch": "none: DTensor runs its ops by it",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": "ir.placement's own arithmetic",
    "torch.distributed.tensor.placement_types._StridedShard": "none: DTensor makes them where it reshapes",
    "torch.fx.experimental._config.patch": "none: conditions on unknown sizes are refused",
    "torch.ops._c10d_functional": "torch.distributed._functional_collectives",
    "torch.ops.aten._scaled_dot_product_attention_math": "scaled_dot_product_attention under sdpa_kernel",
    "torch.ops.aten._scaled_dot_product_efficient_attention": "none: CUDA's own op",
    "torch.ops.aten._scaled_dot_product_flash_attention": "none: CUDA's own op",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "none: the CPU's own op",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "none: the CPU's own op",
    "torch.ops.aten._to_copy": "none: what Tensor.to is to a dispatch mode",
    "torch.ops.aten._unsafe_view": "torch.ops.aten.view on what is contiguous",
    "torch.testing._internal.distributed.fake_pg.FakeStore": "a HashStore with the backend 'fake'",
    "torch.utils._mode_utils.no_dispatch": "torch._C._DisableTorchDispatch",
    "torch.utils._python_dispatch.TorchDispatchMode": "none: what runs is watched by it",
    "torch.utils._python_dispatch._get_current_dispatch_mode": "a flag of the modes of our own that are entered",
    "torch.utils._python_dispatch._disable_current_modes": "none: real values are read under fake tensors",
    "torch.utils._pytree": "optree",
}


def used() -> Iterator[str]:
    """Yield the private names that modules of the package import, patch, or reach from ``torch`` and ``dist``."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
                yield from (f"{node.module}.{each.name}" for each in node.names)
            elif isinstance(node, ast.Attribute):
                yield _dotted(node)
            elif isinstance(node, ast.Call):
                yield _patched(node)


def _dotted(node: ast.expr) -> str:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    roots = {"torch": "torch", "dist": "torch.distributed", "autograd": "torch.autograd"}
    root = roots.get(node.id, "") if isinstance(node, ast.Name) else ""
    return ".".join([root, *reversed(names)]) if root else ""


def _patched(call: ast.Call) -> str:
    """Return what ``replaced(owner, "name", ...)`` and its like are about."""
    match call.args:
        case [owner, ast.Constant(value=str(name)), *_]:
            return f"{_dotted(owner)}.{name}" if _dotted(owner) else ""
    return ""


def is_private(name: str) -> bool:
    return any(each.startswith("_") and not each.endswith("__") for each in name.split("."))


def test_all_are_listed() -> None:
    """A name counts as listed if it is, or lies under one that is, or is a module on the way to one."""
    private = {name for name in used() if is_private(name)}
    unlisted = {
        name
        for name in private
        if not any(name == each or name.startswith(f"{each}.") or each.startswith(f"{name}.") for each in INTERNALS)
    }
    assert unlisted == set()
    assert {each for each in INTERNALS if not any(f"{name}.".startswith(f"{each}.") for name in private)} == set()


@pytest.mark.parametrize("name", INTERNALS)
def test_exists(name: str) -> None:
    """What torch makes lazily is there when it is asked for; modules are imported."""
    found, *rest = name.split(".")
    value = {"torch": torch}[found]
    for each in rest:
        found = f"{found}.{each}"
        try:
            value = getattr(value, each)
        except AttributeError:
            value = importlib.import_module(found)
