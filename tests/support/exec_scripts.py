"""Scripts of people who know nothing of llmos, and of people who have changed three lines."""

from __future__ import annotations

from pathlib import Path

# A tree of three: the command, its child, and one that has left for a session of its own. Each
# writes its OS pid and then counts in a file of its own.
TREE = """
import os, subprocess, sys, time
folder = sys.argv[1]
role = sys.argv[2] if len(sys.argv) > 2 else "command"
if role == "command":
    again = [sys.executable, __file__, folder]
    subprocess.Popen([*again, "child"])
    subprocess.Popen([*again, "stray"], start_new_session=True)
with open(os.path.join(folder, role + ".pid"), "w") as file:
    file.write(str(os.getpid()))
number = 0
while True:
    number += 1
    with open(os.path.join(folder, role + ".new"), "w") as file:
        file.write(str(number))
    os.rename(os.path.join(folder, role + ".new"), os.path.join(folder, role))
    time.sleep(0.001)
"""

# A walk that depends on every step and on chance: what it comes to shows whether a step was lost,
# doubled or made with other numbers.
WALK = """
import json, random, sys, time
from llmos.services.steps import report, steps

chance = random.Random(3)
state = {"value": 1.0}

def save(folder):
    (folder / "walk.json").write_text(json.dumps([state, chance.getstate()]))

def load(folder):
    found, where = json.loads((folder / "walk.json").read_text())
    state.update(found)
    chance.setstate((where[0], tuple(where[1]), where[2]))

total, pause_s = int(sys.argv[1]), float(sys.argv[2])
for epoch in range(2):
    for batch in steps(range(total // 2), total=total, save=save, load=load):
        time.sleep(pause_s)
        state["value"] = (state["value"] * 1.1 + batch + chance.random()) % 1000
        report(value=state["value"])
print("final", state["value"])
"""

# A Trainer's script, with the three lines. Dropout and a shuffled loader: it has chance in it.
TRAINER = """
import hashlib, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from llmos.services.trainer import LlmosCallback, checkpoint

set_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, attention_dropout=0.1, attn_implementation="eager",
)
tokens = torch.randint(0, 64, (48, 8))
data = [{"input_ids": row, "labels": row} for row in tokens]
arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=int(sys.argv[2]), per_device_train_batch_size=4,
    logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
)
model = LlamaForCausalLM(config)
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[LlmosCallback()])
trainer.train(resume_from_checkpoint=checkpoint())
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print("final", trainer.state.global_step, hashlib.sha256(weights).hexdigest())
"""


def write(folder: Path, code: str) -> Path:
    """The script as a file."""
    path = folder / "script.py"
    path.write_text(code)
    return path
