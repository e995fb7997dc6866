"""Experiment trackers, each in a separate process: W&B, TensorBoard, trackio, MLflow."""
