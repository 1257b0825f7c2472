#!/usr/bin/env bash
# Set everything up on a fresh machine and train TwHIN on its built-in graph: in a container where a Docker Engine
# answers, else in the virtual environment. Arguments go to projects/twhin/run.py.
#
#   scripts/run.sh [--venv] [ARGS]     --venv: not in a container, even where an engine answers
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$base"
say() { echo "run.sh: $*" >&2; }

if [[ ${1:-} == --venv ]]; then
  shift
  say "training in the virtual environment, as asked"
else
  python=$(scripts/setup_venv.sh launcher)
  if answer=$("$python" -m tml.docker ping 2>&1); then
    say "$answer: training in a container"
    exec "$python" -m tml.docker run twhin -- "$@"
  fi
  echo "$answer" | grep -v -e '--venv' -e 'The same job without' >&2
  say "no engine: training in the virtual environment"
fi
scripts/setup_venv.sh cpu >/dev/null
export SPEC_TYPE=chief PYTHONUNBUFFERED=1 PATH="$base/.venv/bin:$PATH"
exec bash projects/twhin/scripts/run_in_docker.sh "$@"
