-- Erasure: the contents of messages are removed, and their seqs stay.
--
-- An erased entry keeps its seq, its time and its key. Its channel is `_erased`, which is reserved, and its payload is
-- null. So every cursor passes over it, and a retry of its publish is a duplicate.
--
-- UPDATE and DELETE leave the old rows in the files of a table until VACUUM has removed them. Replicas do that, and
-- `catbus erase`. VACUUM removes nothing that a transaction from before the erasure might still see, so it waits for the
-- end of such transactions.

-- The tables that may contain erased messages. Every erasure gets a number, in the order of the commits: it locks this
-- table until it has ended.
CREATE TABLE catbus.erasures (
    name     text   NOT NULL PRIMARY KEY,
    erasure  bigint NOT NULL DEFAULT 0,
    vacuumed bigint NOT NULL DEFAULT 0,
    xid      xid8   NOT NULL DEFAULT pg_current_xact_id()
);
COMMENT ON TABLE catbus.erasures IS 'The newest erasure of each table that holds messages, and what was vacuumed since';
COMMENT ON COLUMN catbus.erasures.erasure IS
    'The number of the newest erasure; the greatest one rises with every erasure, so that a poll finds it';
COMMENT ON COLUMN catbus.erasures.vacuumed IS 'The newest erasure whose old rows VACUUM has removed';
COMMENT ON COLUMN catbus.erasures.xid IS 'The transaction of the newest erasure';
INSERT INTO catbus.erasures (name)
SELECT format('entries_%s', n) FROM generate_series(0, 7) AS n UNION ALL VALUES ('outbox_0'), ('outbox_1'), ('retained');

-- Note an erasure in these tables, which this transaction has changed, and have all replicas poll.
CREATE FUNCTION catbus.note_erasure(changed text[]) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    LOCK TABLE catbus.erasures IN SHARE ROW EXCLUSIVE MODE;
    UPDATE catbus.erasures AS e SET erasure = newest.erasure + 1, xid = pg_current_xact_id()
    FROM (SELECT max(n.erasure) AS erasure FROM catbus.erasures AS n) AS newest
    WHERE e.name = ANY (changed);
    -- Replicas poll at once when they hear this.
    PERFORM catbus.notify('catbus_roles', '*');
END
$$;

-- The channels that a pattern matches: `low <= channel < high` in byte order. Both are null for `*`. Raises 22023.
CREATE FUNCTION catbus.pattern_range(pattern text, OUT low text, OUT high text)
LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    given text COLLATE "C" := pattern;
BEGIN
    IF given IS NULL OR given !~ '^(\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?)$' OR octet_length(given) > 255
        OR cardinality(string_to_array(given, '.')) > 32
    THEN
        RAISE EXCEPTION 'not a pattern: "%"', left(given, 64)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'A pattern is a channel, everything below a channel (a.b.*), or everything (*).';
    END IF;
    IF right(given, 2) = '.*' THEN
        low := left(given, -1);
        high := left(given, -2) || '/';
    ELSIF given <> '*' THEN
        low := given;
        high := given || E'\x01';
    END IF;
END
$$;

