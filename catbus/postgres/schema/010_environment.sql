-- What a role, a database or a session has set does not change what the functions of this schema do.
--
-- Every function runs with these settings, and so does every function that a later file makes (tests read the catalog):
--
-- search_path                  names mean what they mean in pg_catalog. Otherwise a role that may create in `public`, as
--                              PUBLIC may on clusters that began before version 15, makes a function whose arguments
--                              match more exactly, and it runs with the rights of whoever calls ours
-- standard_conforming_strings  a backslash in a literal is a backslash. PL/pgSQL parses a function in the session that
--                              calls it, with the settings of that session
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'append', 'position', 'check_message', 'publish', 'outbox_waits', 'move_outbox', 'turn_outbox', 'overdue',
        'retain', 'place', 'mark', 'new_epoch', 'keep_epoch', 'note_role_changes', 'look', 'beat'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on',
                       name);
    END LOOP;
END
$$;

-- These join tables, with plans that are fixed: the genetic optimizer may find none, or look for one for ever.
ALTER FUNCTION catbus.append SET geqo = off;
ALTER FUNCTION catbus.move_outbox SET geqo = off;
ALTER FUNCTION catbus.overdue SET geqo = off;

-- Defaults and constraints keep the functions that their names meant when the schema was made.
DO $$
DECLARE
    foreigner text;
BEGIN
    SELECT string_agg(DISTINCT pg_describe_object(d.refclassid, d.refobjid, 0), ', ') INTO foreigner
    FROM pg_depend AS d
    LEFT JOIN pg_attrdef AS a ON d.classid = 'pg_attrdef'::regclass AND a.oid = d.objid
    LEFT JOIN pg_constraint AS k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
    LEFT JOIN pg_proc AS f ON d.refclassid = 'pg_proc'::regclass AND f.oid = d.refobjid
    LEFT JOIN pg_operator AS o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    JOIN pg_class AS c ON c.oid = coalesce(a.adrelid, k.conrelid) AND c.relnamespace = 'catbus'::regnamespace
    WHERE coalesce(f.pronamespace, o.oprnamespace) NOT IN ('pg_catalog'::regnamespace, 'catbus'::regnamespace);
    IF foreigner IS NOT NULL THEN
        RAISE EXCEPTION 'tables of the schema catbus use what does not belong to it: %', foreigner
            USING HINT = 'Somebody had made it before the schema was: find out who, and make the schema again.';
    END IF;
END
$$;

-- Changes of roles are noted whatever session_replication_role says, which else silences triggers.
ALTER TABLE catbus.roles ENABLE ALWAYS TRIGGER note_deleted, ENABLE ALWAYS TRIGGER note_updated;
ALTER TABLE catbus.role_grants
    ENABLE ALWAYS TRIGGER note_inserted, ENABLE ALWAYS TRIGGER note_deleted, ENABLE ALWAYS TRIGGER note_updated;

-- Transactions of their own. Nothing that a client sends through a pooler beside a statement holds for that statement,
-- and a lock on the head row must not be held until a client's COMMIT has come. So these end the transaction in which
-- they are called, with whatever `default_transaction_isolation` and `default_transaction_read_only` have made of it,
-- and go on in one that is as it has to be. They are called in autocommit, alone.
--
-- A procedure that ends transactions cannot have settings, and so they do nothing but call functions that have them,
-- by their full names, with arguments of exactly their types.

-- Whether this is the server that somebody has looked at, which started at this time.
CREATE FUNCTION catbus.is_server(started timestamptz) RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
BEGIN
    RETURN pg_postmaster_start_time() = started;
END
$$;

REVOKE ALL ON FUNCTION catbus.is_server FROM PUBLIC;

