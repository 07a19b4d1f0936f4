-- Publishing from SQL with a transactional outbox: messages wait in the outbox and enter the log after the commit.
--
-- A transaction that appended to the log itself would block all others from that moment to its end.

-- One sequence for both tables, without a cache: a message that is published after another transaction has committed
-- gets a greater id than the messages of that transaction.
CREATE SEQUENCE catbus.outbox_id CACHE 1;

-- The number of the table that takes new messages. The value of a sequence changes in place: it leaves no row version
-- behind, and an old snapshot sees the new value.
CREATE SEQUENCE catbus.outbox_active MINVALUE 0 MAXVALUE 1 START 0 CACHE 1;

-- Check a channel by the grammar of channels, without the reserved ones, and a payload as JSON by the rules of
-- check_payload in catbus/protocol/wire_messages.py. Together they have at most as many bytes as a client may publish by default: 65,536
-- less the 42 around them.
--
-- Never returns false. It raises, because its message can say what was expected, and that of a constraint cannot.
CREATE FUNCTION catbus.check_message(channel text, payload text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    -- An argument has the collation of the caller's expression, which may not suit the operators here.
    name     text COLLATE "C" := channel;
    written  text COLLATE "C" := payload;
    brackets text COLLATE "C";
BEGIN
    IF name !~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' OR octet_length(name) > 255
        OR cardinality(string_to_array(name, '.')) > 32
    THEN
        RAISE EXCEPTION 'not a channel: "%"', left(name, 64)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'A channel is 1 to 32 segments of A-Z, a-z, 0-9, _ and -, with dots in between; at most 255 bytes.';
    END IF;
    IF starts_with(name, '_') THEN
        RAISE EXCEPTION 'reserved channel: "%"', left(name, 64)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Only the broker publishes to channels that begin with "_".';
    END IF;
    IF octet_length(name) + octet_length(written) > 65494 THEN
        RAISE EXCEPTION 'the message is too large: % bytes', octet_length(name) + octet_length(written)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Channel and payload have at most 65494 bytes together.';
    END IF;
    -- A payload with few brackets cannot be deep. Otherwise remove the strings, then the innermost pairs level by
    -- level.
    IF length(written) - length(translate(written, '[{', '')) > 64 THEN
        brackets := regexp_replace(written, '"([^"\\]|\\.)*"', '', 'g');
        brackets := translate(regexp_replace(brackets, '[^][{}]+', '', 'g'), '{}', '[]');
        FOR level IN 1..64 LOOP
            EXIT WHEN brackets = '';
            brackets := replace(brackets, '[]', '');
        END LOOP;
        IF brackets <> '' THEN
            RAISE EXCEPTION 'the payload is nested too deep'
                USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arrays and objects nest at most 64 levels deep.';
        END IF;
    END IF;
    -- Half of a surrogate pair is no character. Removing all pairs, and all other escapes, leaves the halves.
    IF written ~ '\\u[dD][89a-fA-F]' AND regexp_replace(
        written, '\\([^u]|u[dD][89abAB]..\\u[dD][c-fC-F]..)', '', 'g') ~ '\\u[dD][89a-fA-F]'
    THEN
        RAISE EXCEPTION 'the payload has half of a surrogate pair in it'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'In JSON, \ud800 to \udbff go before \udc00 to \udfff.';
    END IF;
    -- json keeps the text as it is and accepts all JSON. jsonb rejects some of it, for example "\u0000".
    RETURN written::json IS NOT NULL;
END
$$;

-- Two tables alike. While one takes new messages, the other one is truncated as soon as it is empty: deleted rows stay
-- as long as any open transaction in the database might see them, and every search for rows has to step over them.
CREATE TABLE catbus.outbox_0 (
    id      bigint NOT NULL PRIMARY KEY DEFAULT nextval('catbus.outbox_id'),
    channel text   COLLATE "C" NOT NULL,
    payload text   NOT NULL,
    retain  boolean,
    CHECK (catbus.check_message(channel, payload))
);
-- As in catbus.entries.
ALTER TABLE catbus.outbox_0 ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE TABLE catbus.outbox_1 (LIKE catbus.outbox_0 INCLUDING ALL);
COMMENT ON TABLE catbus.outbox_0 IS 'Messages that were published from SQL and are not in the log yet';
COMMENT ON TABLE catbus.outbox_1 IS 'Messages that were published from SQL and are not in the log yet';

-- Put a message into the outbox.
CREATE FUNCTION catbus.enqueue(channel text, payload text, retain boolean) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    active bigint;
BEGIN
    SELECT s.last_value INTO active FROM catbus.outbox_active AS s;
    IF active = 0 THEN
        INSERT INTO catbus.outbox_0 (channel, payload, retain)
        VALUES (enqueue.channel, enqueue.payload, nullif(enqueue.retain, false));
    ELSE
        INSERT INTO catbus.outbox_1 (channel, payload, retain)
        VALUES (enqueue.channel, enqueue.payload, nullif(enqueue.retain, false));
    END IF;
END
$$;

-- Publish a message when the transaction commits, and never if it does not.
--
-- With `retain` it becomes the retained message of its channel, and removes that with the payload null. While the retained
-- messages are over their budget, only removing is possible.
--
-- One function serves all types, so that one GRANT is enough. It runs with its owner's rights, and therefore converts
-- built-in types only: the cast of another type may be a function that somebody else has made.
CREATE FUNCTION catbus.publish(channel text, payload anycompatible, retain boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    written text COLLATE "C";
BEGIN
    IF pg_typeof(payload) NOT IN ('text'::regtype, 'varchar'::regtype, 'json'::regtype, 'jsonb'::regtype) THEN
        RAISE EXCEPTION 'a payload is of type text, json or jsonb, not %', pg_typeof(payload)
            USING ERRCODE = 'datatype_mismatch', HINT = 'to_json() makes JSON of any value.';
    END IF;
    -- White space around a value is dropped, as in messages of clients.
    written := btrim(payload::text, E' \t\r\n');
    IF channel IS NULL OR written IS NULL THEN
        RAISE EXCEPTION 'a message has a channel and a payload, and neither is NULL'
            USING ERRCODE = 'null_value_not_allowed', HINT = 'A payload may be the JSON text null.';
    END IF;
    IF written ~ '[\r\n]' THEN
        -- Between values they are white space. In a string they are an error, which has to be found before they are
        -- replaced.
        PERFORM catbus.check_message(channel, written);
        written := translate(written, E'\r\n', '  ');
    END IF;
    IF retain AND written <> 'null' AND catbus.retained_full() THEN
        RAISE EXCEPTION 'the retained messages have no space left'
            USING ERRCODE = 'configuration_limit_exceeded', HINT = 'Remove some: publish the JSON text null to their channels.';
    END IF;
    PERFORM catbus.enqueue(channel, written, retain);
END
$$;
COMMENT ON FUNCTION catbus.publish IS 'Publishes JSON (text, json or jsonb) to a channel when the transaction commits';

-- Whether the outbox contains messages. It takes no lock that blocks anybody, and is called all the time. Its own
-- waiting is limited: a query whose caller has given up would go on waiting in the database.
CREATE FUNCTION catbus.outbox_pending() RETURNS boolean
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM catbus.outbox_0) OR EXISTS (SELECT FROM catbus.outbox_1);
END
$$;

-- Move messages from the outbox into the log: one call in autocommit, alone or after a call of catbus.append.
--
-- since    the new entries get no earlier time: null, or the `at` that catbus.append has returned
--
-- moved    the number of messages
-- last     the seq of the last one; null when there were none
-- more     whether the outbox contains further messages
--
-- Raises what catbus.append raises.
CREATE FUNCTION catbus.move_outbox(
    synchronous_commit text,
    epoch     text,
    since     bigint,
    OUT moved bigint,
    OUT last  bigint,
    OUT more  boolean
)
LANGUAGE plpgsql
AS $$
DECLARE
    head  record;
    first bigint;
    at    bigint;
    bound bigint;
    some_retained boolean;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.move_outbox needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('synchronous_commit', move_outbox.synchronous_commit, true),
            set_config('lock_timeout', '2s', true);

    moved := 0;
    more := false;
    -- All replicas find waiting messages at about the same time. One of them moves the messages. The others return at
    -- once, and write nothing.
    IF NOT catbus.outbox_pending() OR NOT pg_try_advisory_xact_lock(122550254464888) THEN
        RETURN;
    END IF;

    SELECT h.epoch, h.slot, h.floor INTO STRICT head FROM catbus.head AS h FOR UPDATE;
    IF head.epoch IS DISTINCT FROM move_outbox.epoch THEN
        RAISE EXCEPTION 'the epoch of the log is %, not %', head.epoch, move_outbox.epoch USING ERRCODE = 'CB001';
    END IF;

    -- The first 1,000 committed messages, and of these no more than 4 MiB.
    SELECT max(waiting.id) FILTER (WHERE waiting.fits), count(*) = 1000 OR NOT bool_and(waiting.fits),
           bool_or(waiting.retain)
    INTO bound, more, some_retained
    FROM (
        SELECT o.id, o.retain, sum(o.size) OVER (ORDER BY o.id) - o.size < 4194304 AS fits
        FROM (
            SELECT o.id, o.retain, octet_length(o.payload) AS size FROM catbus.outbox_0 AS o
            UNION ALL
            SELECT o.id, o.retain, octet_length(o.payload) FROM catbus.outbox_1 AS o
            ORDER BY id LIMIT 1000
        ) AS o
    ) AS waiting;
    IF bound IS NULL THEN
        more := false;
        RETURN;
    END IF;

    SELECT e.seq, e.at INTO last, at FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1;
    first := greatest(last + 1, head.floor);
    at := greatest(at, since, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint);

    -- No client has a producer id of this length, and the seq makes the key unique.
    WITH taken_0 AS (
        DELETE FROM catbus.outbox_0 AS o WHERE o.id <= bound RETURNING o.id, o.channel, o.payload, o.retain
    ), taken_1 AS (
        DELETE FROM catbus.outbox_1 AS o WHERE o.id <= bound RETURNING o.id, o.channel, o.payload, o.retain
    )
    INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, retain)
    SELECT head.slot, new.seq, at, new.channel, new.payload, '\x6f7574626f78', new.seq, new.retain
    FROM (
        SELECT first - 1 + row_number() OVER (ORDER BY taken.id) AS seq, taken.channel, taken.payload, taken.retain
        FROM (SELECT * FROM taken_0 UNION ALL SELECT * FROM taken_1) AS taken
    ) AS new;
    GET DIAGNOSTICS moved = ROW_COUNT;
    last := first + moved - 1;
    IF some_retained THEN
        PERFORM catbus.replace_retained(head.slot, first);
    END IF;
    PERFORM catbus.notify('catbus', format('%s:%s:%s', head.epoch, first, last));
