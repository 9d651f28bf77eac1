"""A GGUF file becomes an ordinary model folder: the same weights, tokens and template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmos.kernel.errors import BadInput
from llmos.services.pull import weights as writing
from llmos.services.pull.gguf_file import GgufFile
from llmos.services.pull.gguf_model import llama3_factors
from llmos.services.pull.job import Job, Wish
from llmos.services.pull.progress import Progress
from support.gguf_files import write_gguf
from support.small_models import TEMPLATE, VOCABULARY, make_llama, make_tokenizer

DATA = os.environ.get("LLMOS_TEST_DATA", "")
TEXTS = ("Once upon a time", "<end>ab<end>", "naïve ½ x²y 12,345.67 \n\n\t  def f(x): 'é' 日本", "")


def convert(path: Path, tmp_path: Path, **wish: Any) -> Path:
    """Pull a file -> the folder of the model, as it would be registered."""
    models = tmp_path / "models"
    models.mkdir(exist_ok=True)
    job = Job(Wish(str(path), **wish), models, 1, Progress())
    pulled = job.run()
    assert pulled.folder is not None
    folder = tmp_path / f"pulled-{len(list(tmp_path.glob('pulled-*')))}"
    pulled.folder.rename(folder)
    job.close()
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("m") / "llama", TEMPLATE, tie_word_embeddings=False)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.arange(40)[None] % VOCABULARY).logits


def test_what_was_not_quantized_comes_back_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    folder = convert(write_gguf(llama, tmp_path / "m.gguf"), tmp_path)
    before, after = load_file(llama / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(llama), logits(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
def test_the_weights_are_those_that_transformers_unpacks(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    """Its own loader of GGUF files is another implementation: the same numbers, the same logits."""
    path = write_gguf(llama, tmp_path / "m.gguf", kind)
    folder = convert(path, tmp_path, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ours = load_file(folder / "model.safetensors")
    assert all(torch.equal(theirs.state_dict()[name], ours[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(theirs(torch.arange(40)[None]).logits, logits(folder))


def test_quantized_weights_are_rounded_to_bfloat16_and_f16_stays(
    llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(llama, tmp_path / "q.gguf", "Q8_0")
    exact = load_file(convert(path, tmp_path, dtype="float32") / "model.safetensors")
    rounded = load_file(convert(path, tmp_path) / "model.safetensors")
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    half = convert(write_gguf(llama, tmp_path / "h.gguf", "F16"), tmp_path)
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {torch.float16}


def test_rounding_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) < 3e38)]
    ours = np.frombuffer(writing.packed(numbers, "bfloat16"), np.uint16)
    theirs = torch.from_numpy(numbers.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours, theirs)


def test_the_tokenizer_and_the_template_are_the_models(llama: Path, tmp_path: Path) -> None:
    folder = convert(write_gguf(llama, tmp_path / "m.gguf"), tmp_path)
    before, after = AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == text
    assert after.encode("<end>") == [0], "a special token is one token"
    assert after.decode([0, 5], skip_special_tokens=True) == before.decode([5])
    assert after.eos_token == "<end>"
    messages = [{"role": "user", "content": "hi"}]
    assert after.chat_template == TEMPLATE
    assert after.apply_chat_template(messages, add_generation_prompt=True) == (
        before.apply_chat_template(messages, add_generation_prompt=True)
    )


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "ab12 34", ["ab", "1", "2", " ", "3", "4"]),
        ("llama-bpe", "ab12345 c\n\nd", ["ab", "123", "45", " c", "\n\n", "d"]),
        ("qwen2", "ab12 34\n\nd", ["ab", "1", "2", " ", "3", "4", "\n\n", "d"]),
        ("gpt-2", "ab12 34", ["ab", "12", " 34"]),
    ],
)
def test_a_text_is_cut_as_the_file_says(
    pre: str, text: str, pieces: list[str], llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(llama, tmp_path / "m.gguf", keys={"tokenizer.ggml.pre": pre})
    backend = AutoTokenizer.from_pretrained(convert(path, tmp_path)).backend_tokenizer
    cut = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == pieces


def test_a_text_begins_with_the_first_token_where_the_file_says_so(
    llama: Path, tmp_path: Path
) -> None:
    keys = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    folder = convert(write_gguf(llama, tmp_path / "m.gguf", keys=keys), tmp_path)
    ids = AutoTokenizer.from_pretrained(folder).encode("ab")
    assert (ids[0], 0 in ids[1:]) == (0, False)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_families_with_biases_and_with_norms(arch: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 256, "head_dim": 8, "tie_word_embeddings": True,
             "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(0)
    model: Any = (
        Qwen2ForCausalLM(Qwen2Config(**sizes))
        if arch == "qwen2"
        else Qwen3ForCausalLM(Qwen3Config(**sizes))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "_norm" in name:
            torch.nn.init.normal_(parameter)
    source = tmp_path / "source"
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    folder = convert(write_gguf(source, tmp_path / "m.gguf", arch=arch), tmp_path)
    assert torch.equal(logits(source), logits(folder))


def test_the_stretched_context_of_llama_3_is_found_from_its_factors(
    llama: Path, tmp_path: Path
) -> None:
    factors, keys = llama3_factors(5e5, 8, 32.0, 1.0, 4.0, 8192), {"llama.rope.freq_base": 5e5}
    tensors = {"rope_freqs.weight": factors}
    path = write_gguf(llama, tmp_path / "m.gguf", keys=keys, tensors=tensors)
    rope = json.loads((convert(path, tmp_path) / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 32.0)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 5e5 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.from_numpy(factors), theirs)
    other = write_gguf(llama, path, tensors={"rope_freqs.weight": factors + 1})
    with pytest.raises(BadInput, match="stretches its context"):
        convert(other, tmp_path)


@pytest.mark.skipif(not DATA, reason="needs LLMOS_TEST_DATA")
def test_a_sentencepiece_vocabulary_with_scores(llama: Path, tmp_path: Path) -> None:
    """Of Llama 2, as stories15M has it: a token's score says how early its halves are joined."""
    source = Path(DATA) / "models" / "stories15M"
    made = json.loads((source / "tokenizer.json").read_text())
    tokens = sorted(made["model"]["vocab"], key=made["model"]["vocab"].__getitem__)
    rank: dict[str, int] = {}
    for n, merge in enumerate(made["model"]["merges"]):
        rank.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), n)
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    keys = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, 10**6)) for token in tokens],
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    folder = convert(write_gguf(source, tmp_path / "m.gguf", keys=keys), tmp_path)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS[2:], "Once upon a time, Lily's dog", "  two  spaces ", "€ 你好 ▁ \u0000"):
        assert after.encode(text) == before.encode(text), text
        ids = after.encode(text)
        assert after.decode(ids, skip_special_tokens=True) == before.decode(
            ids, skip_special_tokens=True
        )
    assert torch.equal(logits(source), logits(folder))


