#!/usr/bin/env bash
# A shell in the image, with the mounts of a run. Flags are those of `python -m tml.docker shell`.
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$("$base/scripts/setup_venv.sh" launcher)
cd "$base"
exec "$python" -m tml.docker shell "$@"
