"""Files of other trainers become recipes. Nothing here imports torch."""
