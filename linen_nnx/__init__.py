"""The process of the command `linen-nnx`: Ctrl-C while its packages are imported, then `bridge.cli`.

Law: nothing but the standard library is imported before Ctrl-C is taken care of; whenever it comes, the exit code is
130 and there is no traceback.
Knows signals and exit codes; knows nothing of commands.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line with the words of this process, and exit.

    Example::

        $ python -m linen_nnx inspect run/linen
    """
    # Where a shell runs a script in the background, SIGINT is ignored, and stays so.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    from bridge.cli import main as run

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _leave(*_: Any) -> None:
    """End the process at once. A KeyboardInterrupt may come up anywhere in an import, and some of those swallow it."""
    sys.stderr.write("interrupted: nothing was read or written.\n")
    sys.stderr.flush()
    os._exit(_INTERRUPTED)
