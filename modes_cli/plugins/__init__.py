"""Bundles inside other engines: what an engine loads by its own plugin mechanism."""
