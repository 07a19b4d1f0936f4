-- Publishing from SQL: what a transaction publishes waits in an outbox, and gets into the log after its commit.
--
-- A transaction that appended to the log itself would hold up all others from there to its end.

-- One sequence for both tables, and nobody keeps numbers in store: what is published after another transaction has
-- committed gets the greater number.
CREATE SEQUENCE catbus.outbox_id CACHE 1;

-- Which table is written to. The value of a sequence changes in its place: it leaves no version of a row behind, and a
-- snapshot that is old sees the new one.
CREATE SEQUENCE catbus.outbox_turn MINVALUE 0 MAXVALUE 1 START 0 CACHE 1;

-- A channel by the grammar of all channels; a payload that is JSON, as check_payload in catbus/protocol/wire_messages.py has it. Both
-- together have no more bytes than a client may publish by default: 65,536 less the 42 around them.
--
-- Never false: it raises, because its message can say what was expected and that of a constraint cannot.
CREATE FUNCTION catbus.check_message(channel text, payload text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    -- The collation of an argument is that of what the caller has written there, which may fit no operator here.
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
    IF octet_length(name) + octet_length(written) > 65494 THEN
        RAISE EXCEPTION 'the message is too large: % bytes', octet_length(name) + octet_length(written)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Channel and payload have at most 65494 bytes together.';
    END IF;
    -- With so few brackets it cannot be deep. Otherwise, without its strings, the innermost pairs go level by level.
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
    -- Half a character is none. What is left of all escapes has no pair, and no backslash that another one escapes.
    IF written ~ '\\u[dD][89a-fA-F]' AND regexp_replace(
        written, '\\([^u]|u[dD][89abAB]..\\u[dD][c-fC-F]..)', '', 'g') ~ '\\u[dD][89a-fA-F]'
    THEN
        RAISE EXCEPTION 'the payload has half of a surrogate pair in it'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'In JSON, \ud800 to \udbff go before \udc00 to \udfff.';
    END IF;
    -- json keeps the text as it is and takes all that is JSON; jsonb would refuse some, "\u0000" for one.
    RETURN written::json IS NOT NULL;
END
$$;

-- Two tables of a kind. While one is written to, the other one, once it is empty, is made small again: deleted rows
-- stay for as long as any transaction in the database is open that might see them, and whoever looks for rows passes
-- over them every time.
CREATE TABLE catbus.outbox_0 (
    id      bigint NOT NULL PRIMARY KEY DEFAULT nextval('catbus.outbox_id'),
    channel text   COLLATE "C" NOT NULL,
    payload text   NOT NULL,
    CHECK (catbus.check_message(channel, payload))
);
-- As in the log.
ALTER TABLE catbus.outbox_0 ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE TABLE catbus.outbox_1 (LIKE catbus.outbox_0 INCLUDING ALL);
COMMENT ON TABLE catbus.outbox_0 IS 'What was published from SQL and is not in the log yet';
COMMENT ON TABLE catbus.outbox_1 IS 'What was published from SQL and is not in the log yet';

-- Publishes a message when the transaction commits, and never if it does not.
--
-- One function for all types, so that one GRANT is enough. It runs with its owner's rights, and so it converts built-in
-- types only: the cast of a type that somebody has made may be a function that somebody has made.
CREATE FUNCTION catbus.publish(channel text, payload anycompatible) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    written text COLLATE "C";
    turn    bigint;
BEGIN
    IF pg_typeof(payload) NOT IN ('text'::regtype, 'varchar'::regtype, 'json'::regtype, 'jsonb'::regtype) THEN
        RAISE EXCEPTION 'a payload is of type text, json or jsonb, not %', pg_typeof(payload)
            USING ERRCODE = 'datatype_mismatch', HINT = 'to_json() makes JSON of any value.';
    END IF;
    -- Around a value white space is dropped, as with clients.
    written := btrim(payload::text, E' \t\r\n');
    IF channel IS NULL OR written IS NULL THEN
        RAISE EXCEPTION 'a message has a channel and a payload, and neither is NULL'
            USING ERRCODE = 'null_value_not_allowed', HINT = 'A payload may be the JSON text null.';
    END IF;
    IF written ~ '[\r\n]' THEN
        -- Between values they are white space; in a string they are an error, and have to be found before they go.
        PERFORM catbus.check_message(channel, written);
        written := translate(written, E'\r\n', '  ');
    END IF;
    SELECT s.last_value INTO turn FROM catbus.outbox_turn AS s;
    IF turn = 0 THEN
        INSERT INTO catbus.outbox_0 (channel, payload) VALUES (publish.channel, written);
    ELSE
        INSERT INTO catbus.outbox_1 (channel, payload) VALUES (publish.channel, written);
    END IF;
END
$$;
COMMENT ON FUNCTION catbus.publish IS 'Publishes JSON (text, json or jsonb) to a channel when the transaction commits';

-- Whether there are messages in the outbox: without a lock that anyone waits for, asked all the time. Nor is it kept
-- waiting for long: a question that nobody waits for any more would go on waiting in the database.
CREATE FUNCTION catbus.outbox_waits() RETURNS boolean
LANGUAGE plpgsql
SET lock_timeout = '1s'
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM catbus.outbox_0) OR EXISTS (SELECT FROM catbus.outbox_1);
END
$$;

