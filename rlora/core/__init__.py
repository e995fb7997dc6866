"""The mathematics of a policy and its learner: torch and transformers only, without I/O, Ray and vLLM."""
