-- Webhooks: replicas deliver the messages of a consumer to a URL by HTTP POST, at least once.
--
-- A replica leases a partition of such a consumer, for longer than a request may take, and the lease names the batch that
-- it delivers. It is committed before the request begins. So a replica that takes over delivers the same messages under
-- the same id. A batch is delivered when the receiver has accepted it: then the cursor moves past it.
--
-- Replicas call the functions outside of transactions, so the locks on the log end with each call.

CREATE TABLE catbus.webhooks (
    consumer      text        COLLATE "C" PRIMARY KEY REFERENCES catbus.consumers ON DELETE CASCADE,
    secret        text        NOT NULL,
    former_secret text,
    former_until  timestamptz,
    paused        timestamptz,
    reason        text
);
COMMENT ON TABLE catbus.webhooks IS 'The consumers whose messages replicas deliver to a URL';
COMMENT ON COLUMN catbus.webhooks.former_secret IS 'Signs, too, until former_until: receivers may still have it';
COMMENT ON COLUMN catbus.webhooks.reason IS 'Why the deliveries are paused';

-- Each change of a row gives it a greater turn, which is the key of its lease: whoever has another turn has lost the lease.
-- It also keeps the search for the newest row version short: see catbus.consumer_cursors.
CREATE TABLE catbus.webhook_batches (
    consumer    text     COLLATE "C" NOT NULL,
    part        smallint NOT NULL,
    turn        bigint   NOT NULL,
    replica     text,
    until       timestamptz,
    id          text,
    made        timestamptz,
    seqs        bigint[],
    upto        bigint,
    cursor_turn bigint,
    failures    integer  NOT NULL DEFAULT 0,
    due         timestamptz,
    error       text,
    failed      timestamptz,
    delivered   timestamptz,
    PRIMARY KEY (consumer, part, turn),
    FOREIGN KEY (consumer, part) REFERENCES catbus.consumer_partitions ON DELETE CASCADE
) WITH (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);
COMMENT ON TABLE catbus.webhook_batches IS 'The batch that is being delivered, for each partition';
COMMENT ON COLUMN catbus.webhook_batches.replica IS 'The replica that has the lease';
COMMENT ON COLUMN catbus.webhook_batches.until IS 'The end of the lease';
COMMENT ON COLUMN catbus.webhook_batches.id IS 'The webhook-id of the batch; null for none';
COMMENT ON COLUMN catbus.webhook_batches.upto IS 'The cursor after the delivery of the batch';
COMMENT ON COLUMN catbus.webhook_batches.cursor_turn IS 'The turn of the cursor when the batch was made: a reset changes it';
COMMENT ON COLUMN catbus.webhook_batches.failures IS 'Failed attempts to deliver the first message of the batch';
COMMENT ON COLUMN catbus.webhook_batches.due IS 'No attempt before this time';

-- The consumer `name`, if the caller may use it and it has a URL. It raises what catbus.own_consumer raises, and 55000
-- for a consumer without a URL.
CREATE FUNCTION catbus.own_webhook(name text, doing text) RETURNS catbus.consumers
LANGUAGE plpgsql
AS $$
DECLARE
    c catbus.consumers := catbus.own_consumer(name, doing);
BEGIN
    IF c.push IS NULL THEN
        RAISE EXCEPTION 'the consumer "%" has no URL to which its messages are delivered', name USING ERRCODE = '55000';
    END IF;
    RETURN c;
END
$$;

-- A signing secret: the given one if it is valid, or a random one of 32 bytes. Raises 22023 for one that is not valid.
CREATE FUNCTION catbus.signing_secret(secret text) RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
    size integer;
BEGIN
    IF secret IS NULL THEN
        RETURN 'whsec_' || encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64');
    END IF;
    IF secret ~ '^whsec_[A-Za-z0-9+/]+={0,2}$' AND length(secret) <= 128 THEN
        BEGIN
            size := length(decode(substr(secret, 7), 'base64'));
        EXCEPTION WHEN invalid_parameter_value THEN
            NULL;
        END;
    END IF;
    IF (size BETWEEN 24 AND 64) IS NOT TRUE THEN
        RAISE EXCEPTION 'a signing secret is "whsec_", followed by 24 to 64 bytes in base64' USING ERRCODE = '22023';
    END IF;
    RETURN secret;
END
$$;

