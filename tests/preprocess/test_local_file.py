"""file: URLs name pictures below one directory and nothing else; nothing but regular files is opened."""

import os
import socket
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from mmv1.errors import ImageError
from mmv1.preprocess import local_file
from mmv1.preprocess.local_file import read_file, read_file_url
from mmv1.preprocess.media import ImageLimits
from tests.pictures import make_image

LIMITS = ImageLimits(max_encoded_bytes=1 << 20, max_pixels=1_000_000, max_side=5000)
PICTURE = make_image(40, 30)


@pytest.fixture
def root(tmp_path):
    """The allowed directory, with a picture and a folder in it; a secret lies beside it."""
    root = tmp_path / "media"
    (root / "inner").mkdir(parents=True)
    (root / "picture.jpg").write_bytes(PICTURE)
    (root / "inner" / "picture.jpg").write_bytes(PICTURE)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "secret.jpg").write_bytes(b"secret")
    return root.resolve()


def refusal(url, root, code="image_url_forbidden"):
    with pytest.raises(ImageError) as error:
        read_file_url(url, root, LIMITS)
    assert error.value.code == code, error.value
    assert error.value.param == "messages"
    if root is not None:
        assert str(root) not in error.value.message and "secret" not in error.value.message
    return error.value


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/picture.jpg", "FILE://{root}/picture.jpg", "file://localhost{root}/picture.jpg", "file:{root}/picture.jpg",
        "file://{root}/inner/picture.jpg", "file://{root}/inner/../picture.jpg", "file://{root}/./inner//picture.jpg",
        "file://{root}/%70icture.jpg", "file://{root}/inner/%2e%2e/picture.jpg", "file://{root}/../media/picture.jpg",
    ],
)  # fmt: skip
def test_files_below_the_directory(url, root):
    assert read_file_url(url.format(root=root), root, LIMITS) == PICTURE


@pytest.mark.parametrize("name", ["two words.jpg", "größe.jpg", "100%.jpg", "a?b#c.jpg", "back\\slash.jpg", "%2e%2e"])
def test_every_name_can_be_said(name, root):
    (root / name).write_bytes(PICTURE)
    assert read_file_url(f"file://{quote(str(root / name))}", root, LIMITS) == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file:///etc/hostname", "file:///", "file://{root}", "file://{root}/", "file://{root}/.", "file:///dev/zero",
        "file:///proc/self/environ", "file://{root}/../secret.jpg", "file://{root}/../media-too/secret.jpg", "file://{root}-too/secret.jpg",
        "file://{root}/%2e%2e/secret.jpg", "file://{root}/%2E%2E%2Fsecret.jpg", "file://{root}/inner/../../secret.jpg",
        "file://{root}/inner/%2e%2e/%2e%2e/secret.jpg", "file://{root}/..%2fsecret.jpg",
        "file://{root}/picture.jpg?x", "file://{root}/picture.jpg#x", "file://{root}/picture.jpg%00", "file://{root}/%ff.jpg",
        "file://{root}/picture.jpg\n", "file://example.com{root}/picture.jpg", "file://user@localhost{root}/picture.jpg",
        "file://localhost:80{root}/picture.jpg", "file://127.0.0.1{root}/picture.jpg", "file://[::1", "file:picture.jpg",
        "file:../secret.jpg", "file:", "file://", "file:\\\\{root}\\picture.jpg", "file://~/picture.jpg", "file://$HOME/x",
    ],
)  # fmt: skip
def test_everything_else_is_refused(url, root, monkeypatch):
    monkeypatch.chdir(root)
    refusal(url.format(root=root), root)


def test_without_a_directory_there_are_none(root):
    """Not even a word about whether it exists."""
    messages = {refusal(f"file://{root}/{name}", None).message for name in ("picture.jpg", "nothing.jpg")}
    assert len(messages) == 1


def test_what_lies_outside_is_not_told_from_what_does_not_exist(root):
    assert refusal("file:///etc/passwd", root).message == refusal("file:///etc/no-such-file", root).message


@pytest.mark.parametrize(
    "name", ["nothing.jpg", "inner", "nothing/picture.jpg", "picture.jpg/picture.jpg", "x" * 300, "%2e%2e.jpg"]
)
def test_what_is_not_there(name, root):
    refusal(f"file://{root}/{name}", root, "image_fetch_failed")


