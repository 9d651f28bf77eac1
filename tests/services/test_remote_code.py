"""Code that lies in a model's folder runs only for who said so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.kernel.errors import BadInput
from llmos.services.model import load
from llmos.services.programs.chat import Chat
from llmos.services.programs.engine import Engine
from llmos.services.programs.finetune import Finetune
from llmos.services.programs.infer import Infer

CODE = """
from pathlib import Path

from transformers import PretrainedConfig

Path({marker!r}).touch()


class OwnConfig(PretrainedConfig):
    model_type = "its-own"
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the-code-has-run"


@pytest.fixture
def folder(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = tmp_path / "model"
    made.mkdir()
    config = {"model_type": "its-own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (made / "config.json").write_text(json.dumps(config))
    (made / "own.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield made
    load.allow_code(False)


def test_it_is_not_run_and_the_error_names_the_flag(folder: Path, marker: Path) -> None:
    with pytest.raises(BadInput, match="code of its own, which is not run") as caught:
        load.load_config(folder)
    assert "--trust-remote-code" in caught.value.hint
    assert not marker.exists()


def test_with_leave_it_runs_and_its_copy_lies_in_its_users_home(
    folder: Path, marker: Path, tmp_path: Path
) -> None:
    load.allow_code(True)
    assert load.load_config(folder).model_type == "its-own"
    assert marker.exists()
    assert list((tmp_path / "home").rglob("own.py"))


@pytest.mark.parametrize("program", [Infer, Chat, Finetune, Engine])
def test_each_program_that_loads_a_model_has_the_flag_and_it_is_off(program: type) -> None:
    (field,) = (f for f in program.Args.__dataclass_fields__.values()  # type: ignore[attr-defined]
                if f.name == "trust_remote_code")  # fmt: skip
    assert field.default is False


@pytest.mark.parametrize("program", [Infer, Chat])
def test_an_engine_that_runs_code_serves_nobody_who_has_not_said_so(program: type) -> None:
    assert "trust_remote_code" in program.engine_args  # type: ignore[attr-defined]
