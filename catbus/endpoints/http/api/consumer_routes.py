"""The operations of `/api/consumers`, by path and method."""

from __future__ import annotations

from ..http_response import ErrorAnswer
from ..operation import Access, Answer, Operation
from .consumers import (
    ConsumerDetails,
    ConsumerPath,
    ConsumersPage,
    ConsumersQuery,
    DeadLettersPage,
    DeadLettersQuery,
    DroppedConsumer,
    LettersReport,
    LettersRequest,
    ResetReport,
    ResetRequest,
    delete_dead_letters,
    drop_consumer,
    list_consumers,
    list_dead_letters,
    publish_dead_letters,
    reset_consumer,
    show_consumer,
)

_NO_CONSUMERS = Answer("The log is in memory, where it has no consumers.", ErrorAnswer)
_NO_CONSUMER = Answer("There is no such consumer, or the log is in memory.", ErrorAnswer)

CONSUMER_ROUTES: dict[str, dict[str, Operation]] = {
    "/api/consumers": {
        "GET": Operation(
            list_consumers,
            "The consumers, with their lag",
            {200: Answer("A page of them, in the order of their names.", ConsumersPage), 404: _NO_CONSUMERS},
            Access.ADMINISTRATOR,
            query=ConsumersQuery,
        )
    },
    "/api/consumers/{name}": {
        "GET": Operation(
            show_consumer,
            "A consumer, with the position of each partition",
            {200: Answer("The consumer.", ConsumerDetails), 404: _NO_CONSUMER},
            Access.ADMINISTRATOR,
            path=ConsumerPath,
        )
    },
    "/api/consumers/{name}/reset": {
        "POST": Operation(
            reset_consumer,
            "Move a consumer to another position",
            {
                200: Answer("It was moved.", ResetReport),
                404: _NO_CONSUMER,
                409: Answer("The log has no such position.", ErrorAnswer),
            },
            Access.ADMINISTRATOR,
            "Its dead letters stay, and it does not receive them again. While workers use it for more than two "
            "seconds, the answer is 503.",
            path=ConsumerPath,
            body=ResetRequest,
        )
    },
    "/api/consumers/{name}/delete": {
        "POST": Operation(
            drop_consumer,
            "Delete a consumer with its dead letters",
            {200: Answer("It was deleted.", DroppedConsumer), 404: _NO_CONSUMER},
            Access.ADMINISTRATOR,
            "While workers use it for more than two seconds, the answer is 503.",
            path=ConsumerPath,
        )
    },
    "/api/consumers/{name}/dead": {
        "GET": Operation(
            list_dead_letters,
            "The messages that workers of a consumer have rejected",
            {200: Answer("A page of them, in the order of their seqs.", DeadLettersPage), 404: _NO_CONSUMER},
            Access.ADMINISTRATOR,
            path=ConsumerPath,
            query=DeadLettersQuery,
        )
    },
    "/api/consumers/{name}/dead/delete": {
        "POST": Operation(
            delete_dead_letters,
            "Delete dead letters",
            {200: Answer("Those that existed were deleted.", LettersReport), 404: _NO_CONSUMER},
            Access.ADMINISTRATOR,
            path=ConsumerPath,
            body=LettersRequest,
        )
    },
    "/api/consumers/{name}/dead/publish": {
        "POST": Operation(
            publish_dead_letters,
            "Publish dead letters again, and delete them",
            {
                200: Answer("Those that existed were published and deleted, in one transaction.", LettersReport),
                404: _NO_CONSUMER,
                409: Answer("One of them cannot be published, so none was.", ErrorAnswer),
            },
            Access.ADMINISTRATOR,
            "Each is a new message of its channel, with a new seq and without a sender: every subscriber and every "
            "consumer of the channel gets it, also those that have processed it before.",
            path=ConsumerPath,
            body=LettersRequest,
        )
    },
}
