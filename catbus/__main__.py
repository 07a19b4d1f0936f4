"""`python -m catbus` and the `catbus` command."""

from .cli import main

if __name__ == "__main__":
    main()
