"""Which attention the device takes for a shape, against what plans take it for, and how long Adam's update takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import torch
from on_gpu.timing import Work, timed
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tp_planner.frontend.cuda_kernels import choose_attention
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.job import process_group

# Shapes (batch, heads, positions, size of a head), heads of keys, and whether it is causal, masked.
SHAPES = [
    (dtype, (2, 8, 256, head), keys, causal, masked)
    for dtype in ("bfloat16", "float32", "float64")
    for head in (10, 64, 128, 256)
    for keys, causal, masked in ((8, False, False), (8, True, False), (8, False, True), (2, True, False))
]
KERNELS = {"flash": "flash_attention", "efficient": "efficient_attention", "cudnn": "cudnn_attention"}
LAYERS = {"cuda": (40, 1024), "cpu": (2, 64)}  # how many, and how wide: of the model that is updated


def measure(device: str, repeat: int) -> dict[str, Any]:
    """Return the attention of each shape, and the times of updates in ms."""
    return {"attention": [_attention(device, *shape) for shape in SHAPES], "adam": _updates(device, repeat)}


def _attention(
    device: str, dtype: str, shape: tuple[int, int, int, int], keys: int, causal: bool, masked: bool
) -> dict[str, Any]:
    batch, _, length, head = shape
    query = torch.randn(shape, dtype=getattr(torch, dtype), device=device)
    key, value = torch.randn(2, batch, keys, length, head, dtype=query.dtype, device=device)
    mask = torch.ones(length, length, dtype=torch.bool, device=device) if masked else None
    options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": keys != shape[1]}
    with _Names() as seen:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    taken = [kind for kind, name in KERNELS.items() if any(name in each for each in seen.names)]
    return {
        "dtype": dtype,
        "shape": shape,
        "keys": keys,
        "causal": causal,
        "masked": masked,
        "planned": choose_attention(query, key, value, **options),
        "taken": taken[0] if taken else "math",
    }


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _updates(device: str, repeat: int) -> dict[str, list[float]]:
    """Return the times of Adam's update by tp_planner, by plain Keras and by torch's fused kernel."""
    process_group.require_process_group(1, "cuda" if device == "cuda" else "cpu")
    planned = _dense_layers(device)
    layout = Layout(Mesh((("model", 1),)), (LayoutRule(".*kernel", (None, "model")),))
    tp_planner.parallelize(planned, layout)
    works = {
        "tp_planner": _update(planned),
        "plain Keras": _update(_dense_layers(device)),
        "torch, fused": _fused_update(_dense_layers(device)),
    }
    return timed(works, repeat, device)


def _dense_layers(device: str) -> keras.Model:
    number, width = LAYERS[device]
    layers = [keras.layers.Dense(width, use_bias=False, name=f"dense_{each}") for each in range(number)]
    return keras.Sequential([keras.Input((width,)), *layers])


def _update(model: keras.Model) -> Work:
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    gradients = [torch.ones_like(variable.value) for variable in model.trainable_variables]

    @torch.no_grad()
    def update() -> None:
        optimizer.apply(gradients, model.trainable_variables)

    return update


def _fused_update(model: keras.Model) -> Work:
    parameters = [variable.value for variable in model.trainable_variables]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.Adam(parameters, fused=True).step


def table(results: Mapping[str, Any], device: str) -> Iterator[str]:
    """Yield the attention of each shape where it is another than planned for CUDA, and the times of updates."""
    others = [each for each in results["attention"] if each["planned"] != each["taken"]]
    said = f"{len(others)} of them otherwise than planned" if device == "cuda" else "as the CPU has it, not as planned"
    yield f"  attention: {len(results['attention'])} shapes, {said}"
    for each in others if device == "cuda" else ():
        yield (
            f"    {each['dtype']} {tuple(each['shape'])}, {each['keys']} heads of keys, causal {each['causal']}, "
            f"masked {each['masked']}: planned {each['planned']}, taken {each['taken']}"
        )
    for name, times in results["adam"].items():
        yield f"  Adam's update, {name}: {statistics.median(times):.3f} ms"
