"""The object graph: what it is, how it is taken apart and put together again."""

from nnx_core._late_names import late_names

take_names = late_names(globals())  # a hook: `_compat_paths` adds what users of `flax.nnx.graph` look for here
