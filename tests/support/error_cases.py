"""Mistakes in rooms 0 to 5 of nnx_core: what to do, which error it is, what the message says.

Knows users' mistakes and the words for them; `test_errors` raises each, `test_messages` sees that no raise is left.
"""

import jax
import jax.numpy as jnp
import optax

import nnx_core as nnx
from nnx_core.optim._errors import GradientMismatchError
from tests.strategies import Affine, Count, Node, stack_of_affine
from tests.support.arrays import keys, ones
from tests.support.error_cases_api import CASES as API_CASES

X = ones(2, 3)
KEYS = keys(0, 1, 2, 3)


def shared_pair():
    m = Node()
    m.a = Affine()
    m.b = m.a
    return m


def mapped_and_not(a, b):
    nnx.vmap(lambda a, b: None, in_axes=(0, None))(a, b)


def alias_within():
    m = Node()
    m.a = nnx.Param(jnp.ones(4))
    m.b = m.a
    axes = nnx.StateAxes({nnx.PathContains("a"): 0, ...: None})
    nnx.vmap(lambda m: None, in_axes=(axes,), axis_size=4)(m)


def named_stack(name):
    m = Node()
    m.w = nnx.Param(jnp.ones((4, 3)), out_sharding=(name, "embed"))
    return m


def write_captured(transform):
    m = Affine()
    transform(lambda x: m(x).sum())(X)


def set_captured():
    m = Affine()

    def f(x):
        m.extra = 3
        return x

    nnx.jit(f)(X)


def delete_captured():
    m = Affine()

    def f(x):
        del m.n_in
        return x

    nnx.jit(f)(X)


def append_captured():
    items = nnx.List([1])

    def f(x):
        items.append(2)
        return x

    nnx.jit(f)(X)


def captured_through_a_compiled_function():
    m = Affine()
    f = nnx.jit(lambda m, x: m(x))
    f(m, X)
    f(m, X)  # from a plan
    jax.jit(lambda x: f(m, x))(X)


def grown_through_a_compiled_function():
    m = Affine()

    def grow(m):
        m.extra = nnx.Cache(jnp.ones(1))

    jax.jit(lambda x: nnx.jit(grow)(m))(X)


def mapped_value_to_unmapped_variable():
    m = Node()
    m.inner = Node()
    m.inner.n = Count(jnp.float32(0.0))

    def f(m, x):
        m.inner.n[...] = x

    nnx.vmap(f, in_axes=(None, 0))(m, jnp.arange(3.0))


def carry_replaced():
    nnx.scan(lambda m, x: (Affine(), x))(Affine(), X)


def created_without_axis():
    def f(c, x, m):
        m.extra = nnx.Cache(x)
        return c, x

    nnx.scan(f, in_axes=(nnx.Carry, 0, None))(jnp.float32(0.0), X, Node())


def carry_missing():
    nnx.scan(lambda x: x, in_axes=0, out_axes=nnx.Carry)(X)


def structure_changed_where_forbidden():
    def grow(m):
        m.extra = 3
        del m.n_in

    nnx.jit(grow, graph_updates=False)(Affine())


def holds_itself():
    m = Node()
    m.items = nnx.data([X])
    m.items.append(m.items)
    return m


def optimizer():
    return Affine(), nnx.Optimizer(Affine(), optax.adam(1e-2), wrt=nnx.Param)


def optimizer_given_no_state():
    model, opt = optimizer()
    opt.update(model, 3)


def optimizer_given_another_state():
    model, opt = optimizer()
    opt.update(model, nnx.State({"kernl": nnx.Param(jnp.ones((3, 3)))}))


def optimizer_whose_state_grows():
    tx = optax.GradientTransformation(lambda p: (jnp.zeros(1),), lambda g, s, p=None: (g, (*s, jnp.zeros(1))))
    model = Affine()
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    opt.update(model, nnx.grad(lambda m: m(X).sum())(model))


def merge_with(change):
    graphdef, state = nnx.split(shared_pair())
    change(state)
    nnx.merge(graphdef, state)


def register(name):
    @nnx.register_variable_name(name)
    class Other(nnx.Variable): ...


def wrong_metadata_call():
    nnx.Param(X).set_metadata("a", 1, 2)


