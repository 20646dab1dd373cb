"""Pages with a part that a command writes, between the lines ``<!-- name -->`` and ``<!-- /name -->``."""
from __future__ import annotations


def replaced(page: str, name: str, written: str) -> str:
    """``page`` with ``written`` between its marks.

    Raises:
        ValueError: it has not one of each, in order.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"expected the lines {first.strip()} and {last.strip()}")
    return f"{before}{begin}{written}{end}{after}"
