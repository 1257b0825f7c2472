#!/usr/bin/env bash
# Make $HOME/tmp/recap_local_random_data anew, full of random GZIP TFRecords that local_prod.yaml reads.
#
#   create_random_data.sh [--n_examples N] [--n_files K] [--seed S]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# Where git cannot tell (no git, or files owned by another user, as in a container), the script's own place does.
TML_BASE=$(git -C "$here" rev-parse --show-toplevel 2>/dev/null) || TML_BASE=$(cd "$here/../../../.." && pwd -P)
export TML_BASE
export PYTHONPATH="$TML_BASE${PYTHONPATH:+:$PYTHONPATH}"

python -m tml.machines.is_venv || {
  echo "create_random_data.sh: this Python is in no virtual environment; activate one first" \
    "(source .venv/bin/activate; scripts/setup_venv.sh cpu makes it)" >&2
  exit 1
}

folder="$HOME/tmp/recap_local_random_data"
if [[ " $* " != *" -h "* && " $* " != *" --help "* ]]; then # who only asks keeps his data
  rm -rf "$folder"
  mkdir -p "$folder"
fi
exec python "$TML_BASE/projects/home/recap/data/generate_random_data.py" \
  --config_path "$TML_BASE/projects/home/recap/config/local_prod.yaml" "$@"
