"""`python -m llmtune`; also how launchers start ranks."""

import os
import sys

from llmtune.cli import main

if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    # A rank has written everything by now. Taking the interpreter down, gloo's threads abort one process in about
    # ten, also after the group has been destroyed, and an elastic launcher would take that for a failed rank.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
