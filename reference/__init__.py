"""The specification: PFML as the paper writes it, naive and float64-safe. Not installed."""
