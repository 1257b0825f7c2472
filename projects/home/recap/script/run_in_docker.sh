#!/usr/bin/env bash
# Inside the container, or in the virtual environment: train the Heavy Ranker, or do what the first word says.
#
#   run_in_docker.sh                                   random data where there is none, then the published configuration
#                                                      (data also with flags, unless they name another config)
#   run_in_docker.sh [FLAGS of projects/home/recap/main.py]      flags given here win over those below
#   run_in_docker.sh create_random_data|run_local [FLAGS]        those scripts
#   run_in_docker.sh generate_random_data|prepare|evaluate|predict|export [FLAGS]      that program
#   run_in_docker.sh --help                            these verbs, then the flags of projects/home/recap/main.py
#
# SPEC_TYPE says the role: chief and worker train, under torchrun; datasetworker and evaluator are one process.
# exec, so that a signal to the container reaches torchrun, which passes it to its ranks.
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd -P)
recap="$base/projects/home/recap"
verbs=(create_random_data run_local generate_random_data prepare evaluate predict export)
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
  -h | --help)
    if (($# == 1)); then
      cat <<'END'
The first word may be a verb, which has a --help of its own:
  create_random_data    random data of the published shape, made anew
  run_local             the published configuration in a fresh run folder
  generate_random_data  random data for any configuration
  prepare               from CSV, TSV or parquet, the files that training reads
  evaluate              measure a run on held-out rows
  predict               probabilities of rows by a run
  export                write the model of a run for serving
Flags alone train:

END
      exec python "$recap/main.py" --help
    fi
    ;;
  -*) ;;
  *) (($#)) && exec python -m tml.verbs "$1" "${verbs[@]}" ;;
esac
role=${SPEC_TYPE:-chief}
(($#)) || set -- --repeat
if [[ " $* " != *" --config_path"* ]]; then
  data="$HOME/tmp/recap_local_random_data"
  # The chief makes the data. Workers wait until they can meet it, the others until the data are there.
  case "$role" in
    chief)
      compgen -G "$data/*.gz" >/dev/null ||
        python "$recap/data/generate_random_data.py" --config_path "$recap/config/local_prod.yaml" || exit
      ;;
    datasetworker | evaluator)
      until compgen -G "$data/*.gz" >/dev/null; do sleep 0.5; done
      sleep 0.5 # All files get their names in one moment.
      ;;
  esac
fi
launch=(python -m tml.torchrun)
case "$role" in datasetworker | evaluator) launch=(python) ;; esac
exec "${launch[@]}" "$recap/main.py" \
  --config_path="$recap/config/local_prod.yaml" \
  --save_dir="$HOME/tmp/runs/recap" "$@"
