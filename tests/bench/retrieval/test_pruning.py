import torch

from bench.retrieval.pruning import active_shares
from pfml_triton import PFMLLoss


def test_the_sketch_that_follows_embeddings_prunes_more() -> None:
    """Embeddings in few directions, half a unit apart: 60 random directions cannot tell them."""
    embeddings = 0.125 * torch.randn(300, 8) @ torch.randn(8, 512) + torch.randn(512)
    labels = torch.arange(300)
    loss = PFMLLoss(300, 512, 2)
    loss(embeddings, labels)
    shares = active_shares(loss, embeddings, labels, samples=100)
    assert list(shares) == ["batch", "batch_random", "all", "all_random"]
    assert 0 < shares["batch"] < 0.7 * shares["batch_random"]
    assert shares["all"] <= shares["all_random"] == 1
