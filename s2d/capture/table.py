"""The report of a capture check as a table and a list of things to do, on stdout."""

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from s2d.capture.report import CaptureReport
from s2d.capture.rules import Finding, nearest

COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}
COLUMNS = ("size", "blur", "overlaps", "most with", "matches", "angle")


def print_report(report: CaptureReport) -> None:
    """Print a verdict per photo, then the advice, then whether all is well."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table(title=f"{report.root}: {len(report.names)} photos", title_style="bold")
    table.add_column("photo", overflow="fold")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "most with" else "right")
    table.add_column("verdict")
    rows = {photo.name: row for row, photo in enumerate(report.photos)}
    for name in report.names:
        numbers = _numbers(report, rows[name]) if name in rows else [""] * len(COLUMNS)
        table.add_row(escape(name), *map(escape, numbers), _verdict(report.of(name)))
    console.print(table)
    console.print(
        "blur: σ of the sharpest edges in pixels, once scaled to 640. overlaps: with how many photos. "
        "angle: the widest between two looks at the same point, roughly.",
        style="dim",
    )
    for finding in report.findings:
        colour = COLOURS[finding.level]
        console.print(
            f"[{colour}]{finding.level}[/{colour}]  {escape(finding.text)}", highlight=False
        )
    console.print(_summary(report), highlight=False)


def _numbers(report: CaptureReport, row: int) -> list[str]:
    photo = report.photos[row]
    size = f"{photo.size[0]} × {photo.size[1]}"
    blur = f"{photo.blur:.1f}" if photo.blur >= 0.05 else "–"
    own = [pair for pair in report.pairs if row in (pair.a, pair.b)]
    if not own:
        return [size, blur, "0", "", "", ""]
    best = nearest(row, own)[0]
    other = report.photos[best.b if best.a == row else best.a].name
    angle = max(pair.angle for pair in own)
    return [size, blur, str(len(own)), other, str(best.num_matches), f"{angle:.0f}°"]


def _verdict(findings: list[Finding]) -> str:
    if not findings:
        return "[green]good[/green]"
    kinds = {finding.kind: COLOURS[finding.level] for finding in reversed(findings)}
    return ", ".join(f"[{colour}]{kind}[/{colour}]" for kind, colour in kinds.items())


def _summary(report: CaptureReport) -> str:
    counts = [
        (level, sum(finding.level == level for finding in report.findings)) for level in COLOURS
    ]
    shown = ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in counts if count)
    if report.good:
        return f"[green]These photos will do.[/green]{f' ({shown})' if shown else ''}"
    return f"[yellow]Better photos would make a better scene:[/yellow] {shown}."
