"""Benchmarks beside the peers; not shipped."""
