"""Makes docs/page.png: the page at / with the small model, asked twice about a picture, as the page's tests ask.

    python -m scripts.page_picture [FILE]
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.api.test_page import MODEL, PICTURES, ROOT, ask, open_page, set_temperature_0
from tests.browser import running_browser
from tests.integration.server import serving


def make(path: Path) -> None:
    """A PNG of 256 colours."""
    with tempfile.TemporaryDirectory() as folder:
        profile, logs = Path(folder, "profile"), Path(folder, "logs")
        logs.mkdir()
        options = ("--served-model-name", MODEL)
        with running_browser(profile) as browser, serving(ROOT / "demo_model" / MODEL, logs, *options) as server:
            browser.resize(800, 720)
            browser.prefer("light")
            open_page(browser, server.url)
            set_temperature_0(browser)
            browser.choose_files("#files", PICTURES / "shapes.jpg")
            browser.wait_for("document.querySelector('#pictures span')?.innerText")  # what the picture costs
            ask(browser, "Describe this image.")
            ask(browser, "What color is the star?")
            picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "page.png")
