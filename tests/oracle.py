"""The same program on nnx_core and on flax.nnx: what it gives must agree bit for bit.

Law: `same(program)` raises unless `program(nnx_core)` and `program(flax.nnx)` give equal outputs: containers, bits,
and for modules, States and Variables their paths, kinds and axis names.
Knows what users see of both libraries; a program is a function of the library and uses nothing else of it.
"""

from collections.abc import Callable
from typing import Any

import flax.nnx
import jax

import nnx_core
from tests.tolerance import assert_trees_equal

LIBS = (nnx_core, flax.nnx)

Program = Callable[[Any], Any]


def same(program: Program) -> None:
    """Both libraries give the same for `program`."""
    with flax.nnx.use_eager_sharding(False):  # names need no mesh here, see REQUIREMENTS row 7
        ours, theirs = (plain(lib, program(lib)) for lib in LIBS)
    assert_trees_equal(ours, theirs)


def plain(lib: Any, x: Any) -> Any:
    """`x` as containers, arrays and strings that do not depend on the library."""
    if isinstance(x, lib.Variable):
        return {"kind": type(x).__name__, "value": x.get_raw_value(), "names": _names(x)}
    if isinstance(x, lib.State):
        return {f"{type(x).__name__}{path}": plain(lib, leaf) for path, leaf in lib.to_flat_state(x)}
    if isinstance(x, lib.Pytree):
        return {"type": type(x).__name__, "state": plain(lib, lib.state(x))}
    if isinstance(x, dict):
        return {key: plain(lib, value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(plain(lib, value) for value in x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return str(x.dtype), list(x.shape)
    return x


def _names(variable: Any) -> str:
    metadata = variable.get_metadata()
    return str(metadata.get("out_sharding", metadata.get("sharding_names")))
