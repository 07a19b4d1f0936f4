"""A client without a session: publish, read and follow the log over HTTP, on asyncio and on Trio.

    from catbus.http import HttpClient

    async with HttpClient("https://bus.example.com", token=token) as client:
        await client.publish("orders.42", {"status": "paid"})

For scripts and serverless functions: it imports little, and has no task in the background. `catbus.connect` is for
programs that stay connected.
"""

from ..errors import ConflictError, Refused, Unavailable
from .http_client import HttpClient
from .message_streams import HttpMessage, HttpPage, MessageStream, MissingMessages

__all__ = [
    "ConflictError",
    "HttpClient",
    "HttpMessage",
    "HttpPage",
    "MessageStream",
    "MissingMessages",
    "Refused",
    "Unavailable",
]
