"""Sweeps: runs that train together over one base, their schedule, successive halving and results."""
