"""Calls of tools in what a model has said.

Only one form is read, and only when it is all that was said: `<tool_call>` JSON `</tool_call>`, as
Hermes, Qwen, SmolLM and others write it, with the name of a tool that the request has, and with
arguments that are a map. Whatever else a model writes is text.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

OPEN = "<tool_call>"
_CALLS = re.compile(r"\s*(?:<tool_call>\s*(.+?)\s*</tool_call>\s*)+", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.+?)\s*</tool_call>", re.DOTALL)

Record = dict[str, Any]


def may_be_calls(text: str) -> bool:
    """May what begins so become calls? Then it is not shown yet."""
    begun = text.lstrip()
    return begun.startswith(OPEN) or OPEN.startswith(begun)


def calls_of(text: str, tools: list[Record]) -> list[Record]:
    """The calls of an answer; none when it is text."""
    if not tools or not _CALLS.fullmatch(text):
        return []
    names = {tool["function"]["name"] for tool in tools}
    found = []
    for body in _CALL.findall(text):
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            return []
        for call in told if isinstance(told, list) else [told]:
            if not isinstance(call, dict) or call.get("name") not in names:
                return []
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(arguments, dict):
                return []
            found.append(_call(call["name"], arguments))
    return found


def _call(name: str, arguments: Record) -> Record:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
