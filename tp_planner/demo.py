"""A demonstration: train a small GPT sharded over some processes, and prove that it learns what one would.

    python -m tp_planner.demo

starts itself through torchrun: two processes on the CPU, or one for each GPU where there are two or more. They
train on text that comes with Python. Rank 0 then trains the same model alone, from the same weights and on the same
batches, and compares every step's loss and every final weight. Exits with 1 if they differ.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file

BYTES, LENGTH, WIDTH, HEADS, BLOCKS = 256, 64, 96, 8, 3
BATCH, STEPS = 16, 100
TOLERANCE = 1e-5  # relative, in float32

Batches = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Run:
    """What training gave: the loss of every step, the final weights by path, seconds, and collectives per step."""

    losses: tuple[float, ...]
    weights: dict[str, np.ndarray]
    seconds: float
    collectives: Counter[str]


def main() -> int:
    """Train on all processes, then alone on rank 0, and return 0 if both are the same."""
    keras.utils.set_random_seed(0)
    model, batches = build_gpt(), read_batches()
    initial = model.get_weights()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    layout = layout_map("gpt", dist.get_world_size())
    say(rank, tp_planner.plan(model, layout))
    planned = Counter(collective.kind for collective in tp_planner.plan(model, layout).collectives)
    tp_planner.parallelize(model, layout)
    say(rank, f"Training on {dist.get_world_size()} processes")
    sharded = train(model, batches, verbose=2 if rank == 0 else 0)
    tp_planner.verify_model_parallel(model)
    tp_planner.restore(model)
    sharded = with_weights(sharded, model)
    dist.destroy_process_group()
    if rank:
        return 0
    say(rank, "\nTraining the same model on one process")
    model.set_weights(initial)
    alone = with_weights(train(model, batches, verbose=2), model)
    return report(alone, sharded, planned)


class AddPositions(keras.layers.Layer):
    """Adds one learned vector per position to (batch, positions, width)."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.embeddings = self.add_weight(shape=input_shape[1:], initializer="uniform", name="embeddings")

    def call(self, x: Any) -> Any:
        return x + self.embeddings


def build_gpt() -> keras.Model:
    """Return a GPT over bytes: (batch, positions) of int32 to logits."""
    tokens = keras.Input((LENGTH,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(BYTES, WIDTH, name="token_embedding")(tokens)
    x = AddPositions(name="position_embedding")(x)
    for index in range(BLOCKS):
        y = keras.layers.LayerNormalization(name=f"block_{index}_attention_norm")(x)
        attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"block_{index}_attention")
        x = keras.layers.Add(name=f"block_{index}_attention_residual")([x, attention(y, y, use_causal_mask=True)])
        y = keras.layers.LayerNormalization(name=f"block_{index}_mlp_norm")(x)
        y = keras.layers.Dense(4 * WIDTH, activation="gelu", name=f"block_{index}_up")(y)
        y = keras.layers.Dense(WIDTH, name=f"block_{index}_down")(y)
        x = keras.layers.Add(name=f"block_{index}_mlp_residual")([x, y])
    x = keras.layers.LayerNormalization(name="final_norm")(x)
    return keras.Model(tokens, keras.layers.Dense(BYTES, name="head")(x), name="gpt")
