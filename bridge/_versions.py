"""Which version of a package is installed, in words.

Law: it is never an error: what runs from a folder, without an installation, has none.
Knows names of distributions.
"""

from __future__ import annotations

from importlib import metadata


def version_of(name: str) -> str:
    """The version of an installed distribution, else 'unknown'.

    >>> version_of("no-such-package")
    'unknown'
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
