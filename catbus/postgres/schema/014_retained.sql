-- Retained messages: the newest message of each channel that was published with `retain`. They stay when retention removes
-- their entries from the log.

-- One row per channel. A new message is a new row with a greater seq, and the old row is deleted by its whole key. So the
-- newest version is found first from the end of the index, however many dead ones an open snapshot keeps. An UPDATE of one
-- row per channel, as of ON CONFLICT, walks over all of them, and gets slower with each.
CREATE TABLE catbus.retained (
    channel  text   COLLATE "C" NOT NULL,
    seq      bigint NOT NULL,
    at       bigint NOT NULL,
    number   bigint NOT NULL,
    payload  text   NOT NULL,
    producer bytea  NOT NULL,
    sender   text,
    PRIMARY KEY (channel, seq)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
    toast_tuple_target = 8160
);
-- As in catbus.entries.
ALTER TABLE catbus.retained ALTER COLUMN payload SET STORAGE EXTERNAL;
COMMENT ON TABLE catbus.retained IS 'The retained message of each channel';
COMMENT ON COLUMN catbus.retained.number IS 'With producer, the key that identifies a retry of its publish';

-- Whether the retained messages were over their budget at the last check. The value of a sequence changes in place, and
-- without a lock.
CREATE SEQUENCE catbus.retained_over_budget MINVALUE 0 MAXVALUE 1 START 0 CACHE 1;

CREATE FUNCTION catbus.retained_full() RETURNS boolean
LANGUAGE sql
AS $$
    SELECT s.last_value = 1 FROM catbus.retained_over_budget AS s
$$;

-- Count the retained messages and the bytes of their texts, and record whether these are more than `budget`. Replicas do
-- that every few seconds; a sum at each append would take too long.
CREATE FUNCTION catbus.measure_retained(budget bigint, OUT messages bigint, OUT bytes bigint)
LANGUAGE plpgsql
AS $$
BEGIN
    SELECT count(*),
           coalesce(sum(octet_length(r.channel) + octet_length(r.payload) + coalesce(octet_length(r.sender), 0)), 0)
    INTO messages, bytes
    FROM catbus.retained AS r;
    IF (bytes > budget) <> catbus.retained_full() THEN
        PERFORM setval('catbus.retained_over_budget', (bytes > budget)::integer);
    END IF;
END
$$;

-- Decide about the entries of an append, of which some are retained. catbus.append calls it under the lock of the head
-- row; the arguments are those of catbus.append, and what it has found so far. A seq below `first` is decided already, but
-- for the originals of retries that retention has removed from the log and that are still retained.
--
-- seqs, present  those of catbus.append
-- added          the number of entries to be appended
CREATE FUNCTION catbus.decide_retained(
    channels    text[],
    payloads    text[],
    producers   bytea[],
    numbers     bigint[],
    retains     boolean[],
    expects     bigint[],
    first       bigint,
    INOUT seqs  bigint[],
    OUT present bigint[],
    OUT added   bigint
)
LANGUAGE plpgsql
AS $$
DECLARE
    places integer[];
    held   bigint[];
    over_budget boolean := catbus.retained_full();
