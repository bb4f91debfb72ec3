"""`python -m temper`."""

from __future__ import annotations

import sys

from temper.cli import main

if __name__ == "__main__":
    sys.exit(main())
