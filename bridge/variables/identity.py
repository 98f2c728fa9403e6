"""Whether two values are the same objects.

Law: nothing is compared but objects: no array is read, so tracers and arrays of any size may be asked.
Knows pytrees; knows nothing of Variables.
"""

from __future__ import annotations

from typing import Any

import jax


def same_leaves(a: Any, b: Any) -> bool:
    """Whether two pytrees are alike and have the very same objects as leaves.

    >>> x = object()
    >>> same_leaves([x, (1,)], [x, (1,)]), same_leaves([x], (x,)), same_leaves([x], [object()])
    (True, False, False)
    """
    if a is b:
        return True
    leaves, treedef = jax.tree.flatten(a)
    other_leaves, other_treedef = jax.tree.flatten(b)
    if treedef != other_treedef:
        return False
    return all(x is y for x, y in zip(leaves, other_leaves, strict=True))
