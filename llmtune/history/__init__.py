"""Runs on disk: found, read, compared and drawn. Nothing here imports torch, and nothing writes to a run."""
