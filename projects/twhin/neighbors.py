"""Nearest entities of an entity, from the vectors that a run has exported.

    python projects/twhin/neighbors.py --run=RUN_FOLDER --entity=NAME [--type=user]
        [--neighbors-of-type=tweet] [--relation=fav [--direction=tails|heads] [--unseen-only]]
        [--k=10] [--json]

Without a relation, entities are alike by cosine (by the distance, where the comparator is one).
With one, they are ranked by the model's score f(s, r, ·): tails of the edges from the entity, or
heads of those to it; --unseen-only leaves out those that a training edge of the relation joins to
it. `--json` prints {"entity", "asked", "search", "neighbors"}, each neighbor with its rank, id,
name and score.

An entity is named as in the vocabulary; a number is a name too, where there is such a one, and the
number of a row with --id, or where the table has no names. FAISS's index is asked where the export
has one (see `index`), else all rows are compared. torch is not imported: that takes longer than the
answer.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from projects.twhin.exported import Exported
from projects.twhin.queries import Query, related, search_exactly, similar
from projects.twhin.seen import seen_rows
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.machines import container

VECTORS = "vectors"
COMPARED_NAMES = 100_000
"""Names that are searched for close matches."""
LISTED_RELATIONS = 24
"""Relations that an error names."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class Entity:
    """A row of a table."""

    table: str
    row: int
    name: str | None


def find_neighbors(
    exported: Exported,
    entity: Entity,
    k: int = 10,
    *,
    of_type: str | None = None,
    relation: str | None = None,
    direction: str | None = None,
    unseen_in: Path | None = None,
) -> Answer:
    """What --json prints. Raises ConfigError for what cannot be asked.

    unseen_in: a run folder, whose training edges of the relation are left out.
    """
    if k < 1:
        raise ConfigError(f"--k: {k} is no number of neighbors; give 1 or more")
    if relation is None:
        for flag, value in (("--direction", direction), ("--unseen-only", unseen_in)):
            if value is not None:
                raise ConfigError(f"{flag}: it belongs to a --relation; name one, or leave it out")
        table = of_type or entity.table
        _check_table(exported, "--neighbors-of-type", table)
        query = similar(exported, entity.table, entity.row)
        left_out = {entity.row} if table == entity.table else set()
        asked: Answer = {"type": table, "measure": query.measure}
    else:
        number, side = _find_side(exported, entity, relation, direction, of_type)
        known = exported.relations[number]
        table = known.rhs if side == "rhs" else known.lhs
        query = related(exported, number, side, entity.row)
        heading = "tails" if side == "rhs" else "heads"
        asked = {"type": table, "measure": query.measure, "relation": relation}
        asked["direction"] = heading
        left_out = set()
        if unseen_in is not None:
            left_out = set(seen_rows(unseen_in, number, side, entity.row).tolist())
            asked["seen"] = len(left_out)
    rows, scores, how = _search(exported, table, query, k + len(left_out))
    pairs = zip(rows.tolist(), scores.tolist(), strict=True)
    kept = [(row, score) for row, score in pairs if row not in left_out][:k]
    names = exported.names(table)
    found = [
        {
            "rank": rank,
            "id": row,
            "name": None if names is None else names[row].as_py(),
            "score": score,
        }
        for rank, (row, score) in enumerate(kept, start=1)
    ]
    who = {"type": entity.table, "id": entity.row, "name": entity.name}
    return {"entity": who, "asked": asked, "search": how, "neighbors": found}


def find_entity(exported: Exported, name: str, table: str | None = None) -> Entity:
    """The one entity of that name, in one table or in all. Raises ConfigError where there is none,
    or one in several tables.
    """
    if table is not None:
        _check_table(exported, "--type", table)
    tables = list(exported.rows) if table is None else [table]
    found = [entity for entity in (_look_up(exported, t, name) for t in tables) if entity]
    if len(found) == 1:
        return found[0]
    if found:
        types = ", ".join(entity.table for entity in found)
        raise ConfigError(f"--entity: {name!r} is in several tables: {types}; name one with --type")
    close = [f"{match!r} ({t})" for t in tables for match in _close_matches(exported, t, name)]
    where = f"in table {tables[0]!r}" if table or len(tables) == 1 else f"in {', '.join(tables)}"
    hint = f"; close to it: {', '.join(close[:6])}" if close else ""
    if name.isdecimal():
        hint += "; for the number of a row, use --id"
    raise ConfigError(f"--entity: there is no {name!r} {where}{hint}")


def entity_of_row(exported: Exported, row: int, table: str | None) -> Entity:
    """The entity of a row. The table may be left out where there is but one."""
    if table is None:
        if len(exported.rows) > 1:
            raise ConfigError(f"--id: name the table with --type: {', '.join(exported.rows)}")
        table = next(iter(exported.rows))
    _check_table(exported, "--type", table)
    if not 0 <= row < exported.rows[table]:
        raise ConfigError(
            f"--id: table {table!r} has the rows 0 to {exported.rows[table] - 1:,}, not {row}"
        )
    names = exported.names(table)
    return Entity(table, row, None if names is None else names[row].as_py())


def _search(exported: Exported, table: str, query: Query, k: int) -> tuple[Any, Any, Answer]:
    """Rows, scores and how they were found."""
    from projects.twhin import index as indexes

    info = indexes.find_index(exported, table, query)
    if info is None:
        rows, scores = search_exactly(query, exported, table, k)
        return rows, scores, {"method": "all rows", "exact": True}
    index = indexes.read_index(exported, info)
    rows, scores = indexes.search(index, info, query, exported, k)
    exact = info.factory == "Flat"
    how: Answer = {"method": f"FAISS {info.factory}", "exact": exact}
    return rows, scores, how if exact else how | {"recall@10": info.recall}


