#!/usr/bin/env bash
# Inside the container, or in the virtual environment: train the Heavy Ranker, or do what the first word says.
#
#   run_in_docker.sh                                   random data where there is none, then the published configuration
#   run_in_docker.sh [FLAGS of projects/home/recap/main.py]      flags given here win over those below
#   run_in_docker.sh create_random_data|run_local [FLAGS]        those scripts
#   run_in_docker.sh generate_random_data|prepare|evaluate|predict|export [FLAGS]      that program
#
# exec, so that a signal to the container reaches torchrun, which passes it to its ranks.
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd -P)
recap="$base/projects/home/recap"
case "${1:-}" in
  create_random_data | run_local)
    script=$1
    shift
    exec bash "$recap/script/$script.sh" "$@"
    ;;
  prepare | evaluate | predict | export)
    program=$1
    shift
    exec python "$recap/$program.py" "$@"
    ;;
  generate_random_data)
    shift
    exec python "$recap/data/generate_random_data.py" "$@"
    ;;
esac
if (($# == 0)); then
  set -- --repeat
  data="$HOME/tmp/recap_local_random_data"
  if ! compgen -G "$data/*.gz" >/dev/null; then
    python "$recap/data/generate_random_data.py" --config_path "$recap/config/local_prod.yaml" || exit
  fi
fi
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
  "$recap/main.py" --config_path="$recap/config/local_prod.yaml" "$@"
