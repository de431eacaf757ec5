"""`python -m qlora` is the `qlora` command."""

from __future__ import annotations

import sys

from qlora.cli import main

sys.exit(main())
