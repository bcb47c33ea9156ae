# shellcheck shell=bash
# Shared by launch_ddp.sh and launch_fsdp.sh: which Python, how many processes, which nodes, and one torchrun command.
# To be sourced; works with bash 3.2.

# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<TEXT
usage: ./scripts/$LAUNCHER.sh [--nproc N] [--max-restarts N] [--dry-run] [options of $SCRIPT]

Starts $SCRIPT in several processes that train one model together, by torchrun.

  --nproc N          processes on this machine; by default as many as torch sees GPUs
  --max-restarts N   after a process has failed, start all again, at most N times (default 0);
                     the script then goes on from its newest checkpoint
  --dry-run          print the environment and the command, and start nothing
  -h, --help         show this text

All other options go to the script; python $SCRIPT --help lists them. They are checked before
any process starts, so an impossible one costs seconds and not a place in a queue.

One machine:
  ./scripts/$LAUNCHER.sh --preset gpt2 --precision bf16        all GPUs of this machine
  ./scripts/$LAUNCHER.sh --nproc 2 --device cpu --steps 20     two processes on the CPU

Many machines, the same line on each, except for NODE_RANK:
  NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./scripts/$LAUNCHER.sh --preset gpt2-xl
  NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 ./scripts/$LAUNCHER.sh --preset gpt2-xl

Slurm, where all of that is read from the job (scripts/train_fsdp.sbatch is a whole one):
  srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 ./scripts/$LAUNCHER.sh --preset gpt2-xl

Environment:
  NNODES, NODE_RANK, MASTER_ADDR   how many machines, which one this is (from 0), and the address of number 0
  MASTER_PORT                      a free port there (default 29500; in Slurm made from the job's number)
  RUN_ID                           the same on all machines, another for each run (default: from the job, or the port)
  LOCAL_ADDR                       this machine's address, if the others cannot reach it by its host name
  PYTHON                           the Python to use (default: .venv's, else python3)
  OMP_NUM_THREADS                  threads of a process (default: the cores of this machine over its processes)
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds to save in after a stop (default 30; torch 2.13 reads it)

Ctrl-C and SIGTERM stop the run at the end of a step, with a checkpoint. torchrun itself then ends with 1 and a
traceback of SignalException, though every process has saved and ended with 0.
TEXT
}

# Prints the Python to use: one that has torch and this course.
course_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    candidate=$PYTHON
  elif [ -x "$VENV_PYTHON" ]; then
    candidate=$VENV_PYTHON
  else
    candidate=python3
  fi
  "$candidate" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null ||
    die "$candidate is not a Python that has torch; run ./scripts/lab.sh --setup-only first, or set PYTHON=/path/to/python"
  echo "$candidate"
}

# whole NAME VALUE LEAST: dies unless the value is a whole number of at least that.
whole() {
  case "$2" in
    '' | *[!0-9]*) die "$1 is '$2'; it must be a whole number of at least $3" ;;
  esac
  [ "$2" -ge "$3" ] || die "$1 is $2; it must be at least $3"
}

# Sets nproc to the number of GPUs that torch sees.
count_gpus() {
  nproc=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  [ "$nproc" -gt 0 ] || die "no GPU here; give --nproc 2 to run on the CPU"
}

