"""The report of one run: a single HTML file with every picture, number, curve and setting, that opens without a network.

`write_report` lays out a `ReportContent`; `tools/evaluate.py` gathers it. Nothing here reads a model folder or a scene.
"""

from s2d.report.content import (
    COLUMN_TITLES,
    ReportContent,
    StageRecord,
    ViewRecord,
    choose_views,
)
from s2d.report.page import write_report

__all__ = [
    "COLUMN_TITLES",
    "ReportContent",
    "StageRecord",
    "ViewRecord",
    "choose_views",
    "write_report",
]
