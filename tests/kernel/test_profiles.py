"""Profiles: what is remembered of earlier runs, and when it must not be used."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel import profiles
from llmos.kernel.profiles import LAST_PEAKS, MOST_PROFILES, Profiles, key, scaled
from llmos.services.programs import base
from llmos.services.programs.exec import Exec
from llmos.services.programs.finetune import Finetune
from llmos.services.programs.gan import Gan
from llmos.services.programs.pretrain import Pretrain
from llmos.services.programs.spin import Spin

PLAN = [
    {"kind": "weights", "bytes": 100, "shared": "file"},
    {"kind": "gradients", "bytes": 10, "shared": ""},
    {"kind": "optimizer", "bytes": 30, "shared": ""},
]


def made(path: Path, stamp: str = "v1", share: float = 0.0, margin: int = 0) -> Profiles:
    return Profiles(path, stamp, share, margin)


def loaded(path: Path, stamp: str = "v1") -> tuple[Profiles, list[str]]:
    said: list[str] = []
    found = made(path, stamp)
    found.load(said.append)
    return found, said


def described(program: type[base.Program]) -> dict[str, Any]:
    return {**base.describe(program), "entry": f"{program.__module__}:{program.__name__}"}


def defaults(schema: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**{f["name"]: f["default"] for f in schema["args"]}, **values}


# ---- what is remembered ----


def test_a_plan_is_remembered_and_a_stranger_is_not_known(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    assert known.lookup("a") is None
    assert known.planned("a", PLAN) == PLAN
    assert known.lookup("a") == PLAN
    assert known.lookup("b") is known.lookup(None) is None


def test_the_promise_is_the_measured_peak_and_its_margin(tmp_path: Path) -> None:
    known = made(tmp_path / "p", share=0.1, margin=64)
    known.planned("a", PLAN)
    known.measured("a", 1000)
    assert known.lookup("a") == scaled(PLAN, 1000 + 100 + 64)
    assert known.planned("a", PLAN) == known.lookup("a"), "a new plan does not undo a measurement"


def test_the_largest_of_the_last_runs_counts_and_an_odd_one_is_forgotten(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    known.planned("a", PLAN)
    known.measured("a", 900)
    for _ in range(LAST_PEAKS - 1):
        known.measured("a", 80)
        assert known.lookup("a") == scaled(PLAN, 900)
    known.measured("a", 80)
    assert known.lookup("a") == scaled(PLAN, 80)


def test_a_measurement_without_a_plan_saves_no_plan(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    known.measured("a", 80)
    assert known.lookup("a") is None
    assert known.planned("a", PLAN) == scaled(PLAN, 80)


def test_what_cannot_be_known_is_not_remembered(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    assert known.planned(None, PLAN) == PLAN
    known.measured(None, 7)
    known.measured("a", 0)
    known.planned("a", [])
    assert len(known) == 0


def test_nobody_changes_what_is_remembered_through_what_was_given(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    given_out = known.planned("a", PLAN)
    given_out[0]["bytes"] = 7
    assert known.lookup("a") == PLAN


def test_those_used_last_are_kept(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    for n in range(MOST_PROFILES):
        known.planned(str(n), PLAN)
    assert known.lookup("0") == PLAN  # used again
    known.planned("new", PLAN)
    assert len(known) == MOST_PROFILES
    assert known.lookup("1") is None
    assert known.lookup("0") == known.lookup("new") == PLAN


# ---- on disk ----


def test_it_outlives_the_kernel(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    known.planned("a", PLAN)
    known.measured("a", 500)
    known.save()
    again, said = loaded(tmp_path / "p")
    assert again.lookup("a") == known.lookup("a")
    assert said == []
    assert [p.name for p in tmp_path.iterdir()] == ["p"], "nothing is left aside"


def test_it_is_written_only_when_something_changed(tmp_path: Path) -> None:
    known = made(tmp_path / "p")
    known.save()
    assert not (tmp_path / "p").exists()
    known.planned("a", PLAN)
    known.save()
    (tmp_path / "p").unlink()
    known.save()
    assert not (tmp_path / "p").exists()


def test_profiles_of_other_versions_are_forgotten(tmp_path: Path) -> None:
    known = made(tmp_path / "p", "v1")
    known.planned("a", PLAN)
    known.save()
    again, said = loaded(tmp_path / "p", "v2")
    assert len(again) == 0
    assert len(said) == 1


WHOLE = {"format": 1, "stamp": "v1", "profiles": {"a": {"segments": PLAN, "peaks": [5]}}}


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    held = json.loads(json.dumps(WHOLE))
    change(held)
    return json.dumps(held)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '"x"', "[" * 100_000, "{}", '{"format": 1}',
     json.dumps(WHOLE)[:-9],
     broken(lambda h: h.update(profiles=[])),
     broken(lambda h: h["profiles"].update(a=7)),
     broken(lambda h: h["profiles"]["a"].pop("peaks")),
     broken(lambda h: h["profiles"]["a"].update(peaks=["5"])),
     broken(lambda h: h["profiles"]["a"].update(peaks=[-5])),
     broken(lambda h: h["profiles"]["a"].update(segments={})),
     broken(lambda h: h["profiles"]["a"]["segments"][0].update(bytes=True)),
     broken(lambda h: h["profiles"]["a"]["segments"][0].pop("shared"))],
)  # fmt: skip
def test_a_damaged_file_is_started_afresh_with_a_line_in_the_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "p").write_text(text)
    found, said = loaded(tmp_path / "p")
    assert len(found) == 0
    assert len(said) == 1
    assert "started afresh" in said[0]
    found.planned("b", PLAN)
    found.save()
    assert loaded(tmp_path / "p")[1] == []


def test_bytes_that_are_no_text_and_a_folder_are_damage_too(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    assert len(loaded(tmp_path / "p")[1]) == 1
    (tmp_path / "folder").mkdir()
    assert len(loaded(tmp_path / "folder")[1]) == 1
    assert loaded(tmp_path / "none")[1] == []


segments_of = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(base.KINDS), "bytes": st.integers(0, 1 << 45),
         "shared": st.sampled_from(["", "", "file"])}
    ),
    min_size=1,
)  # fmt: skip


@given(segments=segments_of, private=st.integers(0, 1 << 45))
def test_scaling_makes_up_the_bytes_exactly_and_leaves_shared_ones_alone(
    segments: list[dict[str, Any]], private: int
) -> None:
    found = scaled(segments, private)
    assert sum(s["bytes"] for s in found if not s["shared"]) == private
    assert [s for s in found if s["shared"]] == [s for s in segments if s["shared"]]
    assert all(s["bytes"] >= 0 for s in found)
    before = [s for s in segments if not s["shared"]]
    total = sum(s["bytes"] for s in before)
    if total:
        after = [s for s in found if not s["shared"]]
        assert [s["kind"] for s in after] == [s["kind"] for s in before]
        for old, new in zip(before, after, strict=True):
            assert abs(new["bytes"] - old["bytes"] * private / total) <= 1 + private * 1e-12


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("planned"), st.sampled_from("abc"), segments_of),
            st.tuples(st.just("measured"), st.sampled_from("abc"), st.integers(1, 1 << 40)),
        ),
        max_size=20,
    )
)
def test_what_was_saved_is_what_is_loaded(
    what: list[tuple[str, str, Any]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p"
        known = made(path)
        for verb, name, value in what:
            getattr(known, verb)(name, value)
        known.save()
        again, said = loaded(path)
        assert said == []
        assert [again.lookup(k) for k in "abc"] == [known.lookup(k) for k in "abc"]


# ---- the key ----


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one")
    (tmp_path / "data" / "b.txt").write_text("two")
    return tmp_path / "data"


def pretrain_key(data: Path, kind: str = "cpu", **values: Any) -> str | None:
    schema = described(Pretrain)
    return key(schema, defaults(schema, **{"data": str(data), "out": "m", **values}), kind)


def test_what_cannot_change_memory_is_not_in_the_key(data: Path) -> None:
    first = pretrain_key(data)
    assert first is not None
    for change in ({"seed": 7}, {"out": "other"}, {"steps": 5}, {"lr": 0.5}, {"overwrite": True}):
        assert pretrain_key(data, **change) == first, change


def test_what_may_change_memory_is(data: Path) -> None:
    schema = described(Pretrain)
    keys = [pretrain_key(data)]
    for f in schema["args"]:
        if f["shape"] and not f["path"] and not f["model"]:
            other = {"int": 3, "float": 0.25, "bool": True, "str": "x"}[f["type"]]
            assert other != f["default"]
            keys.append(pretrain_key(data, **{f["name"]: other}))
    keys += [pretrain_key(data, "cuda"), pretrain_key(data / "a.txt")]
    assert len(keys) > 10
    assert len(set(keys)) == len(keys)


def test_another_program_is_another_profile(data: Path) -> None:
    spin, gan = described(Spin), described(Gan)
    assert key(spin, defaults(spin), "cpu") != key({**spin, "name": "x"}, defaults(spin), "cpu")
    assert key(gan, defaults(gan, data=str(data), out="m"), "cpu") != pretrain_key(data)


def test_a_file_that_changed_is_another_profile(data: Path) -> None:
    keys = [pretrain_key(data)]
    (data / "a.txt").write_text("longer")
    keys.append(pretrain_key(data))
    os.utime(data / "b.txt", ns=(1, 1))
    keys.append(pretrain_key(data))
    (data / "sub").mkdir()
    (data / "sub" / "c.txt").write_text("new")
    keys.append(pretrain_key(data))
    (data / "sub" / "c.txt").rename(data / "sub" / "d.txt")
    keys.append(pretrain_key(data))
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_without_the_input_there_is_no_key_so_that_the_plan_refuses_it(data: Path) -> None:
    schema = described(Finetune)
    args = defaults(schema, model=str(data), data=str(data / "a.txt"), out="m")
    assert key(schema, args, "cpu") is not None
    (data / "a.txt").unlink()
    assert key(schema, args, "cpu") is None
    (data / "dangling").symlink_to("nowhere")
    assert key(schema, {**args, "data": str(data)}, "cpu") is None


def test_a_model_on_a_hub_and_somebodys_command_have_no_key(data: Path) -> None:
    schema = described(Finetune)
    args = defaults(schema, model="someone/model", data=str(data), out="m")
    assert key(schema, args, "cpu") is None
    command = described(Exec)
    assert key(command, defaults(command, command=["true"]), "cpu") is None


def test_a_folder_of_too_many_files_has_no_key(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MOST_FILES", 2)
    assert pretrain_key(data) is not None
    (data / "c.txt").write_text("three")
    assert pretrain_key(data) is None
