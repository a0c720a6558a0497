"""A headless Chromium that opens pages from disk, clicks, types and takes screenshots.

    python tests/explain/browser.py PAGE OUT.png [--width=1280] [--height=900] [--dark] [--hash=…]

Speaks the DevTools protocol over two pipes (--remote-debugging-pipe): messages are JSON with a
null byte after each.
"""

import argparse
import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any

_KEYS = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39}


def find() -> str | None:
    """A Chromium on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium; a context manager.

    Args:
      width, height: of the window, in CSS pixels.
      dark: whether the page is to prefer a dark colour scheme.
    """

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self.problems: list[str] = []
        self._number, self._buffer, self._events = 0, b"", []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        flags += f" --disable-dev-shm-usage --user-data-dir={self._profile.name}"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" {flags} about:blank 3<&{to_read} 4>&{to_write}', find()],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0,
                  downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A DevTools command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser has gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:600])
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))

    def resize(self, width: int, height: int) -> None:
        """Another size of the window, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip

    def open(self, page: pathlib.Path, fragment: str = "") -> float:
        """Open an explorer page, wait until its view is there; the seconds that took."""
        begun = time.monotonic()
        self.call("Page.navigate", url="about:blank")
        self.call(
            "Page.navigate", url=page.resolve().as_uri() + ("#" + fragment if fragment else "")
        )
        shown = "document.querySelector('#total, .gallery, #view-mistakes p')"
        self.wait(f"document.readyState === 'complete' && !!{shown}")
        return time.monotonic() - begun

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:600])
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true.

        Raises:
          TimeoutError: it was not, for half a minute.
        """
        for _ in range(600):
            if self.evaluate(expression):
                return
            time.sleep(0.05)
        raise TimeoutError(f"{expression} is not true; {self.problems}")

    def click(self, x: float, y: float) -> None:
        """A mouse click at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, shift: bool = False) -> None:
        """A key."""
        code = {"windowsVirtualKeyCode": _KEYS[key]} if key in _KEYS else {"text": key}
        for kind in ("keyDown", "keyUp"):
            extra = code if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **extra)

    def screenshot(self, path: pathlib.Path, whole: bool = False) -> None:
        """The window, or the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--hash", default="")
    arguments = parser.parse_args()
    with Browser(arguments.width, arguments.height, arguments.dark) as browser:
        seconds = browser.open(arguments.page, arguments.hash)
        time.sleep(0.5)  # pictures that come into view
        browser.screenshot(arguments.out, arguments.whole)
        print(f"ready in {seconds:.2f} s; problems: {browser.problems}")


if __name__ == "__main__":
    main()
