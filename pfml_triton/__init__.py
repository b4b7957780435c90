"""Potential Field Metric Learning (Bhatnagar and Ahuja, CVPR 2025) as a fused PyTorch loss."""

from .functional import class_potential, potential_energy
from .module import PFMLLoss
from .potential import Potential

__all__ = ["PFMLLoss", "Potential", "class_potential", "potential_energy"]
__version__ = "0.1.0"
