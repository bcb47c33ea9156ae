#!/usr/bin/env bash
# Sets the course up in .venv and opens JupyterLab on chapter 00.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: ./scripts/lab.sh [--setup-only] [--force] [flags of JupyterLab]

Makes .venv with Python 3.11 to 3.13, installs the course with pinned versions, checks this machine
with `gpt2course doctor`, and opens JupyterLab on chapter 00. The second start installs nothing and
needs no network. Lab listens on this machine only (127.0.0.1) and asks for its token.

  --setup-only   set up and check, do not open Lab
  --force        open Lab although the doctor says that the course cannot run
  -h, --help     show this text

All other flags go to JupyterLab, for example --no-browser or --port 8899.
PYTHON=/path/to/python chooses the Python that .venv is made with.
TEXT
}

register_kernel() {
  if ! grep -qF "$VENV_PYTHON" "$VENV/share/jupyter/kernels/gpt2course/kernel.json" 2>/dev/null; then
    say "registering the kernel gpt2course"
    "$VENV_PYTHON" -m ipykernel install --sys-prefix --name gpt2course --display-name gpt2course >/dev/null
  fi
}

setup_only=false
force=false
lab_flags=()
for flag in "$@"; do
  case "$flag" in
    -h | --help) usage && exit 0 ;;
    --setup-only) setup_only=true ;;
    --force) force=true ;;
    *) lab_flags+=("$flag") ;;
  esac
done

install lab
register_kernel

say "checking this machine"
if ! "$VENV_PYTHON" -m gpt2course doctor; then
  $force || die "the course cannot run here yet: mend the lines marked FAIL above, or start with --force"
fi
if $setup_only; then
  say "ready: ./scripts/lab.sh opens the course"
  exit 0
fi

# Jupyter refuses to start as root, which is who one is in many containers. Loopback and token stay as they are.
if [ "$(id -u)" = 0 ]; then
  lab_flags+=(--allow-root)
fi

say "opening JupyterLab (stop it with Ctrl-C)"
cd "$ROOT"
# default_url rather than the file's name: with --no-browser, too, the printed address then opens the chapter.
# "${a[@]+...}": bash 3.2 takes an empty array for an unset variable.
exec "$VENV_PYTHON" -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$ROOT" \
  --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb ${lab_flags[@]+"${lab_flags[@]}"}
