"""The `treadle` command. One module per group of commands; app.py puts them together.

Heavy modules (torch, the server, the SDK) are imported inside the functions that need them, against the house rule:
`treadle --help` then answers in a fraction of a second instead of several. Nothing here decides anything but how to ask
and how to show.
"""

from treadle.cli.app import main

__all__ = ["main"]
