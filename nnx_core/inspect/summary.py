"""tabulate: a table of the calls inside a model, with shapes, sizes and flops.

Law: the model is called abstractly and on copies, so nothing is computed and nothing of it changes; the sizes
of the first row and the totals are those of the whole graph, each Variable counted once. rich draws the table and is
imported when there is one to draw.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from nnx_core._repr import SizeBytes, show_bytes
from nnx_core.graph.classify import DICT, SEQUENCE, STATE, kind_of
from nnx_core.graph.objects import Object
from nnx_core.graph.watched import public_methods
from nnx_core.inspect._errors import MethodError
from nnx_core.inspect.census import ObjectInfo, census, kinds_of
from nnx_core.inspect.describe import describe_variable, outline
from nnx_core.inspect.flops import forward_flops, vjp_flops
from nnx_core.inspect.recording import CallInfo, Recorder
from nnx_core.rngs import RngStream

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def filter_rng_streams(row: CallInfo) -> bool:
    """Whether a row is no random stream's; `tabulate` shows these rows unless told otherwise."""
    return not issubclass(row.type, RngStream)


def tabulate(
    obj: Any,
    *input_args: Any,
    depth: int | None = None,
    method: str = "__call__",
    row_filter: Callable[[CallInfo], bool] = filter_rng_streams,
    table_kwargs: Mapping[str, Any] = NO_OPTIONS,
    column_kwargs: Mapping[str, Any] = NO_OPTIONS,
    console_kwargs: Mapping[str, Any] = NO_OPTIONS,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **input_kwargs: Any,
) -> str:
    """A table of `obj`: one row for each call inside of `obj.method(*input_args, **input_kwargs)`.

    Its columns are the path and the type of the object called, the inputs and outputs of the call, and for each type
    of Variable the Variables the object holds itself, with the size of all below it. A call that repeats an earlier
    one (same object, method and shapes) has no row of its own. A Variable that is shared is counted with the object
    where it is first reached.

    Args:
      obj: a module, an Optimizer or any other object; or a list, tuple or dict of such, which is then listed
        object by object, without calls.
      *input_args: arguments of the method: arrays of any shape and dtype, `jax.ShapeDtypeStruct`s, modules, numbers,
        anything.
      depth: how many names a path may have; the first row is always shown.
      method: which method to call.
      row_filter: CallInfo -> whether to show it; by default, all but those of random streams.
      table_kwargs: for `rich.table.Table`, over what is set here.
      column_kwargs: for each `rich.table.Table.add_column`, over what is set here.
      console_kwargs: for `rich.console.Console`; by default `force_terminal=True`, and `force_jupyter` is whether
        this is a notebook. `width` sets the width of the table.
      compute_flops: add a column with the floating point operations of each call, as XLA counts them before it
        optimizes. Nothing is compiled, but each call is traced once more, alone, as it began; equal layers once. No
        number for a call that cannot run alone.
      compute_vjp_flops: the same for outputs and gradients with respect to parameters and inputs.
      **input_kwargs: keyword arguments of the method.

    Returns:
      The table, as text for a terminal.

    Raises:
      MethodError: if `obj` has no such method.

    Example:
      >>> import nnx_core as nnx, jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
      >>> plain = {"force_terminal": False, "width": 100}
      >>> table = nnx.tabulate(model, jnp.ones((1, 2)), console_kwargs=plain)
      >>> [line.split()[1::2] for line in table.splitlines() if "Linear" in line]
      [['layers/0', 'Linear', 'float32[1,2]', 'float32[1,3]', 'bias:', '│']]
    """
    infos = census(obj)
    if callable(getattr(obj, method, None)) and isinstance(obj, Object):
        rows = _calls(infos, obj, method, input_args, input_kwargs, compute_flops, compute_vjp_flops)
    elif kind_of(obj) in (SEQUENCE, DICT, STATE) and not input_args and not input_kwargs and method == "__call__":
        rows = [CallInfo(i, x.id, x.kind, x.path, "", None, None, None) for i, x in enumerate(infos)]
    else:
        raise MethodError(type(obj).__name__, method, public_methods(type(obj)))
    if depth is not None:
        rows = [row for row in rows if len(row.path) <= depth or row.call_order == 0]
    rows = [row for row in rows if row_filter(row)]
    flops = ["flops"] if compute_flops else []
    if compute_vjp_flops:
        flops.append("vjp_flops")
    table = _table(infos, rows, flops, table_kwargs, column_kwargs)
    return _rendered(table, console_kwargs)