BEGIN
    IF -1 = ANY (seqs) THEN
        SELECT array_agg(
            CASE WHEN r.seq IS NULL THEN given.seq WHEN r.payload = given.payload THEN r.seq ELSE 0 END ORDER BY given.i)
        INTO seqs
        FROM unnest(seqs, channels, payloads, producers, numbers, retains)
             WITH ORDINALITY AS given (seq, channel, payload, producer, number, retain, i)
        LEFT JOIN catbus.retained AS r
            ON given.seq = -1 AND given.retain AND r.channel = given.channel
            AND r.producer = given.producer AND r.number = given.number;
    END IF;

    -- held[places[i]] is the seq of the retained message of channels[i], as the entries before this one leave it. Entries
    -- that are not retained have no place; they come last in the order of places.
    SELECT array_agg(given.place ORDER BY given.i) INTO places
    FROM (
        SELECT given.i,
               dense_rank() OVER (ORDER BY CASE WHEN given.retain THEN given.channel END COLLATE "C")::integer AS place
        FROM unnest(channels, retains) WITH ORDINALITY AS given (channel, retain, i)
    ) AS given;
    SELECT array_agg(coalesce(r.seq, 0) ORDER BY given.channel) INTO held
    FROM (
        SELECT DISTINCT given.channel COLLATE "C" AS channel
        FROM unnest(channels, retains) AS given (channel, retain) WHERE given.retain
    ) AS given
    LEFT JOIN LATERAL (
        SELECT r.seq FROM catbus.retained AS r WHERE r.channel = given.channel ORDER BY r.seq DESC LIMIT 1
    ) AS r ON true;

    -- One after the other: whether a message is appended, and so every later seq, depends on those before it.
    present := array_fill(NULL::bigint, ARRAY[cardinality(channels)]);
    added := 0;
    FOR i IN 1 .. cardinality(channels) LOOP
        CONTINUE WHEN seqs[i] < first;
        IF retains[i] THEN
            IF expects[i] <> held[places[i]] THEN
                seqs[i] := -2;
                present[i] := held[places[i]];
                CONTINUE;
            ELSIF payloads[i] = 'null' THEN
                held[places[i]] := 0;
            ELSIF over_budget THEN
                seqs[i] := -3;
                CONTINUE;
            ELSE
                held[places[i]] := first + added;
            END IF;
        END IF;
        seqs[i] := first + added;
        added := added + 1;
    END LOOP;
END
$$;

-- Make the entries from `first` on that are retained the retained messages of their channels: the last one of each
-- channel. The caller has appended them to this slot, and holds the lock of the head row.
CREATE FUNCTION catbus.replace_retained(slot smallint, first bigint) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    WITH newest AS MATERIALIZED (
        SELECT DISTINCT ON (e.channel) e.channel, e.seq, e.at, e.number, e.payload, e.producer, e.sender
        FROM catbus.entries AS e
        WHERE e.slot = replace_retained.slot AND e.seq >= first AND e.retain
        ORDER BY e.channel, e.seq DESC
    ), replaced AS MATERIALIZED (
        SELECT n.channel, r.seq
        FROM newest AS n
        CROSS JOIN LATERAL (
            SELECT r.seq FROM catbus.retained AS r WHERE r.channel = n.channel ORDER BY r.seq DESC LIMIT 1
        ) AS r
    ), deleted AS (
        DELETE FROM catbus.retained AS r USING replaced AS o WHERE r.channel = o.channel AND r.seq = o.seq
    )
    INSERT INTO catbus.retained (channel, seq, at, number, payload, producer, sender)
    SELECT n.channel, n.seq, n.at, n.number, n.payload, n.producer, n.sender FROM newest AS n WHERE n.payload <> 'null';
END
$$;

-- The retained messages of the channels that a pattern matches, in the order of the channels. `at` is in milliseconds
-- since 1970. Messages of the outbox are not among them. It runs with its owner's rights: whoever may execute it may read
-- the retained messages of all channels. Raises 22023 for a wrong pattern.
CREATE FUNCTION catbus.retained(pattern text)
RETURNS TABLE (channel text, seq bigint, at bigint, payload text, sender text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
AS $$
#variable_conflict use_column
DECLARE
    bounds record;
BEGIN
    SELECT coalesce(r.low, '') AS low, coalesce(r.high, E'\x7f') AS high, r.low IS NULL AS every INTO bounds
    FROM catbus.pattern_range(pattern) AS r;
    RETURN QUERY
    SELECT r.channel, r.seq, r.at, r.payload, r.sender
    FROM catbus.retained AS r
    WHERE r.channel >= bounds.low AND r.channel < bounds.high AND NOT (bounds.every AND starts_with(r.channel, '_'))
    ORDER BY r.channel;
END
$$;
COMMENT ON FUNCTION catbus.retained IS 'The retained messages of the channels that a pattern matches';

REVOKE ALL ON FUNCTION catbus.retained_full, catbus.measure_retained, catbus.decide_retained, catbus.replace_retained,
    catbus.retained FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'retained_full', 'measure_retained', 'decide_retained', 'replace_retained', 'retained'
    ] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['decide_retained', 'replace_retained'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
                        SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
                        SET jit = off SET geqo = off', name);
    END LOOP;
END
$$;
