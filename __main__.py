"""``python -m dynamoe`` is the ``dynamoe`` command."""

from __future__ import annotations

import sys

from .dynamic.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
