"""`llmtune web`: recipes, data, plans, runs, chat and export in a page of the browser."""
