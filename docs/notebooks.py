"""The notebooks of the examples, made from their sources: `python -m docs.notebooks`.

Law: a notebook has nothing that its example has not; the same source makes the same file.
"""

from pathlib import Path

import jupytext

EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    """Write all of them."""
    for source in sorted(EXAMPLES.glob("*.py")):
        notebook = jupytext.read(source, fmt="py:percent")
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        for i, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{i}"  # else drawn anew each time
            cell["metadata"] = {}
        jupytext.write(notebook, EXAMPLES / "notebooks" / f"{source.stem}.ipynb", fmt="ipynb")


if __name__ == "__main__":
    main()
