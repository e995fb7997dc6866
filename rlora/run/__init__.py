"""A run and its directory: checkpoints, episodes, resume, replay, export."""
