-- The settings of all functions, and a check of what the tables depend on.
--
-- A setting of a role, a database or a session must not change what a function does. A later file that makes a function
-- gives it the same settings (tests read the catalog).
--
-- search_path                  names mean what they mean in pg_catalog. Otherwise a role that may create in `public`, as
--                              PUBLIC may on clusters that began before version 15, makes a function whose arguments
--                              match more exactly, and that function runs with the caller's rights
-- standard_conforming_strings  a backslash in a literal is a backslash. PL/pgSQL parses a function in the calling
--                              session, with the settings of that session
DO $$
DECLARE
    function regprocedure;
    name     text;
BEGIN
    FOR function IN
        SELECT p.oid FROM pg_proc AS p
        WHERE p.pronamespace = 'catbus'::regnamespace AND p.prokind = 'f' AND pg_has_role(p.proowner, 'USAGE')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on',
                       function);
    END LOOP;

    -- The plans are those for a big log, whatever its size and statistics were when a connection made them.
    FOREACH name IN ARRAY ARRAY[
        'position', 'fingerprint', 'append', 'move_outbox', 'retention_due', 'record_deleted_range',
        'list_deleted_ranges'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET plan_cache_mode = force_generic_plan
                        SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off', name);
    END LOOP;

    -- These also join tables. The genetic optimizer may find no such plan, or search for one without end.
    FOREACH name IN ARRAY ARRAY['append', 'move_outbox', 'retention_due'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I
                        SET enable_hashjoin = off SET enable_mergejoin = off SET geqo = off', name);
    END LOOP;
END
$$;

ALTER FUNCTION catbus.outbox_pending SET plan_cache_mode = force_generic_plan SET jit = off SET lock_timeout = '1s';
ALTER FUNCTION catbus.rotate_outbox SET jit = off;

-- Defaults and constraints keep the functions that their names meant when the tables were made.
DO $$
DECLARE
    outsiders text;
BEGIN
    SELECT string_agg(DISTINCT pg_describe_object(d.refclassid, d.refobjid, 0), ', ') INTO outsiders
    FROM pg_depend AS d
    LEFT JOIN pg_attrdef AS a ON d.classid = 'pg_attrdef'::regclass AND a.oid = d.objid
    LEFT JOIN pg_constraint AS k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
    LEFT JOIN pg_proc AS f ON d.refclassid = 'pg_proc'::regclass AND f.oid = d.refobjid
    LEFT JOIN pg_operator AS o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    JOIN pg_class AS c ON c.oid = coalesce(a.adrelid, k.conrelid) AND c.relnamespace = 'catbus'::regnamespace
    WHERE coalesce(f.pronamespace, o.oprnamespace) NOT IN ('pg_catalog'::regnamespace, 'catbus'::regnamespace);
    IF outsiders IS NOT NULL THEN
        RAISE EXCEPTION 'tables of the schema catbus use what does not belong to it: %', outsiders
            USING HINT = 'Somebody made it before the schema was made: find out who, and make the schema again.';
    END IF;
END
$$;
