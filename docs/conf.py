"""The documentation site: `sphinx-build -W -c docs . FOLDER`, from the root of the repository. Its pages are those of
the repository as they stand, so that their links lead to the same places here and where the repository is read."""

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

from llmtune import __version__

project = "llmtune"
author = copyright = "the authors of llmtune"
version = release = __version__

extensions = ["myst_parser"]
myst_heading_anchors = 4
include_patterns = [
    "*.md",
    "docs/**.md",
    "notebooks/*.md",
    "plugins/*/README.md",
    "tests/guards.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [".*", "**/__pycache__", "runs", "site"]
root_doc = "docs/index"

html_theme = "furo"
html_title = f"llmtune {release}"
html_show_sourcelink = False
html_extra_path = ["site"]  # index.html, which leads to the start page


def setup(app: Sphinx) -> None:
    """Blocks of a kind that Pygments cannot colour are shown as text."""
    app.add_lexer("csv", TextLexer)
