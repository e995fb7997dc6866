"""A run's directory: checkpoints, episodes, resume, replay, export."""
