"""/v1/responses: a chat whose turns are kept here, so that the next one need only name the last."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llmos.services.gateway import asked as requests
from llmos.services.gateway.answers import Answer, Gathered, chat_logprobs, usage
from llmos.services.gateway.asked import Asked
from llmos.services.gateway.errors import ApiError, bad
from llmos.services.gateway.fields import Fields
from llmos.services.gateway.ids import new_id
from llmos.services.gateway.run import Runner, Whose
from llmos.services.gateway.sse import Events, event
from llmos.services.gateway.store import Record, Store, page, shown
from llmos.services.gateway.toolcalls import calls_of, may_be_calls
from llmos.services.gateway.web import answer

ENDPOINT = "/v1/responses"

# What is kept: so long, and so many of all users; the oldest go.
KEPT_S, MOST_KEPT = 30 * 86400, 10_000
TIDY_EVERY = 200

_LOGPROBS = "message.output_text.logprobs"

# What the chat that a response is made of calls a field, and what its caller did.
_PARAMS = {
    "messages": "input", "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format", "logprobs": "include",
}  # fmt: skip


@dataclass
class Turn:
    """A request for a response, understood."""

    asked: Asked
    items: list[Record]  # what is new in this turn, as items
    messages: list[Record]  # the whole conversation, without instructions
    response: Record  # the object, without its output
    store: bool


class Responses:
    def __init__(self, folder: Path, runner: Runner) -> None:
        self.store = Store(folder, "response")
        self._runner = runner
        self._kept = 0

    # ---- over HTTP ----

    def understand(self, body: Any, whose: Whose) -> Turn:
        """Raises ApiError."""
        f = Fields(body)
        model = f.text("model", required=True)
        items = _items(f.required("input"))
        instructions = f.text("instructions")
        previous = f.text("previous_response_id")
        before = self.store.load(previous, whose)["private"]["messages"] if previous else []
        messages = [*before, *_messages(items)]
        store = f.flag("store", True)
        text = f.map("text")
        told = Fields(text, "text.")
        form = told.map("format") or {"type": "text"}
        told.ignore("verbosity")
        told.done()
        tools = [_tool(n, tool) for n, tool in enumerate(f.items("tools"))]
        include, top = f.items("include"), f.integer("top_logprobs", low=0, high=20)
        for word in include:
            if word != _LOGPROBS:
                raise bad("include", f"Invalid value for 'include': {word!r} is not made here.")
        f.only("background", False)
        f.only("truncation", "disabled")
        f.only("conversation")
        f.only("prompt")
        f.only("max_tool_calls")
        f.refuse("reasoning", "the models here have no such thing")
        f.only("n", 1)
        metadata = f.map("metadata")
        longest = f.integer("max_output_tokens", low=1)
        chat = {
            "model": model, "max_completion_tokens": longest, "response_format": _form(form),
            "messages": [*([{"role": "system", "content": instructions}] if instructions else []),
                         *messages],
            "tools": [_for_chat(tool) for tool in tools] or None, **f.rest(),
        }  # fmt: skip
        if _LOGPROBS in include:
            chat |= {"logprobs": True, "top_logprobs": top or 0}
        options = chat.get("stream_options")
        if isinstance(options, dict):
            chat["stream_options"] = {
                k: v for k, v in options.items() if k != "include_obfuscation"
            }
        try:
            asked = requests.chat(chat)
        except ApiError as exc:
            raise _renamed(exc) from None
        response = {
            "id": new_id("resp"), "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "background": False, "error": None,
            "incomplete_details": None, "instructions": instructions or None,
            "max_output_tokens": longest, "model": model, "output": [],
            "parallel_tool_calls": True, "previous_response_id": previous or None,
            "service_tier": asked.tier, "store": store, "temperature": asked.args["temperature"],
            "text": {"format": form}, "tool_choice": chat.get("tool_choice") or "auto",
            "tools": tools, "top_logprobs": top or 0, "top_p": asked.args["top_p"],
            "truncation": "disabled", "usage": None, "metadata": metadata,
        }  # fmt: skip
        return Turn(asked, items, messages, response, store)

    async def whole(self, turn: Turn, whose: Whose) -> Record:
        found = await self._runner.gather(turn.asked, {}, whose, ENDPOINT)
        response = _completed(turn, found, new_id("msg"))
        await self._keep(turn, response, whose)
        return response

    async def stream(self, turn: Turn, whose: Whose) -> Events:
        made = _Stream(turn)
        found = Gathered(1)
        (text,) = found.answers
        async for batch in self._runner.batches(turn.asked, {}, found, whose, ENDPOINT):
            new = [record for record in batch if found.add(record) is not None]
            entries = [e for record in new for e in record.get("logprobs") or ()]
            held = bool(turn.asked.tools) and may_be_calls(text.text)
            told = made.goes_on("" if held else text.text, [] if held else entries)
            if told:
                yield told
        response = _completed(turn, found, made.message_id)
        await self._keep(turn, response, whose)
        yield made.end(text, response)

    async def one(self, name: str, whose: Whose) -> Response:
        return answer(shown(self.store.load(name, whose)))

    async def delete(self, name: str, whose: Whose) -> Response:
        await asyncio.to_thread(self.store.delete, name, whose)
        return answer({"id": name, "object": "response", "deleted": True})

    async def cancel(self, name: str, whose: Whose) -> Response:
        self.store.load(name, whose)
        raise bad(None, f"Response {name} is not one in the background: it ends with its client.")

    async def items(self, name: str, request: Request, whose: Whose) -> Response:
        found = self.store.load(name, whose)["private"]["items"]
        return answer(page(found[::-1], request.query_params))

    # ---- what is kept ----

    async def _keep(self, turn: Turn, response: Record, whose: Whose) -> None:
        if not turn.store:
            return
        said = [_item_message(item) for item in response["output"]]
        private = {"items": turn.items, "messages": [*turn.messages, *_joined(said)]}
        await asyncio.to_thread(self.store.make, {**response, "private": private}, whose)
        self._kept += 1
        if self._kept % TIDY_EVERY == 1:
            await asyncio.to_thread(self._tidy)

    def _tidy(self) -> None:
        found = self.store.every()
        old = [r for r in found if r["created_at"] < time.time() - KEPT_S]
        for response in {r["id"]: r for r in [*old, *found[MOST_KEPT:]]}.values():
            shutil.rmtree(self.store.path(response["id"]).parent, ignore_errors=True)


# ---- requests ----


def _items(value: Any) -> list[Record]:
    """The input as items, each with an id."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad("input", "Invalid value for 'input': expected a string or a list of items.")
    return [_item(n, item) for n, item in enumerate(value)]


