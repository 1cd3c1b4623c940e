"""BMP and TIFF from the flag to the patches. The other formats' keys do not depend on it."""

import pytest

from mmv1.errors import ImageError
from tests.pictures import make_image
from tests.preprocess.test_decode import our_patches
from tests.preprocess.test_preprocessor import Harness

SECRET = b"sixteen bytes, or more"


def test_from_the_flag_to_the_patches(tiny_model_dir):
    plain = Harness(tiny_model_dir, num_workers=1, cache_secret=SECRET)
    extra = Harness(tiny_model_dir, num_workers=1, cache_secret=SECRET, extra_image_formats=("BMP", "TIFF"))
    try:
        for format in ("BMP", "TIFF"):
            encoded = make_image(150, 90, format=format)
            with pytest.raises(ImageError, match="not a JPEG, PNG, WebP or GIF image") as refusal:
                plain.prepare(encoded)
            assert (refusal.value.status, refusal.value.code) == (400, "unsupported_image_format")
            [feature] = extra.prepare(encoded).mm_features
            extra.request(feature.mm_hash)
            [ready] = extra.answers()
            assert extra.bytes_at(ready) == our_patches(encoded, layout=extra.pre.layout).numpy().tobytes()
        [one], [other] = (each.prepare(make_image(150, 90)).mm_features for each in (plain, extra))
        assert one.mm_hash == other.mm_hash
    finally:
        plain.close()
        extra.close()
