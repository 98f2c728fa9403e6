"""nnx.tabulate: what flax.nnx's table says, and the cases where flax.nnx's fails; nothing changes, nothing runs."""

import functools
import inspect
import re

import flax.nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import nnx_core as nnx
from nnx_core.inspect import CallInfo, MethodError, SizeBytes, census, diff
from tests.support.tables import PLAIN, cells, paths, table, theirs_table
from tests.tolerance import assert_trees_equal

# ---- the same as flax.nnx ----------------------------------------------------------------------------------


def block(nnx):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)
            self.bn = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.dropout(self.bn(self.linear(x))))

    class Foo(nnx.Module):
        def __init__(self, rngs):
            self.block1 = Block(rngs)
            self.embed = nnx.Embed(3, 2, rngs=rngs)
            self.again = self.embed

        def __call__(self, ids, *, flag=True):
            x = self.block1(self.embed(ids))
            self.block1(self.embed(ids))  # as before: no new rows
            self.block1(self.again(ids[:1]))
            return {"all": [x, ids], "logits": self.again.attend(x[:, :2])}

        def encode(self, ids):
            return self.embed(ids)

    return Foo(nnx.Rngs(0)), (jnp.zeros(4, int),)


def tied(nnx):
    class Half(nnx.Module):
        def __init__(self, w):
            self.w = w

        def __call__(self, x):
            return x @ self.w[...]

    class Tied(nnx.Module):
        def __init__(self):
            w = nnx.Param(jnp.ones((2, 2)), tag="tied")
            self.z = Half(w)
            self.a = Half(w)
            self.me = self
            self.cache = nnx.Cache(jnp.ones(3, jnp.bfloat16))

        def __call__(self, x):
            return self.z(self.a(x))

    return Tied(), (jnp.ones((1, 2)),)


def containers(nnx):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
            self.heads = nnx.Dict(out=nnx.Linear(2, 1, rngs=rngs))
            self.seq = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.relu)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.heads.out(self.seq(x))

    return Stack(nnx.Rngs(0)), (jnp.ones((1, 2)),)


def transformed(nnx):
    class Scanned(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs))
            self.layers = make(rngs.split(3))
            self.last = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
            return nnx.jit(lambda m, x: m(x))(self.last, x)

    return Scanned(nnx.Rngs(0)), (jnp.ones((1, 2)),)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (block, {}),
        (block, {"method": "encode"}),
        (block, {"depth": 0}),
        (block, {"depth": 1}),
        (block, {"row_filter": lambda row: row.path[-1:] == ("linear",)}),
        (block, {"compute_flops": True}),
        (tied, {}),
        (containers, {}),
        (transformed, {}),
        (lambda nnx: (nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), (jnp.ones((1, 3, 4)),)), {}),
    ],
    ids=lambda x: x.__name__ if callable(x) else "-".join(x) or "plain",
)
def test_cells_are_those_of_flax(make, options):
    theirs, args = make(flax.nnx)
    ours, _ = make(nnx)
    expected = theirs_table(theirs, *args, console_kwargs=PLAIN, **options)
    assert cells(table(ours, *args, **options)) == cells(expected)


@pytest.mark.parametrize("name", ["BatchNorm", "Embed", "Conv"])
def test_flops_are_those_of_flax(name):
    arguments = {"BatchNorm": (2,), "Embed": (3, 2), "Conv": (2, 3, (3, 3))}[name]
    x = {"BatchNorm": jnp.ones((3, 2)), "Embed": jnp.zeros(3, int), "Conv": jnp.ones((1, 4, 4, 2))}[name]
    theirs = getattr(flax.nnx, name)(*arguments, rngs=flax.nnx.Rngs(0))
    ours = getattr(nnx, name)(*arguments, rngs=nnx.Rngs(0))
    both = {"compute_flops": True, "compute_vjp_flops": True, "console_kwargs": PLAIN}
    expected = cells(theirs_table(theirs, x, **both))[1][4:6]
    assert [count.replace(",", "") for count in cells(nnx.tabulate(ours, x, **both))[1][4:6]] == expected


def test_signature_is_that_of_flax():
    ours, theirs = (inspect.signature(f).parameters.values() for f in (nnx.tabulate, flax.nnx.tabulate))
    simple = (str, bool, type(None))
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    assert [p.default for p in ours if isinstance(p.default, simple)] == [
        p.default for p in theirs if isinstance(p.default, simple)
    ]


def test_caption_and_escape_codes():
    text = nnx.tabulate(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))
    assert "\x1b[" in text  # for a terminal, unless asked otherwise
    text = table(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))
    assert "Linear Summary" in text
    assert "Total Parameters: 9 (36 B)" in text


# ---- nothing changes ---------------------------------------------------------------------------------------


