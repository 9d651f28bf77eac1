"""Answers of a given form: JSON of a schema, text of a regular expression, or one of some texts.

Before each token llguidance tells which may come next; the scores of all others become -inf. A
schema or an expression that it cannot keep to is refused, not approximated
(docs/design/0016-constrained-output.md).
"""
# ruff: noqa: TID253  (imported by the engine inside a worker only)

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmos.kernel.errors import BadArgument, BadInput

# Between the parts of a JSON text: at most a space, or a new line and its indentation. Without a
# bound a weak model writes white space for ever.
_WHITE_SPACE = r" ?|\n[ \t]{0,20}"

_KINDS = {"schema": "the JSON schema", "regex": "the regular expression", "choice": "the choice"}


class Constraint:
    """What one answer may look like, and how far it has come."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        # The tokenizer's, which may be larger than the model's or smaller.
        self.vocabulary = vocabulary
        self.error = ""

    @classmethod
    def of(
        cls, tokenizer: Any, args: Any, stop_ids: frozenset[int], vocabulary: int
    ) -> Constraint | None:
        """What `args` ask for by schema, regex or choice; None where nothing is asked for.

        `vocabulary`: how many ids the model has; `stop_ids`: those that end a text. Raises
        BadArgument where it makes no sense or cannot be kept to, BadInput where the model's
        tokenizer cannot be used for it.
        """
        try:
            spec = _spec(args)
            if spec is None:
                return None
            vocabulary = max(vocabulary, len(tokenizer))
            compiled = _compiled(tokenizer, tuple(sorted(stop_ids)), vocabulary, *spec)
        except (ValueError, TypeError, RecursionError) as exc:
            raise BadArgument(f"the form of the answer makes no sense: {exc}"[:300]) from None
        return cls(compiled.deep_copy(), vocabulary)

    @property
    def done(self) -> bool:
        """Is it complete, so that only the end of text may follow?"""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """The token was taken. One that is not allowed is an `error`, for good."""
        if self.done or self.error:
            return
        if not self._matcher.consume_token(token):
            self._fail()

    def fill(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Set a bit of `mask` (vocabulary / 32, rounded up) for each token that may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error() and not self.error:
            self._fail()
        if self.error:
            mask[:] = 0

    def _fail(self) -> None:
        self.error = f"the answer cannot go on in the form asked for: {_line(self._matcher)}"


def forbid(scores: Tensor, constraints: Sequence[Constraint | None]) -> None:
    """Set what may not come next to -inf, in `scores` (rows, tokens) in place."""
    rows = [row for row, one in enumerate(constraints) if one is not None]
    some = [one for one in constraints if one is not None]
    if not some:
        return
    masks = np.zeros((len(rows), -(-max(one.vocabulary for one in some) // 32)), np.int32)
    for mask, one in zip(masks, some, strict=True):
        one.fill(mask[: -(-one.vocabulary // 32)])
    banned = _unpack(masks, scores.device)[:, : scores.shape[1]] == 0
    if len(rows) == len(scores):
        scores.masked_fill_(banned, -torch.inf)
        return
    for row, ban in zip(rows, banned, strict=True):
        scores[row].masked_fill_(ban, -torch.inf)


def _unpack(masks: np.ndarray[Any, np.dtype[np.int32]], device: torch.device) -> Tensor:
    """Bits (rows, words) -> a byte for each (rows, bits)."""
    octets = masks.view(np.uint8)
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little"))
    return unpack_bits(torch.from_numpy(octets).to(device, non_blocking=True))


def unpack_bits(packed: Tensor) -> Tensor:
    """Bytes (rows, n) -> their bits (rows, 8 n), the lowest of each first, where `packed` is."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(2) >> places).bitwise_and(1).flatten(1)


def _spec(args: Any) -> tuple[str, str] | None:
    """Which kind of constraint is asked for, and what: as text, so that it can be remembered."""
    schema, regex = getattr(args, "schema", None), getattr(args, "regex", "")
    choice = getattr(args, "choice", None) or []
    given = [
        name
        for name, there in (("schema", schema is not None), ("regex", regex), ("choice", choice))
        if there
    ]
    if not given:
        return None
    if len(given) > 1:
        raise BadArgument(f"one of {' and '.join(given)} is enough")
    if given == ["schema"]:
        return "schema", json.dumps(_read_schema(schema))
    return ("regex", regex) if regex else ("choice", json.dumps(list(choice)))


def _read_schema(schema: Any) -> dict[str, Any]:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as exc:
            raise BadArgument(f"the schema is no JSON: {exc}") from None
    if schema is True:
        return {"type": "object"}
    if not isinstance(schema, dict):
        raise BadArgument(
            f"the schema must be a JSON object, not {schema!r}", 'write it as {"type": "object"}'
        )
    return schema


@lru_cache(maxsize=64)
def _compiled(
    tokenizer: Any, stop_ids: tuple[int, ...], vocabulary: int, kind: str, text: str
) -> Any:
    """A matcher at its beginning, for others to be copied from: they share what is computed."""
    llg = _library()
    spelled = _spelled(tokenizer, stop_ids, vocabulary)
    if kind == "schema":
        grammar = llg.LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_pattern": _WHITE_SPACE}
        )
    elif kind == "regex":
        grammar = llg.LLMatcher.grammar_from_regex(text)
    else:
        texts = (json.dumps(one, ensure_ascii=False) for one in json.loads(text))
        grammar = llg.LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    limits = llg.LLParserLimits(verbose_errors=False)
    matcher = llg.LLMatcher(spelled, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise BadArgument(
            f"{_KINDS[kind]} cannot be kept to: {_line(matcher)}",
            "docs/concepts/sampling.md says what is understood",
        )
    return matcher


@lru_cache(maxsize=4)
def _spelled(tokenizer: Any, stop_ids: tuple[int, ...], vocabulary: int) -> Any:
    """The tokenizer as llguidance knows it: the bytes of each token, and which end a text."""
    llg = _library()
    ends = [token for token in stop_ids if token < len(tokenizer)]
    if not ends:
        raise BadInput("the model has no token that ends a text: an answer of a given form has to")
    try:
        return llg.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends)
    except ValueError as exc:
        raise BadInput(
            f"the model's tokenizer cannot be used for answers of a given form: {exc}"
        ) from None


def _library() -> ModuleType:
    try:
        import llguidance.hf
    except ImportError:
        raise BadArgument(
            "answers of a given form need a package that is not installed",
            "pip install 'llmos[structured]'",
        ) from None
    return llguidance


def _line(matcher: Any) -> str:
    """What llguidance says is wrong, in one line: of a regular expression it draws a picture."""
    said = matcher.get_error()
    found = re.search(r"^error: (.+)$", said, re.MULTILINE)
    return str(found[1] if found else said.partition("\n")[0])
