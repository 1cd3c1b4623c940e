"""A step behind a batch of pictures begins on the device when that has ended there, however long it takes."""

from __future__ import annotations

import torch

from mmv1.runner.platform import Platform

_CYCLES = 200_000_000  # a tenth of a second


def test_a_stream_waits_for_what_was_marked_on_another() -> None:
    platform = Platform()
    assert platform.launches_ahead
    value = torch.zeros(1, device=platform.device)
    with platform.on_encoder_stream():
        torch.cuda._sleep(_CYCLES)
        value.fill_(7.0)
        end = platform.mark()
    assert not end.query()
    with platform.on_step_stream():
        early = value.clone()
        platform.wait_for(end)
        late = value.clone()
        assert not end.query()  # the host has waited for nothing
    platform.synchronize()
    assert (early.item(), late.item()) == (0.0, 7.0)
