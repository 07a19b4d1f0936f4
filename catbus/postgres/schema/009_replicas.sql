-- Which replicas there are, as they have said themselves. Each writes its row every few seconds, never with NOTIFY: this
-- is for people who look. It need not outlive a crash, nor be on a standby.
CREATE UNLOGGED TABLE catbus.replicas (
    id text PRIMARY KEY,
    seen timestamptz NOT NULL,
    report text NOT NULL
) WITH (fillfactor = 50);

-- Say that a replica is there, and how it is (JSON). Returns all replicas that were there within the last minute, with
-- the seconds since they said so, and how much of the notification queue is in use (0 to 1); those that were not are
-- forgotten.
CREATE FUNCTION catbus.beat(own text, own_report text)
RETURNS TABLE (id text, silent double precision, report text, queue double precision, roles bigint)
LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO catbus.replicas AS r (id, seen, report) VALUES (own, clock_timestamp(), own_report)
    ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, report = excluded.report;
    DELETE FROM catbus.replicas AS r WHERE r.seen < clock_timestamp() - interval '1 minute';
    RETURN QUERY
    SELECT r.id, extract(epoch FROM clock_timestamp() - r.seen)::double precision, r.report,
           pg_notification_queue_usage(), (SELECT count(*) FROM catbus.roles)
    FROM catbus.replicas AS r ORDER BY r.id = own DESC, r.id;
END
$$;

REVOKE ALL ON FUNCTION catbus.beat FROM PUBLIC;
