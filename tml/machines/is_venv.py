"""Is this Python inside a virtual environment? A guard for scripts.

python -m tml.machines.is_venv     exits 0 inside one, 1 outside
"""

import sys


def is_venv() -> bool:
    """Whether this interpreter belongs to a virtual environment."""
    return sys.prefix != sys.base_prefix


if __name__ == "__main__":
    sys.exit(0 if is_venv() else 1)
