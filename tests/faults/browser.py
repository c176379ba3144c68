"""A real Chromium without a window, driven by its protocol over two pipes: pages, keys, and what a screen reader is told."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
# Becomes the program that follows, which reads from 3 and writes to 4.
PIPES = """
import os, sys
first, second = (os.dup(int(each)) for each in sys.argv[1:3])
os.dup2(first, 3)
os.dup2(second, 4)
os.set_inheritable(3, True)  # also where one of them was that already
os.set_inheritable(4, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}


class Browser:
    """One page of a browser. https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes, self._count, self._rest = reads, writes, 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Log", "Accessibility", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and keep the events that come before its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._count:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]
            self.events.append(said)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._reads, 1 << 16)
            if not part:
                raise RuntimeError("the browser is gone")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _loaded(self) -> None:
        while not any(each.get("method") == "Page.loadEventFired" for each in self.events):
            self.events.append(self._next())

    def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self._loaded()

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page, as a debugger's, which no policy of the page forbids."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    @property
    def text(self) -> str:
        return str(self.value("document.body.innerText"))

    @property
    def url(self) -> str:
        return str(self.value("location.href"))

    def press(self, key: str, *, loads: bool = False) -> None:
        """Press a key; with `loads` wait for the page to which that leads."""
        self.events.clear()
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)
        if loads:
            self._loaded()

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def tab_to(self, name: str) -> None:
        """Press Tab until what has this accessible name has the focus."""
        names: list[str] = []
        for _ in range(60):
            self.press("Tab")
            names.append(self.focused())
            if names[-1] == name:
                return
        raise AssertionError(f"no Tab leads to {name}: {names}")

    def focused(self) -> str:
        """Return the accessible name of what has the focus, as a screen reader says it."""
        for node in self.call("Accessibility.getFullAXTree")["nodes"]:
            properties = {each["name"]: each["value"].get("value") for each in node.get("properties", [])}
            if properties.get("focused") and node["role"]["value"] != "RootWebArea":
                return str(node["name"]["value"]).strip()
        return ""

    def roles(self) -> list[tuple[str, str]]:
        """Return role and name of all that a screen reader is told of."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        shown = [each for each in nodes if not each.get("ignored")]
        return [(each["role"]["value"], str(each.get("name", {}).get("value", ""))) for each in shown]

    @property
    def complaints(self) -> list[str]:
        """What the browser's console says of the page, such as what its policy forbids."""
        entries = [
            each["params"]["entry"]["text"] for each in self.events if each.get("method") == "Log.entryAdded"
        ]
        return [each for each in entries if "favicon" not in each]


@contextmanager
def browsing(folder: Path) -> Generator[Browser]:
    """Yield a page of a browser whose profile lies in a folder; the browser ends with the block."""
    assert CHROMIUM is not None
    (reads, theirs_out), (theirs_in, writes) = os.pipe(), os.pipe()

    process = subprocess.Popen(
        [
            *(sys.executable, "-c", PIPES, str(theirs_in), str(theirs_out)),
            *(
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--remote-debugging-pipe",
            ),
            *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}"),
            "about:blank",
        ],
        pass_fds=(theirs_in, theirs_out),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(reads, writes)
    finally:
        process.terminate()
        process.wait(60)
        os.close(reads)
        os.close(writes)
