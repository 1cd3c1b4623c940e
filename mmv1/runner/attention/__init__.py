"""Attention backends behind one contract (backend.py)."""

from __future__ import annotations

import os

import torch

from mmv1.errors import ConfigError
from mmv1.runner.attention import flash
from mmv1.runner.attention.backend import AttentionBackend

BACKENDS = ("flash", "sdpa", "triton")
_FLASH_CAPABILITIES = (9, 0), (12, 0)  # from Hopper on, below the Blackwell of workstations, where it has no paged cache


def installed_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those that can attend in `dtype` on `device` with the packages that are there, the best first. TRITON_INTERPRET=1, for
    tests, lets a CPU run Triton's kernels."""
    if device.type != "cuda":
        return ["sdpa", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["sdpa"]
    is_half = dtype in (torch.bfloat16, torch.float16)
    first, beyond = _FLASH_CAPABILITIES
    has_flash = is_half and first <= torch.cuda.get_device_capability(device) < beyond and flash.is_installed()
    return ["flash", "triton", "sdpa"] if has_flash else ["triton", "sdpa"]


def make_backend(name: str | None, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> AttentionBackend:
    """The backend of that name, or the best there is. Raises ConfigError for a name no backend has, and for a backend that cannot
    run on `device`."""
    installed = installed_backends(device, dtype)
    name = name or installed[0]
    if name not in BACKENDS:
        raise ConfigError(f"there is no attention backend '{name}'; there are: {', '.join(BACKENDS)}")
    if name not in installed:
        raise ConfigError(f"the attention backend '{name}' cannot run here; what can: {', '.join(installed)}")
    if name == "sdpa":
        from mmv1.runner.attention.sdpa import SDPABackend

        return SDPABackend()
    if name == "triton":
        from mmv1.runner.attention.triton import TritonBackend

        return TritonBackend()
    return flash.FlashBackend()
