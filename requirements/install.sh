#!/usr/bin/env bash
# Install pinned sets into one Python: the only way in, for the image (Dockerfile) and for the virtual
# environment (scripts/setup_venv.sh) alike, so that the two cannot drift.
#
#   requirements/install.sh PYTHON launcher          what python -m tml.docker needs
#   requirements/install.sh PYTHON cpu|gpu [dev]     what training needs [and the tests, ruff, mypy, export]
#
# torchrec's metadata asks for the CUDA fbgemm and for an old torchmetrics that nothing here imports, so it must
# not be resolved. torch is: its CUDA build needs nvidia wheels that its own metadata names. Hence two steps:
# torch with what it depends on, held to the pins; then every other pin as it stands, without dependencies.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
usage() { echo "usage: install.sh PYTHON launcher|cpu|gpu [dev]" >&2; exit 2; }
python=${1:-}; variant=${2:-}; extra=${3:-}
[[ $python && $variant && ( -z $extra || $extra == dev ) ]] || usage

pip() { "$python" -m pip --disable-pip-version-check install --progress-bar off --root-user-action ignore "$@"; }

case $variant in
  launcher) files=(launcher) ;;
  cpu | gpu)
    files=(launcher train "$variant")
    echo "installing torch and what it depends on ($variant)"
    constraints=()
    for file in "${files[@]}"; do constraints+=(-c "$here/$file.txt"); done
    pip "${constraints[@]}" "$(grep '^torch==' "$here/train.txt")"
    ;;
  *) usage ;;
esac
[[ -z $extra ]] || files+=(export dev)

requirements=()
for file in "${files[@]}"; do requirements+=(-r "$here/$file.txt"); done
echo "installing the pinned sets: ${files[*]}"
# iopath comes as source; it is built with the setuptools just installed, not with one fetched for it.
pip --no-deps --use-pep517 --no-build-isolation "${requirements[@]}"
