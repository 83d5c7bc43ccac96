"""An API like OpenAI's for what was trained."""
