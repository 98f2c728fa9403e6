"""Programs whose transforms are what their laws say in Python: calls, loops and branches.

Law: uses no transform of a library but `capture`; gradients are jax.grad's, over a deep copy.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import programs as p
from tests.fuzz.compare import plain_arrays, reachable, variables_of
from tests.fuzz.run import Run, follow, is_float_param, number, pick, put, squeeze, stretch


class Plain(Run):
    """A transformed call that raises changes nothing, so each is rehearsed on a copy first."""

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
        return self.branched(s, (s.yes, s.no), 0 if x % 2 < 1 else 1, m, x)

    def switch(self, s: p.Switch, m: Any, x: Any) -> Any:
        return self.branched(s, s.bodies, int(x) % len(s.bodies), m, x)

    def branched(self, s: Any, bodies: tuple[p.Body, ...], taken: int, m: Any, x: Any) -> Any:
        """The branch that is taken; what another one writes becomes JAX's too: a trace does not know which it is."""

        def run(m: Any) -> Any:
            for other in (*bodies[:taken], *bodies[taken + 1 :]):
                twin = copy.deepcopy(m)
                self.block(other, twin, x)
                places = zip(list(plain_arrays(m)), plain_arrays(twin), strict=True)
                for (holder, name, array), (_, _, after) in places:
                    if isinstance(array, np.ndarray) and not isinstance(after, np.ndarray):
                        put(holder, name, jnp.asarray(array))
            return self.block(bodies[taken], m, x)

        return self.rehearse(s, m, run)

    def capture(self, s: p.Capture, m: Any, x: Any) -> Any:
        def run(m: Any) -> Any:
            y, sown = self.nnx.capture(lambda m, x: self.block(s.body, m, x), self.nnx.Intermediate)(m, x)
            return y + number(sown)

        return self.rehearse(s, m, run)

    def condsame(self, s: p.CondSame, m: Any, x: Any) -> Any:
        return self.called(s, m, x)

    def stack(self, s: p.Stack, m: Any, x: Any) -> Any:
        stretch(m)
        squeeze(m)

        def run(m: Any) -> Any:
            first = copy.deepcopy(m)
            y = self.block(s.body, first, x)
            follow(m)
            return y + self.block(s.body, m, x if s.where == "vmap" else y)

        return self.rehearse(s, m, run)

    def pure(self, s: p.Pure, m: Any, x: Any) -> Any:
        return self.carried_as_state(s, m, x, [0])

    def statecarry(self, s: p.StateCarry, m: Any, x: Any) -> Any:
        return self.carried_as_state(s, m, x, [0, 1])

    def carried_as_state(self, s: Any, m: Any, x: Any, steps: list[int]) -> Any:
        stretch(m)
        squeeze(m)
        return self.looped(s, m, x, steps)

    def closed(self, s: p.Closed, m: Any, x: Any) -> Any:
        if s.how == "grad":
            return x + jax.grad(lambda x: self.block(s.body, m, x))(x)
        return self.block(s.body, m, x)

    def returned(self, s: p.Returned, m: Any, x: Any) -> Any:
        made, (part, x) = self.rehearse(s, m, lambda m: self.with_a_part(s, m, x))
        return self.kept(made, part, m, x)


setattr(Plain, "while", Plain.while_)  # the name of the statement is a keyword