def _item(number: int, value: Any) -> Record:
    at = f"input[{number}]"
    if not isinstance(value, dict):
        raise bad(at, f"Invalid value for '{at}': expected an object.")
    kind = value.get("type", "message")
    if kind not in ("message", "function_call", "function_call_output", "reasoning"):
        raise bad(f"{at}.type", f"'{at}.type' is not supported here: {kind!r}.")
    made = {**value, "type": kind, "id": value.get("id") or new_id("msg")}
    if kind == "message" and isinstance(made.get("content"), str):
        part = "output_text" if made.get("role") == "assistant" else "input_text"
        made["content"] = [{"type": part, "text": made["content"]}]
    return made


def _messages(items: list[Record]) -> list[Record]:
    """Items as the messages of a chat."""
    return _joined([_item_message(item) for item in items if item["type"] != "reasoning"])


def _item_message(item: Record) -> Record:
    if item["type"] == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if item["type"] == "function_call_output":
        output = item.get("output")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    return {"role": item.get("role"), "content": item.get("content")}


def _joined(messages: list[Record]) -> list[Record]:
    """Calls that were made together are one message."""
    found: list[Record] = []
    for message in messages:
        if found and "tool_calls" in message and "tool_calls" in found[-1]:
            calls = [*found[-1]["tool_calls"], *message["tool_calls"]]
            found[-1] = {**found[-1], "tool_calls": calls}
        else:
            found.append(message)
    return found


def _tool(number: int, tool: Any) -> Record:
    at = f"tools[{number}]"
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise bad(f"{at}.type", f"'{at}.type' is not supported here, but for 'function'.")
    return {"strict": None, **tool}


def _for_chat(tool: Record) -> Record:
    function = {k: v for k, v in tool.items() if k != "type" and v is not None}
    return {"type": "function", "function": function}


