"""How `LLM` reads what scripts write: conversations and raw prompts, with what is said of their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmv1.engine.llm import _conversation, _raw_prompt
from mmv1.errors import RequestError

PICTURE = Image.new("RGB", (30, 20))


def parts_of(*parts: dict[str, Any]) -> list[Any]:
    (_, message) = _conversation([{"role": "system", "content": "x"}, {"role": "user", "content": list(parts)}])
    return list(message.content)


@pytest.mark.parametrize("said", [{}, {"detail": "low"}, {"min_pixels": 5, "max_pixels": 9}, {"detail": None, "text": None}])
@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_settings_stand_beside_the_picture(kind: str, said: dict[str, Any]) -> None:
    part = {"type": "image", "image": PICTURE, **said}
    if kind == "image_url":
        part = {"type": "image_url", "image_url": {"url": "data:,x", **said}}
    (_, picture) = parts_of({"type": "text", "text": "x"}, part)
    assert picture.source == (PICTURE if kind == "image" else "data:,x")
    settings = picture.settings
    assert [getattr(settings, name) for name in ("detail", "min_pixels", "max_pixels")] == [
        said.get(name) for name in ("detail", "min_pixels", "max_pixels")
    ]
    assert settings.max_param == "messages[1].content[1]" + (".max_pixels" if kind == "image" else ".image_url.max_pixels")


def test_sources() -> None:
    parts = [{"type": "image", "image": source} for source in ("a.jpg", Path("a.jpg"), b"x", "https://a.org/x")]
    parts.append({"type": "image_url", "image_url": "https://a.org/x"})
    assert [part.source for part in parts_of(*parts)] == [Path("a.jpg")] * 2 + [b"x"] + ["https://a.org/x"] * 2


@pytest.mark.parametrize("said", [{"max_pixel": 5}, {"detail": "tiny"}, {"max_pixels": "5"}, {"resized_width": 28}])
def test_a_misspelt_setting_is_never_ignored(said: dict[str, Any]) -> None:
    for part in ({"type": "image", "image": PICTURE, **said}, {"type": "image_url", "image_url": {"url": "data:,x", **said}}):
        with pytest.raises(RequestError, match=next(iter(said))):
            parts_of(part)


def test_raw_prompts_have_processor_settings() -> None:
    kwargs = {"mm_processor_kwargs": {"max_pixels": 9}}
    prompt, settings = _raw_prompt({"prompt": "x", "multi_modal_data": {"image": PICTURE}, **kwargs})
    assert (prompt.images, settings.max_pixels) == ([PICTURE], 9)
    assert _raw_prompt("x")[1] == _raw_prompt({"prompt_token_ids": [1]})[1]
    with pytest.raises(RequestError, match="fps"):
        _raw_prompt({"prompt": "x", "mm_processor_kwargs": {"fps": 2}})
