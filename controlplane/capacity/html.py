"""A report as one HTML file that needs nothing else: facts, tables and pictures. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body{font:15px/1.5 sans-serif;color:#222;max-width:900px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:.2em} h2{font-size:1.15em;margin-top:1.6em}
.answer{font-size:1.15em;padding:.7em 1em;border-left:5px solid #1b4f72;background:#f3f6f8;margin:1em 0}
.answer.no{border-color:#b03a2e}
table{border-collapse:collapse;margin:.6em 0} td,th{padding:.2em .9em .2em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #999} td.n{text-align:right} svg{max-width:100%;margin:.8em 0} .note{color:#666}
"""


@dataclass(frozen=True)
class Table:
    """A heading, the columns, and the rows. Numbers are put to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Page:
    """A report. `answer` is the sentence that somebody opens it for; `good`: it is a yes."""

    title: str
    answer: str
    good: bool
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def page(content: Page) -> str:
    """The file's text."""
    body = [f"<h1>{escape(content.title)}</h1>"]
    body.append(f'<div class="answer{"" if content.good else " no"}">{escape(content.answer)}</div>')
    body += content.figures
    body += map(_table, content.tables)
    body += [f'<p class="note">{escape(note)}</p>' for note in content.notes]
    head = f'<meta charset="utf-8"><title>{escape(content.title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def _cell(text: str) -> str:
    number = text[:1].isdigit() or (text[:1] in "+-" and text[1:2].isdigit())
    return f'<td class="n">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"
