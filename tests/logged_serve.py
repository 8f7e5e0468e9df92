"""`transformers serve` as it is, with the names of requests in its log.

    python tests/logged_serve.py serve MODEL --port N

The server's access log has no request ids. Every request that generates writes ``received NAME`` when it came and
``answered NAME STATUS`` after the last byte of its answer, whether or not somebody was still there to read it.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any
from urllib.parse import unquote

from transformers.cli.serving import server

build = server.build_server


class Logged:
    """An ASGI application that logs the requests to another one. DELAY: seconds before each is handed on."""

    def __init__(self, app: Any) -> None:
        self.app, self.delay = app, float(os.environ.get("DELAY", "0"))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        name = unquote(dict(scope["headers"]).get(b"x-request-id", b"?").decode())
        status = 0

        async def logged_send(message: Any) -> None:
            nonlocal status
            await send(message)
            status = message.get("status", status)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                print("answered", name, status, flush=True)

        print("received", name, flush=True)
        await asyncio.sleep(self.delay)
        await self.app(scope, receive, logged_send)


if __name__ == "__main__":
    server.build_server = lambda *arguments, **named: Logged(build(*arguments, **named))
    from transformers.cli.transformers import main

    main()
