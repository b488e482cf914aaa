"""A real headless Chromium, driven over its DevTools protocol; software WebGL, so no GPU is needed."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    return next((path for name in COMMANDS if (path := shutil.which(name))), None)


class Tab:
    """One page."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0
        self.messages: list[str] = []
        """What the console said, and exceptions."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=180))
            if answer.get("method") == "Runtime.consoleAPICalled":
                self.messages.append(" ".join(str(a.get("value", a.get("description"))) for a in answer["params"]["args"]))  # fmt: skip
            if answer.get("method") == "Runtime.exceptionThrown":
                self.messages.append(json.dumps(answer["params"]["exceptionDetails"])[:600])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} did not come true: {self.messages}"
            time.sleep(0.05)

    def open(self, url: str, width: int, height: int) -> None:
        self.resize(width, height)
        self.call("Runtime.enable")
        self.call("Page.navigate", url=url)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self) -> Tensor:
        """[H, W, 3] in [0, 1]"""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        return torch.from_numpy(pixels.astype(np.float32) / 255)


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Start a browser with an empty profile; yields its tab."""
    from websockets.sync.client import connect

    flags = ["--headless=new", "--no-sandbox", "--no-first-run", "--disable-extensions", "--remote-debugging-port=0"]  # fmt: skip
    software = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    process = subprocess.Popen(
        [str(find_chromium()), *flags, *software, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (ready.is_file() and ready.read_text().strip()):
            assert time.monotonic() < deadline and process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        port = ready.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
            page = next(entry for entry in json.load(answer) if entry["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=1 << 28) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
