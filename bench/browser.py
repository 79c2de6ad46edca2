"""Chromium without a window, driven by its DevTools protocol over a pair of pipes: for tests and pictures of pages."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no Chromium on this machine: apt-get install chromium"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
WAIT_S = 30.0
POLL_S = 0.05


class Browser:
    """One tab of a Chromium that runs. Made by `browser()`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._count = b"", 0
        self._session: str | None = None
        (page,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def open(self, url: str, width: int, until: str, *, dark: bool = False) -> None:
        """Open a page in a window of this width and wait until a text is visible."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait(until)

    def wait(self, until: str) -> str:
        """Wait until a text is visible, and return all text of the page. Raises AssertionError after `WAIT_S`."""
        deadline = time.monotonic() + WAIT_S
        while until not in (text := str(self.value("document.body?.innerText || ''"))):
            if time.monotonic() > deadline:
                raise AssertionError(f"{until!r} is not on the page: {text}")
            time.sleep(POLL_S)
        return text

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON. A promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer)
        return answer["result"].get("value")

    def picture(self, to: Path, height: int | None = None) -> None:
        """Write the page as a PNG file: all of it, or its first `height` pixels."""
        height = height or self.value("document.documentElement.scrollHeight")
        width = self.value("window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command of the protocol and return its result."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise AssertionError(answer)
                return answer["result"]

    def _next(self) -> bytes:
        while b"\0" not in self._buffer:
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise AssertionError("Chromium has ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a Chromium with its data in `profile`, and end it at the end of the block."""
    if CHROMIUM is None:
        raise RuntimeError(MISSING)
    theirs, commands = os.pipe()
    answers, ours = os.pipe()
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    script = f'exec "$@" 3<&{theirs} 4>&{ours}'
    flags = ("--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", *FLAGS, "about:blank")
    command = ["bash", "-c", script, "bash", CHROMIUM, *flags]
    with subprocess.Popen(command, pass_fds=(theirs, ours), stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        os.close(ours)
        try:
            yield Browser(commands, answers)
        finally:
            process.terminate()
            os.close(commands)
            os.close(answers)
