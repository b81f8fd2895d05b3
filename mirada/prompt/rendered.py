"""A rendered chat as text that still knows which of its control strings the template wrote.

It reads, prints, compares and measures as the plain string that it is. What it remembers besides is the same text with
everything that users typed disarmed (``marks``), so that encoding it is as safe as encoding the chat. Putting text of a
program's own before or after it keeps that memory; every other operation (slices, ``replace``, ``format``, ``join``) gives a
plain ``str``, in which a typed ``<|im_end|>`` can no longer be told from one that the template wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mirada.prompt.marks import Marks


class Rendered(str):
    """``disarmed`` is the text with marks in place of what users typed; ``marks`` puts them back."""

    disarmed: str
    marks: Marks

    def __new__(cls, disarmed: str, marks: Marks) -> Rendered:
        made = super().__new__(cls, marks.show(disarmed))
        made.disarmed, made.marks = disarmed, marks
        return made

    def __getnewargs__(self) -> tuple[str, Marks]:  # type: ignore[override]
        return self.disarmed, self.marks

    def __add__(self, other: str) -> str:
        """Control strings of a plain ``other`` are the program's own and keep their meaning."""
        return self._joined("", other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return self._joined(other, "") if isinstance(other, str) else NotImplemented

    def _joined(self, before: str, after: str) -> str:
        if isinstance(after, Rendered) or self.marks.show(before + after) != before + after:
            return before + str(self) + str(after)  # the marks of one would be characters of the other
        return Rendered(before + self.disarmed + after, self.marks)
