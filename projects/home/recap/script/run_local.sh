#!/usr/bin/env bash
# In a virtual environment: train the published configuration in one process, in a fresh run folder. Arguments go to
# projects/home/recap/main.py; those given here win.
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd -P)
export PYTHONPATH="$base${PYTHONPATH:+:$PYTHONPATH}"
if ! python -m tml.machines.is_venv; then
  echo "run_local.sh: not in a virtual environment; scripts/setup_venv.sh cpu makes one, then: source .venv/bin/activate" >&2
  exit 1
fi
TML_BASE=$(git -C "$base" rev-parse --show-toplevel 2>/dev/null || echo "$base")
export TML_BASE
save_dir="$HOME/tmp/runs/recap_local_debug"
if [[ " $* " != *" -h "* && " $* " != *" --help "* ]]; then # who only asks keeps his run
  rm -rf "$save_dir"
  mkdir -p "$save_dir"
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
# The same program as torchrun, less the traceback with which it ends when it is stopped.
exec python -m tml.torchrun --standalone --nnodes 1 --nproc_per_node 1 "$TML_BASE/projects/home/recap/main.py" \
  --config_path "$TML_BASE/projects/home/recap/config/local_prod.yaml" "$@"
