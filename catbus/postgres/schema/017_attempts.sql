-- Attempts: how often a message was received by a transaction that did not commit, and when it is received again.
--
-- catbus.receive(..., attempts => true) counts them, without a transaction of its own. Each partition has a sequence, and
-- a rollback, the end of a connection or of a process leaves its value. The value is the seq of the first message that the
-- last transaction received, and how often that message was received alone: seq * 1024 + number. The lock of the partition
-- keeps others away from it.
--
-- If a transaction with several messages does not commit, nobody knows which of them is the reason. They are received one
-- at a time then, and only this counts. So a message that always fails delays its partition, and no message is rejected
-- for another one.

CREATE FUNCTION catbus.create_counter() RETURNS trigger
LANGUAGE plpgsql
AS $$
DECLARE
    name text := 'attempts_' || nextval('catbus.consumer_turn');
BEGIN
    EXECUTE format('CREATE SEQUENCE catbus.%I CACHE 1', name);
    NEW.counter := format('catbus.%I', name);
    RETURN NEW;
END
$$;

CREATE FUNCTION catbus.drop_counter() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    EXECUTE format('DROP SEQUENCE %s', OLD.counter);
    RETURN NULL;
END
$$;

CREATE TRIGGER create_counter BEFORE INSERT ON catbus.consumer_partitions
    FOR EACH ROW EXECUTE FUNCTION catbus.create_counter();
CREATE TRIGGER drop_counter AFTER DELETE ON catbus.consumer_partitions
    FOR EACH ROW EXECUTE FUNCTION catbus.drop_counter();
ALTER TABLE catbus.consumer_partitions ENABLE ALWAYS TRIGGER create_counter, ENABLE ALWAYS TRIGGER drop_counter;

-- Put back what this transaction has received, and let nobody receive it for a while. `reason` says why, for operators.
--
-- Roll back to a savepoint behind catbus.receive first, and commit afterwards. Between a rollback and another transaction
-- somebody else could receive the messages at once.
--
-- Raises what catbus.own_consumer raises, 22023 for a delay that is not from 0 to 1 day, and 55000 if this transaction has
-- received nothing.
CREATE FUNCTION catbus.postpone(name text, delay interval, reason text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c catbus.consumers := catbus.own_consumer(postpone.name, 'postpone');
BEGIN
    IF (delay BETWEEN interval '0' AND interval '1 day') IS NOT TRUE THEN
        RAISE EXCEPTION 'catbus.postpone delays messages by 0 to 1 day, not by %', delay USING ERRCODE = '22023';
    END IF;
    UPDATE catbus.consumer_cursors AS n
    SET cursor = n.moved_from, turn = nextval('catbus.consumer_turn'), moved = clock_timestamp(), moved_by = NULL,
        moved_from = NULL, postponed = clock_timestamp() + delay, failure = left(reason, 1000),
        alone = greatest(n.alone, n.cursor)
    WHERE n.consumer = c.name AND n.moved_by = pg_current_xact_id_if_assigned();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'this transaction has received no messages of the consumer "%"', c.name
            USING ERRCODE = '55000', HINT = 'Postpone messages in the transaction that receives them.';
    END IF;
END
$$;
COMMENT ON FUNCTION catbus.postpone IS 'Puts received messages back, and lets nobody receive them for a while';

-- Whether catbus.receive may find messages although it has just found none: it looks at 10,000 messages of the log, and a
-- cursor is further behind.
--
-- Raises what catbus.own_consumer raises.
CREATE FUNCTION catbus.far_behind(name text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
AS $$
DECLARE
    c    catbus.consumers := catbus.own_consumer(far_behind.name, 'far_behind');
    head bigint;
BEGIN
    SELECT p.head INTO head FROM catbus.position() AS p;
    RETURN EXISTS (
        SELECT FROM catbus.consumer_partitions AS k
        CROSS JOIN LATERAL (
            SELECT n.cursor, n.postponed FROM catbus.consumer_cursors AS n
            WHERE n.consumer = k.consumer AND n.part = k.part ORDER BY n.turn DESC LIMIT 1
        ) AS n
        WHERE k.consumer = c.name AND n.cursor < head - 10000 AND (n.postponed > clock_timestamp()) IS NOT TRUE
    );
END
$$;
COMMENT ON FUNCTION catbus.far_behind IS 'Whether a consumer may have messages although catbus.receive has found none';

REVOKE ALL ON FUNCTION catbus.create_counter, catbus.drop_counter, catbus.postpone, catbus.far_behind FROM PUBLIC;

-- As in 011_settings.sql.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['create_counter', 'drop_counter', 'postpone', 'far_behind'] LOOP
        EXECUTE format('ALTER FUNCTION catbus.%I SET search_path = pg_catalog, pg_temp
                        SET standard_conforming_strings = on', name);
    END LOOP;
    ALTER FUNCTION catbus.far_behind SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
        SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off SET geqo = off;
END
$$;
