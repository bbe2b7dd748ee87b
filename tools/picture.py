"""Look at a page as a browser shows it: pictures at any width, light or dark, and what its own scripts would tell.

    python tools/picture.py runs/demo/compare/report.html --output report.png --width 1180 --height 1560
    python tools/picture.py report.html --output phone.png --width 360 --dark

Needs Chromium or Chrome. The browser is spoken to over two pipes by the DevTools protocol
(https://chromedevtools.github.io/devtools-protocol): no port is opened, and nothing but the page is loaded.
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
#: Seconds to wait for the browser's next word.
PATIENCE_S = 60
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands from file descriptor 3 and answers on 4.
_START = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome; ``None`` where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless browser with a single page.

    Attributes:
        events: What the browser told since the page was last opened, each with ``method`` and ``params``.

    Args:
        path: Of Chromium or Chrome.
        profile: An empty folder that it may write into.
    """

    def __init__(self, path: str, profile: Path) -> None:
        to_browser, commands = os.pipe()
        answers, from_browser = os.pipe()
        start = [sys.executable, "-c", _START, str(to_browser), str(from_browser)]
        self._process = subprocess.Popen(
            [*start, path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb", 0)
        self._unread = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        self._commands.close()
        self._answers.close()
        self._process.terminate()
        self._process.wait(timeout=20)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result.

        Raises:
            RuntimeError: If the browser refuses, or ends.
        """
        self._count += 1
        command = {"id": self._count, "method": method, "params": params}
        session = {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(command | session).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return dict(message["result"])
            self.events.append(message)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE_S)
            part = os.read(self._answers.fileno(), 1 << 16) if ready else b""
            if not ready:
                raise RuntimeError(f"the browser has said nothing for {PATIENCE_S} seconds")
            if not part:
                raise RuntimeError("the browser has ended; start it by hand to see why")
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(text))

    def open(self, page: Path, *, width: int, height: int = 800, dark: bool = False, medium: str = "screen") -> None:
        """Show a page in a window of some size, and wait until it is there.

        Args:
            page: An HTML file.
            width: Of the window, in CSS pixels.
            height: Of the window, in CSS pixels.
            dark: Whether the reader prefers dark colours.
            medium: ``screen`` or ``print``.
        """
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression, computed beside the page: the page's own policy does not bind it.

        Raises:
            RuntimeError: If it throws.
        """
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def picture(self, file: Path, *, scale: float = 1.0, whole: bool = False) -> None:
        """Write what is seen as PNG.

        Args:
            file: To write.
            scale: Pixels of the picture for each of the page.
            whole: The page down to its end, in place of the window.
        """
        metrics = self.call("Page.getLayoutMetrics")
        page, seen = metrics["cssContentSize"], metrics["cssLayoutViewport"]
        area = {"x": 0, "y": 0, "width": page["width"], "height": page["height"], "scale": scale}
        if not whole:
            area |= {
                "x": seen["pageX"],
                "y": seen["pageY"],
                "width": seen["clientWidth"],
                "height": seen["clientHeight"],
            }
        taken = self.call("Page.captureScreenshot", format="png", clip=area, captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with a profile that is gone afterwards.

    Raises:
        SystemExit: If there is none.
    """
    path = find_browser()
    if path is None:
        raise SystemExit(f"none of {', '.join(NAMES)} was found; install Chromium.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(path, Path(profile)) as opened:
        yield opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="an HTML file")
    parser.add_argument("--output", type=Path, required=True, help="the PNG file to write")
    parser.add_argument("--width", type=int, default=1280, help="of the window, CSS pixels")
    parser.add_argument("--height", type=int, default=0, help="of the window, CSS pixels; 0 takes the page to its end")
    parser.add_argument("--dark", action="store_true", help="as a reader who prefers dark colours sees it")
    parser.add_argument("--scale", type=float, default=1.0, help="pixels of the picture for each of the page")
    parser.add_argument("--before", default="", help="JavaScript to run first, such as a click or a scroll")
    wanted = parser.parse_args()
    with browser() as opened:
        opened.open(wanted.page, width=wanted.width, height=wanted.height or 800, dark=wanted.dark)
        if wanted.before:
            opened.evaluate(wanted.before)
        opened.picture(wanted.output, scale=wanted.scale, whole=not wanted.height)


if __name__ == "__main__":
    main()