-- catbus.append, with arguments as they are written in few bytes and read in little time. There are `length` entries.
-- Where a column has one element and there are more entries, that is
--
-- channels, payloads, senders   the text of all of them, a line each; of a sender that is null, E'\x01'
-- producers, afters             what all of them have
--
-- numbers are separated by commas; origins are null where all of them are. `enclosed` is passed on.
CREATE FUNCTION catbus.append_packed(
    synchronous_commit text,
    epoch     text,
    channels  text[],
    payloads  text[],
    senders   text[],
    producers bytea[],
    numbers   text,
    origins   bytea[],
    afters    bigint[],
    enclosed  text,
    length    integer
) RETURNS TABLE (at bigint, first bigint, seqs bigint[])
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
BEGIN
    IF length > 1 THEN
        IF cardinality(channels) = 1 THEN
            channels := string_to_array(channels[1], E'\n');
            payloads := string_to_array(payloads[1], E'\n');
            senders := string_to_array(senders[1], E'\n', E'\x01');
        END IF;
        IF cardinality(producers) = 1 THEN
            producers := array_fill(producers[1], ARRAY[length]);
        END IF;
        IF cardinality(afters) = 1 THEN
            afters := array_fill(afters[1], ARRAY[length]);
        END IF;
    END IF;
    SELECT a.at, a.first, a.seqs INTO STRICT at, first, seqs
    FROM catbus.append(
        synchronous_commit, epoch, channels, payloads, producers, string_to_array(numbers, ',')::bigint[], senders,
        coalesce(origins, array_fill(NULL::bytea, ARRAY[length])), afters, enclosed
    ) AS a;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.append_packed FROM PUBLIC;

-- Append, and where `move` says so move messages from the outbox behind that. Nothing happens on another server than
-- the one that started at `server`, and all results are null.
CREATE PROCEDURE catbus.append_transaction(
    synchronous_commit text,
    epoch     text,
    channels  text[],
    payloads  text[],
    senders   text[],
    producers bytea[],
    numbers   text,
    origins   bytea[],
    afters    bigint[],
    enclosed  text,
    length    integer,
    server    timestamptz,
    move      boolean,
    OUT at    bigint,
    OUT first bigint,
    OUT seqs  bigint[],
    OUT moved bigint,
    OUT last  bigint,
    OUT more  boolean
)
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    IF catbus.is_server(server) THEN
        SELECT a.at, a.first, a.seqs INTO at, first, seqs
        FROM catbus.append_packed(
            synchronous_commit, epoch, channels, payloads, senders, producers, numbers, origins, afters, enclosed,
            length) AS a;
        IF move THEN
            SELECT m.moved, m.last, m.more INTO moved, last, more
            FROM catbus.move_outbox(synchronous_commit, epoch, at) AS m;
        END IF;
    END IF;
END
$$;

-- Move messages from the outbox into the log, likewise.
CREATE PROCEDURE catbus.move_outbox_transaction(
    synchronous_commit text,
    epoch     text,
    server    timestamptz,
    OUT moved bigint,
    OUT last  bigint,
    OUT more  boolean
)
LANGUAGE plpgsql
AS $$
DECLARE
    since bigint;
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    IF catbus.is_server(server) THEN
        SELECT m.moved, m.last, m.more INTO moved, last, more
        FROM catbus.move_outbox(synchronous_commit, epoch, since) AS m;
    END IF;
END
$$;

CREATE PROCEDURE catbus.turn_outbox_transaction()
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    PERFORM catbus.turn_outbox();
END
$$;

CREATE PROCEDURE catbus.retain_transaction(
    age         bigint,
    size        bigint,
    now         bigint,
    OUT floor   bigint,
    OUT dropped bigint,
    OUT early   boolean,
    OUT closed  boolean,
    OUT held    smallint
)
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    SELECT r.floor, r.dropped, r.early, r.closed, r.held INTO floor, dropped, early, closed, held
    FROM catbus.retain(age, size, now) AS r;
END
$$;

CREATE PROCEDURE catbus.new_epoch_transaction(
    expected      text,
    agreed        bigint,
    OUT epoch     text,
    OUT after_seq bigint,
    OUT made      boolean
)
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    SELECT e.epoch, e.after_seq, e.made INTO epoch, after_seq, made FROM catbus.new_epoch(expected, agreed) AS e;
END
$$;

REVOKE ALL ON PROCEDURE catbus.append_transaction, catbus.move_outbox_transaction, catbus.turn_outbox_transaction,
    catbus.retain_transaction, catbus.new_epoch_transaction FROM PUBLIC;
