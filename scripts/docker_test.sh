#!/usr/bin/env bash
# The tests that need no engine, inside local/torch:dev. Flags are those of `python -m tml.docker test`.
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$("$base/scripts/setup_venv.sh" launcher)
cd "$base"
exec "$python" -m tml.docker test "$@"
