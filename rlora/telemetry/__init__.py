"""Metrics of a run and their console output."""
