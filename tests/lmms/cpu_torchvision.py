"""Test environments only: lets ``import torchvision`` work beside a CPU build of torch.

The torchvision of PyPI is linked to CUDA. Beside a CPU torch its compiled operators are not loaded, and its import
fails because their schemas are missing. Two empty schemas are enough for its Python part (resize, normalize); ``nms``
itself stays unusable. `make test-lmms` and `make test-video` copy this file into the site-packages of their
environments, with a .pth line that imports it.
"""

import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Defines the schemas just before torchvision is imported for the first time."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                Finder.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    Finder.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, Finder())
