"""What the statements of a program do, but for transforms: `plain.py` runs those as Python, `lifted.py` as a library.

Law: what is no transform is interpreted by the same lines in both, so that a difference is one of the transforms.
All numbers are integers below 64, in whatever dtype: sums and products of them are exact.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.fuzz import programs as p
from tests.fuzz.compare import (
    OBJECTS,
    RNG_STATE,
    VARIABLES,
    Planned,
    in_walking_order,
    is_array,
    members,
    objects_of,
    plain_arrays,
    reachable,
    variables_of,
)
from tests.support.graphs import Library


def wrapped(x: Any) -> Any:
    """x, which is not negative, as an exact float32 below 64; its derivative is 1."""
    return jax.lax.rem(jnp.asarray(x, jnp.float32), jnp.float32(64))


def number(x: Any) -> Any:
    """The sum of all numbers in x, a value or a pytree of values, as a float32 below 64."""
    leaves = [leaf for leaf in jax.tree.leaves(x) if is_numeric(leaf)]
    return wrapped(sum([jnp.sum(jnp.asarray(leaf, jnp.float32)) for leaf in leaves]))


def is_numeric(x: Any) -> bool:
    return isinstance(x, int | float) or (is_array(x) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))


def stepped(value: Any, c: int) -> Any:
    """Another value of the same shape and dtype, if value is a numeric array."""
    if not is_array(value) or not is_numeric(value):
        return value
    value = jnp.asarray(value)
    return jax.lax.rem(value * 2 + jnp.asarray(c, value.dtype), jnp.asarray(64, value.dtype))


def stretch(m: Any) -> None:
    """Every array gets a leading axis of one."""
    each_cell(m, lambda array: jnp.asarray(array)[None] if is_array(array) else array)


def squeeze(m: Any, i: int = 0) -> None:
    """Every array becomes its slice i along the leading axis."""
    each_cell(m, lambda array: jnp.asarray(array)[i] if is_array(array) else array)


def followed(m: Any) -> None:
    """Every array becomes two: itself and what `stepped` makes of it."""
    each_cell(m, lambda array: jnp.stack([jnp.asarray(array), stepped(array, 1)]) if is_array(array) else array)


def follow(m: Any) -> None:
    """Every array becomes what `stepped` makes of it."""
    each_cell(m, lambda array: stepped(array, 1))


def pick(things: list[Any], i: int) -> Any:
    return things[i % len(things)] if things else None


def writable(m: Any) -> list[Any]:
    """Variables whose value is one numeric array: no keys, no counters, nothing sown."""
    return [v for v in variables_of(m) if not isinstance(v, RNG_STATE) and is_array(v.get_value())]


def is_float_param(path: Any, leaf: Any) -> bool:
    if type(leaf).__name__ != "Param" or not is_array(leaf.get_value()):
        return False
    return jnp.issubdtype(leaf.get_value().dtype, jnp.floating)


def each_cell(m: Any, change: Callable[[Any], Any]) -> None:
    """Gives every array under m, in a Variable or not, another value."""
    for variable in variables_of(m):
        variable.set_value(jax.tree.map(change, variable.get_value()))
    for holder, name, array in list(plain_arrays(m)):
        put(holder, name, change(array))


def put(holder: Any, name: Any, value: Any) -> None:
    if isinstance(name, str) and isinstance(holder, OBJECTS) and not hasattr(holder, "__setitem__"):
        setattr(holder, name, value)
    else:
        holder[name] = value


class Run:
    """Interprets one program over one library; holds what a program's closures and functions are."""

    def __init__(self, library: Library):
        self.library, self.nnx = library, library.nnx
        self.outside = {"number": 1.0, "array": jnp.float32(1)}
        self._functions: dict[int, Any] = {}

    def next_round(self) -> None:
        """Closures hold something else from now on."""
        self.outside = {"number": self.outside["number"] + 1, "array": self.outside["array"] + 2}

    def block(self, body: p.Body, m: Any, x: Any) -> Any:
        """x after all statements of a body."""
        for statement in body:
            x = wrapped(getattr(self, type(statement).__name__.lower())(statement, m, x))
        return x

    def once(self, statement: p.Statement, make: Callable[[], Any]) -> Any:
        """The functions of a statement, made once, as those at the top of a user's file are."""
        if id(statement) not in self._functions:
            self._functions[id(statement)] = make()
        return self._functions[id(statement)]

    # ---- reads

    def read(self, s: p.Read, m: Any, x: Any) -> Any:
        variable = pick(variables_of(m), s.i)
        return x if variable is None else x + number(variable.get_value())

    def readplain(self, s: p.ReadPlain, m: Any, x: Any) -> Any:
        place = pick(list(plain_arrays(m)), s.i)
        return x if place is None else x + number(place[2])

    def readoutside(self, s: p.ReadOutside, m: Any, x: Any) -> Any:
        return x + self.outside[s.what]

    def shape(self, s: p.Shape, m: Any, x: Any) -> Any:
        return x + len(reachable(m)) + 3 * len(list(plain_arrays(m))) + 7 * sum(len(members(o)) for o in objects_of(m))

    def square(self, s: p.Square, m: Any, x: Any) -> Any:
        variable = pick(writable(m), s.i)
        return x if variable is None else x * number(variable[...])

    # ---- writes

    def write(self, s: p.Write, m: Any, x: Any) -> Any:
        v = pick(writable(m), s.i)
        if v is not None:
            WRITES[s.how](v, jnp.asarray(v[...]), jax.lax.stop_gradient(x), s.c)
        return x

    def writeplain(self, s: p.WritePlain, m: Any, x: Any) -> Any:
        place = pick(list(plain_arrays(m)), s.i)
        if place is not None:
            holder, name, array = place
            put(holder, name, stepped(array, s.c))
        return x

    def statestep(self, s: p.StateStep, m: Any, x: Any) -> Any:
        def wanted(path: Any, leaf: Any) -> bool:
            if s.kind == "arrays":
                return not isinstance(leaf, VARIABLES)
            return isinstance(leaf, self.library.kind(s.kind))

        state = self.nnx.state(m, wanted)
        self.nnx.update(m, jax.tree.map(lambda leaf: stepped(leaf, s.c), state))
        return x

    def draw(self, s: p.Draw, m: Any, x: Any) -> Any:
        rngs = pick([o for o in objects_of(m) if isinstance(o, self.nnx.Rngs)], s.i)
        return x if rngs is None else x + jax.random.randint(rngs.params(), (), 0, 32)

    def retag(self, s: p.Retag, m: Any, x: Any) -> Any:
        variable = pick(variables_of(m), s.i)
        if variable is not None:
            variable.set_metadata(mark=s.c)
        return x

    # ---- structure

    def attach(self, s: p.Attach, m: Any, x: Any) -> Any:
        target = pick([o for o in objects_of(m) if type(o).__name__ in ("Node", "Record", "List", "Dict")], s.i)
        make = {
            "param": lambda: self.nnx.Param(jnp.full(2, x)),
            "array": lambda: jnp.full(2, x),
            "static": lambda: f"seen {s.j}",
            "node": lambda: self.library.kind("Node")(),
            "alias": lambda: pick(reachable(m), s.j),
            "list": lambda: [self.nnx.Param(jnp.full(2, x)), jnp.full(2, x)],
        }
        self.library.attach(target, p.attached_name(s), make[s.what]())
        return x

    def grow(self, s: p.Grow, m: Any, x: Any) -> Any:
        for _, value in in_walking_order(pick(objects_of(m), s.i)):
            if isinstance(value, list):
                value.append(self.nnx.Param(jnp.full(2, x)))
            elif isinstance(value, dict):
                value["z"] = jnp.full(2, x)
        return x

    def delete(self, s: p.Delete, m: Any, x: Any) -> Any:
        target = pick([o for o in objects_of(m) if type(o).__name__ in ("Node", "Record", "List", "Dict")], s.i)
        name = pick([name for name, _ in in_walking_order(target)], s.j)
        if name is None:
            return x
        if isinstance(target, self.nnx.List | self.nnx.Dict):
            del target[name]
        else:
            delattr(target, name)
        return x

    def sow(self, s: p.Sow, m: Any, x: Any) -> Any:
        pick([o for o in objects_of(m) if type(o).__name__ == "Node"], s.i).sow(self.nnx.Intermediate, "sown", x)
        return x

    def pop(self, s: p.Pop, m: Any, x: Any) -> Any:
        kind = self.nnx.Intermediate if s.kind == "Intermediate" else self.library.kind(s.kind)
        return x + number(self.nnx.pop(m, kind))

    def fail(self, s: p.Fail, m: Any, x: Any) -> Any:
        raise Planned("on purpose")

    def attempt(self, s: p.Attempt, m: Any, x: Any) -> Any:
        try:
            return self.block(s.body, m, x)
        except Planned:
            return x + 1

    # ---- copies

    def copied(self, how: str, m: Any) -> Any:
        """Another graph with the same content, in one of the ways there are."""
        nnx = self.nnx
        match how:
            case "clone":
                return nnx.clone(m)
            case "deepcopy":
                return copy.deepcopy(m)
            case "merge":
                return nnx.merge(*nnx.split(m), copy=True)
            case "merge in parts":
                return nnx.merge(*nnx.split(m, nnx.Param, nnx.RngState, ...), copy=True)
        raise AssertionError(how)

    def inside(self, s: p.Inside, m: Any, x: Any) -> Any:
        return self.block(s.body, self.copied(s.how, m), x)

    def with_a_part(self, s: p.Returned, m: Any, x: Any) -> Any:
        """The body; then a new object that holds something new, a part of m, and the part once more."""
        x = self.block(s.body, m, x)
        made, part = self.library.kind("Node")(), pick(reachable(m), s.i)
        self.library.attach(made, "part", part)
        self.library.attach(made, "new", self.nnx.Param(jnp.full(2, x)))
        return made, (part, x)

    def kept(self, made: Any, part: Any, m: Any, x: Any) -> Any:
        """m has from now on what `with_a_part` returned."""
        self.library.attach(m, "made", made)
        return x + (made.part is part) + 2 * any(part is old for old in reachable(m))

    def back(self, s: p.Back, m: Any, x: Any) -> Any:
        twin = self.copied(s.how, m)
        x = self.block(s.body, twin, x)
        self.nnx.update(m, self.nnx.state(twin))
        return x


