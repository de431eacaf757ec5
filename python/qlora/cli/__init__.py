"""The `qlora` command. One module a sub-command; each has NAME, HELP, add_arguments(parser) and run(arguments) -> int.

Exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted. A failure is one message on stderr; the environment
variable QLORA_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

from qlora.cli.main import main

__all__ = ["main"]
