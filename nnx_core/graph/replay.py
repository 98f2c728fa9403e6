"""Calling a function on fresh copies of its arguments, and writing back what it did.

Law: `replay(f, args, kwargs)` equals `f(*args, **kwargs)` in its result and in everything it does to its
arguments; in between, f sees copies it may treat as its own. This is what every transform does (`Lifted`),
with one group and no JAX transform that needs more. A call that raises has changed nothing.
"""

from collections.abc import Callable
from typing import Any

import jax

from nnx_core.graph.effects import After, Forced, apply, check_writes, collect
from nnx_core.graph.pack import Leaves, Packer, Place, Refs
from nnx_core.graph.unpack import Unpacker, Watch

_ROOT = Place((), None, 0)


def replay(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool = False) -> Any:
    """`f(*args, **kwargs)` on fresh copies of the objects and Variables in its arguments.

    Numbers and arrays that no object owns reach f as they are. With `compiled`, f runs under `jax.jit`, which
    computes nothing that f's result and writes do not need.
    """
    packer = Packer((None,), Refs(), trace_numbers=False)
    root = packer.pack({"args": args, "kwargs": kwargs}, _ROOT)  # paths as a user knows them
    [(values, loose)] = packer.leaves

    def pure(values: list[Any]) -> tuple[After, list[Leaves]]:
        refs, watch = Refs(), Watch()
        copies = Unpacker(((values, loose),), refs, (None,), watch).unpack(root, _ROOT)
        out = f(*copies["args"], **copies["kwargs"])
        return collect(Packer((None,), refs, trace_numbers=False), watch, out, None, Forced())

    run = jax.jit(pure) if compiled else pure
    after, written = run(values)
    check_writes(after, packer.refs)
    return apply(after, written, packer.refs)
