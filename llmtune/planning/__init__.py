"""All that is decided before a weight is read."""
