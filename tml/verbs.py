"""Refuses a first word that is no verb of a project's script, with the nearest one and all of them.

python -m tml.verbs WORD VERB [VERB …]
"""

import difflib
import sys
from collections.abc import Sequence


def refusal(word: str, verbs: Sequence[str]) -> str:
    """One line for somebody who gave `word` where one of `verbs` or a flag may stand."""
    near = difflib.get_close_matches(word, verbs, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"there is no verb '{word}'; {meant}verbs: {', '.join(verbs)}; flags alone train"


if __name__ == "__main__":
    print(f"error: {refusal(sys.argv[1], sys.argv[2:])}", file=sys.stderr)
    sys.exit(2)
