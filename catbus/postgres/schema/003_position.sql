-- Where the log stands: cheap, without a lock, asked all the time.
--
-- head is the newest committed seq, floor the oldest that still exists; floor = head + 1 when none does.
CREATE FUNCTION catbus.position() RETURNS TABLE (epoch text, head bigint, floor bigint)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    newest bigint;
BEGIN
    -- Two statements, in this order, and therefore VOLATILE: TRUNCATE hides rows from older snapshots too. Should it
    -- take the whole log away before the first statement has looked, the second sees the floor that was moved with it.
    SELECT e.seq INTO newest FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1;
    RETURN QUERY SELECT h.epoch, greatest(newest, h.floor - 1), h.floor FROM catbus.head AS h;
END
$$;

REVOKE ALL ON FUNCTION catbus.position FROM PUBLIC;
