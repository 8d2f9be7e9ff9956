"""Lets torchvision's CUDA wheel be imported beside a CPU build of torch.

Its import registers shape functions for two operators of the C++ extension, which such a torch cannot load. It is
enough that their schemas exist; nothing here calls them.
"""

import sys
from importlib.abc import MetaPathFinder

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareSchemas(MetaPathFinder):
    """Finds nothing; declares the schemas the moment torchvision is looked for."""

    library = None  # the declarations live as long as this object

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                self.library.define(schema)


sys.meta_path.insert(0, _DeclareSchemas())
