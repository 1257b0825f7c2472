#!/usr/bin/env bash
# On the host: train TwHIN in a container. Takes the launcher's flags: docker_run.sh --nproc-per-node 2 -- --set a.b=1
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd -P)
python=$("$base/scripts/setup_venv.sh" launcher)
cd "$base"
exec "$python" -m tml.docker run twhin "$@"
