"""Lines and tables on a terminal or in a file, and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console


def tell(what: str, where: str = "", do: str = "", *, head: str = "error") -> None:
    """A few lines on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, text, style in ((head, what, "bold red"), ("where", where, "bold"), ("do", do, "bold")):
        if text:
            console.print(f"{name}:", style=style, end=" ")
            console.print(text, markup=False)


def say(text: str) -> None:
    """Lines on stdout; the terminal wraps them."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def table(heads: list[str], rows: Sequence[Sequence[str]], *, fixed: int = 1, numbers: int = 0) -> None:
    """A table that wraps on a terminal, and has one plain line a row elsewhere.

    Args:
        fixed: so many first columns are never broken: names must stay copyable.
        numbers: so many last columns are right-aligned.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

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
    widths = [max(len(row[k]) for row in [heads, *rows]) for k in range(len(heads))]
    for row in [heads, *rows]:
        cells = [
            c.rjust(w) if k >= len(heads) - numbers else c.ljust(w)
            for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())


def count(n: float | None) -> str:
    """A number in three digits; – for None.

    >>> count(12345), count(999_700), count(80), count(None)
    ('12.3 k', '1 M', '80', '–')
    """
    if n is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * size:  # 999.7 would be written 1e+03
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def size(n: float | None) -> str:
    """Bytes.

    >>> size(2_500_000), size(0)
    ('2.5 MB', '0')
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
