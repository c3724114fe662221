"""The evaluation report: plots, tables, and one HTML page with all of it."""

from vlm_safeguard.report.page import Example, ReportData, write_report
from vlm_safeguard.report.plots import (
    PcaCloud,
    plot_candidates,
    plot_gap,
    plot_pca,
    plot_separability,
    plot_tradeoff,
    save_png,
)
from vlm_safeguard.report.words import cut_words

__all__ = [
    "Example",
    "PcaCloud",
    "ReportData",
    "cut_words",
    "plot_candidates",
    "plot_gap",
    "plot_pca",
    "plot_separability",
    "plot_tradeoff",
    "save_png",
    "write_report",
]
