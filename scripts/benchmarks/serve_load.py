"""Many clients at once against `psyche serve`: every request answered or refused with 429, none lost.

    psyche serve runs/demo/model --set limits.per_minute=1000000 &
    python scripts/benchmarks/serve_load.py http://127.0.0.1:8000 --clients 64 --seconds 300 --pid $!

Prints one JSON object and fails if a request was lost or failed otherwise.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import httpx
import psutil


async def client(http: httpx.AsyncClient, number: int, model: str, until: float, counts: Counter[str]) -> None:
    """Ask until the time is up, streamed and whole in turn; wait a moment after a 429."""
    chance = random.Random(number)
    while time.monotonic() < until:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "心理学" * chance.randint(1, 20)}],
            "max_tokens": chance.randint(1, 32),
            "stream": chance.random() < 0.5,
            "temperature": chance.choice([0, 1]),
        }
        counts["sent"] += 1
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = [line async for line in answer.aiter_lines()]
        except httpx.HTTPError as error:
            counts[f"lost: {type(error).__name__}"] += 1
            continue
        whole = answer.status_code == 200 and (not body["stream"] or "data: [DONE]" in lines)
        refused = answer.status_code == 429
        counts["answered" if whole else "refused" if refused else f"failed: {answer.status_code}"] += 1
        if refused:
            await asyncio.sleep(chance.uniform(0.05, 0.3))


async def load(address: str, clients: int, seconds: float, process: psutil.Process | None) -> dict[str, Any]:
    """Run all clients; what became of their requests, and the server's memory (MiB) at each tenth of the time."""
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        start = time.monotonic()
        running = [
            asyncio.create_task(client(http, number, model, start + seconds, counts)) for number in range(clients)
        ]
        memory = []
        for tenth in range(1, 11):
            await asyncio.sleep(start + seconds * tenth / 10 - time.monotonic())
            memory += [round(process.memory_info().rss / 2**20)] if process else []
        await asyncio.gather(*running)
        taken = time.monotonic() - start
    result: dict[str, Any] = {"clients": clients, "seconds": round(taken, 1), **dict(sorted(counts.items()))}
    if memory:
        result["rss_mib"] = memory
    return result


def main() -> int:
    """Returns 1 if a request was neither answered nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the server, without /v1")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    arguments = parser.parse_args()
    process = psutil.Process(arguments.pid) if arguments.pid else None
    result = asyncio.run(load(arguments.address, arguments.clients, arguments.seconds, process))
    print(json.dumps(result))
    return 0 if result["sent"] == result.get("answered", 0) + result.get("refused", 0) else 1


if __name__ == "__main__":
    sys.exit(main())
