"""Data larger than disk or memory: rows are read, shuffled and tokenised while the model trains."""
