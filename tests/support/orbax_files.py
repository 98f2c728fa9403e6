"""A tree of some size, and how it is written as an Orbax checkpoint: here and in processes that are killed."""

import numpy as np

from bridge.checkpoint.formats.orbax.write import OrbaxSink
from tests.support.checkpoint_files import describe


def content(count=8, size=50):
    rng = np.random.default_rng(1)
    arrays = {f"layer_{n}": {"kernel": rng.standard_normal((size, size), "float32")} for n in range(count)}
    return {"params": arrays, "opt_state": [None, {"count": np.int32(3)}], "name": "run", "step": 7}


def write(path, tree, batch=2, **options):
    shape, values = describe(tree)
    with OrbaxSink(path, shape, **options) as sink:
        places = [place for place in shape.leaves if place not in sink.done]
        for start in range(0, len(places), batch):
            sink.write({place: values[place] for place in places[start : start + batch]})
        sink.finish({"made": "here"})
