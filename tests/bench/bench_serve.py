"""Requests per second of `querit serve`, beside plain FastAPI loops round the same model; then overload and a death.

    python -m tests.bench.bench_serve --seconds 30 --overload-seconds 600 --output tests/bench/results/serve.json

Each server is a process of its own on loopback; clients are threads here, each with one request at a time: 20 documents
of 100 tokens, none sent twice in a row. A loop scores one request after the other, as an `async def` endpoint does that
calls a model. Overload sends twice what the server can do, whether answers come or not: each must be right, or a 429.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.bench.machine import machine

DOCUMENTS, TOKENS, POOL = 20, 100, 24
WORDS = ["tide", "moon", "harbour", "bread", "flour", "lamp", "winter", "train", "garden", "letter", "stone", "river"]
WAITING = 32  # of the server under overload
TOLERANCE = 0.02  # of probabilities: scored in bfloat16, in other company


def requests_of(tokenizer, seed: int = 0) -> list[dict]:
    """POOL requests whose documents have TOKENS tokens each."""
    generator, requests = random.Random(seed), []
    for _ in range(POOL):
        documents = []
        for _ in range(DOCUMENTS):
            words = generator.choices(WORDS, k=2 * TOKENS)
            ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"][:TOKENS]
            documents.append(tokenizer.decode(ids))
        requests.append({"query": " ".join(generator.choices(WORDS, k=6)), "documents": documents})
    return requests


def loop(kind: str, model: str, port: int) -> None:
    """Serve as somebody does who has not thought about it."""
    import uvicorn
    from fastapi import FastAPI

    import querit

    if kind == "CrossEncoder":
        from sentence_transformers import CrossEncoder

        encoder = CrossEncoder(model)

        def scores(query, documents):
            return encoder.predict([(query, document) for document in documents]).tolist()
    else:
        ranker = querit.load(model)

        def scores(query, documents):
            ranking = ranker(query, documents, return_documents=False)
            return [row["probability"] for row in sorted(ranking, key=lambda row: row["index"])]

    app = FastAPI()

    @app.post("/v1/rerank")
    async def rerank(asked: dict):
        found = scores(asked["query"], asked["documents"])
        rows = [{"index": index, "relevance_score": score} for index, score in enumerate(found)]
        return {"results": sorted(rows, key=lambda row: -row["relevance_score"])}

    scores("warm up", ["once"])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    print(f"Ready: on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    server.run()


@contextmanager
def served(*command: str):
    """(address, process) of a server, once it is ready."""
    process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Ready: .*(http://\S+)", line):
                break
        else:
            raise RuntimeError(f"{' '.join(command)} did not start:\n{''.join(lines[-20:])}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # nobody reads its log
        with httpx.Client(base_url=found[1], trust_env=False) as client:
            while True:
                try:
                    client.post("/v1/rerank", json={"query": "ready", "documents": ["yes"]}, timeout=60)
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def ask(client: httpx.Client, asked: dict) -> tuple[int, float, list[float]]:
    """(status, seconds, scores in the order of the documents)."""
    start = time.perf_counter()
    answer = client.post("/v1/rerank", json=asked)
    seconds = time.perf_counter() - start
    if answer.status_code != 200:
        return answer.status_code, seconds, []
    rows = sorted(answer.json()["results"], key=lambda row: row["index"])
    return 200, seconds, [row["relevance_score"] for row in rows]


def is_right(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and all(abs(a - b) <= TOLERANCE for a, b in zip(found, wanted, strict=True))


def throughput(address: str, requests: list[dict], wanted: list[list[float]], clients: int, seconds: float) -> dict:
    """As many requests as the clients get answered; those begun in time count, with the time that they take."""
    times, wrong = [], 0
    start = time.perf_counter()

    def work(number: int) -> None:
        nonlocal wrong
        with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
            for place in range(number, 10**9, clients):
                if time.perf_counter() - start > seconds:
                    return
                status, taken, found = ask(client, requests[place % POOL])
                wrong += status != 200 or not is_right(found, wanted[place % POOL])
                times.append(taken)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    elapsed = time.perf_counter() - start
    cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    return {
        "requests_per_second": round(len(times) / elapsed, 3),
        "p50_ms": round(1000 * cuts[9]),
        "p95_ms": round(1000 * cuts[18]),
        "requests": len(times),
        "wrong": wrong,
    }


def overload(model: str, requests: list[dict], wanted: list[list[float]], rate: float, seconds: float) -> dict:
    """`rate` requests a second, answered or not."""
    with served("querit", "serve", model, "--port", "0", "--max-waiting", str(WAITING)) as (address, process):
        counts: dict[str, int] = {}
        refused, memory = [], []
        lock = threading.Lock()
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        client = httpx.Client(base_url=address, timeout=300, trust_env=False, limits=limits)

        def one(place: int) -> None:
            try:
                status, taken, found = ask(client, requests[place % POOL])
            except httpx.HTTPError as error:
                status, taken, found = 0, 0.0, []
                kind = type(error).__name__
            else:
                right = status == 200 and is_right(found, wanted[place % POOL])
                kind = "right" if right else "wrong" if status == 200 else str(status)
            with lock:
                counts[kind] = counts.get(kind, 0) + 1
                if status == 429:
                    refused.append(taken)

        start = time.perf_counter()
        with client, ThreadPoolExecutor(256) as pool:
            sent = 0
            while (now := time.perf_counter() - start) < seconds:
                while sent < now * rate:
                    pool.submit(one, sent)
                    sent += 1
                if len(memory) < now:
                    memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
                time.sleep(0.01)
        refused.sort()
        return {
            "requests_per_second": round(rate, 2),
            "seconds": seconds,
            "sent": sent,
            "answered": counts,
            "refused_p50_ms": round(1000 * statistics.median(refused), 1) if refused else None,
            "refused_p99_ms": round(1000 * refused[int(0.99 * (len(refused) - 1))], 1) if refused else None,
            "memory_mib": [round(memory[int(share * (len(memory) - 1))]) for share in (0, 0.25, 0.5, 0.75, 1)],
        }


def death(model: str, requests: list[dict], wanted: list[list[float]]) -> dict:
    """One of two processes is killed; what the next requests are answered, and how long until all is well."""
    command = ("querit", "serve", model, "--port", "0", "--devices", "cpu,cpu")
    with served(*command) as (address, process), httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
        assert is_right(ask(client, requests[0])[2], wanted[0])
        children = psutil.Process(process.pid).children(recursive=True)
        worker = next(child for child in children if "querit.devices" in " ".join(child.cmdline()))
        worker.kill()
        worker.wait()
        start, statuses = time.perf_counter(), []
        while not statuses or statuses[-1] != 200:
            status, _, found = ask(client, requests[1])
            statuses.append(status)
        return {
            "statuses": statuses,
            "right": is_right(found, wanted[1]),
            "seconds": round(time.perf_counter() - start, 1),
        }


def main(args: argparse.Namespace) -> None:
    import querit

    model = querit.named(args.model)
    ranker = querit.load(model)
    requests = requests_of(ranker.tokenizer)
    rankings = [ranker(asked["query"], asked["documents"]) for asked in requests]
    wanted = [[row["probability"] for row in sorted(rows, key=lambda row: row["index"])] for rows in rankings]
    del ranker
    module = "tests.bench.bench_serve"
    ways = {
        "querit serve": ("querit", "serve", model, "--port", "0"),
        "loop round the pipeline": (module, "--model", model, "--loop", "pipeline"),
        "loop round CrossEncoder": (module, "--model", model, "--loop", "CrossEncoder"),
    }
    found: dict = {
        "machine": machine(),
        "model": Path(model).name,
        "documents": DOCUMENTS,
        "tokens": TOKENS,
        "ways": {},
    }
    for name, command in ways.items():
        with served(*command) as (address, _):
            rows = {clients: throughput(address, requests, wanted, clients, args.seconds) for clients in args.clients}
        found["ways"][name] = rows
        print(name, json.dumps(rows), flush=True)
    most = max(args.clients)
    capacity = found["ways"]["querit serve"][most]["requests_per_second"]
    if args.overload_seconds:
        found["overload"] = overload(model, requests, wanted, 2 * capacity, args.overload_seconds)
        print("overload", json.dumps(found["overload"]), flush=True)
    found["death"] = death(model, requests, wanted)
    print("death", json.dumps(found["death"]))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30, help="For each number of clients.")
    parser.add_argument("--overload-seconds", type=float, default=600)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--loop", choices=["pipeline", "CrossEncoder"], help="Be such a server; for the bench itself.")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    if arguments.loop:
        loop(arguments.loop, arguments.model, arguments.port)
    else:
        main(arguments)
