"""A report on this machine and what is installed here: what runs depend on, what is wrong with it, what to do."""
