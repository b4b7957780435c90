"""The Triton kernels: pack a cloud of points, and let the forces act on it."""
