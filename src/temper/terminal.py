"""Lines and tables on a terminal or in a file, and numbers for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

WIDTH = 80  # of what goes to a file as well as to a terminal


def tell(what: str, where: str = "", do: str = "", *, head: str = "error") -> None:
    """A few lines on stderr."""
    console = Console(stderr=True, highlight=False)
    for name, text, style in ((head, what, "bold red"), ("where", where, "bold"), ("do", do, "bold")):
        if text:
            show(console, Text.assemble((f"{name}:", style), " ", text))


def say(text: str) -> None:
    """Lines on stdout."""
    show(Console(highlight=False), Text(text))


def show(console: Console, text: Text) -> None:
    """Lines that are broken between words on a terminal and nowhere else; a long path is never broken, so it can be copied."""
    if console.is_terminal:  # rich would break a word that is longer than a line
        text = Text("\n").join(
            line for whole in text.split("\n", allow_blank=True) for line in _lines(whole, console.width)
        )
    console.print(text, soft_wrap=True)


def _lines(text: Text, width: int) -> list[Text]:
    """One line as several of at most `width` characters, all indented as it is."""
    indent = " " * (len(text.plain) - len(text.plain.lstrip()))
    cuts = textwrap.wrap(
        text.plain, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )  # fmt: skip
    out, start = [], 0
    for cut in cuts:
        found = text.plain.index(cut.strip(), start)
        start = found + len(cut.strip())
        out.append(Text(indent) + text[found:start])
    return out or [Text("")]


def table(heads: list[str], rows: Sequence[Sequence[str]], *, fixed: int = 1, numbers: int = 0) -> None:
    """A table that wraps within its columns on a terminal, and has one plain line a row elsewhere.

    Args:
        fixed: so many first columns are never broken: names must stay copyable.
        numbers: so many last columns are right-aligned.
    """
    from rich import box
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for k, head in enumerate(heads):
        right = k >= len(heads) - numbers
        table.add_column(head, justify="right" if right else "left", no_wrap=k < fixed or right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if console.is_terminal:
        console.print(table)
        return
    for line in columns(heads, rows, numbers=numbers):
        show(console, Text(line))


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> list[str]:
    """A table as lines, each column as wide as its longest cell; `numbers` last columns are right-aligned.

    >>> columns(["stage", "time"], [("sft", "41 s"), ("evaluate", "7 s")], numbers=1)
    ['stage     time', 'sft       41 s', 'evaluate   7 s']
    """
    widths = [max(len(row[k]) for row in [heads, *rows]) for k in range(len(heads))]
    right = len(heads) - numbers
    return [
        "  ".join(
            c.rjust(w) if k >= right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    ]


def count(n: float | None) -> str:
    """A number in three digits; – for None.

    >>> count(12345), count(999_700), count(80), count(None)
    ('12.3 k', '1 M', '80', '–')
    """
    if n is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * size:  # 999.7 would be written 1e+03
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def size(n: float | None) -> str:
    """Bytes.

    >>> size(2_500_000), size(1.4e12), size(0)
    ('2.5 MB', '1.4 TB', '0')
    """
    return "–" if n is None else "0" if n == 0 else f"{count(n)}B" if n >= 1000 else f"{n:.0f} B"


def duration(n: float | None) -> str:
    """Seconds, minutes or hours.

    >>> duration(90), duration(3000), duration(9000)
    ('90 s', '50 min', '2.5 h')
    """
    if n is None:
        return "–"
    return f"{n:.0f} s" if n < 120 else f"{n / 60:.0f} min" if n < 7200 else f"{n / 3600:.1f} h"
