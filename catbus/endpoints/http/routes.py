"""The HTTP paths of the WebSocket port, and the handlers that are too short for modules of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

from ...error_codes import ErrorCode
from ...errors import PeerError
from ...protocol import wire_messages as wire
from ..replica_interface import ReplicaInterface
from .api.channels import ChannelsQuery, ChannelsReport, list_channels
from .api.clients import (
    ClientPath,
    DisconnectReport,
    RevocationReport,
    RevokeRequest,
    disconnect_client,
    revoke_client,
)
from .api.consumer_routes import CONSUMER_ROUTES
from .api.deliveries import (
    ClientChannelPath,
    ClientMessagePath,
    DeliveriesReport,
    explain_channel,
    explain_message,
)
from .api.presence import PresencePage, PresenceQuery, list_members
from .api.replicas import ReplicasReport, list_replicas
from .api.retained import RetainedMessagesPage, RetainedQuery, list_retained
from .api.sessions import SessionsPage, SessionsQuery, list_sessions
from .cors import preflight_headers
from .discovery_document import DiscoveryDocument, discovery_document
from .error_responses import error_response
from .event_stream import CONTENT_TYPE, HEADERS, EventsHeaders, EventsQuery, StreamedEvent
from .forwarded_headers import forwarded_origin
from .http_request import HttpRequest, bearer_token
from .http_response import UPGRADE_REQUIRED, ErrorAnswer, HttpResponse, http_error, json_response, text_response
from .messages_request import MessagesAnswer, MessagesQuery, messages
from .openapi_document import openapi_document
from .operation import Access, Answer, Handler, Operation
from .publish_request import PUBLISH_ANSWER, PublishHeaders, publish
from .query import decode_percent
from .static_files import console_files, javascript_modules, serve_console, serve_javascript


async def health(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer exactly `ok`, which programs compare with, while the process runs."""
    return HttpResponse(200, b"ok")


