"""Thresholds for target skip ratios: `modes search`."""

from modes_cli.search.find import find_thresholds

__all__ = ["find_thresholds"]
