#!/usr/bin/env bash
# Make or update .venv in the checkout: requirements.txt, lpips, third_party/, and with --dev what the tests need.
# Quiet and quick when nothing changed; safe to interrupt and to run twice at once. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
lpips=lpips==0.1.4 # only its head weights are read

fail() {
  printf 'Set-up failed: %s\n' "$*" >&2
  exit 1
}

dev=0
case "${1:-}" in
  "") ;;
  --dev) dev=1 ;;
  *)
    printf 'usage: bash tools/setup_env.sh [--dev]\n' >&2
    exit 2
    ;;
esac

mkdir -p "$venv" 2>/dev/null || fail "cannot write to $root. Clone the project to a folder that can be written to."
if command -v flock >/dev/null; then
  exec 9>"$venv/.setup.lock"
  if ! flock -n 9; then
    echo "Another set-up of $venv is running: waiting for it." >&2
    flock 9
  fi
fi

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer found. Install one, or name it: PYTHON=/path/to/python3 bash $0"
}

if ! "$python" -c 'import pip' 2>/dev/null; then
  base=$(find_python)
  echo "Making $venv with $("$base" --version) ..." >&2
  find "$venv" -mindepth 1 -maxdepth 1 ! -name .setup.lock -exec rm -rf {} + # what an interrupted set-up left
  "$base" -m venv "$venv" ||
    fail "$base -m venv does not work here. On Debian and Ubuntu: apt-get install python3-venv"
fi

# A stamp holds the hash of all that decides what gets installed; it is written last.
stamp_of() {
  "$python" - "$root" "$lpips" "$@" <<'PY'
import hashlib, pathlib, sys
root, *rest = sys.argv[1:]
files = [p for p in rest if p.endswith(".txt")]
digest = hashlib.sha256(repr((root, rest, sys.version)).encode())
for path in [*map(pathlib.Path, files), *sorted(pathlib.Path(root, "third_party").glob("*/pyproject.toml"))]:
    digest.update(path.read_bytes())
print(digest.hexdigest())
PY
}

pip_install() {
  # lpips without torchvision is on purpose: no warning about it.
  "$python" -m pip --disable-pip-version-check install --no-input --no-warn-conflicts $([ -t 2 ] || echo -q) "$@" >&2 ||
    fail "pip could not install ($*); its message is above. Is there a network connection? Behind a proxy set HTTPS_PROXY. Then run the same command again."
}

# ensure_installed STAMP FILE...: requirement files, and what is not in a file, unless the stamp says that it is all there
ensure_installed() {
  local stamp=$venv/$1 now
  shift
  now=$(stamp_of "$@")
  [ "$(cat "$stamp" 2>/dev/null)" = "$now" ] && return
  echo "Installing packages into $venv (the first time takes some minutes) ..." >&2
  local arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  pip_install "${arguments[@]}"
  if [ "$1" = "$root/requirements.txt" ]; then
    pip_install --no-deps "$lpips"
    local packages=()
    for project in "$root"/third_party/*/pyproject.toml; do packages+=(-e "$(dirname "$project")"); done
    local output # shown on failure only: setuptools says a screenful about editable packages of C++ sources
    output=$(pip_install --no-build-isolation --no-deps "${packages[@]}" 2>&1) || {
      printf '%s\n' "$output" >&2
      exit 1
    }
  fi
  echo "$now" >"$stamp"
}

files=("$root/requirements.txt")
# FORCE_CPU is the switch that also keeps the kernels off the GPU.
if [ "${FORCE_CPU:-0}" != 1 ] && { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; }; then
  files+=("$root/requirements-cuda.txt")
fi
ensure_installed .setup-stamp "${files[@]}"
if [ "$dev" = 1 ]; then
  ensure_installed .setup-stamp-dev "$root/requirements-dev.txt"
fi
