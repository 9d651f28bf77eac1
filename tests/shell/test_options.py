"""Command lines as data: the parser, and what it says about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.shell.helptext import command_help
from llmos.shell.options import Command, Option, Usage, convert, duration_s, from_schema, parse

RUN = (
    Option("model", "which", positional=True, required=True),
    Option("prompt", "what", positional=True),
    Option("max_tokens", "how many", type="int", short="-n", minimum=1, maximum=100),
    Option("temperature", "how warm", type="float"),
    Option("stop", "where", type="list"),
    Option("raw", "as it is", type="bool"),
    Option("quiet", "say nothing", type="bool", short="-q"),
    Option("dtype", "numbers", choices=("auto", "float32")),
    Option("timeout", "how long", type="duration"),
)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("m p", {"model": "m", "prompt": "p"}),
        ("m --max-tokens 5 p", {"model": "m", "prompt": "p", "max_tokens": 5}),
        ("--max-tokens=5 m", {"model": "m", "max_tokens": 5}),
        ("m --max_tokens 5", {"model": "m", "max_tokens": 5}),
        ("m -n5", {"model": "m", "max_tokens": 5}),
        ("m -n 5 -q", {"model": "m", "max_tokens": 5, "quiet": True}),
        ("m --stop a --stop b", {"model": "m", "stop": ["a", "b"]}),
        ("m --raw --no-quiet", {"model": "m", "raw": True, "quiet": False}),
        ("m -- --raw", {"model": "m", "prompt": "--raw"}),
        ("m -", {"model": "m", "prompt": "-"}),
        ("m -5", {"model": "m", "prompt": "-5"}),
        ("m --temperature -0.5", {"model": "m", "temperature": -0.5}),
        ("m --timeout 2m", {"model": "m", "timeout": 120.0}),
    ],
)
def test_a_command_line_gives_values(words: str, values: dict[str, Any]) -> None:
    assert parse(RUN, words.split()) == values


def test_a_prompt_may_begin_with_a_dash() -> None:
    assert parse(RUN, ["m", "- and then"])["prompt"] == "- and then"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "MODEL is missing"),
        ("m p q", "one argument too many: 'q'"),
        ("m --max-token 5", "there is no flag --max-token"),
        ("m -x", "there is no flag -x"),
        ("m --max-tokens", "--max-tokens needs a value"),
        ("m --max-tokens x", "--max-tokens takes a whole number, not 'x'"),
        ("m --max-tokens 0", "--max-tokens is at least 1, not 0"),
        ("m --max-tokens 101", "--max-tokens is at most 100, not 101"),
        ("m --temperature warm", "--temperature takes a number, not 'warm'"),
        ("m --dtype float31", "--dtype is one of auto, float32, not 'float31'"),
        ("m --raw=yes", "--raw takes no value"),
        ("m --timeout soon", "--timeout takes a time such as 30s, 5m or 2h"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(words: str, says: str) -> None:
    with pytest.raises(Usage) as caught:
        parse(RUN, words.split())
    assert says in caught.value.message


def test_a_wrong_flag_or_choice_is_answered_with_the_nearest() -> None:
    with pytest.raises(Usage) as flag:
        parse(RUN, ["m", "--max-token", "5"])
    assert flag.value.hint == "did you mean `--max-tokens`?"
    with pytest.raises(Usage) as choice:
        parse(RUN, ["m", "--dtype", "float31"])
    assert choice.value.hint == "did you mean `float32`?"


def test_the_rest_of_a_line_may_belong_to_another_command() -> None:
    options = (
        Option("command", "what", positional=True, required=True, rest=True),
        Option("adjustment", "by how much", type="int", short="-n"),
    )
    assert parse(options, ["-n", "5", "run", "-n", "3", "--raw"]) == {
        "adjustment": 5,
        "command": ["run", "-n", "3", "--raw"],
    }


@pytest.mark.parametrize(
    ("word", "seconds"),
    [("20", 20.0), ("1.5s", 1.5), ("5m", 300.0), ("3h", 10800.0), ("200ms", 0.2), ("x", None),
     ("", None), ("5 m", None), ("1h30m", 5400.0), ("-1", -1.0)],
)  # fmt: skip
def test_durations(word: str, seconds: float | None) -> None:
    assert duration_s(word) == seconds


def test_a_duration_of_a_program_is_written_with_its_unit() -> None:
    field = {"name": "keep_alive_s", "type": "float", "required": False, "default": 300.0,
             "help": "how long", "positional": False, "choices": [], "metavar": "",
             "duration": True, "minimum": -1, "maximum": None}  # fmt: skip
    options = from_schema({"args": [field]})
    assert options[0].flag == "--keep-alive"
    for words, seconds in (
        (["--keep-alive", "5m"], 300.0), (["--keep-alive=-1"], -1.0),
        (["--keep-alive", "-1"], -1.0),
        (["--keep-alive", "0"], 0.0), (["--keep-alive-s", "300"], 300.0),
    ):  # fmt: skip
        assert parse(options, words) == {"keep_alive_s": seconds}
    with pytest.raises(Usage, match="--keep-alive takes a time"):
        parse(options, ["--keep-alive", "soon"])
    timeout = (Option("timeout", "how long", type="duration"),)
    with pytest.raises(Usage, match="--timeout takes a time"):
        parse(timeout, ["--timeout", "-1"])


def test_a_program_schema_gives_options_with_their_limits() -> None:
    schema = {
        "args": [
            {"name": "data", "type": "str", "required": True, "default": None, "help": "a file",
             "positional": True, "path": True, "choices": [], "metavar": ""},
            {"name": "seed", "type": "int?", "required": False, "default": None, "help": "luck",
             "positional": False, "choices": [], "metavar": "", "minimum": 0, "maximum": None},
        ]
    }  # fmt: skip
    data, seed = from_schema(schema)
    assert (data.positional, data.required, data.complete) == (True, True, "path")
    assert (seed.type, seed.minimum) == ("int", 0)


def test_help_fits_80_columns_and_tells_defaults_choices_and_examples() -> None:
    options = (*RUN, Option("rate", "how fast " * 12, type="float", default=0.5))
    command = Command("run", "Run it", lambda ctx, values: 0, options, examples=("llmos run m",))
    text = command_help(command)
    assert max(map(len, text.splitlines())) <= 80
    assert "Usage: llmos run [options] MODEL [PROMPT]" in text
    assert "default: 0.5" in text
    assert "one of auto, float32" in text
    assert "  llmos run m" in text


def test_json_is_written_or_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (tmp_path / "binary").write_bytes(b"\xff")
    option = Option("schema", "", type="any")
    assert convert(option, "[1, 2]") == [1, 2]
    assert convert(option, "@schema.json") == {"type": "object"}
    for word, says, hint in (
        ("schema.json", "takes JSON", "a file as @schema.json"),
        ("{", "takes JSON", "a file as @FILE"),
        ("@none", "none cannot be read: No such file or directory", ""),
        ("@binary", "binary is not UTF-8 text", ""),
    ):
        with pytest.raises(Usage) as error:
            convert(option, word)
        assert says in error.value.message
        assert hint in error.value.hint
