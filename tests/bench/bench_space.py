"""The page under load: start, first ranking, then many users at once.

    python -m tests.bench.bench_space --users 50 --seconds 120 --output tests/bench/results/space.json

The server runs in a process of its own, as `querit demo` starts it. Each user ranks lists of documents of different
sizes through the API and checks that the answer is of their own question, whole, and in order of its scores; what
comes back wrong, or not at all, is counted.
"""

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from gradio_client import Client

WORDS = [
    "tide",
    "moon",
    "harbour",
    "bread",
    "flour",
    "lamp",
    "winter",
    "train",
    "garden",
    "letter",
    "stone",
    "river",
    "market",
    "window",
    "bird",
    "salt",
]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def documents_of(generator: random.Random, count: int, mark: str) -> list[str]:
    return [f"{mark}-{n} " + " ".join(generator.choices(WORDS, k=generator.randint(8, 40))) for n in range(count)]


def ask(client: Client, generator: random.Random, mark: str, count: int) -> bool:
    """Whether the answer is right."""
    documents = documents_of(generator, count, mark)
    rows = client.predict(f"Where is the {generator.choice(WORDS)}?", documents, api_name="/rank")
    scores = [row["score"] for row in rows]
    whole = sorted(row["document"] for row in rows) == sorted(documents)
    return (
        whole and scores == sorted(scores, reverse=True) and all(documents[r["index"]] == r["document"] for r in rows)
    )


def load(address: str, users: int, seconds: float) -> dict:
    clients = [Client(address, verbose=False) for _ in range(users)]
    times: list[float] = []
    wrong, lost = [], []
    end = time.monotonic() + seconds

    def use(number: int) -> None:
        generator = random.Random(number)
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                right = ask(clients[number], generator, f"u{number}", generator.choice((5, 10, 20)))
            except Exception as error:
                lost.append(repr(error))
                continue
            times.append(time.monotonic() - start)
            if not right:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 180)
    hung = sum(thread.is_alive() for thread in threads)
    return {
        "users": users,
        "seconds": seconds,
        "requests": len(times),
        "per_second": round(len(times) / seconds, 2),
        "median_s": round(statistics.median(times), 2),
        "p95_s": round(statistics.quantiles(times, n=20)[-1], 2),
        "wrong": len(wrong),
        "lost": len(lost) + hung,
        "errors": sorted(set(lost))[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path, default=Path("tests/bench/results/space.json"))
    args = parser.parse_args()

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    start = time.monotonic()
    command = [sys.executable, "-m", "querit", "demo", "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if not server.stdout.readline().startswith("Open"):
            raise SystemExit("The server did not start; run `querit demo` to see why.")
        urllib.request.urlopen(address).read()
        first_page = time.monotonic() - start
        client = Client(address, verbose=False)
        measured = []
        for number in range(6):
            begin = time.monotonic()
            if not ask(client, random.Random(number), f"first{number}", 20):
                raise SystemExit("The first ranking is wrong.")
            measured.append(time.monotonic() - begin)
        results = {
            "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            "start_to_first_page_s": round(first_page, 2),
            "first_ranking_of_20_s": round(measured[0], 2),
            "ranking_of_20_median_s": round(statistics.median(measured[1:]), 2),
            "load": load(address, args.users, args.seconds),
        }
    finally:
        server.terminate()
        server.wait(20)
    print(json.dumps(results, indent=1))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    aside = args.output.with_suffix(".writing")
    aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    aside.replace(args.output)


if __name__ == "__main__":
    main()
