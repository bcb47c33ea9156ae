#!/usr/bin/env bash
# Trains with DDP (a whole model in each process): on all GPUs of this machine, on its CPU, or on many machines.
set -euo pipefail
# shellcheck source=scripts/launch_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
launch launch_ddp scripts/train_ddp.py "$@"
