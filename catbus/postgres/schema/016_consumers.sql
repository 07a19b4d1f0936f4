-- Consumers: named positions in the log, for transactions that process each message exactly once.
--
-- A transaction receives messages, which moves a cursor, and has its effects. Its commit is the acknowledgement. Rollback
-- puts the cursor back, and another transaction receives the same messages.
--
-- A consumer has partitions. Each of them has a cursor, and gets the channels whose hash falls on it. A transaction locks
-- the partition from which it receives, so the messages of a channel are processed one after the other.

CREATE TABLE catbus.consumers (
    name       text        COLLATE "C" PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9_.-]{1,64}$'),
    owner      regrole     NOT NULL,
    pattern    text        COLLATE "C" NOT NULL,
    low        text        COLLATE "C",
    high       text        COLLATE "C",
    partitions smallint    NOT NULL CHECK (partitions BETWEEN 1 AND 64),
    hold       boolean     NOT NULL,
    created    timestamptz NOT NULL DEFAULT now(),
    push       text        COLLATE "C"
);
COMMENT ON TABLE catbus.consumers IS 'Named positions in the log, from which SQL transactions receive messages';
COMMENT ON COLUMN catbus.consumers.owner IS 'Roles with the privileges of this role may use the consumer';
COMMENT ON COLUMN catbus.consumers.low IS 'The pattern as catbus.pattern_range returns it';
COMMENT ON COLUMN catbus.consumers.partitions IS 'Fixed: another number would move channels to other cursors';
COMMENT ON COLUMN catbus.consumers.hold IS 'Retention waits for the consumer, up to the maximum size of the log';
COMMENT ON COLUMN catbus.consumers.push IS 'The URL to which replicas deliver the messages; null if transactions receive them';

-- The row is the lock of a partition. It is locked and never updated: an update would leave a row version behind, which
-- all others have to step over for as long as any transaction in the database is open.
CREATE TABLE catbus.consumer_partitions (
    consumer text     COLLATE "C" NOT NULL REFERENCES catbus.consumers ON DELETE CASCADE,
    part     smallint NOT NULL,
    counter  regclass,
    PRIMARY KEY (consumer, part)
);
COMMENT ON TABLE catbus.consumer_partitions IS 'The locks of the partitions of consumers';
COMMENT ON COLUMN catbus.consumer_partitions.counter IS 'The sequence that counts attempts: 017_attempts.sql';

-- Each move of a cursor gives its row a greater turn. So a search that begins at the greatest turn finds the newest row
-- version first, and walks over no dead one. The least turn is that of the partition that was moved least recently.
CREATE TABLE catbus.consumer_cursors (
    consumer   text        COLLATE "C" NOT NULL,
    part       smallint    NOT NULL,
    turn       bigint      NOT NULL,
    cursor     bigint      NOT NULL,
    moved      timestamptz NOT NULL DEFAULT clock_timestamp(),
    moved_by   xid8,
    moved_from bigint,
    postponed  timestamptz,
    failure    text,
    alone      bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (consumer, part, turn),
    FOREIGN KEY (consumer, part) REFERENCES catbus.consumer_partitions ON DELETE CASCADE
) WITH (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);
COMMENT ON TABLE catbus.consumer_cursors IS 'The cursors of the partitions of consumers';
COMMENT ON COLUMN catbus.consumer_cursors.cursor IS 'The partition has processed all of its messages up to this seq';
COMMENT ON COLUMN catbus.consumer_cursors.moved_by IS 'The transaction that received messages last';
COMMENT ON COLUMN catbus.consumer_cursors.moved_from IS 'The cursor before that transaction';
COMMENT ON COLUMN catbus.consumer_cursors.postponed IS 'Until then nothing is received: catbus.postpone';
COMMENT ON COLUMN catbus.consumer_cursors.failure IS 'The reason of the postponement';
COMMENT ON COLUMN catbus.consumer_cursors.alone IS 'With attempts, messages up to this seq are received one at a time';
CREATE SEQUENCE catbus.consumer_turn CACHE 1;

-- The messages are copies: retention does not remove them.
CREATE TABLE catbus.rejected_messages (
    consumer text        COLLATE "C" NOT NULL REFERENCES catbus.consumers ON DELETE CASCADE,
    seq      bigint      NOT NULL,
    at       bigint      NOT NULL,
    channel  text        COLLATE "C" NOT NULL,
    payload  text        NOT NULL,
    sender   text,
    reason   text,
    rejected timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer, seq)
);
COMMENT ON TABLE catbus.rejected_messages IS 'What catbus.dead_letters shows to the owners of the consumers';
INSERT INTO catbus.erasures (name) VALUES ('rejected_messages');