async def ready(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer whether a load balancer should send new clients to this replica.

    An unreachable database and a gap in the log do not change the answer: all replicas share them, and taking all
    replicas out of rotation would turn a pause into an outage.
    """
    match replica.readiness:
        case "ready":
            return text_response(200, "ready")
        case "degraded":
            return text_response(200, f"degraded: {replica.log.problem}")
        case other:
            return text_response(503, other)


async def metrics(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with the metrics in the Prometheus format, of all workers if there are any."""
    found = await replica.scrape_all()
    if found is None:
        return http_error(503, "this replica exports no metrics")
    body, content_type = found
    return HttpResponse(200, body, type=content_type.encode())


async def status(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with the state of this replica, to a client that may read every channel."""
    try:
        identity = await replica.authenticate(bearer_token(request), request.network)
        if not identity.grants.may_read("*"):
            raise PeerError(ErrorCode.UNAUTHORIZED, "the status needs a grant to read `*`")
    except PeerError as error:
        return error_response(replica, error)
    return json_response(await replica.report_all(), headers=[(b"cache-control", b"no-store")])


async def discover(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Where the other ways in are, by the name under which this one was reached."""
    secure, host = forwarded_origin(request, tls=replica.config.websocket.tls)
    if not host:
        return http_error(400, "the request has no host")
    made = None if replica.certificates is None else replica.certificates.development(datetime.now(UTC))
    return json_response(
        discovery_document(host, replica.webtransport_port, made, secure=secure),
        headers=[(b"cache-control", b"no-store")],
    )


async def openapi(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with the description of all paths."""
    return HttpResponse(200, _document(), type=b"application/json")


@cache
def _document() -> bytes:
    return wire.to_json(openapi_document(ROUTES)) + b"\n"


async def websocket(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Reject a request without an upgrade on a path that serves only WebSocket."""
    return UPGRADE_REQUIRED


async def events(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer a HEAD request about the event stream, and reject a GET request with a body."""
    if request.method != "HEAD":
        return http_error(400, "a request for events has no body")
    return HttpResponse(200, b"", HEADERS, CONTENT_TYPE)


ROUTES: dict[str, dict[str, Operation]] = {
    "/health": {"GET": Operation(health, "Whether the process is alive", {200: Answer("`ok`.")})},
    "/ready": {
        "GET": Operation(
            ready,
            "Whether a load balancer should send new clients to this replica",
            {
                200: Answer("`ready`, or `degraded: ` with the reason."),
                503: Answer("`starting` or `draining`."),
            },
        )
    },
    "/status": {
        "GET": Operation(
            status,
            "The state of this replica, for people",
            {200: Answer("Fields may change with any release.", dict[str, Any])},
            Access.READER,
        )
    },
    "/metrics": {
        "GET": Operation(
            metrics,
            "The metrics, for Prometheus",
            {200: Answer("Prometheus's text format."), 503: Answer("This replica exports no metrics.", ErrorAnswer)},
        )
    },
    "/catbus.js": {
        "GET": Operation(
            serve_javascript,
            "The JavaScript client",
            {
                200: Answer("A module. Its imports are below `/catbus/`.", media="text/javascript"),
                304: Answer("`If-None-Match` names the `ETag` of the module."),
            },
        )
    },
    "/console": {
        "GET": Operation(
            serve_console,
            "The console, for people with a browser",
            {
                200: Answer("A page. Its files are below `/console/`.", media="text/html"),
                304: Answer("`If-None-Match` names the `ETag` of the file."),
            },
        )
    },
    "/.well-known/catbus": {
        "GET": Operation(
            discover,
            "The URLs of the broker, by the host of the request",
            {200: Answer("The URLs.", DiscoveryDocument)},
        )
    },
    "/openapi.json": {
        "GET": Operation(openapi, "This document", {200: Answer("An OpenAPI 3.1 document.", dict[str, Any])})
    },
    "/publish": {
        "POST": Operation(
            publish,
            "Publish a message, or an array of messages in order",
            {
                200: Answer("Each message is committed, or passed on if it is ephemeral.", PUBLISH_ANSWER),
                409: Answer(
                    "The channel's retained message is not the expected one (`conflict`), or the `Idempotency-Key` was "
                    "used for another message.",
                    PUBLISH_ANSWER,
                ),
                504: Answer("Unknown: perhaps messages are committed.", PUBLISH_ANSWER),
            },
            Access.CLIENT,
            "The answer to an array is an array. If messages are rejected, the status is that of the first one; the "
            "others are published all the same.",
            headers=PublishHeaders,
            body=wire.Publish | list[wire.Publish],
            error_body=PUBLISH_ANSWER,
        )
    },
    "/events": {
        "GET": Operation(
            events,
            "Subscribe to messages as server-sent events",
            {
                200: Answer(
                    "The events. There is none if an `EventSource` is to try again.", StreamedEvent, "text/event-stream"
                )
            },
            Access.CLIENT,
            "A token may also be the parameter `access_token`. `Last-Event-ID` counts more than `since`.",
            query=EventsQuery,
            headers=EventsHeaders,
        )
    },
    "/messages": {
        "GET": Operation(
            messages,
            "Read a page of messages, forward from a cursor or backward",
            {
                200: Answer("The messages, the oldest first, and the cursor from which to read on", MessagesAnswer),
            },
            Access.CLIENT,
            "A token may also be the parameter `access_token`. Without `since`, `wait` and `before`, the page has the "
            "newest messages.",
            query=MessagesQuery,
        )
    },
    "/ws": {
        "GET": Operation(
            websocket,
            "WebSocket",
            {101: Answer("The WebSocket."), 426: Answer("The request has no upgrade to WebSocket.", ErrorAnswer)},
        )
    },
    "/api/replicas": {
        "GET": Operation(
            list_replicas,
            "All replicas of the broker",
            {200: Answer("The replicas.", ReplicasReport)},
            Access.ADMINISTRATOR,
        )
    },
    "/api/sessions": {
        "GET": Operation(
            list_sessions,
            "The open sessions of this replica",
            {200: Answer("A page of them, the oldest first.", SessionsPage)},
            Access.ADMINISTRATOR,
            query=SessionsQuery,
        )
    },
    "/api/channels": {
        "GET": Operation(
            list_channels,
            "The busiest channels of this replica, and its subscriptions by pattern",
            {200: Answer("The largest numbers first.", ChannelsReport)},
            Access.ADMINISTRATOR,
            query=ChannelsQuery,
        )
    },
    "/api/retained": {
        "GET": Operation(
            list_retained,
            "The retained messages",
            {200: Answer("A page of them, in the order of their channels.", RetainedMessagesPage)},
            Access.ADMINISTRATOR,
            query=RetainedQuery,
        )
    },
    "/api/presence": {
        "GET": Operation(
            list_members,
            "The members of channels, on all replicas",
            {200: Answer("A page of them, in the order of their channels.", PresencePage)},
            Access.ADMINISTRATOR,
            query=PresenceQuery,
        )
    },
    **CONSUMER_ROUTES,
    "/api/clients/{client_id}/messages/{seq}": {
        "GET": Operation(
            explain_message,
            "Whether a message was delivered to a client, and why not, as far as this replica knows",
            {200: Answer("What became of it for the open sessions of the client on this replica.", DeliveriesReport)},
            Access.ADMINISTRATOR,
            path=ClientMessagePath,
        )
    },
    "/api/clients/{client_id}/channels/{channel}": {
        "GET": Operation(
            explain_channel,
            "Whether a client receives the messages of a channel, also ephemeral ones",
            {200: Answer("What becomes of them for its open sessions on this replica.", DeliveriesReport)},
            Access.ADMINISTRATOR,
            path=ClientChannelPath,
        )
    },
    "/api/clients/{client_id}/disconnect": {
        "POST": Operation(
            disconnect_client,
            "Close all sessions of a client",
            {200: Answer("They are closed with 4505, those of other replicas within a second.", DisconnectReport)},
            Access.ADMINISTRATOR,
            "The client may connect again, and the clients of Catbus do so by themselves.",
            path=ClientPath,
        )
    },
    "/api/clients/{client_id}/revoke": {
        "POST": Operation(
            revoke_client,
            "Revoke the tokens of a client that were issued until now, and close the sessions that use them",
            {200: Answer("Sessions are closed with 4403, those of other replicas within a second.", RevocationReport)},
            Access.ADMINISTRATOR,
            "Every replica refuses these tokens from then on, over every transport. The client needs a newer one.",
            path=ClientPath,
            body=RevokeRequest,
            body_required=False,
        )
    },
}
"""The operations of each path, by method. A segment `{name}` of a path is a parameter: a text without a slash."""

_TEMPLATES = [
    (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path))), path) for path in ROUTES if "{" in path
]
"""The paths with parameters, each as an expression."""


def match_route(path: str) -> tuple[str, Mapping[str, str]] | None:
    """Return the route that serves a path, and the parameters in the path as they were sent.

    All modules of the JavaScript client share one route, and so do the files of the console. Paths with parameters
    share one, too, so that there are few routes whatever clients request.
    """
    if path in ROUTES and "{" not in path:
        return path, {}
    if path in javascript_modules():
        return "/catbus.js", {}
    if path in console_files():
        return "/console", {}
    for expression, route in _TEMPLATES:
        if match := expression.fullmatch(path):
            return route, match.groupdict()
    return None


def route_of(path: str) -> str | None:
    """Return the route that serves a path."""
    found = match_route(path)
    return None if found is None else found[0]


def find_handler(method: str, path: str) -> Handler | HttpResponse:
    """Return the handler of a request, or a 404 or 405 response. Each path serves OPTIONS, and with GET also HEAD."""
    found = match_route(path)
    if found is None:
        return http_error(404)
    route, parameters = found
    allowed = ", ".join([*("GET, HEAD" if name == "GET" else name for name in ROUTES[route]), "OPTIONS"]).encode()
    if method == "OPTIONS":
        return partial(_answer_options, allowed)
    operation = ROUTES[route].get("GET" if method == "HEAD" else method)
    if operation is None:
        return http_error(405, headers=[(b"allow", allowed)])
    return partial(_handle_parameters, operation.handler, parameters) if parameters else operation.handler


async def _answer_options(allowed: bytes, replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with the methods of a path, and to a browser's preflight request with what a page may send."""
    origins = replica.config.websocket.allowed_origins
    return HttpResponse(204, b"", [(b"allow", allowed), *preflight_headers(request, allowed, origins)])


async def _handle_parameters(
    handler: Handler, parameters: Mapping[str, str], replica: ReplicaInterface, request: HttpRequest
) -> HttpResponse:
    try:
        decoded = {name: decode_percent(text, f"`{name}`") for name, text in parameters.items()}
    except PeerError as error:
        return error_response(replica, error)
    return await handler(replica, replace(request, parameters=decoded))
