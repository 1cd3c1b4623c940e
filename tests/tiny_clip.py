"""CLIP models of architectures of our own with random weights, as small as open_clip makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def make_clip(folder: Path, name: str = "tiny-clip", **vision: Any) -> str:
    """NAME:WEIGHTS in `folder`. `vision`: what differs in vision_cfg."""
    import open_clip
    import torch

    architecture = {**ARCHITECTURE, "vision_cfg": {**ARCHITECTURE["vision_cfg"], **vision}}
    (folder / f"{name}.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
    return spelled(folder, name)


def spelled(folder: Path, name: str = "tiny-clip") -> str:
    return f"{folder / f'{name}.json'}:{folder / f'{name}.pt'}"
