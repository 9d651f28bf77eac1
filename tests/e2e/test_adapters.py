"""Adapters as a user has them: trained, listed, run on their base, talked to while they train."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from support.machine import Machine

pytestmark = pytest.mark.slow

ASKED = ("--max-tokens", "12", "--temperature", "0", "--dtype", "float32", "--raw")


def train(llmos: Machine, out: str, steps: int, *more: str) -> int:
    """Submit a LoRA training of `tiny` -> its pid."""
    return int(llmos.ok(
        "finetune", "tiny", str(llmos.text), "--out", out, "--method", "lora", "--steps",
        str(steps), "--lr", "0.02", "--context", "32", "--batch", "4", "--dtype", "float32",
        "--threads", "1", *more, "-d",
    ))  # fmt: skip


def with_peft(llmos: Machine, adapter: Path, prompt: str) -> str:
    """What peft's own model continues with."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # the machine is busy with the one that is tested
    base = llmos.home / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(whole, str(adapter)).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0]
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    return text[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]


def test_adapters_run_on_their_base_by_their_own_names_too(llmos: Machine) -> None:
    pids = [train(llmos, "alone", 6, "--adapter-only"), train(llmos, "merged", 6, "--seed", "1")]
    for pid in pids:
        llmos.ok("wait", str(pid))
    entry = next(m for m in llmos.json("models") if m["name"] == "alone")
    assert (entry["kind"], entry["base"]) == ("adapter", "tiny")
    models = llmos.home / "models"
    plain = llmos.ok("run", "tiny", "The red", *ASKED)
    alone = llmos.ok("run", "tiny", "The red", "--adapter", "alone", *ASKED)
    assert alone != plain
    assert alone.rstrip("\n") == with_peft(llmos, models / "alone", "The red").rstrip("\n")
    assert llmos.ok("run", "alone", "The red", *ASKED) == alone
    merged = llmos.ok("run", "tiny", "The red", "--adapter", "merged", *ASKED)
    expected = with_peft(llmos, models / "merged" / "adapter", "The red")
    assert merged.rstrip("\n") == expected.rstrip("\n")
    # A folder that is no model's name does as well.
    assert llmos.ok("run", "tiny", "The red", "--adapter", str(models / "alone"), *ASKED) == alone
    served = [p for p in llmos.json("ps", "-a") if p["role"] == "engine" and p["name"] == "tiny"]
    assert len([p for p in served if p["args"]["dtype"] == "float32"]) == 1, "all in one engine"


def test_an_adapter_answers_while_it_trains(llmos: Machine) -> None:
    pid = train(llmos, "making", 100_000, "--save-every", "100000")
    asked = (*ASKED, "--logprobs", "0")
    while not (llmos.process(pid)["progress"] or {}).get("step"):
        pass
    older = llmos.json("run", "making", "The red", *asked)  # has the first checkpoint written
    first = llmos.process(pid)["checkpoint"]["step"]
    folder = Path(llmos.process(pid)["checkpoint"]["folder"])
    assert older["text"].rstrip("\n") == with_peft(llmos, folder, "The red").rstrip("\n")
    while (llmos.process(pid)["progress"] or {})["step"] < first + 30:
        pass
    llmos.ok("checkpoint", str(pid))
    folder = Path(llmos.process(pid)["checkpoint"]["folder"])
    newer = llmos.json("run", "tiny", "The red", "--adapter", "making", *asked)
    assert newer["text"].rstrip("\n") == with_peft(llmos, folder, "The red").rstrip("\n")
    # The words may well be the same; how sure it is of them is not.
    assert newer["logprobs"] != older["logprobs"], "who comes later gets the newer one"
    assert llmos.process(pid)["state"] not in ("exited", "backoff")
    llmos.ok("kill", str(pid))


def test_what_is_no_adapter_of_the_model_is_said_in_a_line(llmos: Machine) -> None:
    whole = llmos("run", "tiny", "The", "--adapter", "tiny")
    assert whole.returncode != 0
    assert "is a whole model, not a LoRA adapter" in whole.stderr
    unknown = llmos("run", "tiny", "The", "--adapter", "nobody")
    assert unknown.returncode != 0
    assert "there is no model 'nobody'" in unknown.stderr
