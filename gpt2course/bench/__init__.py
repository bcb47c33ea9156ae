"""Benchmarks: what the course says about speed and memory, measured on the machine at hand."""
