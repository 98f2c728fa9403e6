"""A mistake, the class of its error and the words in it, for each raise of the core that `error_cases` leaves out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

import nnx_core as nnx
from nnx_core import traversals
from nnx_core.graph import functional
from nnx_core.graph import tree as graph_tree
from nnx_core.graph.cells import ArrayCell
from nnx_core.module import KeywordTwiceError, first_from
from nnx_core.rngs import RngRuleError, with_rngs
from tests.strategies import Affine, Node
from tests.support.arrays import ones

X = ones(2, 3)
P = jax.sharding.PartitionSpec
ROOT = Path(nnx.__file__).parent


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def total(m, x):
    return m(x).sum()


def ruled(bwd, fwd=None, **options):
    """A gradient through a custom_vjp with this rule."""

    def f(m, x):
        return m(x).sum()

    g = nnx.custom_vjp(f, **options)
    g.defvjp(fwd or (lambda m, x: (g(m, x), x)), bwd)
    return nnx.grad(g)(Affine(), X)


def pulled(cotangent):
    """What f returned is pulled back with this."""
    _, pull = nnx.vjp(lambda m, x: {"y": m(x), "n": (x, x)}, Affine(), X)
    return pull(cotangent)


def nothing(m, x):
    return x


def grow_in_a_loop():
    def body(m):
        m.extra = 3
        return m

    nnx.while_loop(lambda m: m.calls[...] < 3, body, Affine())


def write_in_a_condition():
    def condition(m):
        m.calls[...] += 1
        return m.calls[...] < 3

    nnx.while_loop(condition, lambda m: m, Affine())


def branches_that_grow():
    def grow(m):
        m.extra = 3

    nnx.cond(True, grow, lambda m: None, Affine())


def fwd_that_returns_more():
    g = nnx.custom_vjp(total)
    g.defvjp(lambda m, x: ((m(x).sum(), x), x), lambda res, g: (None, None))
    g(Affine(), X)
    nnx.grad(lambda m, x: jax.tree.leaves(g(m, x))[0])(Affine(), X)


def partial_that_grows():
    m = Affine()

    def grow(m):
        m.extra = nnx.Cache(X)

    nnx.cached_partial(nnx.jit(grow), m, graph_updates=False)()


def closed_context():
    with nnx.split_context() as context:
        pass
    context.split(Affine())


def merged_by_tag_alone():
    with nnx.update_context("tag"), nnx.merge_context("tag"):
        pass


def filters_without_paths():
    with nnx.split_context() as context:
        context.flatten(Affine(), nnx.Param, with_paths=False)


def refers_to_unknown_objects():
    m, refs = Affine(), functional.Refs()
    functional.flatten(m, ref_index=refs)
    second, leaves = functional.flatten(Node(), ref_index=refs), None
    holder = Node()
    holder.m = m
    second, leaves = functional.flatten(holder, ref_index=refs)
    functional.unflatten(second, leaves)


def unflattened(leaves):
    nnx.unflatten(nnx.graphdef(Affine()), leaves)


def shared():
    m = Node()
    m.a = nnx.Param(X)
    m.b = m.a
    return m


def static_data():
    m = Node()
    m.table = nnx.static(3)
    object.__setattr__(m, "table", X)
    nnx.check_pytree(m)


def group_that_is_not_there():
    from nnx_core.graph.pack import Packer, Place, Refs

    Packer((0,), Refs()).walk([X], Place(("args",), 7, 1))


def contradicting_rules():
    v = nnx.Param(jnp.ones((2, 4)), out_sharding=("a", None), sharding_rules=[("a", "data")])
    with nnx.logical_axis_rules([("a", "model")]):
        nnx.get_partition_spec(v)


def placed_unevenly():
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        nnx.Param(jax.ShapeDtypeStruct((3,), jnp.float32), out_sharding=("data",))


def named(*names):
    return nnx.get_named_sharding(nnx.Param(jnp.ones((4, 4)), out_sharding=names), mesh())


def abstract_without_a_mesh():
    init = nnx.with_partitioning(nnx.initializers.ones, ("data", None))
    nnx.as_abstract(nnx.eval_shape(lambda: nnx.Linear(4, 4, kernel_init=init, rngs=nnx.Rngs(0))))


def replaced_once(_, m):
    m.a = nnx.Param(m.a[...] + 1)
    return m


def taken(method, *args):
    getattr(Affine(), method)(*args)


# name: (what to do, class, text); what to do about it is part of each text.
CASES = {
    "a Variable type of flax.nnx as a filter": (
        lambda: nnx.state(Affine(), flax_nnx.Param),
        "FilterError",
        r"flax\.nnx.*Param is a type of another NNX library",
    ),
    # transforms and their options
    "a Variable of a carry replaced at one of two places": (
        lambda: nnx.fori_loop(0, 2, replaced_once, nnx.Dict(a=(v := nnx.Param(X)), b=v)),
        "StructureError",
        r"replaced_once put something new at one place of its carry, .* stood at 2 places\. Expected it at all of them",
    ),
    "a static argument that holds arrays": (
        lambda: nnx.jit(lambda c: None, static_argnums=0)([X]),
        "SpecError",
        r"^args\[0\], a static argument, is or holds arrays, Variables or modules: found a list\. Expected",
    ),
    "one new Ref at two places": (
        lambda: nnx.jit(lambda x: [jax.new_ref(x)] * 2)(X),
        "StructureError",
        r"^result\[0\] and result\[1\] hold one jax\.Ref that was made inside of the transform\. Expected a Ref at one",
    ),
    "a keyword from two sides of Sequential": (
        lambda: nnx.Sequential(lambda x, y: {"y": x}, lambda y: y)(X, y=X),
        KeywordTwiceError,
        r"(?s)^Sequential\.layers\[1\] gets 'y' twice:.*Leave it out of one of the two",
    ),
    "two rules for one stream": (
        lambda: with_rngs(nnx.Rngs(dropout=0), split={"dropout": 2}, broadcast={"dropout": 2}),
        RngRuleError,
        r"(?s)matches multiple rules of with_rngs:.*Narrow the filters, so that each stream is named once",
    ),
    "none of the flags is given": (
        lambda: first_from(None, None, error_msg="No `deterministic` was given. Pass it."),
        ValueError,
        r"^No `deterministic` was given\. Pass it\.",
    ),
    "a Variable of a carry both written and replaced": (
        lambda: nnx.fori_loop(0, 2, lambda _, v: nnx.Param(v.set_value(v[...] + 1) or v[...]), nnx.Param(X)),
        "StructureError",
        r"wrote to a Variable of its carry and returned another one in its place\. Expected one of the two: write",
    ),
    "the place of an array on an object that is gone": (
        lambda: ArrayCell(Affine(), ("kernel",)).owner,
        ReferenceError,
        r"^the object that held the array at \('kernel',\) is gone",
    ),
    "two functions for a transform": (
        lambda: nnx.jit(abs, abs),
        TypeError,
        r"^jit takes one function by position; its options have names\. Write them out\.",
    ),
    "an option that is needed": (
        lambda: nnx.shard_map(abs),
        TypeError,
        r"^shard_map needs mesh=, in_specs=, out_specs=",
    ),
    "a filter that StateAxes has not": (
        lambda: nnx.StateAxes({nnx.Param: 0})[nnx.Cache],
        KeyError,
        r"StateAxes\(\{.*Param.*: 0\}\) has no axis for the filter .*Cache.*; it has \[.*Param",
    ),
    "a keyword-only argument of grad": (
        lambda: nnx.grad(lambda m, *, x: m(x).sum())(Affine(), x=X),
        TypeError,
        r"lambda.*: \['x'\] are keyword-only, and specs are given by position\. Let it take them by position, or bind",
    ),
    "argnums out of range": (
        lambda: nnx.grad(total, argnums=5)(Affine(), X),
        "SpecError",
        r"^argnums 5 is out of range: total was called with 2 arguments by position\. Expected -2 to 1\.",
    ),
    "no pair in grad": (
        lambda: nnx.grad(total, has_aux=True)(Affine(), X),
        "SpecError",
        r"^total has_aux=True: expected \(loss, aux\), found \w+\. Return a pair, or leave has_aux out\.",
    ),
    "no pair in vjp": (
        lambda: nnx.vjp(total, Affine(), X, has_aux=True),
        "SpecError",
        r"^total has_aux=True: expected \(value, aux\), found \w+\. Return a pair, or leave has_aux out\.",
    ),
    "a loss that is a module": (
        lambda: nnx.grad(lambda m: m)(Affine()),
        "SpecError",
        r"lambda.* must return a scalar loss, found an object of the caller\.\n"
        r"Return one number, or \(loss, aux\) with has_aux=True\.",
    ),
    "a treatment without a hash": (
        lambda: nnx.vmap(nothing, in_axes=({1, 2}, 0))(X, X),
        "SpecError",
        r"^\{1, 2\} cannot say how to treat a leaf: it is not hashable\. Give an axis, a sharding or None",
    ),
    "reduce_axes": (
        lambda: nnx.vjp(total, Affine(), X, reduce_axes=("i",)),
        NotImplementedError,
        r"^vjp: reduce_axes is deprecated in JAX and does nothing; leave it out\.",
    ),
    "jvp without tangents": (
        lambda: nnx.jvp(total, (Affine(), X)),
        TypeError,
        r"^jvp of total: expected tangents beside the primals, found none\. Give one for each primal; None is zero\.",
    ),
    "one tangent too few": (
        lambda: nnx.jvp(total, (Affine(), X), (None,)),
        "SpecError",
        r"^tangents: expected the form of a tuple with 2 items, found 1 items\. Give it the form.*None "
        r"stands for zero\.",
    ),
    "a tangent without a key": (
        lambda: pulled({"y": None}),
        "SpecError",
        r"^cotangent\.n\[0\] is missing\. Give a tangent, or None for zero\.",
    ),
    "a cotangent of another form": (
        lambda: nnx.vjp(lambda v: v, nnx.Variable({"a": X}))[1](nnx.Variable({"b": X})),
        "SpecError",
        r"^cotangent: expected the form PyTreeDef.*'a'.*, found PyTreeDef.*'b'.*\. Give it the form",
    ),
    "a cotangent that is no array": (
        lambda: pulled({"y": "text", "n": None}),
        "SpecError",
        r"^cotangent\.y: expected an array of shape \(2, 3\), found a str\. Give it the form",
    ),
    "a cotangent of another shape": (
        lambda: pulled({"y": X[:1], "n": None}),
        "SpecError",
        r"^cotangent\.y: expected shape \(2, 3\), found \(1, 3\)\. Give it the form",
    ),
    "symbolic zeros": (
        lambda: nnx.custom_vjp(total).defvjp(None, None, symbolic_zeros=True),
        NotImplementedError,
        r"^custom_vjp: symbolic_zeros is not supported; None stands for a zero cotangent\.",
    ),
    "custom_vjp without a rule": (
        lambda: nnx.custom_vjp(total)(Affine(), X),
        AttributeError,
        r"^total has no backward pass yet\. Call total\.defvjp\(fwd, bwd\)\.",
    ),
    "nondiff_argnums out of range": (
        lambda: ruled(lambda res, g: (None, None), nondiff_argnums=(4,)),
        "SpecError",
        r"^nondiff_argnums 4 is out of range: .*f was called with 2 arguments\. Expected 0 to 1\.",
    ),
    "nondiff_argnums of a module": (
        lambda: ruled(lambda res, g: (None, None), nondiff_argnums=(0,)),
        "SpecError",
        r"^args\[0\] of .*f holds a module or Variable, and nondiff.*\nUse nnx\.DiffState\(0, filter\).*\(0, False\)",
    ),
    "a forward rule without residual": (
        lambda: ruled(lambda res, g: (None, None), lambda m, x: m(x).sum()),
        "SpecError",
        r"lambda.* must return \(out, residual\), found \w+\. Return a pair\.",
    ),
    "a forward rule that does something else": (
        fwd_that_returns_more,
        "StructureError",
        r"must do what total does, and return \(out, residual\); the result differs:\n"
        r"  total: returns an array or number,.*\n.*Let it call total itself",
    ),
    "a backward rule that returns too little": (
        lambda: ruled(lambda res, g: (None,)),
        "SpecError",
        r"lambda.* must return a tuple of 2 cotangents, one for each argument of .*f that is differentiated, found 1\.",
    ),
    "branches that leave other structures": (
        branches_that_grow,
        "StructureError",
        r"^cond and switch need branches.*:\n.*changed:  nothing\n"
        r".*grow changed:  the attributes \['extra'\]\nReturn the same",
    ),
    "branches that return something else": (
        lambda: nnx.cond(True, lambda x: x, lambda x: (x, x), X),
        "StructureError",
        r"^cond and switch need branches.*returned:  tuple\(an array or number, an array or number\)\n"
        r".*lambda.* returned:  an array or number\nReturn the same",
    ),
    "a loop that sets attributes": (
        grow_in_a_loop,
        "StructureError",
        r"body set or removed the attributes \['extra'\] of an object in its carry.*\n"
        r"Set them before the loop, or keep",
    ),
    "a condition that writes": (
        write_in_a_condition,
        "StructureError",
        r"^while_loop: .*condition, the condition, must not write anything\. Write in the body\.",
    ),
    "a dynamic loop that is unrolled": (
        lambda: nnx.fori_loop(jnp.int32(0), 3, lambda i, x: x, X, unroll=2),
        ValueError,
        r"^fori_loop can be unrolled only if lower and upper are Python numbers\.",
    ),
    "one spec too few": (
        lambda: nnx.shard_map(nothing, mesh=mesh(), in_specs=(P(),), out_specs=P())(X, X),
        "SpecError",
        r"^in_specs has 1 items, and nothing was called with 2 arguments\. Give one for each, or one for all",
    ),
    "a donated argument that is not there": (
        lambda: nnx.pmap(nothing, donate_argnums=3, devices=jax.devices()[:2])(X, X),
        "SpecError",
        r"^donate_argnums \[3\] is out of range: nothing was called with 2 arguments\. Expected 0 to 1\.",
    ),
    "a prefix that misses a leaf": (
        lambda: nnx.prefix(Affine(), {nnx.Param: 0}),
        "FilterError",
        r"^No filter of \[.*Param.*\] matches calls \(Count\)\. End with `\.\.\.`\.",
    ),
    "a partial call that grows": (
        partial_that_grows,
        "StructureUpdateError",
        r"grow changed the structure.*\n  args\[0\]\.extra\n",
    ),
    "a group that is not there": (
        group_that_is_not_there,
        "SpecError",
        r"^args\[0\]: 7 is none of the treatments \(0,\)\.",
    ),
    # capture, views, modules
    "a name that nnx_core has not": (
        lambda: nnx.nobody,
        AttributeError,
        r"^module 'nnx_core' has no attribute 'nobody'",
    ),
    "capture of something else": (
        lambda: nnx.capture(3, nnx.Intermediate),
        TypeError,
        r"^nnx\.capture needs a module, a method or a function, found int\.",
    ),
    "capture of no kind": (
        lambda: nnx.capture(Affine(), 3),
        TypeError,
        r"^nnx\.capture needs Variable types, such as nnx\.Intermediate; found 3\.",
    ),
    "capture with values for nobody": (
        lambda: nnx.capture(lambda m: m(X), nnx.Perturbation, init={"nobody": {"x": X}})(Affine()),
        "StateMismatchError",
        r"not in the graph:\n  nobody\.x\n",
    ),
    "a view of nobody's keyword": (
        lambda: nnx.view(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), deterministc=True),
        ValueError,
        r"^Unused keys found in nnx\.view: \['deterministc'\]; the modules take \['deterministic'.*\]\.\n"
        r"Check the spelling",
    ),
    "sow where something else is": (
        functools.partial(taken, "sow", nnx.Intermediate, "kernel", 1.0),
        ValueError,
        r"^Expected 'kernel' of Affine to be a Variable of type Intermediate, found Param\. Use another name\.",
    ),
    "perturb where something else is": (
        functools.partial(taken, "perturb", "kernel", X),
        ValueError,
        r"^Expected 'kernel' of Affine to be a Variable of type Perturbation, found Param\. Use another name\.",
    ),
    "a name that kinds has not": (
        lambda: __import__("nnx_core.kinds").kinds.Nobody,
        AttributeError,
        r"^module 'nnx_core\.kinds' has no attribute 'Nobody'",
    ),
    # contexts and the functional form
    "no update context": (
        lambda: nnx.current_update_context("tag"),
        "ContextError",
        r"^No update context found for tag 'tag'\. Open one: `with nnx\.update_context\('tag'\):`\.",
    ),
    "a context that has ended": (
        closed_context,
        "ContextError",
        r"^This SplitContext was used after its `with` had ended\. Open a new one\.",
    ),
    "a merge context without its side": (
        merged_by_tag_alone,
        "ContextError",
        r"^merge_context needs inner=True \(inside the transform\) or inner=False with a tag\.",
    ),
    "filters without paths": (
        filters_without_paths,
        "ContextError",
        r"^Filters need paths: pass with_paths=True, or no filters\.",
    ),
    "unflatten of something else": (
        lambda: nnx.unflatten(3, []),
        TypeError,
        r"^nnx\.unflatten needs a GraphDef first, found int\.",
    ),
    "objects of another structure": (
        refers_to_unknown_objects,
        "IndexSpaceError",
        r"^The GraphDef refers to object \d+ of its index space, of which 0 are known\.\nUnflatten the GraphDefs",
    ),
    "a flat state of other paths": (
        lambda: unflattened(nnx.to_flat_state(nnx.State({"kernel": X, "nobody": X}))),
        "StateMismatchError",
        r"Missing from the state:\n  calls\nIn the state, but not in the graph:\n  nobody\n",
    ),
    "too few leaves": (
        lambda: unflattened([X]),
        "LeafCountError",
        r"^Incorrect number of leaves: expected 2, found 1\.\nPass the list that nnx\.flatten",
    ),
    "call of something else": (
        lambda: nnx.call(Affine()),
        TypeError,
        r"^nnx\.call needs the tuple \(graphdef, state\) that nnx\.split returns, found Affine\.",
    ),
    "a Variable twice": (
        lambda: nnx.with_vars(shared(), ref=True),
        "DuplicateVariableError",
        r"^Found duplicate Variables at paths:\n  ---\n  a\n  b\n  ---\nPass allow_duplicates=True",
    ),
    "check_pytree of something else": (
        lambda: nnx.check_pytree([X]),
        "NotAGraphError",
        r"^Expected a Pytree, got list\.",
    ),
    "data in a static attribute": (
        static_data,
        "StaticDataError",
        r"^Found data in the static attribute table of Node: a ArrayImpl\.\nMark it with nnx\.data",
    ),
    "NodeStates without a structure": (
        lambda: nnx.NodeStates.from_states(nnx.State({})).graphdef,
        ValueError,
        r"^This NodeStates has no GraphDef; it was made from States or prefixes only\.",
    ),
    "NodeStates with two States": (
        lambda: nnx.NodeStates.from_states(nnx.State({}), nnx.State({})).state,
        ValueError,
        r"^This NodeStates has 2 States, expected one; read `\.states`\.",
    ),
    "a tree of something else": (
        lambda: graph_tree.from_tree({"a": X}, is_node_leaf=lambda x: True, is_leaf=lambda x: hasattr(x, "shape")),
        TypeError,
        r"^from_tree expected NodeStates at .*a.*, found ArrayImpl\.",
    ),
    # mappings
    "a list to flatten": (
        lambda: traversals.flatten_mapping([1]),
        TypeError,
        r"^Expected a mapping, found list\.",
    ),
    "a number to join": (
        lambda: traversals.flatten_mapping({"a": {0: 1}}, sep="/"),
        TypeError,
        r"^Cannot join \('a', 0\) by '/': 0 is no string\. Leave `sep` out for tuples\.",
    ),
    "a number to unflatten": (
        lambda: traversals.unflatten_mapping(3),
        TypeError,
        r"^Expected a mapping of paths or \(path, value\) pairs, found int\.",
    ),
    "an empty path": (
        lambda: traversals.unflatten_mapping({(): 1}),
        "StateMismatchError",
        r"not in the graph:\n  <root>\n",
    ),
    # sharding
    "a rule that is no pair": (
        lambda: nnx.logical_axis_rules(["embed"]).__enter__(),
        "MetadataError",
        r"^Logical axis rule 'embed' is not a pair\. Expected \(name, mesh axis\).*such as \('embed', 'model'\)",
    ),
    "rules that contradict": (
        contradicting_rules,
        "MetadataError",
        r"its own sharding_rules send 'a' to 'data', logical_axis_rules send it to 'model'\. Change one of them\.",
    ),
    "more names than axes": (
        lambda: named("data", None, None),
        "MetadataError",
        r"has more names than axes: its shape is \(4, 4\)\. Remove names\.",
    ),
    "an axis that is not divisible": (
        placed_unevenly,
        "MetadataError",
        r"stands for P.*: axis 0 of shape \(3,\) cannot be divided evenly over a mesh of \{'data': 2\}\."
        r" Give that axis None, or another size\.",
    ),
    "a name that is no axis": (
        lambda: named("embed", None),
        "MetadataError",
        r"stands for P.*: no axis 'embed' on a mesh with axes \('data', 'model'\)\.\n"
        r"Say which mesh axis each name means",
    ),
    "an abstract model without a mesh": (
        abstract_without_a_mesh,
        "MetadataError",
        r"kernel.* needs a mesh to be sharded, found none\. Call as_abstract under `with "
        r"jax\.set_mesh\(mesh\):`, or give",
    ),
}
