"""A headless Chromium driven over its own pipe, with clicks and keys as a person gives them; no package is needed."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

#: Path of the browser, None where there is none.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)
#: Generous: the machine may be busy.
_SECONDS = 60
_KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "/": 191, "j": 74, "k": 75}


class Browser:
    """One page in a browser of its own; use it in a ``with`` block.

    What goes wrong in the page is in ``problems`` (errors, warnings, violations of its security policy), and what it
    asked for in ``requests`` (addresses, without data that the page brought itself).
    """

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._numbers, self._unread, self._events = itertools.count(1), b"", set[str]()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (its_input, self._write), (self._read, its_output) = os.pipe(), os.pipe()
        # Out of the way of 3 and 4, where the browser looks for its pipe.
        its_input, its_output = (_moved(handle) for handle in (its_input, its_output))
        self._pid = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *_ARGUMENTS, f"--user-data-dir={self._profile.name}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, its_input, 3),
                (os.POSIX_SPAWN_DUP2, its_output, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        os.close(its_input)
        os.close(its_output)
        try:
            self._session = None
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.resize(1280, 900)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file and wait until it is there, or go elsewhere in the one that is open."""
        self._events.discard("Page.loadEventFired")
        loads = "loaderId" in self.call("Page.navigate", url=path.absolute().as_uri() + fragment)
        while loads and "Page.loadEventFired" not in self._events:
            self._next()

    def reload(self) -> None:
        """Load what is open once more."""
        self._events.discard("Page.loadEventFired")
        self.call("Page.reload")
        while "Page.loadEventFired" not in self._events:
            self._next()

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Visible text of every element that can be seen."""
        shown = f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.offsetParent)"
        return self.evaluate(f"{shown}.map((e) => e.innerText)")

    def wait_for(self, selector: str, texts: list[str]) -> None:
        """Wait until these are the visible texts, as after a link, which browsers follow when they see fit."""
        deadline = time.monotonic() + _SECONDS
        while (current := self.texts(selector)) != texts:
            assert time.monotonic() < deadline, f"{selector}: {current}, not {texts}, after {_SECONDS} s."
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of the first element that can be seen."""
        element = f"[...document.querySelectorAll({json.dumps(selector)})].find((e) => e.offsetParent)"
        middle = "[box.x + box.width / 2, box.y + box.height / 2]"
        x, y = self.evaluate(
            f"(() => {{ const e = {element}; e.scrollIntoView({{ block: 'center' }});"
            f" const box = e.getBoundingClientRect(); return {middle}; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, option: str) -> None:
        """Choose an option of a list."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{field}.value = {json.dumps(option)}; {field}.dispatchEvent(new Event('change'))")

    def write(self, text: str) -> None:
        """Put text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press and release one key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=_KEYS[key])

    def resize(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Size of the window, and what the reader's system prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def _next(self) -> dict[str, Any]:
        """The next message of the browser; events are taken note of."""
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._unread:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"The browser said nothing for {_SECONDS} s.")
            if not (part := os.read(self._read, 2**20)):
                raise RuntimeError("The browser has ended.")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, details: dict[str, Any]) -> None:
        self._events.add(event)
        if event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(details["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled":
            self.problems.append(json.dumps(details["args"]))
        elif event == "Log.entryAdded":
            self.problems.append(details["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.problems.append(f"a dialog: {details['message']}")
        elif event == "Network.requestWillBeSent" and not details["request"]["url"].startswith("data:"):
            self.requests.append(details["request"]["url"])


def _moved(handle: int) -> int:
    """The same pipe under a number from 10 on, closed in programs that are started."""
    moved = fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(handle)
    return moved
