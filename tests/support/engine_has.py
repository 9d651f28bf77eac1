"""What the engine of this tree can do for a chat already; tests of the rest wait for it.

{"history": MESSAGES}   replaces the conversation -> a record {"kind": "history", "turns": N}
{"end": true}           ends the process as done, with exit status 0
"""

from __future__ import annotations

import pytest

HISTORY = False
END = False

needs_history = pytest.mark.skipif(not HISTORY, reason="the engine takes no history yet")
EXIT_OF_A_CHAT = 0 if END else 143
