"""Transfers, as far as a CPU can show what they carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmv1.runner.platform import Platform


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays a CUDA device on a CPU")
def test_arrays_of_several_types_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [
        np.array([-1, 1 << 40, 3]), np.array([], dtype=np.int64), np.array([0.5, -2.0, 9.0], dtype=np.float32),
        np.arange(5, dtype=np.int32),
    ]  # fmt: skip
    platform = Platform()
    monkeypatch.setattr(platform, "is_cuda", True)
    monkeypatch.setattr(platform, "staging", lambda *shape, dtype: torch.empty(shape, dtype=dtype))  # nothing is pinned here
    tensors = platform.upload_together(*arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
