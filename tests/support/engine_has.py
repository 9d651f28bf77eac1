"""What the engine of this tree can do for a chat already; tests of the rest wait for it.

{"end": true}   ends the process as done, with exit status 0
"""

from __future__ import annotations

END = False

EXIT_OF_A_CHAT = 0 if END else 143
