"""The HTML report. It reads artifacts only: no torch, no model."""

from modes_cli.report.page import write_report

__all__ = ["write_report"]
