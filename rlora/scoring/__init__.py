"""User-defined reward functions and envs, run in worker processes."""
