"""YAML becomes typed keys and found plugins."""
