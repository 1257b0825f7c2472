#!/usr/bin/env bash
# Inside the container (scripts/run.sh calls it in the virtual environment too): train TwHIN, or do what the first word says.
#
#   run_in_docker.sh                                   the embedded default; a finished run is kept and trained anew
#   run_in_docker.sh [FLAGS of projects/twhin/run.py]  flags given here win over those below
#   run_in_docker.sh prepare|evaluate|export|neighbors|drift|mixtures [FLAGS]   that program of projects/twhin
#   run_in_docker.sh --help                            these verbs, then the flags of projects/twhin/run.py
#
# SPEC_TYPE says the role: chief and worker train, under torchrun; datasetworker and evaluator are one process.
# exec, so that a signal to the container reaches torchrun, which passes it to its ranks.
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd -P)
verbs=(prepare evaluate export neighbors drift mixtures)
case "${1:-}" in
  prepare | evaluate | export | neighbors | drift | mixtures)
    program=$1
    shift
    exec python "$base/projects/twhin/$program.py" "$@"
    ;;
  -h | --help)
    if (($# == 1)); then
      cat <<'END'
The first word may be a verb, which has a --help of its own:
  prepare    edge lists: numbered, split, with vocabularies and graph.yaml
  evaluate   measure the vectors of a run on held-out edges
  export     write the vectors of a run: formats, quantised, FAISS indexes
  neighbors  nearest entities of an entity
  drift      how far vectors have moved from those of an earlier run
  mixtures   users as mixtures of interests, beside the single vector
Flags alone train:

END
      exec python "$base/projects/twhin/run.py" --help
    fi
    ;;
  -*) ;;
  *) (($#)) && exec python -m tml.verbs "$1" "${verbs[@]}" ;;
esac
(($#)) || set -- --repeat
launch=(python -m tml.torchrun)
case "${SPEC_TYPE:-chief}" in datasetworker | evaluator) launch=(python) ;; esac
exec "${launch[@]}" "$base/projects/twhin/run.py" \
  --config_yaml_path="$base/projects/twhin/config/local.yaml" \
  --save_dir="$HOME/tmp/runs/twhin" "$@"
