"""What the host may rely on when it has waited for the device."""

from __future__ import annotations

import numpy as np
import torch

from mmv1.runner.platform import Platform

_CYCLES = 200_000_000  # a tenth of a second


def test_waiting_for_no_tensors_waits_for_all_that_was_launched() -> None:
    platform = Platform()
    with platform.on_step_stream():
        torch.cuda._sleep(_CYCLES)
        stream = torch.cuda.current_stream()
        copy = platform.copy_to_host([])
    assert not stream.query()
    assert copy.wait() == []
    assert stream.query()


def test_arrays_of_several_types_travel_together() -> None:
    """However long they have to wait, and whatever is uploaded meanwhile."""
    platform = Platform()
    with platform.on_step_stream():
        torch.cuda._sleep(_CYCLES)
        uploads = [(i, platform.upload_together(np.full(5, i << 40), np.full(3, i + 0.5, dtype=np.float32))) for i in range(50)]
        for i, (ints, floats) in uploads:
            assert ints.tolist() == [i << 40] * 5
            assert floats.tolist() == [i + 0.5] * 3