-- Look at the next 10,000 entries up to `until` that the pattern may match, and with `change` erase those that it does
-- match. `sender` and `before` restrict it to a sender and to entries before a time, in milliseconds since 1970.
--
-- Entries are searched in the order of (channel, seq), and for `*` in that of the seqs. The first call has `after_seq` 0,
-- and each later one gets the `channel` and `seq` of the call before.
--
-- scanned       the number of entries that were looked at; 0 at the end
-- matched       how many of them match
-- channel, seq  the last one that was looked at
--
-- Raises 55P03 when a lock is not free within two seconds, and 22023 for a wrong pattern.
CREATE FUNCTION catbus.erase_batch(
    pattern       text,
    sender        text,
    before        bigint,
    until         bigint,
    after_channel text,
    after_seq     bigint,
    change        boolean,
    OUT scanned   bigint,
    OUT matched   bigint,
    OUT channel   text,
    OUT seq       bigint
)
LANGUAGE plpgsql
AS $$
DECLARE
    low   text;
    high  text;
    seqs  bigint[];
    slots smallint[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.erase needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    SELECT r.low, r.high INTO low, high FROM catbus.pattern_range(pattern) AS r;
    IF low IS NULL THEN
        SELECT count(*), array_agg(s.seq) FILTER (WHERE s.matches), array_agg(s.slot) FILTER (WHERE s.matches),
               max(s.seq), ''
        INTO scanned, seqs, slots, seq, channel
        FROM (
            SELECT e.seq, e.slot,
                   NOT starts_with(e.channel, '_') AND coalesce(e.sender = erase_batch.sender, erase_batch.sender IS NULL)
                   AND coalesce(e.at < before, true) AS matches
            FROM catbus.entries AS e WHERE e.seq > after_seq AND e.seq <= until
            ORDER BY e.seq LIMIT 10000
        ) AS s;
    ELSE
        SELECT count(*), array_agg(s.seq) FILTER (WHERE s.matches), array_agg(s.slot) FILTER (WHERE s.matches),
               (array_agg(s.seq ORDER BY s.channel, s.seq))[count(*)],
               (array_agg(s.channel ORDER BY s.channel, s.seq))[count(*)]
        INTO scanned, seqs, slots, seq, channel
        FROM (
            SELECT e.seq, e.slot, e.channel,
                   coalesce(e.sender = erase_batch.sender, erase_batch.sender IS NULL)
                   AND coalesce(e.at < before, true) AS matches
            FROM catbus.entries AS e
            WHERE (e.channel, e.seq) > (CASE WHEN after_seq = 0 THEN low ELSE after_channel END, after_seq)
                  AND e.channel < high AND e.seq <= until
            ORDER BY e.channel, e.seq LIMIT 10000
        ) AS s;
    END IF;
    matched := coalesce(cardinality(seqs), 0);
    IF change AND matched > 0 THEN
        UPDATE catbus.entries AS e SET channel = '_erased', payload = 'null', sender = NULL, origin = NULL, retain = NULL
        FROM unnest(seqs, slots) AS s (seq, slot) WHERE e.slot = s.slot AND e.seq = s.seq;
        PERFORM catbus.note_erasure(ARRAY(SELECT DISTINCT format('entries_%s', n) FROM unnest(slots) AS n));
    END IF;
END
$$;

-- Look for messages in the outbox that a pattern matches, and with `change` delete them. Returns their number. They have
-- no sender, and no time until they are in the log.
CREATE FUNCTION catbus.erase_outbox(pattern text, change boolean) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    low     text COLLATE "C";
    high    text COLLATE "C";
    deleted bigint;
    sum     bigint := 0;
    changed text[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.erase needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    SELECT r.low, r.high INTO low, high FROM catbus.pattern_range(pattern) AS r;
    IF NOT change THEN
        SELECT count(*) INTO sum
        FROM (SELECT o.channel FROM catbus.outbox_0 AS o UNION ALL SELECT o.channel FROM catbus.outbox_1 AS o) AS o
        WHERE low IS NULL AND NOT starts_with(o.channel, '_') OR o.channel >= low AND o.channel < high;
        RETURN sum;
    END IF;
    DELETE FROM catbus.outbox_0 AS o
    WHERE low IS NULL AND NOT starts_with(o.channel, '_') OR o.channel >= low AND o.channel < high;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    IF deleted > 0 THEN
        sum := deleted;
        changed := ARRAY['outbox_0'];
    END IF;
    DELETE FROM catbus.outbox_1 AS o
    WHERE low IS NULL AND NOT starts_with(o.channel, '_') OR o.channel >= low AND o.channel < high;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    IF deleted > 0 THEN
        sum := sum + deleted;
        changed := changed || ARRAY['outbox_1'];
    END IF;
    IF sum > 0 THEN
        PERFORM catbus.note_erasure(changed);
    END IF;
    RETURN sum;
END
$$;

-- Look for retained messages up to `until` that match as in catbus.erase_batch, and with `change` delete them: their
-- channels have none then, and earlier ones do not come back. Returns how many of them are not in the log any more.
--
-- An append that replaces one of them waits until the transaction ends, with the lock of the head row. So call it late in
-- a transaction.
CREATE FUNCTION catbus.erase_retained(pattern text, sender text, before bigint, until bigint, change boolean)
RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    bounds   record;
    channels text[];
    seqs     bigint[];
    deleted  bigint;
    sum      bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.erase needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    SELECT coalesce(r.low, '') AS low, coalesce(r.high, E'\x7f') AS high, r.low IS NULL AS every INTO bounds
    FROM catbus.pattern_range(pattern) AS r;
    SELECT array_agg(r.channel ORDER BY r.channel), array_agg(r.seq ORDER BY r.channel),
           count(*) FILTER (WHERE NOT EXISTS (SELECT FROM catbus.entries AS e WHERE e.seq = r.seq))
    INTO channels, seqs, sum
    FROM catbus.retained AS r
    WHERE r.channel >= bounds.low AND r.channel < bounds.high AND NOT (bounds.every AND starts_with(r.channel, '_'))
          AND coalesce(r.sender = erase_retained.sender, erase_retained.sender IS NULL)
          AND coalesce(r.at < before, true) AND r.seq <= until;
    IF change AND seqs IS NOT NULL THEN
        DELETE FROM catbus.retained AS r
        USING unnest(channels, seqs) AS found (channel, seq) WHERE r.channel = found.channel AND r.seq = found.seq;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        IF deleted > 0 THEN
            PERFORM catbus.note_erasure(ARRAY['retained']);
        END IF;
    END IF;
    RETURN sum;
END
$$;

-- Erase the messages that a pattern matches, that are of `sender` if it is given, and older than `before` if that is
-- given. Returns their number. Replicas forget them within a second after the commit.
--
-- It is one transaction, and retention waits for its end. For much more than 100,000 messages use `catbus erase`, which
-- commits every 10,000 messages.
CREATE FUNCTION catbus.erase(pattern text, sender text DEFAULT NULL, before timestamptz DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    limit_at bigint := ceil(extract(epoch FROM before) * 1000)::bigint;
    erased   bigint := 0;
    newest   bigint;
    batch    record;
BEGIN
    -- The outbox comes first: what a replica moves from there meanwhile is in the log when the head is read.
    IF sender IS NULL AND before IS NULL THEN
        erased := catbus.erase_outbox(pattern, true);
    END IF;
    SELECT p.head INTO newest FROM catbus.log_position() AS p;
    SELECT 0 AS scanned, 0 AS matched, '' AS channel, 0::bigint AS seq INTO batch;
    LOOP
        SELECT b.scanned, b.matched, b.channel, b.seq INTO batch
        FROM catbus.erase_batch(pattern, sender, limit_at, newest, batch.channel, batch.seq, true) AS b;
        EXIT WHEN batch.scanned = 0;
        erased := erased + batch.matched;
    END LOOP;
    erased := erased + catbus.erase_retained(pattern, sender, limit_at, newest, true);
    RETURN erased + catbus.erase_dead_letters(pattern, sender, limit_at, true);
END
$$;
COMMENT ON FUNCTION catbus.erase IS
    'Erases messages by pattern, and optionally by sender and time, and keeps their seqs; returns their number';

-- The seqs of the erased entries in `after < seq <= until`.
CREATE FUNCTION catbus.erased_seqs(after bigint, until bigint) RETURNS bigint[]
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN ARRAY(
        SELECT e.seq FROM catbus.entries AS e
        WHERE e.channel = '_erased' AND e.seq > after AND e.seq <= until ORDER BY e.seq
    );
END
$$;

-- The tables that have old rows of erased messages, each with its newest erasure. `blocked`: a transaction from before
-- that erasure might still see them, so VACUUM would not remove them.
CREATE FUNCTION catbus.vacuum_due() RETURNS TABLE (name text, erasure bigint, blocked boolean)
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN QUERY
    SELECT e.name, e.erasure, EXISTS (
        SELECT FROM (
            SELECT a.backend_xmin AS oldest FROM pg_stat_activity AS a
            WHERE a.pid <> pg_backend_pid() AND (a.datname = current_database() OR a.datname IS NULL)
            UNION ALL
            SELECT a.backend_xid FROM pg_stat_activity AS a
            WHERE a.pid <> pg_backend_pid() AND a.datname = current_database()
            UNION ALL SELECT p.transaction FROM pg_prepared_xacts AS p WHERE p.database = current_database()
            UNION ALL SELECT s.xmin FROM pg_replication_slots AS s
        ) AS holder
        WHERE age(holder.oldest) >= age(e.xid::xid)
    )
    FROM catbus.erasures AS e WHERE e.vacuumed < e.erasure ORDER BY e.name;
END
$$;

REVOKE ALL ON FUNCTION catbus.note_erasure, catbus.pattern_range, catbus.erase_batch, catbus.erase_outbox,
    catbus.erase_retained, catbus.erase, catbus.erased_seqs, catbus.vacuum_due FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'note_erasure', 'pattern_range', 'erase_batch', 'erase_outbox', 'erase_retained', 'erase', 'erased_seqs',
        'vacuum_due'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['erase_batch', 'erase_retained', 'erased_seqs'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
                        SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
                        SET jit = off SET geqo = off', name);
    END LOOP;
END
$$;
