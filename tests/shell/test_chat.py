"""A conversation on the terminal: turns, commands, interruption, the end of its process."""

from __future__ import annotations

import json
import signal
import stat
from collections.abc import Iterator

import pytest

from llmos.kernel.errors import BadArgument, BadInput, LlmosError, NoSuchThing
from llmos.shell import chats as saved_chats
from llmos.shell.chat import ChatEnded, Conversation
from llmos.shell.chats import SavedChat
from llmos.shell.context import Context
from llmos.shell.options import Usage
from llmos.shell.talk import HELP, Talk, context_tokens, is_command
from support.chats import SCHEMA, Chats, Lines
from support.shell import Site

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def chats(off: Site) -> Iterator[Chats]:
    made = Chats(off.home.path)
    yield made
    made.server.close()


def converse(off: Site, *lines: str | type[BaseException], stays: bool = False) -> Talk:
    ctx = Context(off.home)
    conversation = Conversation(ctx, SCHEMA, {"model": "m"}, {})
    talk = Talk(ctx, conversation, Lines(*lines), stats=not stays, stays=stays)
    with conversation:
        talk.run()
    return talk


def said(*pairs: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(pairs)]


# ---- turns ----


def test_turns_are_answered_on_stdout(off: Site, chats: Chats, capsys: Captured) -> None:
    talk = converse(off, "hello", "", "again", "/bye", "never said")
    out, err = capsys.readouterr()
    assert out == "you said hello\nyou said again\n"
    assert err == "3 tokens · first after 10 ms · 50 tokens/s\n" * 2
    assert talk.conversation.messages == said("hello", "you said hello", "again", "you said again")
    assert (talk.conversation.turns, talk.conversation.tokens) == (2, 6)


