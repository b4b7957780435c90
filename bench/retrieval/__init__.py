"""Zero-shot retrieval: losses compared on data sets, of arrays too, by one protocol."""
