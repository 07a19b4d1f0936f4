-- What crosses by NOTIFY shows nothing but positions, and what others notify is not believed. Every role that may connect
-- to the database hears all notifications and may send any; PostgreSQL has no permission for either. Only the owner of
-- the schema can read `catbus.head.seal`, by which replicas recognise and read notifications (catbus/postgres/notifications/encryption.py).

COMMENT ON COLUMN catbus.head.seal IS 'The secret by which replicas recognise and read notifications';

-- HMAC-SHA256 (RFC 2104) with a key of 32 bytes: its block is the key, eight bytes at a time, and 32 zeros.
CREATE FUNCTION catbus.hmac(key bytea, message bytea) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    digits text := encode(key, 'hex');
    word   bigint;
    inside bytea := '';
    around bytea := '';
BEGIN
    FOR i IN 0..3 LOOP
        word := ('x' || substr(digits, 16 * i + 1, 16))::bit(64)::bigint;
        inside := inside || int8send(word # x'3636363636363636'::bigint);
        around := around || int8send(word # x'5c5c5c5c5c5c5c5c'::bigint);
    END LOOP;
    RETURN sha256(around || decode(repeat('5c', 32), 'hex')
        || sha256(inside || decode(repeat('36', 32), 'hex') || message));
END
$$;

-- Notifies `shown`, which is a word, and `enclosed`, if that fits. A MAC that only the owner can make stands between them.
--
-- One stopped listener keeps the queue of notifications from shrinking, and when it is full no commit that notifies
-- succeeds. Nobody depends on notifications: the tables are the truth.
CREATE FUNCTION catbus.notify(channel text, shown text, enclosed text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    seal text;
    mac  text;
BEGIN
    IF pg_notification_queue_usage() > 0.5 THEN
        RETURN;
    END IF;
    -- A notification has at most 7,999 bytes, and the MAC has 44 of them.
    IF octet_length(shown) + octet_length(enclosed) > 7900 THEN
        enclosed := NULL;
    END IF;
    SELECT h.seal INTO STRICT seal FROM catbus.head AS h;
    mac := encode(catbus.hmac(
        sha256(convert_to(seal, 'UTF8')),
        convert_to(format('%s %s %s', channel, shown, enclosed), 'UTF8')
    ), 'base64');
    PERFORM pg_notify(channel, concat_ws(' ', shown, mac, enclosed));
END
$$;

REVOKE ALL ON FUNCTION catbus.hmac, catbus.notify FROM PUBLIC;

-- As before, and `enclosed` is what the entries are for those who can decrypt it. It travels along when all entries are
-- new. Without it, as replicas of earlier releases call this, nothing but the position is notified.
DROP FUNCTION catbus.append;
CREATE FUNCTION catbus.append(
    synchronous_commit text,
    epoch     text,
    channels  text[],
    payloads  text[],
    producers bytea[],
    numbers   bigint[],
    senders   text[],
    origins   bytea[],
    afters    bigint[],
    enclosed  text DEFAULT NULL
) RETURNS TABLE (at bigint, first bigint, seqs bigint[])
LANGUAGE plpgsql
-- The plans are those for a big log, whatever its size and statistics were when a connection made them.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET geqo = off
SET jit = off
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    head  record;
    last  bigint;
    added bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.append needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;

    -- Both hold until the transaction has ended, which the SET clauses above do not: COMMIT is what waits for the disk.
    PERFORM set_config('synchronous_commit', append.synchronous_commit, true), set_config('lock_timeout', '2s', true);

    -- FOR UPDATE leaves no version of the row behind, and still writes: a call that finds nothing but duplicates waits
    -- for the same disks and standbys as the call that brought the originals.
    SELECT h.epoch, h.slot, h.floor INTO STRICT head FROM catbus.head AS h FOR UPDATE;
    IF head.epoch IS DISTINCT FROM append.epoch THEN
        RAISE EXCEPTION 'the epoch of the log is %, not %', head.epoch, append.epoch USING ERRCODE = 'CB001';
    END IF;

    -- From here on every statement sees all that was committed by those who had the lock before.
    SELECT e.seq, e.at INTO last, at FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1;
    -- In an empty log both are null, and greatest ignores that. A clock that was set back must not turn time back.
    first := greatest(last + 1, head.floor);
    at := greatest(at, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint);

    -- One look per producer settles the usual case: where it has nothing from its lowest number on, its keys are new.
    -- In the order of the index that takes half the time; LIMIT keeps the planner from turning the nesting inside out.
    IF NOT EXISTS (
        SELECT FROM (
            SELECT key.producer, min(key.number) AS lowest
            FROM unnest(producers, numbers) AS key (producer, number)
            GROUP BY key.producer ORDER BY key.producer
        ) AS key
        CROSS JOIN LATERAL (
            SELECT FROM catbus.entries AS e WHERE e.producer = key.producer AND e.number >= key.lowest LIMIT 1
        ) AS known
    ) AND NOT EXISTS (
        SELECT FROM unnest(afters) AS retry (after) WHERE retry.after < (SELECT catbus.unknown_below(head.floor, first))
    ) THEN
        added := cardinality(channels);
        seqs := ARRAY(SELECT generate_series(first, first + added - 1));
    ELSE
        SELECT count(*) FILTER (WHERE entry.new),
               array_agg(
                   CASE WHEN entry.new THEN first - 1 + entry.nth ELSE entry.known END
                   ORDER BY entry.i)
        INTO added, seqs
        FROM (
            SELECT checked.i, checked.known, checked.known IS NULL AS new,
                   count(*) FILTER (WHERE checked.known IS NULL) OVER (ORDER BY checked.i) AS nth
            FROM (
                SELECT given.i,
                       CASE WHEN e.seq IS NULL THEN CASE WHEN given.after < (SELECT catbus.unknown_below(head.floor, first)) THEN -1 END
                            WHEN e.channel = given.channel AND e.payload = given.payload THEN e.seq
                            ELSE 0
                       END AS known
                FROM unnest(channels, payloads, producers, numbers, afters)
                     WITH ORDINALITY AS given (channel, payload, producer, number, after, i)
                LEFT JOIN catbus.entries AS e ON e.producer = given.producer AND e.number = given.number
            ) AS checked
        ) AS entry;
    END IF;

    IF added > 0 THEN
        INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, sender, origin)
        SELECT head.slot, new.seq, append.at, new.channel, new.payload, new.producer, new.number, new.sender, new.origin
        FROM unnest(seqs, channels, payloads, producers, numbers, senders, origins)
             AS new (seq, channel, payload, producer, number, sender, origin)
        WHERE new.seq >= first;

        PERFORM catbus.notify(
            'catbus',
            format('%s:%s:%s', head.epoch, first, first + added - 1),
            CASE WHEN added = cardinality(channels) AND enclosed IS NOT NULL THEN format('%s %s', at, enclosed) END
        );
    END IF;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.append FROM PUBLIC;

-- As before, but for the notification.
CREATE OR REPLACE FUNCTION catbus.move_outbox(
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
SET geqo = off
SET jit = off
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
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
    PERFORM catbus.notify('catbus', format('%s:%s:%s', head.epoch, first, last));
END
$$;

-- As before, but for the notification.
CREATE OR REPLACE FUNCTION catbus.new_epoch(expected text, agreed bigint DEFAULT NULL)
RETURNS TABLE (epoch text, after_seq bigint, made boolean)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    newest bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.new_epoch needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    SELECT h.epoch INTO STRICT epoch FROM catbus.head AS h FOR UPDATE;
    made := epoch = expected;
    IF made THEN
        SELECT p.head INTO newest FROM catbus.position() AS p;
        -- The sequence behind the ordinals may have been left behind by a restore.
        INSERT INTO catbus.epochs (epoch, ordinal, after_seq, system_identifier, timeline)
        OVERRIDING SYSTEM VALUE
        SELECT gen_random_uuid()::text, (SELECT max(e.ordinal) + 1 FROM catbus.epochs AS e),
               greatest(least(agreed, newest), 0), p.system_identifier, p.timeline
        FROM catbus.place() AS p
        RETURNING epochs.epoch INTO epoch;
        newest := catbus.begin_seqs(newest);
        UPDATE catbus.head SET epoch = new_epoch.epoch;
        PERFORM catbus.notify('catbus', format('%s:%s:%s', epoch, newest + 1, newest));
    END IF;
    SELECT e.after_seq INTO after_seq FROM catbus.epochs AS e WHERE e.epoch = new_epoch.epoch;
    RETURN NEXT;
END
$$;

-- Names a role for those who have the seal: 16 random bytes, and its key under a mask that is made of them.
CREATE FUNCTION catbus.mask_role(key bytea) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
AS $$
DECLARE
    nonce  text := encode(uuid_send(gen_random_uuid()), 'hex');
    digits text := encode(key, 'hex');
    masked text := nonce;
    mask   text;
BEGIN
    SELECT encode(catbus.hmac(sha256(convert_to(h.seal, 'UTF8')), convert_to('mask of catbus_roles ' || nonce, 'UTF8')), 'hex')
    INTO STRICT mask FROM catbus.head AS h;
    FOR i IN 0..3 LOOP
        masked := masked || encode(int8send(('x' || substr(digits, 16 * i + 1, 16))::bit(64)::bigint
            # ('x' || substr(mask, 16 * i + 1, 16))::bit(64)::bigint), 'hex');
    END LOOP;
    RETURN masked;
END
$$;

REVOKE ALL ON FUNCTION catbus.mask_role FROM PUBLIC;

-- As before, but for the notifications: one for each role, or one where it may be any.
CREATE OR REPLACE FUNCTION catbus.note_role_changes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET standard_conforming_strings = on
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
