"""From tokens to text while they are made, one piece for each token.

The pieces of one stream, joined, are `decode(prompt + completion)` without the prompt's text. Two
things make that harder than decoding each token alone: a character can be spread over several
tokens (its bytes), and decoders treat the beginning of a text specially (SentencePiece drops the
first space). So each new token is decoded together with a window of tokens before it, the piece is
what the new token adds, and it is held back while it ends in the middle of a character.
A window begins only where a character and a piece began, and always shows some text, so that the
decoder never takes a middle for a beginning.

It knows a tokenizer's `decode` and nothing of models.
"""

from __future__ import annotations

from typing import Any

UNFINISHED = "�"  # what decoders give for bytes that are no whole character

# Decoders look a token or two back; more costs time in each step.
WINDOW_TOKENS = 6
FIRST_WINDOW_TOKENS = 32


class TextStream:
    """The text of a growing list of tokens."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = self._first_window(prompt_ids)
        self._shown = len(self._decode(self._ids))  # characters of the window that were given out
        self._marks: list[int] = []  # tokens of the window before which a piece ended

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED):
            return ""
        piece, self._shown = text[self._shown :], len(text)
        self._marks.append(len(self._ids))
        if len(self._ids) >= 2 * WINDOW_TOKENS:
            self._slide(text)
        return piece

    def flush(self) -> str:
        """What was held back, as far as it can be decoded. The stream ends with this."""
        return self._decode(self._ids)[self._shown :]

    def _slide(self, text: str) -> None:
        """Forget the beginning of the window, if the rest is shown in the same way without it."""
        last = len(self._ids) - WINDOW_TOKENS
        at = max((mark for mark in self._marks if mark <= last), default=0)
        shown = self._decode(self._ids[at:])
        if at and shown.strip() and text.endswith(shown):
            del self._ids[:at]
            self._shown = len(shown)
            self._marks = [mark - at for mark in self._marks if mark > at]

    def _first_window(self, prompt_ids: list[int]) -> list[int]:
        tail = prompt_ids[-FIRST_WINDOW_TOKENS:]
        if len(tail) == len(prompt_ids):
            return list(prompt_ids)
        shown = self._decode(tail)
        same = shown.strip() and self._decode(prompt_ids).endswith(shown)
        return list(tail if same else prompt_ids)

    def _decode(self, ids: list[int]) -> str:
        # Clean-up (" ." to ".") would change text that was sent already.
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Passes text on, but holds back what may become a stop string and cuts where one begins."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown. After `hit` nothing more comes."""
        if not self._stops:
            return text
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stops) if at >= 0]
        self.hit = bool(found)
        keep = min(found) if found else len(self._held) - self._begun()
        shown, self._held = self._held[:keep], "" if self.hit else self._held[keep:]
        return shown

    def flush(self) -> str:
        """What was held back, once it is clear that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _begun(self) -> int:
        """How many characters at the end of the held text are the beginning of a stop string."""
        longest = min(len(self._held), max(len(s) for s in self._stops) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stops):
                return length
        return 0
