"""What tensors hold: the identity of their memory, and its bytes."""

from __future__ import annotations

import torch


def storage_of(tensor: torch.Tensor) -> int:
    """The identity of the storage that ``tensor`` looks at: views share it, fake tensors have one, and
    oneDNN's opaque layout, which has none, counts as one of its own."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes that ``tensor`` holds, oneDNN's opaque layout included."""
    if tensor.is_mkldnn:
        return int(torch.ops.mkldnn._nbytes(tensor))
    return tensor.numel() * tensor.element_size()
