# ruff: noqa: TID253  (imported lazily, by workers only)
"""Causal language models on torch's RNN, LSTM and GRU, as ordinary transformers models.

Importing this module registers them with the Auto classes, so that everything loads, serves
and fine-tunes them like any other model. It does not know training or serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

# What nn.LSTM carries from token to token is a pair, the other two carry one tensor.
Hidden = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class RecurrentConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Shape of a recurrent language model; the subclasses differ in the cell only.

    The embedding and the hidden state are equally wide, so that the embedding can be the output
    matrix too (`tie_word_embeddings`).
    """

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 2
    dropout: float = 0.0
    initializer_range: float = 0.02
    max_position_embeddings: int = 1 << 20  # no limit of its own: the state has a fixed size
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class RnnConfig(RecurrentConfig):  # type: ignore[no-untyped-call]
    model_type = "llmos_rnn"


class LstmConfig(RecurrentConfig):  # type: ignore[no-untyped-call]
    model_type = "llmos_lstm"


class GruConfig(RecurrentConfig):  # type: ignore[no-untyped-call]
    model_type = "llmos_gru"


@dataclass
class RecurrentState:
    """What a recurrent model remembers: the counterpart of a KV cache, of a fixed size.

    `layers` has one entry a layer: a tensor (1, batch, hidden_size), for an LSTM a pair of them.
    """

    layers: list[Hidden]
    seen_tokens: int = 0
    is_compileable: ClassVar[bool] = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows follow their beams (beam search)."""
        self.layers = [_reorder(hidden, beam_idx) for hidden in self.layers]

    @classmethod
    def joined(cls, states: Sequence[RecurrentState]) -> RecurrentState:
        """Those of several texts as one batch. What was seen is that of the first."""
        layers: list[Hidden] = []
        for same in zip(*(state.layers for state in states), strict=True):
            if isinstance(same[0], tuple):
                layers.append(
                    (torch.cat([h[0] for h in same], 1), torch.cat([h[1] for h in same], 1))
                )
            else:
                layers.append(torch.cat(same, 1))
        return cls(layers, states[0].seen_tokens)

    def parted(self) -> list[RecurrentState]:
        """Each row of the batch as a state of its own."""
        first = self.layers[0]
        rows = (first[0] if isinstance(first, tuple) else first).shape[1]
        index = torch.split(torch.arange(rows), 1)
        return [
            RecurrentState([_reorder(h, row) for h in self.layers], self.seen_tokens)
            for row in index
        ]


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Embedding, residual recurrent layers with a norm before each, norm, output matrix.

    Without the norms and the sums a stack of four cells learns nothing in its first hundreds of
    steps (tried on tinyshakespeare).
    """

    config_class = RecurrentConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _supports_sdpa = True  # there is no attention: any implementation is right
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012  (their name)
    cell: ClassVar[type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]]

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        width, layers = config.hidden_size, config.num_hidden_layers
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, width)
        self.cells = nn.ModuleList(self.cell(width, width, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width)
        self.lm_head: nn.Module = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocab_size), the last `logits_to_keep` only where it is > 0.

        `attention_mask` (batch, all tokens so far) may hide padding on either side of a prompt;
        hidden tokens do not touch the state.
        """
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask[:, -embedded.shape[1] :]
        past = None if past_key_values is None else past_key_values.layers
        if mask is not None and not bool(mask.all()):
            output, layers = self._run_masked(embedded, past, mask)
        else:
            output, layers = self._run(embedded, past, None)
        output = self.dropout(self.norm(output[:, -logits_to_keep:]))
        logits = self.lm_head(output)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        state = None
        if use_cache if use_cache is not None else self.config.use_cache:
            seen = 0 if past_key_values is None else past_key_values.seen_tokens
            state = RecurrentState(layers, seen + embedded.shape[1])
        # The state is no attention cache, but what the field is for.
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=state,  # type: ignore[arg-type]
        )

    def _run(
        self, x: torch.Tensor, past: list[Hidden] | None, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Hidden]]:
        """All layers over x (batch, tokens, width); `lengths` (batch,) where rows end earlier."""
        x = self.dropout(x)
        layers: list[Hidden] = []
        for i, (norm, cell) in enumerate(zip(self.norms, self.cells, strict=True)):
            before = None if past is None else past[i]
            if lengths is None:
                ran, hidden = _step(cell, norm(x), before)
            else:
                rows = nn.utils.rnn.pack_padded_sequence(
                    norm(x), lengths, batch_first=True, enforce_sorted=False
                )
                packed, hidden = _step(cell, rows, before)
                ran, _ = nn.utils.rnn.pad_packed_sequence(
                    packed, batch_first=True, total_length=x.shape[1]
                )
            x = x + self.dropout(ran)
            layers.append(hidden)
        return x, layers

    def _run_masked(
        self, embedded: torch.Tensor, past: list[Hidden] | None, mask: torch.Tensor
    ) -> tuple[torch.Tensor, list[Hidden]]:
        """Run each row over its real tokens only, wherever they stand."""
        lengths = mask.sum(1).cpu()
        if int(lengths.min()) == 0:
            raise ValueError("a row of attention_mask hides every token")
        # A stable sort brings the real tokens of each row to the front, in their order.
        front = mask.to(torch.int64).argsort(dim=1, descending=True, stable=True)
        places = front.unsqueeze(-1).expand_as(embedded)
        output, layers = self._run(embedded.gather(1, places), past, lengths)
        return torch.zeros_like(output).scatter(1, places, output), layers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.RNNBase):
            super()._init_weights(module)  # type: ignore[no-untyped-call]
            return
        for name, parameter in module.named_parameters():
            if "weight_hh" in name:
                # Orthogonal per gate: the state neither grows nor fades at the start
                # (Saxe et al. 2014).
                for gate in torch.split(parameter, module.hidden_size):
                    init.orthogonal_(gate)
            elif "weight" in name:
                init.xavier_uniform_(parameter)
            else:
                init.zeros_(parameter)
        if isinstance(module, nn.LSTM):
            # An LSTM remembers by default (Jozefowicz et al. 2015): forget gates open.
            width = module.hidden_size
            biases = torch.split(module.get_parameter("bias_ih_l0"), width)
            init.ones_(biases[1])

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` must not hand in an attention cache: the first forward makes the state.
        return False


class RnnForCausalLM(RecurrentForCausalLM):  # type: ignore[no-untyped-call]
    config_class = RnnConfig
    cell = nn.RNN


class LstmForCausalLM(RecurrentForCausalLM):  # type: ignore[no-untyped-call]
    config_class = LstmConfig
    cell = nn.LSTM


class GruForCausalLM(RecurrentForCausalLM):  # type: ignore[no-untyped-call]
    config_class = GruConfig
    cell = nn.GRU


def _reorder(hidden: Hidden, rows: torch.Tensor) -> Hidden:
    if isinstance(hidden, tuple):
        return hidden[0].index_select(1, rows), hidden[1].index_select(1, rows)
    return hidden.index_select(1, rows)


for _config, _model in (
    (RnnConfig, RnnForCausalLM),
    (LstmConfig, LstmForCausalLM),
    (GruConfig, GruForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def _step(cell: nn.Module, rows: Any, before: Any) -> Any:
    """Run a layer. Under bfloat16 autocast on a CPU torch gives an LSTM to oneDNN, which has none
    in bfloat16 for older processors and fails: there its products stay float32."""
    if isinstance(cell, nn.LSTM) and not _bf16_lstm():
        with torch.autocast("cpu", enabled=False):
            return cell(rows, before)
    return cell(rows, before)


def _bf16_lstm() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
