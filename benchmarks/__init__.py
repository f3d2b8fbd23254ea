"""Scripts run by hand from the folder above: python -m benchmarks.train, decode, quality, ..."""
