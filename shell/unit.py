"""The systemd unit of a kernel: started with the machine, started again when it dies."""

from __future__ import annotations

from collections.abc import Sequence

from llmos.shell.home import Home

# What a kernel says when another serves its home already: trying again would not help.
EXIT_BUSY = 75

_UNIT = """\
[Unit]
Description=llmos kernel ({home})
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
Type=exec
ExecStart={command}
WorkingDirectory={home}
StandardOutput=append:{log}
StandardError=append:{log}
{environment}# A kernel that dies is started again at once; `llmos shutdown` ends it for good.
Restart=on-failure
RestartSec=500ms
RestartPreventExitStatus={busy}
# Workers outlive their kernel: only the kernel's own process is stopped with the unit, and it
# brings every training to its next checkpoint first.
KillMode=process
TimeoutStopSec=180
OOMPolicy=continue

[Install]
WantedBy={target}
"""


def unit(
    home: Home, command: Sequence[str], system: bool, environment: dict[str, str] | None = None
) -> str:
    """The text of the unit. `system`: of the machine, for a kernel of root."""
    lines = "".join(f"Environment={quoted(f'{k}={v}')}\n" for k, v in (environment or {}).items())
    return _UNIT.format(
        home=plain(str(home.path)), log=plain(str(home.log)), environment=lines, busy=EXIT_BUSY,
        command=" ".join(map(quoted, command)),
        target="multi-user.target" if system else "default.target",
    )  # fmt: skip


def plain(text: str) -> str:
    """In systemd a percent sign begins a specifier."""
    return text.replace("%", "%%")


def quoted(word: str) -> str:
    """A word of a command line, as systemd reads it (systemd.service(5), "COMMAND LINES")."""
    escaped = plain(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if escaped == "" or set(escaped) & set(" \t;'\"\\") else escaped


def instructions(system: bool) -> tuple[str, ...]:
    """What to do with it, for the person."""
    if system:
        path, user = "/etc/systemd/system/llmos.service", ""
    else:
        path, user = "~/.config/systemd/user/llmos.service", "--user "
    after = () if system else ("loginctl enable-linger   # also while you are not logged in",)
    return (
        f"write it to {path}, then:",
        f"  systemctl {user}daemon-reload && systemctl {user}enable --now llmos",
        *(f"  {line}" for line in after),
    )