def _form(form: Record) -> Record:
    """text.format -> response_format: the schema stands one level deeper there."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}


def _renamed(exc: ApiError) -> ApiError:
    for theirs, ours in _PARAMS.items():
        if exc.param is not None and exc.param.startswith(theirs):
            exc.message = exc.message.replace(theirs, ours)
            exc.param = ours + exc.param.removeprefix(theirs)
    return exc


# ---- answers ----


def _completed(turn: Turn, found: Gathered, message_id: str) -> Record:
    """The object at its end."""
    (text,) = found.answers
    spent = usage([found.result])
    response = {
        **turn.response,
        "status": "completed",
        "output": _output(text, turn.asked, message_id),
        "usage": {
            "input_tokens": spent["prompt_tokens"],
            "input_tokens_details": {**spent["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": spent["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": spent["total_tokens"],
        },
    }
    if text.finish_reason == "length":
        response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return response


def _output(text: Answer, asked: Asked, message_id: str) -> list[Record]:
    calls = calls_of(text.text, asked.tools)
    if calls:
        return [{"type": "function_call", "id": f"fc_{call['id'][5:]}", "call_id": call["id"],
                 "status": "completed", **call["function"]} for call in calls]  # fmt: skip
    status = "incomplete" if text.finish_reason == "length" else "completed"
    return [_message(message_id, status, [_part(text.text, _logprobs(text.entries, asked))])]


def _message(name: str, status: str, content: list[Record]) -> Record:
    return {"type": "message", "id": name, "status": status, "role": "assistant",
            "content": content}  # fmt: skip


def _part(text: str, logprobs: list[Record]) -> Record:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprobs(entries: list[Record], asked: Asked) -> list[Record]:
    found: list[Record] = chat_logprobs(entries)["content"] if asked.logprobs is not None else []
    return found


class _Stream:
    """The events of one response, numbered."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._number = 0
        self._sent = 0  # characters
        self._begun = self._in_message = False
        self.message_id = new_id("msg")

    def goes_on(self, text: str, entries: list[Record]) -> bytes:
        """The events for what is new of the text."""
        told = (
            [] if self._begun else [self._of_response("created"), self._of_response("in_progress")]
        )
        self._begun = True
        piece = text[self._sent :]
        if piece or entries:
            told += [*self._open(), self._delta(piece, entries)]
            self._sent = len(text)
        return b"".join(told)

    def end(self, text: Answer, response: Record) -> bytes:
        """What was held back, the ends of all that has begun, and the whole object."""
        told = (
            [] if self._begun else [self._of_response("created"), self._of_response("in_progress")]
        )
        if response["output"][0]["type"] == "message":
            held = text.text[self._sent :]
            told += self._open() + ([self._delta(held, [])] if held else [])
            (item,) = response["output"]
            (part,) = item["content"]
            place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
            told += [
                self._say(
                    "output_text.done", **place, text=part["text"], logprobs=part["logprobs"]
                ),
                self._say("content_part.done", **place, part=part),
                self._say("output_item.done", output_index=0, item=item),
            ]
        else:
            for index, item in enumerate(response["output"]):
                told += self._call(index, item)
        told.append(self._say(response["status"], response=response))
        return b"".join(told)

    def _call(self, index: int, item: Record) -> list[bytes]:
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        arguments = item["arguments"]
        return [
            self._say("output_item.added", output_index=index, item=begun),
            self._say("function_call_arguments.delta", **place, delta=arguments),
            self._say("function_call_arguments.done", **place, arguments=arguments,
                      name=item["name"]),
            self._say("output_item.done", output_index=index, item=item),
        ]  # fmt: skip

    def _open(self) -> list[bytes]:
        if self._in_message:
            return []
        self._in_message = True
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        item = _message(self.message_id, "in_progress", [])
        return [
            self._say("output_item.added", output_index=0, item=item),
            self._say("content_part.added", **place, part=_part("", [])),
        ]

    def _delta(self, piece: str, entries: list[Record]) -> bytes:
        return self._say(
            "output_text.delta", item_id=self.message_id, output_index=0, content_index=0,
            delta=piece, logprobs=_logprobs(entries, self._turn.asked),
        )  # fmt: skip

    def _of_response(self, what: str) -> bytes:
        return self._say(what, response=self._turn.response)

    def _say(self, what: str, **fields: Any) -> bytes:
        kind = f"response.{what}"
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)


def failed(error: dict[str, Any]) -> bytes:
    """A stream that breaks in the middle, as this endpoint says it."""
    told = error["error"]
    return event({"type": "error", "code": told["code"], "message": told["message"],
                  "param": told["param"], "sequence_number": 0}, "error")  # fmt: skip
