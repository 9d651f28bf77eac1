"""What a GGUF file says of its model, as a configuration of transformers and names of tensors.

Only families whose layers are known here are converted; whatever has a key or a tensor that would
change the arithmetic and is not known is refused, for a model that is a little wrong still talks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmos.kernel.errors import BadInput
from llmos.services.pull.gguf_file import GgufFile, Tensor

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
_NORMS = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = re.compile(r"blk\.(\d+)\.(.+)")

# Not a weight: by how much each frequency of the rotation is slowed down.
_ROPE_FACTORS = "rope_freqs.weight"

# How Llama 3 stretched its context (low_freq_factor, high_freq_factor, original context); a GGUF
# file has only what came out of it.
_LLAMA3 = (1.0, 4.0, 8192)


@dataclass(frozen=True)
class Family:
    """A GGUF architecture, and what it is called in transformers."""

    model_type: str
    architecture: str
    layer: dict[str, str]
    rotated: bool = False  # llama.cpp stores the rows of q and k in another order
    extra: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _LAYER, True,
                    (("attention_bias", False), ("mlp_bias", False))),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LAYER | _BIASES,
                    extra=(("use_sliding_window", False),)),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _LAYER | _NORMS,
                    extra=(("attention_bias", False), ("use_sliding_window", False))),
}  # fmt: skip


def family_of(file: GgufFile) -> Family:
    """Raises BadInput for an architecture that is not known here."""
    name = str(file.key("general.architecture"))
    if name not in FAMILIES:
        raise BadInput(
            f"{file.path.name} is a {name} model; GGUF files of {', '.join(FAMILIES)} are read",
            "pull the model's safetensors instead: `llmos pull OWNER/NAME` from the hub",
        )
    return FAMILIES[name]


def config_of(file: GgufFile, dtype: str) -> dict[str, Any]:
    """The content of config.json. Raises BadInput."""
    family, of = family_of(file), _keys_of(file)
    _check_plain(file)
    rows, tokens = _tensor(file, "token_embd.weight").shape[0], len(_tokens(file))
    if tokens > rows:
        raise BadInput(f"{file.path.name} has {tokens} tokens and {rows} embeddings")
    heads = int(of("attention.head_count"))
    hidden = int(of("embedding_length"))
    head_dim = int(of("attention.key_length", of("rope.dimension_count", hidden // heads)))
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": int(of("feed_forward_length")),
        "num_hidden_layers": int(of("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(of("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(of("context_length")),
        # Stored in 32 bits: 1e-5 comes back as 9.9999997e-06.
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": _rope(file, head_dim),
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": True,
        "dtype": dtype,
        **dict(family.extra),
        **ids_of(file),
    }


def ids_of(file: GgufFile) -> dict[str, Any]:
    """The special tokens that generation needs, by number."""
    bos, eos = file.keys.get("tokenizer.ggml.bos_token_id"), eos_ids(file)
    pad = file.keys.get("tokenizer.ggml.padding_token_id", eos[0] if eos else None)
    found = {"bos_token_id": bos, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    return {**found, "pad_token_id": pad}


def eos_ids(file: GgufFile) -> list[int]:
    """The tokens after which a text has ended: of a document, and of a turn."""
    keys = (file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(int(key) for key in keys if key is not None))


def names_of(file: GgufFile) -> dict[str, str]:
    """Each tensor's name in transformers, by its name here. Raises BadInput for one more or less
    than the model has."""
    family = family_of(file)
    layers = int(_keys_of(file)("block_count"))
    wanted = dict(_OUTSIDE)
    for n in range(layers):
        wanted |= {f"blk.{n}.{a}": f"model.layers.{n}.{b}" for a, b in family.layer.items()}
    if "output.weight" not in file.tensors:
        del wanted["output.weight"]
    unknown = sorted(set(file.tensors) - set(wanted) - {_ROPE_FACTORS})
    if unknown:
        raise BadInput(
            f"{file.path.name} has {unknown[0]}, which a {family.model_type} model has not",
            "pull the model's safetensors instead: `llmos pull OWNER/NAME` from the hub",
        )
    missing = sorted(set(wanted) - set(file.tensors))
    if missing:
        raise BadInput(f"{file.path.name} has no tensor {missing[0]}: it is not a whole model",
                       "a model in several .gguf files cannot be pulled")  # fmt: skip
    return wanted


def row_order(file: GgufFile, tensor: Tensor) -> np.ndarray[Any, Any]:
    """Which stored row each row of the model is."""
    rows = tensor.nbytes // tensor.row_bytes
    order = np.arange(rows)
    found = _OF_LAYER.fullmatch(tensor.name)
    if found is None or not family_of(file).rotated:
        return order
    of, heads = _keys_of(file), 0
    if found[2] == "attn_q.weight":
        heads = int(of("attention.head_count"))
    elif found[2] == "attn_k.weight":
        heads = int(of("attention.head_count_kv", of("attention.head_count")))
    if not heads:
        return order
    # Pairs that are rotated together lie side by side there, half a head apart here.
    return order.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_plain(file: GgufFile) -> None:
    of = _keys_of(file)
    if int(of("expert_count", 0)):
        raise BadInput(f"{file.path.name} is a mixture of experts, which cannot be converted yet",
                       "pull the model's safetensors instead")  # fmt: skip
    if "adapter.type" in file.keys:
        raise BadInput(f"{file.path.name} is an adapter, not a model")


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    of = _keys_of(file)
    theta = float(of("rope.freq_base", 10000.0))
    kind = str(of("rope.scaling.type", "none"))
    if _ROPE_FACTORS in file.tensors:
        return _llama3(file, theta, head_dim)
    if kind == "linear":
        factor = float(of("rope.scaling.factor", 1.0))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        raise BadInput(
            f"{file.path.name} stretches its context by {kind!r}, which cannot be converted yet",
            "pull the model's safetensors instead",
        )
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters that the factors of Llama 3 were computed from. Raises BadInput."""
    tensor = file.tensors[_ROPE_FACTORS]
    stored = file.rows(tensor, np.arange(1)).view(np.float32).reshape(-1)
    low, high, original = _LLAMA3
    factor = float(np.round(stored.max()))
    made = llama3_factors(theta, head_dim, factor, low, high, original)
    if stored.shape != made.shape or not np.allclose(stored, made, rtol=1e-3):
        raise BadInput(
            f"{file.path.name} stretches its context in a way that is not known here",
            "pull the model's safetensors instead",
        )
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": original,
    }  # fmt: skip


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray[Any, Any]:
    """By how much Llama 3 divides each frequency (float32 [head_dim / 2])."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(
        waves < original / high, 1.0, np.where(waves > original / low, factor, between)
    )
    return found.astype(np.float32)


def _tokens(file: GgufFile) -> list[Any]:
    found = file.key("tokenizer.ggml.tokens")
    return found if isinstance(found, list) else []


def _tensor(file: GgufFile, name: str) -> Tensor:
    if name not in file.tensors:
        raise BadInput(f"{file.path.name} has no tensor {name}: it is not a whole model")
    return file.tensors[name]


def _keys_of(file: GgufFile) -> Any:
    """Keys of the model's own architecture, by what follows its name."""
    prefix = str(file.key("general.architecture"))
    return lambda name, default=None: file.key(f"{prefix}.{name}", default)
