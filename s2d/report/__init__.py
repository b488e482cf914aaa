"""The report of one run: a single HTML file with every picture, number, curve and setting, that opens without a network.

`write_report` lays out a `ReportContent`, `write_sheet` puts the same pictures into one PNG; `tools/evaluate.py` gathers them.
"""

from s2d.report.content import (
    COLUMN_TITLES,
    ReportContent,
    StageRecord,
    TrialRecord,
    TrialsRecord,
    ViewRecord,
    choose_views,
    run_facts,
)
from s2d.report.page import write_report
from s2d.report.sheet import write_sheet
from s2d.report.terminal import print_results

__all__ = [
    "COLUMN_TITLES",
    "ReportContent",
    "StageRecord",
    "TrialRecord",
    "TrialsRecord",
    "ViewRecord",
    "choose_views",
    "print_results",
    "run_facts",
    "write_report",
    "write_sheet",
]