def _calls(
    infos: list[ObjectInfo], obj: Any, method: str, args: Any, kwargs: Any, flops: bool, gradients: bool
) -> list[CallInfo]:
    recorder = Recorder(infos, count=flops or gradients)
    recorder.run(method, (obj, *args), kwargs)
    forward, gradient = map(functools.cache, (forward_flops, vjp_flops))  # equal calls have the same equations
    rows = []
    for row in recorder.rows:
        equations = recorder.equations.get(row.call_order)
        if equations is not None and flops:
            row = replace(row, flops=forward(equations))
        if equations is not None and gradients:
            row = replace(row, vjp_flops=gradient(equations))
        rows.append(row)
    return rows


# ---- drawing -----------------------------------------------------------------------------------------------


def _table(
    infos: list[ObjectInfo],
    rows: list[CallInfo],
    flops: list[str],
    table_kwargs: Mapping[str, Any],
    column_kwargs: Mapping[str, Any],
) -> Any:
    from rich.table import Table
    from rich.text import Text

    root, kinds = infos[0], kinds_of(infos)
    total = sum(root.sizes.values(), SizeBytes())
    options: dict[str, Any] = {"show_header": True, "show_lines": True, "show_footer": True}
    options["title"] = f"{root.kind.__name__} Summary"
    options["caption"] = Text.assemble("\nTotal Parameters: ", _size(total), style="bold not italic")
    table = Table(**{**options, **table_kwargs})
    names = ["path", "type", "inputs", "outputs", *flops]
    for name in names:
        footer = Text("Total", justify="right") if name == names[-1] else ""
        table.add_column(name, **{"footer": footer, **column_kwargs})
    for kind in kinds:
        table.add_column(kind, **{"footer": _size(root.sizes[kind]), **column_kwargs})
    by_id = {info.id: info for info in infos}
    for row in rows:
        info = by_id.get(row.object_id)
        table.add_row(
            _plain("/".join(map(str, row.path))),
            _plain(row.type.__name__),
            _plain(row.inputs_repr),
            _plain("\n".join(outline(row.outputs))),
            *(_plain(_number(getattr(row, name))) for name in flops),
            *(_plain("") if info is None else _cell(info, kind) for kind in kinds),
        )
    return table


def _plain(text: str) -> Any:
    """`text` as it is: brackets are no markup."""
    from rich.text import Text

    return Text(text)


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _size(size: SizeBytes) -> Any:
    from rich.text import Text

    return Text.assemble(f"{size.size:,} ", (f"({show_bytes(size.bytes)})", "dim"), style="bold")


def _cell(info: ObjectInfo, kind: str) -> Any:
    """The Variables of this kind that the object holds itself, and the size of all below it."""
    from rich.text import Text

    if kind not in info.sizes:
        return Text("")
    own = {name: describe_variable(x) for name, x in info.own.get(kind, {}).items()}
    listed = "".join(f"{line}\n" for line in outline(own)) + "\n" if own else ""
    return Text.assemble(listed, _size(info.sizes[kind]))


def _rendered(table: Any, console_kwargs: Mapping[str, Any]) -> str:
    from rich.console import Console

    console = Console(**{"force_terminal": True, "force_jupyter": in_ipython(), **console_kwargs})
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def in_ipython() -> bool:
    """Whether this runs in IPython: a notebook, or its shell."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
