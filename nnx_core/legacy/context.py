"""Context: what a call needs besides its arguments, random streams and flags.

Law: `make_rng` gives the keys that an `Rngs` of the same seeds gives. A Context is an object like any other: a
JAX pytree, and state that nnx_core's transforms write back.
"""

import copy
from collections.abc import Hashable, Mapping
from typing import Any

from nnx_core.graph.objects import Object
from nnx_core.legacy._errors import MissingStreamError
from nnx_core.rngs import Rngs, RngValue


class Context(Object):
    """Random streams by name, and flags such as `train`.

    Args:
      default: seed or key of the stream for all names that have none; or a mapping of names to these.
      flags: name -> hashable value; part of the structure under `jax.jit`.
      **streams: seeds or keys of streams with these names.

    Example:
      >>> from nnx_core import legacy as nnx
      >>> import jax
      >>> ctx = nnx.Context(jax.random.key(0), dropout=1, flags={"train": True})
      >>> ctx.make_rng("params").shape, ctx.has_rng("dropout"), ctx.get_flag("train")
      ((), True, True)
    """

    rngs: Rngs

    def __init__(
        self, default: Any = None, *, flags: Mapping[str, Hashable] | None = None, **streams: RngValue
    ) -> None:
        self.rngs = Rngs(default, **streams)
        self._flags = tuple(sorted((flags or {}).items()))

    def make_rng(self, name: str) -> Any:
        """The next key of the stream `name`, or of the default stream where there is none of that name.

        Raises:
          MissingStreamError: if there is neither.
          TraceError: under another JAX transform than the one that created this Context.
        """
        if not self.has_rng(name):
            raise MissingStreamError(name, self.rngs)
        key = self.rngs[name]()
        self._let_counts_go()
        return key

    def has_rng(self, name: str) -> bool:
        """Whether `make_rng(name)` has a key to give."""
        return name in self.rngs or "default" in self.rngs

    def fork(self) -> "Context":
        """A Context with new streams, each seeded by the next key of the one with its name; the same flags.

        Example:
          >>> from nnx_core import legacy as nnx
          >>> ctx = nnx.Context(0)
          >>> a, b = ctx.fork(), ctx.fork()
          >>> bool((a.make_rng("params") == b.make_rng("params")).all())
          False
        """
        new = copy.copy(self)
        new.rngs = self.rngs.fork()
        self._let_counts_go()
        return new

    def _let_counts_go(self) -> None:
        """Under plain jax.jit the counts of a Context end with the call, on purpose: reading them says so."""
        for stream in self.rngs.values():
            stream.count.get_value()

    @property
    def flags(self) -> dict[str, Any]:
        """Name -> value of all flags."""
        return dict(self._flags)

    def has_flag(self, name: str) -> bool:
        """Whether there is a flag `name`."""
        return name in self.flags

    def get_flag(self, name: str, default: Any = None) -> Any:
        """The flag `name`, or `default`."""
        return self.flags.get(name, default)
