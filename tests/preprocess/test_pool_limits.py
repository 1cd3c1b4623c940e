"""What a pool process may take: memory, files, the network, the log."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mmv1.preprocess.pool as pool_module
from mmv1.errors import ImageError
from tests.pictures import make_image, make_pil
from tests.preprocess.processes import private_bytes, wait_until
from tests.preprocess.test_pool import Harness, make_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")

MAX_PRIVATE_BYTES = 150 << 20


@pytest.fixture(scope="module")
def harness():
    harness = Harness(num_workers=1)
    harness.run(harness.pool.wait_ready())
    yield harness
    assert not harness.pool.num_deaths and not harness.failures
    harness.close()


def work(harness, encoded):
    return harness.run(harness.submit(make_job(1, encoded), encoded))


def picture(size, format, mode="RGB", **options):
    """A large picture without details, quickly made."""
    buffer = io.BytesIO()
    make_pil(100, 100).convert(mode).resize(size, Image.Resampling.BILINEAR).save(buffer, format, **options)
    return buffer.getvalue()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


LARGE = {
    "12 megapixels": lambda: picture((4000, 3000), "JPEG"),
    "JPEG": lambda: picture((6000, 6000), "JPEG", quality=30),
    "rotated JPEG": lambda: picture((6000, 6000), "JPEG", quality=30, exif=orientation(6)),
    "progressive CMYK": lambda: picture((6000, 6000), "JPEG", "CMYK", quality=10, progressive=True),
    "PNG with alpha": lambda: picture((6000, 6000), "PNG", "RGBA", compress_level=1),
    "WebP with alpha": lambda: picture((6000, 6000), "WEBP", "RGBA", quality=10, method=0),
    "GIF": lambda: picture((6000, 6000), "GIF", "L"),
    "rotated TIFF": lambda: picture((6000, 6000), "TIFF", "RGBA", compression="tiff_lzw", exif=orientation(6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_memory_of_large_pictures_is_enough_and_comes_back(kind, harness):
    """The largest admissible picture of every kind can be decoded, and what it took comes back. Ordinary ones come before and
    after."""
    [pid], ordinary = harness.workers(), make_image(1024, 1024)
    for encoded in (ordinary, LARGE[kind](), ordinary):
        work(harness, encoded)
        wait_until(lambda: private_bytes(pid) <= MAX_PRIVATE_BYTES, timeout_s=5.0)  # a worker answers first, then lets go
    assert harness.workers() == [pid]


def test_limits_are_in_force(harness):
    [pid] = harness.workers()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    assert limits["Max core file size"] == ["0", "0"] and limits["Max open files"] == ["64", "64"]
    mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) << 12
    soft, hard = limits["Max address space"]
    assert soft == hard and mapped < int(hard) <= mapped + pool_module._WORKER_MEMORY_BYTES
    assert "NoNewPrivs:\t1\n" in Path(f"/proc/{pid}/status").read_text()


def test_a_picture_without_the_memory_it_needs(monkeypatch):
    """Fails with words of its own, whichever decoder was refused, and its worker lives."""
    monkeypatch.setattr(pool_module, "_WORKER_MEMORY_BYTES", 30 << 20)
    large = [
        picture((4000, 3000), "JPEG", progressive=True),
        picture((4000, 3000), "JPEG", "CMYK", progressive=True),
        picture((4000, 3000), "PNG"),
        picture((4000, 3000), "WEBP", method=0),
        picture((4000, 3000), "TIFF", compression="tiff_lzw"),
    ]
    harness = Harness(num_workers=1)
    try:
        harness.run(harness.pool.wait_ready())
        workers = harness.workers()
        for encoded in large:
            with pytest.raises(ImageError, match="memory") as error:
                work(harness, encoded)
            assert error.value.code == "image_too_large"
            work(harness, make_image(200, 200))
        assert harness.workers() == workers and not harness.pool.num_deaths
    finally:
        harness.close()


_RESTRICTED = """
import ctypes, json, os, signal, sys
from mmv1.log import configure_logging, logger
from mmv1.preprocess import pool_process

libc = ctypes.CDLL(None)
network = os.readlink("/proc/self/ns/net")
if sys.argv[1] == "unprivileged" and os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
if (pid := os.fork()) == 0:
    os._exit(bool(libc.unshare(0x40000000) and libc.unshare(0x50000000)))
may = os.waitpid(pid, 0)[1] == 0
configure_logging("test")
signal.set_wakeup_fd(-1)
pool_process._restrict(os.getppid())
logger.warning("a word of ours")
os.write(2, b"a complaint of a C library")
death_signal = ctypes.c_int()
libc.prctl(2, ctypes.byref(death_signal))
print(json.dumps({"may": may, "alone": os.readlink("/proc/self/ns/net") != network, "death_signal": death_signal.value,
                  "stdin": os.readlink("/proc/self/fd/0")}))
"""


@pytest.mark.parametrize("user", ["privileged", "unprivileged"])
def test_a_worker_has_no_network_and_only_its_own_words_are_logged(user):
    """No network where the system lets a process do without, which it also may for an ordinary user."""
    ended = subprocess.run([sys.executable, "-c", _RESTRICTED, user], capture_output=True, text=True, timeout=60, check=True)
    seen = json.loads(ended.stdout)
    assert seen["alone"] == seen["may"] and seen["death_signal"] == 9 and seen["stdin"] == "/dev/null"
    assert "a word of ours" in ended.stderr and "complaint" not in ended.stderr
