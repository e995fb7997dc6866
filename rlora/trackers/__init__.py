"""Trackers of runs, each over its own library, in a process of its own: W&B, TensorBoard, trackio, MLflow."""
