"""How lines are drawn, in every plot of the benchmarks."""

from typing import Any

# Colours of Okabe and Ito, which differ to every eye; markers tell lines apart in print.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "marker": "o"},
    {"color": "#d55e00", "marker": "s"},
    {"color": "#009e73", "marker": "D"},
    {"color": "#cc79a7", "marker": "^"},
    {"color": "#e69f00", "marker": "v"},
    {"color": "#56b4e9", "marker": "P"},
)
