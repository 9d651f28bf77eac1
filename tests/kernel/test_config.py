"""The configuration: what wins over what, and what each mistake is told."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from llmos.kernel import arguments, config
from llmos.kernel.config import KEYS, Config, load
from llmos.kernel.errors import BadArgument, HomeUnusable, LlmosError, NoSuchThing
from llmos.kernel.units import parse_bytes

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "configuration.md"

WHOLE = """
policy = "eevdf"
batch_share = 0.1
slice_s = 1
measure_s = 0.5
margin_share = 0.2
margin_bytes = "128MiB"
keep_alive_s = -1
min_residency_s = 60
hang_s = 45
alone_s = 5
max_clients = 10
max_processes = 100
user_memory = 0.5
user_device_s = 3600
user_window_s = 7200
max_open_requests = 16
client_buffer = "64KiB"
max_unfinished = "32MiB"
log_size = "1MiB"
group = "ml"

[[devices]]
name = "cpu0"
cores = [0, 2]
memory = "8GiB"

[[devices]]
name = "sim1"
lanes = 2
"""


def write(home: Path, text: str) -> Path:
    (home / "config.toml").write_text(text)
    return home


def test_without_a_file_and_flags_everything_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, {}) == Config(tmp_path)


def test_every_key_of_the_file_arrives(tmp_path: Path) -> None:
    assert load(write(tmp_path, WHOLE), {}) == Config(
        tmp_path, ("cpu0:cores=0+2,memory=8GiB", "sim1:lanes=2"), "eevdf", 0.1, 1.0, 0.5, 0.2,
        128 * 2**20, -1.0, 60.0, 45.0, 5.0, 10, 100, 0.5, 3600.0, 7200.0, 16, 64 * 2**10,
        32 * 2**20, 2**20, "ml", "config.toml",
    )  # fmt: skip
    assert set(KEYS) == set(re.findall(r"^(\w+) = ", WHOLE.split("[[")[0], re.M))


def test_what_a_service_may_have_is_a_table_of_its_name(tmp_path: Path) -> None:
    text = '[services.weather]\nmemory_bytes = "2GiB"\n[services.other]\nmemory_bytes = 5\n'
    assert load(write(tmp_path, text), {}).services == {
        "weather": {"memory_bytes": 2 * 2**30},
        "other": {"memory_bytes": 5},
    }


def test_a_flag_wins_over_the_file_and_only_over_its_own_key(tmp_path: Path) -> None:
    write(tmp_path, 'devices = ["cpu0:memory=1GiB"]\nbatch_share = 0.1\nslice_s = 2.0')
    found = load(tmp_path, {"devices": ("sim0",), "batch_share": 0})
    assert (found.devices, found.devices_from) == (("sim0",), "--device")
    assert (found.batch_share, found.slice_s) == (0.0, 2.0)
    assert load(tmp_path, {}).devices_from == "config.toml"


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("batch_shore = 0.1", "config.toml: 'batch_shore' is not known", "mean batch_share?"),
        ("zzz = 1", "config.toml: 'zzz' is not known", "known: devices, policy"),
        ("services = 3", "config.toml: services has a table for each service", "[services.NAME]"),
        ("services.x = 3", "config.toml: services has a table for each service", ""),
        ("services.x.memory_byts = 3", "services.x: memory_byts' is not known", "memory_bytes?"),
        ("services.x.memory_bytes = -1", "services.x: memory_bytes is 0 to", ""),
        ('batch_share = "much"', "batch_share is a number from 0 to 0.5, not 'much'", ""),
        ("batch_share = true", "batch_share is a number from 0 to 0.5, not True", ""),
        ("batch_share = nan", "batch_share is a number from 0 to 0.5, not nan", ""),
        ("batch_share = 0.9", "batch_share is 0 to 0.5, not 0.9", ""),
        (f"batch_share = {10**400}", "batch_share is 0 to 0.5, not 1000", ""),
        ("batch_share = inf", "batch_share is 0 to 0.5, not inf", ""),
        ("max_clients = 1.5", "max_clients is a whole number from 1 to 10000, not 1.5", ""),
        ("max_clients = 0", "max_clients is 1 to 10000, not 0", ""),
        ("slice_s = 0", "slice_s is 0.01 to 60, not 0", ""),
        ("policy = 3", "policy is a text, not 3", ""),
        ('margin_bytes = "lots"', "config.toml: margin_bytes: 'lots' is not a size", "8GiB"),
        ("margin_bytes = 1.5", "margin_bytes is a size, as in 64MiB, not 1.5", ""),
        ("margin_bytes = -1", "margin_bytes is 0 to 1099511627776 bytes, not -1", ""),
        ("batch_share = 0.1\nslice_s 3", "is not TOML: Expected '=' after a key", ""),
        ("batch_share = 0.1\nslice_s 3", "(at line 2, column 9)", ""),
        ("slice_s = 1\nslice_s = 2", "is not TOML", ""),
        ('devices = "cpu0"', "devices is a list, not 'cpu0'", "[[devices]]"),
        ("devices = [3]", "device 1 is a text or a table, not 3", ""),
        ('devices = ["cpu0", ""]', "device 2 is a text or a table, not ''", ""),
        ("[[devices]]\ncores = 1", "device 1 has no name", 'name = "cpu0"'),
        ('[[devices]]\nname = "cpu0"\npolicy = "x"', "none of a device", "above the first"),
        ('[[devices]]\nname = "cpu0"\ncores = []', "device 1: cores cannot be []", ""),
        ('[[devices]]\nname = "cpu0"\nmemory = "1GiB,cores=0"', "memory cannot be", ""),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, says: str, hint: str) -> None:
    with pytest.raises(BadArgument) as caught:
        load(write(tmp_path, text), {})
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert "config.toml" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"^--batch-share is 0 to 0.5, not 3.0$"):
        load(tmp_path, {"batch_share": 3.0})


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(HomeUnusable, match="cannot be read"):
        load(tmp_path, {})
    (tmp_path / "config.toml").rmdir()
    (tmp_path / "config.toml").write_bytes(b"policy = '\xff'")
    with pytest.raises(BadArgument, match=r"is no UTF-8 text \(byte 10\)"):
        load(tmp_path, {})


@pytest.mark.parametrize(
    ("field", "value"), [("slice_s", 0.0), ("margin_bytes", 1.5), ("batch_share", float("nan"))]
)
def test_a_configuration_made_by_hand_is_checked_too(field: str, value: float) -> None:
    with pytest.raises(BadArgument, match=field):
        dataclasses.replace(Config(Path("/x")), **{field: value})


@pytest.mark.parametrize("device", ["", "0", ":memory=1GiB", "host", "host0"])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(NoSuchThing, match="names no device"):
        config.drivers_of(Config(Path("/x"), (device,)))


@pytest.mark.parametrize("devices", [["cpu0:cores=0", "cpu1:cores=0"], ["cpu0:memory=0"]])
def test_impossible_devices_of_the_file_are_refused(tmp_path: Path, devices: list[str]) -> None:
    found = load(write(tmp_path, f"devices = {devices!r}"), {})
    with pytest.raises(LlmosError):
        config.drivers_of(found)


def test_the_keep_alive_of_the_configuration_is_a_default_and_no_more() -> None:
    keep = {"name": "keep_alive_s", "type": "float", "required": False, "default": 300.0,
            "help": ""}  # fmt: skip
    schema = {"name": "infer", "args": [keep]}
    defaults = Config(Path("/x"), keep_alive_s=5.0).argument_defaults()
    assert arguments.check(schema, {}, "/", str, defaults) == {"keep_alive_s": 5.0}
    assert arguments.check(schema, {"keep_alive_s": 1}, "/", str, defaults)["keep_alive_s"] == 1.0
    assert arguments.check({**schema, "args": []}, {}, "/", str, defaults) == {}
    assert Config(Path("/x")).argument_defaults() == {}


def test_every_key_and_its_default_are_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", REFERENCE.read_text(), re.M)
    documented = {name: default.strip(" `") for name, default in rows}
    assert set(KEYS) | {"devices"} <= set(documented)
    for name, f in KEYS.items():
        if f.default is None:
            continue
        shown = documented[name]
        kind = f.metadata["kind"]
        if kind == "text":
            found: object = shown.replace("none", "") if name == "group" else f.default
        else:
            found = parse_bytes(shown) if kind == "size" else float(shown.replace(",", ""))
        assert found == f.default, f"{name}: the page says {shown}, the code {f.default}"
