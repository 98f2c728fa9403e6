"""Two interpreters of programs: `Plain` runs transforms as Python does, `Lifted` as a library does.

Law: what is no transform is interpreted by the same lines in both, so that a difference is one of the transforms.
`Plain` uses no transform of a library but `capture`.
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
from tests.fuzz.graphs import Library


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


def stretch(m: Any) -> None:
    """Every array gets a leading axis of one."""
    each_cell(m, lambda array: jnp.asarray(array)[None] if is_array(array) else array)


def squeeze(m: Any) -> None:
    """Every array loses its leading axis."""
    each_cell(m, lambda array: jnp.asarray(array)[0] if is_array(array) else array)


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
        name = "abcz"[s.j % 4]
        make = {
            "param": lambda: self.nnx.Param(jnp.full(2, x)),
            "array": lambda: jnp.full(2, x),
            "static": lambda: f"seen {s.j}",
            "node": lambda: self.library.kind("Node")(),
            "alias": lambda: pick(reachable(m), s.j),
            "list": lambda: [self.nnx.Param(jnp.full(2, x)), jnp.full(2, x)],
        }
        self.library.attach(target, name, make[s.what]())
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


class Lifted(Run):
    """Transforms are those of the library."""

    def jit(self, s: p.Jit, m: Any, x: Any) -> Any:
        def f(m: Any, x: Any, part: Any) -> Any:
            return self.block(s.body, m, x) + (len(reachable([m, part])) if part is not None else 0)

        part = None if s.also is None else pick(reachable(m), s.also)
        return self.once(s, lambda: self.nnx.jit(f))(m, x, part)

    def functional(self, s: p.Functional, m: Any, x: Any) -> Any:
        graphdef, state = self.nnx.split(m)

        def f(graphdef: Any, state: Any, x: Any) -> Any:
            return self.block(s.body, self.nnx.merge(graphdef, state), x)

        return self.once(s, lambda: self.nnx.jit(f, static_argnums=0))(graphdef, state, x)

    def remat(self, s: p.Remat, m: Any, x: Any) -> Any:
        return self.once(s, lambda: self.nnx.remat(lambda m, x: self.block(s.body, m, x)))(m, x)

    def grad(self, s: p.Grad, m: Any, x: Any) -> Any:
        def f(m: Any, x: Any) -> Any:
            return self.block(s.body, m, x)

        floats = self.nnx.DiffState(0, is_float_param)
        argnums = {"x": 1, "params": floats, "both": (floats, 1)}[s.wrt]
        return x + number(self.once(s, lambda: self.nnx.grad(f, argnums=argnums))(m, x))

    def vmap(self, s: p.Vmap, m: Any, x: Any) -> Any:
        stretch(m)
        try:
            return self.once(s, lambda: self.nnx.vmap(lambda m, x: self.block(s.body, m, x)))(m, x[None])[0]
        finally:
            squeeze(m)

    def vmapshared(self, s: p.VmapShared, m: Any, x: Any) -> Any:
        make = lambda: self.nnx.vmap(lambda m, x: self.block(s.body, m, x), in_axes=(None, 0))  # noqa: E731  # as `once` wants it
        return self.once(s, make)(m, jnp.stack([x, x + 1])).sum()

    def scan(self, s: p.Scan, m: Any, x: Any) -> Any:
        Carry = self.nnx.Carry
        xs = jnp.arange(s.length, dtype=jnp.float32)
        if s.where == "Carry":

            def carry(both: Any, i: Any) -> Any:
                m, x = both
                return (m, self.block(s.body, m, x + i)), x

            (_, x), ys = self.once(s, lambda: self.nnx.scan(carry))((m, x), xs)
            return x + ys.sum()

        def step(x: Any, m: Any, i: Any) -> Any:
            return self.block(s.body, m, x + i), x

        axis = 0 if s.where == "axis" else None
        make = lambda: self.nnx.scan(step, in_axes=(Carry, axis, 0), out_axes=(Carry, 0))  # noqa: E731  # as `once` wants it
        if axis is None:
            x, ys = self.once(s, make)(x, m, xs)
            return x + ys.sum()
        stretch(m)
        try:
            x, ys = self.once(s, make)(x, m, xs)
        finally:
            squeeze(m)
        return x + ys.sum()

    def fori(self, s: p.Fori, m: Any, x: Any) -> Any:
        def body(i: Any, both: Any) -> Any:
            m, x = both
            return m, self.block(s.body, m, x + i)

        low, high = (jnp.int32(0), jnp.int32(s.n)) if s.traced else (0, s.n)
        return self.nnx.fori_loop(low, high, self.once(s, lambda: body), (m, x))[1]

    def while_(self, s: p.While, m: Any, x: Any) -> Any:
        def test(both: Any) -> Any:
            return both[0] < s.n

        def body(both: Any) -> Any:
            i, m, x = both
            return i + 1, m, self.block(s.body, m, x)

        loop = self.once(s, lambda: (test, body))
        return self.nnx.while_loop(*loop, (jnp.int32(0), m, x))[2]

    def cond(self, s: p.Cond, m: Any, x: Any) -> Any:
        yes, no = self.once(s, lambda: self.branches((s.yes, s.no)))
        return self.nnx.cond(jnp.mod(x, 2) < 1, yes, no, m, x)

    def switch(self, s: p.Switch, m: Any, x: Any) -> Any:
        index = jnp.mod(x, len(s.bodies)).astype(jnp.int32)
        return self.nnx.switch(index, self.once(s, lambda: self.branches(s.bodies)), m, x)

    def branches(self, bodies: tuple[p.Body, ...]) -> list[Any]:
        return [lambda m, x, body=body: self.block(body, m, x) for body in bodies]

    def capture(self, s: p.Capture, m: Any, x: Any) -> Any:
        make = lambda: self.nnx.capture(lambda m, x: self.block(s.body, m, x), self.nnx.Intermediate)  # noqa: E731  # as `once` wants it
        x, sown = self.once(s, make)(m, x)
        return x + number(sown)


setattr(Lifted, "while", Lifted.while_)  # the name of the statement is a keyword


class Plain(Run):
    """Transforms are what their laws say in Python: calls, loops and branches.

    A transformed call that raises changes nothing, so each is rehearsed on a copy first.
    """

    rehearsing = False

    def rehearse(self, s: p.Statement, m: Any, run: Callable[[Any], Any]) -> Any:
        """run(m), unless run(copy of m) raises."""
        if self.rehearsing and "Attempt(" not in repr(s):
            return run(m)
        outermost, self.rehearsing = not self.rehearsing, True
        try:
            run(copy.deepcopy(m))
        finally:
            self.rehearsing = not outermost
        return run(m)

    def called(self, s: Any, m: Any, x: Any) -> Any:
        return self.rehearse(s, m, lambda m: self.block(s.body, m, x))

    remat = called

    def functional(self, s: p.Functional, m: Any, x: Any) -> Any:
        def run(m: Any) -> Any:
            # merge makes new objects over the Variables that it is given
            return self.block(s.body, copy.deepcopy(m, {id(v): v for v in variables_of(m)}), x)

        return self.rehearse(s, m, run)

    def jit(self, s: p.Jit, m: Any, x: Any) -> Any:
        def run(m: Any) -> Any:
            part = None if s.also is None else pick(reachable(m), s.also)
            result = self.block(s.body, m, x)
            return result if part is None else result + len(reachable([m, part]))

        return self.rehearse(s, m, run)

    def grad(self, s: p.Grad, m: Any, x: Any) -> Any:
        def loss(values: Any, x: Any) -> Any:
            twin = copy.deepcopy(m)
            for v, value in zip(self.float_params(twin), values, strict=True):
                v.set_value(value)
            return self.block(s.body, twin, x)

        argnums = {"x": 1, "params": 0, "both": (0, 1)}[s.wrt]
        gradients = jax.grad(loss, argnums=argnums)([v.get_value() for v in self.float_params(m)], x)
        self.block(s.body, m, x)
        return x + number(gradients)

    def float_params(self, m: Any) -> list[Any]:
        return [v for v in variables_of(m) if is_float_param((), v)]

    def vmap(self, s: p.Vmap, m: Any, x: Any) -> Any:
        stretch(m)
        squeeze(m)
        return self.called(s, m, x)

    def vmapshared(self, s: p.VmapShared, m: Any, x: Any) -> Any:
        return self.block(s.body, m, x) + self.block(s.body, m, x + 1)

    def scan(self, s: p.Scan, m: Any, x: Any) -> Any:
        if s.where == "axis":
            stretch(m)
            squeeze(m)

        def run(m: Any) -> Any:
            carry, ys = x, jnp.float32(0)
            for i in range(s.length):
                y, carry = carry, self.block(s.body, m, carry + i)
                ys = ys + y
            return carry + ys

        return self.rehearse(s, m, run)

    def fori(self, s: p.Fori, m: Any, x: Any) -> Any:
        return self.looped(s, m, x, [*range(s.n)])

    def while_(self, s: p.While, m: Any, x: Any) -> Any:
        return self.looped(s, m, x, [0] * s.n)

    def looped(self, s: Any, m: Any, x: Any, steps: list[int]) -> Any:
        def run(m: Any) -> Any:
            carry = x
            for i in steps:
                carry = self.block(s.body, m, carry + i)
            return carry

        return self.rehearse(s, m, run)

    def cond(self, s: p.Cond, m: Any, x: Any) -> Any:
        body = s.yes if x % 2 < 1 else s.no
        return self.rehearse(s, m, lambda m: self.block(body, m, x))

    def switch(self, s: p.Switch, m: Any, x: Any) -> Any:
        body = s.bodies[int(x) % len(s.bodies)]
        return self.rehearse(s, m, lambda m: self.block(body, m, x))

    def capture(self, s: p.Capture, m: Any, x: Any) -> Any:
        def run(m: Any) -> Any:
            y, sown = self.nnx.capture(lambda m, x: self.block(s.body, m, x), self.nnx.Intermediate)(m, x)
            return y + number(sown)

        return self.rehearse(s, m, run)


setattr(Plain, "while", Plain.while_)
