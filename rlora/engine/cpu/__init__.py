"""What vLLM's CPU build needs beside it; imported on a CPU only."""
