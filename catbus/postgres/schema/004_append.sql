-- Appending to the log: one call per batch, in autocommit.

-- The i-th elements of the arrays are one entry. Its key is (producer, number); keys within a call are distinct.
-- afters[i] is null, or for a retry the head that the client knew when it first sent the entry.
--
-- `enclosed` is the encrypted text of all entries. It is sent with the notification if all entries are new.
--
-- retains and expects are null if no entry is retained. An entry with retains[i] becomes the retained message of its
-- channel, and removes that with the payload null. expects[i] is null, or the seq that the retained message must have, as
-- the entries before this one leave it; 0 for none.
--
-- seqs[i]  the entry's seq; below `first` when an earlier call has appended it already, even if it was erased since
--          0   the key exists, with another channel or payload: nothing was appended for it
--          -1  retention or a deletion has passed afters[i], so nothing shows whether the key existed: nothing was
--              appended for it
--          -2  the channel's retained message is not the expected one: nothing was appended for it
--          -3  the retained messages are over their budget: nothing was appended for it
-- present  present[i] is the seq of the retained message, 0 for none, if seqs[i] is -2. Null if no entry is retained
-- first    the first seq that was free for this call
-- at       the time of the new entries
--
-- Raises CB001 when the log has another epoch, and 55P03 when the lock of the head row is not free within two seconds.
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
    enclosed  text DEFAULT NULL,
    retains   boolean[] DEFAULT NULL,
    expects   bigint[] DEFAULT NULL
) RETURNS TABLE (at bigint, first bigint, seqs bigint[], present bigint[])
LANGUAGE plpgsql
AS $$
DECLARE
    head  record;
    last  bigint;
    added bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'catbus.append needs the isolation level "read committed"' USING ERRCODE = '25001';
    END IF;

    -- Both hold until the transaction has ended, which the settings of a function do not: COMMIT waits for the disk.
    PERFORM set_config('synchronous_commit', append.synchronous_commit, true), set_config('lock_timeout', '2s', true);

    -- FOR UPDATE leaves no row version behind, and still writes WAL: a call that finds nothing but duplicates waits for
    -- the same disks and standbys as the call that appended the originals.
    SELECT h.epoch, h.slot, h.floor INTO STRICT head FROM catbus.head AS h FOR UPDATE;
    IF head.epoch IS DISTINCT FROM append.epoch THEN
        RAISE EXCEPTION 'the epoch of the log is %, not %', head.epoch, append.epoch USING ERRCODE = 'CB001';
    END IF;

    -- From here on every statement sees all that earlier holders of the lock have committed.
    SELECT e.seq, e.at INTO last, at FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1;
    -- In an empty log both are null, and greatest ignores nulls. A clock that was set back must not turn time back.
    first := greatest(last + 1, head.floor);
    at := greatest(at, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint);

    -- One index lookup per producer decides the usual case: a producer that has no entry from its lowest number on has
    -- only new keys. In the order of the index that takes half the time; LIMIT keeps the planner from turning the
    -- nesting inside out.
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
        SELECT FROM unnest(afters) AS retry (after)
        WHERE retry.after < (SELECT catbus.unverifiable_below(head.floor, first))
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
                       CASE WHEN e.seq IS NULL THEN
                                CASE WHEN given.after < (SELECT catbus.unverifiable_below(head.floor, first))
                                     THEN -1 END
                            WHEN e.channel = '_erased' THEN e.seq
                            WHEN e.channel = given.channel AND e.payload = given.payload THEN e.seq
                            ELSE 0
                       END AS known
                FROM unnest(channels, payloads, producers, numbers, afters)
                     WITH ORDINALITY AS given (channel, payload, producer, number, after, i)
                LEFT JOIN catbus.entries AS e ON e.producer = given.producer AND e.number = given.number
            ) AS checked
        ) AS entry;
    END IF;

    IF retains IS NOT NULL THEN
        SELECT d.seqs, d.present, d.added INTO seqs, present, added
        FROM catbus.decide_retained(channels, payloads, producers, numbers, retains, expects, first, seqs) AS d;
    END IF;

    IF added > 0 THEN
        INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, sender, origin, retain)
        SELECT head.slot, new.seq, append.at, new.channel, new.payload, new.producer, new.number, new.sender, new.origin,
               new.retain
        FROM unnest(seqs, channels, payloads, producers, numbers, senders, origins, retains)
             AS new (seq, channel, payload, producer, number, sender, origin, retain)
        WHERE new.seq >= first;
        IF retains IS NOT NULL THEN
            PERFORM catbus.replace_retained(head.slot, first);
        END IF;

        PERFORM catbus.notify(
            'catbus',
            format('%s:%s:%s', head.epoch, first, first + added - 1),
            CASE WHEN added = cardinality(channels) AND enclosed IS NOT NULL THEN format('%s %s', at, enclosed) END
        );
    END IF;
    RETURN NEXT;
