"""Preset files of grat: YAML data only."""