# Sets nnodes, node_rank, master_addr, master_port and run_id from the user's variables, else from Slurm's.
find_nodes() {
  nnodes=${NNODES:-}
  node_rank=${NODE_RANK:-}
  master_addr=${MASTER_ADDR:-}
  master_port=${MASTER_PORT:-29500}
  if [ -z "$nnodes" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    nodes_of_slurm
  fi
  nnodes=${nnodes:-1}
  whole NNODES "$nnodes" 1
  [ "$nnodes" -gt 1 ] || return 0
  [ -n "$node_rank" ] || die "NNODES is $nnodes, and NODE_RANK is not set; it is 0 on one machine, 1 on the next, and so on"
  whole NODE_RANK "$node_rank" 0
  [ "$node_rank" -lt "$nnodes" ] || die "NODE_RANK is $node_rank, and there are $nnodes nodes; it must be 0 to $((nnodes - 1))"
  [ -n "$master_addr" ] || die "NNODES is $nnodes, and MASTER_ADDR is not set; it is the address of the machine with NODE_RANK 0"
  whole MASTER_PORT "$master_port" 1
  # Not a random one: torchrun on every node must come to the same.
  run_id=${RUN_ID:-gpt2course-${SLURM_JOB_ID:-$master_port}}
}

nodes_of_slurm() {
  nnodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
  [ "$nnodes" -gt 1 ] || return 0
  [ -n "${SLURM_STEP_ID:-}" ] ||
    die "this Slurm job has $nnodes nodes, and only this one would start: call it by srun --ntasks-per-node 1, or set NNODES=1"
  [ "${SLURM_LOCALID:-0}" = 0 ] ||
    die "Slurm started several tasks on this node; torchrun makes the processes itself, so give srun --ntasks-per-node 1"
  node_rank=${node_rank:-${SLURM_NODEID:-}}
  if [ -z "$master_addr" ]; then
    master_addr=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
  fi
  # Below the ports that systems lend to outgoing connections, and another one for each job on a shared node.
  master_port=${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 20000))}
}

# launch NAME SCRIPT ARGUMENTS…: NAME.sh's whole work. Ends as torchrun, so that signals reach it.
launch() {
  local nproc="" max_restarts=0 dry_run=false python nnodes node_rank master_addr master_port run_id said
  local flags=() command=()
  LAUNCHER=$1 SCRIPT=$2
  shift 2
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=true ;;
      --nproc=*) nproc=${1#*=} && whole --nproc "$nproc" 1 ;;
      --max-restarts=*) max_restarts=${1#*=} && whole --max-restarts "$max_restarts" 0 ;;
      --nproc) shift && whole --nproc "${1:-}" 1 && nproc=$1 ;;
      --max-restarts) shift && whole --max-restarts "${1:-}" 0 && max_restarts=$1 ;;
      *) flags+=("$1") ;;
    esac
    shift
  done

  find_nodes
  python=$(course_python)
  [ -n "$nproc" ] || count_gpus
  # The same environment as gpt2course.launch.torchrun's, from the same place.
  said=$(PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$python" -c \
    'import sys; from gpt2course.launch import shell_exports; print(shell_exports(int(sys.argv[1])))' "$nproc") ||
    die "$python cannot import gpt2course; run ./scripts/lab.sh --setup-only first, or set PYTHON=/path/to/python"
  eval "$said"

  command=("$python" -m torch.distributed.run --nproc-per-node "$nproc" --max-restarts "$max_restarts")
  if [ "$nnodes" -gt 1 ]; then
    # is_host: node 0 keeps the meeting place, also where its address is not that of its host name.
    command+=(--nnodes "$nnodes" --node-rank "$node_rank" --rdzv-backend c10d --rdzv-id "$run_id")
    command+=(--rdzv-endpoint "$master_addr:$master_port" --rdzv-conf "is_host=$([ "$node_rank" = 0 ] && echo 1 || echo 0)")
    if [ -n "${LOCAL_ADDR:-}" ]; then
      command+=(--local-addr "$LOCAL_ADDR")
    fi
  else
    command+=(--standalone)
  fi
  # "${a[@]+...}": bash 3.2 takes an empty array for an unset variable.
  command+=("$ROOT/$SCRIPT" ${flags[@]+"${flags[@]}"})

  if $dry_run; then
    printf '%s\n' "$said"
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
  fi
  # NPROC_PER_NODE: all processes together are more than the GPUs of this machine.
  said=$(NPROC_PER_NODE="$nproc" "$python" "$ROOT/$SCRIPT" --check "$((nnodes * nproc))" ${flags[@]+"${flags[@]}"} 2>&1) ||
    die "$SCRIPT refuses these options, and nothing was started:
$said"
  exec "${command[@]}"
}
