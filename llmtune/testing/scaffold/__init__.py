"""A new plugin's package: complete, installable, and right by the contract as it is."""
