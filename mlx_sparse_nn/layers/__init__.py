"""Block-sparse layers: modules whose weight stores only some blocks."""
