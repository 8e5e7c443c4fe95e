"""Benchmarks, one file per format: the files that each of them reads and writes, and its figures."""
