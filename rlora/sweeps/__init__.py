"""Runs that train together over one base: what they differ in, which go on, and what came of them."""
