"""`python -m llmos.shell` is `llmos`."""

from llmos.shell.main import main

if __name__ == "__main__":
    main()
