"""A headless Chromium for tests, spoken to in its DevTools protocol over two pipes: no driver, no port, no library."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120


def found():
    """The browser's path; None where there is none."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time. `console` and `requests` hold what the last page said and asked for."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="tune-browser-", ignore_cleanup_errors=True)
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        log = os.open(Path(self._folder.name) / "log", os.O_WRONLY | os.O_CREAT)
        command = [
            found(),
            "--headless=new",
            "--no-sandbox",  # a container's root has no other way
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._folder.name}/profile",
            "about:blank",
        ]
        actions = [(os.POSIX_SPAWN_DUP2, log, fd) for fd in (1, 2)]
        # The pipes' own numbers may be 3 or 4: they are moved out of the way first.
        actions += [(os.POSIX_SPAWN_DUP2, to_read, 103), (os.POSIX_SPAWN_DUP2, to_write, 104)]
        actions += [(os.POSIX_SPAWN_DUP2, 103, 3), (os.POSIX_SPAWN_DUP2, 104, 4)]
        environment = os.environ | {"HOME": self._folder.name}
        self._pid = os.posix_spawn(command[0], command, environment, file_actions=actions, setpgroup=0)
        for fd in (to_read, to_write, log):
            os.close(fd)
        self._buffer, self._last, self._session = b"", 0, None
        self.console, self.requests = [], []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path, *, dark=False, width=1100, height=900, media="screen"):
        self._call("Page.navigate", url="about:blank")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.console.clear()
        self.requests.clear()
        self._loaded = False
        self._call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression):
        """The value of a JavaScript expression, which JSON must be able to hold."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point(self, x, y):
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path, clip=None):
        given = {"clip": clip | {"scale": 1}} if clip else {}
        data = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, **given)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def pdf(self, path, *, dark=False):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", media="", features=scheme)
        data = self._call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._send("Browser.close")
        deadline = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def _send(self, method, **parameters):
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        return self._last

    def _call(self, method, **parameters):
        number = self._send(method, **parameters)
        while (message := self._receive()).get("id") != number:
            pass
        assert "error" not in message, message["error"]
        return message["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            assert ready, "the browser says nothing"
            data = os.read(self._in, 1 << 20)
            assert data, (
                "the browser has ended: " + (Path(self._folder.name) / "log").read_text(errors="replace")[-2000:]
            )
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        said = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.console.append(" ".join(str(one.get("value")) for one in said["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(said["exceptionDetails"]["text"])
            case "Log.entryAdded":
                self.console.append(said["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True
        return message
