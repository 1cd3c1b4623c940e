"""Enough of a container engine to carry out docker/Dockerfile and to run what it makes, on a machine without one.

The base image is stood in for by this machine's /usr and /etc, with this Python at /usr/local, under an overlay, and by copies of
what its package manager knows: what is built lies below a directory of the test, and the machine stays as it is. Needs root and
namespaces. The network is the machine's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.docker.dockerfile import ROOT, Stage

BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How this machine reaches a package registry.
_PASSED_ON = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def why_not() -> str | None:
    """Why no container can be had here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    namespaces = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "needs mount and process namespaces" if namespaces.returncode else None


class Image:
    """A root file system below `directory`, on the same file system as uv's cache and the images copied from."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self._overlay = directory / "overlay"
        for name in ("upper", "work"):
            (self._overlay / name).mkdir(parents=True)
        for name in ("usr", "dev", "proc", "tmp", "home", "opt", "root", "var/cache", "var/lib", "var/log"):
            (self.root / name).mkdir(parents=True)
        (self.root / "tmp").chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        for name in ("etc", "var/lib/apt", "var/lib/dpkg"):
            shutil.copytree(f"/{name}", self.root / name, symlinks=True, ignore_dangling_symlinks=True)

    def _mounts(self, *, writable: bool) -> list[str]:
        """Commands that put the machine's parts in their places. `writable`: what is written below /usr stays in the image, and
        nothing else may run there meanwhile."""
        root, overlay = shlex.quote(str(self.root)), shlex.quote(str(self._overlay))
        layers = f"lowerdir={overlay}/upper:/usr"
        if writable:
            layers = f"lowerdir=/usr,upperdir={overlay}/upper,workdir={overlay}/work"
        commands = [
            f"mount --bind {root} {root}",
            f"mount -t overlay overlay -o {layers} {root}/usr",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
        ]
        if sys.base_prefix != "/usr":
            # At its own path too: a Python built with a shared library looks for that there.
            prefix = shlex.quote(sys.base_prefix)
            for place in (f"{root}/usr/local", f"{root}{prefix}"):
                commands += [f"mkdir -p {place}", f"mount --bind {prefix} {place}", f"mount -o remount,bind,ro {place}"]
        return commands

    def command(
        self,
        mounts: Sequence[str],
        inside: Sequence[str],
        env: Mapping[str, str],
        workdir: str,
        become: Sequence[str] = (),
        *,
        writable: bool = True,
    ) -> list[str]:
        """The command line that runs `inside` as process 1 of namespaces of its own, with this environment and no other."""
        words = ["chroot", str(self.root), *become, "env", "--ignore-environment", f"--chdir={workdir}"]
        words += [f"{name}={value}" for name, value in env.items()]
        script = "\n".join(["set -e", *self._mounts(writable=writable), *mounts, f"exec {shlex.join([*words, *inside])}"])
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]

    def _step(self, script: str, env: Mapping[str, str], workdir: str, mounts: Sequence[str] = ()) -> None:
        command = self.command(mounts, ["sh", "-ec", script], env, workdir)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout}"

    def build(self, stage: Stage, *, images: Mapping[str, Image], uv_cache: Path) -> None:
        """Carry out the steps of a stage. A cache mount is `uv_cache`; the context is the repository."""
        reaching = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        env = {**reaching, **stage.env, **stage.args, "HOME": "/root"}
        workdir = "/"
        for instruction, flags, rest in stage.steps:
            if instruction == "WORKDIR":
                workdir = rest
                (self.root / workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "RUN":
                mounts = []
                for flag in flags:  # --mount=type=cache,target=...
                    place = f"{self.root}{flag.partition(',target=')[2]}"
                    mounts += [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(uv_cache))} {place}"]
                self._step(rest, env, workdir, mounts)
            else:
                self._copy(flags, rest.split(), workdir, images)

    def _copy(self, flags: list[str], words: list[str], workdir: str, images: Mapping[str, Image]) -> None:
        """COPY: a directory's contents go into the target, a file goes under its name into a target that ends in a slash."""
        origin = images[flags[0].removeprefix("--from=")].root if flags else ROOT
        *sources, target = words
        place = self.root / os.path.join(workdir, target).lstrip("/")
        for source in (origin / word.lstrip("/") for word in sources):
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                # A stage's files are hard links: copying gigabytes proves nothing.
                link = ["--link"] if flags else []
                subprocess.run(["cp", "--archive", *link, "--no-target-directory", source, place], check=True)
            else:
                shutil.copy(source, place / source.name if target.endswith("/") else place)

    def run_command(self, command: Sequence[str], stage: Stage, env: Mapping[str, str], tmpfs: Sequence[str]) -> list[str]:
        """The command line of a container as docker-compose.yml wants it: the image's user without capabilities or new
        privileges, everything read-only but `tmpfs`."""
        uid, gid = stage.notes["USER"].split(":")
        mounts = [f"mount -o remount,bind,ro {self.root}"]
        mounts += [f"mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs {self.root}{path}" for path in tmpfs]
        become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
        home = {"HOME": stage.workdir}
        environment = {**stage.env, **home, **env}
        return self.command(mounts, command, environment, stage.workdir, [*become, "--no-new-privs"], writable=False)
