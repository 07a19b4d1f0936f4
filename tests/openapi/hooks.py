"""What schemathesis changes in the requests that it makes from the document. It loads this module by name."""

from __future__ import annotations

from typing import Any

import schemathesis  # type: ignore[import-not-found]  # in an environment of its own


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """Write integers without fraction, as the protocol requires. For a schema, 1.0 is an integer, too."""
    match body:
        case float() if body.is_integer():
            return int(body)
        case dict():
            return {name: map_body(context, value) for name, value in body.items()}
        case list():
            return [map_body(context, value) for value in body]
        case _:
            return body
