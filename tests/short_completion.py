"""A reward that differs between the completions of any model."""


def short_completion(completion: str) -> float:
    """1 for an empty completion, less for each character."""
    return 1 / (1 + len(completion))