-- In a view, current_user is the role that reads it.
CREATE VIEW catbus.dead_letters WITH (security_barrier) AS
SELECT r.consumer, r.seq, r.channel, r.payload, to_timestamp(r.at / 1000.0) AS at, r.sender, r.reason, r.rejected
FROM catbus.rejected_messages AS r
WHERE EXISTS (
    SELECT FROM catbus.consumers AS c JOIN pg_namespace AS n ON n.nspname = 'catbus'
    WHERE c.name = r.consumer
          AND (pg_has_role(current_user, c.owner, 'USAGE') OR pg_has_role(current_user, n.nspowner, 'USAGE'))
);
COMMENT ON VIEW catbus.dead_letters IS 'The messages that were rejected; SELECT and DELETE, for the owner of the consumer';

-- The consumer `name`, if the caller may use it. `doing` is the function that asks, for the message of the error.
--
-- SECURITY DEFINER hides current_user, but not SET ROLE. `current_user` is the owner of the schema here.
--
-- Raises 25001 in any isolation level but READ COMMITTED: an older snapshot sees neither the floor that was moved nor the
-- rows that TRUNCATE took, and would pass over them silently. Raises 42501 if there is no such consumer, or if the caller
-- may not use it.
CREATE FUNCTION catbus.own_consumer(name text, doing text) RETURNS catbus.consumers
LANGUAGE plpgsql
AS $$
DECLARE
    caller   name := CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role')::name END;
    consumer catbus.consumers;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.% needs the isolation level "read committed", not "%"',
            doing, current_setting('transaction_isolation')
            USING ERRCODE = '25001',
                  HINT = 'Begin the transaction with BEGIN ISOLATION LEVEL READ COMMITTED.';
    END IF;
    SELECT * INTO consumer FROM catbus.consumers AS c WHERE c.name = own_consumer.name;
    IF NOT FOUND
        OR NOT (pg_has_role(caller, consumer.owner, 'USAGE') OR pg_has_role(caller, current_user, 'USAGE'))
    THEN
        RAISE EXCEPTION 'the role "%" has no consumer "%"', caller, name
            USING ERRCODE = '42501', HINT = 'catbus.consumer_positions() lists the consumers that a role may use.';
    END IF;
    RETURN consumer;
END
$$;

-- The first gap behind `cursor`, if there is one directly behind it, or behind the entries that follow it up to `until`.
--
-- first, last  the seqs that are missing: retention, a new epoch or a deletion took them. Null for no gap
-- back         the log ends before `cursor`: it was restored without its newest entries
--
-- Like all functions of this file it gives the locks on the tables of the log back: they end with the inner block, by
-- RAISE, and variables outlive it. Otherwise retention would wait for the end of the caller's transaction.
CREATE FUNCTION catbus.gap_behind(cursor bigint, until bigint, OUT first bigint, OUT last bigint, OUT back boolean)
LANGUAGE plpgsql
AS $$
DECLARE
    head  bigint;
    run   bigint;
    next  bigint;
    floor bigint;
BEGIN
    BEGIN
        SELECT p.head INTO head FROM catbus.log_position() AS p;
        SELECT coalesce(max(w.seq), gap_behind.cursor) INTO run
        FROM (
            SELECT e.seq, row_number() OVER (ORDER BY e.seq) AS nth
            FROM catbus.entries AS e WHERE e.seq > gap_behind.cursor AND e.seq <= until
        ) AS w
        WHERE w.seq = gap_behind.cursor + w.nth;
        SELECT e.seq INTO next FROM catbus.entries AS e WHERE e.seq > run ORDER BY e.seq LIMIT 1;
        SELECT h.floor INTO STRICT floor FROM catbus.head AS h;
        RAISE EXCEPTION USING ERRCODE = 'CB099';
    EXCEPTION WHEN SQLSTATE 'CB099' THEN
        NULL;
    END;
    back := gap_behind.cursor > greatest(head, floor - 1);
    IF back THEN
        first := greatest(head, floor - 1) + 1;
        last := gap_behind.cursor;
    ELSIF greatest(next, floor) - 1 > run THEN
        first := run + 1;
        last := greatest(next, floor) - 1;
    END IF;
END
$$;

