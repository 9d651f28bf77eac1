"""`llmos service new`: a small distribution with a service, its calls and their tests.

The files lie here as text: what they show is what docs/guides/write-a-service.md explains.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from llmos.kernel.errors import BadArgument, BadInput

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "llmos-@dashed@"
version = "0.1.0"
description = "@title@, a service of llmos"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["llmos"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points."llmos.services"]
@name@ = "llmos_@name@:@title@"

[tool.setuptools]
py-modules = ["llmos_@name@"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

_MODULE = '''\
"""@title@, a service of llmos."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from llmos.kernel.errors import BadArgument
from llmos.services.base import Service, call

GREETINGS = {"en": "Hello", "de": "Guten Tag", "fr": "Bonjour"}


class @title@(Service):
    name = "@name@"
    summary = "Greets people, and counts how often"
    memory = "256MiB"  # more ends it, with a line that says so; then it is started again
    limit_s = 10.0  # a call that takes longer has hung; the same happens

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.path = home / "@name@.json"  # what must outlive this process lies on disk
        self.counts = json.loads(self.path.read_text()) if self.path.exists() else {}

    @call
    def greet(
        self,
        who: Annotated[str, "whom to greet"],
        language: Annotated[Literal["en", "de", "fr"], "in which language"] = "en",
        times: Annotated[int, "how often"] = 1,
    ) -> dict[str, str | int]:
        """Greet somebody, and count it."""
        if times < 1:
            raise BadArgument(f"times is 1 or more, not {times}")
        self.counts[who] = self.counts.get(who, 0) + times
        self._save()
        text = " ".join([f"{GREETINGS[language]}, {who}!"] * times)
        return {"text": text, "count": self.counts[who]}

    @call
    def counted(self, at_least: Annotated[int, "leave out who was greeted less often"] = 1) -> dict:
        """Who was greeted, and how often."""
        return {who: n for who, n in sorted(self.counts.items()) if n >= at_least}

    def _save(self) -> None:
        aside = self.path.with_suffix(".new")  # a crash leaves the old file, or the new one
        aside.write_text(json.dumps(self.counts))
        os.replace(aside, self.path)
'''

_TESTS = '''\
"""The calls, called as plain methods: a service needs no kernel to be tested."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from llmos.kernel.errors import BadArgument
from llmos.services.base import describe

from llmos_@name@ import @title@


def test_greets_in_the_language_that_was_asked_for(tmp_path: Path) -> None:
    service = @title@(tmp_path)
    assert service.greet(who="Ada") == {"text": "Hello, Ada!", "count": 1}
    assert service.greet(who="Ada", language="fr", times=2)["text"] == "Bonjour, Ada! Bonjour, Ada!"


def test_what_was_counted_is_there_after_a_restart(tmp_path: Path) -> None:
    @title@(tmp_path).greet(who="Ada", times=3)
    @title@(tmp_path).greet(who="Bob")
    assert @title@(tmp_path).counted() == {"Ada": 3, "Bob": 1}
    assert @title@(tmp_path).counted(at_least=2) == {"Ada": 3}


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="1 or more"):
        @title@(tmp_path).greet(who="Ada", times=0)


def test_llmos_finds_the_service_and_its_calls() -> None:
    (point,) = entry_points(group="llmos.services", name="@name@")
    described = describe(point.load())
    assert sorted(described["calls"]) == ["counted", "greet"]
'''

_README = """\
# llmos-@dashed@

A service of llmos: a process of its own, supervised by the
kernel, whose methods others call by name.

```sh
pip install -e '.[test]'
pytest
llmos service reload
llmos call @name@.greet --who Ada --language fr
llmos help @name@.greet
llmos service logs @name@
```

`llmos_@name@.py` is the service. After a change: `llmos service reload`.
"""


def write(name: str, folder: Path) -> Path:
    """Write the distribution of a service into a new folder. Raises BadArgument, BadInput."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise BadArgument(f"{name!r} is no name for a service",
                          "write it as weather or fortune_2: a-z, 0-9 and _")  # fmt: skip
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} is there already", "choose another folder with --path")
    title = "".join(part.capitalize() for part in name.split("_")) or name
    words = {"name": name, "dashed": name.replace("_", "-").strip("-"), "title": title}
    files = {
        "pyproject.toml": _PYPROJECT,
        f"llmos_{name}.py": _MODULE,
        f"tests/test_{name}.py": _TESTS,
        "README.md": _README,
    }
    try:
        (folder / "tests").mkdir(parents=True)
        for path, text in files.items():
            filled = re.sub(r"@(name|dashed|title)@", lambda m: words[m[1]], text)
            (folder / path).write_text(filled)
    except OSError as exc:
        raise BadInput(f"{exc.filename} cannot be written: {exc.strerror}") from None
    return folder
