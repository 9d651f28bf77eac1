"""Adapters: a row of many gives what peft gives for each of them alone."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmos.kernel.errors import BadInput
from llmos.services.engine import weights
from llmos.services.engine.adapter_bank import Bank
from llmos.services.engine.adapter_plan import arrange, waste
from llmos.services.engine.adapters import Adapter, Adapters
from llmos.services.engine.layout import lay_out
from llmos.services.engine.native import weights as native
from llmos.services.engine.panels import PanelLinear
from llmos.services.model.load import load_causal_lm
from support.adapters import make_adapter, peft_model, write_with_peft
from support.small_models import VOCABULARY, make_gpt2, make_llama

# Every way in which peft lets an adapter say what it changes, by how much, and how wide.
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "wide": {"r": 24, "lora_alpha": 3},
    "names": {"target_modules": ["q_proj", "v_proj", "c_attn"], "r": 2},
    "regex": {"target_modules": r".*\.(layers|h)\.1\..*(o_proj|c_proj|down_proj)"},
    "patterns": {
        "rank_pattern": {"down_proj": 7, r".*\.0\.attn\.c_attn": 5},
        "alpha_pattern": {"q_proj": 1, "mlp.c_fc": 2},
    },
    "stabilized": {"use_rslora": True, "r": 5, "lora_alpha": 3},
    "one layer": {"target_modules": ["k_proj", "up_proj", "c_fc"], "layers_to_transform": [1]},
    "without": {"exclude_modules": ["q_proj", "c_attn"]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def folders(llama: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each form for each of the two models: "llama/all", ..."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        f"{kind}/{form}": write_with_peft(base, root / f"{kind}-{form}", seed=number, **config)
        for kind, base in (("llama", llama), ("gpt2", gpt2))
        for number, (form, config) in enumerate(FORMS.items())
    }


@pytest.fixture(params=["torch", "native", "fused"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By what adapters are computed: torch, a kernel for each layer, or with the base's layers."""
    found: str = request.param
    if found == "torch":
        monkeypatch.setattr("llmos.services.engine.adapter_bank.kernels", lambda: None)
        monkeypatch.setattr("llmos.services.engine.adapters.kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip(f"no kernels here: {native.why_not()}")
    return found


def loaded(
    base: Path, dtype: str = "float32", way: str = "native", **more: Any
) -> tuple[Any, Adapters]:
    if way == "fused":
        model = weights.load(str(base), dtype, "cpu")
    else:
        model = load_causal_lm(base, dtype).requires_grad_(False)
    return model, Adapters(model, model.dtype, **more)


def packed(
    model: Any, adapters: Adapters, texts: Sequence[tuple[Adapter | None, list[int]]]
) -> list[Tensor]:
    """All texts in one row, each seeing itself alone -> the scores of each (tokens, vocabulary)."""
    counts = [len(ids) for _, ids in texts]
    row = torch.tensor([[token for _, ids in texts for token in ids]])
    positions = torch.tensor([[at for count in counts for at in range(count)]])
    owner = torch.tensor([n for n, count in enumerate(counts) for _ in range(count)])
    sees = (owner[:, None] == owner[None]) & (positions[0][:, None] >= positions[0][None])
    mask = torch.zeros(1, 1, *sees.shape, dtype=model.dtype)
    mask.masked_fill_(~sees, float("-inf"))
    with torch.inference_mode(), adapters.routing([(a, len(ids)) for a, ids in texts]):
        out = model(input_ids=row, position_ids=positions, attention_mask=mask, use_cache=False)
    return list(out.logits[0].split(counts))


def some_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()


def alone(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        scores: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return scores


# ---- what is computed ----


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_of_many_adapters_gives_what_peft_gives_for_each(
    kind: str, way: str, folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(kind)
    model, adapters = loaded(base, way=way)
    named = {form: adapters.load(str(folders[f"{kind}/{form}"])) for form in FORMS}
    # Decoding guests, pieces of prompts, two guests of one adapter, and the base in between.
    order = [*FORMS, None, "all", "wide", None, "names", "all"]
    lengths = [1, 1, 1, 3, 1, 20, 2, 1, 1, 5, 1, 18, 1, 7]
    texts = [(form, some_ids(n, at)) for at, (form, n) in enumerate(zip(order, lengths))]  # noqa: B905
    found = packed(model, adapters, [(named.get(form or ""), ids) for form, ids in texts])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for (form, ids), scores in zip(texts, found, strict=True):
        reference = plain if form is None else peft_model(base, folders[f"{kind}/{form}"])
        torch.testing.assert_close(scores, alone(reference, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_peft(
    kind: str, way: str, folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(kind)
    model, adapters = loaded(base, way=way)
    forms = ["all", "wide", "patterns", "regex"]
    texts = [
        (adapters.load(str(folders[f"{kind}/{form}"])), some_ids(n, n))
        for n, form in enumerate(forms, start=3)
    ]
    for _ in range(12):
        for (_, ids), scores in zip(texts, packed(model, adapters, texts), strict=True):
            ids.append(int(scores[-1].argmax()))
    for (_, ids), form in zip(texts, forms, strict=True):
        reference = peft_model(base, folders[f"{kind}/{form}"])
        start = torch.tensor([ids[:-12]])
        out = reference.generate(
            input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=12,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert out[0].tolist() == ids


def test_the_base_computes_its_own_tokens_to_the_same_bits(
    way: str, llama: Path, folders: dict[str, Path]
) -> None:
    model, adapters = loaded(llama, way=way)
    ids = [some_ids(n, n) for n in (4, 1, 6)]
    before = packed(model, adapters, [(None, one) for one in ids])
    adapter = adapters.load(str(folders["llama/all"]))
    after = packed(model, adapters, [(None, ids[0]), (adapter, ids[1]), (None, ids[2])])
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


def test_an_adapter_that_overflows_spoils_its_own_tokens_only(
    way: str, llama: Path, tmp_path: Path
) -> None:
    good = make_adapter(llama, tmp_path / "good", seed=1)
    bad = make_adapter(llama, tmp_path / "bad", scale=1e20, lora_alpha=1e30)
    model, adapters = loaded(llama, way=way)
    a, b = adapters.load(str(good)), adapters.load(str(bad))
    layer, row = model.model.layers[0].mlp.gate_proj, torch.randn(1, 5, 32)
    with adapters.routing([(a, 1), (b, 2), (None, 1), (a, 1)]):
        found = layer(row)[0].isnan().any(1)
    assert found.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_as_an_engine_has_them_take_adapters(
    dtype: str, llama: Path, tmp_path: Path
) -> None:
    kernels = native.kernels()
    if kernels is None or dtype not in kernels.kinds:
        pytest.skip(f"{dtype} is not multiplied here: {native.why_not()}")
    folder = make_adapter(llama, tmp_path / "a", rank=6, seed=3, scale=0.3)
    model, adapters = loaded(llama, dtype, way="fused")
    adapter = adapters.load(str(folder))
    ids = some_ids(70, 1)
    (found,) = packed(model, adapters, [(adapter, ids)])
    expected = alone(peft_model(llama, folder), ids)
    off = float((found.float() - expected).norm() / expected.norm())
    assert off < {"float32": 1e-5, "bfloat16": 3e-2, "int8": 5e-2}[dtype]
    held = next(adapters.tensors()).dtype
    assert held == model.dtype


def test_a_long_row_of_pieces_and_threads_is_computed_as_short_ones_are(
    way: str, tmp_path: Path
) -> None:
    base = make_llama(tmp_path / "base", hidden_size=40, intermediate_size=72, head_dim=12)
    model, adapters = loaded(base, way=way)
    folders = [make_adapter(base, tmp_path / str(n), rank=3 + n, seed=n) for n in range(3)]
    some = [adapters.load(str(folder)) for folder in folders]
    texts = [(some[n % 3] if n % 4 else None, some_ids(90 - n, n)) for n in range(9)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = packed(model, adapters, texts)
    finally:
        torch.set_num_threads(before)
    plain = load_causal_lm(base, "float32")
    for (adapter, ids), scores in zip(texts, found, strict=True):
        reference = peft_model(base, Path(adapter.folder)) if adapter else plain
        torch.testing.assert_close(scores, alone(reference, ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_adds_for_any_shape(dtype: torch.dtype) -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(f"no kernels here: {native.why_not()}")
    torch.manual_seed(0)
    for rank, inputs, outputs in [(1, 1, 1), (3, 7, 33), (5, 130, 17), (16, 64, 96), (9, 31, 70)]:
        a = torch.randn(4, rank, inputs).to(dtype)
        b = torch.randn(4, rank, outputs).to(dtype)
        slots = torch.tensor([3, -1, 0, 3, 2], dtype=torch.int32)
        rows = torch.randn(5, inputs + 3).to(dtype)[:, :inputs]
        whole = torch.randn(5, outputs + 5).to(dtype)
        expected = whole.double()
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                small = rows[row].double() @ a[slot].double().t()
                expected[row, :outputs] += small @ b[slot].double()
        stack = native.Stack(a.data_ptr(), b.data_ptr(), rank, inputs, outputs)
        kernels.adapt(
            ctypes.addressof(stack), slots.data_ptr(), rows.data_ptr(), rows.stride(0),
            whole.data_ptr(), whole.stride(0), 5, dtype == torch.bfloat16, 2,
        )  # fmt: skip
        rounding = 1e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(whole.double(), expected, rtol=rounding, atol=10 * rounding)


def test_the_layout_of_torch_takes_adapters(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "a", rank=4, seed=3, scale=0.3)
    model, adapters = loaded(llama, "bfloat16")
    lay_out(model)
    ids = some_ids(9, 1)
    (found,) = packed(model, adapters, [(adapters.load(str(folder)), ids)])
    expected = alone(peft_model(llama, folder), ids)
    assert float((found.float() - expected).norm() / expected.norm()) < 3e-2


def test_layers_stay_fused_with_adapters_and_without(
    llama: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.kernels() is None:
        pytest.skip(f"no kernels here: {native.why_not()}")
    model, adapters = loaded(llama, way="fused")
    adapter = adapters.load(str(folders["llama/names"]))
    wide = adapters.load(str(make_adapter(llama, folders["llama/names"].parent / "w", rank=600)))

    def calls(texts: list[tuple[Adapter | None, list[int]]]) -> int:
        count = 0
        forward = PanelLinear.forward

        def counted(self: PanelLinear, values: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return forward(self, values)

        with monkeypatch.context() as patched:
            patched.setattr(PanelLinear, "forward", counted)
            packed(model, adapters, texts)
        return count - 1  # the scores

    assert calls([(None, [1, 2])]) == 0
    assert calls([(None, [1, 2]), (adapter, [3])]) == 0
    before = len(adapters._rows)
    # More rank than the kernels have room for: torch adds it, layer by layer.
    ids = some_ids(5, 3)
    (found,) = packed(model, adapters, [(wide, ids)])
    assert len(adapters._rows) == before + 1
    expected = alone(peft_model(llama, Path(wide.folder)), ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_model_without_adapters_is_not_touched(llama: Path, folders: dict[str, Path]) -> None:
    model, adapters = loaded(llama)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert not any("forward" in vars(layer) for layer in layers)
    adapter = adapters.load(str(folders["llama/names"]))
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert "forward" in vars(q)
    assert "forward" not in vars(k), "none of its adapters changes it"
    ids = some_ids(3, 1)
    plain = alone(load_causal_lm(llama, "float32"), ids)
    assert torch.equal(alone(model, ids), plain)
    (other,) = packed(model, adapters, [(adapter, ids)])
    assert not torch.equal(other, plain)


def test_a_layer_that_does_not_get_the_row_is_an_error(
    llama: Path, folders: dict[str, Path]
) -> None:
    model, adapters = loaded(llama)
    adapter = adapters.load(str(folders["llama/all"]))
    with pytest.raises(RuntimeError, match="q_proj got 3 tokens of a row of 4"):
        packed_wrong(model, adapters, adapter)
    assert len(packed(model, adapters, [(None, [1, 2])])) == 1, "the next row is not touched by it"


def packed_wrong(model: Any, adapters: Adapters, adapter: Adapter) -> None:
    with adapters.routing([(adapter, 4)]):
        model(input_ids=torch.tensor([[1, 2, 3]]))


# ---- which products ----


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), max_size=24),
    st.randoms(use_true_random=False),
)
def test_each_token_is_in_one_product_with_its_own_slot(
    spans: list[tuple[int, int]], random: Any
) -> None:
    start, placed, owner = 0, [], {}
    for slot, count in spans:
        placed.append((slot, start, start + count))
        owner |= dict.fromkeys(range(start, start + count), slot)
        start += count + random.randint(0, 2)  # tokens of the base in between
    random.shuffle(placed)
    products = arrange(placed)
    seen = []
    for product in products:
        assert len(product.sources) == (product.high - product.low) * product.each
        for place, token in zip(product.places, product.targets, strict=True):
            assert product.sources[place] == token
            assert product.low + place // product.each == owner[token]
            seen.append(token)
        if product.straight:
            assert product.sources == product.targets
    assert sorted(seen) == sorted(owner)
    assert waste(products) >= 0


def test_many_adapters_of_a_token_each_are_one_product() -> None:
    (product,) = arrange([(slot, 2 + slot, 3 + slot) for slot in range(64)])
    assert (product.low, product.high, product.each, product.straight) == (0, 64, 1, True)
    assert waste([product]) == 0


def test_slots_far_apart_are_brought_together_once_that_pays() -> None:
    bank = Bank({"x": (3, 2)}, 1, torch.float32, torch.device("cpu"))
    for n in range(20):
        pair = (torch.full((1, 3), float(n)), torch.full((2, 1), float(n)))
        assert bank.add({"x": pair}, {"x": 2.0}) == n
    used = [0, 7, 14]
    wasted = waste(arrange([(slot, at, at + 1) for at, slot in enumerate(used)]))
    assert wasted > 0
    moved: dict[int, int] = {}
    rounds = 0
    while not moved:
        moved = bank.regroup(used, wasted)
        rounds += 1
    assert 1 < rounds < 10
    now = [moved.get(slot, slot) for slot in range(20)]
    assert sorted(now) == list(range(20))
    assert {now[slot] for slot in used} == {0, 1, 2}
    for n, slot in enumerate(now):
        assert bank.a["x"][slot].tolist() == [[n, n, n]]
        assert bank.b["x"][slot].tolist() == [[2 * n, 2 * n]]
    assert bank.regroup([now[slot] for slot in used], 0) == {}


def test_regrouped_adapters_compute_what_they_did(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmos.services.engine.adapter_bank.kernels", lambda: None)
    model, adapters = loaded(llama)
    many = [adapters.load(str(make_adapter(llama, tmp_path / str(n), seed=n))) for n in range(18)]
    texts = [(many[n], some_ids(1, n)) for n in (1, 9, 17)]
    before = packed(model, adapters, texts)
    slots = [adapter.slot for adapter, _ in texts]
    while [adapter.slot for adapter, _ in texts] == slots:
        for now, then in zip(packed(model, adapters, texts), before, strict=True):
            torch.testing.assert_close(now, then)
    assert sorted(a.slot for a, _ in texts) == [0, 1, 2]
    assert sorted(a.slot for a in many) == list(range(18))
    rest = [(many[0], [4]), (many[5], [5]), (None, [6])]
    for (adapter, ids), scores in zip(rest, packed(model, adapters, rest), strict=True):
        expected = alone(peft_model(llama, Path(adapter.folder)) if adapter else model, ids)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


# ---- loading ----


def test_an_adapter_is_loaded_once_and_stays_while_there_is_room(
    llama: Path, tmp_path: Path
) -> None:
    one, two = (make_adapter(llama, tmp_path / str(n), seed=n) for n in range(2))
    _, adapters = loaded(llama)
    first, again = adapters.load(str(one)), adapters.load(str(one))
    assert first is again
    copy = shutil.copytree(one, tmp_path / "copy")
    assert adapters.load(str(copy)) is first, "the same numbers, wherever they lie"
    other = adapters.load(str(two))
    assert other.key != first.key
    for adapter in (first, first, first, other):
        adapters.release(adapter)
    assert adapters.load(str(one)) is first, "nobody used it, but there was room"
    adapters.trim()
    assert adapters.load(str(two)) is not other
    held = sum(t.nbytes for t in adapters.tensors())
    assert held == 2 * first.bytes


def test_without_room_what_nobody_uses_goes_the_longest_idle_first(
    llama: Path, tmp_path: Path
) -> None:
    folders = [make_adapter(llama, tmp_path / str(n), seed=n) for n in range(4)]
    _, adapters = loaded(llama)
    size = adapters.load(str(folders[0])).bytes
    model, adapters = loaded(llama, limit_bytes=2 * size)
    held = [adapters.load(str(f)) for f in folders]
    kept = packed(model, adapters, [(held[3], [5, 6])])
    for adapter in held[:3]:
        adapters.release(adapter)
    again = [adapters.load(str(f)) for f in folders[:3]]
    assert [a is b for a, b in zip(again, held, strict=False)] == [False, True, True]
    for now, then in zip(packed(model, adapters, [(held[3], [5, 6])]), kept, strict=True):
        torch.testing.assert_close(now, then)


def test_a_folder_that_changed_is_another_adapter(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "a", seed=1)
    _, adapters = loaded(llama)
    old = adapters.load(str(folder))
    shutil.rmtree(folder)
    make_adapter(llama, folder, seed=2)
    new = adapters.load(str(folder))
    assert new is not old
    assert new.key != old.key


def test_the_same_numbers_scaled_otherwise_are_another_adapter(llama: Path, tmp_path: Path) -> None:
    _, adapters = loaded(llama)
    one = adapters.load(str(make_adapter(llama, tmp_path / "one")))
    two = adapters.load(str(make_adapter(llama, tmp_path / "two", lora_alpha=64)))
    assert one.key != two.key


def test_the_adapter_of_a_merged_model_is_found_with_its_template(
    llama: Path, tmp_path: Path
) -> None:
    merged = shutil.copytree(llama, tmp_path / "merged")
    make_adapter(llama, merged / "adapter", seed=1)
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    _, adapters = loaded(llama)
    found = adapters.load(str(merged))
    assert found.folder == str(merged / "adapter")
    assert found.chat_template == "{{ messages }}"
    assert adapters.load(str(make_adapter(llama, tmp_path / "bare", seed=1))).chat_template == ""


def test_of_a_checkpoint_that_is_gone_the_newest_takes_its_place(
    llama: Path, tmp_path: Path
) -> None:
    root = tmp_path / "procs" / "7" / "checkpoints"
    for step in (20, 100):
        make_adapter(llama, root / f"step-{step:09d}", seed=step)
    _, adapters = loaded(llama)
    notes: list[str] = []
    found = adapters.load(str(root / f"step-{3:09d}"), notes.append)
    assert found.folder == str(root / "step-000000100")
    (note,) = notes
    assert "step-000000100 takes over" in note
    assert adapters.load(str(root / "step-000000020"), notes.append) is not found
    assert len(notes) == 1


# ---- what is refused ----

CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOHA"}, "adapter of type LOHA"),
    "another task": ({"task_type": "SEQ_CLS"}, "trained for SEQ_CLS"),
    "biases": ({"bias": "all"}, "trained biases too"),
    "dora": ({"use_dora": True}, "uses use_dora, which an engine cannot compute"),
    "saved": ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
    "tokens": ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "uses alora_invocation_tokens"),
    "unknown": ({"use_something_new": {"a": 1}}, "uses use_something_new"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa', which changes the base model"),
    "no targets": ({"target_modules": None}, "names no target_modules"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "trained lm_head, the model's table"),
    "table": ({"target_modules": ["embed_tokens"]}, "trained model.embed_tokens, the model's"),
    "other layers": ({"target_modules": ["query"]}, "a model of type llama has none of its"),
    "too many": ({"target_modules": ["q_proj"]}, "has no place for model.layers.0"),
    "rank": ({"r": 8}, "its rank 8"),
    "nonsense": ({"rank_pattern": {"q_proj": "x"}}, "makes no sense"),
    "bad regex": ({"target_modules": "(q_proj"}, "makes no sense"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_an_engine_cannot_compute_is_refused_in_one_line(
    what: str, llama: Path, tmp_path: Path
) -> None:
    config, message = CHANGED[what]
    folder = make_adapter(llama, tmp_path / "a", **config)
    model, adapters = loaded(llama)
    with pytest.raises(BadInput) as caught:
        adapters.load(str(folder))
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert list(adapters.tensors()) == []
    assert not any("forward" in vars(m) for m in model.modules())


def test_an_adapter_of_a_model_of_another_size_is_refused(llama: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", hidden_size=48)
    _, adapters = loaded(llama)
    with pytest.raises(BadInput, match=r"q_proj of this model is 32 to 32.*\(4, 48\)"):
        adapters.load(str(make_adapter(other, tmp_path / "a")))


def test_an_adapter_of_a_model_of_another_kind_is_refused(
    llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    _, adapters = loaded(llama)
    with pytest.raises(BadInput, match="of type llama has none of its layers"):
        adapters.load(str(make_adapter(gpt2, tmp_path / "a")))


def test_an_adapter_of_another_model_of_the_same_shape_is_refused(
    llama: Path, tmp_path: Path
) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    copy = shutil.copytree(llama, tmp_path / "copy")
    _, adapters = loaded(llama)
    with pytest.raises(BadInput, match=f"was trained on {other}, not on this model"):
        adapters.load(str(make_adapter(other, tmp_path / "of-other")))
    adapters.load(str(make_adapter(copy, tmp_path / "of-copy")))
    somewhere = make_adapter(llama, tmp_path / "b", base_model_name_or_path="org/its-name-there")
    adapters.load(str(somewhere))


def test_broken_folders_are_refused(llama: Path, tmp_path: Path) -> None:
    _, adapters = loaded(llama)

    def refuses(folder: Path, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            adapters.load(str(folder))

    refuses(tmp_path / "nothing", "there is no adapter")
    refuses(tmp_path / "procs" / "7" / "checkpoints" / "step-3", "there is no adapter")
    refuses(llama, "is a whole model, not a LoRA adapter")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "has no adapter_config.json")
    folder = make_adapter(llama, tmp_path / "a")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    refuses(folder, f"lacks {name.removeprefix('base_model.model.')}")
    save_file({**tensors, name: tensors[name].to(torch.int32)}, weights)
    refuses(folder, "whole numbers")
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    refuses(folder, "what is no number")
    weights.write_bytes(weights.read_bytes()[:-8])
    refuses(folder, "cannot be read")
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    refuses(folder, "has no adapter_model.safetensors")
    config.write_text(json.dumps([1]))
    refuses(folder, "has no adapter_model.safetensors")
    save_file(tensors, weights)
    refuses(folder, "holds no object")
    config.write_text("{")
    refuses(folder, "cannot be read")
