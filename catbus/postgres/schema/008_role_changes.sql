-- Roles change under sessions that are open: each change is counted, so that a look finds it, and told of at once.

-- A row for each transaction that has changed roles, or more: they wait for nobody, as they would to count in one row,
-- which would be one lock more to come to a deadlock by. Whoever has seen the same rows before has missed nothing.
CREATE TABLE catbus.role_changes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY
);
INSERT INTO catbus.role_changes DEFAULT VALUES;

-- Count a change, and tell which roles it was of, or, with nothing, that it may be any. `changed` are the rows that
-- came or went; after UPDATE and TRUNCATE, which may be of any, there is none.
CREATE FUNCTION catbus.note_role_changes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    own text := pg_current_xact_id();
    keys bytea[];
BEGIN
    IF TG_OP IN ('INSERT', 'DELETE') THEN
        IF TG_TABLE_NAME = 'roles' THEN
            SELECT array_agg(c.key) INTO keys FROM changed AS c;
        ELSE
            SELECT array_agg(DISTINCT c.role) INTO keys FROM changed AS c;
        END IF;
        IF keys IS NULL THEN
            RETURN NULL;
        END IF;
    END IF;
    IF current_setting('catbus.role_change', true) IS DISTINCT FROM own THEN
        INSERT INTO catbus.role_changes DEFAULT VALUES;
        PERFORM set_config('catbus.role_change', own, true);
    END IF;
    -- What is not told of is found by whoever looks. A full queue would fail the commit.
    IF pg_notification_queue_usage() > 0.5 THEN
        NULL;
    ELSIF cardinality(keys) <= 100 THEN
        PERFORM pg_notify('catbus_roles', encode(key, 'hex')) FROM unnest(keys) AS key;
    ELSE
        PERFORM pg_notify('catbus_roles', '');
    END IF;
    RETURN NULL;
END
$$;

REVOKE ALL ON FUNCTION catbus.note_role_changes FROM PUBLIC;

-- A role that has just been made is nobody's yet, so that only its grants are worth a word.
CREATE TRIGGER note_deleted AFTER DELETE ON catbus.roles REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_role_changes();
CREATE TRIGGER note_updated AFTER UPDATE OR TRUNCATE ON catbus.roles
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_role_changes();
CREATE TRIGGER note_inserted AFTER INSERT ON catbus.role_grants REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_role_changes();
CREATE TRIGGER note_deleted AFTER DELETE ON catbus.role_grants REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_role_changes();
CREATE TRIGGER note_updated AFTER UPDATE OR TRUNCATE ON catbus.role_grants
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_role_changes();

-- As before, and by what changes of roles are known. When there are many of them one stands for all, and is new to
-- everyone.
DROP FUNCTION catbus.look;
CREATE FUNCTION catbus.look(seq bigint) RETURNS TABLE (
    epoch text, head bigint, floor bigint, mark bytea, standby boolean, same_system boolean, same_timeline boolean,
    role_version text
)
LANGUAGE plpgsql
AS $$
DECLARE
    changes bigint;
BEGIN
    standby := pg_is_in_recovery();
    -- Before the floor is read: where retention takes the entry away in between, the floor says so.
    mark := catbus.mark(look.seq);
    SELECT p.epoch, p.head, p.floor INTO epoch, head, floor FROM catbus.position() AS p;
    SELECT md5(string_agg(c.id::text, ' ' ORDER BY c.id)), count(*) INTO role_version, changes
    FROM catbus.role_changes AS c;
    IF NOT standby THEN
        IF changes > 100 THEN
            DELETE FROM catbus.role_changes;
            INSERT INTO catbus.role_changes DEFAULT VALUES;
        END IF;
        SELECT e.system_identifier = p.system_identifier, e.timeline = p.timeline
        INTO STRICT same_system, same_timeline
        FROM catbus.epochs AS e CROSS JOIN catbus.place() AS p WHERE e.epoch = look.epoch;
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.look FROM PUBLIC;
