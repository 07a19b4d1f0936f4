-- Roles: the permissions that role tokens stand for. A role token contains no permissions itself.

CREATE TABLE catbus.roles (
    key       bytea       PRIMARY KEY CHECK (octet_length(key) = 32),
    client_id text,
    created   timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE catbus.roles IS 'The bearers of role- tokens';
COMMENT ON COLUMN catbus.roles.key IS
    'SHA-256 of the token, which is stored nowhere; its first 12 hexadecimal digits are the role''s handle';
COMMENT ON COLUMN catbus.roles.client_id IS 'The client_id of the bearer: the sender of its messages';

-- The broker does not check these rows again, so the constraints keep them right whoever writes them.
CREATE TABLE catbus.role_grants (
    role       bytea NOT NULL REFERENCES catbus.roles ON DELETE CASCADE,
    permission text  NOT NULL CHECK (permission IN ('read', 'write')),
    pattern    text  COLLATE "C" NOT NULL CHECK (
        pattern ~ '^(\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?)$'
        AND octet_length(pattern) <= 255
        AND cardinality(string_to_array(pattern, '.')) <= 32
    ),
    PRIMARY KEY (role, permission, pattern)
);
COMMENT ON TABLE catbus.role_grants IS 'What the bearer of a role may read, and what it may publish to';

-- A change of roles applies to open sessions. Each change is recorded, so that a poll finds it, and notified at once.
--
-- There is one row for each transaction that has changed roles, or more. Such transactions do not wait for one another,
-- as they would to update one counter, which would be one more lock to deadlock on. A replica that sees the same rows
-- as before has missed no change.
CREATE TABLE catbus.role_changes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY
);
INSERT INTO catbus.role_changes DEFAULT VALUES;

-- Replace many rows by a new one, which counts as a change for every replica.
CREATE FUNCTION catbus.compact_role_changes() RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    IF (SELECT count(*) FROM catbus.role_changes) > 100 THEN
        DELETE FROM catbus.role_changes;
        INSERT INTO catbus.role_changes DEFAULT VALUES;
    END IF;
END
$$;

-- Record a change, and notify the roles that it concerns, or that it may concern any. `changed` are the inserted or
-- deleted rows; after UPDATE and TRUNCATE, which may concern any role, there is no such table.
CREATE FUNCTION catbus.note_role_changes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    own text := pg_current_xact_id();
    keys bytea[];
    role bytea;
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
    IF cardinality(keys) <= 100 THEN
        FOREACH role IN ARRAY keys LOOP
            PERFORM catbus.notify('catbus_roles', catbus.mask_role(role));
        END LOOP;
    ELSE
        PERFORM catbus.notify('catbus_roles', '*');
    END IF;
    -- Replicas of earlier releases take this for a change of any role. A full queue would fail the commit.
    IF pg_notification_queue_usage() <= 0.5 THEN
        PERFORM pg_notify('catbus_roles', '');
    END IF;
    RETURN NULL;
END
$$;

REVOKE ALL ON FUNCTION catbus.compact_role_changes, catbus.note_role_changes FROM PUBLIC;

-- An inserted role belongs to nobody yet, so only its grants are notified.
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

-- `session_replication_role = replica` does not switch these triggers off.
ALTER TABLE catbus.roles ENABLE ALWAYS TRIGGER note_deleted, ENABLE ALWAYS TRIGGER note_updated;
ALTER TABLE catbus.role_grants
    ENABLE ALWAYS TRIGGER note_inserted, ENABLE ALWAYS TRIGGER note_deleted, ENABLE ALWAYS TRIGGER note_updated;
