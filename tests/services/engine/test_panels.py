"""Products with weights in panels are those with the weights as they were, for any shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmos.services.engine import layout
from llmos.services.engine.arranged import arranged, bind, fill, settle, size_of
from llmos.services.engine.native import weights as native
from llmos.services.engine.panels import PanelEmbedding, PanelLinear, PanelNorm, Panels, panel_bytes

SHAPES = [(32, 4), (1, 1), (33, 7), (70, 130), (288, 96), (96, 288)]
TOKENS = [0, 1, 2, 5, 6, 7, 8, 13, 16, 17, 32, 33, 100]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if native.kernels() is None:
        pytest.skip(f"no kernels here: {native.why_not()}")


def in_panels(weight: Tensor, kind: str) -> Panels:
    panels = Panels(*weight.shape, kind)
    for name, buffer in list(panels.named_buffers()):
        panels._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    panels.fill(weight)
    return panels


def linear(weight: Tensor, bias: Tensor | None, kind: str, wide: bool = False) -> PanelLinear:
    made = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer = PanelLinear(in_panels(weight, kind), made, wide)
    layer.settle()
    return layer


def whole_numbers(weight: Tensor) -> Tensor:
    """What int8 keeps of a weight."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales.clamp(min=1e-30)).round() * scales


def needs(kind: str) -> None:
    found = native.kernels()
    assert found is not None
    if kind not in found.kinds:
        pytest.skip(f"this processor does not multiply {kind}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.float32),
     ("int8", torch.bfloat16)],
)  # fmt: skip
def test_products(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    needs(kind)
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype).float()
    bias = torch.randn(shape[0]).to(dtype)
    numbers = whole_numbers(weight) if kind == "int8" else weight
    for layer in (linear(weight, bias, kind, wide=True), linear(weight, bias, kind)):
        for tokens in TOKENS:
            values = torch.randn(1, tokens, shape[1]).to(dtype)
            expected = nn.functional.linear(values.double(), numbers.double(), bias.double())
            found = layer(values)
            rounding = 4e-3 if found.dtype == torch.bfloat16 else 5e-5 if kind == "int8" else 2e-6
            lengths = values.double().norm(dim=-1).sum() * numbers.double().norm(dim=-1).max()
            torch.testing.assert_close(
                found.double(), expected, rtol=rounding, atol=rounding * float(lengths)
            )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_numbers(threads: int) -> None:
    before = torch.get_num_threads()
    weight, values = torch.randn(300, 64), torch.randn(2, 40, 64)
    layer = linear(weight, None, "float32")
    expected = layer(values)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(layer(values), expected)
    finally:
        torch.set_num_threads(before)


def test_without_the_matrix_unit_a_token_has_the_same_numbers_among_any() -> None:
    needs("bfloat16")
    torch.manual_seed(0)
    layer = linear(torch.randn(96, 64).bfloat16().float(), None, "bfloat16", wide=True)
    values = torch.randn(40, 64).bfloat16()
    with native.alone():
        apart = torch.cat([layer(row[None]) for row in values])
        assert torch.equal(layer(values), apart)
    torch.testing.assert_close(layer(values), apart, rtol=2e-6, atol=2e-5)


def test_int8_of_a_row_of_zeros_is_zero_and_a_nan_is_not_hidden() -> None:
    weight = torch.randn(40, 16)
    weight[3] = 0
    layer = linear(weight, None, "int8")
    assert not layer(torch.randn(5, 16))[:, 3].any()
    assert not layer(torch.zeros(5, 16)).any()
    whole = linear(weight, None, "float32")
    assert whole(torch.full((1, 16), float("nan"))).isnan().all()


