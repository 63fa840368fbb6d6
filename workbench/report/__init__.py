"""The pictures and the pages of a finished probe. Nothing is computed here."""

from workbench.report.page import REPORT, SECTIONS, write_report
from workbench.report.paper import write_paper
from workbench.report.pictures import figure_tables, probe_figures

__all__ = [
    "REPORT",
    "SECTIONS",
    "figure_tables",
    "probe_figures",
    "write_paper",
    "write_report",
]
