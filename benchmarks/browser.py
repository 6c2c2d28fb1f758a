"""Headless Chromium, driven over its DevTools protocol: pages are opened, clicked, photographed.

A test asks for the fixture `browser` of conftest.py, which skips where no Chromium is installed
(Debian: apt-get install chromium). The protocol is JSON over a websocket, for which aiohttp, that
gcsfs brings, is enough; Selenium or Playwright would be larger and start the same program.
"""

import asyncio
import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # root in a container has no other way
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
SECONDS = 60.0


def find_program():
    """Path of a Chromium, or None."""
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)


class Browser:
    """One Chromium process with one tab."""

    def __init__(self, program):
        import aiohttp

        self._profile = tempfile.mkdtemp(prefix="hexa_chromium_")
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._number, self.events = 0, []
        port = self._wait_for_port()

        async def connect():
            self._session = aiohttp.ClientSession()
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = await answer.json()
            tab = next(tab for tab in tabs if tab["type"] == "page")
            self._socket = await self._session.ws_connect(
                tab["webSocketDebuggerUrl"], max_msg_size=0
            )

        self._loop.run_until_complete(connect())
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _wait_for_port(self):
        file, end = pathlib.Path(self._profile, "DevToolsActivePort"), time.monotonic() + SECONDS
        while not (file.exists() and file.read_text().strip()):
            assert self._process.poll() is None, "Chromium ended at once"
            assert time.monotonic() < end, "Chromium does not start"
            time.sleep(0.05)
        return int(file.read_text().split()[0])

    def call(self, method, **parameters):
        """Result of a DevTools command; events that come meanwhile are kept in `events`."""
        self._number += 1
        number = self._number

        async def exchange():
            message = {"id": number, "method": method, "params": parameters}
            await self._socket.send_str(json.dumps(message))
            while True:
                answer = json.loads((await self._socket.receive(SECONDS)).data)
                if answer.get("id") == number:
                    return answer
                self.events.append(answer)

        answer = self._loop.run_until_complete(exchange())
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def evaluate(self, expression):
        """Value of a JavaScript expression, promises awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition):
        """Wait until a JavaScript condition holds."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def open(self, path, *, width=1280, height=800, dark=False, touch=False):
        """Open a file in a window of that many CSS pixels."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if touch else 1,
            mobile=touch,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=pathlib.Path(path).absolute().as_uri())
        self.wait_for("document.readyState === 'complete'")

    def click(self, x, y):
        """Press and release the mouse at a point of the page."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, start, end, steps=5):
        """Drag the mouse between two points."""
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1],
                  button="left", clickCount=1)  # fmt: skip
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            self.call(
                "Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1
            )
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1],
                  button="left", clickCount=1)  # fmt: skip

    def wheel(self, x, y, delta):
        """Turn the mouse wheel at a point."""
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)

    def press(self, key, text=None):
        """Press a key."""
        codes = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Escape": 27}
        more = {"text": text} if text else {}
        code = codes.get(key, ord(key[0]))
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **more
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, text):
        """Type text into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """Write a PNG of what the window shows."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def problems(self):
        """What the page complained about since it was opened: exceptions, errors, refused loads."""
        self.evaluate("1")
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["params"]["exceptionDetails"]["exception"].get("description"))
            elif event["method"] == "Log.entryAdded":
                found.append(event["params"]["entry"]["text"])
        return found

    def requests(self):
        """Addresses that the page asked for, without data: and blob: ones."""
        self.evaluate("1")
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def close(self):
        """End the process."""

        async def disconnect():
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(disconnect())
        self._loop.close()
        os.killpg(self._process.pid, 15)
        self._process.wait(30)
        shutil.rmtree(self._profile, ignore_errors=True)
