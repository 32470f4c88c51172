"""What one training step does on one rank: collectives, memory and work, as a simulation or a real run saw them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

Phase = Literal["forward", "backward", "update"]
StorageKind = Literal["parameters", "gradients", "optimizer", "activations", "temporaries"]
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "other"]


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a training step.

    ``bytes`` is the size of each rank's input to it. ``cause`` is the op for which DTensor or the model's own code
    communicates; it is empty for a collective that a boundary of the plan makes. One that is ``early`` is started
    before others need what it brings, and waited for then. Of one that a layer starts and waits for, ``behind`` are
    the multiplications and additions of matrix products in between, by dtype name. One that is made ``once`` is that of
    an update: of the micro-steps that it has, the last makes it alone.
    """

    kind: CollectiveKind
    axis: str
    group_size: int
    bytes: int
    layer: str
    place: str
    phase: Phase
    reason: str
    cause: str = ""
    early: bool = False
    behind: tuple[tuple[str, int], ...] = ()
    once: bool = False

    @property
    def is_planned(self) -> bool:
        """Whether a boundary of the plan makes it; else it is implicit."""
        return not self.cause

    @property
    def of_activation(self) -> bool:
        """Whether it stands where a layer or a function in its code takes or returns tensors, not at a variable."""
        return self.place.partition(" (")[0].rpartition(" ")[2] in ("input", "output", "loss")

    @property
    def wire_bytes(self) -> int:
        """Bytes that each rank sends under the ring algorithm, as NCCL's bus bandwidth counts them.

        An all-reduce of n bytes sends 2 n (p - 1) / p over p ranks, an all-gather n (p - 1) for an input of n,
        a reduce-scatter and an all-to-all n (p - 1) / p, a broadcast n
        (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
        """
        others = self.group_size - 1
        match self.kind:
            case "all_reduce":
                return 2 * self.bytes * others // self.group_size
            case "all_gather":
                return self.bytes * others
            case "reduce_scatter" | "all_to_all":
                return self.bytes * others // self.group_size
            case "broadcast" | "other":
                return self.bytes if others else 0


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that one rank holds, by what they are for.

    ``activations`` are tensors that the forward pass leaves for the backward pass, inputs and outputs of the model
    included; ``temporaries`` everything else: gradients of activations, results of collectives, workspaces.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporaries


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of rank 0, whose shards are the largest, in one training step.

    ``largest`` has each kind at its own largest, ``peak`` all kinds at the moment when their sum is largest.
    ``reserved`` are the bytes that CUDA's caching allocator takes of the device for it all; None on CPUs.
    """

    largest: MemoryUse
    peak: MemoryUse
    peak_phase: Phase
    reserved: int | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """Equal tensors that rank 0 holds at the peak: ``count`` of them with ``bytes`` in all.

    ``op`` has made them in a call of each of ``layers``, or on the way back through it; layers that differ in a number
    of their names alone are together, and "" is outside of all layers.
    """

    kind: StorageKind
    layers: tuple[str, ...]
    op: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank computes in one phase: an upper bound of kernels, for none of them is fused.

    ``matmul_flops`` counts multiplications and additions of matrix products, attention and convolutions by dtype
    name, ``memory_bytes`` what all ops read and write.
    """

    phase: Phase
    matmul_flops: tuple[tuple[str, int], ...]
    memory_bytes: int
    ops: int


@dataclass(frozen=True, slots=True)
class Step:
    """One simulated training step: forward, backward, and the update by ``optimizer`` ("" for none).

    Without a ``loss`` ("") the sum of the model's outputs stands for it. ``whole_update`` says that the update was
    simulated to its end; an optimizer that looks at values cannot be. ``holders`` are the activations and temporaries
    at the peak, the largest first, but for those that are too small to matter. Where the optimizer adds up gradients of
    several ``micro_steps``, the step is the last of them, which updates.
    """

    optimizer: str
    loss: str
    memory: Memory
    work: tuple[Work, ...]
    whole_update: bool = True
    holders: tuple[Holder, ...] = ()
    micro_steps: int = 1


_NOTHING = MemoryUse(0, 0, 0, 0, 0)
NO_STEP = Step("", "", Memory(_NOTHING, _NOTHING, "forward"), ())  # of a plan that is not simulated yet


def encode_step(step: Step) -> dict[str, Any]:
    """Return the step as JSON data."""
    memory = step.memory
    return {
        "optimizer": step.optimizer,
        "loss": step.loss,
        "whole_update": step.whole_update,
        "micro_steps": step.micro_steps,
        "memory": {
            "largest": _encode_use(memory.largest),
            "peak": _encode_use(memory.peak),
            "peak_phase": memory.peak_phase,
            "reserved": memory.reserved,
        },
        "work": [
            {
                "phase": work.phase,
                "matmul_flops": dict(work.matmul_flops),
                "memory_bytes": work.memory_bytes,
                "ops": work.ops,
            }
            for work in step.work
        ],
        "holders": [
            {
                "kind": each.kind,
                "layers": list(each.layers),
                "op": each.op,
                "dtype": each.dtype,
                "shape": list(each.shape),
                "count": each.count,
                "bytes": each.bytes,
            }
            for each in step.holders
        ],
    }


def decode_step(data: Mapping[str, Any]) -> Step:
    """Return the step that ``encode_step`` wrote."""
    memory = data["memory"]
    return Step(
        data["optimizer"],
        data["loss"],
        Memory(MemoryUse(**memory["largest"]), MemoryUse(**memory["peak"]), memory["peak_phase"], memory["reserved"]),
        tuple(
            Work(work["phase"], tuple(sorted(work["matmul_flops"].items())), work["memory_bytes"], work["ops"])
            for work in data["work"]
        ),
        data["whole_update"],
        tuple(
            Holder(
                each["kind"],
                tuple(each["layers"]),
                each["op"],
                each["dtype"],
                tuple(each["shape"]),
                each["count"],
                each["bytes"],
            )
            for each in data["holders"]
        ),
        data["micro_steps"],
    )


def _encode_use(use: MemoryUse) -> dict[str, int]:
    return {field.name: getattr(use, field.name) for field in fields(use)}