-- Moves messages from the outbox into the log: one call in autocommit, alone or behind a call of catbus.append.
--
-- since    the new entries get no earlier time; null, or what catbus.append has returned
--
-- moved    how many there were
-- last     the last one's seq; null when there were none
-- more     whether others were left in the outbox
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
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    head  record;
    first bigint;
    at    bigint;
    bound bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.move_outbox needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('synchronous_commit', move_outbox.synchronous_commit, true),
            set_config('lock_timeout', '2s', true);

    moved := 0;
    more := false;
    -- All replicas see messages waiting at about the same time. One of them moves them; the others need not wait for
    -- that, nor write anything, to find that there is nothing left to do.
    IF NOT catbus.outbox_waits() OR NOT pg_try_advisory_xact_lock(122550254464888) THEN
        RETURN;
    END IF;

    SELECT h.epoch, h.slot, h.floor INTO STRICT head FROM catbus.head AS h FOR UPDATE;
    IF head.epoch IS DISTINCT FROM move_outbox.epoch THEN
        RAISE EXCEPTION 'the epoch of the log is %, not %', head.epoch, move_outbox.epoch USING ERRCODE = 'CB001';
    END IF;

    -- The first 1,000 whose commit can be seen, and of these no more than 4 MiB.
    SELECT max(waiting.id) FILTER (WHERE waiting.fits), count(*) = 1000 OR NOT bool_and(waiting.fits)
    INTO bound, more
    FROM (
        SELECT o.id, sum(o.size) OVER (ORDER BY o.id) - o.size < 4194304 AS fits
        FROM (
            SELECT o.id, octet_length(o.payload) AS size FROM catbus.outbox_0 AS o
            UNION ALL
            SELECT o.id, octet_length(o.payload) FROM catbus.outbox_1 AS o
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

    -- The key is of a length that no client's has, and the seq in it makes it the only one.
    WITH taken_0 AS (
        DELETE FROM catbus.outbox_0 AS o WHERE o.id <= bound RETURNING o.id, o.channel, o.payload
    ), taken_1 AS (
        DELETE FROM catbus.outbox_1 AS o WHERE o.id <= bound RETURNING o.id, o.channel, o.payload
    )
    INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number)
    SELECT head.slot, new.seq, at, new.channel, new.payload, '\x6f7574626f78', new.seq
    FROM (
        SELECT first - 1 + row_number() OVER (ORDER BY taken.id) AS seq, taken.channel, taken.payload
        FROM (SELECT * FROM taken_0 UNION ALL SELECT * FROM taken_1) AS taken
    ) AS new;
    GET DIAGNOSTICS moved = ROW_COUNT;
    last := first + moved - 1;
    IF pg_notification_queue_usage() <= 0.5 THEN
        PERFORM pg_notify('catbus', format('%s:%s:%s', head.epoch, first, last));
    END IF;
END
$$;

-- Makes the table that is not written to small again, or, when it is small and the other has grown, gives it the turn.
-- Waits for nobody: when somebody has published into the table and not committed yet, or reads it, the next call may
-- succeed. Others wait for the moment that it takes.
CREATE FUNCTION catbus.turn_outbox() RETURNS void
LANGUAGE plpgsql
SET jit = off
AS $$
DECLARE
    idle  text;
    busy  text;
    turn  bigint;
    waits boolean;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.turn_outbox needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    SELECT 1 - s.last_value INTO turn FROM catbus.outbox_turn AS s;
    idle := format('catbus.outbox_%s', turn);
    busy := format('catbus.outbox_%s', 1 - turn);
    IF pg_relation_size(idle) = 0 THEN
        -- Some 2,000 small messages, which take a third of a millisecond to look through.
        IF pg_relation_size(busy) > 262144 THEN
            PERFORM setval('catbus.outbox_turn', turn);
        END IF;
        RETURN;
    END IF;

    EXECUTE format('SELECT EXISTS (SELECT FROM %s)', idle) INTO waits;
    IF waits THEN
        RETURN;
    END IF;
    -- The lock ends with the commit, which must not wait for standbys.
    PERFORM set_config('synchronous_commit', 'local', true);
    BEGIN
        EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', idle);
    EXCEPTION WHEN lock_not_available THEN
        RETURN;
    END;
    -- Whoever published into it has ended, and a statement that begins now sees what of that was committed.
    EXECUTE format('SELECT EXISTS (SELECT FROM %s)', idle) INTO waits;
    IF NOT waits THEN
        EXECUTE format('TRUNCATE %s', idle);
    END IF;
END
$$;

REVOKE ALL ON FUNCTION catbus.check_message, catbus.publish, catbus.outbox_waits, catbus.move_outbox,
    catbus.turn_outbox FROM PUBLIC;
