"""Pages as a real browser draws them: chromium without a window, told what to do over a pipe."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import stage

DRAW_S, POLL_S = 90.0, 0.3  # how long a page may take to draw itself
SETTLE_S, STILL_S = 20.0, 1.5  # a page that looks the same for so long is drawn; one with a cursor never does


class Page:
    """The one page of a browser, spoken to in Chrome's DevTools protocol."""

    def __init__(self, to: io.FileIO, back: io.FileIO) -> None:
        self._to, self._back, self._rest, self._numbers = to, back, b"", itertools.count(1)
        self._session = ""
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def open(self, address: str, width: int, height: int, until: str, scale: float = 1) -> None:
        """Go to a page, and wait until this text is there."""
        self._do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        self._do("Emulation.setTimezoneOverride", timezoneId="UTC")
        self._do("Page.navigate", url=address)
        self.wait(f"document.body && document.body.innerText.includes({json.dumps(until)})")

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        done = self._do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, f"{script}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + DRAW_S
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, f"the page never came to {script}; it says {self.text()[:2000]}"
            time.sleep(POLL_S)

    def text(self) -> str:
        """What the page says."""
        found: str = self.run("document.body ? document.body.innerText : ''")
        return found

    def click(self, script: str) -> None:
        """Click the middle of an element, which an expression finds, as a mouse does."""
        self.wait(script)
        x, y = self.run(
            f"(() => {{ const e = {script}; e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._do("Input.insertText", text=text)

    def picture(self, still_s: float = STILL_S) -> bytes:
        """A PNG of what is to be seen, once it has stopped moving."""
        end, last, since = time.monotonic() + SETTLE_S, b"", time.monotonic()
        while time.monotonic() < end:
            now = base64.b64decode(self._do("Page.captureScreenshot", format="png")["data"])
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > still_s:
                break
            time.sleep(POLL_S)
        return last

    def _do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                got = self._back.read(2**20)
                assert got, "the browser has ended"
                self._rest += got
            one, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result


def find() -> str:
    """The browser.

    Raises:
        Refusal: there is none.
    """
    browser = shutil.which("chromium")
    if browser is None:
        raise stage.Refusal("there is no chromium; install it (Debian: apt install chromium)")
    return browser


@contextlib.contextmanager
def opened() -> Iterator[Page]:
    """A browser with one page, ended afterwards.

    Raises:
        Refusal: there is none.
    """
    browser = find()
    (theirs, to), (back, ours) = os.pipe(), os.pipe()

    def place() -> None:  # chromium reads from 3 and writes to 4
        reads, writes = os.dup(theirs), os.dup(ours)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--lang=en", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=place, close_fds=False, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(ours)
        try:
            with open(to, "wb", buffering=0) as sink, open(back, "rb", buffering=0) as source:  # noqa: PTH123
                yield Page(sink, source)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def save(png: bytes, file: Path, width: int | None = None) -> None:
    """Write a picture, at most so wide, in 128 colours."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        box = (0, 0, min(width or image.width, image.width), image.height)
        image.convert("RGB").crop(box).quantize(128).save(file, optimize=True)
