"""The arguments that every training of a language model has. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.programs.base import arg


@dataclass(frozen=True, kw_only=True)
class TrainingArgs:
    out: str = arg(help="name of the model that is made", output=True, metavar="NAME")
    overwrite: bool = arg(False, help="replace a model of that name")
    time_limit_s: float = arg(
        0.0, help="end the training after this many seconds of wall time (0: no limit)", minimum=0
    )
    batch: int = arg(16, help="examples in a micro-batch", minimum=1)
    accumulate: int = arg(1, help="micro-batches in a step", minimum=1)
    context: int = arg(128, help="tokens in an example", minimum=2)
    lr: float = arg(1e-3, help="highest learning rate", minimum=0)
    warmup: float = arg(
        0.05, help="part of the run in which the learning rate rises", minimum=0, maximum=1
    )
    schedule: str = arg(
        "cosine", help="how the learning rate falls", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = arg(0.1, help="weight decay of the matrices", minimum=0)
    optimizer: str = arg("adamw", help="adamw, adam, sgd, or one that a plugin brings")
    grad_clip: float = arg(1.0, help="longest gradient (0: not clipped)", minimum=0)
    val_fraction: float = arg(
        0.05, help="part of the data that is held out for validation", minimum=0, maximum=0.5
    )
    eval_every: int = arg(0, help="validate every so many steps (0: at the end only)", minimum=0)
    seed: int = arg(0, help="seed of weights, order and dropout", minimum=0)
    dtype: str = arg(
        "auto",
        help="type of the products; the weights stay float32",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = arg(0, help="CPU threads (0: those of the worker)", minimum=0)
    save_every: int = arg(0, help="checkpoint every so many steps (0: llmos decides)", minimum=0)