def test_a_large_model_is_written_in_parts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(writing, "NUMBERS_AT_ONCE", 100)
    folder = convert(write_gguf(llama, tmp_path / "m.gguf"), tmp_path)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(llama), logits(folder))


def test_nothing_loads_torch(llama: Path, tmp_path: Path) -> None:
    """The process of a pull is small: it waits most of the time."""
    import subprocess
    import sys

    path = write_gguf(llama, tmp_path / "m.gguf", "Q8_0")
    script = f"""
import sys
from pathlib import Path
from llmos.services.pull.job import Job, Wish
from llmos.services.pull.progress import Progress
from llmos.services.programs.pull import Pull
Path({str(tmp_path)!r}, "models").mkdir()
Job(Wish({str(path)!r}), Path({str(tmp_path)!r}, "models"), 1, Progress()).run()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"keys": {"tokenizer.ggml.pre": "tekken"}}, "cuts its words by 'tekken'"),
        ({"keys": {"tokenizer.ggml.model": "bert"}}, "tokenizer of the kind 'bert'"),
        ({"keys": {"tokenizer.ggml.merges": ["a"]}}, "no pair of tokens"),
        ({"keys": {"tokenizer.ggml.merges": ["q zz"]}}, "broken vocabulary"),
        ({"keys": {"tokenizer.ggml.tokens": ["a", "a"]}}, "a token twice"),
        ({"keys": {"tokenizer.ggml.eos_token_id": 9999}}, "beyond the last"),
        ({"tensors": {"token_embd.weight": np.ones((9, 32))}}, "tokens and 9 embeddings"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "stretches its context by 'yarn'"),
        ({"keys": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"keys": {"llama.block_count": None}}, "no key llama.block_count"),
        ({"tensors": {"blk.0.odd.weight": np.ones((2, 2))}}, "has blk.0.odd.weight"),
        ({"tensors": {"blk.1.ffn_up.weight": np.ones((0,))}}, "no tensor blk.1.ffn_up.weight"),
        ({"tensors": {"output_norm.weight": np.full(32, np.nan)}}, "no numbers"),
        ({"arch": "gemma4"}, "is a gemma4 model; GGUF files of llama, qwen2, qwen3 are read"),
    ],
)
def test_what_would_be_a_little_wrong_is_refused(
    more: dict[str, Any], why: str, llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(llama, tmp_path / "m.gguf", **more)
    with pytest.raises(BadInput, match=why):
        convert(path, tmp_path)


def test_a_file_cut_off_anywhere_is_refused_in_one_line(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "m.gguf")
    whole = path.read_bytes()
    cuts = [4, 7, 20, 100, 1000, 5000, len(whole) // 2, len(whole) - 40]
    for length in cuts:
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"cut off|no key|no tensor") as caught:
            convert(path, tmp_path)
        assert "\n" not in caught.value.message
    for bad in (b"", b"PK\x03\x04" + whole[4:], b"GGUF\x01\x00\x00\x00" + whole[8:]):
        path.write_bytes(bad)
        with pytest.raises(BadInput):
            convert(path, tmp_path)


def test_a_header_that_promises_too_much_takes_no_memory(llama: Path, tmp_path: Path) -> None:
    """A length beyond the end is refused before anything of that size is made."""
    path = write_gguf(llama, tmp_path / "m.gguf")
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        at = int(rng.integers(4, 3000))
        broken[at : at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
        path.write_bytes(broken)
        try:
            GgufFile(path).close()
        except BadInput:
            continue