-- Receive the next messages of a consumer, at most `max_messages` of them, all of one partition, in the order of the log.
-- The cursor moves past them, and the partition is locked until the transaction has ended.
--
-- No row comes back if there is nothing to receive, or if other transactions process what there is. A second call in a
-- transaction goes on behind the first one.
--
-- With `attempts` it counts the transactions that have received a message and did not commit: 017_attempts.sql.
--
-- Raises what catbus.own_consumer raises, CB002 if messages were removed before the consumer received them, 22023 for a
-- wrong number, and 55000 if replicas deliver the messages of this consumer to a URL.
CREATE FUNCTION catbus.receive(name text, max_messages integer DEFAULT 100, attempts boolean DEFAULT false)
RETURNS TABLE (seq bigint, channel text, payload text, at timestamptz, sender text, attempt integer)
LANGUAGE plpgsql SECURITY DEFINER
AS $$
#variable_conflict use_column
DECLARE
    -- How many entries a call looks at for a partition, and from how many on it moves the cursor although none of them is
    -- for the partition: the move costs less than to look at them again.
    reach    CONSTANT bigint := 10000;
    far      CONSTANT bigint := 1000;
    -- In a quiet log cursors move after this time: otherwise retention would pass them, or wait for them, for nothing.
    patience CONSTANT interval := '10 s';
    c        catbus.consumers := catbus.own_consumer(receive.name, 'receive');
    own      xid8 := pg_current_xact_id_if_assigned();
    parts    smallint[];
    cursors  bigint[];
    moves    timestamptz[];
    waits    timestamptz[];
    near     boolean;
    busy     integer[];
    chosen   smallint;
    counter  regclass;
    held     record;
    gap      record;
    head     bigint;
    floor    bigint;
    upto     bigint;
    alone_to bigint;
    tries    integer;
    seen     bigint;
    dead     boolean;
    received boolean := false;
    seqs     bigint[];
    channels text[];
    payloads text[];
    times    bigint[];
    senders  text[];
