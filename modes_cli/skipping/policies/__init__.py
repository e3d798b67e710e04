"""One policy per file. A new one is a new file and a line here."""

from modes_cli.skipping.policies import dmt, gmlg, modes, tempered, threshold

__all__ = ["dmt", "gmlg", "modes", "tempered", "threshold"]