def data_in_an_annotated_attribute():
    class Configured(nnx.Module):
        size: nnx.Static[int]

    Configured().size = X


def write_item(value, index, x):
    nnx.Param(value)[index] = x


def write_across_devices():
    here, there = jax.devices()[1:3]
    nnx.Param(jax.device_put(X, here))[...] = jax.device_put(X, there)


# name: (what to do, nnx_core's class or a builtin, text)
CASES = {
    # aliasing and sharing
    "alias of modules": (
        lambda: mapped_and_not(*([stack_of_affine(4)] * 2)),
        "AliasError",
        r"^Affine is reached twice with different treatment:\n  args\[0\]: axis 0\n  args\[1\]: not mapped\nGive both",
    ),
    "alias of variables": (
        lambda: mapped_and_not(*([nnx.Param(jnp.ones(4))] * 2)),
        "AliasError",
        r"^Param is reached twice with different treatment:\n  args\[0\]: axis 0\n  args\[1\]: not mapped\n",
    ),
    "alias of owner and variable": (
        lambda: (lambda m: mapped_and_not(m, m.kernel))(stack_of_affine(4)),
        "AliasError",
        r"^Param is reached twice.*\n  args\[0\]\.kernel: axis 0\n  args\[1\]: not mapped\n",
    ),
    "alias within one module": (
        alias_within,
        "AliasError",
        r"^Param is reached twice.*\n  args\[0\]\.a: axis 0\n  args\[0\]\.b: not mapped\n.*nnx\.clone",
    ),
    "alias of gradient and rest": (
        lambda: (lambda m: nnx.grad(lambda a, b: a(X).sum())(m, [m.kernel]))(Affine()),
        "AliasError",
        r"^Param is reached twice.*\n  args\[0\]\.kernel: differentiated\n  args\[1\]\[0\]: not differentiated\n",
    ),
    "an argument returned under another axis": (
        lambda: nnx.vmap(lambda m: m, out_axes=1)(stack_of_affine(4)),
        "AliasError",
        r"^Affine is reached twice.*\n  args\[0\]: axis 0\n  result: axis 1\n",
    ),
    "sharing forbidden in jit": (
        lambda: nnx.jit(lambda m: None, graph=False)(shared_pair()),
        "SharedReferenceError",
        r"^Found a shared Affine where graph=False forbids sharing:\n  args\[0\]\.a\n  args\[0\]\.b\n.*nnx\.clone",
    ),
    "sharing forbidden in split": (
        lambda: nnx.split(shared_pair(), graph=False),
        "SharedReferenceError",
        r"^Found a shared Affine where graph=False forbids sharing:\n  a\n  b\n",
    ),
    "structure changes forbidden": (
        structure_changed_where_forbidden,
        "StructureUpdateError",
        r"grow changed the structure.*graph_updates=False.*\n  args\[0\]\.extra\n  args\[0\]\.n_in\n",
    ),
    # traces
    "captured variable written in jit": (
        lambda: write_captured(nnx.jit),
        "TraceError",
        r"^Cannot write Count.*created outside.*\nPass the module that owns it as an argument",
    ),
    "captured variable written in grad": (
        lambda: write_captured(nnx.grad),
        "TraceError",
        r"^Cannot write Count.*\nPass the module",
    ),
    "captured object changed": (set_captured, "TraceError", r"^Cannot write attribute 'extra' of Affine"),
    "captured attribute deleted": (
        delete_captured,
        "TraceError",
        r"^Cannot write attribute 'n_in' of Affine",
    ),
    "captured list changed": (append_captured, "TraceError", r"^Cannot write an item of List"),
    "captured module in a compiled function": (
        captured_through_a_compiled_function,
        "TraceError",
        r"^Cannot write Count at args\[0\]\.calls here",
    ),
    "captured module grown by a compiled function": (
        grown_through_a_compiled_function,
        "TraceError",
        r"^Cannot write Affine at args\[0\] here",
    ),
    # treatments that do not fit
    "in_axes of another length": (
        lambda: nnx.vmap(lambda a, b: None, in_axes=(0,))(X, X),
        "SpecError",
        r"^args is a tuple with 2 items; the treatment given for it has another\s+form: \(0,\)",
    ),
    "a tuple of axes for a module": (
        lambda: nnx.vmap(lambda m: None, in_axes=((0, 1),))(Affine()),
        "SpecError",
        r"^args\[0\] is a Affine, expected one treatment for it.*found \(0, 1\)",
    ),
    "an axis that cannot be hashed": (
        lambda: nnx.vmap(lambda m: None, in_axes=({1, 2},))(X),
        "SpecError",
        r"^\{1, 2\} cannot say how to treat a leaf: it is not hashable",
    ),
    "argnums out of range": (
        lambda: nnx.grad(lambda m: m(X).sum(), argnums=3)(Affine()),
        "SpecError",
        r"^argnums 3 is out of range: .*lambda.* was called with 1 arguments",
    ),
    "no aux": (
        lambda: nnx.grad(lambda m: m(X).sum(), has_aux=True)(Affine()),
        "SpecError",
        r"has_aux=True: expected \(loss, aux\), found \w+",
    ),
    "a loss that is a module": (
        lambda: nnx.grad(lambda m: m)(Affine()),
        "SpecError",
        r"must return a scalar loss",
    ),
    "one Carry more than the other": (
        carry_missing,
        "SpecError",
        r"^scan: in_axes has 0 Carry and out_axes has 1; give both as many",
    ),
    "filters that miss a leaf of a module": (
        lambda: nnx.vmap(lambda m: None, in_axes=(nnx.StateAxes({nnx.Param: 0}),))(stack_of_affine(4)),
        "FilterError",
        r"^No filter of StateAxes.* matches calls \(Count\)\. End with `\.\.\.`",
    ),
    # structure
    "a mapped value for an unmapped variable": (
        mapped_value_to_unmapped_variable,
        "StructureError",
        r"wrote a value that depends on a mapped axis.*\n  args\[0\]\.inner\.n\nMap the Variable",
    ),
    "a carry that is replaced": (
        carry_replaced,
        "StructureError",
        r"must return its carry with the structure it was given; args\[0\] differs.*in place",
    ),
    "state created without an axis": (
        created_without_axis,
        "StructureError",
        r"^scan: .*without axis \(None\)\. Give it an axis or Carry",
    ),
    "an axis of another name": (
        lambda: nnx.vmap(lambda m: None, transform_metadata={nnx.PARTITION_NAME: "layers"})(named_stack("blocks")),
        "MetadataError",
        r"^Axis 0 of a Param with axis names \('blocks', 'embed'\).*'layers', found 'blocks'",
    ),
    "a list that holds itself": (
        lambda: nnx.state(holds_itself()),
        "DepthError",
        r"^<root>, a Node, is nested without end, or more than 10,000 levels deep\.\nExpected .* use nnx\.List",
    ),
    # states
    "a state without a path": (
        lambda: merge_with(lambda state: state["a"].pop("calls")),
        "StateMismatchError",
        r"^The state does not fit\.\nMissing from the state:\n  a\.calls\nBuild the state",
    ),
    "a state with another path": (
        lambda: merge_with(lambda state: state.update(b=nnx.Param(X))),
        "StateMismatchError",
        r"\nIn the state, but not in the graph:\n  b\n",
    ),
    "update of unknown paths": (
        lambda: nnx.update(Affine(), {"kernl": X, "extra": {0: X}}),
        "StateMismatchError",
        r"(?s)In the state, but not in the graph:(?=.*\n  kernl)(?=.*\n  extra\[0\])",
    ),
    "strict update of another shape and dtype": (
        lambda: nnx.update(Affine(), {"kernel": X, "calls": jnp.float32(1.0)}, strict=True),
        "StateMismatchError",
        r"(?s)Different:\n  calls: expected int32\[\], found float32\[\]\n  kernel: expected .*3,\s?3.*found .*2,\s?3",
    ),
    "replace_by_pure_dict of unknown paths": (
        lambda: nnx.replace_by_pure_dict(nnx.state(Affine()), {"kernl": X}),
        "StateMismatchError",
        r"not in the graph:\n  kernl",
    ),
    "a path through a value": (
        lambda: nnx.State({("a",): 1, ("a", "b"): 2}.items()),
        "StateMismatchError",
        r"a\.b: expected a nested mapping on the way, found int",
    ),
    "no filter for the rest": (
        lambda: nnx.split(Affine(), nnx.Param),
        "FilterError",
        r"^Non-exhaustive filters: calls \(.*\) and 0 more match none of.*Use `\.\.\.`",
    ),
    "everything before the end": (
        lambda: nnx.state(Affine(), ..., nnx.Param),
        "FilterError",
        r"^`\.\.\.` or True can only be used as the last filter, got Ellipsis at index 0",
    ),
    "no filter": (
        lambda: nnx.state(Affine(), 3),
        "FilterError",
        r"^Expected a filter \(a type, a tag.*found 3\.",
    ),
    "pop without a filter": (
        lambda: nnx.pop(Affine()),
        "FilterError",
        r"^nnx\.pop expects at least one filter",
    ),
    "not a graph": (
        lambda: nnx.split("text"),
        "NotAGraphError",
        r"^nnx\.split needs a module, Variable or pytree, found str",
    ),
    "merge of something else": (
        lambda: nnx.merge(nnx.state(Affine()), {}),
        TypeError,
        r"^nnx\.merge needs a GraphDef first.*found State",
    ),
    # variables and kinds
    "in-place operator": (
        lambda: exec("v += 1", {"v": nnx.Param(X)}),
        "InPlaceError",
        r"^`variable \+= x` would replace the Param by an array\. Write `variable\[\.\.\.\] \+= x`",
    ),
    "copy_from another kind": (
        lambda: nnx.Param(X).copy_from(nnx.BatchStat(X)),
        ValueError,
        r"^Expected a Param, found a BatchStat",
    ),
    "missing metadata": (
        lambda: nnx.Param(X, tag="a").get_metadata("nosuch"),
        KeyError,
        r"Param has no metadata 'nosuch'; it has \['tag'\]",
    ),
    "deleting missing metadata": (
        lambda: nnx.Param(X, tag="a").del_metadata("nosuch"),
        KeyError,
        r"Param has no metadata 'nosuch'; it has \['tag'\]",
    ),
    "set_metadata with three arguments": (
        wrong_metadata_call,
        TypeError,
        r"^set_metadata takes one mapping, a name and a value, or keywords",
    ),
    "attribute of a variable": (
        lambda: nnx.Param(X).nosuch,
        AttributeError,
        r"^Param has no attribute or metadata 'nosuch', and neither has its value",
    ),
    "setting an attribute of a variable": (
        lambda: setattr(nnx.Param(X), "tag", 1),
        AttributeError,
        r"^Cannot set attribute 'tag' of Param\..*v\.set_metadata\(tag=",
    ),
    "a taken name": (
        lambda: register("params"),
        "RegistryError",
        r"^The name 'params' is already registered for .*Param, found .*Other\. Choose another name",
    ),
    "an unknown name": (
        lambda: nnx.variable_type_from_name("unheard"),
        "RegistryError",
        r"^No Variable type is registered for the name 'unheard'; known are \[.*'params'.*\]",
    ),
    "a type without a name": (
        lambda: nnx.variable_name_from_type(type("Nameless", (nnx.Variable,), {})),
        "RegistryError",
        r"Nameless has no registered name; known are",
    ),
    # modules, containers, rngs
    "sow into a parameter": (
        lambda: Affine().sow(nnx.Intermediate, "kernel", 1.0),
        ValueError,
        r"^Expected 'kernel' of Affine to be a Variable of type Intermediate, found Param\. Use another name",
    ),
    "perturb a parameter": (
        lambda: Affine().perturb("kernel", X),
        ValueError,
        r"^Expected 'kernel' of Affine to be a Variable of type Perturbation, found Param",
    ),
    "set_attributes of nobody": (
        lambda: Affine().set_attributes(zz=1, aa=2),
        "AttributeNotFoundError",
        r"at least one instance of the following attributes: \['aa', 'zz'\]\.\nCheck the spelling",
    ),
    "a layer that cannot be called": (
        lambda: nnx.Sequential(jnp.tanh, 3)(X),
        TypeError,
        r"^Sequential\.layers\[1\] must be callable, found int",
    ),
    "a missing key as attribute": (
        lambda: nnx.Dict(a=1).b,
        AttributeError,
        r"^Dict has no attribute or key 'b'; it has \['a'\]",
    ),
    "a missing key of a state": (
        lambda: nnx.State({"a": 1}).b,
        AttributeError,
        r"^State has no attribute or key 'b'",
    ),
    "a missing stream": (
        lambda: nnx.Rngs(params=0).dropout(),
        "MissingRngError",
        r"^No RngStream named 'dropout' and no default stream; found \['params'\]\.\nCreate it with.*dropout=seed",
    ),
    "a missing stream by key": (
        lambda: nnx.Rngs(params=0)["dropout"],
        "MissingRngError",
        r"^No RngStream named 'dropout'",
    ),
    "something that is no seed": (
        lambda: nnx.Rngs(params="a"),
        TypeError,
        r"^Expected a seed or a key, found str",
    ),
    "squeeze of several splits": (
        lambda: nnx.split_rngs(nnx.Rngs(0), splits=3, squeeze=True),
        ValueError,
        r"^squeeze=True needs splits=1, found 3",
    ),
    "reseed of a split stream": (
        lambda: nnx.reseed(nnx.Rngs(noise=0).split(3), noise=1),
        ValueError,
        r"^The stream 'noise' at .*shape \(3,\).*policy='match_shape'",
    ),
    "apply of what is shared where that is forbidden": (
        lambda: (lambda graphdef, state: graphdef.apply(state, graph=False))(*nnx.split(shared_pair())),
        "SharedReferenceError",
        r"^Found a shared Affine where graph=False forbids sharing:\n  a\n  b\n",
    ),
    # marks and pop
    "data in a static attribute": (
        lambda: nnx.List([nnx.static(X)]),
        ValueError,
        r"^Found data in the static attribute \[0\] of List: a \w+\.\nMark it with nnx\.data",
    ),
    "data in an attribute that the class calls static": (
        data_in_an_annotated_attribute,
        ValueError,
        r"^Found data in the static attribute size of Configured: a \w+\.\n",
    ),
    "a pop from a list": (
        lambda: nnx.pop([nnx.Param(X)], nnx.Param),
        ValueError,
        r"^Cannot pop \[0\], a Param: .* found it in a list,",
    ),
    # writes
    "a write that does not fit": (
        lambda: write_item(X, ..., jnp.ones(4)),
        "WriteError",
        r"^Cannot write into Param of shape \(2, 3\): expected what broadcasts to shape \(2, 3\) and casts to float32,"
        r" found float32\[4\].*\n`v\[\.\.\.\] = x` and .* `v\.value = x` replaces it",
    ),
    "a write across devices": (
        write_across_devices,
        "WriteError",
        r"expected an array on \S+1, found an array on \S+2\.",
    ),
    "a write of another tree": (
        lambda: write_item([1, 2], ..., [1]),
        "WriteError",
        r"^Cannot write into Param: expected PyTreeDef\(\[\*, \*\]\), found PyTreeDef\(\[\*\]\)",
    ),
    "an item of what has none": (
        lambda: write_item((1, 2), 0, 3),
        "WriteError",
        r"expected a value with items that can be set, found \(1, 2\)",
    ),
    # optimizer
    "an optimizer without wrt": (
        lambda: nnx.Optimizer(Affine(), optax.adam(1e-2)),
        "OptimizerError",
        r"^Missing required argument `wrt`: .*nnx\.Param.*nnx\.ModelAndOptimizer",
    ),
    "gradients that are no state": (
        optimizer_given_no_state,
        "OptimizerError",
        r"^Expected gradients as nnx\.grad.*found int\. The arguments are update\(model, grads\)",
    ),
    "gradients of other paths": (
        optimizer_given_another_state,
        GradientMismatchError,
        r"nothing was updated\.\nNo gradient for:\n  kernel\nA gradient, but no such .*:\n  kernl\nTake them of",
    ),
    "an optax state that grows": (
        optimizer_whose_state_grows,
        "OptimizerError",
        r"to keep its structure of 1 arrays, found 2 after tx\.update\. Nothing was updated; make",
    ),
}

CASES |= API_CASES
