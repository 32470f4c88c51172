"""One rank of a Llama over several ranks, on one GPU, against hand-written torch code of the same shapes.

One rank is a real process group; of more, rank 0 runs under torch's fake process group: its kernels are real, its
collectives return at once and their values are wrong.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import torch
import torch.distributed as dist
from models.keras_llama import keras_llama
from on_gpu.timing import Work, Works, timed
from peers.handwritten_llama import Llama, Shape
from torch.testing._internal.distributed.fake_pg import FakeStore

import tp_planner
from tp_planner.frontend.hardware_file import find_hardware_file, list_hardware, read_hardware_file
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.hardware import Hardware
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.job import process_group, rendezvous
from tp_planner.passes.estimate_time import estimate_time
from tp_planner.planner import make_plan

# The shape of Llama-3-8B with 4 of its 32 layers, so that a whole model and its gradients fit several times.
SHAPES = {
    "cuda": Shape(4, 4096, 32, 8, 14336, 128256, batch=2, length=2048),
    "cpu": Shape(2, 64, 16, 8, 128, 256, batch=2, length=32),
}
SQUARES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}  # sides of the matrices of the matmul rate
STREAM_BYTES = {"cuda": 2**30, "cpu": 2**24}  # of the tensors of the memory rate
TARGET = 1.05
PLAIN = "plain Keras"
PLANNED = "tp_planner"
REPLAYED = "tp_planner, jit_compile=True"
GRAPHS = "tp_planner, jit_compile='cudagraphs'"
HANDWRITTEN = "hand-written"
COMPILED = "hand-written, torch.compile"
FORWARD, BACKWARD, TOKEN = "forward", "forward and backward", "a token with a cache"


def measure(ranks: int, repeat: int, device: str) -> dict[str, Any]:
    """Return the times, memory, estimates and rates of one rank of ``ranks``."""
    shape = SHAPES[device]
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), dtype=torch.int32, device=device)
    with one_rank_of(ranks, device):
        before = _allocated(device)
        model, plan = planned_llama(shape, ranks, tokens)
        versions = {PLANNED: keras_works(model, tokens, shape, ranks)}
        memory = measured_memory(versions[PLANNED][BACKWARD], before, device)
        for version, jit_compile in ((REPLAYED, True), (GRAPHS, "cudagraphs")):
            replayed, _ = planned_llama(shape, ranks, tokens)
            replayed.compile(jit_compile=jit_compile)
            versions[version] = keras_works(replayed, tokens, shape, ranks)
        if ranks == 1:
            versions[PLAIN] = keras_works(keras_llama(shape, "bfloat16"), tokens, shape, ranks)
        by_hand = Llama(shape, ranks).to(device, torch.bfloat16)
        versions[HANDWRITTEN] = torch_works(by_hand, by_hand, tokens, shape, ranks)
        versions[COMPILED] = torch_works(by_hand, torch.compile(by_hand), tokens, shape, ranks)
        rows = [
            {"work": work, "version": version, "times_ms": times}
            for work in (FORWARD, BACKWARD, TOKEN)
            for version, times in timed({v: w[work] for v, w in versions.items()}, repeat, device).items()
        ]
        return {
            "ranks": ranks,
            "rows": rows,
            "memory": {"predicted": asdict(plan.step.memory.peak), "total": plan.step.memory.peak.total, **memory},
            "matmul_flops": {work.phase: dict(work.matmul_flops) for work in plan.step.work},
            "estimate": estimated(plan, profile(device)),
            "rates": rates(device, repeat) if ranks == 1 else None,
        }


@contextlib.contextmanager
def one_rank_of(ranks: int, device: str) -> Iterator[None]:
    """Be rank 0 of ``ranks``: alone in a real process group, or of others that do not exist in a fake one."""
    if ranks == 1:
        process_group.require_process_group(1, "cuda" if device == "cuda" else "cpu")
        yield
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        # The fake group says of no device that it is its own, and nobody else answers when ranks compare their plans.
        with (
            mock.patch.object(process_group, "device_type", return_value=device),
            mock.patch.object(rendezvous, "_meeting", return_value=SimpleNamespace(bring=lambda text: [text] * ranks)),
        ):
            yield
    dist.destroy_process_group()


def planned_llama(shape: Shape, ranks: int, tokens: torch.Tensor) -> tuple[keras.Model, Plan]:
    """Return KerasHub's Llama 3, parallelized by the preset, and its plan, without an optimizer."""
    model = keras_llama(shape, "bfloat16")
    layout = read_layout_file(find_layout_file("llama")).on(Mesh((("model", ranks),)))
    layout = replace(layout, devices=tokens.device.type)
    plan = make_plan(model, layout, inputs_of(tokens.cpu()), None)
    return tp_planner.parallelize(model, plan), plan


