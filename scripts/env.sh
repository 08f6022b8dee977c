#!/usr/bin/env bash
# Makes .venv ready: scripts/env.sh demo|dev. Called by scripts/demo, scripts/test and scripts/check; a second run takes
# milliseconds. Needs only Python 3.11 or newer with venv, and a network for the first run.
#
# On a machine without an NVIDIA GPU the CPU build of torch is installed first and on its own: pip's default index would
# bring several gigabytes of CUDA. First comes what pip finds without any index (its configured find-links), then
# TREADLE_TORCH_INDEX.
set -euo pipefail

readonly TORCH_VERSION=2.13.0
readonly TORCH_INDEX="${TREADLE_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
extra="${1:-}"
case "$extra" in
  demo) stamps=("$venv/.treadle-demo" "$venv/.treadle-dev") ;; # dev holds everything that demo needs
  dev) stamps=("$venv/.treadle-dev") ;;
  *) echo "usage: scripts/env.sh demo|dev" >&2; exit 2 ;;
esac

say() { echo "scripts/env.sh: $*" >&2; }

# What the installation depends on. The path is part of it because a .venv cannot be moved.
fingerprint() { cat "$root/pyproject.toml" "$root/scripts/env.sh" | cksum; echo "$root"; }

is_ready() {
  local stamp
  [ -x "$venv/bin/python" ] && [ -x "$venv/bin/treadle" ] || return 1
  for stamp in "${stamps[@]}"; do
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && return 0
  done
  return 1
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# The first Python that is new enough and can make a virtual environment.
find_python() {
  local candidate without_venv=""
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      echo "$candidate"
      return 0
    fi
    without_venv="$candidate"
  done
  if [ -n "$without_venv" ]; then
    say "$without_venv has no venv module; install it (Debian, Ubuntu: apt install python3-venv) and run this again"
  else
    say "Python 3.11 or newer is needed and was not found; install it and run this again"
  fi
  return 1
}

install_torch() {
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  if "$venv/bin/python" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$TORCH_VERSION')" 2>/dev/null; then
    return 0
  fi
  if has_gpu; then
    say "installing torch $TORCH_VERSION with GPU support (several GB, once)"
    "${pip[@]}" "torch==$TORCH_VERSION"
    return 0
  fi
  say "installing torch $TORCH_VERSION for the CPU (about 200 MB, once)"
  # --no-deps: its libraries are ordinary ones and come with the next step, from the default index.
  if ! "${pip[@]}" --no-index --no-deps "torch==$TORCH_VERSION" >/dev/null 2>&1; then
    "${pip[@]}" --index-url "$TORCH_INDEX" --no-deps "torch==$TORCH_VERSION" || {
      say "no CPU build of torch $TORCH_VERSION at $TORCH_INDEX; set TREADLE_TORCH_INDEX to an index that has one"
      return 1
    }
  fi
}

is_ready && exit 0

mkdir -p "$venv"
if command -v flock >/dev/null 2>&1; then
  # Two scripts started together must not install into one directory at once.
  exec 9>"$venv/.treadle-lock"
  flock 9
  is_ready && exit 0
fi
# No stamp may outlive the attempt to change what it vouches for.
rm -f "$venv/.treadle-demo" "$venv/.treadle-dev"

if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python="$(find_python)"
  say "making .venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
install_torch
say "installing treadle and its libraries (a minute or two, once)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$extra]"
fingerprint >"$venv/.treadle-$extra"
say "ready"
