# shellcheck shell=bash
# Shared by lab.sh and test.sh: finds Python, makes .venv, installs once. To be sourced; works with bash 3.2.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
TORCH="torch==2.13.0"
# The course's commands (gpt2course, torchrun, shellcheck) for what is started from here: Lab's terminals, tests.
export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"

# Torch's threads wait for each other by spinning. On two cores shared with one busy process, such as a browser, chapter 05
# took 40 s so, and 18 s with threads that sleep while they wait. The price: alone, all chapters took 80 s instead of 59 s.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

say() { printf '==> %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# 0 if the command is a Python the course supports. Runs it: a name on PATH may be a shim with nothing behind it.
supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

how_to_get_python() {
  case "$(uname -s)" in
    Darwin) echo "install one with: brew install python@3.12" ;;
    Linux) echo "install one with: sudo apt install python3.12 python3.12-venv (Debian, Ubuntu), sudo dnf install python3.12 (Fedora)" ;;
    *) echo "on Windows, run this inside WSL: wsl --install, then in Ubuntu: sudo apt install python3 python3-venv" ;;
  esac
}

# Prints the command of a supported Python: $PYTHON if set, else the first on PATH that works.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || die "PYTHON=$PYTHON does not run or is not Python 3.11 to 3.13; $(how_to_get_python)"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    if supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 to 3.13 found (tried python3.11, python3.12, python3.13, python3); $(how_to_get_python), or set PYTHON=/path/to/python"
}

# What an install depends on: change any of it and the next start installs again.
stamp_of() {
  "$VENV_PYTHON" - "$1" "$ROOT" <<'PY'
import hashlib, pathlib, sys
extra, root = sys.argv[1:]
digest = hashlib.sha256(f"{extra}\0{root}\0{sys.version}".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(root, name).read_bytes())
print(digest.hexdigest())
PY
}

installed() {
  [ -f "$VENV/.installed-$1" ] && [ "$(cat "$VENV/.installed-$1")" = "$(stamp_of "$1")" ]
}

make_venv() {
  local python
  # Python without pip: the making of .venv was broken off.
  supported "$VENV_PYTHON" && "$VENV_PYTHON" -c 'import pip' 2>/dev/null && return
  python=$(find_python)
  say "making .venv with $("$python" --version 2>&1)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV" ||
    die "$python -m venv failed; on Debian and Ubuntu: sudo apt install $(basename "$python")-venv"
}

# install lab|dev: puts the package and that extra into .venv, unless it is there already. dev contains lab.
install() {
  local extra=$1 log="$VENV/pip.log"
  make_venv
  if installed "$extra"; then
    say "already installed: .[$extra] in .venv"
    return
  fi
  say "installing .[$extra] into .venv (several minutes the first time; details in .venv/pip.log)"
  if ! (cd "$ROOT" && "$VENV_PYTHON" -m pip install --disable-pip-version-check \
    -e ".[$extra]" "$TORCH" -c constraints.txt 2>&1) | tee "$log" |
    { grep --line-buffered -E '(Downloading|Using cached) .*([0-9]{2}(\.[0-9]+)? MB|GB)\)|^Installing collected' | cut -c1-100 || true; }; then
    printf '\n' >&2
    { grep -E '^ERROR|^error' "$log" || tail -n 20 "$log"; } >&2
    die "pip could not install .[$extra]. The first install needs the network (or a pip index of yours); the whole story is in .venv/pip.log"
  fi
  stamp_of "$extra" >"$VENV/.installed-$extra"
  if [ "$extra" = dev ]; then
    stamp_of lab >"$VENV/.installed-lab"
  fi
}
