#!/usr/bin/env bash
# Every check of the course: lint, format, types, shell scripts, and one run of all tests, chapters among them.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: ./scripts/test.sh [--setup-only] [flags of pytest]

Installs the course and its test tools into .venv with pinned versions, then runs ruff, mypy and
shellcheck, and pytest once over tests/: units, processes that talk to each other, every chapter.

  --setup-only   install, do not test
  -h, --help     show this text

All other flags go to pytest, for example -k tokenizer -x, or -m "not chapters".
PYTHON=/path/to/python chooses the Python that .venv is made with.
TEXT
}

setup_only=false
pytest_flags=()
for flag in "$@"; do
  case "$flag" in
    -h | --help) usage && exit 0 ;;
    --setup-only) setup_only=true ;;
    *) pytest_flags+=("$flag") ;;
  esac
done

install dev
if $setup_only; then
  say "ready: ./scripts/test.sh runs the checks"
  exit 0
fi

cd "$ROOT"
code=(gpt2course scripts tests notebooks)
say "ruff check"
"$VENV_PYTHON" -m ruff check "${code[@]}"
say "ruff format --check"
"$VENV_PYTHON" -m ruff format --check "${code[@]}"
say "mypy"
"$VENV_PYTHON" -m mypy
say "shellcheck"
"$VENV/bin/shellcheck" -x scripts/*.sh .ci/run
say "pytest"
exec "$VENV_PYTHON" -m pytest --durations=15 ${pytest_flags[@]+"${pytest_flags[@]}"}
