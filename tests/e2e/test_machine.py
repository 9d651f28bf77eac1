"""The machine as a user has it: real workers, real models, the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.machine import Machine

pytestmark = pytest.mark.slow


def generated(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers' own greedy generate() continues with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import llmos.services.model.recurrent  # noqa: F401  (registers the recurrent classes)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    whole: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return whole[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :]


def test_a_model_is_trained_listed_loaded_and_served(llmos: Machine) -> None:
    (model,) = [m for m in llmos.json("models") if m["name"] == "tiny"]
    assert model["kind"] == "causal-lm"
    folder = llmos.home / "models" / "tiny"
    done = llmos("run", "tiny", "The red", "--max-tokens", "12", "--temperature", "0",
                 "--dtype", "float32", "--raw")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == generated(folder, "The red", 12).rstrip("\n")


def test_a_model_made_anew_under_its_name_is_the_one_that_answers(llmos: Machine) -> None:
    words = ("run", "again", "The red", "--max-tokens", "8", "--temperature", "0", "--raw")
    llmos.ok("wait", str(llmos.pretrain("again", 3)))
    before = llmos.ok(*words)
    llmos.ok("wait", str(llmos.pretrain("again", 60, "--overwrite")))
    assert llmos.ok(*words) != before


def test_the_same_seed_gives_the_same_text(llmos: Machine) -> None:
    words = ("run", "tiny", "The", "--max-tokens", "8", "--temperature", "1", "--seed")
    assert llmos.ok(*words, "5") == llmos.ok(*words, "5")


@pytest.mark.long
def test_a_training_that_was_preempted_ends_with_the_same_bits(llmos: Machine) -> None:
    undisturbed = llmos.pretrain("calm", 1000)
    llmos.ok("wait", str(undisturbed))
    disturbed = llmos.pretrain("stormy", 1000)
    while not (llmos.process(disturbed)["progress"] or {}).get("step"):
        pass
    llmos.ok("pause", str(disturbed))
    assert llmos.process(disturbed)["state"] == "paused"
    llmos.ok("resume", str(disturbed))
    for n in range(2):
        llmos.ok("run", "tiny", "The blue", "--max-tokens", "5", "--seed", str(n))
    llmos.ok("wait", str(disturbed))
    assert llmos.weights("calm") == llmos.weights("stormy")
    # The runs must have met: else this test shows nothing.
    process = llmos.process(disturbed)
    assert process["preemptions"] >= 1, process


def test_a_gan_a_training_and_a_generation_share_the_device(llmos: Machine) -> None:
    import numpy as np

    digits = llmos.text.parent / "digits.npz"
    np.savez(digits, images=np.random.default_rng(0).integers(0, 255, (64, 8, 8), np.uint8))
    gan = int(llmos.ok("gan", str(digits), "--out", "blots", "--steps", "40", "--width", "8", "-d"))
    lm = llmos.pretrain("beside", 60)
    llmos.ok("run", "tiny", "The", "--max-tokens", "3")
    llmos.ok("wait", str(gan), str(lm))
    assert all(llmos.process(p)["device_seconds"] > 0 for p in (gan, lm))
    assert (llmos.home / "models" / "blots" / "generator.safetensors").exists()
    assert (llmos.home / "models" / "blots" / "samples.png").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_is_fine_tuned_on_answers(llmos: Machine, method: str) -> None:
    pairs = llmos.text.parent / "pairs.jsonl"
    rows = [{"prompt": f"Who is {n}?", "answer": f"Number {n}."} for n in range(20)]
    pairs.write_text("".join(json.dumps(r) + "\n" for r in rows))
    llmos.ok("finetune", "tiny", str(pairs), "--out", f"ft-{method}", "--steps", "10",
             "--method", method, "--dtype", "float32")  # fmt: skip
    assert llmos("run", f"ft-{method}", "Who is 3?", "--max-tokens", "4").returncode == 0


@pytest.mark.long
def test_shutdown_and_boot_go_on_to_the_same_bits(fresh: Machine) -> None:
    fresh.ok("boot")
    fresh.ok("wait", str(fresh.pretrain("straight", 1000)))
    resting = fresh.pretrain("resting", 100_000)
    fresh.ok("pause", str(resting))
    pid = fresh.pretrain("broken", 1000)
    while not (fresh.process(pid)["progress"] or {}).get("step"):
        pass
    fresh.ok("shutdown")
    assert not (fresh.home / "kernel.sock").exists()
    fresh.ok("boot")
    assert fresh.process(resting)["state"] == "paused"
    fresh.ok("wait", str(pid))
    assert fresh.weights("straight") == fresh.weights("broken")
    # It must have been in the middle: else this test shows nothing.
    story = [line["what"] for line in fresh.json("explain", str(pid))["story"]]
    assert "stopping" in story
    assert story.count("loaded") == 2


def test_the_books_add_up_and_agree_with_the_system(llmos: Machine) -> None:
    llmos.ok("run", "tiny", "The", "--max-tokens", "3")
    (device,) = llmos.json("mem")
    capacity = device["capacity_bytes"]
    parts = device["foreign_bytes"] + device["promised_bytes"] + device["free_bytes"]
    assert parts == capacity
    assert sum(s["bytes"] for s in device["segments"]) == device["promised_bytes"]
    with open("/proc/meminfo") as f:
        available = next(int(x.split()[1]) * 1024 for x in f if x.startswith("MemAvailable"))
    seen = device["measured_bytes"] + device["foreign_bytes"] + available
    assert seen == pytest.approx(capacity, rel=0.03)


def test_detached_prints_the_pid_and_attach_and_logs_find_it(llmos: Machine) -> None:
    pid = llmos.pretrain("found", 20)
    attached = llmos("attach", str(pid), "--from-start")
    assert attached.returncode == 0
    assert llmos("logs", str(pid)).returncode == 0
    assert llmos("wait", str(pid)).returncode == 0
    assert "exit status 0" in llmos.ok("explain", str(pid))


def test_kill_is_128_plus_the_signal(llmos: Machine) -> None:
    pid = llmos.pretrain("doomed", 100_000)
    llmos.ok("kill", str(pid))
    assert llmos("wait", str(pid)).returncode == 143
    assert not (llmos.home / "models" / "doomed").exists()
    assert llmos("wait", "4711").returncode == 127


def wrong(llmos: Machine, *words: str) -> str:
    """A wrong command gives one clear line, on stderr only, and leaves nothing behind."""
    before = {p["pid"] for p in llmos.json("ps", "-a")}
    done = llmos(*words)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("llmos: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    after = {p["pid"] for p in llmos.json("ps", "-a") if p["program"] != "engine"}
    assert after <= before
    return done.stderr


@pytest.mark.long
def test_wrong_inputs(llmos: Machine) -> None:
    folder = llmos.text.parent
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("fa\xe7ade ".encode("latin-1") * 500)
    assert "nosuch" in wrong(llmos, "run", "nosuch", "hello")
    assert "nofile.txt" in wrong(llmos, "pretrain", "nofile.txt", "--out", "x")
    assert "empty" in wrong(llmos, "pretrain", "empty.txt", "--out", "x")
    assert "UTF-8" in wrong(llmos, "pretrain", "latin.txt", "--out", "x")
    assert "GiB" in wrong(llmos, "pretrain", str(llmos.text), "--out", "x", "--batch", "100000000")
    assert "--no-such-flag" in wrong(llmos, "pretrain", str(llmos.text), "--no-such-flag", "1")
    assert "4711" in wrong(llmos, "kill", "4711")
    assert "tiny" in wrong(llmos, "pretrain", str(llmos.text), "--out", "tiny")


def test_a_broken_safetensors_file_is_named(llmos: Machine) -> None:
    import shutil

    broken = llmos.text.parent / "broken"
    shutil.copytree(llmos.home / "models" / "tiny", broken, dirs_exist_ok=True)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in wrong(llmos, "run", str(broken), "hello")


def test_without_a_kernel_every_command_says_how_to_boot(fresh: Machine) -> None:
    for words in (("ps",), ("run", "x", "y"), ("kill", "1"), ("models",), ("shutdown",)):
        done = fresh(*words)
        assert done.returncode != 0
        assert "llmos boot" in done.stderr, words


def test_homes_that_cannot_be_used(fresh: Machine) -> None:
    fresh.home = Path("/proc/llmos-cannot-be-here")
    assert "cannot" in fresh("boot").stderr
    fresh.home = Path("/tmp/" + "x" * 120)
    assert "too long" in fresh("boot").stderr
    assert not os.path.exists(fresh.home)


def test_a_second_boot_says_so_and_does_no_harm(llmos: Machine) -> None:
    before = llmos.json("status")["kernel"]["os_pid"]
    done = llmos("boot")
    assert str(before) in done.stderr + done.stdout
    assert llmos.json("status")["kernel"]["os_pid"] == before


def test_a_training_that_diverges_says_so_and_makes_no_model(llmos: Machine) -> None:
    pid = llmos.pretrain("wild", 50, "--lr", "1e9")
    assert llmos("wait", str(pid)).returncode == 1
    assert "diverged" in llmos.process(pid)["reason"]
    assert not (llmos.home / "models" / "wild").exists()


def test_a_model_in_the_making_answers_before_its_first_checkpoint(llmos: Machine) -> None:
    pid = llmos.pretrain("early", 100_000)
    while not (llmos.process(pid)["progress"] or {}).get("step"):
        pass
    assert llmos.process(pid)["checkpoint"] is None
    assert llmos("run", "early", "The", "--max-tokens", "3").returncode == 0
    assert llmos.process(pid)["checkpoint"]["step"] > 0
    llmos.ok("kill", str(pid))


def test_a_service_is_restarted_and_not_killed(llmos: Machine) -> None:
    service = next(s for s in llmos.json("service", "ls") if s["name"] == "models")
    assert "llmos service restart models" in wrong(llmos, "kill", str(service["pid"]))
    llmos.ok("service", "restart", "models")
    again = next(s for s in llmos.json("service", "ls") if s["name"] == "models")
    assert again["os_pid"] != service["os_pid"]
    assert "tiny" in llmos.ok("models")
