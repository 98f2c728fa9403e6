"""Names that a room gets from rooms above it, once both are imported.

Law: import-linter does not see such a name arrive, so there is one way for it: the lower room says with
`late_names` that it takes them, and the higher one calls what that returned. A room keeps what it has itself.
"""

from collections.abc import Callable
from typing import Any


def late_names(namespace: dict[str, Any]) -> Callable[..., None]:
    """A function that adds its keywords to `namespace`, the globals of a room; for one room above to call."""

    def take_names(**names: Any) -> None:
        for name, x in names.items():
            namespace.setdefault(name, x)

    return take_names