def test_links_are_followed_first_then_judged(root):
    (root / "in.jpg").symlink_to(root / "inner" / "picture.jpg")
    (root / "relative.jpg").symlink_to("inner/../picture.jpg")
    (root / "folder").symlink_to(root / "inner")
    for name in ("in.jpg", "relative.jpg", "folder/picture.jpg"):
        assert read_file_url(f"file://{root}/{name}", root, LIMITS) == PICTURE
    (root / "out.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "out").symlink_to(root.parent)
    (root / "passwd").symlink_to("/etc/passwd")
    (root / "twice").symlink_to("out.jpg")
    for name in ("out.jpg", "out/secret.jpg", "passwd", "twice", "folder/../out/secret.jpg"):
        refusal(f"file://{root}/{name}", root)
    (root / "loop").symlink_to("loop")
    refusal(f"file://{root}/loop", root, "image_fetch_failed")
    (root / "dangling").symlink_to(root / "nothing.jpg")
    refusal(f"file://{root}/dangling", root, "image_fetch_failed")


@pytest.mark.parametrize("target", ["secret.jpg", "."])
def test_a_link_that_appears_after_the_check_leads_nowhere(root, monkeypatch, target):
    """The file, or the folder it lies in, is exchanged for a link between the check of its path and its opening."""
    name = "picture.jpg" if target == "secret.jpg" else "inner/secret.jpg"
    honest = os.path.realpath

    def then_exchanged(path, **options):
        real = honest(path, **options)
        if target == "secret.jpg":
            (root / name).unlink()
            (root / name).symlink_to(root.parent / target)
        else:
            (root / "inner").rename(root.parent / "gone")
            (root / "inner").symlink_to(root.parent)
        return real

    monkeypatch.setattr(local_file.os.path, "realpath", then_exchanged)
    refusal_code = "image_fetch_failed"
    with pytest.raises(ImageError) as error:
        read_file_url(f"file://{root}/{name}", root, LIMITS)
    assert error.value.code == refusal_code
    assert (root / name).read_bytes() == b"secret"  # where it would have led


def test_no_pipe_no_socket_no_device(root):
    """And no waiting for a pipe's other end."""
    os.mkfifo(root / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(root, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{folder}/socket")  # the path itself may be too long for a socket's name
    names = ["pipe", "socket", "inner"]
    if os.geteuid() == 0:
        try:
            os.mknod(root / "zero", 0o600 | 0o020000, os.makedev(1, 5))
            names.append("zero")
        except OSError:  # not even root may here
            pass
    results = []

    def read_all():
        results.extend(refusal(f"file://{root}/{name}", root, "image_fetch_failed") for name in names)
        for path in (*(root / name for name in names), Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(ImageError):
                read_file(path, LIMITS)
            results.append(path)

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(10)
    listener.close()
    os.close(folder)
    assert len(results) == 2 * len(names) + 2


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_file_that_is_exchanged_at_the_last_moment(root, monkeypatch, kind):
    """Between the look at what it is and its opening: the pipe is not waited for, the link not followed."""
    honest = os.stat

    def then_exchanged(path, **options):
        status = honest(path, **options)
        if path == "picture.jpg":
            (root / "picture.jpg").unlink()
            if kind == "pipe":
                os.mkfifo(root / "picture.jpg")
            else:
                (root / "picture.jpg").symlink_to(root.parent / "secret.jpg")
        return status

    monkeypatch.setattr(local_file.os, "stat", then_exchanged)
    before = len(os.listdir("/proc/self/fd"))
    refusal(f"file://{root}/picture.jpg", root, "image_fetch_failed")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_size_is_limited_while_reading(root, monkeypatch):
    (root / "large.jpg").write_bytes(bytes((1 << 20) + 1))
    refusal(f"file://{root}/large.jpg", root, "image_too_large")
    (root / "edge.jpg").write_bytes(bytes(1 << 20))
    assert len(read_file_url(f"file://{root}/edge.jpg", root, LIMITS)) == 1 << 20
    honest = os.fstat

    def smaller(descriptor):
        status = list(honest(descriptor))
        status[6] = 10  # st_size: it has grown since
        return os.stat_result(status)

    monkeypatch.setattr(local_file.os, "fstat", smaller)
    refusal(f"file://{root}/large.jpg", root, "image_too_large")


def test_no_descriptor_stays_open(root):
    before = len(os.listdir("/proc/self/fd"))
    for name in ("picture.jpg", "inner/picture.jpg"):
        read_file_url(f"file://{root}/{name}", root, LIMITS)
    for name in ("nothing", "inner", "inner/nothing", "picture.jpg/x"):
        refusal(f"file://{root}/{name}", root, "image_fetch_failed")
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_of_the_program_itself(root, monkeypatch):
    """Offline: any regular file, by any path; what cannot be read is named without its folder."""
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    assert read_file(root / "link.jpg", LIMITS) == b"secret"
    monkeypatch.chdir(root)
    assert read_file(Path("inner/../picture.jpg"), LIMITS) == PICTURE
    for path in (root / "nothing.jpg", root / "nothing.jpg" / "nothing.jpg"):
        with pytest.raises(ImageError, match=r"nothing\.jpg' cannot be read \(No such file or directory\)") as error:
            read_file(path, LIMITS)
        assert str(root) not in error.value.message
    (root / "large.jpg").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ImageError, match="MiB"):
        read_file(root / "large.jpg", LIMITS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(root):
    (root / "picture.jpg").chmod(0)
    refusal(f"file://{root}/picture.jpg", root, "image_fetch_failed")
