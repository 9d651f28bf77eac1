# ruff: noqa: TID253  (imported lazily, by workers only)
"""Causal language models on torch's RNN, LSTM and GRU, as ordinary transformers models.

Importing this module registers them with the Auto classes, so that everything loads, serves
and fine-tunes them like any other model. It does not know training or serving.
"""

from __future__ import annotations

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

    `hidden` has shape (layers, batch, hidden_size), for an LSTM a pair of such tensors.
    """

    hidden: Hidden
    seen_tokens: int = 0
    is_compileable: ClassVar[bool] = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows follow their beams (beam search)."""
        self.hidden = _map(self.hidden, lambda t: t.index_select(1, beam_idx.to(t.device)))


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Embedding, stacked recurrent layers, norm, output matrix."""

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
        self.rnn = self.cell(
            width,
            width,
            layers,
            batch_first=True,
            dropout=config.dropout if layers > 1 else 0.0,
        )
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
        hidden = None if past_key_values is None else past_key_values.hidden
        mask = None if attention_mask is None else attention_mask[:, -embedded.shape[1] :]
        if mask is not None and not bool(mask.all()):
            output, hidden = self._run_masked(self.dropout(embedded), hidden, mask)
        else:
            output, hidden = self.rnn(self.dropout(embedded), hidden)
        output = self.dropout(self.norm(output[:, -logits_to_keep:]))
        logits = self.lm_head(output)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        state = None
        if use_cache if use_cache is not None else self.config.use_cache:
            seen = 0 if past_key_values is None else past_key_values.seen_tokens
            state = RecurrentState(hidden, seen + embedded.shape[1])
        # The state is no attention cache, but what the field is for.
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=state,  # type: ignore[arg-type]
        )

    def _run_masked(
        self, embedded: torch.Tensor, hidden: Hidden | None, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Hidden]:
        """Run each row over its real tokens only, wherever they stand."""
        lengths = mask.sum(1)
        if int(lengths.min()) == 0:
            raise ValueError("a row of attention_mask hides every token")
        # A stable sort brings the real tokens of each row to the front, in their order.
        front = mask.to(torch.int64).argsort(dim=1, descending=True, stable=True)
        places = front.unsqueeze(-1).expand_as(embedded)
        packed = nn.utils.rnn.pack_padded_sequence(
            embedded.gather(1, places), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        ran, hidden = self.rnn(packed, hidden)
        output, _ = nn.utils.rnn.pad_packed_sequence(
            ran, batch_first=True, total_length=embedded.shape[1]
        )
        return torch.zeros_like(output).scatter(1, places, output), hidden

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
            self._open_forget_gates(module)

    def _open_forget_gates(self, module: nn.LSTM) -> None:
        """Bias 1 on the forget gates: an LSTM remembers by default (Jozefowicz et al. 2015)."""
        width = module.hidden_size
        for layer in range(module.num_layers):
            bias = getattr(module, f"bias_ih_l{layer}")
            init.ones_(bias[width : 2 * width])

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


def _map(hidden: Hidden, function: Any) -> Hidden:
    if isinstance(hidden, tuple):
        return function(hidden[0]), function(hidden[1])
    mapped: torch.Tensor = function(hidden)
    return mapped


for _config, _model in (
    (RnnConfig, RnnForCausalLM),
    (LstmConfig, LstmForCausalLM),
    (GruConfig, GruForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
