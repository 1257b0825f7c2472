#!/usr/bin/env bash
# Inside the container (scripts/run.sh calls it in the virtual environment too): train TwHIN, or do what the first word says.
#
#   run_in_docker.sh                                   the embedded default; a finished run is kept and trained anew
#   run_in_docker.sh [FLAGS of projects/twhin/run.py]  flags given here win over those below
#   run_in_docker.sh prepare|evaluate|export [FLAGS]   that program of projects/twhin
#
# exec, so that a signal to the container reaches torchrun, which passes it to its ranks.
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd -P)
case "${1:-}" in
  prepare | evaluate | export)
    program=$1
    shift
    exec python "$base/projects/twhin/$program.py" "$@"
    ;;
esac
(($#)) || set -- --repeat
nproc_per_node=${PET_NPROC_PER_NODE:-1}
if [[ $nproc_per_node =~ ^[1-9][0-9]*$ ]]; then
  threads=$(($(nproc) / nproc_per_node))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi
# Threads that wait busily slow each other down by ten times where the processors are shared.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# torchrun's own 30 s from SIGTERM to SIGKILL would cut the launcher's grace of 45 s short.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-40}
# tml.torchrun is torchrun, less the traceback with which it ends when a process fails.
exec python -m tml.torchrun --standalone --nnodes 1 --nproc_per_node "$nproc_per_node" \
  "$base/projects/twhin/run.py" \
  --config_yaml_path="$base/projects/twhin/config/local.yaml" \
  --save_dir="$HOME/tmp/runs/twhin" "$@"
