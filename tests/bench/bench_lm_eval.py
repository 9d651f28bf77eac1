"""The figures of lm-eval through the gateway, against its own models in its process.

    python tests/bench/bench_lm_eval.py MODEL SST2.jsonl.gz --peer-python PYTHON
        [--limit 100] [--chat XQUAD.jsonl.gz]

MODEL is a folder, PYTHON has `lm-eval[api]`. Two tasks are made of a file with `text` and `label`
(0, 1): which of two continuations is the likelier one, and the perplexity of the texts; with
`--chat` (a file with `context` and `question`, a model with a chat template) a third, of answers
that are generated and compared with the context (chrF). Each is run by `hf` in float32, and by
`local-completions` or `local-chat-completions` through `llmos serve`. Ends with status 1 when a
figure differs in the third decimal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmos.shell import Client
from llmos.shell.home import Home
from llmos.shell.launch import boot, wait_gone

SERVE = (sys.executable, "-P", "-m", "llmos.shell", "serve")

HEAD = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{text}}\\nIt was"
doc_to_choice: [" terrible", " great"]
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""
CHAT = """
output_type: generate_until
doc_to_text: "{{context[:300]}}\\n{{question}}"
doc_to_target: "{{context[:300]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 48, do_sample: false, temperature: 0.0}
metric_list: [{metric: chrf}]
"""


def evaluate(args: argparse.Namespace, work: Path, kind: str, model: str, task: str) -> Any:
    """-> the figures of one run, by name."""
    out = work / kind / task
    chat = ["--apply_chat_template"] if task == "llmos_chat" else []
    command = [args.peer_python, "-m", "lm_eval", "run", "--model", kind, "--model_args", model,
               "--tasks", task, "--include_path", str(work), "--limit", str(args.limit),
               "--output_path", str(out), "--batch_size", "1", *chat]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    (found,) = out.rglob("results_*.json")
    results = json.loads(found.read_text())["results"][task]
    return {name.split(",")[0]: value for name, value in results.items()
            if isinstance(value, float) and "stderr" not in name}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--chat", default="")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--peer-python", required=True)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    with tempfile.TemporaryDirectory(prefix="l", dir="/tmp") as folder:
        work, home = Path(folder), Home(Path(folder) / "home")
        (home.path / "models").mkdir(parents=True)
        (home.path / "models" / "model").symlink_to(args.model)
        made = {"llmos_choice": CHOICE, "llmos_perplexity": PERPLEXITY}
        if args.chat:
            made["llmos_chat"] = CHAT
        for task, text in made.items():
            data = args.chat if task == "llmos_chat" else args.data
            (work / f"{task}.yaml").write_text(
                HEAD.format(task=task, data=os.path.abspath(data)) + text
            )
        os.environ["LLMOS_HOME"] = str(home.path)
        kernel = int(boot(home)["kernel"]["os_pid"])
        same = True
        try:
            subprocess.run(
                [*SERVE, "-d", "--port", "0", "--dtype", "float32"], check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            for task in made:
                same = compare(args, work, task) and same
        finally:
            with Client(home.path) as client:
                client.shutdown()
            wait_gone(kernel, 60)
    sys.exit(not same)


def compare(args: argparse.Namespace, work: Path, task: str) -> bool:
    status = subprocess.run([*SERVE, "status", "--json"], check=True, stdout=subprocess.PIPE)
    url = json.loads(status.stdout)["url"]
    kind, path = "local-completions", "completions"
    if task == "llmos_chat":
        kind, path = "local-chat-completions", "chat/completions"
    through = (f"model=model,base_url={url}/{path},tokenizer={args.model},num_concurrent=8,"
               "max_retries=1")  # fmt: skip
    reference = evaluate(
        args, work, "hf", f"pretrained={args.model},dtype=float32,add_bos_token=False", task
    )
    found = evaluate(args, work, kind, through, task)
    assert reference, "lm-eval gave no figures"
    same = True
    for name, expected in reference.items():
        differs = abs(expected - found[name]) >= 5e-4
        same = same and not differs
        print(f"{task:<18} {name:<16} hf {expected:.6f}   {kind} {found[name]:.6f}"
              f"{'   DIFFERS' if differs else ''}", flush=True)  # fmt: skip
    return same


if __name__ == "__main__":
    main()
