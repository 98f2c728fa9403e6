"""One run of a model: what it returns and writes, and the gradients of a loss that every output enters.

Law: neither what is returned nor what is differentiated depends on the other model.
Knows subjects and arrays; knows nothing of the other model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from bridge.equivalence.compiled import Compiled, options_for
from bridge.equivalence.dependence import Range, draws_numbers, ranges_of
from bridge.equivalence.numbers import is_inexact
from bridge.equivalence.subjects import ComparisonError, Keys, Subject, Values
from bridge.equivalence.weights import weighed
from bridge.tracing.trace import is_array

Kind = Literal["outputs", "written", "gradients", "input_gradients"]


@dataclass(frozen=True)
class Outcome:
    """What a run has shown.

    Attributes:
      outputs: path of an output -> array, or what is none.
      written: state after the call.
      gradients: of parameters; `input_gradients`: of inexact inputs, by path. None if there are none, see `Run.why`.
      containers: what the outputs stand in, in words.
      least: of each of these the smallest tolerance, relative to its largest element: not 0 where a number in half
        precision is on the way to it. None where the call has no program.
    """

    outputs: Mapping[str, Any]
    written: Values
    gradients: Values | None = None
    input_gradients: Mapping[str, Any] | None = None
    containers: str = ""
    least: Outcome | None = None

    def allowed(self, what: Kind, at: Any) -> float:
        """The smallest tolerance of one of its values."""
        if self.least is None:
            return 0.0
        return max(jax.tree.leaves((getattr(self.least, what) or {}).get(at)), default=0.0)


@dataclass
class _Rest:
    """What is no array in a result, and so does not leave a compiled function: as the trace has seen it."""

    treedef: Any = None
    constants: dict[int, Any] = field(default_factory=dict)

    def arrays(self, tree: Any) -> list[Any]:
        """The arrays of a result; takes down the others."""
        leaves, self.treedef = jax.tree.flatten(tree)
        arrays: list[Any] = []
        for number, x in enumerate(leaves):
            if is_array(x) or isinstance(x, bool | int | float | complex):
                arrays.append(x)
            else:
                self.constants[number] = x
        return arrays

    def tree(self, arrays: list[Any], constants: Mapping[int, Any] | None = None) -> Any:
        """The result again; what is no array in it is as the trace has seen it, or one of `constants`."""
        rest = iter(arrays)
        count = self.treedef.num_leaves
        known = self.constants if constants is None else constants
        leaves = [known[n] if n in known else next(rest) for n in range(count)]
        return self.treedef.unflatten(leaves)


class Run:
    """A subject, compiled once, for any values, keys and inputs of the same form.

    Attributes:
      why: for what was asked and cannot be had, the reason.
      is_compiled: False for what does not run under `jit`.
    """

    def __init__(self, subject: Subject, which: str, with_gradients: bool):
        self.subject, self.which = subject, which
        self.why = ""
        self.is_compiled = True
        self._rest = _Rest()
        self._with_gradients = with_gradients
        self._compiled: Compiled | None = None

    @property
    def tolerance(self) -> float:
        """The smallest there can be, where something was computed in half precision."""
        return self._compiled.tolerance if self._compiled is not None else 0.0

    def __call__(self, values: Values, keys: Keys, args: Any, kwargs: Any) -> Outcome:
        """Run.

        Raises:
          ComparisonError: the model does not run on these inputs.
        """
        self.prepare(values, keys, args, kwargs)
        if self._compiled is None:
            output, written = self._eagerly(values, keys, args, kwargs)
            return Outcome(by_path(output), written, containers=containers(output))
        try:
            arrays, gradients = self._compiled(dict(values), keys, args, kwargs)
        except Exception as error:
            raise _does_not_run(self.which, self.subject, error) from error
        output, written = self._rest.tree(arrays)
        return Outcome(by_path(output), written, *(gradients or ()), containers=containers(output), least=self._least())

    def _least(self) -> Outcome:
        assert self._compiled is not None
        arrays, gradients = self._compiled.least
        output, written = self._rest.tree(arrays, dict.fromkeys(self._rest.constants, 0.0))
        return Outcome(by_path(output), written, *(gradients or ()))

    @property
    def draws_numbers(self) -> bool:
        """Whether the call's program draws random numbers; of a call that has no program nothing is known: False."""
        return self._compiled is not None and draws_numbers(self._compiled.program)

    def ranges(self, keys: Keys, args: Any, kwargs: Any) -> dict[int, Range]:
        """How far integer inputs may be drawn, by their number among the leaves of (args, kwargs)."""
        if self._compiled is None:
            return {}
        return ranges_of(self._compiled.program, (dict(self.subject.values), keys), (args, kwargs))

    def prepare(self, values: Values, keys: Keys, args: Any, kwargs: Any) -> None:
        """Compile, once, for arrays of this form, which may be abstract.

        Raises:
          ComparisonError: the model does not run on these inputs.
        """
        if self._compiled is None and self.is_compiled:
            self._compile(values, keys, args, kwargs)

    def _compile(self, values: Values, keys: Keys, args: Any, kwargs: Any) -> None:
        if self._with_gradients:
            self._compiled = Compiled(self._differentiated, options_for(values))
            try:
                self._compiled.prepare(dict(values), keys, args, kwargs)
            except _NoGradient as error:
                self.why = str(error)
            except Exception as error:  # noqa: BLE001  whether the model runs is seen without gradients
                self.why = f"{type(error).__name__}: {_first_line(error)}"
            else:
                return
            self._with_gradients = False
        self._compiled = Compiled(self._plain, options_for(values))
        try:
            self._compiled.prepare(dict(values), keys, args, kwargs)
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            # Written for real numbers: numpy, or an `if` on a value.
            self.is_compiled, self._compiled = False, None
        except Exception as error:
            raise _does_not_run(self.which, self.subject, error) from error

    def _eagerly(self, values: Values, keys: Keys, args: Any, kwargs: Any) -> tuple[Any, Values]:
        try:
            with jax.default_matmul_precision("float32"):
                return self.subject.run(values, keys, args, kwargs)
        except Exception as error:
            raise _does_not_run(self.which, self.subject, error) from error

    def _plain(self, values: Values, keys: Keys, args: Any, kwargs: Any) -> Any:
        return self._rest.arrays(self.subject.run(values, keys, args, kwargs)), None

    def _differentiated(self, values: Values, keys: Keys, args: Any, kwargs: Any) -> Any:
        parameters = {at: x for at, x in values.items() if at in self.subject.parameters}
        leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        inputs = {path_name(path): x for path, x in leaves if is_inexact(x)}

        def loss(parameters: Values, inputs: Any) -> Any:
            filled = [inputs.get(path_name(path), x) for path, x in leaves]
            own_args, own_kwargs = treedef.unflatten(filled)
            result = self.subject.run({**values, **parameters}, keys, own_args, own_kwargs)
            if not any(map(is_inexact, jax.tree.leaves(result[0]))):
                raise _NoGradient("no output is inexact")
            return weighed(result[0]), self._rest.arrays(result)

        if not parameters and not inputs:
            raise _NoGradient("neither a parameter nor an input is inexact")
        (_, arrays), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(parameters, inputs)
        return arrays, gradients


