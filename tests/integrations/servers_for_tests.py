"""Servers of other engines, run by the python of an environment that holds them; `make integrations` builds those."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

START = 900  # seconds


def python_of(variable: str) -> str:
    python = os.environ.get(variable)
    assert python, f"{variable} is not set. `make integrations` sets it to that of an environment which it builds."
    return os.path.abspath(python)


@contextmanager
def serving(words: list[str], folder: Path, environment: dict[str, str], log: Path) -> Iterator[str]:
    """The address of a server, run in `folder`; `{port}` in its words is a free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        server = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in words], cwd=folder, env=os.environ | environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
        while not healthy(address):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(1)
        yield address
    finally:
        with suppress(ProcessLookupError):  # it failed to start
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def healthy(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.RequestException:
        return False


def post(url: str, **asked) -> dict:
    answer = requests.post(url, json=asked, timeout=600)
    assert answer.ok, answer.text
    return answer.json()
