"""Zero-shot retrieval: losses compared on data sets, of arrays too, by one protocol."""

from bench.retrieval.images import ArrayImages, DataSet, arrays
from bench.retrieval.metrics import Retrieval, retrieval
from bench.retrieval.protocol import compare

__all__ = ["ArrayImages", "DataSet", "Retrieval", "arrays", "compare", "retrieval"]
