"""Names of users and groups, as the system's database has them."""

from __future__ import annotations

import functools
import pwd


def user_name(uid: int) -> str:
    try:
        return _found(uid)
    except KeyError:
        return str(uid)  # it may come yet: not remembered


@functools.cache
def _found(uid: int) -> str:
    """Asked once for each user: the database may be on another machine, and all would wait."""
    return pwd.getpwuid(uid).pw_name
