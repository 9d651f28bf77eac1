"""What is said of plugins without running them in the kernel: call schemas, isolated imports,
source texts, fingerprints of code."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch

from llmos.kernel.errors import ServiceFailed
from llmos.services import found, isolated, manifest
from llmos.services.base import Service, call, describe
from llmos.services.call_types import describe_arguments
from llmos.services.data import base as data
from llmos.services.optim import optimizers
from support.plugins import GOOD, install, on_path

Point = importlib.metadata.EntryPoint


class Example(Service):
    name = "example"
    summary = "An example"
    memory = "64MiB"
    limit_s = 7.0

    @call
    def typed(
        self,
        a: Annotated[str, "help of a"],
        b: int | None = None,
        c: Literal["x", "y"] = "x",
        d: list[float] | None = None,
        e: dict[str, Any] | None = None,
        f: Any = None,
    ) -> None:
        """First line.

        Second.
        """

    @call(limit_s=90)
    def slow(self) -> None:
        """Takes long."""

    def private(self) -> None:
        """Not to be called."""


def test_a_service_is_described_by_its_annotations() -> None:
    told = describe(Example)
    assert (told["memory_bytes"], told["essential"]) == (64 * 2**20, False)
    assert sorted(told["calls"]) == ["slow", "typed"]
    assert told["calls"]["slow"]["limit_s"] == 90
    typed = told["calls"]["typed"]
    assert (typed["limit_s"], typed["help"]) == (7, "First line.")
    shown = [(a["name"], a["type"], a["items"], a["choices"], a["required"]) for a in typed["args"]]
    assert shown == [
        ("a", "str", "", [], True),
        ("b", "int?", "", [], False),
        ("c", "str", "", ["x", "y"], False),
        ("d", "list?", "float", [], False),
        ("e", "dict?", "", [], False),
        ("f", "any", "", [], False),
    ]
    assert typed["args"][0]["help"] == "help of a"
    json.dumps(told)


def of_path(self: Any, where: Path) -> None: ...
def of_union(self: Any, what: int | str) -> None: ...
def of_mixed(self: Any, what: Literal[1, "a"]) -> None: ...
def of_stars(self: Any, *what: str) -> None: ...
def of_default(self: Any, what: list = {1}) -> None: ...  # type: ignore  # noqa: B006


@pytest.mark.parametrize("fn", [of_path, of_union, of_mixed, of_stars, of_default])
def test_what_cannot_be_sent_cannot_be_declared(fn: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=f"^{fn.__name__}: "):
        describe_arguments(fn)


def test_a_service_without_a_kernel_says_so_and_a_test_may_answer_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Example(tmp_path)
    with pytest.raises(ServiceFailed, match="no kernel"):
        service.call("models.ls")
    monkeypatch.setattr(Service, "caller", lambda method, args, limit_s: (method, args, limit_s))
    assert service.call("a.b", method="x", limit_s=3) == ("a.b", {"method": "x"}, 3)


IMPORTS = {
    "import time; time.sleep(60)": "importing it took more than 0.5 s",
    "import os; os._exit(0)": "importing it ended the process (exit status 0)",
    "import os; os.kill(os.getpid(), 11)": "importing it ended the process (was killed by signal",
    "raise RuntimeError('no luck\\ntoday')": "RuntimeError: no luck",
    "raise SystemExit(3)": "SystemExit: 3",
    "x = 1": "AttributeError",
    "class S: pass": "is no llmos.services.base.Service",
}


@pytest.mark.parametrize("text", IMPORTS)
def test_a_plugin_that_cannot_be_imported_is_told_in_one_line_and_in_time(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_plugin.py").write_text(text + "\n")
    monkeypatch.setenv("PYTHONPATH", on_path(tmp_path))
    limit_s = 0.5 if "sleep" in text else 60.0
    told = isolated.describe(Point("s", "wrong_plugin:S", "llmos.services"), limit_s)
    assert told.data is None
    assert IMPORTS[text] in told.error
    assert "\n" not in told.error
    if "raise RuntimeError" in text:
        assert told.printed.startswith("Traceback (most recent call last):\n")
        assert 'wrong_plugin.py", line 1, in <module>' in told.printed
        assert "importlib" not in told.printed, "whose fault it is stands first"


def test_what_a_plugin_prints_while_it_is_imported_is_kept_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = "import os\nprint('x' * 300_000, flush=True)\nos.write(2, b'the end\\n')\nos._exit(3)\n"
    (tmp_path / "wrong_plugin.py").write_text(noisy)
    monkeypatch.setenv("PYTHONPATH", on_path(tmp_path))
    told = isolated.describe(Point("s", "wrong_plugin:S", "llmos.services"))
    assert told.error == "importing it ended the process (exit status 3)"
    assert told.printed.endswith("x\nthe end\n")
    assert len(told.printed) == isolated.PRINTED_BYTES


OPTIMIZER = '''
raise RuntimeError("nobody may import this")

def lion(named, lr, weight_decay):
    """Lion, of a plugin."""

class Csv:
    """Comma-separated."""
    kind: str = "text"
'''


def test_plugins_are_described_beside_ours_and_never_imported_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install(site, "p_optim", OPTIMIZER, optimizers={"lion": "p_optim:lion", "sgd": "p_optim:lion"},
            sources={"csv": "p_optim:Csv"})  # fmt: skip
    install(site, "p_good", GOOD, services={"weather": "p_good:Weather"})
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", on_path(site))
    made = manifest.make(manifest.entry_points())
    assert made["optimizers"]["lion"]["summary"] == "Lion, of a plugin."
    assert made["sources"]["csv"]["kind"] == "text"
    assert made["services"]["weather"]["distribution"] == "p_good"
    assert made["optimizers"]["sgd"]["distribution"] == "llmos", "ours is not replaced"
    assert [(b["kind"], b["name"]) for b in made["broken"]] == [("optimizers", "sgd")]
    choices = {a["name"]: a["choices"] for a in made["programs"]["pretrain"]["args"]}
    assert choices["optimizer"] == ["adam", "adamw", "adamw8bit", "lion", "sgd"]


REAL = """
import torch
from llmos.services.data.base import Document, Source

