"""`python -m biodedup.cli`."""

from biodedup.cli import main

main()
