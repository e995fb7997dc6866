"""Other people's reward functions and envs, in processes of their own."""