def signum(named, lr, weight_decay):
    return torch.optim.SGD([p for _, p in named], lr=lr)

class LogText(Source):
    kind = "text"

    @classmethod
    def accepts(cls, path):
        return path.suffix == ".log"

    @classmethod
    def read(cls, path):
        yield Document(path.read_text())
"""


def test_a_plugin_brings_an_optimizer_and_a_source_as_ours_are_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install(site, "p_real", REAL, optimizers={"signum": "p_real:signum"},
            sources={"log": "p_real:LogText"})  # fmt: skip
    monkeypatch.syspath_prepend(site)
    data.sources.cache_clear()
    try:
        (tmp_path / "words.log").write_text("some words")
        assert [d.text for d in data.read_text(tmp_path / "words.log")] == ["some words"]
        weight = torch.nn.Parameter(torch.ones(1))
        made = optimizers.build("signum", [("w", weight)], lr=0.5, weight_decay=0.0)
        assert type(made) is torch.optim.SGD
    finally:
        data.sources.cache_clear()


def test_every_optimizer_and_source_of_ours_says_what_it_is() -> None:
    made = manifest.make([p for p in manifest.entry_points() if p.dist and p.dist.name == "llmos"])
    for kind in ("optimizers", "sources"):
        assert made[kind]
        assert all(row["summary"] for row in made[kind].values())
    assert {row["kind"] for row in made["sources"].values()} == {"text", "images"}
    assert made["broken"] == []


def test_a_fingerprint_follows_all_modules_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "p_pack"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/deep.py", "beside.py"):
        (package / name).write_text("raise RuntimeError('not to be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = Point("x", "p_pack.inner.deep:X", "llmos.services")
    spec = found.spec_of("p_pack.inner.deep")
    assert spec is not None
    assert spec.origin == str(package / "inner" / "deep.py")

    def code() -> str:
        found.code_of.cache_clear()
        return found.code_of(point)

    before = code()
    assert code() == before
    (package / "beside.py").write_text("x = 1\n")
    assert code() != before
