"""Layer importance by replay, routing scores and reference distributions from one pass: `modes calibrate`."""

from modes_cli.calibration.calibrate import calibrate

__all__ = ["calibrate"]
