"""Makes the files beside it from their sources; run once, its output is kept in the repository.

    python demo_model/assets/make_assets.py      # needs scikit-learn, fonttools and the DejaVu fonts (Debian: fonts-dejavu-core)
"""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
FACES = {"sans-bold": "DejaVuSans-Bold", "serif": "DejaVuSerif", "mono-bold": "DejaVuSansMono-Bold",
         "sans-oblique": "DejaVuSans-BoldOblique"}


def make_fonts() -> None:
    """The capital letters and the digits of four faces, a few kB each."""
    from fontTools import subset

    options = subset.Options(hinting=False, layout_features=["kern"], name_IDs=[0, 1, 2, 13, 14], drop_tables=["FFTM"])
    for name, source in FACES.items():
        font = subset.load_font(str(DEJAVU / f"{source}.ttf"), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(text=string.ascii_uppercase + string.digits + " ")
        subsetter.subset(font)
        subset.save_font(font, str(HERE / "fonts" / f"{name}.ttf"), options)


def make_digits() -> None:
    """1,797 scanned digits: `pictures` uint8 [1797, 8, 8] of 0 (paper) to 16 (ink), `labels` uint8 [1797]."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    np.savez_compressed(HERE / "digits.npz", pictures=bundle.images.astype(np.uint8), labels=bundle.target.astype(np.uint8))


if __name__ == "__main__":
    (HERE / "fonts").mkdir(exist_ok=True)
    make_fonts()
    make_digits()