def _find_side(
    exported: Exported,
    entity: Entity,
    relation: str,
    direction: str | None,
    of_type: str | None,
) -> tuple[int, str]:
    """The relation's number and the side that is asked for."""
    names = [known.name for known in exported.relations]
    if relation not in names:
        close = difflib.get_close_matches(relation, names, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        shown = ", ".join(names[:LISTED_RELATIONS])
        more = len(names) - LISTED_RELATIONS
        shown += f" and {more} more" if more > 0 else ""
        raise ConfigError(f"--relation: there is no {relation!r}{meant}; there are {shown}")
    known = exported.relations[names.index(relation)]
    sides = {"rhs": (known.lhs, known.rhs), "lhs": (known.rhs, known.lhs)}
    wanted = {"tails": "rhs", "heads": "lhs"}.get(direction or "")
    for side, (asking, asked) in sides.items():
        if wanted in (None, side) and asking == entity.table and of_type in (None, asked):
            return names.index(relation), side
    raise ConfigError(
        f"--relation: {relation} goes from {known.lhs} to {known.rhs}; it does not lead from a "
        f"{entity.table} to {f'the {direction}' if direction else 'the other side'}"
        + (f" of type {of_type}" if of_type else "")
    )


def _check_table(exported: Exported, flag: str, table: str) -> None:
    if table not in exported.rows:
        raise ConfigError(f"{flag}: there is no {table!r}; there are {', '.join(exported.rows)}")


def _look_up(exported: Exported, table: str, name: str) -> Entity | None:
    names = exported.names(table)
    if names is None:
        row = int(name) if name.isdecimal() else -1
        return Entity(table, row, None) if 0 <= row < exported.rows[table] else None
    row = pc.index(names, pa.scalar(name, names.type)).as_py()
    return None if row < 0 else Entity(table, row, name)


def _close_matches(exported: Exported, table: str, name: str) -> list[str]:
    """Names that hold what was typed, then those spelled like it."""
    names = exported.names(table)
    if names is None:
        return []
    holding = names.filter(pc.match_substring(names, name, ignore_case=True)).slice(0, 3)
    some = names.slice(0, COMPARED_NAMES).to_pylist()
    spelled = difflib.get_close_matches(name, [n for n in some if n is not None], n=3)
    return list(dict.fromkeys([*spelled, *holding.to_pylist()]))[:3]


def render(answer: Answer) -> Any:
    """What a person sees."""
    from rich.text import Text

    from tml import layout

    entity, asked, how = answer["entity"], answer["asked"], answer["search"]
    named = entity["name"] if entity["name"] is not None else f"row {entity['id']}"
    title = f"{asked['type']} nearest to {entity['type']} {named}"
    if "relation" in asked:
        title = f"{asked['direction']} of {asked['relation']} for {entity['type']} {named}"
    caption = f"{asked['measure']}; {how['method']}"
    if "recall@10" in how:
        caption += f", which finds {how['recall@10']:.1%} of the exact 10"
    if "seen" in asked:
        caption += f"; {asked['seen']:,} of training edges left out"
    table = layout.table()
    for heading in ("", "id"):
        table.add_column(heading, justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("score", justify="right")
    for found in answer["neighbors"]:
        name = Text("" if found["name"] is None else found["name"])
        table.add_row(str(found["rank"]), str(found["id"]), name, f"{found['score']:.4f}")
    return layout.titled(title, table, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        if arguments.run is not None and not arguments.run.is_dir():
            missing = container.outside(arguments.run)
            raise ConfigError(f"--run: there is no folder {arguments.run}{missing}")
        exported = Exported.open(arguments.vectors or arguments.run / VECTORS)
        if arguments.id is not None:
            entity = entity_of_row(exported, arguments.id, arguments.type)
        else:
            entity = find_entity(exported, arguments.entity, arguments.type)
        answer = find_neighbors(
            exported,
            entity,
            arguments.k,
            of_type=arguments.of_type,
            relation=arguments.relation,
            direction=arguments.direction,
            unseen_in=_run_of(arguments) if arguments.unseen_only else None,
        )
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(render(answer))
    return 0


def _run_of(arguments: argparse.Namespace) -> Path:
    if arguments.run is None:
        raise ConfigError("--unseen-only: training edges are found through --run; give it")
    assert isinstance(arguments.run, Path)
    return arguments.run


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Nearest entities of an entity of a run.")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--run", type=Path, help="run folder (save_dir), with its vectors/")
    place.add_argument("--vectors", type=Path, help="in place of a run: a folder of export.py")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--entity", help="its name; without a vocabulary, the number of its row")
    who.add_argument("--id", type=int, help="the number of its row")
    parser.add_argument("--type", help="its table; needed where the name is in several")
    parser.add_argument(
        "--neighbors-of-type", dest="of_type", metavar="TYPE", help="default: the same type"
    )
    parser.add_argument("--relation", help="rank by the model's score of this relation")
    parser.add_argument(
        "--direction",
        choices=("tails", "heads"),
        help="of the relation's edges; default: the side that the entity is not on, else tails",
    )
    parser.add_argument(
        "--unseen-only",
        action="store_true",
        help="with a relation: leave out what training edges already join to the entity",
    )
    parser.add_argument("--k", type=int, default=10, help="how many; default: 10")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
