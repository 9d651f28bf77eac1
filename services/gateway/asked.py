"""What a request asks of a model: fields of OpenAI's API (and vLLM's) to arguments of `infer`.

Both completions endpoints, the responses and the lines of a batch go through here. Defaults are
OpenAI's, not those of `llmos run`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llmos.services.gateway.errors import ApiError, bad
from llmos.services.gateway.fields import Fields

Args = dict[str, Any]

# An answer in a chat for which nobody has said how long it may be.
CHAT_TOKENS = 4096
COMPLETION_TOKENS = 16

MOST_STOPS = 16
MOST_N = 128
MOST_LOGPROBS = 20
MOST_PROMPTS = 2048
MOST_CHOICES = 1024

# A less urgent class of processes, for who has time (OpenAI's "flex").
TIERS = {"auto": "", "default": "", "priority": "", "flex": "batch"}


@dataclass
class Asked:
    """A request, understood. `args` are those of `infer`, but for the prompt where there are
    several."""

    model: str
    args: Args
    nice: int = 0
    cls: str = ""
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    # Of completions: one of prompt or prompt_ids for each process.
    prompts: list[Args] = field(default_factory=list)
    echo: bool = False
    tier: str = "auto"
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """What `submit` takes beside the arguments."""
        return {"nice": self.nice, "cls": self.cls}


def chat(body: Any) -> Asked:
    """A body of /v1/chat/completions. Raises ApiError."""
    f = Fields(body)
    asked = _common(f)
    messages = f.required("messages")
    asked.args["messages"] = conversation(messages)
    f.refuse("functions", "use 'tools'")
    f.refuse("function_call", "use 'tools' and 'tool_choice'")
    asked.tools = tools(f)
    if asked.tools:
        asked.args["tools"] = asked.tools
    new, old = f.integer("max_completion_tokens", low=0), f.integer("max_tokens", low=0)
    asked.args["max_tokens"] = CHAT_TOKENS if new is None and old is None else new or old or 0
    wanted = f.flag("logprobs")
    top = f.integer("top_logprobs", low=0, high=MOST_LOGPROBS)
    if top is not None and not wanted:
        raise bad("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.", "invalid_value")
    if wanted:
        asked.logprobs = asked.args["logprobs"] = top or 0
    _constrain(f, asked.args)
    f.only("modalities", ["text"], [])
    f.only("add_generation_prompt", True)
    f.only("continue_final_message", False)
    f.only("echo", False)
    for name in ("audio", "prediction", "web_search_options", "reasoning_effort"):
        f.refuse(name, "the models here have no such thing")
    for name in ("chat_template", "chat_template_kwargs", "documents"):
        f.refuse(name, "a model's own chat template is used")
    f.ignore("parallel_tool_calls", "prompt_cache_retention", "verbosity")
    f.done()
    return asked


def completion(body: Any) -> Asked:
    """A body of /v1/completions. Raises ApiError."""
    f = Fields(body)
    asked = _common(f)
    asked.prompts = prompts(f.required("prompt"))
    asked.args["raw"] = True  # a completion goes on with the text as it is
    asked.args["max_tokens"] = f.count("max_tokens", COMPLETION_TOKENS)
    asked.echo = f.flag("echo")
    asked.logprobs = f.integer("logprobs", low=0, high=MOST_LOGPROBS)
    if asked.logprobs is not None:
        asked.args["logprobs"] = asked.logprobs
    # The texts of a prompt's tokens are known only with their log-probabilities.
    if asked.echo and (asked.logprobs is not None or any("prompt_ids" in p for p in asked.prompts)):
        asked.args["prompt_logprobs"] = asked.logprobs or 0
    if f.text("suffix"):
        raise bad(
            "suffix",
            "'suffix' is not supported here: the models only go on with a text.",
            "unsupported_parameter",
        )
    best_of = f.integer("best_of", low=1)
    if best_of is not None and best_of != asked.n:
        raise bad(
            "best_of",
            "'best_of' is not supported here, but as the same number as 'n'.",
            "unsupported_parameter",
        )
    if asked.args["max_tokens"] == 0 and not asked.echo:
        raise bad(
            "max_tokens", "'max_tokens' of 0 asks for nothing, but with 'echo'.", "invalid_value"
        )
    if len(asked.prompts) * asked.n > MOST_CHOICES:
        raise bad(
            "n",
            f"'n' for each prompt makes {len(asked.prompts) * asked.n} answers; at most "
            f"{MOST_CHOICES:,} are made.",
            "above_max_value",
        )
    _constrain(f, asked.args)
    f.done()
    return asked


# ---- what both have ----


def _common(f: Fields) -> Asked:
    args: Args = {
        "temperature": f.number("temperature", 1.0, 0, 2),
        "top_p": f.number("top_p", 1.0, 0, 1),
        "top_k": max(0, f.count("top_k", 0, -1)),
        "min_p": f.number("min_p", 0.0, 0, 1),
        "presence_penalty": f.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": f.number("frequency_penalty", 0.0, -2, 2),
        "repetition_penalty": f.number("repetition_penalty", 1.0, 0.01),
        "ignore_eos": f.flag("ignore_eos"),
    }
    asked = Asked(f.text("model", required=True), args)
    asked.n = args["n"] = f.count("n", 1, 1, MOST_N)
    seed = f.integer("seed")
    if seed is not None:
        args["seed"] = seed
    stop = f.texts("stop", MOST_STOPS)
    if stop:
        args["stop"] = stop
    bias = logit_bias(f)
    if bias:
        args["logit_bias"] = bias
    if f.flag("use_beam_search"):  # vLLM's word for it; n of the best are shown
        args["beams"], args["length_penalty"] = asked.n, f.number("length_penalty", 1.0)
    f.only("length_penalty", 1, 1.0)
    if f.flag("exact"):  # ours: computed alone, so that no other request changes the last bits
        args["exact"] = True
    adapter = f.text("adapter")
    if adapter:
        args["adapter"] = registry_name(adapter, "adapter")
    asked.model = args["model"] = registry_name(asked.model, "model")
    asked.nice = f.count("priority", 0, -20, 19)
    asked.tier = f.choice("service_tier", TIERS, "auto")
    asked.cls = TIERS[asked.tier]
    asked.stream = f.flag("stream")
    options = f.map("stream_options")
    if options and not asked.stream:
        raise bad("stream_options", "'stream_options' needs 'stream' to be true.", "invalid_value")
    inner = Fields(options, "stream_options.")
    asked.include_usage = inner.flag("include_usage")
    inner.ignore("include_obfuscation")
    inner.only("continuous_usage_stats", False)
    inner.done()
    # Who asks, for whom, and how a provider keeps it: nothing of that changes an answer here.
    f.ignore("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "request_id")
    # vLLM's, as far as they ask for what is done anyway.
    f.only("skip_special_tokens", True)
    f.only("spaces_between_special_tokens", True)
    f.only("include_stop_str_in_output", False)
    f.only("add_special_tokens", True)
    f.only("min_tokens", 0)
    f.only("stop_token_ids", [])
    f.only("prompt_logprobs")
    f.only("truncate_prompt_tokens")
    f.only("return_token_ids", False)
    f.only("bad_words", [])
    return asked


def registry_name(model: str, param: str) -> str:
    """A name of the registry. Paths and hub names are for who has a shell on the machine."""
    if not model or "/" in model or model.startswith((".", "~")):
        raise ApiError(
            404, f"The model {model!r} does not exist.", param=param, code="model_not_found"
        )
    return model


def logit_bias(f: Fields) -> dict[str, float]:
    found = {}
    for token, value in f.map("logit_bias").items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not token.isdecimal() or not number or not -100 <= value <= 100:
            raise f.wrong("logit_bias", "token ids with numbers from -100 to 100", {token: value})
        found[token] = float(value)
    return found


def _constrain(f: Fields, args: Args) -> None:
    """At most one of the ways in which an answer can be told its form."""
    ways: dict[str, Any] = {}
    form = f.map("response_format")
    if form:
        schema = json_format(Fields(form, "response_format."))
        if schema is not None:
            ways["response_format"] = ("schema", schema)
    for name, way in (
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
    ):
        value = f.any(name)
        if value is not None:
            ways[name] = _way(name, way, value)
    outputs = f.map("structured_outputs")
    if outputs:
        inner = Fields(outputs, "structured_outputs.")
        for way in ("json", "regex", "choice"):
            value = inner.any(way)
            if value is not None:
                name = f"structured_outputs.{way}"
                ways[name] = _way(name, way, value)
        if inner.flag("json_object"):
            ways["structured_outputs.json_object"] = ("schema", True)
        inner.done()
    for name in ("guided_grammar", "guided_decoding_backend", "guided_whitespace_pattern"):
        f.refuse(name, "guided_json, guided_regex and guided_choice are")
    if len(ways) > 1:
        raise bad(
            list(ways)[1],
            f"'{list(ways)[1]}' and '{next(iter(ways))}' cannot be together: an "
            "answer has one form.",
            "invalid_value",
        )
    args.update(ways.values())


def _way(name: str, way: str, value: Any) -> tuple[str, Any]:
    f = Fields({name: value})
    if way == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise f.wrong(name, "a JSON schema", value) from None
        if not isinstance(value, dict):
            raise f.wrong(name, "a JSON schema", value)
        return "schema", value
    if way == "regex":
        return "regex", f.text(name)
    found = f.texts(name, 1024)
    if not found:
        raise f.wrong(name, "a list of texts", value)
    return "choice", found


def json_format(f: Fields) -> Any:
    """A response_format -> the schema; True: any object; None: any text."""
    kind = f.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "text":
        f.done()
        return None
    if kind == "json_object":
        f.done()
        return True
    inner = Fields(f.required("json_schema"), "response_format.json_schema.")
    f.done()
    return schema_of(inner)


def schema_of(f: Fields) -> dict[str, Any]:
    """The schema of a named one."""
    f.ignore("name", "description", "strict")
    schema = f.map("schema")
    f.done()
    return schema


# ---- prompts ----


def prompts(value: Any) -> list[Args]:
    """A text, a list of texts, token ids, or a list of lists of them -> one of each to a prompt."""
    if isinstance(value, str):
        return [{"prompt": value}]
    if isinstance(value, list) and value and all(map(_is_id, value)):
        return [{"prompt_ids": value}]
    if not isinstance(value, list) or not value:
        raise bad(
            "prompt",
            "Invalid value for 'prompt': expected a string, token ids, or a list of either.",
            "invalid_value",
        )
    if len(value) > MOST_PROMPTS:
        raise bad(
            "prompt",
            f"'prompt' has {len(value)} entries; at most {MOST_PROMPTS:,} are taken.",
            "array_above_max_length",
        )
    return [_prompt(n, one) for n, one in enumerate(value)]


def _prompt(number: int, value: Any) -> Args:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, list) and value and all(map(_is_id, value)):
        return {"prompt_ids": value}
    raise bad(
        f"prompt[{number}]",
        f"Invalid value for 'prompt[{number}]': expected a string or token ids.",
        "invalid_value",
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


# ---- messages and tools ----

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def conversation(value: Any) -> list[dict[str, Any]]:
    """Messages as chat templates take them: contents are texts, arguments of calls are maps."""
    if not isinstance(value, list) or not value:
        raise bad("messages", "'messages' must be a list with at least one message.", "empty_array")
    return [_message(n, message) for n, message in enumerate(value)]


def _message(number: int, value: Any) -> dict[str, Any]:
    at = f"messages[{number}]."
    f = Fields(value, at)
    if "role" not in value:
        f.required("role")
    role = f.choice("role", _ROLES, "user")
    content = text_of(f.any("content"), f"{at}content")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = [_call(c, f"{at}tool_calls[{n}].") for n, c in enumerate(f.items("tool_calls"))]
    if content is None and not calls:
        raise bad(
            f"{at}content",
            f"Missing required parameter: '{at}content'.",
            "missing_required_parameter",
        )
    made["content"] = content or ""
    if calls:
        made["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        text = f.text(name)
        if text:
            made[name] = text
    f.ignore("refusal", "annotations", "reasoning", "reasoning_content", "audio", "function_call")
    f.done()
    return made


def text_of(content: Any, at: str) -> str | None:
    """A content: a text, or parts of which all are texts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(
            at, f"Invalid value for '{at}': expected a string or a list of parts.", "invalid_value"
        )
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind == "refusal" and isinstance(part, dict):
            text = part.get("refusal")
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(
            text, str
        ):
            raise bad(
                f"{at}[{number}]",
                f"Invalid value for '{at}[{number}]': the models here take "
                f"text only, not {kind!r}.",
                "invalid_value",
            )
        texts.append(text)
    return "".join(texts)


