"""Accuracy, full and skipped, on samples the search did not see: `modes evaluate`."""

from modes_cli.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
