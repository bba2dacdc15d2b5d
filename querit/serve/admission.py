"""What every request passes first: its key, the queue's length, its size, its time; and the one line that is logged."""

import asyncio
import hashlib
import hmac
import logging
import time
import traceback
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from querit.serve.errors import api_of, error_response
from querit.serve.metrics import Metrics

logger = logging.getLogger("querit.serve")

OPEN = ("/health", "/docs", "/openapi.json")  # what needs no key


@dataclass(frozen=True)
class Limits:
    """Of a request, but for `waiting`."""

    documents: int = 1000
    characters: int = 2_000_000  # of queries, documents and instruction together
    body_bytes: int = 10_000_000
    seconds: float = 60  # from its first byte to its answer
    waiting: int = 128  # requests taken at once; the next one is told to come back


class Admission:
    """ASGI middleware. Requests in flight are those read, waiting or scored: their number bounds the memory taken."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: Sequence[str], metrics: Metrics, paths: Collection[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.keys = [digest(key) for key in keys]
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, read_all = time.perf_counter(), 0, False
        state = scope.setdefault("state", {})
        state.update(id=uuid.uuid4().hex, api=api_of(scope["path"]), told="")

        async def received() -> Message:
            nonlocal read_all
            message = await receive()
            read_all = read_all or not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["id"].encode())]
            await send(message)

        async def refuse(code: int, words: str) -> None:
            if not status:
                await error_response(state["api"], code, words)(scope, receive, answer)

        counts = scope["method"] == "POST"
        refusal = self.refusal(scope, counts)
        if refusal is not None:
            await discard(received)
            await refuse(*refusal)
        else:
            self.in_flight += counts
            self.metrics.in_flight.set(self.in_flight)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    await self.app(scope, received, answer)
            except TimeoutError:
                spent = f"after {self.limits.seconds:g} seconds"
                if read_all:
                    await refuse(504, f"Not scored {spent}. Send fewer or shorter documents, or come back later.")
                else:
                    await refuse(408, f"The body was not all there {spent}.")
            except Exception as error:
                # Not its message, which may quote a text.
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s %s at\n%s", state["id"], type(error).__name__, frames)
                await refuse(500, f"Something is wrong here; the server's log says more of request {state['id']}.")
            finally:
                self.in_flight -= counts
                self.metrics.in_flight.set(self.in_flight)
        path = scope["path"] if scope["path"] in self.paths else "other"
        seconds = time.perf_counter() - start
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        if counts:
            logger.info("%s %s %s %.0f ms %s", state["id"], path, status or "gone", 1000 * seconds, state["told"])

    def refusal(self, scope: Scope, counts: bool) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        if self.keys and scope["path"] not in OPEN and not self.knows(headers.get("authorization", "")):
            return 401, "Give an API key, as the header `Authorization: Bearer KEY`."
        if counts and self.in_flight >= self.limits.waiting:
            return 429, f"{self.in_flight} requests are waiting. Come back in a second."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.limits.body_bytes:
            return 413, f"A request has at most {self.limits.body_bytes:,} bytes."
        return None

    def knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = digest(key.strip())
        # All are compared, and none by its first characters: the time it takes tells nothing.
        return any([hmac.compare_digest(given, known) for known in self.keys]) and scheme.lower() == "bearer"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


async def discard(receive: Receive) -> None:
    """Read what the client is sending, for a second: one that still writes when it is refused may see no answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await receive()).get("more_body"):
                pass