class Busy(nnx.Module):
    """Everything that a call can change: counters, statistics, sown values, attributes, Variables."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.bn = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = 0
        self.count = nnx.Variable(jnp.zeros((), int))

    def __call__(self, x):
        self.calls += 1
        self.count[...] += 1
        self.sow(nnx.Intermediate, "features", x)
        self.made = nnx.Param(x)
        if x.shape == (3, 2):
            raise RuntimeError("no")
        return self.dropout(self.bn(self.perturb("p", self.linear(x))))


def test_nothing_of_the_model_changes():
    model = Busy(nnx.Rngs(0))
    before, variables = nnx.clone(model), list(nnx.to_flat_state(nnx.state(model)).leaves)
    text = table(model, jnp.ones((1, 2)), compute_flops=True)
    assert paths(text) == ["", "linear", "bn", "dropout"]  # sow and perturb are no calls of the model's
    assert not diff(model, before)
    assert all(a is b for a, b in zip(nnx.to_flat_state(nnx.state(model)).leaves, variables, strict=True))
    assert nnx.graphdef(model) == nnx.graphdef(before)
    assert (type(model), type(model.linear)) == (Busy, nnx.Linear)


def test_a_call_that_raises_changes_nothing_and_leaves_no_trace():
    model = Busy(nnx.Rngs(0))
    before = nnx.clone(model)
    with pytest.raises(RuntimeError, match="no"):
        table(model, jnp.ones((3, 2)))
    assert not diff(model, before)
    assert paths(table(model, jnp.ones((1, 2)))) == ["", "linear", "bn", "dropout"]
    model(jnp.ones((1, 2)))  # flax.nnx's tabulate leaves every class changed here
    assert model.calls == 1


def test_nothing_is_computed_and_large_models_need_no_memory():
    terabytes = nnx.eval_shape(lambda: nnx.Linear(1_000_000, 1_000_000, rngs=nnx.Rngs(0)))
    text = table(terabytes, jax.ShapeDtypeStruct((8, 1_000_000), jnp.bfloat16))
    assert "1,000,001,000,000 (4.0 TB)" in text
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    expected = table(model, jnp.ones((1, 2)))
    model.kernel[...].delete()  # as donation leaves it
    assert table(model, jnp.ones((1, 2))) == expected


def test_rows_come_from_functions_that_were_compiled_before():
    step = nnx.jit(lambda layer, x: layer(x))

    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in (0, 1))

        def __call__(self, x):
            return step(self.b, step(self.a, x))

    model = Two()
    model(jnp.ones((1, 2)))
    for _ in range(2):
        assert paths(table(model, jnp.ones((1, 2)))) == ["", "a", "b"]


def test_flops_of_a_model_with_a_cycle():
    model, args = tied(nnx)
    rows = cells(table(model, *args, compute_flops=True, compute_vjp_flops=True))
    # (1, 2) @ (2, 2) takes 8, its two gradients as much each; adding the two gradients of the shared w takes 4
    assert [row[4:6] for row in rows[1:-1]] == [["16", "52"], ["8", "24"], ["8", "24"]]


# ---- where flax.nnx has no table ---------------------------------------------------------------------------


def test_arrays_trees_and_plain_containers_are_listed():
    class Model(nnx.Module):
        def __init__(self):
            self.table = jnp.ones(20)
            self.tree = nnx.Param({"a": jnp.ones(3), "b": [jnp.ones(2, jnp.int8)]})
            self.extra = {"scale": nnx.Param(jnp.ones(4))}
            self.blocks = [nnx.Linear(2, 2, rngs=nnx.Rngs(0))]

        def __call__(self, x):
            return self.blocks[0](x)

    header, root, linear, total = cells(table(Model(), jnp.ones((1, 2))))
    assert header[4:] == ["Array", "Param"]
    assert root[4] == "table: float32[20]\n\n20 (80 B)"
    assert root[5] == "extra/scale: float32[4]\ntree:\na: float32[3]\nb:\n- int8[2]\n\n15 (54 B)"
    assert linear[0] == "blocks/0"
    assert total[3:] == ["Total", "20 (80 B)", "15 (54 B)"]


def test_arguments_of_any_kind():
    class Model(nnx.Module):
        def __call__(self, layer, options, flag, *rest, name, fn=None):
            assert (flag, rest, name) == (True, (1.5, None), "[red]x")  # as they are: not traced
            return layer(options["x"]), flag, "text", (), {1: 2.0}

    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    [_, row, _] = cells(table(Model(), layer, {"x": jnp.ones((1, 2))}, True, 1.5, None, name="[red]x", fn=jnp.sin))
    assert row[2].split("\n") == [
        *("- Linear(...)", "- x: float32[1,2]", "- True", "- 1.5", "- None", "name: [red]x", "fn: <function sin>")
    ]
    assert row[3].split("\n") == ["- float32[1,2]", "- True", "- text", "- []", "- 1: 2.0"]


def test_an_optimizer_step():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = nnx.clone(optimizer)
    header, row, _ = cells(table(optimizer, model, nnx.state(model, nnx.Param), method="update"))
    assert header[4:] == ["OptArray", "OptState", "OptVariable"]
    assert row[:2] == ["update", "Optimizer"]
    assert row[2].startswith("- Linear(...)")
    assert row[6].endswith("12 (48 B)")
    assert not diff(optimizer, before)


def test_a_container_of_models_is_listed_object_by_object():
    shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    text = table({"a": shared, "b": [shared, nnx.BatchNorm(2, rngs=nnx.Rngs(0))]})
    assert paths(text) == ["", "a", "b/1"]
    assert cells(text)[-1][4:] == ["4 (16 B)", "10 (40 B)"]


def test_random_streams_have_rows_on_request():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert paths(table(model, jnp.ones(2))) == [""]
    [_, _, stream, _] = cells(table(model, jnp.ones(2), row_filter=lambda row: True))
    assert stream[:4] == ["rngs", "RngStream", "", "key<fry>[]"]


def test_refs_cross_the_table():
    class Model(nnx.Module):
        def __init__(self):
            self.total = nnx.Variable(jnp.zeros(2), ref=True)

        def __call__(self, x):
            self.total[...] += x
            return self.total[...]

    model = Model()
    assert cells(table(model, jnp.ones(2), compute_flops=True))[1][4] == "2"
    assert_trees_equal(model.total[...], jnp.zeros(2))


def test_flops_are_left_out_where_an_axis_name_is_needed():
    class Model(nnx.Module):
        def __init__(self):
            self.bn = nnx.BatchNorm(2, axis_name="batch", rngs=nnx.Rngs(0))

        def __call__(self, x):
            over = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), out_axes=0, axis_name="batch")
            return over(self.bn, x)

    _, root, bn, _ = cells(table(Model(), jnp.ones((3, 4, 2)), compute_flops=True, compute_vjp_flops=True))
    assert all(root[4:6])
    assert bn[4:6] == ["", ""]


def test_methods_of_all_kinds():
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

        @property
        def bias(self):
            return self.layer.bias[...]

        @staticmethod
        def double(x):
            return 2 * x

        def _private(self, x):
            return self.double(self.layer(x)) + self.bias

        def train(self, **attributes):
            return super().train(**attributes)

    model = Model()
    assert paths(table(model, jnp.ones((1, 2)), method="_private")) == ["_private", "layer"]
    assert paths(table(model, method="train")) == ["train"]


def test_rows_say_what_was_called():
    rows = []
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
    table(model, jnp.ones((1, 2)), row_filter=lambda row: rows.append(row) or True, compute_flops=True)
    layer = model.layers[0]
    assert [row.call_order for row in rows] == [0, 1]
    assert rows[1] == CallInfo(
        1, id(layer), nnx.Linear, ("layers", 0), "float32[1,2]", rows[1].outputs, flops=15, vjp_flops=None
    )
    assert (rows[1].outputs.shape, rows[1].outputs.dtype) == ((1, 3), jnp.float32)


def test_options_of_rich_win():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    text = nnx.tabulate(
        model,
        jnp.ones((1, 2)),
        table_kwargs={"title": "Mine", "show_lines": False},
        column_kwargs={"justify": "right"},
        console_kwargs=PLAIN,
    )
    assert text.split("\n")[0].strip() == "Mine"
    assert "┃   inputs ┃" not in text
    assert "│       9 (36 B)" not in text
    assert re.search(r"│ +9 \(36 B\) │", text)


def test_missing_method():
    model = nnx.Embed(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(MethodError, match=r"Embed has no method 'encode' to call; it has \['__call__', 'attend'\]"):
        table(model, method="encode")
    with pytest.raises(MethodError, match=r"(?s)dict has no method '__call__'.*listed as it is"):
        table({"a": model}, jnp.ones(2))


# ---- sizes -----------------------------------------------------------------------


def test_census_counts_each_variable_once():
    model, _ = tied(nnx)
    infos = {info.path: info for info in census(model)}
    assert list(infos) == [(), ("a",), ("z",)]
    assert infos[()].sizes == {"Param": SizeBytes(4, 16), "Cache": SizeBytes(3, 6)}
    assert infos[("z",)].sizes == {}


def test_sizes_add_up():
    total = functools.reduce(SizeBytes.__add__, [SizeBytes(2, 8), SizeBytes.from_array(jnp.ones((3, 4)))])
    assert (total, str(total)) == (SizeBytes(14, 56), "14 (56 B)")
    assert not SizeBytes()
    assert [str(SizeBytes(1, n)) for n in (999, 1000, 999_960, 23_160_000)] == [
        *("1 (999 B)", "1 (1.0 KB)", "1 (1.0 MB)", "1 (23.2 MB)")
    ]


def test_their_table_leaves_nothing_behind():
    layer = flax.nnx.Linear(2, 2, rngs=flax.nnx.Rngs(0))
    before = set(vars(flax.nnx.Linear))
    theirs_table(layer, jnp.ones((1, 2)))
    assert set(vars(flax.nnx.Linear)) == before
    assert "sow" not in before
