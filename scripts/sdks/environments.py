"""One Python environment per SDK version, made once and kept outside the working tree.

Each is a virtual environment that holds the SDK alone. What the SDK needs is found in this repository's .venv, behind
the environment's own packages (a .pth file): torch and transformers take gigabytes, and the newest release of each
library is what pip would install anyway. What .venv lacks of an old SDK's requirements is installed as well.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Changes when environments of an older kind must not be used any more.
LAYOUT = "1"

# Run by an environment's own Python: its SDK's requirements that nothing fulfils.
_MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement

for text in requires("tinker") or []:
    requirement = Requirement(text)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    for extra in requirement.extras:
        for nested in map(Requirement, requires(requirement.name) or []):
            if nested.marker and nested.marker.evaluate({"extra": extra}) and not nested.marker.evaluate({"extra": ""}):
                try:
                    version(nested.name)
                except PackageNotFoundError:
                    print(str(nested).partition(";")[0])
    try:
        if not requirement.specifier.contains(version(requirement.name), prereleases=True):
            print(text)
    except PackageNotFoundError:
        print(text)
"""


def cache_dir() -> Path:
    """Where environments are kept: $TREADLE_SDK_CACHE, or below the user's cache directory."""
    if own := os.environ.get("TREADLE_SDK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treadle" / "sdks"


def python_of(version: str, *, base: str = sys.executable) -> Path:
    """The Python of an environment with tinker `version`, made when it is not there yet (some seconds, network).

    base: the Python whose packages it sees behind its own. Raises CalledProcessError when it cannot be made.
    """
    directory = cache_dir() / f"{version}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = directory / "bin" / "python"
    stamp = directory / "ready"
    wanted = f"{LAYOUT} {base}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{version}.lock").open("w") as lock:
        # Two test runs at once must not install into one directory.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted and python.exists():
            return python
        shutil.rmtree(directory, ignore_errors=True)
        venv.create(directory, with_pip=False, symlinks=True)
        # Without its requirements, and before it sees the other packages: the SDK of .venv is not to be touched.
        _pip(base, python, "--no-deps", f"tinker=={version}")
        (site_packages(python) / "shared.pth").write_text(f"{site_packages(Path(base))}\n")
        if missing := _output(python, _MISSING).split("\n"):
            _pip(base, python, *(line for line in missing if line))
        stamp.write_text(wanted)
    return python


def site_packages(python: Path) -> Path:
    """Where the packages of an environment lie."""
    return Path(_output(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))


def _pip(base: str, python: Path, *requirements: str) -> None:
    if requirements:
        options = ["--quiet", "--disable-pip-version-check", "--no-warn-script-location"]
        command = [base, "-m", "pip", "--python", str(python), "install", *options, *requirements]
        subprocess.run(command, check=True, stdout=sys.stderr)


def _output(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    for wanted_version in sys.argv[1:]:
        print(python_of(wanted_version))
