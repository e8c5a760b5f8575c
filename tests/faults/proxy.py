"""A faulty S3 server: a proxy on loopback that answers some requests with errors, cuts connections, delays and repeats.

It stands between strata and a real server. Which request meets which fault is drawn from a seeded generator; `FaultyProxy.counts` says
how many requests came and what happened to them.
"""

import asyncio
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Self

import aiohttp
import numpy as np
from aiohttp import web

REFUSALS = {
    "InternalError": 500,
    "SlowDown": 503,
    "AccessDenied": 403,
    "RequestTimeout": 400,
    "InvalidAccessKeyId": 403,
}
"""Answers without the server, by the store's word for them."""

MIX = {
    "InternalError": 0.15,
    "SlowDown": 0.15,
    "AccessDenied": 0.1,
    "RequestTimeout": 0.1,
    "cut": 0.15,
    "lost": 0.15,
    "twice": 0.15,
    "late": 0.05,
}
"""Shares of the kinds among the faults. `cut` ends in the middle of the body, `lost` serves the request and gives no answer,
`twice` sends it to the server twice and gives the second answer, `late` waits."""

LATE_SECONDS = 0.5
MAX_BODY = 1 << 31
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}

Choose = Callable[[web.Request], str | None]


def mixed(share: float, seed: int, mix: Mapping[str, float] = MIX) -> Choose:
    """That share of the requests fails, in the mix's proportions."""
    rng = np.random.default_rng(seed)
    kinds = list(mix)
    weights = np.array([mix[kind] for kind in kinds]) / sum(mix.values())
    return lambda _: str(rng.choice(kinds, p=weights)) if rng.random() < share else None


def bursts(kind: str, seconds: float, every: float) -> Choose:
    """All requests fail for the first seconds of every period."""
    start = time.monotonic()
    return lambda _: kind if (time.monotonic() - start) % every < seconds else None


class FaultyProxy:
    """Serves while the context lasts.

    Args:
        endpoint: The real server.
        choose: Names the fault that a request meets, or none; may be exchanged at any time.
    """

    def __init__(self, endpoint: str, choose: Choose) -> None:
        self.choose = choose
        self.counts: Counter[str] = Counter()
        self.url = ""
        self._endpoint = endpoint
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self._loop.close()

    @property
    def faults(self) -> int:
        return self.counts.total() - self.counts["requests"]

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._answer)
        async with aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)
        ) as self._client:
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            self.url = f"http://{host}:{port}"
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self.choose(request)
        self.counts["requests"] += 1
        if fault is not None:
            self.counts[fault] += 1
        if fault in REFUSALS:
            return _refusal(fault, request)
        if fault == "late":
            await asyncio.sleep(LATE_SECONDS)
        if fault == "twice":
            await self._forward(request, body)
        status, headers, content = await self._forward(request, body)
        if fault == "lost":
            return _hang_up(request)
        if fault == "cut":
            return await _half(request, status, headers, content)
        return web.Response(status=status, headers=headers, body=content or None)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        headers["Content-Length"] = str(len(body))
        url = f"{self._endpoint}{request.raw_path}"
        async with self._client.request(
            request.method,
            aiohttp.client.URL(url, encoded=True),
            headers=headers,
            data=io.BytesIO(body) if body else None,
        ) as answer:
            content = await answer.read()
            keep = HOP_BY_HOP - {"content-length"} if request.method == "HEAD" else HOP_BY_HOP
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in keep}
            return answer.status, kept, content


def _refusal(code: str, request: web.Request) -> web.Response:
    xml = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the test</Message></Error>'
    body = None if request.method == "HEAD" else xml.encode()
    return web.Response(status=REFUSALS[code], body=body, content_type="application/xml")


def _hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _half(
    request: web.Request, status: int, headers: Mapping[str, str], content: bytes
) -> web.StreamResponse:
    if not content:
        return _hang_up(request)
    answer = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(content))})
    await answer.prepare(request)
    await answer.write(content[: len(content) // 2])
    return _hang_up(request)


class CountingProxy(FaultyProxy):
    """Passes everything on after a delay, and counts what it passes.

    Args:
        endpoint: The real server.
        delay_s: Of every request.
    """

    def __init__(self, endpoint: str, delay_s: float = 0.0) -> None:
        super().__init__(endpoint, lambda _: None)
        self._delay_s = delay_s
        self._open = 0

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        # Requests that come while none is open had to wait for the answers of those before.
        self.counts["rounds"] += self._open == 0
        self._open += 1
        try:
            await asyncio.sleep(self._delay_s)
            answer = await super()._answer(request)
        finally:
            self._open -= 1
        self.counts["bytes"] += len(getattr(answer, "body", None) or b"")
        return answer
