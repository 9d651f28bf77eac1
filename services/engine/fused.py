"""The layers of decoders like Llama in two calls: one before attention, one behind it.

For a token at a time most of a layer's time is not that of its products, but of the thirty small
operations around them. These layers do the same in the same order (norm, queries and keys and
values, turn, attention, output, norm, gate and up, down), and call the engine's attention as
transformers does. Sums are rounded to the model's type where they leave a call, which is less often
than it was.

The modules inside stay, and are used one by one where somebody has put another in the place of one
of them, or something around it. Adapters (`adapting` beside the `forward` that they put there) are
asked what they add, and the kernels do it.
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmos.services.engine.native.weights import Layer
from llmos.services.engine.panels import PanelLinear, PanelNorm, ready

# Read in transformers 5.23: their layers differ in what they tell attention about a window, and in
# norms of each head (qwen3) and layers without positions (smollm3).
FUSED_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_INNER = ("gate_proj", "up_proj", "down_proj")


def fuse(model: Any) -> int:
    """Let the layers of a model with panels run in two calls -> how many do."""
    config = model.config
    if config.model_type not in FUSED_TYPES or config.hidden_act != "silu":
        return 0
    count, turns = 0, Turns()
    names = {module: name for name, module in model.named_modules()}
    for layer in model.base_model.layers:
        if _is_whole(layer):
            layer.forward = MethodType(FusedLayer(layer, config, turns, names), layer)
            count += 1
    return count


class Turns:
    """Cosines and sines as the kernels take them, made once for all layers of a forward."""

    def __init__(self) -> None:
        self._of: tuple[Tensor, Tensor] | None = None
        self._made: list[Tensor] = []

    def made(self, of: tuple[Tensor, Tensor], like: Tensor) -> list[Tensor]:
        """For tokens `like` (batch, tokens, width): each (batch, tokens, dim)."""
        if of is not self._of:
            wanted = *like.shape[:2], of[0].shape[-1]
            self._made = [part.to(like.dtype).expand(wanted).contiguous() for part in of]
            self._of = of
        return self._made


class FusedLayer:
    """The forward of one decoder layer."""

    def __init__(self, layer: Any, config: Any, turns: Turns, names: dict[Any, str]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._unfused: Callable[..., Tensor] = layer.forward
        self._attention, self._config = attention, config
        # What transformers takes where no other attention is asked for.
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward
        self._kernels, self._turns = ready(), turns
        self._dim = int(attention.head_dim)
        self._turned = bool(getattr(attention, "use_rope", True))
        self._window = _window(attention, config)
        linears = [getattr(attention, name) for name in _PROJECTIONS]
        linears += [getattr(mlp, name) for name in _INNER]
        self._widths = [linear.out_features for linear in linears[:3]]
        self._parts = [
            (holder, name, getattr(holder, name))
            for holder, names in ((attention, _PROJECTIONS), (mlp, _INNER))
            for name in names
        ]
        self._names = tuple(names[part] for _, _, part in self._parts)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        heads = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._dtype = norms[0].weight.dtype
        # Held here: the kernels have only addresses.
        self._norms = [None if n is None else n.weight for n in (*norms, *heads)]
        pointers = [None if w is None else w.data_ptr() for w in self._norms]
        self._layer = Layer(
            *(linear.matrix for linear in linears),
            *pointers,
            self._dim,
            norms[0].variance_epsilon,
        )
        self._at = ctypes.addressof(self._layer)

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        told = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}
        turns = position_embeddings if self._turned else None
        other = hidden_states.dtype != self._dtype or (
            turns is not None and turns[0].shape[-1] != self._dim
        )
        adapted = None if other else self._adapted(hidden_states.shape[:-1].numel())
        if adapted is None:
            return self._unfused(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **told,
            )
        values = hidden_states.contiguous()
        half, threads = values.dtype == torch.bfloat16, torch.get_num_threads()
        q, k, v = self._before(values, turns, adapted, half, threads)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self._attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self._config._attn_implementation, self._eager
        )
        attended = attend(
            self._attention,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self._attention.scaling,
            **self._window,
            **told,
        )[0].contiguous()
        out = torch.empty_like(values)
        self._kernels.after(
            self._at,
            adapted,
            attended.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            values.numel() // values.shape[-1],
            half,
            threads,
        )
        return out

    def _before(
        self,
        values: Tensor,
        turns: tuple[Tensor, Tensor] | None,
        adapted: int,
        half: bool,
        threads: int,
    ) -> list[Tensor]:
        """Tokens (batch, tokens, width) -> queries, keys, values (batch, heads, tokens, dim)."""
        batch, tokens, _ = values.shape
        made = [
            torch.empty(batch, tokens, width // self._dim, self._dim, dtype=values.dtype)
            for width in self._widths
        ]
        parts = [None, None] if turns is None else self._turns.made(turns, values)
        self._kernels.before(
            self._at,
            adapted,
            values.data_ptr(),
            *(None if part is None else part.data_ptr() for part in parts),
            *(part.data_ptr() for part in made),
            batch * tokens,
            half,
            threads,
        )
        return [part.transpose(1, 2) for part in made]

    def _adapted(self, tokens: int) -> int | None:
        """Where the kernels find what adapters add for the row that is computed; 0: nothing is.

        None: the modules inside are not those that were fused, or do not do what they did then.
        """
        adapting = None
        for holder, name, part in self._parts:
            if holder._modules[name] is not part or part._forward_hooks or part._forward_pre_hooks:
                return None
            if "forward" in part.__dict__:
                adapting = part.__dict__.get("adapting")
                if adapting is None:
                    return None
        found: int | None = 0 if adapting is None else adapting.adapted(self._names, tokens)
        return found


def _is_whole(layer: Any) -> bool:
    """Whether a layer is of the modules that its fused form stands for."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, name, None) for name in _PROJECTIONS]
    linears += [getattr(mlp, name, None) for name in _INNER]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return all(isinstance(part, PanelLinear) for part in linears) and all(
        isinstance(part, PanelNorm) for part in norms
    )


def _window(attention: Any, config: Any) -> dict[str, Any]:
    """What such a layer tells attention about its window."""
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": getattr(config, "sliding_window", None)}
    return {"sliding_window": attention.sliding_window}
