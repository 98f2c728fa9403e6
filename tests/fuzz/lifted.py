"""Programs whose transforms are those of a library.

Law: each method does to (m, x) what the method of the same name in `plain.py` does.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tests.fuzz import programs as p
from tests.fuzz.compare import reachable
from tests.fuzz.run import Run, followed, is_float_param, number, pick, squeeze, stretch


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

    def condsame(self, s: p.CondSame, m: Any, x: Any) -> Any:
        yes, no = self.once(s, lambda: self.branches((s.body, s.body)))
        return self.nnx.cond(jnp.mod(x, 2) < 1, yes, no, m, x)

    def stack(self, s: p.Stack, m: Any, x: Any) -> Any:
        stretch(m)
        squeeze(m)
        followed(m)
        try:
            result = self.stacked(s, m, x)
        except Exception:
            squeeze(m)
            raise
        squeeze(m, 1)
        return result

    def stacked(self, s: p.Stack, m: Any, x: Any) -> Any:
        if s.where == "vmap":
            mapped = self.once(s, lambda: self.nnx.vmap(lambda m, x: self.block(s.body, m, x)))
            return mapped(m, jnp.stack([x, x])).sum()

        def step(x: Any, m: Any) -> Any:
            y = self.block(s.body, m, x)
            return y, y

        axes = {"in_axes": (self.nnx.Carry, 0), "out_axes": (self.nnx.Carry, 0)}
        return self.once(s, lambda: self.nnx.scan(step, **axes))(x, m)[1].sum()

    def pure(self, s: p.Pure, m: Any, x: Any) -> Any:
        graphdef, state = self.nnx.split(m)

        def f(state: Any, x: Any) -> Any:
            twin = self.nnx.merge(graphdef, state, copy=True)
            x = self.block(s.body, twin, x)
            return self.nnx.state(twin), x

        transform = {"jax.jit": jax.jit, "jax.checkpoint": jax.checkpoint}[s.how]
        state, x = transform(f)(state, x)
        self.nnx.update(m, state)
        return x

    def statecarry(self, s: p.StateCarry, m: Any, x: Any) -> Any:
        graphdef, state = self.nnx.split(m)

        def body(i: Any, carry: Any) -> Any:
            state, x = carry
            twin = self.nnx.merge(graphdef, state, copy=True)
            x = self.block(s.body, twin, x + i)
            return self.nnx.state(twin), x

        def step(carry: Any, i: Any) -> Any:
            carry = body(i, carry)
            return carry, carry[1]

        if s.how == "fori":
            state, x = self.nnx.fori_loop(0, 2, body, (state, x))
        else:
            (state, x), _ = self.nnx.scan(step)((state, x), jnp.arange(2, dtype=jnp.float32))
        self.nnx.update(m, state)
        return x

    def closed(self, s: p.Closed, m: Any, x: Any) -> Any:
        def f(x: Any) -> Any:
            return self.block(s.body, m, x)

        nnx = self.nnx
        match s.how:
            case "jit":
                return nnx.jit(f)(x)
            case "remat":
                return nnx.remat(f)(x)
            case "vmap":
                return nnx.vmap(f)(x[None])[0]
            case "scan":
                return nnx.scan(lambda x, i: (f(x), i))(x, jnp.zeros(1))[0]
            case "cond":
                return nnx.cond(x < 0, lambda x: x, f, x)
            case "grad":
                return x + number(nnx.grad(f)(x))
        raise AssertionError(s.how)

    def returned(self, s: p.Returned, m: Any, x: Any) -> Any:
        def f(m: Any, x: Any) -> Any:
            return self.with_a_part(s, m, x)

        made, (part, x) = self.once(s, lambda: getattr(self.nnx, s.how)(f))(m, x)
        return self.kept(made, part, m, x)


setattr(Lifted, "while", Lifted.while_)  # the name of the statement is a keyword
