"""Calls a second with 64 at once, against a local server that takes 200 ms for each, beside what is possible.

    python scripts/benchmarks/synth_throughput.py [--calls 4000] [--concurrency 64] [--delay 0.2] [--stream]
    python scripts/benchmarks/synth_throughput.py --calls 100000 --delay 0.01     # does memory stay bounded?

The calls go as a stage of `psyche synth` makes them: items are read, asked about and written one after the other. The
server is a process of its own. Prints one JSON object; `share` is what the client reaches of concurrency / delay,
`rss_mib` the memory of this process after each tenth of the calls.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from psyche_jax.data.records import Passage
from psyche_jax.synth.calls import CallStore
from psyche_jax.synth.canned import completion
from psyche_jax.synth.client import Client
from psyche_jax.synth.config import BudgetSection, CallsSection, LlmSection
from psyche_jax.synth.pipeline import WINDOW
from psyche_jax.synth.stages import Outcome, Progress, outcomes, write_stage


def serve(port: "multiprocessing.Queue[int]", delay: float) -> None:
    """As little HTTP as it takes, so that the server is not what is measured."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-len")
                )
                request = json.loads(await reader.readexactly(length))
                await asyncio.sleep(delay)
                value = completion(request, "<think>想一想</think>\n答案：A")
                if request.get("stream"):
                    choice = {"index": 0, "finish_reason": "stop", "delta": value["choices"][0].pop("message")}
                    value = {**value, "object": "chat.completion.chunk", "choices": [choice]}
                    content = f"data: {json.dumps(value)}\n\ndata: [DONE]\n\n".encode()
                    kind = b"text/event-stream"
                else:
                    content, kind = json.dumps(value).encode(), b"application/json"
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(content))
                    + content
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def measure(llm: LlmSection, calls: int, concurrency: int, folder: Path) -> dict[str, Any]:
    """Seconds that all calls take, the processor time of this process within them, and its memory."""
    store = CallStore(folder / "calls.sqlite")
    client = Client([llm], CallsSection(concurrency=concurrency), BudgetSection(), store)
    process = psutil.Process()

    async def work(number: int) -> Outcome:
        question = f"{number}：" + "心理学" * 200
        reply = await client.reply(client.request("llm", "throughput@1", [{"role": "user", "content": question}]))
        outcome = Outcome()
        outcome.keep("passages", Passage(question + reply.text, "made up"))
        return outcome

    async def stage(name: str, numbers: range) -> list[int]:
        memory = []

        async def results() -> AsyncIterator[Outcome]:
            done = 0
            async for outcome in outcomes(numbers, work, WINDOW * concurrency):
                yield outcome
                done += 1
                if done % max(len(numbers) // 10, 1) == 0:
                    memory.append(process.memory_info().rss >> 20)

        progress = Progress("throughput", name, None, client)
        await write_stage(folder / name, name, ("passages",), results(), progress)
        return memory

    await stage("warm", range(-concurrency, 0))  # connections are made
    started, worked = time.perf_counter(), time.process_time()
    memory = await stage("measured", range(calls))
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    await client.close()
    store.close()
    return {"seconds": seconds, "cpu_ms_a_call": round(1000 * worked / calls, 3), "rss_mib": memory}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    port: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port, arguments.delay), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get()}/v1"
    llm = LlmSection("llm", "canned", url, key_env=None, stream=arguments.stream)
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(llm, arguments.calls, arguments.concurrency, Path(folder)))
    server.terminate()
    possible = arguments.concurrency / arguments.delay
    rate = arguments.calls / measured["seconds"]
    shape = {"concurrency": arguments.concurrency, "delay_seconds": arguments.delay, "calls": arguments.calls}
    rates = {"calls_per_second": round(rate, 1), "possible": round(possible, 1), "share": round(rate / possible, 3)}
    print(json.dumps({"what": "synth calls", "shape": shape, **measured, **rates}))


if __name__ == "__main__":
    main()
