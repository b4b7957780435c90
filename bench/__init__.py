"""Benchmarks and studies of the PFML loss: ``python -m bench``. Not part of the package."""
