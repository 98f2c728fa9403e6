"""Compiling a program once, though the function it comes from is traced at every call.

A function that a loop or a branch is given may close over anything, and what that is may be another thing at the next
call. So outside of any JAX transform it is traced anew each time; but where the trace is the program that an earlier
one was, that one's compiled form runs it, on the arrays that this trace found.

Law: `traced_anew(f, *args)` equals `f(*args)`. Two programs are one only if nothing tells them apart; what cannot be
compared is not one. What is remembered holds no array: those that f closes over are arguments of the program.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax

from nnx_core._trace import current_trace

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr

#: Programs that are remembered; beyond them, the one used longest ago is forgotten.
MAX_PROGRAMS = 256

_programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()


@functools.cache
def _outside() -> object:
    """No trace, whichever one is running: JAX's transforms run in one thread, and another has none."""
    traces: list[object] = []
    thread = threading.Thread(target=lambda: traces.append(current_trace()))
    thread.start()
    thread.join()
    return traces[0]


def _is_outside() -> bool:
    """Whether no JAX transform is running."""
    is_jitting = not jax.config.jax_disable_jit  # type: ignore[attr-defined]  # jax's stubs leave its options out
    return is_jitting and bool(current_trace() == _outside())


def traced_anew(f: Callable[..., Any], *args: Any) -> Any:
    """`f(*args)`, which is traced; compiled only if that gives another program than those of late."""
    if not _is_outside():
        return f(*args)
    from nnx_core.transforms.equations import without_rules  # late: `import nnx_core` need not wait for jax.extend

    closed, shapes = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)
    leaves = _program(without_rules(closed.jaxpr))(closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _program(jaxpr: "Jaxpr") -> Callable[[list[Any], list[Any]], list[Any]]:
    """(constants, arguments) -> results, compiled once for all programs that are this one."""
    from nnx_core.transforms.equations import Incomparable, described

    try:
        key = tuple(described(jaxpr, {}))
        hash(key)
    except (Incomparable, TypeError):
        return _compiled(jaxpr)
    if key not in _programs:
        while len(_programs) >= MAX_PROGRAMS:
            _programs.popitem(last=False)
        _programs[key] = _compiled(jaxpr)
    _programs.move_to_end(key)
    return _programs[key]


def _compiled(jaxpr: "Jaxpr") -> Callable[[list[Any], list[Any]], list[Any]]:
    def program(consts: list[Any], leaves: list[Any]) -> list[Any]:
        return jax.core.eval_jaxpr(jaxpr, consts, *leaves)

    return jax.jit(program)
