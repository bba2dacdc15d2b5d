"""A process that serves until it is told to stop; then it answers what it took."""

import errno
import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from querit.serve.admission import Limits
from querit.serve.app import create_app
from querit.text import read_lines

KEYS = "QUERIT_API_KEYS"  # with commas or blanks between them

logger = logging.getLogger("querit.serve")


class Server(uvicorn.Server):
    """Says when it is ready, and where."""

    def __init__(self, config: uvicorn.Config, name: str):
        super().__init__(config)
        self.name = name

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host  # IPv6
            logger.info("Ready: %s on http://%s:%s (its pages: /docs)", self.name, host, port)


def check_address(host: str, port: int) -> None:
    """Raises ValueError for what cannot be listened on.

    A name may stand for several addresses: each that this machine has must be free, and it must have one.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{host} is no address ({error.strerror}). Give one of this machine as --host.") from None
    failures = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind(address)
        except OSError as error:
            failures.append(error)
    elsewhere = [error for error in failures if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)]
    if failures != elsewhere or len(elsewhere) == len(found):
        raise ValueError(
            f"{host} port {port} cannot be listened on ({failures[-1].strerror}). Give an address of this machine as "
            "--host, and a --port that is free."
        )


def read_keys(file: Path | None) -> list[str]:
    """The keys of a file, one a line, `#` before comments, or of the environment.

    They are never given on the command line, which other users of the machine can read. Raises ValueError for a file
    without a key or that is no text, and for keys that no client could send.
    """
    if file is None:
        keys = os.environ.get(KEYS, "").replace(",", " ").split()
    else:
        with file.open("rb") as opened:
            lines = [line.strip() for line in read_lines(opened, str(file))]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{file} has no key. Put one a line, or leave --api-keys out to ask for none.")
    if not all(map(str.isascii, keys)):
        raise ValueError(f"A key of {file or KEYS} has other characters than ASCII, which no header can hold.")
    return keys


def serve(ranker: Any, name: str, host: str, port: int, limits: Limits, keys: list[str]) -> None:
    """Serve until SIGINT or SIGTERM. Port 0 takes a free one, told in the log."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    if not keys and host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("Whoever reaches %s may use it: no API keys are set (--api-keys or %s).", host, KEYS)
    ranker("warm up", ["The first time takes longest."])  # and starts the processes of several devices
    config = uvicorn.Config(
        create_app(ranker, name, limits, keys),
        host=host,
        port=port,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )
    with suppress(KeyboardInterrupt):  # which uvicorn raises again, when all is answered
        Server(config, name).run()
