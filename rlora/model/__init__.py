"""The frozen base and its text: weights, chat templates, the files of a model."""