def test_tokens_of_another_type_or_size_are_refused() -> None:
    layer = linear(torch.randn(40, 16), None, "float32")
    for values in (torch.randn(3, 17), torch.randn(3, 16).double(), torch.randn(3, 16).bfloat16()):
        with pytest.raises(TypeError, match="16"):
            layer(values)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_an_embedding_has_the_numbers_of_the_last_layer(kind: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weight = torch.randn(70, 33).to(dtype)
    embedding = PanelEmbedding(in_panels(weight, kind), dtype)
    embedding.settle()
    ids = torch.tensor([[0, 69, 31, 32], [1, 1, 2, 64]])
    expected = whole_numbers(weight.float()) if kind == "int8" else weight
    torch.testing.assert_close(embedding(ids), expected[ids].to(dtype))
    assert embedding.weight.shape == (70, 33)
    for outside in (70, -1):
        with pytest.raises(IndexError, match="70"):
            embedding(torch.tensor([0, outside]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(50).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    values = (torch.randn(1, 9, 50) * 3).to(dtype)
    made = PanelNorm(norm)
    made.settle()
    # bfloat16: a sum in another order may round a number the other way.
    tolerance = {"rtol": 8e-3, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(made(values), norm(values), **tolerance)


def test_what_panels_take_is_known_before() -> None:
    for kind in native.KINDS:
        panels = Panels(70, 33, kind)
        assert panel_bytes(70, 33, kind) == sum(b.nbytes for b in panels.buffers())


# ---- whole models ----

SMALL: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip

TYPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    ("mistral", {"sliding_window": 5, "head_dim": 12}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("smollm3", {"num_hidden_layers": 4}),
    ("phi3", {}),
    ("gemma", {"head_dim": 12}),
    ("gemma2", {"head_dim": 12}),
    ("gemma3_text", {"head_dim": 12}),
    ("cohere", {}),
    ("granite", {}),
    ("olmo", {}),
    ("olmo2", {}),
    ("stablelm", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    ("starcoder2", {}),
    ("phi", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    ("gpt_neox", {"num_attention_heads": 3}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
]
NAMES = [f"{name}-{len(more)}" for name, more in TYPES]
FUSED = [pair for pair in TYPES if pair[0] in ("llama", "mistral", "qwen2", "qwen3", "smollm3")]


def both(model_type: str, more: dict[str, Any], kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model as transformers makes it, and the same in panels."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **more})
    source = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in source.parameters():  # norms and biases are else all the same
        with torch.no_grad():
            parameter += 0.05 * torch.randn_like(parameter)
    model = arranged(config, kind, dtype)
    bind(model, torch.zeros(size_of(model), dtype=torch.uint8))
    fill(model, source)
    settle(model)
    return source, model


@pytest.mark.parametrize(("model_type", "more"), TYPES, ids=NAMES)
def test_scores_of_models_are_those_of_transformers(model_type: str, more: dict[str, Any]) -> None:
    source, model = both(model_type, more, "float32", torch.float32)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 23))
    with torch.inference_mode():
        expected, found = source(input_ids=ids).logits, model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        out = model(input_ids=ids[:, :9], use_cache=True)
        rest = model(input_ids=ids[:, 9:], past_key_values=out.past_key_values, use_cache=True)
        torch.testing.assert_close(rest.logits, expected[:, 9:], rtol=1e-4, atol=1e-4)
    assert (model.dtype, model.device) == (source.dtype, source.device)


@pytest.mark.parametrize(("model_type", "more"), FUSED, ids=[name for name, _ in FUSED])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    model_type: str, more: dict[str, Any]
) -> None:
    needs("bfloat16")
    source, model = both(model_type, more, "bfloat16", torch.bfloat16)
    ids = torch.randint(0, SMALL["vocab_size"], (1, 50))
    with torch.inference_mode():
        usual, found = source(input_ids=ids).logits.float(), model(input_ids=ids).logits
        exact = source.float()(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1.3 * (usual - exact).norm()


@pytest.mark.parametrize("tokens", [7, 8, 9, 16, 17, 32, 33, 337])
def test_whole_layers_are_right_by_the_matrix_unit(tokens: int) -> None:
    needs("bfloat16")
    wide = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
    source, model = both("llama", wide, "bfloat16", torch.bfloat16)
    ids = torch.randint(0, SMALL["vocab_size"], (1, tokens))
    before = torch.get_num_threads()
    with torch.inference_mode():
        usual, found = source(input_ids=ids).logits.float(), model(input_ids=ids).logits
        exact = source.float()(input_ids=ids).logits
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(model(input_ids=ids).logits, found)
        finally:
            torch.set_num_threads(before)
    assert (found - exact).norm() < 1.3 * (usual - exact).norm()


def test_layers_run_apart_where_somebody_has_put_something_around_a_module() -> None:
    source, model = both("llama", {}, "float32", torch.float32)
    ids = torch.randint(0, SMALL["vocab_size"], (1, 5))
    calls = []
    layer = model.model.layers[0].self_attn.q_proj
    plain = layer.forward

    def around(values: Tensor) -> Tensor:
        calls.append(values.shape)
        return plain(values)

    with torch.inference_mode():
        expected = source(input_ids=ids).logits
        layer.forward = around
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1
        # Adapters: nothing is added to this row, or the kernels cannot add it.
        layer.adapting = SimpleNamespace(adapted=lambda names, tokens: 0)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1
        layer.adapting = SimpleNamespace(adapted=lambda names, tokens: None)
        model(input_ids=ids)
        assert len(calls) == 2
        del layer.forward
        hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(0))
        model(input_ids=ids)
        assert len(calls) == 3
        hook.remove()


def test_int8_without_kernels_has_the_same_numbers() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 70)
    expected = nn.functional.linear(
        (values := torch.randn(3, 48)), whole_numbers(plain.weight.detach()), plain.bias
    )
    torch.testing.assert_close(
        layout.Int8Linear(plain)(values).detach(), expected.detach(), rtol=1e-4, atol=1e-4
    )
    half = layout.Int8Linear(plain.to(torch.bfloat16))
    assert half(torch.empty(1, 0, 48, dtype=torch.bfloat16)).shape == (1, 0, 70)
    for tokens in (1, 40):  # torch's own kernel, and the weight made whole
        values = torch.randn(tokens, 48)
        near = nn.functional.linear(values, plain.weight.float(), plain.bias.float())
        assert (half(values.bfloat16()).float() - near).norm() < 0.03 * near.norm()


def test_a_config_of_another_activation_is_not_fused() -> None:
    config = LlamaConfig(**SMALL, hidden_act="gelu")
    source = AutoModelForCausalLM.from_config(config).eval()
    model = arranged(config, "float32", torch.float32)
    bind(model, torch.zeros(size_of(model), dtype=torch.uint8))
    fill(model, source)
    settle(model)
    assert "forward" not in model.model.layers[0].__dict__
    ids = torch.randint(0, 130, (1, 7))
    with torch.inference_mode():
        torch.testing.assert_close(
            model(input_ids=ids).logits, source(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
