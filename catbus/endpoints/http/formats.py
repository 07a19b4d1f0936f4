"""JSON Schemas of texts that have a form, for the structs of requests. Others check these texts. Pure."""

from __future__ import annotations

from typing import Any

from ...protocol.channels import MAX_LENGTH, MAX_SEGMENTS

_SEGMENT = "[A-Za-z0-9_-]+"

CHANNEL: dict[str, Any] = {
    "maxLength": MAX_LENGTH,
    "pattern": rf"^[A-Za-z0-9-][A-Za-z0-9_-]*(\.{_SEGMENT}){{0,{MAX_SEGMENTS - 1}}}$",
}
"""A channel that clients may publish to."""

PATTERN: dict[str, Any] = {
    "maxLength": MAX_LENGTH,
    "pattern": rf"^(\*|{_SEGMENT}(\.{_SEGMENT}){{0,{MAX_SEGMENTS - 2}}}(\.({_SEGMENT}|\*))?)$",
}
"""A pattern."""

_CURSOR = r"[0-9]{1,18}(\.[0-9a-zA-Z_-]{1,64})?"

CURSOR: dict[str, Any] = {"pattern": f"^{_CURSOR}$"}
"""A position in the log, `SEQ` or `SEQ.EPOCH`. The largest seqs have a digit more."""

OPTIONAL_CURSOR: dict[str, Any] = {"pattern": f"^({_CURSOR})?$"}
"""The same, or nothing."""
