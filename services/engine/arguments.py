"""What can be asked of an engine, as arguments that `infer` and `chat` share. Without torch.

Names and meanings are those of OpenAI's API where it has them (presence_penalty, logit_bias, ...),
else those of transformers and vLLM (top_k, min_p, repetition_penalty, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.services.programs.base import arg

# The most alternatives whose log-probabilities are shown for one token.
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Served:
    """Which engine it is: those whose values are the same share one."""

    model: str = arg(
        help="registry name, folder or hub name", metavar="MODEL", positional=True, model=True
    )
    dtype: str = arg(
        "auto",
        help="number format of the weights",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    keep_alive_s: float = arg(
        300.0,
        help="keep the model loaded so long after its last use; -1: for ever",
        minimum=-1,
        duration=True,
    )
    trust_remote_code: bool = arg(
        False, help="run code that lies in the model's folder, for this run"
    )


ENGINE_ARGS = ("model", "dtype", "keep_alive_s", "trust_remote_code")


@dataclass(frozen=True)
class Generation(Served):
    """How the next tokens are chosen, and when a text ends."""

    max_tokens: int = arg(128, help="make at most so many tokens", minimum=0)
    temperature: float = arg(0.8, help="0 takes the likeliest token (greedy)", minimum=0)
    top_k: int = arg(40, help="draw from the K likeliest tokens; 0: from all", minimum=0)
    top_p: float = arg(
        0.95,
        help="draw from the likeliest tokens that hold this probability",
        minimum=0,
        maximum=1,
    )
    min_p: float = arg(
        0.0,
        help="draw from tokens at least so likely, as a part of the likeliest's probability",
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float = arg(
        1.0, help="divides the scores of tokens that were there before; 1: off", minimum=0.01
    )
    presence_penalty: float = arg(
        0.0, help="taken from the score of each token that the answer has", minimum=-2, maximum=2
    )
    frequency_penalty: float = arg(
        0.0,
        help="taken from a token's score for each time that the answer has it",
        minimum=-2,
        maximum=2,
    )
    logit_bias: Any = arg(None, help='added to scores, by token id: {"50256": -100}')
    seed: int | None = arg(None, help="the same seed gives the same text; default: the pid")
    stop: list[str] = arg([], help="end before this text appears (repeatable)", metavar="TEXT")
    ignore_eos: bool = arg(False, help="go on to --max-tokens when the model says it is done")
    logprobs: int | None = arg(
        None,
        help="tell each token's log-probability, and those of the N likeliest",
        metavar="N",
        minimum=0,
        maximum=MOST_LOGPROBS,
    )
    adapter: str = arg("", help="a LoRA adapter on the model: registry name or folder", model=True)
    exact: bool = arg(
        False, help="compute alone, so that the others in the batch do not change the last bits"
    )
