"""Progress: where training stood when a checkpoint was written, and the random state that it goes on with."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch

from tp_planner.files import write_new
from tp_planner.ir.errors import PlanError

NAME = "progress.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: optimizer steps made, whole epochs made, and batches of the epoch that runs."""

    step: int
    epoch: int
    batch: int
    folder: Path  # of the checkpoint


@dataclass(frozen=True, slots=True)
class About:
    """What a checkpoint says of itself besides its tensors."""

    step: int
    epoch: int
    batch: int
    model: str
    dtype_policy: str
    optimizer: str
    mesh: str
    layout: dict[str, str]  # placements by name of what is stored in shards
    random_state: dict[str, Any]
    structure: dict[str, str] = field(default_factory=dict)  # places in the model by name of what is stored
    so_far: dict[str, Any] = field(default_factory=dict)  # ``EpochSoFar``, where it was written within an epoch of fit
    data_epochs: int | None = None  # that the data of fit have had, if Keras counts them

    def write(self, folder: Path) -> None:
        """Write a file of this."""
        write_new(folder / NAME, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True, slots=True)
class EpochSoFar:
    """What ``fit`` needs to go on within an epoch, besides how many batches of it were made."""

    random_state: dict[str, Any]  # with which it began
    batches: int | None  # that it has, if it is known
    logs: dict[str, Any]  # of the last batch
    counts: list[Any]  # of the metrics, of each replica


def read_about(folder: Path) -> About:
    """Return what a checkpoint says of itself. Raises PlanError if it does not."""
    try:
        return About(**json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"{folder}: its {NAME} cannot be read ({type(error).__name__}: {error})") from None


def structure_in(folder: Path) -> dict[str, str]:
    """Return the places of a checkpoint's tensors in its model; none of weights that are no checkpoint's."""
    return read_about(folder).structure if (folder / NAME).is_file() else {}


def steps_made(model: keras.Model) -> int:
    """Return how many steps the model's optimizer has made, those that only add up gradients too; 0 without one."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", None) or optimizer
    return 0 if optimizer is None else int(optimizer._iterations.value)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all generators as JSON can hold it."""
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {
        "torch": _text(torch.get_rng_state().numpy()),
        "numpy": [str(name), _text(np.asarray(keys)), *rest],
        "python": [version, list(numbers), gauss],
    }
    return state | ({"cuda": _text(torch.cuda.get_rng_state().numpy())} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Let all generators go on from a state that ``random_state`` returned."""
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, _array(keys, np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
