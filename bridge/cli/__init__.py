"""The command `linen-nnx`: `app` has the commands, one file each.

Law: what a command does is in the rooms below; here it is asked for and shown.
"""

from bridge.cli.app import main

__all__ = ["main"]
