"""`python -m temper`."""

from __future__ import annotations

import sys

from temper.cli import main

sys.exit(main())