def _call(value: Any, at: str) -> dict[str, Any]:
    """A call that the assistant made earlier; templates want its arguments as a map."""
    f = Fields(value, at)
    number = f.text("id")
    f.only("type", "function")
    function = Fields(f.required("function"), f"{at}function.")
    name = function.text("name", required=True)
    arguments: Any = function.any("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise function.wrong("arguments", "JSON", arguments) from None
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": number, **made} if number else made


def tools(f: Fields) -> list[dict[str, Any]]:
    """The tools that a model is told of; empty where it must not call any."""
    found = []
    for number, tool in enumerate(f.items("tools")):
        at = f"tools[{number}]."
        inner = Fields(tool, at)
        if inner.text("type", required=True) != "function":
            raise bad(
                f"{at}type",
                f"'{at}type' is not supported here, but for 'function'.",
                "unsupported_parameter",
            )
        function = inner.map("function")
        inner.done()
        Fields(function, f"{at}function.").text("name", required=True)
        found.append({"type": "function", "function": function})
    choice = f.any("tool_choice")
    if choice not in (None, "none", "auto"):
        raise bad(
            "tool_choice",
            "'tool_choice' is not supported here, but for 'none' or 'auto': "
            "nothing makes a model call a tool.",
            "unsupported_parameter",
        )
    return [] if choice == "none" else found


# ---- embeddings ----


@dataclass
class Embedding:
    """A body of /v1/embeddings, understood."""

    model: str
    inputs: list[Any]  # texts, or lists of token ids
    args: Args
    base64: bool = False
    nice: int = 0


def embedding(body: Any) -> Embedding:
    """A body of /v1/embeddings. Raises ApiError."""
    f = Fields(body)
    model = registry_name(f.text("model", required=True), "model")
    value = f.required("input")
    try:
        inputs = [next(iter(p.values())) for p in prompts(value)]
    except ApiError as exc:
        raise bad(
            (exc.param or "").replace("prompt", "input"), exc.message.replace("prompt", "input"),
            exc.code,
        ) from None  # fmt: skip
    args: Args = {
        "pooling": f.choice("pooling", ("mean", "last"), "mean"),
        "normalize": f.flag("normalize", True),
    }
    as_base64 = f.choice("encoding_format", ("float", "base64"), "float") == "base64"
    nice = f.count("priority", 0, -20, 19)
    f.refuse("dimensions", "a vector cut short means something for models that were made for it")
    f.ignore("user")
    f.done()
    return Embedding(model, inputs, args, as_base64, nice)
