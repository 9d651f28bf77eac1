"""A pulled model is a model: a real kernel runs it as transformers does, keeps it, lets it go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.gguf_files import write_gguf
from support.machine import Machine, end, make_machine
from support.small_models import make_llama

pytestmark = pytest.mark.long


@pytest.fixture
def llmos() -> Iterator[Machine]:
    machine = make_machine()
    machine.ok("boot", "--device", "cpu0:memory=3GiB")
    try:
        yield machine
    finally:
        end(machine)


def test_a_gguf_file_is_pulled_run_kept_and_removed(llmos: Machine, tmp_path: Path) -> None:
    path = write_gguf(make_llama(tmp_path / "llama"), tmp_path / "tiny.gguf", "Q8_0")
    llmos.ok("pull", str(path))
    loaded = llmos("load", "tiny", "--dtype", "float32", "--keep-alive", "1h")
    assert loaded.returncode == 0, loaded
    assert "for 1:00:00 after its last use" in loaded.stderr
    (engine,) = [p for p in llmos.json("ps") if p["role"] == "engine"]
    assert engine["args"]["keep_alive_s"] == 3600
    words = ("run", "tiny", "the cat", "--temperature", "0", "--max-tokens", "20", "--dtype",
             "float32", "--raw")  # fmt: skip
    text = llmos.ok(*words)
    folder = llmos.home / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True).replace("\r", "\n")
    assert text.strip() == expected.strip()  # a pipe's text has one kind of newline
    assert [p["pid"] for p in llmos.json("ps") if p["role"] == "engine"] == [engine["pid"]]
    refused = llmos("rm", "tiny")
    assert refused.returncode == 1
    assert f"in use by process {engine['pid']} (engine, loaded)" in refused.stderr
    llmos.ok("unload", "tiny")
    llmos.ok("rm", "tiny")
    assert not folder.exists()
