"""The recurrent models behave like any other model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmos.services.model.recurrent as recurrent
from llmos.services.model.families import RECURRENT
from llmos.services.model.load import load_causal_lm
from support.texts import toy_model

ARCHITECTURES = sorted(RECURRENT)
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
PROMPT = torch.tensor([[5, 6, 7, 8]])


def lively(architecture: str, tied: bool = False) -> recurrent.RecurrentForCausalLM:
    """A model whose tokens depend on what came before: wide weights, no training."""
    torch.manual_seed(0)
    config = RECURRENT[architecture](
        vocab_size=300,
        hidden_size=32,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        **SPECIAL,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(model, recurrent.RecurrentForCausalLM)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_loads_with_the_auto_classes_bit_for_bit(
    architecture: str, tmp_path: Path
) -> None:
    model = lively(architecture)
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, "float32")
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_output_matrix_is_stored_once(architecture: str, tmp_path: Path) -> None:
    lively(architecture, tied=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_causal_lm(tmp_path, "float32")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generating_with_the_state_gives_what_reading_everything_again_gives(
    architecture: str,
) -> None:
    model = lively(architecture)
    cached = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    plain = model.generate(PROMPT, max_new_tokens=12, do_sample=False, use_cache=False)
    assert cached.tolist() == plain.tolist()
    assert len(set(cached[0].tolist())) > 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_loop_can_carry_the_state(architecture: str) -> None:
    model = lively(architecture)
    want = model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    ids, state, got = PROMPT, None, []
    for _ in range(len(want)):
        out = model(input_ids=ids, past_key_values=state, use_cache=True)
        state, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        got.append(int(ids))
    assert got == want
    assert state is not None
    assert state.get_seq_length() == 4 + len(want) - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(architecture: str, side: str) -> None:
    model = lively(architecture)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    alone = model(input_ids=ids[:1, :2]).logits[0, -1]
    row = [3, 3, 5, 6] if side == "left" else [5, 6, 3, 3]
    mask = [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]
    ids[0] = torch.tensor(row)
    both = torch.tensor([mask, [1, 1, 1, 1]])
    logits = model(input_ids=ids, attention_mask=both).logits
    torch.testing.assert_close(logits[0, 3 if side == "left" else 1], alone)


def test_beams_carry_their_own_state() -> None:
    model = lively("lstm")
    with torch.no_grad():
        with_state = model.generate(PROMPT, max_new_tokens=6, num_beams=3, do_sample=False)
        without = model.generate(
            PROMPT, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False
        )
    assert with_state.tolist() == without.tolist()


def test_an_untied_model_keeps_two_matrices(tmp_path: Path) -> None:
    config = recurrent.GruConfig(vocab_size=300, hidden_size=16, tie_word_embeddings=False)
    recurrent.GruForCausalLM(config).save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, "float32")
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight


def test_the_loss_of_labels_is_the_shifted_cross_entropy() -> None:
    model = lively("gru")
    out = model(input_ids=PROMPT, labels=PROMPT)
    want = torch.nn.functional.cross_entropy(out.logits[0, :-1], PROMPT[0, 1:])
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "transformer"])
def test_every_family_makes_a_model_folder_with_its_tokenizer(
    architecture: str, tmp_path: Path
) -> None:
    toy_model(tmp_path, architecture)
    model = load_causal_lm(tmp_path, "float32")
    logits = model(input_ids=PROMPT).logits
    assert logits.shape == (1, 4, model.config.vocab_size)
    assert torch.isfinite(logits).all()
