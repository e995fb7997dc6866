"""The frozen base: weights, tokenizer, chat templates, and checks of a model's files."""
