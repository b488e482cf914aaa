"""Tables on a terminal, and the same tables as Markdown for docs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


class Printer:
    """Prints tables and lines to stdout, wide enough for every column, or as Markdown."""

    def __init__(self, markdown: bool = False) -> None:
        console = Console()
        # rich squeezes tables to 80 columns where stdout is a file or a pipe.
        self.console = console if console.is_terminal else Console(width=160)
        self.markdown = markdown

    def table(self, table: Table) -> None:
        """Print a table and an empty line."""
        if self.markdown:
            print(f"{markdown_text(table)}\n")
        else:
            self.console.print(table)
            self.console.print()

    def line(self, text: str) -> None:
        """Print a line of text, and in Markdown an empty line after it."""
        if self.markdown:
            print(f"{text}\n")
        else:
            self.console.print(text, highlight=False)


def markdown_text(table: Table) -> str:
    """Write a table of plain strings as Markdown: title, columns aligned as they are, bold rows bold."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    lines = [f"{table.title}\n"] if table.title else []
    lines.append(f"| {' | '.join(str(column.header) for column in table.columns)} |")
    rule = ("--:" if column.justify == "right" else "---" for column in table.columns)
    lines.append(f"|{'|'.join(rule)}|")
    for row, cells in zip(table.rows, zip(*columns, strict=True), strict=True):
        mark = "**" if row.style == "bold" else ""
        lines.append(f"| {' | '.join(f'{mark}{cell}{mark}' if cell else '' for cell in cells)} |")
    return "\n".join(lines)
