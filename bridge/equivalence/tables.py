"""A table of text: what a report shows, for a terminal, an error and a page alike.

Law: nothing is cut within a cell; what rows are left out is said in the note.
Knows text; knows nothing of what it says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
      right: the headings of columns that are numbers.
      bad: the numbers of the rows that show what is wrong, from 0.
      note: what a reader must know besides, such as how many rows are left out.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    bad: frozenset[int] = frozenset()
    note: str = ""

    def __str__(self) -> str:
        """Columns that are aligned by spaces.

        >>> print(Table("sizes", ("name", "size"), (("kernel", "6"), ("b", "12")), right=frozenset({"size"})))
        sizes:
          name    size
          kernel     6
          b         12
        """
        if not self.rows:
            return f"{self.title}: {self.note or 'none'}"
        columns = list(zip(self.headings, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [f"{self.title}:"]
        for row in (self.headings, *self.rows):
            cells = [self._aligned(*cell) for cell in zip(self.headings, row, widths, strict=True)]
            lines.append("  ".join(["", *cells]).rstrip())
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)

    def _aligned(self, heading: str, cell: str, width: int) -> str:
        return cell.rjust(width) if heading in self.right else cell.ljust(width)
