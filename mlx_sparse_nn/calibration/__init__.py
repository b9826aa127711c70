"""Sparse models that keep what dense ones compute, by what goes through them."""
