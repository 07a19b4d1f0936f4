"""The role store: roles are created, shown, changed and deleted atomically."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catbus.auth.grants import Grants
from catbus.auth.role_tokens import make_role_token, role_key
from catbus.config import DatabaseSettings
from catbus.errors import ConfigError, PeerError, Unavailable
from catbus.postgres.access import migrations
from catbus.postgres.roles.role_store import Role, RoleError, RoleStore, open_roles
from catbus.protocol.channels import MAX_LENGTH, MAX_SEGMENTS, check_pattern
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, wait_until

GRANTS = Grants(("a.*", "b"), ("a.c",))


@asynccontextmanager
async def roles_of(url: str) -> AsyncIterator[RoleStore]:
    with trio.fail_after(60):
        async with open_sql(url) as connection:
            yield RoleStore(connection)


async def test_role_is_stored_as_created(database_url: str) -> None:
    async with roles_of(database_url) as roles:
        token, role = await roles.create("ci", GRANTS)
        assert role.key == role_key(token)
        assert role.handle == role.key.hex()[:12]
        assert (role.client_id, role.grants) == ("ci", GRANTS)
        assert abs(datetime.now(UTC) - role.created) < timedelta(minutes=1)
        assert await roles.show(token) == await roles.show(role.handle) == role
        _, bare = await roles.create(None, Grants())
        assert (bare.client_id, bare.grants) == (None, Grants())
        assert await roles.list() == [role, bare]


async def test_database_does_not_contain_the_token(database_url: str) -> None:
    async with roles_of(database_url) as roles:
        token, _ = await roles.create("ci", GRANTS)
    async with open_sql(database_url) as sql:
        kept = str(await sql.fetch("SELECT r::text, g::text FROM catbus.roles AS r, catbus.role_grants AS g"))
    assert "ci" in kept
    assert token not in kept and token.removeprefix("role-") not in kept


async def test_deleted_role_is_gone_with_its_grants(database_url: str) -> None:
    async with roles_of(database_url) as roles:
        token, role = await roles.create("ci", GRANTS)
        _, other = await roles.create("other", GRANTS)
        assert await roles.delete(token) == role
        assert await roles.list() == [other]
        with pytest.raises(RoleError, match="no role has this token") as caught:
            await roles.delete(token)
        assert token not in str(caught.value)
        with pytest.raises(RoleError, match=f"there is no role {role.handle}"):
            await roles.show(role.handle)
    async with open_sql(database_url) as sql:
        assert await sql.fetch("SELECT DISTINCT role FROM catbus.role_grants") == [(other.key,)]


async def test_grant_adds_patterns_and_returns_the_role(database_url: str) -> None:
    async with roles_of(database_url) as roles:
        token, role = await roles.create("ci", Grants(("a",)))
        for _ in range(2):
            now = await roles.grant(role.handle, Grants(("b.*", "a"), ("a",)))
            assert now == await roles.show(token)
            assert now.grants == Grants(("a", "b.*"), ("a",))


async def test_revoke_removes_exactly_the_named_patterns(database_url: str) -> None:
    async with roles_of(database_url) as roles:
        _, role = await roles.create("ci", Grants(("a.*", "a.b"), ("a.*",)))
        left = await roles.revoke(role.handle, Grants(("a.*",), ("a.*",)))
        assert left == await roles.show(role.handle)
        assert left.grants == Grants(("a.b",))


async def test_missing_grant_cannot_be_revoked_and_no_other_one_is(database_url: str) -> None:
    async with roles_of(database_url) as roles:
        _, role = await roles.create("ci", Grants(("a.*", "b"), ("c",)))
        with pytest.raises(RoleError) as caught:
            await roles.revoke(role.handle, Grants(("a.*", "a.b"), ("b",)))
        assert str(caught.value) == (
            f"the role {role.handle} has no such grant: read a.b and write b; what it has: read a.*, b and write c"
        )
        assert await roles.show(role.handle) == role
        # The row is not locked any more, and the connection is usable.
        async with roles_of(database_url) as other:
            await other.grant(role.handle, Grants(("d",)))
        assert (await roles.revoke(role.handle, Grants(("b", "d")))).grants == Grants(("a.*",), ("c",))


async def test_one_of_two_revocations_of_the_same_grant_succeeds(database_url: str) -> None:
    async with roles_of(database_url) as one, roles_of(database_url) as other:
        _, role = await one.create("ci", Grants(("a", "b")))
        outcomes: list[object] = []

        async def revoke(roles: RoleStore) -> None:
            try:
                outcomes.append((await roles.revoke(role.handle, Grants(("a",)))).grants)
            except RoleError as error:
                outcomes.append(error)

        async with open_sql(database_url) as sql:
            # Both are as far as they can get before either continues.
            await sql.execute("BEGIN")
            await sql.fetch("SELECT FROM catbus.roles FOR UPDATE")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(revoke, one)
                nursery.start_soon(revoke, other)

                async def both_wait() -> bool:
                    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = $1"
                    async with open_sql(database_url) as looking:
                        ((name,),) = await looking.fetch("SELECT current_database()")
                        return await looking.fetchrow(query, name) == (2,)

                await wait_until(both_wait)
                await sql.execute("ROLLBACK")
    assert Grants(("b",)) in outcomes
    assert [type(outcome) for outcome in outcomes if outcome != Grants(("b",))] == [RoleError]


async def test_ambiguous_handle_is_rejected(database_url: str) -> None:
    keys = [bytes(6) + bytes([number]) * 26 for number in (1, 2)]
    async with open_sql(database_url) as sql:
        for key in keys:
            await sql.fetch("INSERT INTO catbus.roles (key) VALUES ($1)", key)
        roles = RoleStore(sql)
        for change in (roles.show, roles.delete):
            with pytest.raises(RoleError, match=r"0{12} fits several roles, say more of it: 0{12}01.*, 0{12}02"):
                await change("0" * 12)
        assert (await roles.show("0" * 12 + "02")).key == keys[1]
        assert (await roles.delete(keys[0].hex())).key == keys[0]
        assert (await roles.show("0" * 12)).key == keys[1]


@pytest.mark.parametrize(
    "name",
    ["", "ci", "0" * 11, "%", "0" * 11 + "_", "role-x", make_role_token() + "="],
    ids=["nothing", "name", "short", "percent", "underscore", "no token", "long token"],
)
async def test_error_does_not_repeat_text_that_names_no_role(database_url: str, name: str) -> None:
    async with roles_of(database_url) as roles:
        await roles.create("ci", Grants())
        with pytest.raises(RoleError, match="named by its token or by its handle") as caught:
            await roles.show(name)
        assert not name or name not in str(caught.value).split()


# Constraints of the table

segments = st.lists(st.text(st.sampled_from("aZ09_-"), min_size=1, max_size=4), min_size=1, max_size=4).map(".".join)
texts = st.text(st.sampled_from("aZ9_-.* \nä"), max_size=8) | segments | segments.map("{}.*".format)
LONGEST = [
    "a" * MAX_LENGTH, "a" * (MAX_LENGTH + 1), "a" * (MAX_LENGTH - 2) + ".*", "a" * (MAX_LENGTH - 1) + ".*",
    ".".join(["a"] * MAX_SEGMENTS), ".".join(["a"] * (MAX_SEGMENTS + 1)), "a." * (MAX_SEGMENTS - 1) + "*",
    "a." * MAX_SEGMENTS + "*", "*", "a\n", "a.*\n", "",
]  # fmt: skip


async def test_table_accepts_only_patterns(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        key = bytes(32)
        await sql.fetch("INSERT INTO catbus.roles (key) VALUES ($1)", key)
        ((expression,),) = await sql.fetch(
            "SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint "
            "WHERE conrelid = 'catbus.role_grants'::regclass AND contype = 'c' AND pg_get_expr(conbin, conrelid) ~ '~'"
        )
        query = f'SELECT {expression} FROM (SELECT $1::text COLLATE "C" AS pattern) AS given'

        async def agree(text: str) -> None:
            try:
                check_pattern(text)
                expected = True
            except PeerError:
                expected = False
            assert await sql.fetchrow(query, text) == (expected,), text

        for text in LONGEST:
            await agree(text)
        for text in examples(200):
            await agree(text)
        with pytest.raises(Exception, match="role_grants_pattern_check"):
            await sql.fetch("INSERT INTO catbus.role_grants VALUES ($1, 'read', 'a.*.b')", key)
        with pytest.raises(Exception, match="role_grants_permission_check"):
            await sql.fetch("INSERT INTO catbus.role_grants VALUES ($1, 'create', 'a')", key)


def examples(number: int) -> list[str]:
    """Valid patterns, and texts that are almost patterns."""
    found: list[str] = []

    @settings(max_examples=number, database=None, suppress_health_check=list(HealthCheck))
    @given(texts)
    def collect(text: str) -> None:
        found.append(text)

    collect()
    return found


# Opening


async def test_opening_for_changes_migrates_the_schema(empty_database_url: str) -> None:
    database = DatabaseSettings(url=empty_database_url)
    with pytest.raises(ConfigError, match="`catbus init` brings its schema to this version"):
        async with open_roles(database, prepare=False) as roles:
            await roles.list()
    async with open_roles(database) as roles:
        await roles.create("ci", GRANTS)
    async with open_roles(database, prepare=False) as roles:
        assert [role.client_id for role in await roles.list()] == ["ci"]


async def test_log_without_roles_gets_them_and_keeps_its_entries(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = migrations.schema_files()
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "schema_files", lambda: files[:3])
        await migrations.init(DatabaseSettings(url=empty_database_url))
    async with open_roles(DatabaseSettings(url=empty_database_url)) as roles:
        assert await roles.list() == []


async def test_unreachable_database_is_reported_at_any_moment(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:

        async def create(*, cut: bool) -> None:
            async with open_roles(DatabaseSettings(url=proxy.url)) as roles:
                if cut:
                    proxy.close()
                await roles.create("ci", GRANTS)

        for cut in (True, False):
            with pytest.raises(Unavailable, match="the database cannot be used"):
                await create(cut=cut)
    async with roles_of(database_url) as roles:
        assert await roles.list() == []


async def test_database_role_that_may_only_connect_may_not_read_roles(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        for table in ("catbus.roles", "catbus.role_grants"):
            for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
                query = "SELECT has_table_privilege('pg_monitor', $1, $2)"
                assert await sql.fetchrow(query, table, privilege) == (False,)


def test_role_repr_does_not_contain_the_token() -> None:
    token = make_role_token()
    key = role_key(token)
    assert key is not None
    assert token not in repr(Role(key, "ci", datetime.now(UTC), GRANTS))
