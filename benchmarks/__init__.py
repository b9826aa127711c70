"""Benchmarks: ``python -m benchmarks --help`` measures products beside their peers."""
