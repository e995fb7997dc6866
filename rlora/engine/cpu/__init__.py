"""Replacements for parts of vLLM's CPU build. Imported on a CPU only."""
