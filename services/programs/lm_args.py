"""The arguments that every training of a language model has. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.programs.base import arg, keep, save_every, save_in_place


@dataclass(frozen=True, kw_only=True)
class TrainingArgs:
    out: str = arg(
        help="name of the model that is made", output=True, metavar="NAME", plan_without=True,
        shape=False,
    )  # fmt: skip
    overwrite: bool = arg(False, help="replace a model of that name", shape=False)
    time_limit_s: float = arg(
        0.0,
        help="end the training after this many seconds of wall time (0: no limit)",
        minimum=0,
        shape=False,
    )
    batch: int = arg(16, help="examples in a micro-batch", minimum=1)
    may_shrink: bool = arg(
        False, help="halve the micro-batch, and accumulate more, rather than run out of memory"
    )
    accumulate: int = arg(1, help="micro-batches in a step", minimum=1)
    devices: int = arg(1, help="devices to train on; each takes a micro-batch", minimum=1)
    context: int = arg(128, help="tokens in an example", minimum=2)
    lr: float = arg(1e-3, help="highest learning rate", minimum=0, shape=False)
    warmup: float = arg(
        0.05,
        help="part of the run in which the learning rate rises",
        minimum=0,
        maximum=1,
        shape=False,
    )
    schedule: str = arg(
        "cosine",
        help="how the learning rate falls",
        choices=("cosine", "linear", "constant"),
        shape=False,
    )
    weight_decay: float = arg(0.1, help="weight decay of the matrices", minimum=0)
    optimizer: str = arg(
        "adamw", help="how weights are moved: llmos's or a plugin's", plugin="optimizers"
    )
    grad_clip: float = arg(1.0, help="longest gradient (0: not clipped)", minimum=0)
    val_fraction: float = arg(
        0.05, help="part of the data that is held out for validation", minimum=0, maximum=0.5
    )
    eval_every: int = arg(
        0, help="validate every so many steps (0: at the end only)", minimum=0, shape=False
    )
    gradient_checkpointing: bool = arg(
        False, help="compute each layer again in the backward pass: a third more work, less memory"
    )
    seed: int = arg(0, help="seed of weights, order and dropout", minimum=0, shape=False)
    dtype: str = arg(
        "auto",
        help="type of the products; the weights stay float32",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = arg(0, help="CPU threads of each rank (0: those of its device)", minimum=0)
    save_every: str = save_every()
    keep: int = keep()
    save_in_place: bool = save_in_place()
