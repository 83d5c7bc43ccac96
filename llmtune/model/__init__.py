"""Files become an edited, filled model."""
