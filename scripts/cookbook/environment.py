"""An environment of its own for tinker-cookbook 0.6.1, in a cache directory outside the work tree.

It sees the packages of `.venv` (torch above all) through a .pth file, so that no second torch is downloaded; whatever
the cookbook needs beyond them is installed into the new environment only. tml-renderers is installed in the newest
version that the index has, because nothing that runs here imports it: it serves the vendor's own models.
Invariant: the cookbook's code is the published wheel, untouched; `.venv` is never written to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

COOKBOOK = "tinker-cookbook==0.6.1"
# The arithmetic recipe imports the graders of its neighbour, which this extra holds.
EXTRA = "math-rl"
ENVIRONMENT_VERSION = "1"

_REQUIREMENTS = f"""
import importlib.metadata as metadata
from packaging.requirements import Requirement

for text in metadata.requires("tinker-cookbook"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({{"extra": "{EXTRA}"}})
    if wanted and requirement.name != "tml-renderers":
        requirement.marker = None
        print(requirement)
"""


def cache_directory() -> Path:
    """Where the environment lies: $TREADLE_COOKBOOK_HOME, else below the user's cache directory."""
    named = os.environ.get("TREADLE_COOKBOOK_HOME")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "treadle" / "cookbook-0.6.1"


def cookbook_python() -> Path:
    """The Python that has the cookbook; makes its environment on the first call, which needs a package index.

    Raises subprocess.CalledProcessError when something cannot be installed.
    """
    home = cache_directory()
    python = home / "env" / "bin" / "python"
    stamp = home / "ready"
    wanted = f"{ENVIRONMENT_VERSION} {COOKBOOK}[{EXTRA}] {sys.prefix} {sys.version.split()[0]}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    stamp.unlink(missing_ok=True)
    _make(home / "env", python)
    stamp.write_text(wanted)
    return python


def _make(directory: Path, python: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(directory)])
    own = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # Behind the environment's own packages on the path, so those win.
    Path(own, "treadle-venv.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--no-deps", COOKBOOK, "tml-renderers"])
    requirements = _run([str(python), "-c", _REQUIREMENTS]).split("\n")
    _run([*pip, *filter(None, requirements), "matplotlib"])


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
