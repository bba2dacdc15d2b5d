"""`querit serve` as a process: it says when it is ready, and answers what it took before it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
from typer.testing import CliRunner

from querit.cli import app
from querit.serve.server import check_address, read_keys
from tests.models_for_tests import folder_of
from tests.querit.serve.serving_for_tests import DOCUMENTS, QUERY


@contextmanager
def served(*options, **environment):
    """(process, address) once it is ready."""
    command = [sys.executable, "-m", "querit", "serve", str(folder_of("bert")), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if ready := re.search(r"Ready: bert on (http://\S+)", line):
                yield process, ready[1]
                return
        raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.communicate()


def test_it_answers_what_it_took_and_ends():
    with served() as (process, address), httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        asked = {"query": QUERY, "documents": [f"{number} {DOCUMENTS[0]}" for number in range(1000)]}
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/rerank", json=asked))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        while "querit_in_flight 3.0" not in client.get("/metrics").text and not answers:
            pass
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert all(len(answer.json()["results"]) == 1000 for answer in answers)
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn raises it again, when all is answered


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QUERIT_API_KEYS", "one, two\nthree")
    assert read_keys(None) == ["one", "two", "three"]
    monkeypatch.setenv("QUERIT_API_KEYS", "")
    assert read_keys(None) == []
    file = tmp_path / "keys"
    file.write_text("# of the search team\nfour\n\n five \n")
    assert read_keys(file) == ["four", "five"]
    file.write_bytes("# of an editor on Windows\r\nsix\r\n".encode("utf-8-sig"))
    assert read_keys(file) == ["six"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="keys:1: not UTF-8"):
        read_keys(file)
    file.write_text("schlüssel\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no header can hold"):
        read_keys(file)
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="has no key"):
        read_keys(file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["/nowhere/x.onnx"], "x.onnx"),
        (["--api-keys", "/nowhere/keys"], "/nowhere/keys"),
        (["--host", "no such host"], "no such host is no address"),
        (["--host", "192.0.2.1"], "192.0.2.1 port 8000 cannot be listened on"),  # an address of documentation's
        (["--timeout", "inf"], "86400"),
    ],
)
def test_a_start_that_fails_says_why_in_a_sentence(options, words):
    command = [sys.executable, "-m", "querit", "serve", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode in (1, 2) and words in ended.stderr and "Traceback" not in ended.stderr


def test_a_warm_up_that_fails_is_told_in_a_sentence(monkeypatch):
    def no_memory(*args):
        raise MemoryError("too little memory for one pair")

    monkeypatch.setattr("querit.serve.server.serve", no_memory)
    ended = CliRunner().invoke(app, ["serve", str(folder_of("bert")), "--port", "0"])
    assert ended.exit_code == 1 and "too little memory for one pair" in ended.output and "Traceback" not in ended.output


def test_each_address_of_a_name_that_is_of_this_machine_must_be_free(monkeypatch):
    """As asyncio listens: on all that a name stands for."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def check(*hosts):
            found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in hosts]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
            check_address("some-name", port)

        check("127.0.0.2")
        check("192.0.2.1", "127.0.0.2")  # the first is another machine's
        for hosts in (("127.0.0.1",), ("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "127.0.0.2"), ("192.0.2.1",)):
            with pytest.raises(ValueError, match=f"some-name port {port} cannot be listened on"):
                check(*hosts)