def inputs_of(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what KerasHub's model is called on."""
    return {"token_ids": tokens, "padding_mask": torch.ones_like(tokens)}


def keras_works(model: keras.Model, tokens: torch.Tensor, shape: Shape, ranks: int) -> Works:
    """Return the works of a Keras Llama."""
    inputs = inputs_of(tokens)
    heads = shape.key_value_heads // ranks
    cache = torch.zeros(
        shape.batch, shape.layers, 2, shape.length, heads, shape.head_size, dtype=torch.bfloat16, device=tokens.device
    )

    last = torch.tensor(shape.length - 1, dtype=torch.int32, device=tokens.device)  # as generate gives it

    @torch.no_grad()
    def forward() -> None:
        model(inputs, training=False)

    def backward() -> None:
        model.zero_grad()
        model(inputs, training=True).sum().backward()

    @torch.no_grad()
    def token() -> None:
        model.call_with_cache(tokens[:, -1:], cache, last)

    return {FORWARD: forward, BACKWARD: backward, TOKEN: token}


def torch_works(module: Llama, call: Callable[..., Any], tokens: torch.Tensor, shape: Shape, ranks: int) -> Works:
    """Return the works of the hand-written Llama, called through ``call``."""
    size = (shape.batch, shape.key_value_heads // ranks, shape.length, shape.head_size)
    keys, values = torch.zeros(2, shape.layers, *size, dtype=torch.bfloat16, device=tokens.device)
    caches = list(zip(keys, values, strict=True))

    @torch.no_grad()
    def forward() -> None:
        call(tokens)

    def backward() -> None:
        module.zero_grad()
        call(tokens).sum().backward()

    @torch.no_grad()
    def token() -> None:
        call(tokens[:, -1:], caches)

    return {FORWARD: forward, BACKWARD: backward, TOKEN: token}


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def measured_memory(step: Work, before: int, device: str) -> dict[str, int | None]:
    """Return the bytes that PyTorch's allocator holds at most in the second step, on CUDA."""
    step()
    if device != "cuda":
        return {"measured": None}
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"measured": torch.cuda.max_memory_allocated() - before}


def rates(device: str, repeat: int) -> dict[str, float]:
    """Return the best rates of bfloat16 matrix products in FLOP/s and of sums of long tensors in bytes/s."""
    best = 0.0
    for side in SQUARES[device]:
        left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
        times = timed({"": lambda left=left, right=right: left @ right}, repeat, device)[""]
        best = max(best, 2 * side**3 / (min(times) / 1000))
    one, other = torch.ones(2, STREAM_BYTES[device] // 2, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(one)
    times = timed({"": lambda: torch.add(one, other, out=out)}, repeat, device)[""]
    return {"matmul": best, "memory": 3 * STREAM_BYTES[device] / (min(times) / 1000)}


def profile(device: str) -> Hardware | None:
    """Return the hardware profile whose name the device's has in it; None where there is none."""
    name = torch.cuda.get_device_name().lower() if device == "cuda" else "cpu"
    found = [each for each in list_hardware() if each in name]
    return read_hardware_file(find_hardware_file(found[0])) if found else None


def estimated(plan: Plan, hardware: Hardware | None) -> dict[str, Any] | None:
    """Return the estimated computing time of each phase in ms, low and high; no communication, as none is measured."""
    if hardware is None:
        return None
    return {
        "profile": hardware.name,
        "matmul_rate": dict(hardware.matmul_rate)["bfloat16"].value,
        "memory_rate": hardware.memory_bandwidth.value,
        **{
            phase.phase: [1000 * phase.compute.low, 1000 * phase.compute.high]
            for phase in estimate_time(plan, hardware).phases
        },
    }


# As text


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield times, memory, rates and estimates as text."""
    limit = next((each["rates"]["matmul"] for each in results if each["rates"]), None)
    for each in results:
        yield f"\nrank 0 of {each['ranks']}"
        yield f"  {'':24}{'':32}{'median ms':>10}{'quartiles ms':>20}{'ratio':>8}{'of the matmul limit':>21}"
        medians = {(row["work"], row["version"]): statistics.median(row["times_ms"]) for row in each["rows"]}
        for row in each["rows"]:
            low, median, high = statistics.quantiles(row["times_ms"], n=4, method="inclusive")
            ratio = median / medians.get((row["work"], HANDWRITTEN), float("nan"))
            flops = _flops(each, row["work"])
            share = f"{flops / (median / 1000) / limit:.1%}" if limit and flops else "-"
            yield (
                f"  {row['work']:24}{row['version']:38}{median:10.3f}{f'{low:.3f} to {high:.3f}':>20}{ratio:8.2f}"
                f"{share:>21}"
            )
        yield from _beside_times(each)


def _beside_times(each: Mapping[str, Any]) -> Iterator[str]:
    memory, estimate = each["memory"], each["estimate"]
    measured = "not measured" if memory["measured"] is None else f"{memory['measured'] / 2**20:.1f} MiB"
    yield f"  memory of forward and backward: predicted {memory['total'] / 2**20:.1f} MiB, {measured}"
    if estimate is not None:
        low, high = (sum(estimate.get(phase, (0, 0))[end] for phase in ("forward", "backward")) for end in (0, 1))
        yield f"  estimate of forward and backward by '{estimate['profile']}': {low:.3f} to {high:.3f} ms"
        if each["rates"]:
            for rate, unit in (("matmul", "TFLOP/s"), ("memory", "TB/s")):
                found, peak = each["rates"][rate] / 1e12, estimate[f"{rate}_rate"] / 1e12
                yield f"  {rate} rate: {found:.3f} {unit}, {found / peak:.0%} of the profile's peak"


def _flops(each: Mapping[str, Any], work: str) -> int:
    """Return the arithmetic of a work by the plan; 0 for decoding, which no plan has."""
    phases = {FORWARD: ("forward",), BACKWARD: ("forward", "backward")}.get(work, ())
    return sum(flops for phase in phases for flops in each["matmul_flops"].get(phase, {}).values())


def verdicts(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield for each number of ranks whether a training shape is within the target."""
    for each in results:
        medians = {
            row["version"]: statistics.median(row["times_ms"]) for row in each["rows"] if row["work"] == BACKWARD
        }
        for ours, reference in ((PLANNED, HANDWRITTEN), (REPLAYED, COMPILED), (GRAPHS, COMPILED)):
            if ours not in medians or reference not in medians:
                yield f"  rank 0 of {each['ranks']}, {BACKWARD}: {ours} or {reference} failed"
                continue
            ratio = medians[ours] / medians[reference]
            met = "within the target" if ratio <= TARGET else "MISSED"
            yield f"  rank 0 of {each['ranks']}, {BACKWARD}: {ours} {ratio:.2f} times {reference}, of {TARGET}: {met}"
