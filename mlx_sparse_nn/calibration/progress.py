"""The bar of a long computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, unit: str, shown: bool) -> tqdm:
    """Return a bar of tqdm, which is imported when the first is shown."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not shown)
