"""What an operator says of the embedding model, checked as far as it can be without loading it. Nothing heavy is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mmv1.errors import ConfigError

DEFAULT_CACHE_BYTES = 256 << 20
DEFAULT_CLIP_MODEL = "ViT-B-32:laion2b_s34b_b79k"
FLAG = "--embedding-model"


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """`model`: NAME:WEIGHTS, see ClipModel. `served_name`: in the API; None: NAME. `cache_bytes`: of embeddings of pictures.
    Raises ConfigError."""

    model: str
    served_name: str | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES

    def __post_init__(self) -> None:
        check_clip_model(self.model, FLAG)
        if self.cache_bytes < 0:
            raise ConfigError(f"--embedding-cache-bytes {self.cache_bytes} must be at least 0")

    @property
    def name(self) -> str:
        """Of a file with an architecture the file's, without its ending."""
        name = self.model.partition(":")[0]
        return self.served_name or (Path(name).stem if name.endswith(".json") else name)


def check_clip_model(model: str, flag: str) -> None:
    """`flag`: the setting that names it. Raises ConfigError for a name without weights, and without open_clip."""
    if importlib.util.find_spec("open_clip") is None:
        raise ConfigError(f"{flag} needs open_clip: install it with `pip install 'mmv1[clip]'`")
    if not all(model.partition(":")):
        raise ConfigError(f"{flag} {model} must have the form NAME:WEIGHTS, such as {DEFAULT_CLIP_MODEL}")
