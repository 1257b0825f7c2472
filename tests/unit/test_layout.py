"""Output for a terminal of 80 columns: one style of table, lines broken between their parts."""

from pathlib import Path

from rich.console import Console, RenderableType

from tml import layout
from tml.layout import fold

REPOSITORY = Path(__file__).parents[2]


def shown(what: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_table_has_one_rule_and_its_title_and_notes_may_be_wider() -> None:
    table = layout.table(["relation"], ["edges", "MRR"])
    table.add_row("all", "1,234", ".3510")
    table.add_row("b", "6", ".4000")
    note = "all entities are candidates, but those of other relations"
    assert shown(layout.titled("link prediction of many relations", table, note, "")) == [
        "",
        "link prediction of many relations",
        "relation  edges    MRR",
        "──────────────────────",
        "all       1,234  .3510",
        "b             6  .4000",
        note,
    ]


def test_names_are_folded_and_numbers_are_not() -> None:
    table = layout.table(["name"], ["number"])
    table.add_row("abcdefgh", "123456789")
    assert shown(table, 16)[-2:] == ["abcde  123456789", "fgh"]


def test_a_line_that_fits_is_left_alone() -> None:
    for line in ("", "     a, b;  c: d", "x" * 80, "a, " * 26 + "bc"):
        assert fold(line) == line


def test_a_wide_line_is_broken_after_a_part_and_no_number_is() -> None:
    line = "810,128 edges, 1 relation; 29,858 users"
    assert fold(line, 39) == line
    assert fold(line, 38) == "810,128 edges, 1 relation;\n  29,858 users"
    assert fold(line, 20) == "810,128 edges,\n  1 relation;\n  29,858 users"
    numbers = "mrr .3523  hits@1 .2601  7.1 s"
    assert fold(numbers, 25) == "mrr .3523  hits@1 .2601\n  7.1 s"


def test_a_colon_is_for_what_else_would_not_fit() -> None:
    assert fold("in a: b c, d: e f, g", 16) == "in a: b c,\n  d: e f, g"
    assert fold("no better one (at 7): training ends", 24) == (
        "no better one (at 7):\n  training ends"
    )


def test_paths_stay_whole_and_lines_of_a_text_are_broken_each() -> None:
    path = "/a folder/" + "x" * 90
    assert fold(f"vectors: {path}") == f"vectors:\n  {path}"
    assert fold("ab, cd\nab, cd", 4) == "ab,\n  cd\nab,\n  cd"


def test_tables_are_made_in_one_place() -> None:
    """So that they look alike. The launcher's lists have no headings to rule off, or are read by
    programs line by line.
    """
    lists = {"tml/docker/doctor.py", "tml/docker/jobs.py"}
    makers = {
        file.relative_to(REPOSITORY).as_posix()
        for folder in ("tml", "projects")
        for file in (REPOSITORY / folder).rglob("*.py")
        if "from rich.table import" in (text := file.read_text()) and "Table(" in text
    }
    assert makers - lists == {"tml/layout.py"}
