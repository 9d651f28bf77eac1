"""/v1/embeddings: texts as vectors, by the program `embed`."""

from __future__ import annotations

import base64
from array import array
from typing import Any

from llmos.kernel.errors import LlmosError
from llmos.services.gateway.asked import Embedding
from llmos.services.gateway.run import Runner, Whose

Record = dict[str, Any]

ENDPOINT = "/v1/embeddings"


async def whole(
    runner: Runner, asked: Embedding, whose: Whose, nice: int = 0, cls: str = ""
) -> Record:
    """The vectors of every input, in their order. Raises LlmosError."""
    options = {"nice": asked.nice or nice, "cls": cls}
    vectors: dict[int, bytes] = {}
    args = {"model": asked.model, "input": asked.inputs, **asked.args}
    async with runner.process("embed", args, options, whose) as process:
        async for batch in process.batches():
            for record in batch:
                if record["kind"] == "embedding":
                    vectors[int(record["index"])] = record["vector"]
        result = process.result.get("result") or {}
    if len(vectors) != len(asked.inputs):
        raise LlmosError(
            f"process {process.pid} made {len(vectors)} of {len(asked.inputs)} vectors"
        )
    runner.meter.spent(result)
    tokens = int(result.get("prompt_tokens") or 0)
    return {
        "object": "list",
        "data": [_shown(n, vectors[n], asked.base64) for n in range(len(asked.inputs))],
        "model": asked.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _shown(index: int, vector: bytes, as_base64: bool) -> Record:
    """float32, little-endian, as they come."""
    value: Any = base64.b64encode(vector).decode() if as_base64 else list(array("f", vector))
    return {"object": "embedding", "index": index, "embedding": value}
