"""A headless Chromium or Firefox that opens pages from disk, clicks, types and takes screenshots.

    python -m benchmarks.browser PAGE OUT.png [--firefox] [--width=1280] [--height=900] [--dark]
        [--whole] [--hash=…]

Chromium speaks the DevTools protocol over two pipes (--remote-debugging-pipe): messages are JSON
with a null byte after each. Firefox speaks Marionette over a socket: JSON behind its length.
"""

import argparse
import base64
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from typing import Any

_KEYS = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39}
# WebDriver's names of keys that are no characters
_WEBDRIVER_KEYS = {
    "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
    "Shift": "\ue008",
}  # fmt: skip


class Page:
    """One page of a headless browser, without a network; a context manager.

    Attributes:
      name: the browser's.
      programs: its names on a machine, the preferred one first.
    """

    name: str
    programs: tuple[str, ...]

    @classmethod
    def find(cls) -> str | None:
        """The program on this machine."""
        return next((path for name in cls.programs if (path := shutil.which(name))), None)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._disconnect()
        self._profile.cleanup()

    def open(self, page: pathlib.Path, fragment: str = "") -> float:
        """Open an explorer page, wait until its view is there; the seconds that took."""
        begun = time.monotonic()
        self.navigate("about:blank")
        self.navigate(page.resolve().as_uri() + ("#" + fragment if fragment else ""))
        shown = "document.querySelector('#total, .gallery, #view-mistakes p')"
        self.wait(f"document.readyState === 'complete' && !!{shown}")
        return time.monotonic() - begun

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


class Chromium(Page):
    """See `Page`.

    Args:
      width, height: of the window, in CSS pixels.
      dark: whether the page is to prefer a dark colour scheme.
    """

    name = "Chromium"
    programs = ("chromium", "chromium-browser", "google-chrome")

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self.problems: list[str] = []
        self._number, self._buffer, self._events = 0, b"", []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        flags += f" --disable-dev-shm-usage --user-data-dir={self._profile.name}"
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$0" {flags} about:blank 3<&{to_read} 4>&{to_write}',
                self.find(),
            ],
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

    def _disconnect(self) -> None:
        os.close(self._read)
        os.close(self._write)

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

    def navigate(self, url: str) -> None:
        """Another page."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:600])
        return result["result"].get("value")

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


class Firefox(Page):
    """See `Page`.

    Args:
      width, height: of the window, in CSS pixels, with its bars; no narrower than 450.
      dark: whether the page is to prefer a dark colour scheme.
    """

    name = "Firefox"
    programs = ("firefox-esr", "firefox")

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self._number, self._buffer = 0, b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        profile = pathlib.Path(self._profile.name)
        nowhere = {f"network.proxy.{kind}": "127.0.0.1" for kind in ("http", "ssl")}
        nowhere |= {f"network.proxy.{kind}_port": 9 for kind in ("http", "ssl")}
        settings = {
            "marionette.port": 0,  # any; it is written to MarionetteActivePort
            "network.proxy.type": 1,
            "layout.css.prefers-color-scheme.content-override": 0 if dark else 1,
            **nowhere,
        }
        lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in settings.items()]
        (profile / "user.js").write_text("\n".join(lines))
        flags = "--headless --marionette --no-remote --remote-allow-system-access --profile"
        self._process = subprocess.Popen(
            [self.find(), *flags.split(), str(profile)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = profile / "MarionetteActivePort"
        for _ in range(600):
            if port.exists() and port.read_text().strip():
                break
            time.sleep(0.1)
        self._socket = socket.create_connection(("127.0.0.1", int(port.read_text())), 60)
        self._next()  # its greeting
        self.call("WebDriver:NewSession", capabilities={"alwaysMatch": {}})
        self.call("WebDriver:SetWindowRect", width=width, height=height)

    def _disconnect(self) -> None:
        self._socket.close()

    def call(self, method: str, **params: Any) -> Any:
        """A Marionette command and its answer."""
        self._number += 1
        message = json.dumps([0, self._number, method, params]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, number, error, result = self._next()
        if error or number != self._number:
            raise RuntimeError(f"{method}: {error}")
        return result

    def _next(self) -> Any:
        while b":" not in self._buffer:
            self._receive()
        length, _, self._buffer = self._buffer.partition(b":")
        while len(self._buffer) < int(length):
            self._receive()
        message, self._buffer = self._buffer[: int(length)], self._buffer[int(length) :]
        return json.loads(message)

    def _receive(self) -> None:
        part = self._socket.recv(1 << 16)
        if not part:
            raise RuntimeError("the browser has gone")
        self._buffer += part

    @property
    def problems(self) -> list[str]:
        """Errors of scripts and files of pages from disk, from the browser's own console."""
        self.call("Marionette:SetContext", value="chrome")
        script = """return Services.console.getMessageArray()
            .filter((m) => m instanceof Ci.nsIScriptError && !(m.flags & m.warningFlag)
              && m.sourceName.startsWith("file:"))
            .map((m) => `${m.errorMessage} ${m.sourceName}:${m.lineNumber}`)"""
        found = self.call("WebDriver:ExecuteScript", script=script, args=[])["value"]
        self.call("Marionette:SetContext", value="content")
        return found

    def navigate(self, url: str) -> None:
        """Another page."""
        self.call("WebDriver:Navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        # In the page's own scope, where its constants are.
        script = "return window.eval(arguments[0])"
        text = f"JSON.stringify({expression.rstrip().rstrip(';')})"
        result = self.call("WebDriver:ExecuteScript", script=script, args=[text])["value"]
        return None if result is None else json.loads(result)

    def click(self, x: float, y: float) -> None:
        """A mouse click at a place of the window."""
        place = {"type": "pointerMove", "x": x, "y": y, "origin": "viewport", "duration": 0}
        button = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        self._act({"type": "pointer", "id": "mouse", "actions": [place, *button]})

    def press(self, key: str, shift: bool = False) -> None:
        """A key."""
        keys = [_WEBDRIVER_KEYS.get(k, k) for k in (["Shift"] if shift else []) + [key]]
        down = [{"type": "keyDown", "value": k} for k in keys]
        up = [{"type": "keyUp", "value": k} for k in reversed(keys)]
        self._act({"type": "key", "id": "keys", "actions": down + up})

    def _act(self, source: dict[str, Any]) -> None:
        self.call("WebDriver:PerformActions", actions=[source])
        self.call("WebDriver:ReleaseActions")

    def screenshot(self, path: pathlib.Path, whole: bool = False) -> None:
        """The window, or the whole page, as PNG."""
        data = self.call("WebDriver:TakeScreenshot", full=whole)["value"]
        path.write_bytes(base64.b64decode(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--firefox", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--hash", default="")
    arguments = parser.parse_args()
    kind = Firefox if arguments.firefox else Chromium
    with kind(arguments.width, arguments.height, arguments.dark) as browser:
        seconds = browser.open(arguments.page, arguments.hash)
        time.sleep(0.5)  # pictures that come into view
        browser.screenshot(arguments.out, arguments.whole)
        print(f"ready in {seconds:.2f} s; problems: {browser.problems}")


if __name__ == "__main__":
    main()
