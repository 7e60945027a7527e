"""`python -m evergreen.cli` is the `evergreen` command."""

from evergreen.cli import main

main()