def _wide(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] = stepped(value, c).astype(jnp.float32 if value.dtype == jnp.bfloat16 else value.dtype)


def _part(v: Any, value: Any, x: Any, c: int) -> None:
    if value.ndim:
        v[c % value.shape[0]] = x.astype(value.dtype)
    else:
        v[...] = x.astype(value.dtype)


def _add(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] += jnp.asarray(c, value.dtype)
    v[...] = jnp.mod(v[...], 64)


def _number(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] = c


def _put_value(v: Any, value: Any, x: Any, c: int) -> None:
    v.value = stepped(value, c)


def _full(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] = jnp.full(value.shape, x, value.dtype)


def _whole(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] = stepped(value, c)


def _broadcast(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] = x.astype(value.dtype)


def _wrong_shape(v: Any, value: Any, x: Any, c: int) -> None:
    v[...] = jnp.zeros((5, *value.shape), value.dtype)


WRITES: dict[str, Callable[[Any, Any, Any, int], None]] = {
    "whole": _whole,
    "add": _add,
    "broadcast": _broadcast,
    "number": _number,
    "wide": _wide,
    "part": _part,
    "set": lambda v, value, x, c: v.set_value(stepped(value, c)),
    "value": _put_value,
    "full": _full,
    "replace": lambda v, value, x, c: v.set_value(jnp.full((2, 2), x)),
    "wrong shape": _wrong_shape,
    "copy_from": lambda v, value, x, c: v.copy_from(type(v)(stepped(value, c), note=c)),
}
