"""Pauli strings as pairs of masks of bits, with their coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx

String: TypeAlias = tuple[int, int]  # the bits of X or Y, the bits of Z or Y


def string_of(letters: str, sites: Sequence[int]) -> String:
    """Return the string that has these letters, X, Y or Z, on these different sites."""
    masks = {
        axis: sum(1 << site for letter, site in zip(letters, sites, strict=True) if letter == axis)
        for axis in "XYZ"
    }
    return masks["X"] | masks["Y"], masks["Z"] | masks["Y"]


def sites_of(string: String) -> tuple[int, ...]:
    """Return the sites of a string, in ascending order."""
    x, z = string
    return tuple(site for site in range((x | z).bit_length()) if (x | z) >> site & 1)


def letters_of(string: String) -> str:
    """Return the letters of a string, in ascending order of sites."""
    x, z = string
    return "".join("?XZY"[(x >> site & 1) + 2 * (z >> site & 1)] for site in sites_of(string))


def count_y(string: String) -> int:
    """Return how many letters of a string are Y: it is real if they are even."""
    x, z = string
    return (x & z).bit_count()


def merged(
    terms: Sequence[tuple[String, float | mx.array]], dtype: mx.Dtype
) -> tuple[list[String], mx.array]:
    """Return each string once, diagonal ones first, and the sums of their coefficients."""
    sums: dict[String, float | mx.array] = {}
    for string, value in terms:
        sums[string] = sums[string] + value if string in sums else value
    strings = sorted(sums)
    values = [sums[string] for string in strings]
    if not any(isinstance(value, mx.array) for value in values):
        return strings, mx.array(values, dtype=dtype) if values else mx.zeros(0, dtype)
    arrays = [v if isinstance(v, mx.array) else mx.array([v], dtype=dtype) for v in values]
    return strings, mx.concatenate(arrays).astype(dtype)