-- Make the new consumer `name` deliver to its URL. Raises 22023 for a wrong URL or a wrong secret.
CREATE FUNCTION catbus.create_webhook(name text, secret text) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    c        catbus.consumers;
    function regprocedure;
BEGIN
    SELECT * INTO STRICT c FROM catbus.consumers AS o WHERE o.name = create_webhook.name;
    -- Errors and logs name the URL, so it has no password. A port has to be a port.
    IF (c.push ~ '^https?://([A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?][!-~]*)?$' AND length(c.push) <= 2048
        AND c.push !~ '[#\\]') IS NOT TRUE
    THEN
        RAISE EXCEPTION 'deliveries need a URL such as "https://example.com/hook"'
            USING ERRCODE = '22023', DETAIL = 'It is ASCII, at most 2048 bytes, without a user name and without "#".';
    END IF;
    INSERT INTO catbus.webhooks (consumer, secret) VALUES (c.name, catbus.signing_secret(create_webhook.secret));
    INSERT INTO catbus.webhook_batches (consumer, part, turn)
    SELECT k.consumer, k.part, nextval('catbus.consumer_turn')
    FROM catbus.consumer_partitions AS k WHERE k.consumer = c.name;
    FOREACH function IN ARRAY ARRAY[
        'catbus.webhook_secret(text)', 'catbus.rotate_webhook_secret(text, text, interval)',
        'catbus.pause_consumer(text, text)', 'catbus.resume_consumer(text)', 'catbus.webhook_states()'
    ]::regprocedure[] LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', function, c.owner);
    END LOOP;
END
$$;

