"""`catbus token`: show the claims of a token, and whether a broker with this configuration accepts it."""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import trio

from ...auth.grants import Grants
from ...auth.jwt_keys import JwtKey
from ...auth.role_tokens import role_handle, role_key
from ...auth.token_errors import RejectionReason, TokenRejected, format_time
from ...auth.tokens import MAX_TOKEN, Authenticator
from ...config import Config, is_url, load, redact_url
from ...errors import ConfigError, Unavailable
from ...protocol.wire_messages import UNDECODABLE, to_json
from ..development_credentials import read_secret
from ..shared_options import config_option, state_option

SIGNATURE_REASONS = frozenset(
    {RejectionReason.MALFORMED, RejectionReason.ALGORITHM, RejectionReason.KEY, RejectionReason.SIGNATURE}
)
"""Reasons for which no configured secret or key verifies the signature."""

TIME_CLAIMS = ("iat", "nbf", "exp")


@click.group("token", short_help="Show the claims of a token, and why it is rejected.", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Show the claims of a token, and why a broker rejects it.

    \b
    Examples:
      catbus token show "$TOKEN"
      catbus token show --config catbus.toml < token.txt
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command("show", short_help="Show a token.")
@click.argument("token", required=False)
@config_option
@state_option
@click.option("--secret", help="Check the signature with this secret. CATBUS_SECRET keeps it off the command line.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
def show(token: str | None, config: Path | None, state: str | None, secret: str | None, as_json: bool) -> None:
    """Show the claims of TOKEN, its grants, its expiry, and whether a broker accepts it.

    Without TOKEN, or with "-", it is read from stdin, which keeps it off the command line. The signature is checked
    with --secret, else with the secrets and keys of the environment and of the file of --config, else with the
    development secret of this user. No secret is shown. Revocations are not looked up. Exits with 1 if the token is
    rejected.

    \b
    Examples:
      catbus token show "$TOKEN"
      echo "$TOKEN" | catbus token show --json | jq .detail
      CATBUS_SECRET=... catbus token show "$TOKEN"
    """
    # Read one byte more than the maximum, so that a token that is too long is rejected as such.
    text = sys.stdin.read(MAX_TOKEN + 2).strip() if token in (None, "-") else str(token).strip()
    if not text:
        raise click.UsageError("no token is given: pass it as an argument or on stdin")
    found = examine_token(text, load(config, os.environ, {"state": state}), secret, time.time())
    click.echo(to_json(found).decode() if as_json else "\n".join(describe_token(found, time.time())))
    if found["accepted"] is False:
        raise click.exceptions.Exit(1)


def examine_token(token: str, config: Config, secret: str | None, now: float) -> dict[str, Any]:
    """Return everything known about a token, in the form of --json. `accepted` is None if it cannot be decided here."""
    key = role_key(token)
    if key is not None:
        detail = "its grants are in the database of the brokers: `catbus role show` shows them"
        return {"kind": "role", "role": role_handle(key), "signature": "none", "accepted": None, "detail": detail}
    header, claims = decode_parts(token)
    found: dict[str, Any] = {
        "kind": _token_kind(token, claims),
        **({"header": header} if header else {}),
        "claims": claims,
    }
    if (grants := decode_grants(claims)) is not None:
        found |= {"read": grants.read, "write": grants.write}
    secrets = (secret,) if secret else config.auth.secrets
    if not secrets and not config.auth.jwt and (kept := read_secret(config.state_directory)):
        secrets = (kept,)
    keys = [_read_key_file(Path(file)) for file in config.auth.jwt if not is_url(file)]
    authenticator = Authenticator(
        secrets,
        admin_key=config.auth.admin_key,
        jwt_keys=keys,
        issuers=config.auth.issuer,
        audiences=config.auth.audience,
        leeway=config.auth.leeway,
    )
    urls = [url for url in config.auth.jwt if is_url(url)]
    if urls and found["kind"] == "JWT":
        authenticator.replace_fetched_keys(trio.run(_fetch_keys, urls))
    try:
        identity = authenticator.verify(token, now)
    except TokenRejected as error:
        if error.reason in SIGNATURE_REASONS and not secrets and not config.auth.jwt and claims is not None:
            detail = "no secret and no key is configured: set CATBUS_SECRET, or give --config"
            return {**found, "signature": "unchecked", "accepted": None, "detail": detail}
        signature = "invalid" if error.reason in SIGNATURE_REASONS else "valid"
        refusal = {"accepted": False, "code": error.code, "reason": error.reason, "detail": error.detail}
        return {**found, "signature": signature, **refusal}
    if identity.admin:
        return {"kind": "admin key", "signature": "none", "accepted": True, "read": ["*"], "write": ["*"]}
    return {**found, "signature": "valid", "accepted": True}


def describe_token(found: Mapping[str, Any], now: float) -> list[str]:
    """Format the result of `examine_token` as lines of text."""
    lines = [("token", {"sub": "sub- token"}.get(found["kind"], found["kind"]))]
    if found["kind"] == "role":
        lines.append(("role", found["role"]))
    for name, value in (found.get("header") or {}).items():
        lines.append((f"header {name}", _format_claim(value)))
    for name, value in (found.get("claims") or {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        lines.append(
            (
                name,
                f"{format_time(value)}, {describe_time_difference(value - now)}"
                if name in TIME_CLAIMS and number
                else _format_claim(value),
            )
        )
    if "read" in found:
        lines.append(("allows", str(Grants(tuple(found["read"]), tuple(found["write"])))))
    lines.append(("signature", found["signature"]))
    match found["accepted"]:
        case True:
            lines.append(("verdict", "accepted"))
        case False:
            lines.append(("verdict", f"rejected as {found['code']} ({found['reason']}): {found['detail']}"))
        case _:
            lines.append(("verdict", f"undecided: {found['detail']}"))
    return [f"{name:<12}{text}" for name, text in lines]


def describe_time_difference(seconds: float) -> str:
    """Describe a time difference in words: `in 3 hours`, `40 seconds ago`."""
    size, unit = next((size, unit) for size, unit in _UNITS if abs(seconds) >= 2 * size or size == 1)
    number = f"{abs(seconds) / size:.0f} {unit}s"
    return f"{number} ago" if seconds < 0 else f"in {number}"


_UNITS = ((86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
"""A unit is used for at least two of it."""


def decode_parts(token: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Decode the header and the claims, or None for a part that cannot be decoded. Nothing is verified."""
    if token.startswith("sub-"):
        return None, _decode_object(token[4:].partition(".")[0])
    parts = token.split(".")
    return (_decode_object(parts[0]), _decode_object(parts[1])) if len(parts) == 3 else (None, None)


def decode_grants(claims: Mapping[str, Any] | None) -> Grants | None:
    """Return the grants of unverified claims, or None if they are malformed."""
    try:
        if claims is None or "catbus" not in claims:
            given = msgspec.convert(claims, _SubTokenClaims).grants.grants
            read = [one.pattern for one in given if one.grant_type in ("read", "all")]
            return Grants(tuple(read), tuple(one.pattern for one in given if one.grant_type in ("write", "all")))
        access = msgspec.convert(claims["catbus"], _CatbusClaim)
        return Grants(access.read, access.write)
    except msgspec.ValidationError:
        return None


class _SubTokenGrant(msgspec.Struct):
    grant_type: str
    pattern: str


class _SubTokenGrants(msgspec.Struct):
    grants: list[_SubTokenGrant]


class _SubTokenClaims(msgspec.Struct):
    grants: _SubTokenGrants


class _CatbusClaim(msgspec.Struct):
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


def _token_kind(token: str, claims: object) -> str:
    if token.startswith("sub-"):
        return "sub"
    return "unknown" if claims is None else "JWT"


def _decode_object(text: str) -> dict[str, Any] | None:
    try:
        data = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(data, type=dict[str, Any])
    except (*UNDECODABLE, binascii.Error, ValueError):
        return None


def _format_claim(value: object) -> str:
    """Format a claim in one line. Text with control characters is escaped as JSON."""
    return value if isinstance(value, str) and value.isprintable() else to_json(value).decode()


async def _fetch_keys(urls: Sequence[str]) -> list[JwtKey]:
    # The HTTP client takes 0.15 s to import.
    from ...auth.key_sets import fetch_key_set

    context, keys = ssl.create_default_context(), list[JwtKey]()
    for url in urls:
        try:
            keys += await fetch_key_set(url, context)
        except Unavailable as error:
            raise Unavailable(f"auth.jwt: {redact_url(url)} cannot be fetched: {error}") from None
    return keys


def _read_key_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"auth.jwt: {file} cannot be read: {error}") from None
