"""Functions that a hostile role creates in `public` under names that Catbus's statements use.

PostgreSQL prefers an exact match of argument types to its own polymorphic, variadic or casting function. If `public`
comes first in the search path, every function there is preferred.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]

import catbus.postgres
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection

MALLORY = "catbus_test_mallory"

# Functions for which pg_catalog has no exact match.
_MATCHES = (
    "array_fill(bigint, integer[]) RETURNS bigint[]",
    "array_fill(bytea, integer[]) RETURNS bytea[]",
    "cardinality(bigint[]) RETURNS integer",
    "cardinality(bytea[]) RETURNS integer",
    "cardinality(text[]) RETURNS integer",
    "format(text, bigint) RETURNS text",
    "format(text, bigint, text, text) RETURNS text",
    "format(text, integer) RETURNS text",
    "format(text, smallint) RETURNS text",
    "format(text, text) RETURNS text",
    "format(text, text, bigint, bigint) RETURNS text",
    "nextval(text) RETURNS bigint",
    "pg_relation_size(text) RETURNS bigint",
    "to_json(text) RETURNS json",
    "unnest(bigint[]) RETURNS SETOF bigint",
    "unnest(bytea[]) RETURNS SETOF bytea",
    "unnest(text[]) RETURNS SETOF text",
)
_CALL = re.compile(r"\b([a-z][a-z0-9_]+)\(")


async def plant(sql: DatabaseConnection) -> int:
    """Create the functions as `MALLORY`, and return their number. Each call of one adds a row to `public.loot`."""
    await sql.execute(
        f"""
        DO $$ BEGIN CREATE ROLE {MALLORY}; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
        GRANT CREATE ON SCHEMA public TO PUBLIC;
        CREATE TABLE public.loot (taken text, by text, application text);
        GRANT ALL ON public.loot TO PUBLIC;
        SET ROLE {MALLORY}
        """
    )
    exact = await sql.fetch(
        """
        SELECT p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ') RETURNS '
               || pg_get_function_result(p.oid)
        FROM pg_proc AS p JOIN pg_type AS t ON t.oid = p.prorettype
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND t.typtype <> 'p'
              AND p.proname = ANY ($1) AND NOT EXISTS (
                  SELECT FROM unnest(p.proargtypes) AS a JOIN pg_type AS y ON y.oid = a WHERE y.typtype = 'p')
              AND p.proargmodes IS NULL
        """,
        sorted(_names()),
    )
    planted = [*_MATCHES, *(signature for (signature,) in exact)]
    for signature in planted:
        name = signature.partition("(")[0]
        await sql.execute(
            f"""
            CREATE FUNCTION public.{signature} LANGUAGE plpgsql SET search_path = pg_catalog AS $$ BEGIN
                INSERT INTO public.loot VALUES ('{name}', current_user, current_setting('application_name'));
                {"RETURN;" if "SETOF" in signature else "RETURN NULL;"}
            END $$
            """
        )
    await sql.execute(
        """
        CREATE FUNCTION public.oid_is(oid, regclass) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog
        AS $$ BEGIN
            INSERT INTO public.loot VALUES ('=', current_user, current_setting('application_name'));
            RETURN false;
        END $$;
        CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = public.oid_is);
        RESET ROLE
        """
    )
    return len(planted)


def _names() -> set[str]:
    """The functions that the schema and the statements of this package may call."""
    package = Path(catbus.postgres.__file__).parent
    texts = [path.read_text() for path in package.glob("*.py")]
    texts += [path.read_text() for path in Path(asyncpg.__file__).parent.glob("*.py")]
    texts += [file.read_text("utf-8") for file in (resources.files(catbus.postgres) / "schema").iterdir()]
    return {name for text in texts for name in _CALL.findall(text)}
