"""`python -m treadle.cli`: the command of this very interpreter, whatever is on the PATH."""

from treadle.cli.app import main

main()
