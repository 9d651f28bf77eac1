"""GGUF files of small models, written by the `gguf` package from model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.torch import load_file

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{x}_proj.{kind}": f"attn_{x}.{kind}" for x in "qkv" for kind in
       ("weight", "bias")},
    **{f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"},
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
}  # fmt: skip
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
TYPES = gguf.GGMLQuantizationType


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    arch: str = "llama",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """The model in `folder` as a GGUF file; matrices in the ggml type `kind`. `keys` replaces or
    (with None) leaves out keys, `tensors` adds or (with an empty array) leaves out tensors."""
    config = json.loads((folder / "config.json").read_text())
    wanted = {**_model_keys(config, arch), **_tokenizer_keys(folder), **(keys or {})}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in wanted.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    weights = {
        _name(name): value.float().numpy()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    if arch == "llama":
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        for name, count in (("attn_q", heads[0]), ("attn_k", heads[1])):
            for n in range(config["num_hidden_layers"]):
                key = f"blk.{n}.{name}.weight"
                weights[key] = _rotated(weights[key], count)
    for name, value in {**weights, **(tensors or {})}.items():
        if value.size:
            _add_tensor(writer, name, value, kind if value.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray[Any, Any], kind: str) -> None:
    value = value.astype(np.float32)
    if kind == "F32":
        writer.add_tensor(name, value)
    else:
        writer.add_tensor(name, quantize(value, TYPES[kind]), raw_dtype=TYPES[kind])


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            writer.add_string(key, str(value))


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_LAYER[rest]}"


def _rotated(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter has it (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = weight.shape[0]
    return (
        weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _model_keys(config: dict[str, Any], arch: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config
    return {
        "general.license": "apache-2.0",
        f"{arch}.vocab_size": config["vocab_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config.get("head_dim"),
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }


def _tokenizer_keys(folder: Path) -> dict[str, Any]:
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(made["model"]["vocab"].items(), key=lambda item: item[1])
    special = {t["content"] for t in made["added_tokens"] if t["special"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["model"]["merges"]]
    template = folder / "chat_template.jinja"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": template.read_text() if template.exists() else None,
    }
