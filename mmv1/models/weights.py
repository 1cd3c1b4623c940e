"""Filling a model's parameters: from safetensors files, tensor by tensor, or with seeded random numbers.

The loader walks the model's modules. A module whose parameters are stored otherwise than it keeps them (several matrices in
one, a folded kernel) says so itself in `checkpoint_pieces`; every other parameter is the tensor of its own name. How a
checkpoint's dialect spells a name is the model's knowledge (`checkpoint_names`). Nothing here knows a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mmv1.config import read_json
from mmv1.errors import ConfigError
from mmv1.log import logger


class Piece(NamedTuple):
    """One tensor of the checkpoint, and where it goes."""

    target: torch.Tensor  # the parameter, or the view of it that this tensor fills
    name: str  # by the module's own path
    shape: tuple[int, ...]  # as stored,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None  # stored to target's shape
    other_shape: tuple[int, ...] | None = None  # or as others store it; `transform` then has to do with both


@runtime_checkable
class _HasPieces(Protocol):
    def checkpoint_pieces(self, path: str) -> Iterator[Piece]: ...


class CheckpointModel(Protocol):
    """A module that can be loaded: it knows the names a checkpoint may use for its parameter `name`, likeliest first."""

    def checkpoint_names(self, name: str) -> tuple[str, ...]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


def parent_path(path: str) -> str:
    return path.rpartition(".")[0]


def _pieces(path: str, module: nn.Module) -> Iterator[Piece]:
    if isinstance(module, _HasPieces):
        yield from module.checkpoint_pieces(path)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield Piece(parameter, f"{path}.{name}", tuple(parameter.shape))


class Checkpoint:
    """The safetensors files of a model directory as one lazy mapping of names. Nothing is read before it is asked for."""

    def __init__(self, model_dir: Path) -> None:
        self._files: dict[str, safe_open] = {}
        for path in _shards(model_dir):
            try:
                handle = safe_open(path, framework="pt", device="cpu")
                self._files |= dict.fromkeys(handle.keys(), handle)
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path.name} in the model directory cannot be read: {error}") from error

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def _shards(model_dir: Path) -> list[Path]:
    weight_map = read_json(model_dir / "model.safetensors.index.json").get("weight_map")
    if isinstance(weight_map, dict):
        names = sorted({str(name) for name in weight_map.values()})
        paths = [model_dir / name for name in names if Path(name).name == name]
        missing = [path.name for path in paths if not path.is_file()]
        if missing or len(paths) < len(names):
            raise ConfigError(f"the model directory lacks weight files that its index names: {missing or names}")
        return paths
    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise ConfigError("the model directory has no .safetensors files (other weight formats are not read)")
    return paths


def load_weights(model: CheckpointModel, model_dir: Path) -> None:
    """Fill every parameter of `model`. Raises ConfigError that names the tensor which is missing or has the wrong shape."""
    checkpoint = Checkpoint(model_dir)
    unused = checkpoint.names()
    filled: set[int] = set()  # a tied parameter is filled once, by the module that comes first
    for path, module in model.named_modules():
        for piece in _pieces(path, module):
            candidates = model.checkpoint_names(piece.name)
            name = next((candidate for candidate in candidates if candidate in unused), None)
            if name is not None:
                unused.discard(name)
            if piece.target.data_ptr() in filled:
                if name is None or _holds(piece, checkpoint, name):
                    continue
                # As transformers does: what is stored counts for more than a flag in config.json.
                logger.warning("'%s' of the checkpoint has values of its own: it is not tied, though config.json says so", name)
                piece = piece._replace(target=_untied(module, piece.target))
            if name is None:
                raise ConfigError(f"the checkpoint has no tensor '{candidates[0]}'")
            _fill(piece, checkpoint, name)
            filled.add(piece.target.data_ptr())
    unused = {name for name in unused if not name.endswith("inv_freq")}
    if unused:
        logger.warning("%d tensors of the checkpoint are not used, such as '%s'", len(unused), min(unused))


def _holds(piece: Piece, checkpoint: Checkpoint, name: str) -> bool:
    """Whether the parameter, filled before, has the very values of this tensor."""
    tensor = checkpoint.tensor(name).to(piece.target)
    return torch.equal(piece.target, tensor if piece.transform is None else piece.transform(tensor))


def _untied(module: nn.Module, shared: torch.Tensor) -> torch.Tensor:
    """Give `module` a parameter of its own in the place of the shared one."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.data_ptr() == shared.data_ptr():
            own = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            setattr(module, name, own)
            return own
    raise ConfigError("the checkpoint stores a tied part of the model with values of its own, which this part cannot have")


@torch.no_grad()
def _fill(piece: Piece, checkpoint: Checkpoint, name: str) -> None:
    shape = checkpoint.shape(name)
    if shape not in (piece.shape, piece.other_shape):
        raise ConfigError(f"tensor '{name}' of the checkpoint has shape {list(shape)} where the model has {list(piece.shape)}")
    tensor = checkpoint.tensor(name)
    piece.target.copy_(tensor if piece.transform is None else piece.transform(tensor))


@torch.no_grad()
def fill_with_dummy_weights(model: nn.Module, seed: int) -> None:
    """Seeded random weights on whatever device the parameters are: matrices keep the scale of what passes through them,
    biases are 0, norms 1."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[-1]), generator=generators[parameter.device])