-- The secret that signs the deliveries of a consumer. It raises what catbus.own_webhook raises.
CREATE FUNCTION catbus.webhook_secret(name text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c catbus.consumers := catbus.own_webhook(name, 'webhook_secret');
BEGIN
    RETURN (SELECT w.secret FROM catbus.webhooks AS w WHERE w.consumer = c.name);
END
$$;
COMMENT ON FUNCTION catbus.webhook_secret IS 'The secret that signs the deliveries of a consumer, for its owner';

-- Sign with another secret from now on, and return it. For the time `overlap` the former one signs, too: a delivery has
-- two signatures then. Raises what catbus.own_webhook raises, and 22023 for a secret that is not valid.
CREATE FUNCTION catbus.rotate_webhook_secret(name text, secret text DEFAULT NULL, overlap interval DEFAULT '24 hours')
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c     catbus.consumers := catbus.own_webhook(name, 'rotate_webhook_secret');
    fresh text := catbus.signing_secret(secret);
BEGIN
    UPDATE catbus.webhooks AS w
    SET former_secret = w.secret, former_until = clock_timestamp() + overlap, secret = fresh
    WHERE w.consumer = c.name AND w.secret <> fresh;
    RETURN fresh;
END
$$;
COMMENT ON FUNCTION catbus.rotate_webhook_secret IS 'Gives the deliveries of a consumer another secret, for its owner';

-- Deliver nothing more until catbus.resume_consumer. A request that has begun is not interrupted. The consumer keeps its
-- position. It raises what catbus.own_webhook raises.
CREATE FUNCTION catbus.pause_consumer(name text, reason text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c catbus.consumers := catbus.own_webhook(name, 'pause_consumer');
BEGIN
    UPDATE catbus.webhooks AS w SET paused = clock_timestamp(), reason = left(pause_consumer.reason, 500)
    WHERE w.consumer = c.name;
END
$$;
COMMENT ON FUNCTION catbus.pause_consumer IS 'Pauses the deliveries of a consumer, for its owner';

-- Deliver again, at once and with all attempts. It raises what catbus.own_webhook raises.
CREATE FUNCTION catbus.resume_consumer(name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c catbus.consumers := catbus.own_webhook(name, 'resume_consumer');
BEGIN
    PERFORM FROM catbus.lock_consumer(c.name);
    UPDATE catbus.webhooks AS w SET paused = NULL, reason = NULL WHERE w.consumer = c.name;
    UPDATE catbus.webhook_batches AS b SET due = NULL, failures = 0 WHERE b.consumer = c.name;
END
$$;
COMMENT ON FUNCTION catbus.resume_consumer IS 'Resumes the deliveries of a consumer, for its owner';

-- The deliveries of the consumers that the caller may use, a row for each partition.
--
-- paused, reason  since when they are paused, and why; null if they are not
-- delivering      messages in the batch that is being delivered, or was tried
-- failures        failed attempts to deliver the first of them
-- due             the time of the next attempt, if that is not now
-- error, failed   the last error, and when it occurred
-- delivered       when a batch was accepted last
CREATE FUNCTION catbus.webhook_states() RETURNS TABLE (
    consumer text, url text, paused timestamptz, reason text, partition smallint, delivering integer, failures integer,
    due timestamptz, error text, failed timestamptz, delivered timestamptz
)
LANGUAGE plpgsql SECURITY DEFINER
AS $$
#variable_conflict use_column
DECLARE
    caller name := CASE current_setting('role') WHEN 'none' THEN session_user ELSE current_setting('role')::name END;
BEGIN
    RETURN QUERY
    SELECT c.name, c.push, w.paused, w.reason, b.part, coalesce(cardinality(b.seqs), 0), b.failures,
           CASE WHEN b.due > clock_timestamp() THEN b.due END, b.error, b.failed, b.delivered
    FROM catbus.consumers AS c
    JOIN catbus.webhooks AS w ON w.consumer = c.name
    JOIN catbus.webhook_batches AS b ON b.consumer = c.name
    WHERE pg_has_role(caller, c.owner, 'USAGE') OR pg_has_role(caller, current_user, 'USAGE')
    ORDER BY c.name, b.part;
END
$$;
COMMENT ON FUNCTION catbus.webhook_states IS 'The state of the deliveries of the consumers that the caller may use';

-- What replicas have to do.
--
-- partitions        the number of partitions of all webhooks that are not paused
-- consumers, parts  those of them with something to do,
-- waits             and in how many seconds; 0 for now
CREATE FUNCTION catbus.webhook_work(
    OUT partitions integer, OUT consumers text[], OUT parts smallint[], OUT waits float8[]
)
LANGUAGE plpgsql
AS $$
DECLARE
    -- As in catbus.receive.
    far      CONSTANT bigint := 1000;
    patience CONSTANT interval := '10 s';
    c        record;
    k        record;
    head     bigint;
    lowest   bigint;
    busy     integer[];
BEGIN
    partitions := 0;
    consumers := '{}';
    parts := '{}';
    waits := '{}';
    SELECT p.head INTO head FROM catbus.log_position() AS p;
    FOR c IN
        SELECT o.name, o.low, o.high, o.partitions AS number FROM catbus.consumers AS o
        JOIN catbus.webhooks AS w ON w.consumer = o.name WHERE w.paused IS NULL ORDER BY o.name
    LOOP
        partitions := partitions + c.number;
        lowest := NULL;
        busy := NULL;
        FOR pass IN 1..2 LOOP
            FOR k IN
                SELECT l.part, n.cursor, n.moved,
                       b.id IS NOT NULL AND b.cursor_turn = n.turn AS pending,
                       greatest(extract(epoch FROM greatest(b.due, b.until) - clock_timestamp()), 0)::float8 AS wait
                FROM catbus.consumer_partitions AS l
                CROSS JOIN LATERAL (
                    SELECT n.turn, n.cursor, n.moved FROM catbus.consumer_cursors AS n
                    WHERE n.consumer = l.consumer AND n.part = l.part ORDER BY n.turn DESC LIMIT 1
                ) AS n
                CROSS JOIN LATERAL (
                    SELECT b.id, b.cursor_turn, b.due, b.until FROM catbus.webhook_batches AS b
                    WHERE b.consumer = l.consumer AND b.part = l.part ORDER BY b.turn DESC LIMIT 1
                ) AS b
                WHERE l.consumer = c.name ORDER BY l.part
            LOOP
                IF pass = 1 THEN
                    -- Partitions that wait after an error say nothing about where new messages are.
                    IF NOT k.pending AND k.wait = 0 AND k.cursor <> head THEN
                        lowest := least(lowest, k.cursor);
                    END IF;
                ELSIF k.pending OR k.wait > 0
                    OR k.cursor <> head AND (busy IS NULL OR k.part = ANY (busy) OR k.cursor > head
                                             OR k.moved < clock_timestamp() - patience)
                THEN
                    consumers := consumers || c.name::text;
                    parts := parts || k.part;
                    waits := waits || k.wait;
                END IF;
            END LOOP;
            -- If all are near the head, only partitions with messages have something to do.
            IF pass = 1 AND head - lowest BETWEEN 0 AND far THEN
                SELECT coalesce(array_agg(DISTINCT m.part), '{}') INTO busy
                FROM (
                    SELECT w.channel, (hashtext(w.channel) & 2147483647) % c.number AS part
                    FROM (
                        SELECT e.seq, e.channel FROM catbus.entries AS e
                        WHERE e.seq > lowest AND e.seq <= head ORDER BY e.seq OFFSET 0
                    ) AS w
                    WHERE c.low IS NULL AND NOT starts_with(w.channel, '_') OR w.channel >= c.low AND w.channel < c.high
                ) AS m;
            END IF;
        END LOOP;
    END LOOP;
END
$$;

-- Lease a partition to a replica for `seconds`, and return the batch to be delivered: the one that was tried before, or
-- the next messages, at most `max_messages` of them and about `max_bytes`, and at least one. Without a batch, `turn` is
-- null: the partition is leased or locked, or an attempt is not due, or there is nothing to deliver.
--
-- A batch keeps its id and its contents. If a message of it was erased or rejected, the others get another id.
CREATE FUNCTION catbus.lease_batch(
    name text, partition smallint, lessee text, seconds float8, max_messages integer, max_bytes bigint,
    OUT turn bigint, OUT id text, OUT made timestamptz, OUT failures integer, OUT url text, OUT secrets text[],
    OUT seqs bigint[], OUT channels text[], OUT payloads text[], OUT times bigint[], OUT senders text[]
)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    -- As in catbus.receive.
    reach    CONSTANT bigint := 10000;
    far      CONSTANT bigint := 1000;
    patience CONSTANT interval := '10 s';
    -- The time after which a replica looks again whether messages are still missing.
    recheck  CONSTANT interval := '5 s';
    -- What a message takes beside its channel and its payload.
    overhead CONSTANT bigint := 100;
    c        catbus.consumers;
    w        catbus.webhooks;
    b        catbus.webhook_batches;
    held     record;
    place    tid;
    gap      record;
    head     bigint;
    floor    bigint;
    last     bigint;
    seen     bigint;
    number   bigint;
BEGIN
    PERFORM FROM catbus.consumer_partitions AS k
    WHERE k.consumer = lease_batch.name AND k.part = lease_batch.partition FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- In later statements: the snapshot of the lock may be older than the commit that released it.
    SELECT * INTO STRICT c FROM catbus.consumers AS o WHERE o.name = lease_batch.name;
    SELECT * INTO w FROM catbus.webhooks AS o WHERE o.consumer = c.name AND o.paused IS NULL;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT o.* INTO STRICT b FROM catbus.webhook_batches AS o
    WHERE o.consumer = c.name AND o.part = lease_batch.partition ORDER BY o.turn DESC LIMIT 1;
    SELECT o.ctid INTO STRICT place FROM catbus.webhook_batches AS o
    WHERE o.consumer = c.name AND o.part = lease_batch.partition AND o.turn = b.turn;
    IF greatest(b.due, b.until) > clock_timestamp() THEN
        RETURN;
    END IF;
    SELECT n.turn, n.cursor, n.moved INTO STRICT held FROM catbus.consumer_cursors AS n
    WHERE n.consumer = c.name AND n.part = lease_batch.partition ORDER BY n.turn DESC LIMIT 1;
    IF b.cursor_turn IS DISTINCT FROM held.turn THEN
        b.id := NULL;
        b.failures := 0;
    END IF;

    IF b.id IS NOT NULL THEN
        SELECT array_agg(e.seq ORDER BY e.seq), array_agg(e.channel ORDER BY e.seq),
               array_agg(e.payload ORDER BY e.seq), array_agg(e.at ORDER BY e.seq), array_agg(e.sender ORDER BY e.seq)
        INTO seqs, channels, payloads, times, senders
        FROM catbus.entries AS e
        WHERE e.seq = ANY (b.seqs)
              AND (c.low IS NULL AND NOT starts_with(e.channel, '_') OR e.channel >= c.low AND e.channel < c.high)
              AND NOT EXISTS (SELECT FROM catbus.rejected_messages AS r WHERE r.consumer = c.name AND r.seq = e.seq);
        IF seqs IS DISTINCT FROM b.seqs THEN
            b.id := NULL;
        END IF;
    END IF;

    IF b.id IS NULL THEN
        -- The head in an earlier statement than the entries, and the floor in a later one: see catbus.receive.
        SELECT p.head INTO head FROM catbus.log_position() AS p;
        last := least(held.cursor + reach, head);
        SELECT array_agg(m.seq) FILTER (WHERE m.fits), array_agg(m.channel) FILTER (WHERE m.fits),
               array_agg(m.payload) FILTER (WHERE m.fits), array_agg(m.at) FILTER (WHERE m.fits),
               array_agg(m.sender) FILTER (WHERE m.fits), count(*)
        INTO seqs, channels, payloads, times, senders, number
        FROM (
            SELECT l.*, row_number() OVER up = 1
                OR sum(octet_length(l.channel) + octet_length(l.payload) + overhead) OVER up <= max_bytes AS fits
            FROM (
                SELECT v.* FROM (
                    SELECT e.seq, e.channel, e.payload, e.at, e.sender FROM catbus.entries AS e
                    WHERE e.seq > held.cursor AND e.seq <= last ORDER BY e.seq OFFSET 0
                ) AS v
                WHERE (c.low IS NULL AND NOT starts_with(v.channel, '_') OR v.channel >= c.low AND v.channel < c.high)
                      AND (hashtext(v.channel) & 2147483647) % c.partitions = lease_batch.partition
                      AND NOT EXISTS (
                          SELECT FROM catbus.rejected_messages AS r WHERE r.consumer = c.name AND r.seq = v.seq)
                LIMIT max_messages
            ) AS l
            WINDOW up AS (ORDER BY l.seq ROWS UNBOUNDED PRECEDING)
            ORDER BY l.seq
        ) AS m;
        IF number = max_messages OR cardinality(seqs) < number THEN
            last := seqs[cardinality(seqs)];
        END IF;
        SELECT count(*) INTO seen FROM catbus.entries AS e WHERE e.seq > held.cursor AND e.seq <= last;
        SELECT h.floor INTO STRICT floor FROM catbus.head AS h;
        head := greatest(head, floor - 1);
        IF seen < last - held.cursor OR held.cursor < floor - 1 OR held.cursor > head THEN
            gap := catbus.gap_behind(held.cursor, last);
            IF gap.back OR gap.first = held.cursor + 1 THEN
                UPDATE catbus.webhook_batches AS o
                SET turn = nextval('catbus.consumer_turn'), id = NULL, seqs = NULL, until = NULL, replica = NULL,
                    due = clock_timestamp() + recheck, failed = clock_timestamp(),
                    error = format('the messages %s to %s were removed before they were delivered: '
                                   'catbus.skip_gap(%L) goes on behind them', gap.first, gap.last, c.name)
                WHERE o.ctid = place;
                RETURN;
            ELSIF gap.first <= last THEN
                last := gap.first - 1;
                SELECT count(*) INTO number FROM unnest(seqs) AS s WHERE s <= last;
                seqs := seqs[1:number];
            END IF;
        END IF;
        IF coalesce(cardinality(seqs), 0) = 0 THEN
            IF last - held.cursor >= far OR last > held.cursor AND held.moved < clock_timestamp() - patience THEN
                PERFORM catbus.move_cursor(c.name, lease_batch.partition, last);
            END IF;
            RETURN;
        END IF;
        number := cardinality(seqs);
        channels := channels[1:number];
        payloads := payloads[1:number];
        times := times[1:number];
        senders := senders[1:number];
        b.id := 'msg_' || replace(gen_random_uuid()::text, '-', '');
        b.made := clock_timestamp();
        b.upto := last;
    END IF;

    turn := nextval('catbus.consumer_turn');
    id := b.id;
    made := b.made;
    failures := b.failures;
    url := c.push;
    secrets := ARRAY[w.secret] || CASE WHEN w.former_until > clock_timestamp() THEN ARRAY[w.former_secret] END;
    UPDATE catbus.webhook_batches AS o
    SET turn = lease_batch.turn, replica = lessee, until = clock_timestamp() + make_interval(secs => seconds),
        id = b.id, made = b.made, seqs = lease_batch.seqs, upto = b.upto, cursor_turn = held.turn, failures = b.failures,
        due = NULL
    WHERE o.ctid = place;
END
$$;

-- End the lease `turn` of a partition, and return whether it was still valid.
--
-- verdict  `delivered`: the cursor moves past the batch
--          `retry`: the next attempt is in `delay` seconds, with the first `take` messages of the batch
--          `reject`: the first message becomes a dead letter, and the cursor moves past it
--          `pause`: the receiver wants nothing more
--          `release`: there was no attempt
-- counted  whether the attempt counts as a failure of the first message
-- error    what went wrong
CREATE FUNCTION catbus.settle_batch(
    name text, partition smallint, lease bigint, verdict text, delay float8, take integer, counted boolean, error text
) RETURNS boolean
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    b     catbus.webhook_batches;
    fresh boolean;
BEGIN
    PERFORM FROM catbus.consumer_partitions AS k
    WHERE k.consumer = settle_batch.name AND k.part = settle_batch.partition FOR UPDATE;
    SELECT o.* INTO b FROM catbus.webhook_batches AS o
    WHERE o.consumer = settle_batch.name AND o.part = settle_batch.partition ORDER BY o.turn DESC LIMIT 1;
    IF b.turn IS DISTINCT FROM lease THEN
        RETURN false;
    END IF;
    -- After a reset, or behind a gap, the batch is not at the cursor any more.
    SELECT n.turn = b.cursor_turn INTO STRICT fresh FROM catbus.consumer_cursors AS n
    WHERE n.consumer = b.consumer AND n.part = b.part ORDER BY n.turn DESC LIMIT 1;

    b.replica := NULL;
    b.until := NULL;
    IF verdict IN ('retry', 'reject', 'pause') THEN
        b.error := left(settle_batch.error, 500);
        b.failed := clock_timestamp();
        b.failures := b.failures + counted::integer;
    END IF;
    IF verdict = 'retry' THEN
        b.due := clock_timestamp() + make_interval(secs => delay);
        IF take < cardinality(b.seqs) THEN
            b.seqs := b.seqs[1:take];
            b.upto := b.seqs[take];
            b.id := 'msg_' || replace(gen_random_uuid()::text, '-', '');
            b.made := clock_timestamp();
        END IF;
    ELSIF verdict = 'pause' THEN
        UPDATE catbus.webhooks AS w SET paused = clock_timestamp(), reason = left(settle_batch.error, 500)
        WHERE w.consumer = b.consumer AND w.paused IS NULL;
    ELSIF verdict IN ('delivered', 'reject') THEN
        IF verdict = 'delivered' THEN
            b.delivered := clock_timestamp();
            b.error := NULL;
            b.failed := NULL;
        ELSIF fresh THEN
            BEGIN
                PERFORM catbus.reject(b.consumer, b.seqs[1], settle_batch.error);
                b.upto := CASE WHEN cardinality(b.seqs) = 1 THEN b.upto ELSE b.seqs[1] END;
            EXCEPTION WHEN SQLSTATE 'CB003' THEN
                -- The message is not in the log any more. The next lease finds the gap.
                fresh := false;
            END;
        END IF;
        IF fresh THEN
            PERFORM catbus.move_cursor(b.consumer, b.part, b.upto);
        END IF;
        b.id := NULL;
        b.seqs := NULL;
        b.failures := 0;
        b.due := NULL;
    END IF;
    UPDATE catbus.webhook_batches AS o
    SET turn = nextval('catbus.consumer_turn'), replica = b.replica, until = b.until, id = b.id, made = b.made,
        seqs = b.seqs, upto = b.upto, failures = b.failures, due = b.due, error = b.error, failed = b.failed,
        delivered = b.delivered
    WHERE o.consumer = b.consumer AND o.part = b.part AND o.turn = lease;
    RETURN true;
END
$$;

REVOKE ALL ON FUNCTION catbus.own_webhook, catbus.signing_secret, catbus.create_webhook, catbus.webhook_secret,
    catbus.rotate_webhook_secret, catbus.pause_consumer, catbus.resume_consumer, catbus.webhook_states,
    catbus.webhook_work, catbus.lease_batch, catbus.settle_batch FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'own_webhook', 'signing_secret', 'create_webhook', 'webhook_secret', 'rotate_webhook_secret', 'pause_consumer',
        'resume_consumer', 'webhook_states', 'webhook_work', 'lease_batch', 'settle_batch'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['webhook_work', 'lease_batch', 'settle_batch'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
                        SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
                        SET jit = off SET geqo = off', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['rotate_webhook_secret', 'pause_consumer', 'resume_consumer', 'settle_batch'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET lock_timeout = ''2s''', name);
    END LOOP;
END
$$;
