"""Triton's interpreter under the numpy of today. Importing this is enough.

Triton 3.6 holds a scalar as an array of one number, and numpy 2.4 makes no index of such an array any more: without this a loop
whose bounds are loaded from memory fails, though only when interpreted.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_index
