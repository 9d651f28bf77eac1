"""Run a command that ends with whoever started it, even if that one is killed.

python -P -m llmos.services.pull.tied COMMAND ARGUMENTS...
"""

from __future__ import annotations

import os
import sys

from llmos.services.isolated import end_with_parent


def main() -> None:
    end_with_parent()  # kept over exec
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