END
$$;

-- The seq below which nothing shows whether a retry's original was in the log, if the head was below it when the retry
-- was first sent: retention or a deletion may have taken the original. `next` is the next seq to be given.
CREATE FUNCTION catbus.unverifiable_below(floor bigint, next bigint) RETURNS bigint
LANGUAGE plpgsql STABLE
AS $$
DECLARE
    deleted bigint;
BEGIN
    SELECT max(d.last) INTO deleted FROM catbus.deleted_ranges AS d WHERE d.repaired AND d.last < next;
    RETURN greatest(floor - 1, deleted);
END
$$;

-- catbus.append, with arguments that are short to send and fast to parse. There are `length` entries. If a column has
-- one element and there are more entries, that element is
--
-- channels, payloads, senders   the text of all entries, one line each; E'\x01' for a sender that is null
-- producers, afters             the value that all entries share
--
-- numbers are separated by commas; origins, retains and expects are null if all of them are.
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
    retains   boolean[],
    expects   bigint[],
    enclosed  text,
    length    integer
) RETURNS TABLE (at bigint, first bigint, seqs bigint[], present bigint[])
LANGUAGE plpgsql
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
    SELECT a.at, a.first, a.seqs, a.present INTO STRICT at, first, seqs, present
    FROM catbus.append(
        synchronous_commit, epoch, channels, payloads, producers, string_to_array(numbers, ',')::bigint[], senders,
        coalesce(origins, array_fill(NULL::bytea, ARRAY[length])), afters, enclosed, retains,
        expects
    ) AS a;
    RETURN NEXT;
END
$$;

REVOKE ALL ON FUNCTION catbus.append, catbus.unverifiable_below, catbus.append_packed FROM PUBLIC;

-- Procedures named *_transaction run in a transaction of their own. Behind a pooler a SET that a client sends beside a
-- statement need not hold for that statement, and a lock on the head row must not be held until a client's COMMIT
-- arrives. So these procedures end the transaction in which they are called, whatever `default_transaction_isolation`
-- and `default_transaction_read_only` have made of it, and begin a suitable one. Call them in autocommit, alone.
--
-- A procedure that ends transactions cannot have settings. So they only call functions that have them, by their full
-- names and with arguments of exactly their types.

-- Append, and with `move` also move messages from the outbox behind the appended ones. On any server but the one that
-- started at `server` it does nothing, and all results are null.
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
    retains   boolean[],
    expects   bigint[],
    enclosed  text,
    length    integer,
    server    timestamptz,
    move      boolean,
    OUT at    bigint,
    OUT first bigint,
    OUT seqs  bigint[],
    OUT present bigint[],
    OUT moved bigint,
    OUT last  bigint,
    OUT more  boolean
)
LANGUAGE plpgsql
AS $$
BEGIN
    ROLLBACK;
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;
    IF catbus.is_same_server(server) THEN
        SELECT a.at, a.first, a.seqs, a.present INTO at, first, seqs, present
        FROM catbus.append_packed(
            synchronous_commit, epoch, channels, payloads, senders, producers, numbers, origins, afters, retains,
            expects, enclosed, length) AS a;
        IF move THEN
            SELECT m.moved, m.last, m.more INTO moved, last, more
            FROM catbus.move_outbox(synchronous_commit, epoch, at) AS m;
        END IF;
    END IF;
END
$$;

REVOKE ALL ON PROCEDURE catbus.append_transaction FROM PUBLIC;