END
$$;

-- Truncate the table that takes no new messages. If it is truncated already and the other one has grown, swap the two.
--
-- It waits for nobody: while an uncommitted transaction has published into the table, or reads it, nothing happens, and
-- a later call may succeed. Others wait only for the moment that the truncation takes.
CREATE FUNCTION catbus.rotate_outbox() RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    idle_number bigint;
    idle        text;
    busy        text;
    occupied    boolean;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.rotate_outbox needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    SELECT 1 - s.last_value INTO idle_number FROM catbus.outbox_active AS s;
    idle := format('catbus.outbox_%s', idle_number);
    busy := format('catbus.outbox_%s', 1 - idle_number);
    IF pg_relation_size(idle) = 0 THEN
        -- About 2,000 small messages. Scanning them takes a third of a millisecond.
        IF pg_relation_size(busy) > 262144 THEN
            PERFORM setval('catbus.outbox_active', idle_number);
        END IF;
        RETURN;
    END IF;

    EXECUTE format('SELECT EXISTS (SELECT FROM %s)', idle) INTO occupied;
    IF occupied THEN
        RETURN;
    END IF;
    -- The lock ends with the commit, which must not wait for standbys.
    PERFORM set_config('synchronous_commit', 'local', true);
    BEGIN
        EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', idle);
    EXCEPTION WHEN lock_not_available THEN
        RETURN;
    END;
    -- All transactions that published into it have ended, and a statement that begins now sees what they committed.
    EXECUTE format('SELECT EXISTS (SELECT FROM %s)', idle) INTO occupied;
    IF NOT occupied THEN
        EXECUTE format('TRUNCATE %s', idle);
    END IF;
END
$$;

REVOKE ALL ON FUNCTION catbus.check_message, catbus.enqueue, catbus.publish, catbus.outbox_pending, catbus.move_outbox,
    catbus.rotate_outbox FROM PUBLIC;

-- catbus.move_outbox in a transaction of its own, if this is the server that started at `server`.
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
    IF catbus.is_same_server(server) THEN
        SELECT m.moved, m.last, m.more INTO moved, last, more
        FROM catbus.move_outbox(synchronous_commit, epoch, since) AS m;
    END IF;
END
$$;

-- catbus.rotate_outbox in a transaction of its own.
CREATE PROCEDURE catbus.rotate_outbox_transaction()
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    PERFORM catbus.rotate_outbox();
END
$$;

REVOKE ALL ON PROCEDURE catbus.move_outbox_transaction, catbus.rotate_outbox_transaction FROM PUBLIC;
