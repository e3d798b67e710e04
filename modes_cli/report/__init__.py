"""The HTML report, and what the terminal shows of it. It reads artifacts only, and runs no model."""

from modes_cli.report.page import write_report

__all__ = ["write_report"]
