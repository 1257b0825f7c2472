"""Reports of an evaluation as tables for a terminal of 80 columns."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from projects.twhin.link_prediction import HITS
from projects.twhin.ranking import Report
from tml import layout

MAX_ROWS_SHOWN = 12  # relations in a terminal's table; a report has all of them
MAX_NAME_SHOWN = 24  # characters of a relation there


def render(report: Report) -> RenderableType:
    """Tables of {"link_prediction": …, "retrieval": …}; either may be missing.

    report["planted"], where there is one, is the optimum that a planted graph's generator computed,
    of the shape of a link-prediction report; it is shown beside the model's MRR.
    """
    tables: list[RenderableType] = []
    if "link_prediction" in report:
        tables.append(_link_table(report["link_prediction"], report.get("planted")))
    if "retrieval" in report:
        tables.append(_retrieval_table(report["retrieval"]))
    return Group(*tables, *_notes(report))


def _notes(report: Report) -> Iterator[Text]:
    """What of the edges is unusual."""
    if unseen := report.get("unseen"):
        edges = f"{unseen:,} of {report['edges']:,} edges"
        yield Text(f"{edges} hold an entity unseen in training; they are scored as all are")
    if empty := report.get("empty_relations"):
        names = ", ".join(map(_shown_name, empty[:3])) + (", …" if len(empty) > 3 else "")
        many = "s" * (len(empty) > 1)
        yield Text(layout.fold(f"{len(empty)} relation{many} without an edge here: {names}"))


def _link_table(report: Report, optimum: Report | None) -> RenderableType:
    headings = ["edges", "MRR", "heads", "tails", "MR", *(f"H@{k}" for k in HITS)]
    table = layout.table(["relation"], headings + ["best", "ratio"] * bool(optimum))
    for name, row in _shown_rows(report):
        cells = [f"{row['edges']:,}"]
        if row["mean"]:
            cells += [short(row[side]["mrr"]) for side in ("mean", "lhs", "rhs")]
            cells += [f"{row['mean']['mr']:.0f}"]
            cells += [short(row["mean"][f"hits@{k}"]) for k in HITS]
        best = _row_of(optimum, name)
        if row["mean"] and best:
            best_mrr = best["mean"]["mrr"]
            cells += [short(best_mrr), f"{row['mean']['mrr'] / best_mrr:.1%}"]
        table.add_row(Text(_shown_name(name)), *cells, end_section=name == "all")
    return _titled("link prediction", report, table)


def _retrieval_table(report: Report) -> RenderableType:
    table = layout.table(["relation"], ["users", "K", "Recall@K", "NDCG@K", "Hit@K"])
    for name, row in _shown_rows(report):
        values = row["mean"] if name == "all" else row
        cuts = [metric.partition("@")[2] for metric in values if metric.startswith("recall@")]
        for cut in cuts:
            cells = [short(values[f"{metric}@{cut}"]) for metric in ("recall", "ndcg", "hit")]
            named = [Text(_shown_name(name)), f"{row['users']:,}"] if cut == cuts[0] else ["", ""]
            table.add_row(*named, cut, *cells, end_section=name == "all" and cut == cuts[-1])
    return _titled("retrieval", report, table)


def _titled(title: str, report: Report, table: Table) -> RenderableType:
    hidden = len(report["relations"]) - MAX_ROWS_SHOWN
    note = f"… {hidden} more relations; evaluate --json lists all" if hidden > 0 else ""
    return layout.titled(title, table, report["protocol"], note)


def _shown_name(name: str) -> str:
    """The name, or the end of a long one: it tells more than the beginning."""
    return name if len(name) <= MAX_NAME_SHOWN else "…" + name[1 - MAX_NAME_SHOWN :]


def short(value: float) -> str:
    """Four decimals, without the zero in front: .1806."""
    return f"{value:.4f}".removeprefix("0")


def _shown_rows(report: Report) -> Iterator[tuple[str, Report]]:
    yield "all", report
    yield from list(report["relations"].items())[:MAX_ROWS_SHOWN]


def _row_of(report: Report | None, name: str) -> Report | None:
    if report is None:
        return None
    return report if name == "all" else report["relations"].get(name)
