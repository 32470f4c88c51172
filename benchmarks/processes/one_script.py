"""One script for JAX and for torch: a model under ``keras.distribution.ModelParallel``, five steps, their losses.

KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=2 python one_script.py llama 1x2
tp-planner run --devices 2 one_script.py llama 1x2
"""

from __future__ import annotations

import json
import sys
from typing import Any

import keras
import numpy as np

from tp_planner.gpt import LENGTH, build_gpt

STEPS, BATCH, TOKENS = 5, 4, 256


class Losses(keras.callbacks.Callback):
    """The loss of every step by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))


def gpt_layout(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["token_embedding/embeddings"] = ("model", None)
    layouts[".*attention/(query|key|value)/kernel"] = (None, "model", None)
    layouts[".*attention/attention_output/kernel"] = ("model", None, None)
    layouts["(.*_up|head)/kernel"] = (None, "model")
    layouts["(.*_up|head)/bias"] = ("model",)
    layouts[".*_down/kernel"] = ("model", None)
    return layouts


def llama() -> keras.Model:
    from keras_hub.models import LlamaBackbone

    backbone = LlamaBackbone(
        vocabulary_size=TOKENS,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    )
    return with_logits(backbone)


def gemma() -> keras.Model:
    from keras_hub.models import GemmaBackbone

    backbone = GemmaBackbone(
        vocabulary_size=TOKENS,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=128,
        head_dim=8,
    )
    return with_logits(backbone)


def with_logits(backbone: keras.Model) -> keras.Model:
    return keras.Model(backbone.inputs, backbone.token_embedding(backbone.output, reverse=True), name="causal_lm")


def hub_layout(name: str, mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    import keras_hub

    return getattr(keras_hub.models, f"{name.title()}Backbone").get_layout_map(mesh)


def main(name: str, shape: tuple[int, int]) -> None:
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), keras.distribution.list_devices())
    layout_map = gpt_layout(mesh) if name == "gpt" else hub_layout(name, mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch", auto_shard_dataset=True)
    )
    model = {"gpt": build_gpt, "llama": llama, "gemma": gemma}[name]()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        around = 1.0 if variable.name in ("gamma", "scale") else 0.0
        variable.assign(around + 0.1 * rng.standard_normal(variable.shape).astype("float32"))
    tokens = rng.integers(0, TOKENS, (STEPS * BATCH, LENGTH + 1)).astype("int32")
    x: Any = tokens[:, :-1]
    if name != "gpt":
        x = {"token_ids": x, "padding_mask": np.ones_like(x)}
    losses = Losses()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, tokens[:, 1:], batch_size=BATCH, shuffle=False, verbose=0, callbacks=[losses])
    print(json.dumps({"losses": losses.losses}), flush=True)


if __name__ == "__main__":
    rows, columns = sys.argv[2].split("x")
    main(sys.argv[1], (int(rows), int(columns)))
