"""flax.nnx is imported in one room, and only when that is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bridge

ROOT = Path(bridge.__file__).parents[1]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_one_room_imports_flax_nnx():
    files = [*ROOT.glob("bridge/**/*.py"), *ROOT.glob("nnx_core/**/*.py")]
    importing = {path.parent for path in files if any(f"{name}.".startswith("flax.nnx.") for name in imported(path))}
    assert importing == {ROOT / "bridge" / "flax_nnx"}


def test_it_is_imported_when_it_is_used():
    code = (
        "import sys, bridge, bridge.checkpoint, bridge.equivalence; assert 'flax.nnx' not in sys.modules;"
        "bridge.flax_nnx.FromFlax; assert 'flax.nnx' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
