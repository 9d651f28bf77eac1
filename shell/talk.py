"""The loop of a chat: what a person types is said to the model, or is a command to the chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmos.kernel.errors import LlmosError
from llmos.shell import chats
from llmos.shell.chat import ChatEnded, Conversation
from llmos.shell.client import Record
from llmos.shell.context import Context
from llmos.shell.home import Home
from llmos.shell.options import Usage
from llmos.shell.render import ago, clean, count, plural
from llmos.shell.resolve import local_path, nearest_hint
from llmos.shell.view import View, answer_statistics

LEAVE = ("/bye", "/exit", "/quit")
HELP = """\
/set NAME VALUE    change a setting; without VALUE: show it; alone: list them
/system TEXT       what the model is told before the conversation
/show              the model, its settings and what the chat took; /show history
/save [NAME]       keep the conversation
/load [NAME]       go on with a saved one; alone: list them
/clear             forget the conversation
/regenerate        answer the last message again
/bye               leave (also Ctrl-D)
\"\"\"                begins and ends a text of many lines; Alt-Enter is a newline
Ctrl-C             stops the answer, not the chat"""
# Words of `/set` that are about the terminal, and no argument of the program.
SWITCHES = {
    "stats": "tokens and speed after each answer",
    "markdown": "headings, lists and code as such, not as their source",
    "history": "keep what is typed for the next chat's arrow keys",
}


class Reader(Protocol):
    """Where the messages come from."""

    keeps: bool  # are they kept in a file?

    def read(self) -> str:
        """The next message. Raises EOFError at the end, KeyboardInterrupt for one given up."""


@dataclass
class Talk:
    """One person, one conversation."""

    ctx: Context
    conversation: Conversation
    reader: Reader
    stats: bool = False
    stays: bool = False  # at a terminal the end of the process is not the end of the chat
    name: str = ""  # under which the conversation was saved last

    def run(self) -> None:
        """Message after message until the person leaves. Raises ChatEnded where nobody stays."""
        while True:
            try:
                text = self.reader.read()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if text in LEAVE:
                return
            try:
                self.take(text)
            except ChatEnded as exc:
                if not self.stays:
                    raise
                self.say_error(exc.message, exc.hint)
                self.ctx.say("  your next message starts a new one, which knows the conversation")
            except (LlmosError, Usage) as exc:
                self.say_error(exc.message, exc.hint)
            except KeyboardInterrupt:
                self.conversation.drop()

    def take(self, text: str) -> None:
        """A message for the model, or a command."""
        if is_command(text):
            name, _, rest = text.partition(" ")
            command = COMMANDS.get(name)
            if command is None:
                known = [*COMMANDS, *LEAVE]
                raise Usage(f"there is no command {name}", nearest_command(name, known))
            command(self, rest.strip())
        elif text:
            self.answer(text)

    def answer(self, prompt: str) -> None:
        turn = self.conversation.turn(prompt)
        if self.ctx.stdout_is_terminal:
            self.ctx.say("")
        elif turn and not self.conversation.messages[-1]["content"].endswith("\n"):
            self.ctx.print()  # in a file or a pipe an answer ends its line
        if self.stats and turn:
            self.ctx.say(answer_statistics(turn))
        if turn.get("finish_reason") == "length" and self.stays:
            self._say_cut(int(turn.get("tokens") or 0))

    def _say_cut(self, tokens: int) -> None:
        if tokens >= int(self.conversation.settings().get("max_tokens") or 0):
            self.ctx.say(f"(cut at {tokens} tokens: /set max_tokens N allows more)")
        else:
            self.ctx.say("(cut: the model's context is full; /clear makes room)")

    def say_error(self, message: str, hint: str) -> None:
        self.ctx.say(message + (f"\n  {hint}" if hint else ""))

    # ---- commands ----

    def help(self, rest: str) -> None:
        self.ctx.say(HELP)

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name in ("parameter", "parameters"):  # as other chats have it
            name, _, value = value.strip().partition(" ")
        if name in ("verbose", "quiet"):
            name, value = "stats", "on" if name == "verbose" else "off"
        if not name:
            self._list_settings()
        elif name in SWITCHES:
            self._switch(name, value.strip())
        elif not value:
            option = self.conversation.option(name)
            shown = _shown(self.conversation.settings()[option.name])
            self.ctx.print(clean(f"{option.name}  {shown}  ({option.help})"))
        else:
            self.conversation.change(name, unwrapped(value.strip()))

    def _switch(self, name: str, value: str) -> None:
        if not value:
            self.ctx.print(f"{name}  {_shown(self._switches()[name])}  ({SWITCHES[name]})")
            return
        if value not in ("on", "off"):
            raise Usage(f"{name} is on or off, not {value!r}")
        on = value == "on"
        if name == "stats":
            self.stats = on
        elif name == "markdown":
            self.conversation.markdown = on
        else:
            self.reader.keeps = on

    def _switches(self) -> dict[str, bool]:
        return {
            "stats": self.stats,
            "markdown": self.conversation.markdown,
            "history": self.reader.keeps,
        }

    def _list_settings(self) -> None:
        rows = {**self.conversation.settings(), **self._switches()}
        width = max(len(name) for name in rows)
        self.ctx.lines(clean(f"{name:<{width}}  {_shown(value)}") for name, value in rows.items())

    def system(self, rest: str) -> None:
        if rest:
            self.conversation.change_all({"system": unwrapped(rest)})
        else:
            self.ctx.print(self.conversation.args.get("system") or "(no system prompt)")

    def show(self, rest: str) -> None:
        known: dict[str, Callable[[], None]] = {
            "": self._show_all,
            "info": self._show_all,
            "model": lambda: self.ctx.print(str(self.conversation.args["model"])),
            "settings": self._list_settings,
            "parameters": self._list_settings,
            "system": lambda: self.system(""),
            "statistics": lambda: self.ctx.lines(_rows(self._statistics())),
            "history": self._show_history,
        }
        if rest not in known:
            raise Usage(f"there is no /show {rest}", nearest_hint(rest, [k for k in known if k]))
        known[rest]()

    def _show_all(self) -> None:
        talk = self.conversation
        changed = talk.changed()
        self.ctx.lines(
            _rows({
                "model": str(talk.args["model"]),
                "pid": str(talk.pid),
                "system": str(talk.args.get("system") or "-"),
                "settings": "  ".join(f"{k} {_shown(v)}" for k, v in changed.items())
                or "as they are without changes (/set lists them)",
                "saved as": self.name or "-",
                **self._statistics(),
            })
        )  # fmt: skip

    def _statistics(self) -> dict[str, str]:
        talk = self.conversation
        rows = {
            "messages": str(len(talk.messages)),
            "answers": f"{talk.turns}, {plural(talk.tokens, 'token')} in all",
        }
        length, limit = context_used(talk.last), context_tokens(self.ctx.home, talk.args["model"])
        if length:
            of = f" of {count(limit)}" if limit else ""
            rows["context"] = f"{length}{of} tokens"
        elif limit:
            rows["context"] = f"at most {count(limit)} tokens"
        if talk.last:
            rows["last answer"] = answer_statistics(talk.last)
        return rows

    def _show_history(self) -> None:
        self.ctx.lines(
            line for m in self.conversation.messages for line in _message(m, self.ctx.width)
        )

    def save(self, rest: str) -> None:
        words = rest.split()
        forced = "--force" in words
        words = [w for w in words if w != "--force"]
        if len(words) > 1:
            raise Usage("the name of a conversation is one word", "/save NAME")
        name = words[0] if words else self.name
        if not name:
            raise Usage("a conversation is saved under a name", "/save NAME")
        if name != self.name and not forced and chats.exists(self.ctx.home, name):
            raise Usage(
                f"there is a conversation {name!r} already", f"/save --force {name} replaces it"
            )
        path = chats.save(self.ctx.home, name, self.conversation.saved())
        self.name = name
        said = plural(len(self.conversation.messages), "message")
        self.ctx.say(f"saved as {name}: {said}, in {path}")

    def load(self, rest: str) -> None:
        if not rest:
            self._list_chats()
            return
        chat = chats.load(self.ctx.home, rest)
        talk = self.conversation
        talk.replace(chat.messages)
        talk.last = {}
        apply_settings(talk, chat, {})
        self.loaded(rest, chat)

    def loaded(self, name: str, chat: chats.SavedChat) -> None:
        """Say what goes on here, and how it stood."""
        self.name = name
        model = str(self.conversation.args["model"])
        other = (
            "" if chat.model == model else f"; it was with {chat.model}, and goes on with {model}"
        )
        self.ctx.say(f"loaded {name}: {plural(len(chat.messages), 'message')}{other}")
        if self.stays and chat.messages:
            self._show_last(chat.messages)

    def _show_last(self, messages: chats.Messages) -> None:
        """The last question and its answer, as they looked."""
        asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
        for message in messages[asked[-1] if asked else 0 :]:
            if message["role"] == "user":
                self.ctx.say("\n".join(_message(message, self.ctx.width)))
            else:
                with View(self.ctx, "chat", markdown=self.conversation.markdown) as view:
                    view.show({"kind": "text", "text": message["content"]})
                self.ctx.say("")

    def _list_chats(self) -> None:
        home = self.ctx.home
        found = chats.names(home)
        if not found:
            self.ctx.say("no conversation was saved yet: /save NAME saves this one")
        for name in found:
            try:
                chat = chats.load(home, name)
            except LlmosError as exc:
                self.ctx.print(clean(f"{name}  {exc.message}"))
                continue
            said = plural(len(chat.messages), "message")
            self.ctx.print(clean(f"{name}  {said} with {chat.model}, {_when(chat)}"))

    def clear(self, rest: str) -> None:
        self.conversation.replace([])
        self.name = ""
        self.ctx.say("the conversation is forgotten")

    def regenerate(self, rest: str) -> None:
        self.answer(self.conversation.forget_turn())


COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/help": Talk.help,
    "/?": Talk.help,
    "/set": Talk.set,
    "/system": Talk.system,
    "/show": Talk.show,
    "/save": Talk.save,
    "/load": Talk.load,
    "/clear": Talk.clear,
    "/regenerate": Talk.regenerate,
}


def is_command(text: str) -> bool:
    """A slash at the beginning; but a path is something to talk about."""
    word = text.split(maxsplit=1)[0] if text else ""
    return word.startswith("/") and "/" not in word[1:]


def nearest_command(name: str, known: list[str]) -> str:
    near = nearest_hint(name, known)
    return near if near.startswith("did you mean") else "/? lists them"


def apply_settings(talk: Conversation, chat: chats.SavedChat, given: Record) -> None:
    """The settings that a conversation was saved with; `given` on the command line go before."""
    known = talk.options()
    values = {"system": chat.system, **chat.settings}
    values = {k: v for k, v in values.items() if k in known and k not in given}
    if values != {k: talk.args.get(k, known[k].default) for k in values}:
        talk.change_all(values)


def unwrapped(text: str) -> str:
    """A text between triple quotes without them."""
    if text.startswith('"""') and text.endswith('"""') and len(text) >= 6:
        return text[3:-3].strip("\n")
    return text


def context_used(turn: Record) -> int:
    """Tokens that the conversation takes, after a turn."""
    return int(turn.get("prompt_tokens") or 0) + int(turn.get("tokens") or 0)


def context_tokens(home: Home, model: Any) -> int | None:
    """How many tokens a model's context holds, where a folder of it tells."""
    named = Path(local_path(str(model), "."))
    for folder in (home.path / "models" / str(model), named):
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError):
            continue
        for key in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(config, dict) and isinstance(config.get(key), int):
                return int(config[key])
    return None


def _message(message: dict[str, str], width: int) -> list[str]:
    """A message as it stands in a conversation: what a person said behind the prompt."""
    lines = message["content"].splitlines() or [""]
    if message["role"] != "user":
        return [*map(clean, lines), ""]
    return [clean(f"{'>>>' if i == 0 else '...'} {line}") for i, line in enumerate(lines)]


def _when(chat: chats.SavedChat) -> str:
    import time

    return ago(chat.saved_at or None, time.time())


def _rows(rows: dict[str, str]) -> list[str]:
    width = max(len(name) for name in rows)
    return [clean(f"{name:<{width}}  {value}") for name, value in rows.items()]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
