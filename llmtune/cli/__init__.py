"""The command line. Nothing heavy is imported before a command runs."""

from llmtune.cli.commands import main

__all__ = ["main"]
