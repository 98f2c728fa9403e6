"""What a command is told of models: rules, the two modules, the optimizer, a check of the user's.

Law: what is wrong usage is told as that, before a checkpoint is opened; the user's code fails without a traceback.
Knows words and models; what is made of them is the business of `bridge.checkpoint`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bridge.cli.words import load_attribute, parse_input, parse_keyword, users_code

if TYPE_CHECKING:
    from bridge.checkpoint.derivation.derive import Derived
    from bridge.checkpoint.tree.tree import Tree


@dataclass(frozen=True)
class Models:
    """What a rules file and the models say.

    Attributes:
      rules: for the conversion: those of the file first, then what was derived.
      known: the collections that the NNX module tells, for a checkpoint of NNX.
      model: the NNX module.
      derived: from Linen to NNX.
    """

    rules: Any = None
    known: Any = None
    model: Any = None
    derived: Derived | None = None


def read_models(
    to: str,
    rules: Path | None,
    inverse: bool,
    linen: str,
    nnx: str,
    inputs: list[str],
    keywords: list[str],
    unproven: bool = False,
) -> Models:
    """What the options of the same names say; `to` is 'nnx' or 'linen'."""
    from bridge.checkpoint.rules.apply import read_rules
    from bridge.checkpoint.tree.from_objects import of_object

    if linen and not (nnx and inputs):
        raise typer.BadParameter("--linen needs --nnx and at least one --input: rules are derived from both models")
    if (inputs or keywords) and not linen:
        raise typer.BadParameter("--input and --keyword are for --linen and --nnx: both are called with them")
    if unproven and not linen:
        raise typer.BadParameter("--unproven is for rules that are derived, from --linen, --nnx and --input")
    if inverse and rules is None:
        raise typer.BadParameter("--inverse needs --rules: it turns them round")
    written = None if rules is None else read_rules(rules)
    if written is not None and inverse:
        written = written.inverse()
    model = nnx_module(nnx, abstract=True) if nnx else None
    known = of_object(model).known if to == "linen" and model is not None else None
    if not linen:
        return Models(written, known, model)
    call = [parse_input(text) for text in inputs], dict(map(parse_keyword, keywords))
    derived = derived_rules(linen_module(linen), model, *call, unproven=unproven)
    direction = derived if to == "nnx" else derived.inverse()
    return Models(direction if written is None else written.then(direction.rules()), known, model, derived)


def write_rules(derived: Derived | None, file: Path) -> None:
    """The file that `--save-rules` names."""
    if derived is None:
        raise typer.BadParameter("--save-rules needs --linen, --nnx and --input: there are no derived rules without")
    if file.exists():
        raise typer.BadParameter(f"--save-rules: there is something at {file}, and nothing is ever written over")
    text = derived.to_toml()
    try:
        file.write_text(text)
    except OSError as error:
        raise typer.BadParameter(f"--save-rules: {error}") from None


def derived_rules(
    linen: Any,
    nnx: Any,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any],
    *,
    method: Any = "__call__",
    rename: Mapping[tuple[str, ...], tuple[str, ...]] | None = None,
    unproven: bool = False,
) -> Derived:
    """What `derive` makes of both modules; `unproven` rules are marked as such, which takes the place of a warning."""
    from bridge.checkpoint.derivation.derive import UnsureDerivationWarning, derive

    with users_code("the models cannot be called with these inputs"), warnings.catch_warnings():
        if unproven:
            warnings.simplefilter("ignore", UnsureDerivationWarning)
        return derive(linen, nnx, *inputs, method=method, rename=rename, unproven=unproven, **keywords)


def linen_module(reference: str) -> Any:
    """The Linen module that a reference names, or that what it names makes of nothing."""
    from flax import linen as nn

    module = load_attribute(reference)
    if callable(module) and not isinstance(module, nn.Module):
        with users_code(f"{reference!r} is no Linen module and cannot be called without arguments"):
            module = module()
    if not isinstance(module, nn.Module):
        raise typer.BadParameter(f"{reference!r} is no Linen module, and no function that makes one")
    return module


def nnx_module(reference: str, *, abstract: bool) -> Any:
    """The NNX module that a reference names, or that a class or a function (of `rngs`, or nothing) makes.

    One of flax.nnx too, which is wrapped.
    """
    import nnx_core
    from bridge.nnx_in_linen.host import adopted

    found = load_attribute(reference)
    found = adopted(found)
    if callable(found) and not isinstance(found, nnx_core.Module):
        how = ", abstractly," if abstract else ""
        with users_code(f"{reference!r} cannot be made{how} from `rngs` or from nothing"):
            found = nnx_core.eval_shape(lambda: made_of_rngs(found)) if abstract else made_of_rngs(found)
    if not isinstance(found, nnx_core.Module):
        raise typer.BadParameter(f"{reference!r} is no NNX module, and no class or function (of rngs) that makes one")
    return found


def made_of_rngs(make: Callable[..., Any]) -> Any:
    """What a class or a function makes, which takes `rngs` or nothing."""
    import nnx_core
    from bridge.nnx_in_linen.host import made_by
    from bridge.nnx_in_linen.structure import has_parameter

    takes_rngs = has_parameter(make, "rngs")
    return made_by(make, (), {}, nnx_core.Rngs(0) if takes_rngs else None)


def target_of(model: Any, tx: Any, rng: str | int, source: Tree) -> Any:
    """What the result must fit: the model, and with `--tx` its optimizer. None where only `--tx` could tell.

    Random streams are part of it if `--rng` says where they come from: a Linen checkpoint has none.
    """
    import nnx_core
    from bridge.checkpoint.tree.layout import Kind

    tops = {path[0] for path in [*source.leaves, *source.empty] if path}
    trains = source.layout.kind is Kind.NNX_TRAINING or bool(tops & {"opt_state", "step"})
    if trains and tx is None:
        return None
    state = nnx_core.state(model, nnx_core.Not(nnx_core.RngState) if rng == "drop" else ...)
    if not trains:
        return state
    with users_code("--tx does not take the params of --nnx; labels and masks that are trees have NNX's names here"):
        optimizer = nnx_core.eval_shape(lambda model: nnx_core.Optimizer(model, tx, wrt=nnx_core.Param), model)
    return {"model": state, "optimizer": nnx_core.state(optimizer)}


def check_of(reference: str) -> Any:
    """What `--verify-forward` names: a function of two paths. Whatever it raises is a check that failed."""
    if not reference:
        return None
    found = load_attribute(reference)
    if not callable(found):
        raise typer.BadParameter(f"{reference!r} is no function of two paths, SRC and DST")

    def check(source: Path, target: Path) -> object:
        try:
            return found(source, target)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    check.__qualname__ = reference
    return check


def transformation(reference: str) -> Any:
    """What `--tx` names: an optax transformation, or a function without arguments that makes one."""
    if not reference:
        return None
    found = load_attribute(reference)
    if callable(found):
        with users_code(f"{reference!r} cannot be called without arguments"):
            found = found()
    if not (hasattr(found, "init") and hasattr(found, "update")):
        raise typer.BadParameter(f"{reference!r} is no optax transformation: it has no init and update")
    return found
