"""The mathematics of a policy and its learner: torch and transformers only, no Ray, no vLLM, no run directory."""
