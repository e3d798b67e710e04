"""A headless Chromium, driven over its DevTools protocol through a pair of pipes: no port, no driver, no other package."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)
PATIENCE = 120.0  # seconds for one answer, on a busy machine


def find() -> str | None:
    """The browser to use: `$CHROMIUM`, or the first of the usual names."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `complaints` gathers console errors, exceptions, and requests for anything but files and data."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._rest = b""
        self._last = 0
        self._session: str | None = None
        self._seen: set[str] = set()
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, and its result."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._notice(answer)

    def open(self, page: Path, *, width: int, height: int = 800, media: str = "", dark: bool = False) -> None:
        """Load a file as a screen of this size (CSS pixels) shows it; `media` "print": as paper does."""
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self._seen.clear()
        result = self.ask("Page.navigate", url=page.resolve().as_uri())
        assert "errorText" not in result, result["errorText"]
        while "Page.loadEventFired" not in self._seen:
            self._notice(self._next())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def pdf(self, *, width: float = 8.27, height: float = 11.69) -> bytes:
        """The page as it is printed, on paper of this size in inches; margins are the page's own."""
        options = {"paperWidth": width, "paperHeight": height, "preferCSSPageSize": False, "printBackground": False}
        return base64.b64decode(self.ask("Page.printToPDF", **options)["data"])

    def picture(self) -> bytes:
        """The whole page as PNG; for looking at it."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _notice(self, event: dict[str, Any]) -> None:
        method, told = event.get("method", ""), event.get("params", {})
        self._seen.add(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {told['exceptionDetails'].get('text')}")
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console {told['type']}: {told['args']}")
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log {told['entry']['level']}: {told['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"request: {told['request']['url']}")
        elif method == "Network.loadingFailed":
            self.complaints.append(f"failed: {told['errorText']}")

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"no answer from the browser in {PATIENCE:.0f} s"
            piece = os.read(self._receive, 1 << 20)
            assert piece, "the browser is gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def running(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with everything it started when the block ends."""
    to_read, send = os.pipe()
    receive, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads descriptor 3 and writes descriptor 4.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        command = ["bash", "-c", script, "bash", program, *FLAGS, f"--user-data-dir={profile}"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, pass_fds=(to_read, to_write), start_new_session=True, **quiet)
        os.close(to_read)
        os.close(to_write)
        try:
            browser = Browser(send, receive)
            yield browser
        finally:
            os.close(send)
            os.close(receive)
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends by itself when its pipe closes; if not, it and its children are killed."""
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait(10)
