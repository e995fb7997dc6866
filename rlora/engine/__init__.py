"""vLLM, and the proof of which adapter versions it serves."""