BEGIN
    IF max_messages IS NULL OR max_messages NOT BETWEEN 1 AND reach THEN
        RAISE EXCEPTION 'catbus.receive returns 1 to % messages, not %', reach, max_messages USING ERRCODE = '22023';
    ELSIF c.push IS NOT NULL THEN
        RAISE EXCEPTION 'replicas deliver the messages of the consumer "%" to a URL', receive.name
            USING ERRCODE = '55000', HINT = 'Create another consumer to receive them.';
    END IF;

    -- The partition from which this transaction has received already comes first, then the one that was moved least
    -- recently: a fixed order would starve the last ones.
    SELECT array_agg(k.part ORDER BY (n.moved_by = own) IS TRUE DESC, n.turn),
           array_agg(n.cursor ORDER BY k.part), array_agg(n.moved ORDER BY k.part),
           array_agg(n.postponed ORDER BY k.part)
    INTO parts, cursors, moves, waits
    FROM catbus.consumer_partitions AS k
    CROSS JOIN LATERAL (
        SELECT n.turn, n.moved_by, n.cursor, n.moved, n.postponed FROM catbus.consumer_cursors AS n
        WHERE n.consumer = k.consumer AND n.part = k.part ORDER BY n.turn DESC LIMIT 1
    ) AS n
    WHERE k.consumer = receive.name;

    -- A call that finds nothing takes no lock and writes nothing. If all cursors are near the head, look which partitions
    -- have messages. After 100 messages the search ends, and any partition may have some.
    BEGIN
        SELECT p.head, p.floor INTO head, floor FROM catbus.log_position() AS p;
        SELECT bool_and(n.cursor = head OR n.cursor BETWEEN greatest(floor - 1, head - far) AND head
                        AND n.moved > clock_timestamp() - patience)
        INTO near FROM unnest(cursors, moves) AS n (cursor, moved);
        IF near THEN
            SELECT coalesce(array_agg(DISTINCT m.part), '{}'), count(*) < 100 INTO busy, near
            FROM (
                SELECT w.part FROM (
                    SELECT e.seq, e.channel, (hashtext(e.channel) & 2147483647) % c.partitions AS part
                    FROM catbus.entries AS e
                    WHERE e.seq > (SELECT min(n) FROM unnest(cursors) AS n) AND e.seq <= head ORDER BY e.seq OFFSET 0
                ) AS w
                WHERE (c.low IS NULL AND NOT starts_with(w.channel, '_') OR w.channel >= c.low AND w.channel < c.high)
                      AND w.seq > cursors[1 + w.part]
                LIMIT 100
            ) AS m;
        END IF;
        RAISE EXCEPTION USING ERRCODE = 'CB099';
    EXCEPTION WHEN SQLSTATE 'CB099' THEN
        NULL;
    END;

    FOREACH chosen IN ARRAY parts LOOP
        CONTINUE WHEN cursors[1 + chosen] = head OR near AND chosen <> ALL (busy)
                      OR waits[1 + chosen] > clock_timestamp();
        BEGIN
            -- The lock comes first, and the cursor in a later statement: the snapshot of the lock may be older than the
            -- commit that released it.
            SELECT k.counter INTO counter FROM catbus.consumer_partitions AS k
            WHERE k.consumer = receive.name AND k.part = chosen FOR UPDATE SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            SELECT n.cursor, n.moved, n.postponed, n.alone, n.ctid AS place INTO STRICT held
            FROM catbus.consumer_cursors AS n
            WHERE n.consumer = receive.name AND n.part = chosen ORDER BY n.turn DESC LIMIT 1;
            IF held.postponed > clock_timestamp() THEN
                RAISE EXCEPTION USING ERRCODE = 'CB099';
            END IF;
            alone_to := held.alone;
            tries := NULL;

            -- The head in an earlier statement than the entries, so that the cursor passes over nothing that they did not
            -- show, and the floor in a later one, because TRUNCATE takes rows out of old snapshots.
            BEGIN
                SELECT p.head INTO head FROM catbus.log_position() AS p;
                upto := least(held.cursor + reach, head);
                dead := EXISTS (
                    SELECT FROM catbus.rejected_messages AS r
                    WHERE r.consumer = receive.name AND r.seq > held.cursor AND r.seq <= upto);
                -- OFFSET 0 keeps the planner at the index of the seqs. By channel it would read and sort all of a broad
                -- pattern.
                SELECT array_agg(m.seq), array_agg(m.channel), array_agg(m.payload), array_agg(m.at),
                       array_agg(m.sender)
                INTO seqs, channels, payloads, times, senders
                FROM (
                    SELECT w.* FROM (
                        SELECT e.seq, e.channel, e.payload, e.at, e.sender FROM catbus.entries AS e
                        WHERE e.seq > held.cursor AND e.seq <= upto ORDER BY e.seq OFFSET 0
                    ) AS w
                    WHERE (c.low IS NULL AND NOT starts_with(w.channel, '_')
                           OR w.channel >= c.low AND w.channel < c.high)
                          AND (c.partitions = 1 OR (hashtext(w.channel) & 2147483647) % c.partitions = chosen)
                          AND (NOT dead OR NOT EXISTS (
                              SELECT FROM catbus.rejected_messages AS r
                              WHERE r.consumer = receive.name AND r.seq = w.seq))
                    LIMIT max_messages
                ) AS m;
                -- A transaction has received these messages before, and has not committed. One of them may be the reason.
                IF attempts AND pg_sequence_last_value(counter) >> 10 = seqs[1] THEN
                    tries := pg_sequence_last_value(counter) & 1023;
                    alone_to := greatest(alone_to, seqs[cardinality(seqs)]);
                END IF;
                IF attempts AND seqs[1] <= alone_to THEN
                    upto := seqs[1];
                ELSIF cardinality(seqs) = max_messages THEN
                    upto := seqs[max_messages];
                END IF;
                -- Seqs have no hole, so every entry that the cursor passes over can be counted.
                SELECT count(*) INTO seen FROM catbus.entries AS e WHERE e.seq > held.cursor AND e.seq <= upto;
                SELECT h.floor INTO STRICT floor FROM catbus.head AS h;
                RAISE EXCEPTION USING ERRCODE = 'CB099';
            EXCEPTION WHEN SQLSTATE 'CB099' THEN
                NULL;
            END;
            head := greatest(head, floor - 1);
            IF seen < upto - held.cursor OR held.cursor < floor - 1 OR held.cursor > head THEN
                gap := catbus.gap_behind(held.cursor, upto);
                IF gap.back OR gap.first = held.cursor + 1 THEN
                    RAISE EXCEPTION 'consumer "%" has not received the messages % to %, and they are not in the log',
                        receive.name, gap.first, gap.last
                        USING ERRCODE = 'CB002',
                              DETAIL = format('They were removed by retention, with a restore of the database or by '
                                              'hand. It concerns partition %s.', chosen),
                              HINT = format('SELECT * FROM catbus.skip_gap(%L) goes on behind them.', receive.name);
                ELSIF gap.first <= upto THEN
                    upto := gap.first - 1;
                END IF;
            END IF;

            received := coalesce(seqs[1] <= upto, false);
            -- Nothing is left behind: the lock ends with this block.
            IF NOT received AND (upto <= held.cursor
                              OR upto - held.cursor < far AND held.moved > clock_timestamp() - patience)
            THEN
                RAISE EXCEPTION USING ERRCODE = 'CB099';
            END IF;
            IF received AND attempts THEN
                -- A transaction with several messages is no attempt of one of them. A rollback leaves the sequence as it is.
                tries := CASE WHEN seqs[2] <= upto THEN 0 ELSE least(coalesce(tries, 0) + 1, 1023) END;
                PERFORM setval(counter, seqs[1] << 10 | tries);
            END IF;
            UPDATE catbus.consumer_cursors AS n
            SET cursor = upto, turn = nextval('catbus.consumer_turn'), moved = clock_timestamp(), postponed = NULL,
                failure = NULL, alone = alone_to,
                moved_from = CASE WHEN n.moved_by = pg_current_xact_id() THEN n.moved_from ELSE n.cursor END,
                moved_by = pg_current_xact_id()
            WHERE n.ctid = held.place;
        EXCEPTION WHEN SQLSTATE 'CB099' THEN
            NULL;
        END;
        EXIT WHEN received;
    END LOOP;
    IF received THEN
        RETURN QUERY
        SELECT m.seq, m.channel, m.payload, to_timestamp(m.at / 1000.0), m.sender,
               CASE WHEN attempts THEN greatest(tries, 1) END
        FROM ROWS FROM (unnest(seqs), unnest(channels), unnest(payloads), unnest(times), unnest(senders))
             AS m (seq, channel, payload, at, sender)
        WHERE m.seq <= upto;
    END IF;
