"""`docs/authentication.md`: the broker accepts the tokens that its applications make, with the grants they name."""

from __future__ import annotations

import subprocess
from base64 import b64decode
from pathlib import Path

import httpx
import msgspec
import pytest

from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator
from tests.programs import find_program
from tests.test_readme import examples

PAGE = Path(__file__).parent.parent / "docs" / "authentication.md"
SECRET = "a secret of the application and the broker"
(FASTAPI,) = examples(PAGE, "python fastapi")
(DJANGO,) = examples(PAGE, "python django")
(NODE,) = examples(PAGE, "js node")
(EXPRESS,) = examples(PAGE, "js express")
GRANTS = Grants(read=("room.*", "user.alice.*"), write=("room.*",))


def check(token: str) -> None:
    authenticator = Authenticator([SECRET])
    claims = msgspec.json.decode(b64decode(token.split(".")[1] + "==", altchars=b"-_"))
    assert claims["exp"] - claims["iat"] == 600
    identity = authenticator.verify(token, claims["iat"] + 1)
    assert (identity.client_id, identity.grants, identity.expires) == ("alice", GRANTS, claims["exp"])


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_tokens_of_the_fastapi_application_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_SECRET", SECRET)
    module: dict[str, object] = {}
    exec(FASTAPI, module)
    transport = httpx.ASGITransport(app=module["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://application") as client:
        assert (await client.post("/catbus-token")).status_code == 401
        response = await client.post("/catbus-token", headers={"Cookie": "user=alice"})
        assert response.headers["content-type"].startswith("text/plain")
        check(response.text)


def test_django_makes_the_same_claims() -> None:
    """Django is not among what the tests install, so its view is compiled and compared, and does not run."""
    compile(DJANGO, str(PAGE), "exec")
    start, end = "    grants = {", "    token ="
    view = DJANGO[DJANGO.index(start) : DJANGO.index(end)]
    assert view in FASTAPI


def test_tokens_of_node_are_valid(tmp_path: Path) -> None:
    (tmp_path / "token.mjs").write_text(NODE)
    node = find_program("nodejs", "node")
    script = "import { catbusToken } from './token.mjs'; console.log(catbusToken('alice'))"
    done = subprocess.run(
        [node, "--input-type=module", "--eval", script],
        cwd=tmp_path,
        env={"CATBUS_SECRET": SECRET},
        capture_output=True,
        text=True,
        check=True,
    )
    check(done.stdout.strip())


def test_express_route_parses(tmp_path: Path) -> None:
    (tmp_path / "route.mjs").write_text(EXPRESS)
    subprocess.run([find_program("nodejs", "node"), "--check", "route.mjs"], cwd=tmp_path, check=True)
