"""A server on loopback in a thread of the test's process: real requests, without a process's start."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import httpx
import uvicorn

import querit
from querit.serve.admission import Limits
from querit.serve.app import create_app
from tests.models_for_tests import folder_of

NAME = "tiny"
QUERY = "When does the tide rise?"
DOCUMENTS = ["The tide rises twice a day.", "Feed the starter with flour.", "Una batería dura más.", "日本の海"]


@cache
def tiny_ranker():
    return querit.load(folder_of("bert"), dtype="float32")


@contextmanager
def serving(ranker=None, limits: Limits | None = None, keys=(), name: str = NAME) -> Iterator[httpx.Client]:
    """A client of the server; `client.base_url` is where it listens."""
    app = create_app(ranker or tiny_ranker(), name, limits, keys)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
