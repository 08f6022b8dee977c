"""Runs sets of checks with the SDK of this Python, one user for each, in one process: the imports take seconds.

    python run.py URL KEY MODEL SET...

A set is "flows" or "twinkle". Prints one line of JSON for each.
"""

from __future__ import annotations

import json
import sys

from flows import CHECKS, Client, run_checks
from twinkle_flows import FLOWS

SETS = {"flows": CHECKS, "twinkle": FLOWS}


def main(url: str, key: str, model: str, *names: str) -> None:
    for name in names:
        print(json.dumps(run_checks(Client(url, key, model), SETS[name])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