def test_a_turn_that_is_refused_gives_the_prompt_back(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    talk = converse(off, "refuse", "hello")
    out, err = capsys.readouterr()
    assert "the prompt is too long" in err
    assert out == "you said hello\n"
    assert talk.conversation.messages == said("hello", "you said hello")


def test_who_leaves_ends_the_process_as_done(off: Site, chats: Chats) -> None:
    converse(off, "hello")
    assert chats.inputs[-1] == {"pid": 1, "end": True}
    assert not chats.killed


def test_a_program_that_cannot_end_itself_is_killed(off: Site, chats: Chats) -> None:
    chats.knows = set()
    converse(off, "hello")
    assert chats.killed == [1]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    chats.interrupts = 1
    talk = converse(off, "hello", "go on")
    assert {"pid": 1, "stop": True} in chats.inputs
    assert talk.conversation.messages == said("hello", "you said hello", "go on", "you said go on")
    assert len(chats.submitted) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    capsys.readouterr()


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_answer(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    chats.interrupts, chats.deaf = 2, True
    talk = converse(off, "hello", "go on")
    assert len(chats.submitted) == 2
    assert {"pid": 2, "prompt": "go on"} in chats.inputs
    assert talk.conversation.messages[-2:] == said("go on", "you said go on")
    capsys.readouterr()


def test_ctrl_c_at_the_prompt_drops_the_line(off: Site, chats: Chats, capsys: Captured) -> None:
    converse(off, KeyboardInterrupt, "hello")
    assert capsys.readouterr().out == "you said hello\n"


# ---- the end of its process ----


def test_on_a_pipe_the_end_of_the_process_is_the_end_of_the_chat(off: Site, chats: Chats) -> None:
    with pytest.raises(ChatEnded, match="killed by SIGKILL"):
        converse(off, "die")


def test_at_a_terminal_the_conversation_goes_on_in_a_new_process(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    talk = converse(off, "one", "die", "two", stays=True)
    out, err = capsys.readouterr()
    assert "killed by SIGKILL" in err
    assert "`llmos explain 1`" in err
    assert "your next message starts a new one" in err
    before = said("one", "you said one", "die", "half an ans")
    assert {"pid": 2, "history": before} in chats.inputs
    assert talk.conversation.messages == before + said("two", "you said two")
    assert out == "you said one\nhalf an ansyou said two\n"


def test_a_process_that_ended_at_the_prompt_is_noticed_by_the_next_message(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    ctx = Context(off.home)
    with Conversation(ctx, SCHEMA, {"model": "m"}, {}) as conversation:
        conversation.turn("one")
        chats.end(1, 143, "killed by SIGTERM")
        with pytest.raises(ChatEnded, match="killed by SIGTERM"):
            conversation.turn("two")
        conversation.turn("two")
    assert [i["pid"] for i in chats.inputs if "prompt" in i] == [1, 2]
    capsys.readouterr()


def test_without_a_kernel_the_person_can_still_leave_and_save(off: Site, capsys: Captured) -> None:
    chats = Chats(off.home.path)
    ctx = Context(off.home)
    conversation = Conversation(ctx, SCHEMA, {"model": "m"}, {})
    talk = Talk(ctx, conversation, Lines(), stays=True)
    with conversation:
        conversation.turn("one")
        chats.server.close()
        talk.take("/save kept")
    assert saved_chats.load(off.home, "kept").messages == said("one", "you said one")
    capsys.readouterr()


# ---- settings ----


def test_settings_are_typed_checked_and_sent(off: Site, chats: Chats, capsys: Captured) -> None:
    lines = ("/set max_tokens 5", "/set stop END", '/set stop ["a", "\\n"]', "/set loud on",
             "/set max_tokens many", "/set dtype float32", "/set max_token 5", "/set max_tokens",
             "/set temperature default", '/set system """be', "/show", "/system be kind", "/system",
             "/set parameter seed 4", "/set seed default")  # fmt: skip
    talk = converse(off, *lines)
    assert [i["set"] for i in chats.inputs if "set" in i] == [
        {"max_tokens": 5}, {"stop": ["END"]}, {"stop": ["a", "\n"]}, {"loud": True},
        {"temperature": 0.8}, {"system": '"""be'}, {"system": "be kind"}, {"seed": 4},
    ]  # fmt: skip
    assert talk.conversation.args["system"] == "be kind"
    out, err = capsys.readouterr()
    assert "--max-tokens takes a whole number, not 'many'" in err
    assert "there is no setting 'dtype'" in err, "it belongs to the engine"
    assert "did you mean `max_tokens`?" in err
    assert "seed has no default to go back to" in err
    assert "max_tokens  5  (the max_tokens)" in out
    assert "\nbe kind\n" in out


def test_settings_go_with_the_conversation_into_a_new_process(off: Site, chats: Chats) -> None:
    converse(off, "/set temperature 0.1", "/system be kind", "die", "hello", stays=True)
    assert chats.submitted[1]["args"] == {"model": "m", "temperature": 0.1, "system": "be kind"}


def test_set_alone_lists_them_with_those_of_the_terminal(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    talk = converse(off, "/set", "/set verbose", "/set markdown off", "/set history off",
                    "/set stats perhaps", "/set markdown")  # fmt: skip
    out, err = capsys.readouterr()
    assert "temperature  0.8" in out
    assert "seed         -" in out
    assert talk.stats
    assert not talk.reader.keeps
    assert "stats is on or off, not 'perhaps'" in err
    assert "markdown  off  (" in out
    assert not [i for i in chats.inputs if "set" in i], "none of them is the program's"


# ---- commands ----


def test_help_has_every_command_and_unknown_ones_are_answered(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    from llmos.shell.talk import COMMANDS

    converse(off, "/claer", "/?", "/whatever", "/show nonsense")
    err = capsys.readouterr().err
    assert "did you mean `/clear`?" in err
    assert HELP in err
    assert "there is no command /whatever\n  /? lists them" in err
    assert "there is no /show nonsense" in err
    assert not [name for name in COMMANDS if name not in HELP and name not in ("/help", "/?")]


def test_a_path_is_no_command() -> None:
    assert is_command("/clear") and is_command("/set x 1")  # noqa: PT018
    assert not is_command("/etc/passwd what is it?")
    assert not is_command("a /clear")


def test_clear_forgets_what_was_said(off: Site, chats: Chats, capsys: Captured) -> None:
    talk = converse(off, "one", "/clear", "two")
    assert {"pid": 1, "history": []} in chats.inputs
    assert talk.conversation.messages == said("two", "you said two")
    assert "forgotten" in capsys.readouterr().err


def test_what_the_program_refuses_changes_nothing(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    chats.knows = {"end"}
    talk = converse(off, "one", "/clear")
    assert talk.conversation.messages == said("one", "you said one")
    err = capsys.readouterr().err
    assert err.count("a chat cannot read this message") == 1
    assert "the conversation stays as it was" in err


def test_regenerate_asks_again(off: Site, chats: Chats, capsys: Captured) -> None:
    talk = converse(off, "/regenerate", "one", "two", "/regenerate")
    assert chats.prompts == ["one", "two", "two"]
    assert {"pid": 1, "history": said("one", "you said one")} in chats.inputs
    assert len(talk.conversation.messages) == 4
    assert "nothing was said yet" in capsys.readouterr().err


def test_show_tells_model_settings_statistics_and_history(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    (off.home.path / "models" / "m").mkdir(parents=True)
    (off.home.path / "models" / "m" / "config.json").write_text('{"n_positions": 2048}')
    converse(off, "hello", "/set temperature 0.1", "/show", "/show history", "/show model")
    out = capsys.readouterr().out
    assert "model        m\n" in out
    assert "pid          1\n" in out
    assert "settings     temperature 0.1\n" in out
    assert "messages     2\n" in out
    assert "context      10 of 2.0k tokens" in out
    assert ">>> hello\nyou said hello\n" in out


def test_the_context_of_a_model_that_tells_nothing_is_not_known(off: Site) -> None:
    assert context_tokens(off.home, "toy") is None
    assert context_tokens(off.home, "nowhere") is None


# ---- conversations on disk ----


def test_a_conversation_is_saved_and_loaded(off: Site, chats: Chats, capsys: Captured) -> None:
    converse(
        off, "hello", "/set temperature 0.1", "/system be kind", "/save first", "more", "/save"
    )
    path = off.home.chats / "first.json"
    kept = json.loads(path.read_text())
    assert (kept["version"], kept["model"], kept["system"]) == (1, "m", "be kind")
    assert kept["settings"] == {"temperature": 0.1}
    assert [m["content"] for m in kept["messages"]][2:] == ["more", "you said more"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["first.json"]
    capsys.readouterr()
    talk = converse(off, "/load", "/load first", "again", "/save", stays=True)
    out, err = capsys.readouterr()
    assert "first  4 messages with m" in out
    assert "loaded first: 4 messages" in err
    assert ">>> more" in err, "how it stood"
    assert {"pid": 2, "history": kept["messages"]} in chats.inputs
    assert talk.conversation.args["temperature"] == 0.1
    assert len(saved_chats.load(off.home, "first").messages) == 6


def test_another_conversation_is_not_overwritten_by_chance(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    saved_chats.save(off.home, "old", SavedChat("m", messages=said("a", "b")))
    converse(off, "hello", "/save", "/save old", "/save two words", "/save ../x", "/save .x")
    err = capsys.readouterr().err
    assert "saved under a name" in err
    assert "there is a conversation 'old' already\n  /save --force old" in err
    assert "one word" in err
    assert "'../x' cannot be the name" in err
    assert saved_chats.load(off.home, "old").messages == said("a", "b")
    converse(off, "hello", "/save --force old")
    assert saved_chats.load(off.home, "old").messages == said("hello", "you said hello")


def test_after_clear_a_name_must_be_given_again(off: Site, chats: Chats, capsys: Captured) -> None:
    converse(off, "hello", "/save one", "/clear", "/save")
    assert "saved under a name" in capsys.readouterr().err
    assert len(saved_chats.load(off.home, "one").messages) == 2


def test_a_conversation_with_another_model_goes_on_with_this_one(
    off: Site, chats: Chats, capsys: Captured
) -> None:
    saved_chats.save(off.home, "x", SavedChat("other", messages=said("a", "b")))
    converse(off, "/load x")
    assert "it was with other, and goes on with m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "it is no JSON"),
        ("[]", "it has no version"),
        ('{"version": 9}', "is of version 9"),
        ('{"version": 1, "messages": {}}', "its messages is of the wrong kind"),
        ('{"version": 1, "messages": [{"role": "user"}]}', "message 1 has no role or no content"),
        ('{"version": 1, "messages": [{"role": "user", "content": 3}]}', "message 1"),
        ("\xff", "it is no JSON"),
    ],
)
def test_a_damaged_conversation_is_one_clear_line(off: Site, text: str, says: str) -> None:
    off.home.chats.mkdir()
    (off.home.chats / "bad.json").write_text(text, encoding="latin1")
    with pytest.raises(BadInput, match=says) as error:
        saved_chats.load(off.home, "bad")
    assert "bad.json" in error.value.message


def test_a_conversation_that_is_not_there_has_its_nearest(off: Site) -> None:
    saved_chats.save(off.home, "holiday", SavedChat("m"))
    with pytest.raises(NoSuchThing) as error:
        saved_chats.load(off.home, "holidya")
    assert error.value.hint == "did you mean `holiday`?"
    with pytest.raises(BadArgument):
        saved_chats.load(off.home, "a/b")


def test_a_conversation_that_cannot_be_written_is_an_error_and_leaves_the_old_one(
    off: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    saved_chats.save(off.home, "x", SavedChat("m", messages=said("a", "b")))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlmosError, match="No space left"):
        saved_chats.save(off.home, "x", SavedChat("m"))
    assert saved_chats.load(off.home, "x").messages == said("a", "b")
    assert [p.name for p in off.home.chats.iterdir()] == ["x.json"]


def test_settings_of_the_command_line_go_before_those_that_were_saved(
    off: Site, chats: Chats
) -> None:
    from llmos.shell.talk import apply_settings

    conversation = Conversation(Context(off.home), SCHEMA, {"model": "m", "temperature": 1.0}, {})
    chat = SavedChat("m", "be kind", {"temperature": 0.1, "max_tokens": 9, "gone": 1})
    apply_settings(conversation, chat, {"model": "m", "temperature": 1.0})
    assert conversation.args == {
        "model": "m", "temperature": 1.0, "system": "be kind", "max_tokens": 9,
    }  # fmt: skip


def test_nothing_to_regenerate_is_an_error(off: Site, chats: Chats) -> None:
    with (
        Conversation(Context(off.home), SCHEMA, {"model": "m"}, {}) as conversation,
        pytest.raises(Usage),
    ):
        conversation.forget_turn()


def test_an_answer_that_was_cut_says_by_what(off: Site, chats: Chats, capsys: Captured) -> None:
    chats.why = "length"
    converse(off, "one", "/set max_tokens 3", "two", stays=True)
    err = capsys.readouterr().err
    assert "the model's context is full" in err
    assert "cut at 3 tokens: /set max_tokens N allows more" in err


def test_an_empty_answer_is_part_of_the_conversation(off: Site, chats: Chats) -> None:
    chats.silent = True
    talk = converse(off, "one")
    assert talk.conversation.messages == said("one", "")
