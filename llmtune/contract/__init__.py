"""All that a plugin may import: records, protocols, hooks, errors, and dataclasses read as schemas."""
