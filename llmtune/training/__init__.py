"""The loop, its objective, what happens between steps, checkpoints, the run's folder."""