END
$$;
COMMENT ON FUNCTION catbus.receive IS 'Receives the next messages of a consumer; the commit acknowledges them';

-- Move a message to catbus.dead_letters, so that the consumer passes over it: a message that this transaction has
-- received, or one that the consumer has not received yet (for example after the rollback of a transaction that failed).
--
-- Raises what catbus.own_consumer raises, CB003 if the message is not one of the consumer, or was processed, and 55P03
-- while another transaction processes messages of its partition: waiting for that could be a deadlock.
CREATE FUNCTION catbus.reject(name text, seq bigint, reason text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
#variable_conflict use_column
DECLARE
    c       catbus.consumers := catbus.own_consumer(reject.name, 'reject');
    message record;
    held    record;
    home    smallint;
BEGIN
    -- Before the message is read: an erasure that began before has ended, and one that begins now waits, and erases the
    -- copy, too.
    LOCK TABLE catbus.rejected_messages IN ROW EXCLUSIVE MODE;
    BEGIN
        SELECT e.at, e.channel, e.payload, e.sender INTO message FROM catbus.entries AS e WHERE e.seq = reject.seq;
        RAISE EXCEPTION USING ERRCODE = 'CB099';
    EXCEPTION WHEN SQLSTATE 'CB099' THEN
        NULL;
    END;
    IF message.channel = '_erased' THEN
        RETURN;
    END IF;
    IF message.channel IS NULL
        OR NOT (c.low IS NULL AND NOT starts_with(message.channel, '_')
                OR coalesce(message.channel >= c.low AND message.channel < c.high, false))
    THEN
        RAISE EXCEPTION 'the log has no message % of the consumer "%"', reject.seq, reject.name USING ERRCODE = 'CB003';
    END IF;
    home := (hashtext(message.channel) & 2147483647) % c.partitions;
    PERFORM FROM catbus.consumer_partitions AS k
    WHERE k.consumer = reject.name AND k.part = home FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another transaction processes messages of partition % of the consumer "%"', home, reject.name
            USING ERRCODE = '55P03', HINT = 'Try again when it has ended.';
    END IF;
    SELECT n.cursor, n.moved_by, n.moved_from INTO STRICT held FROM catbus.consumer_cursors AS n
    WHERE n.consumer = reject.name AND n.part = home ORDER BY n.turn DESC LIMIT 1;
    IF reject.seq <= held.cursor
        AND (held.moved_by = pg_current_xact_id() AND reject.seq > held.moved_from) IS NOT TRUE
    THEN
        RAISE EXCEPTION 'the consumer "%" has processed message %', reject.name, reject.seq
            USING ERRCODE = 'CB003', HINT = 'Reject a message in the transaction that receives it.';
    END IF;
    INSERT INTO catbus.rejected_messages (consumer, seq, at, channel, payload, sender, reason)
    VALUES (reject.name, reject.seq, message.at, message.channel, message.payload, message.sender, reject.reason)
    ON CONFLICT DO NOTHING;
END
$$;
COMMENT ON FUNCTION catbus.reject IS 'Moves a message of a consumer to catbus.dead_letters, so that the consumer passes over it';

-- The cursor for `start`: `head` (only later messages), `floor` (all messages that still exist), or a seq (the messages
-- after it). With `hold` it locks the head row, so that retention does not move before the transaction has ended.
--
-- Raises 22023 for anything else, and for a seq after which messages are missing.
CREATE FUNCTION catbus.start_cursor(start text, hold boolean) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    head  bigint;
    floor bigint;
BEGIN
    IF hold THEN
        PERFORM FROM catbus.head FOR UPDATE;
    END IF;
    SELECT p.head, p.floor INTO head, floor FROM catbus.position() AS p;
    IF start = 'head' THEN
        RETURN head;
    ELSIF start = 'floor' THEN
        RETURN floor - 1;
    ELSIF start ~ '^[0-9]{1,18}$' AND start::bigint BETWEEN floor - 1 AND head THEN
        RETURN start;
    END IF;
    RAISE EXCEPTION 'a consumer starts at "head", at "floor" or after a seq from % to %, not at "%"',
        floor - 1, head, left(start, 64)
        USING ERRCODE = '22023';
END
$$;

-- Create a consumer of the messages that a pattern matches.
--
-- partitions  how many transactions may process messages at the same time, 1 to 64. It cannot be changed
-- start       which messages it receives: see catbus.start_cursor
-- hold        retention waits until it has received a message, up to the maximum size of the log. Publishing waits until
--             the transaction that creates such a consumer has ended
-- owner       the role that may use it, with EXECUTE on the functions for that; by default the caller
-- push        replicas deliver the messages to this URL: see 018_webhooks.sql
-- secret      signs the deliveries: "whsec_" and 24 to 64 bytes in base64; by default a random one
--
-- The owner may read all messages that the pattern matches, whatever the grants of tokens are. Raises 42710 if the
-- consumer exists, and 22023 for a wrong argument.
CREATE FUNCTION catbus.create_consumer(
    name       text,
    pattern    text,
    partitions integer DEFAULT 1,
    start      text    DEFAULT 'head',
    hold       boolean DEFAULT false,
    owner      regrole DEFAULT NULL,
    push       text    DEFAULT NULL,
    secret     text    DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    caller   name := CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role')::name END;
    own      regrole := coalesce(owner, (SELECT r.oid::regrole FROM pg_roles AS r WHERE r.rolname = caller));
    function regprocedure;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.create_consumer needs the isolation level "read committed", not "%"',
            current_setting('transaction_isolation')
            USING ERRCODE = '25001', HINT = 'Begin the transaction with BEGIN ISOLATION LEVEL READ COMMITTED.';
    END IF;
    IF (name ~ '^[A-Za-z0-9_.-]{1,64}$') IS NOT TRUE THEN
        RAISE EXCEPTION 'not a name of a consumer: "%"', left(name, 64)
            USING ERRCODE = '22023', DETAIL = 'A name is 1 to 64 of A-Z, a-z, 0-9, _, . and -.';
    ELSIF (partitions BETWEEN 1 AND 64) IS NOT TRUE THEN
        RAISE EXCEPTION 'a consumer has 1 to 64 partitions, not %', partitions USING ERRCODE = '22023';
    ELSIF EXISTS (SELECT FROM catbus.consumers AS c WHERE c.name = create_consumer.name) THEN
        RAISE EXCEPTION 'the consumer "%" exists', name USING ERRCODE = '42710';
    END IF;
    INSERT INTO catbus.consumers (name, owner, pattern, low, high, partitions, hold, push)
    SELECT create_consumer.name, own, create_consumer.pattern, r.low, r.high, create_consumer.partitions,
           create_consumer.hold, create_consumer.push
    FROM catbus.pattern_range(create_consumer.pattern) AS r;
    INSERT INTO catbus.consumer_partitions (consumer, part)
    SELECT create_consumer.name, n FROM generate_series(0, create_consumer.partitions - 1) AS n;
    INSERT INTO catbus.consumer_cursors (consumer, part, turn, cursor)
    SELECT k.consumer, k.part, nextval('catbus.consumer_turn'), s.cursor
    FROM catbus.consumer_partitions AS k
    CROSS JOIN (SELECT catbus.start_cursor(create_consumer.start, create_consumer.hold) AS cursor) AS s
    WHERE k.consumer = create_consumer.name;

    -- These rights also keep the role from being dropped: the owner would be a number without a name then.
    EXECUTE format('GRANT USAGE ON SCHEMA catbus TO %s', own);
    EXECUTE format('GRANT SELECT, DELETE ON catbus.dead_letters TO %s', own);
    FOREACH function IN ARRAY ARRAY[
        'catbus.receive(text, integer, boolean)', 'catbus.reject(text, bigint, text)',
        'catbus.postpone(text, interval, text)', 'catbus.far_behind(text)', 'catbus.skip_gap(text)',
        'catbus.reset_consumer(text, text)', 'catbus.drop_consumer(text)', 'catbus.consumer_positions()'
    ]::regprocedure[] LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', function, own);
    END LOOP;
    IF push IS NOT NULL OR secret IS NOT NULL THEN
        PERFORM catbus.create_webhook(name, secret);
    END IF;
END
$$;
COMMENT ON FUNCTION catbus.create_consumer IS 'Creates a consumer of the messages that a pattern matches';

-- Lock all partitions of a consumer, and return their cursors. It waits for transactions that process messages.
CREATE FUNCTION catbus.lock_consumer(name text) RETURNS TABLE (part smallint, cursor bigint)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM catbus.consumer_partitions AS k
    WHERE k.consumer = lock_consumer.name ORDER BY k.part FOR UPDATE;
    RETURN QUERY
    SELECT n.part, n.cursor FROM catbus.consumer_cursors AS n WHERE n.consumer = lock_consumer.name ORDER BY n.part;
END
$$;

CREATE FUNCTION catbus.move_cursor(name text, part smallint, destination bigint) RETURNS void
LANGUAGE sql
AS $$
    SELECT setval(k.counter, 1) FROM catbus.consumer_partitions AS k
    WHERE k.consumer = name AND k.part = move_cursor.part;
    UPDATE catbus.consumer_cursors AS n
    SET cursor = destination, turn = nextval('catbus.consumer_turn'), moved = clock_timestamp(), moved_by = NULL,
        moved_from = NULL, postponed = NULL, failure = NULL, alone = 0
    WHERE n.consumer = name AND n.part = move_cursor.part
$$;

-- Go on behind messages that were removed before the consumer received them. Returns the missing seqs of each partition;
-- no row if none are missing.
--
-- Raises what catbus.own_consumer raises, and 55P03 if a partition is not free within two seconds.
CREATE FUNCTION catbus.skip_gap(name text) RETURNS TABLE (partition smallint, first bigint, last bigint)
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c    catbus.consumers := catbus.own_consumer(name, 'skip_gap');
    held record;
    gap  record;
BEGIN
    FOR held IN SELECT l.part, l.cursor FROM catbus.lock_consumer(c.name) AS l LOOP
        gap := catbus.gap_behind(held.cursor, held.cursor);
        IF gap.first IS NOT NULL THEN
            PERFORM catbus.move_cursor(c.name, held.part, CASE WHEN gap.back THEN gap.first - 1 ELSE gap.last END);
            partition := held.part;
            first := gap.first;
            last := gap.last;
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION catbus.skip_gap IS 'Goes on behind messages that were removed before the consumer received them';

-- Move a consumer to another position: see catbus.start_cursor. It passes over its dead letters, also if it receives
-- messages again.
--
-- Raises what catbus.skip_gap raises, and 22023 for a wrong position.
CREATE FUNCTION catbus.reset_consumer(name text, start text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c           catbus.consumers := catbus.own_consumer(name, 'reset_consumer');
    destination bigint;
    held        record;
BEGIN
    -- The partitions come first: the head row must not be locked while other transactions are waited for.
    PERFORM FROM catbus.lock_consumer(c.name);
    destination := catbus.start_cursor(start, c.hold);
    FOR held IN SELECT k.part FROM catbus.consumer_partitions AS k WHERE k.consumer = c.name LOOP
        PERFORM catbus.move_cursor(c.name, held.part, destination);
    END LOOP;
END
$$;
COMMENT ON FUNCTION catbus.reset_consumer IS 'Moves a consumer to another position in the log';

-- Drop a consumer with its dead letters. It raises what catbus.skip_gap raises.
CREATE FUNCTION catbus.drop_consumer(name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c catbus.consumers := catbus.own_consumer(name, 'drop_consumer');
BEGIN
    PERFORM FROM catbus.lock_consumer(c.name);
    DELETE FROM catbus.consumers AS d WHERE d.name = c.name;
END
$$;
COMMENT ON FUNCTION catbus.drop_consumer IS 'Drops a consumer with its dead letters';

-- The positions of all partitions of all consumers: see catbus.consumer_positions. It reads a few rows for each of them.
CREATE FUNCTION catbus.partition_positions() RETURNS TABLE (
    consumer text, part smallint, cursor bigint, lag bigint, lag_seconds double precision, moved timestamptz, gap boolean
)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    head    bigint;
    floor   bigint;
    names   text[];
    parts   smallint[];
    cursors bigint[];
    moves   timestamptz[];
    times   bigint[];
BEGIN
    BEGIN
        SELECT p.head, p.floor INTO head, floor FROM catbus.log_position() AS p;
        SELECT array_agg(k.consumer), array_agg(k.part), array_agg(n.cursor), array_agg(n.moved), array_agg(e.at)
        INTO names, parts, cursors, moves, times
        FROM catbus.consumer_partitions AS k
        CROSS JOIN LATERAL (
            SELECT n.cursor, n.moved FROM catbus.consumer_cursors AS n
            WHERE n.consumer = k.consumer AND n.part = k.part ORDER BY n.turn DESC LIMIT 1
        ) AS n
        LEFT JOIN LATERAL (
            SELECT e.at FROM catbus.entries AS e WHERE e.seq > n.cursor AND e.seq <= head ORDER BY e.seq LIMIT 1
        ) AS e ON true;
        RAISE EXCEPTION USING ERRCODE = 'CB099';
    EXCEPTION WHEN SQLSTATE 'CB099' THEN
        NULL;
    END;
    RETURN QUERY
    SELECT n.consumer, n.part, n.cursor, greatest(head - n.cursor, 0),
           coalesce(greatest(extract(epoch FROM clock_timestamp()) - n.at / 1000.0, 0), 0)::double precision,
           n.moved, n.cursor < floor - 1
    FROM unnest(names, parts, cursors, moves, times) AS n (consumer, part, cursor, moved, at);
END
$$;

-- The consumers that the caller may use, a row for each partition.
--
-- cursor        the partition has received all of its messages up to this seq
-- lag           messages between the cursor and the head, of all channels
-- lag_seconds   the age of the oldest of them that is still in the log; 0 if there is none
-- moved         when the cursor moved last
-- gap           messages behind the cursor were removed: catbus.receive raises CB002
-- dead_letters  messages of the partition that were rejected
CREATE FUNCTION catbus.consumer_positions() RETURNS TABLE (
    consumer text, owner text, pattern text, hold boolean, partition smallint, cursor bigint, lag bigint,
    lag_seconds double precision, moved timestamptz, gap boolean, dead_letters bigint
)
LANGUAGE plpgsql SECURITY DEFINER
AS $$
#variable_conflict use_column
DECLARE
    caller name := CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role')::name END;
BEGIN
    RETURN QUERY
    SELECT c.name, c.owner::text, c.pattern, c.hold, n.part, n.cursor, n.lag, n.lag_seconds, n.moved, n.gap,
           (SELECT count(*) FROM catbus.rejected_messages AS r
            WHERE r.consumer = c.name AND (hashtext(r.channel) & 2147483647) % c.partitions = n.part)
    FROM catbus.consumers AS c JOIN catbus.partition_positions() AS n ON n.consumer = c.name
    WHERE pg_has_role(caller, c.owner, 'USAGE') OR pg_has_role(caller, current_user, 'USAGE')
    ORDER BY c.name, n.part;
END
$$;
COMMENT ON FUNCTION catbus.consumer_positions IS 'Position and lag of the consumers that the caller may use';

-- The least cursor of the consumers for which retention waits; null if there is none.
CREATE FUNCTION catbus.held_cursor() RETURNS bigint
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN (
        SELECT min(n.cursor)
        FROM catbus.consumers AS c
        JOIN catbus.consumer_partitions AS k ON k.consumer = c.name
        CROSS JOIN LATERAL (
            SELECT n.cursor FROM catbus.consumer_cursors AS n
            WHERE n.consumer = k.consumer AND n.part = k.part ORDER BY n.turn DESC LIMIT 1
        ) AS n
        WHERE c.hold
    );
END
$$;

-- Look for dead letters as catbus.erase_batch does for entries, and with `change` delete them. Returns the number of those
-- whose messages are not in the log any more; the others are counted there.
--
-- The lock waits for transactions that have rejected messages: see catbus.reject. Call it after the log was erased.
CREATE FUNCTION catbus.erase_dead_letters(pattern text, sender text, before bigint, change boolean) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    low     text COLLATE "C";
    high    text COLLATE "C";
    doomed  bigint[];
    oldest  bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.erase needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    SELECT r.low, r.high INTO low, high FROM catbus.pattern_range(pattern) AS r;
    IF change THEN
        PERFORM set_config('lock_timeout', '2s', true);
        LOCK TABLE catbus.rejected_messages IN SHARE ROW EXCLUSIVE MODE;
    END IF;
    SELECT array_agg(r.seq) INTO doomed FROM catbus.rejected_messages AS r
    WHERE (low IS NULL AND NOT starts_with(r.channel, '_') OR r.channel >= low AND r.channel < high)
          AND coalesce(r.sender = erase_dead_letters.sender, erase_dead_letters.sender IS NULL)
          AND coalesce(r.at < before, true);
    IF change AND doomed IS NOT NULL THEN
        DELETE FROM catbus.rejected_messages AS r WHERE r.seq = ANY (doomed);
        PERFORM catbus.note_erasure(ARRAY['rejected_messages']);
    END IF;
    SELECT h.floor INTO STRICT oldest FROM catbus.head AS h;
    RETURN (SELECT count(DISTINCT d) FROM unnest(doomed) AS d WHERE d < oldest);
END
$$;

REVOKE ALL ON FUNCTION catbus.own_consumer, catbus.gap_behind, catbus.receive, catbus.reject, catbus.start_cursor,
    catbus.create_consumer, catbus.lock_consumer, catbus.move_cursor, catbus.skip_gap, catbus.reset_consumer,
    catbus.drop_consumer, catbus.partition_positions, catbus.consumer_positions, catbus.held_cursor, catbus.erase_dead_letters FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'own_consumer', 'gap_behind', 'receive', 'reject', 'start_cursor', 'create_consumer', 'lock_consumer',
        'move_cursor', 'skip_gap', 'reset_consumer', 'drop_consumer', 'partition_positions', 'consumer_positions',
        'held_cursor', 'erase_dead_letters'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['gap_behind', 'receive', 'reject', 'partition_positions', 'held_cursor'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
                        SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
                        SET jit = off SET geqo = off', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['reject', 'create_consumer', 'skip_gap', 'reset_consumer', 'drop_consumer'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET lock_timeout = ''2s''', name);
    END LOOP;
END
$$;
