#!/usr/bin/env bash
# Trains with FSDP (each process keeps a part of the model): on all GPUs of this machine, on its CPU, or on many machines.
set -euo pipefail
# shellcheck source=scripts/launch_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
launch launch_fsdp scripts/train_fsdp.py "$@"
