#!/usr/bin/env bash
# Every check: format, lint, types, tests. Without a Docker Engine the tests that need one are left out, and the end
# says which; with TML_REQUIRE_DOCKER=1 a missing engine is a failure.
#
#   scripts/test.sh [PYTEST ARGS]      such as -k plan; without any, everything
set -uo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$base"
python=$(scripts/setup_venv.sh cpu dev) || exit 1
failed=()
check() {
  local name=$1 started=$SECONDS
  shift
  echo "── $name"
  "$@" || failed+=("$name")
  echo "── $name: $((SECONDS - started)) s"
}
engine=0
if answer=$("$python" -m tml.docker ping 2>&1); then engine=1; echo "$answer"; else echo "$answer"; fi
if ((!engine)) && [[ ${TML_REQUIRE_DOCKER:-} == 1 ]]; then
  echo "test.sh: TML_REQUIRE_DOCKER=1, and no engine answers" >&2
  exit 1
fi

check "format" "$python" -m ruff format --check .
check "lint" "$python" -m ruff check .
# One process for half a minute: it works beside the tests, and its result comes after theirs.
types=$(mktemp)
"$python" -m mypy >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null; rm -f "$types"' EXIT
wait_for_types() { wait "$mypy"; local status=$?; cat "$types"; return "$status"; }
# tests/conftest.py has the long files begin.
shared_out=(--dist loadfile --no-loadscope-reorder)
check "tests without an engine" "$python" -m pytest -m "not docker" -n 2 "${shared_out[@]}" "$@"
check "types" wait_for_types
if ((engine)); then check "image" "$python" -m tml.docker build; fi
# Two at a time: each process has a stand-in project of its own.
check "tests with an engine" "$python" -m pytest -m docker -n 2 "${shared_out[@]}" "$@"

status=0
if ((${#failed[@]})); then
  printf 'test.sh: failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
  status=1
else
  echo "test.sh: passed"
fi
if ((!engine)); then
  echo "test.sh: left out: the tests that need a Docker Engine, listed above. To have them run: start an"
  echo "test.sh: engine, see that \`.venv/bin/python -m tml.docker ping\` finds it, and call this again."
fi
exit $status
