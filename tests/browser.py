"""A headless Chromium that a test clicks and types in, by the DevTools protocol over a pipe: JSON messages, each with a zero byte
at its end."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BINARY = shutil.which("chromium")
MISSING = "chromium is not installed (Debian: apt-get install chromium); the tests of the page need the real one"
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Space": (32, " ")}
TIMEOUT_S = 30.0


class Browser:
    """One tab. `problems`: what went wrong in it: exceptions of the page, and what its Content-Security-Policy forbade."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._replies, self._write_fd = os.fdopen(read_fd, "rb"), write_fd
        self._rest = b""
        self._last_id = 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol. Its events are read on the way."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._next_message())
            if reply.get("id") == self._last_id:
                assert "error" not in reply, (method, reply["error"])
                return dict(reply["result"])
            self._note(reply)

    def _next_message(self) -> bytes:
        while b"\0" not in self._rest:
            piece = os.read(self._replies.fileno(), 1 << 16)
            assert piece, "Chromium is gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return message

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] == "Runtime.exceptionThrown":
            self.problems.append(event["params"]["exceptionDetails"]["exception"].get("description", "an exception"))
        elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["source"] == "security":
            self.problems.append(event["params"]["entry"]["text"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, awaited."""
        options = {"returnByValue": True, "awaitPromise": True, "allowUnsafeEvalBlockedByCSP": False}
        result = self.command("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = TIMEOUT_S) -> Any:
        """The value of `expression` as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, (expression, self.evaluate("document.body.innerText"), self.problems)
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.innerText).join('\\n')"))

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what is seen of it."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{node}.scrollIntoView({{block: 'nearest'}})")
        x, y = self.evaluate(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({node}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        named = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.command("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        self.command("Input.dispatchKeyEvent", type="keyUp", **named)

    def choose_files(self, selector: str, *paths: Path) -> None:
        node = self.command("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.command("DOM.setFileInputFiles", objectId=node["objectId"], files=[str(path) for path in paths])

    def drop_files(self, *paths: Path) -> None:
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.command("Input.dispatchDragEvent", type=kind, x=100, y=100, data=data)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.command("Emulation.setDeviceMetricsOverride", **size, mobile=width < 500)

    def prefer(self, color_scheme: str) -> None:
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": color_scheme}])

    def nodes(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader meets."""
        tree = self.command("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in tree if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in shown]

    def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._session = None
        with contextlib.suppress(OSError, AssertionError):
            self.command("Browser.close")
        self._replies.close()
        os.close(self._write_fd)


def _above_9(fd: int) -> int:
    """The same file at a number out of the way of 3 and 4, which the pipe has in Chromium; inherited by it."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD, 10)
    os.close(fd)
    return moved


@contextlib.contextmanager
def running_browser(directory: Path) -> Iterator[Browser]:
    """A Chromium of its own, with its profile in `directory`; gone at the end."""
    if BINARY is None:
        pytest.fail(MISSING)
    commands, ours_to_write = os.pipe()
    ours_to_read, replies = os.pipe()
    commands, replies = _above_9(commands), _above_9(replies)
    flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={directory}", "--no-first-run",
             "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
             "--lang=en-US"]  # fmt: skip
    if os.geteuid() == 0:  # it refuses to run with its sandbox then
        flags.append("--no-sandbox")
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{replies}', BINARY, *flags],
        pass_fds=(commands, replies),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(directory)},
    )
    os.close(commands)
    os.close(replies)
    try:
        browser = Browser(ours_to_read, ours_to_write)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
