"""The evaluation report: plots, tables and one HTML page."""

from vlm_safeguard.evaluation.report.html import AnswerPair, ReportData, write_report
from vlm_safeguard.evaluation.report.labels import cut_words
from vlm_safeguard.evaluation.report.plots import (
    PcaCloud,
    plot_gap,
    plot_tradeoff,
    save_png,
)

__all__ = [
    "AnswerPair",
    "PcaCloud",
    "ReportData",
    "cut_words",
    "plot_gap",
    "plot_tradeoff",
    "save_png",
    "write_report",
]
