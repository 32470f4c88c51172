"""Folders as Hugging Face has them: a config and safetensors by their published names, with random values, small."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY, LAYERS, WIDTH, HEADS, GROUPS, LENGTH = 64, 2, 32, 8, 4, 16
Shapes = dict[str, tuple[int, ...]]
ROPE = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _decoder(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a Llama; Gemma, Qwen and Mistral have the same names."""
    width, size = config["hidden_size"], config["vocab_size"]
    inner, head = config["intermediate_size"], config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {"model.embed_tokens.weight": (size, width), "model.norm.weight": (width,)}
    for number in range(config["num_hidden_layers"]):
        block = f"model.layers.{number}."
        shapes |= {block + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[block + f"self_attn.{name}_proj.weight"] = (rows, width)
            if config["model_type"] == "qwen2":
                shapes[block + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[block + "self_attn.o_proj.weight"] = (width, queries)
        shapes |= {block + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[block + "mlp.down_proj.weight"] = (width, inner)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (size, width)
    return shapes


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    width = config["n_embd"]
    shapes: Shapes = {"wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width)}
    shapes |= _norm("ln_f", width)
    for number in range(config["n_layer"]):
        block = f"h.{number}."
        shapes |= _norm(block + "ln_1", width) | _norm(block + "ln_2", width)
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {block + name + ".weight": (rows, columns), block + name + ".bias": (columns,)}
    return shapes


def _bert(config: Mapping[str, Any]) -> Shapes:
    width, inner = config["hidden_size"], config["intermediate_size"]
    tables = {
        "word": config["vocab_size"],
        "position": config["max_position_embeddings"],
        "token_type": config["type_vocab_size"],
    }
    shapes: Shapes = {f"bert.embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    shapes |= _norm("bert.embeddings.LayerNorm", width) | _linear("bert.pooler.dense", width, width)
    for number in range(config["num_hidden_layers"]):
        block = f"bert.encoder.layer.{number}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= _linear(block + name, width, width)
        shapes |= _linear(block + "intermediate.dense", inner, width) | _linear(block + "output.dense", width, inner)
        shapes |= _norm(block + "attention.output.LayerNorm", width) | _norm(block + "output.LayerNorm", width)
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


# By family of tests/families.py: the config, what names its tensors, and the dtype they are stored in.
FOLDERS: dict[str, tuple[dict[str, Any], Callable[[Mapping[str, Any]], Shapes], torch.dtype]] = {
    "llama3": ({"model_type": "llama", **ROPE}, _decoder, torch.bfloat16),
    "gemma": (
        {"model_type": "gemma", **ROPE, "head_dim": 8, "tie_word_embeddings": True},
        _decoder,
        torch.float32,
    ),
    "qwen2.5": (
        {
            "model_type": "qwen2",
            **ROPE,
            "use_sliding_window": False,
            "sliding_window": LENGTH,
            "tie_word_embeddings": True,
        },
        _decoder,
        torch.bfloat16,
    ),
    "mistral": ({"model_type": "mistral", **ROPE, "sliding_window": 4}, _decoder, torch.bfloat16),
    "gpt2": (
        {
            "model_type": "gpt2",
            "vocab_size": VOCABULARY,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_embd": WIDTH,
            "n_positions": LENGTH,
            "resid_pdrop": 0.0,
        },
        _gpt2,
        torch.float32,
    ),
    "bert": (
        {
            "model_type": "bert",
            "vocab_size": VOCABULARY,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "max_position_embeddings": LENGTH,
            "type_vocab_size": 2,
        },
        _bert,
        torch.float32,
    ),
}
IN_TWO_FILES = ("llama3", "gpt2")


def write_folder(name: str, folder: Path, **sizes: Any) -> None:
    """Write a family's folder, with an index where it has two files; ``sizes`` replace those of the config."""
    config, shapes_of, dtype = FOLDERS[name]
    config = {**config, **sizes, "architectures": ["AnyModel"]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape).to(dtype) for key, shape in shapes_of(config).items()}
    if name not in IN_TWO_FILES:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {f"model-0000{number + 1}-of-00002.safetensors": sorted(tensors)[number::2] for number in range(2)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
