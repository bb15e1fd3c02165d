"""Drives a real Chromium over a pipe, with no other package: https://chromedevtools.github.io/devtools-protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0
"""Seconds that something on a page may take."""


def installed() -> str | None:
    """The path of a browser."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A browser without a window.

    Args:
        path: of the program.
        profile: a folder of its own.
    """

    def __init__(self, path: str, profile: Path) -> None:
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        words = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'  # it reads at 3 and writes at 4
        command = ["bash", "-c", words, path, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._waiting, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A call's result; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._waiting:
            left = end - time.monotonic()
            assert left > 0 and self.process.poll() is None, "the browser does not answer"
            if select.select([self._read], [], [], left)[0]:
                piece = os.read(self._read, 1 << 20)
                assert piece, "the browser has ended"
                self._waiting += piece
        first, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(first)

    def open(self, address: str) -> Tab:
        """A new tab at an address, with a window of 1280 x 1000 pixels."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Network", "DOM"):
            tab.call(f"{domain}.enable")
        size = {"width": 1280, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        tab.call("Emulation.setDeviceMetricsOverride", **size)
        tab.call("Page.navigate", url=address)
        return tab

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A call's result."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript; a promise is waited for."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = PATIENCE) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def attach(self, selector: str, files: list[Path]) -> None:
        """Choose files in a field."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        paths = [str(file.resolve()) for file in files]
        self.call("DOM.setFileInputFiles", files=paths, objectId=found["result"]["objectId"])

    def type(self, selector: str, text: str) -> None:
        """Type text into a field."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press the key."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, file: Path, selector: str | None = None) -> None:
        """Save a picture of the whole page, or of an element, as PNG."""
        options: dict[str, Any] = {"captureBeyondViewport": True}
        if selector is not None:
            script = f"JSON.stringify(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
            box, top = json.loads(self.run(script)), self.run("[scrollX, scrollY]")
            options["clip"] = {"x": box["x"] + top[0], "y": box["y"] + top[1], "width": box["width"],
                               "height": box["height"], "scale": 1}  # fmt: skip
        else:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        self.run("0")  # events until now
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("method") == "Network.requestWillBeSent" and event.get("sessionId") == self._session
        ]

    def close(self) -> None:
        """Close it."""
        self._browser.call("Target.closeTarget", targetId=self._target)
