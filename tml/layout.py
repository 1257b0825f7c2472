"""How output is laid out for a terminal of 80 columns: one style of table, and lines that are
broken where their parts end.
"""

import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns of a terminal that nobody has made wider."""
INDENT = "  "
"""What a line that goes on begins with."""
_PART = re.compile(r".+?(?:(?<=[,;])(?= )|(?=  )|$)")
_SMALLER_PART = re.compile(r".+?(?:(?<=:)(?= )|$)")


def table(left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """A table in the style of all: headings over a rule, and no other lines. Its columns are those
    headed `left` (words: long ones are folded), then those headed `right` (numbers).
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for heading in left:
        made.add_column(heading, overflow="fold")
    for heading in right:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def titled(title: str, body: Table, *notes: str) -> RenderableType:
    """The table below a free line and its title, and above notes on it; these may be wider than it
    is.
    """
    below = [Text(fold(note), style="dim") for note in notes if note]
    return Group("", Text(fold(title), style="italic"), body, *below)


def fold(text: str, width: int = WIDTH) -> str:
    """`text` with each of its lines broken, where it is longer than `width`, after a comma or a
    semicolon or before two blanks, and where that does not help after a colon. What has none of
    these is left as it is: paths and commands can be copied from one line.
    """
    return "\n".join(_fold_line(line, width) for line in text.split("\n"))


def _fold_line(line: str, width: int) -> str:
    lines = [""]
    for part in _parts(line, width):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append(INDENT + part.lstrip())
        else:
            lines[-1] += part
    return "\n".join(lines)


def _parts(line: str, width: int) -> Iterator[str]:
    """What is not broken; joined it is the line."""
    for part in _PART.findall(line):
        if len(INDENT + part.lstrip()) > width:
            yield from _SMALLER_PART.findall(part)
        else:
            yield part
