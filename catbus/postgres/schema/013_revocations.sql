-- Revocations: tokens of a client that were issued before a time are not valid any more, and the sessions that were
-- opened with them are closed. Role tokens count as issued when their role was created.
--
-- Replicas keep all rows in memory, so that a token can be verified while the database is unreachable. They read the
-- rows that have changed since they last read, and read all of them again when rows were deleted.

CREATE TABLE catbus.revocations (
    client_id     text        COLLATE "C" PRIMARY KEY CHECK (octet_length(client_id) BETWEEN 1 AND 2000),
    issued_before timestamptz NOT NULL,
    forget_after  timestamptz NOT NULL DEFAULT 'infinity',
    changed       bigint      NOT NULL DEFAULT 0
);
CREATE INDEX revocations_changed ON catbus.revocations (changed);
CREATE INDEX revocations_forgotten ON catbus.revocations (forget_after) WHERE forget_after < 'infinity';
COMMENT ON TABLE catbus.revocations IS 'Clients whose earlier tokens are revoked';
COMMENT ON COLUMN catbus.revocations.issued_before IS 'Tokens that were issued before this time are not valid';
COMMENT ON COLUMN catbus.revocations.forget_after IS 'No such token is valid after this time, so the row is deleted then';
COMMENT ON COLUMN catbus.revocations.changed IS 'The transaction that wrote the row last';

-- Each change is recorded as one of roles is, in a table of its own: see catbus.role_changes.
CREATE TABLE catbus.revocation_changes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY
);
INSERT INTO catbus.revocation_changes DEFAULT VALUES;

-- Whoever writes a row. A transaction may end after others that began later, so a replica reads the rows of all
-- transactions that it may not have seen, by their ids: no lock is needed.
CREATE FUNCTION catbus.stamp_revocation() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    NEW.changed := pg_current_xact_id()::text::bigint;
    RETURN NEW;
END
$$;

CREATE FUNCTION catbus.note_revocations() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    own text := pg_current_xact_id();
BEGIN
    IF current_setting('catbus.revocation_change', true) IS DISTINCT FROM own THEN
        INSERT INTO catbus.revocation_changes DEFAULT VALUES;
        PERFORM set_config('catbus.revocation_change', own, true);
        -- The star stands for a change that only a poll can find.
        PERFORM catbus.notify('catbus_roles', '*');
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON catbus.revocations
    FOR EACH ROW EXECUTE FUNCTION catbus.stamp_revocation();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON catbus.revocations
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_revocations();
-- `session_replication_role = replica` does not switch these triggers off.
ALTER TABLE catbus.revocations ENABLE ALWAYS TRIGGER stamp, ENABLE ALWAYS TRIGGER note;

-- Revoke the tokens of a client that were issued before a time, and close its sessions with such tokens when the
-- transaction commits. An earlier revocation of the client stays in force if it is of a later time.
--
-- issued_before  by default the time of the call, and not that of the transaction's begin: what was issued meanwhile is
--                revoked, too
-- forget_after   a time from which on no such token is valid, because all have expired. The row is deleted some time
--                later. By default it is kept for ever
--
-- It runs with its owner's rights, so that one GRANT is enough. Returns the time that is in force.
CREATE FUNCTION catbus.revoke_client(
    client_id     text,
    issued_before timestamptz DEFAULT clock_timestamp(),
    forget_after  timestamptz DEFAULT 'infinity'
) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    result timestamptz;
BEGIN
    IF octet_length(client_id) BETWEEN 1 AND 2000 AND issued_before IS NOT NULL AND forget_after IS NOT NULL THEN
        INSERT INTO catbus.revocations AS r (client_id, issued_before, forget_after)
        VALUES (revoke_client.client_id, revoke_client.issued_before, revoke_client.forget_after)
        ON CONFLICT ON CONSTRAINT revocations_pkey DO UPDATE SET
            issued_before = greatest(r.issued_before, excluded.issued_before),
            forget_after = greatest(r.forget_after, excluded.forget_after)
        RETURNING r.issued_before INTO STRICT result;
        RETURN result;
    END IF;
    RAISE EXCEPTION 'catbus.revoke_client needs a client_id of 1 to 2000 bytes, and times that are not null'
        USING ERRCODE = '22023';
END
$$;
COMMENT ON FUNCTION catbus.revoke_client IS 'Revokes the tokens of a client that were issued before a time';

-- Delete the rows that no token needs any more, and compact catbus.revocation_changes. Replicas read all rows again after
-- a deletion, so rows are deleted together, at most once a day. They are kept for a day longer than was asked for:
-- clocks differ. Also delete the requests to disconnect that are older than an hour.
CREATE FUNCTION catbus.forget_revocations() RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    IF EXISTS (SELECT FROM catbus.revocations AS r WHERE r.forget_after < now() - interval '2 days') THEN
        DELETE FROM catbus.revocations AS r WHERE r.forget_after < now() - interval '1 day';
    END IF;
    DELETE FROM catbus.disconnects AS d WHERE d.requested < now() - interval '1 hour';
    IF (SELECT count(*) FROM catbus.revocation_changes) > 100 THEN
        DELETE FROM catbus.revocation_changes;
        INSERT INTO catbus.revocation_changes DEFAULT VALUES;
    END IF;
END
$$;

REVOKE ALL ON FUNCTION catbus.stamp_revocation, catbus.note_revocations, catbus.revoke_client, catbus.forget_revocations
    FROM PUBLIC;

-- Requests to disconnect clients. Each replica reads the new rows, and closes the sessions that the client has then; so a
-- row means nothing for later sessions, and is deleted when all replicas have had time to read it.
CREATE TABLE catbus.disconnects (
    client_id text        COLLATE "C" PRIMARY KEY CHECK (octet_length(client_id) BETWEEN 1 AND 2000),
    requested timestamptz NOT NULL,
    changed   bigint      NOT NULL DEFAULT 0
);
CREATE INDEX disconnects_changed ON catbus.disconnects (changed);
COMMENT ON TABLE catbus.disconnects IS 'Clients whose sessions are to be closed';
COMMENT ON COLUMN catbus.disconnects.changed IS 'The transaction that wrote the row last';

CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON catbus.disconnects
    FOR EACH ROW EXECUTE FUNCTION catbus.stamp_revocation();
CREATE TRIGGER note AFTER INSERT OR UPDATE ON catbus.disconnects
    FOR EACH STATEMENT EXECUTE FUNCTION catbus.note_revocations();
ALTER TABLE catbus.disconnects ENABLE ALWAYS TRIGGER stamp, ENABLE ALWAYS TRIGGER note;

-- Close all sessions of a client when the transaction commits. It may connect again with the same token.
CREATE FUNCTION catbus.disconnect_client(client_id text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
BEGIN
    IF NOT octet_length(client_id) BETWEEN 1 AND 2000 OR client_id IS NULL THEN
        RAISE EXCEPTION 'catbus.disconnect_client needs a client_id of 1 to 2000 bytes' USING ERRCODE = '22023';
    END IF;
    INSERT INTO catbus.disconnects AS d (client_id, requested)
    VALUES (disconnect_client.client_id, clock_timestamp())
    ON CONFLICT ON CONSTRAINT disconnects_pkey DO UPDATE SET requested = excluded.requested;
END
$$;
COMMENT ON FUNCTION catbus.disconnect_client IS 'Closes all sessions of a client';

REVOKE ALL ON FUNCTION catbus.disconnect_client FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'stamp_revocation', 'note_revocations', 'revoke_client', 'forget_revocations', 'disconnect_client'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
END
$$;