class _NoGradient(Exception):
    """There is nothing to differentiate, or nothing to differentiate by."""


def by_path(output: Any) -> dict[str, Any]:
    """Leaves of an output by path: "" where there is only one.

    >>> list(by_path({"y": 1, "state": (2, 3)}))
    ['state/0', 'state/1', 'y']
    """
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(output)}


def containers(output: Any) -> str:
    """What the leaves of an output stand in: a list is no tuple; a FrozenDict or another mapping is a dict.

    >>> containers({"y": 1, "state": (2, [3], None)})
    '{state: (x, [x], None), y: x}'
    """
    if isinstance(output, Mapping):
        inside = sorted((str(key), containers(x)) for key, x in output.items())
        return f"{{{', '.join(f'{key}: {x}' for key, x in inside)}}}"
    if isinstance(output, list):
        return f"[{', '.join(map(containers, output))}]"
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        inside = [f"{name}={containers(x)}" for name, x in zip(output._fields, output, strict=True)]
        return f"({', '.join(inside)})"
    if isinstance(output, tuple):
        return f"({', '.join(map(containers, output))}{',' if len(output) == 1 else ''})"
    return "None" if output is None else "x"


def path_name(path: Any) -> str:
    """Keys with `/` between them, each path its own: a `/` in a key has a backslash."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(key.replace("\\", "\\\\").replace("/", "\\/") for key in keys)


def _does_not_run(which: str, subject: Subject, error: Exception) -> ComparisonError:
    return ComparisonError(
        f"{which} ({subject.words}) does not run on these inputs",
        "a call that returns",
        f"{type(error).__name__}: {_first_line(error)}",
        "Give what the call needs: a mode flag that is open (train=False, deterministic=True), rngs= (--rng), method=.",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
