"""What can go wrong with axis metadata on its way between Linen and NNX, one class for each mistake.

Law: as in `bridge._errors`: a `BridgeError` and a builtin, saying where, what was expected, what was found, what to do.
Knows text and paths; knows nothing of modules or arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax.errors import PartitioningUnspecifiedError

from bridge._errors import BridgeError, show_path


class AxisNameError(BridgeError, PartitioningUnspecifiedError, ValueError):
    """A transform adds or removes an axis of a value with axis names, under no name or the wrong one."""

    def __init__(self, box: str, index: int, expected: str, found: str):
        Exception.__init__(
            self,
            f"axis {index} of {box}:\n  expected: {expected}\n  found: {found}\n"
            "Give the nn.scan or nn.vmap that stacks this value its axis name:"
            " metadata_params={nn.PARTITION_NAME: 'layers'} (None where the axis is not sharded).",
        )


class AxisIndexError(BridgeError, IndexError):
    """An axis that a value cannot have."""

    def __init__(self, box: str, index: int, rank: int):
        super().__init__(
            f"axis {index} of {box}:\n  expected: {-rank} or more\n  found: {index}\n"
            "Pass an axis of the value that has the stacked axis."
        )


class UnsayableMetadataError(BridgeError, TypeError):
    """Metadata that JSON cannot say was to be written beside a checkpoint; `key` is None for a whole box."""

    def __init__(self, path: Sequence[str], key: str | None, found: object):
        what, expected = f"{key!r}", "names, numbers, None, or lists and tuples of them"
        hint = f"Leave it to the code that makes the model: split_metadata(variables, leave_out=[{key!r}])."
        if key is None:
            what, expected = "the box", "a Partitioned, LogicallyPartitioned or NNXMeta"
            hint = "Open it first: its own unbox() gives the value."
        super().__init__(
            f"{what} of {show_path(path)} cannot be written beside a checkpoint.\n"
            f"  expected: {expected}\n  found: {found!r}\n{hint}"
        )


class SidecarError(BridgeError, LookupError):
    """Metadata beside a checkpoint does not fit its values."""

    def __init__(self, path: Sequence[str], expected: str, found: str):
        super().__init__(
            f"the metadata of {show_path(path)} does not fit the values:\n  expected: {expected}\n"
            f"  found: {found}\nPass the values and the sidecar of one checkpoint."
        )
