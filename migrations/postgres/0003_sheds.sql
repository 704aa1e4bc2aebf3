-- What was given up because the disk was full. The record of a shed upload is its tombstone and is purged in the end; how many
-- each device lost is kept for good, by a trigger like the books.
CREATE TABLE sheds (
    device_id text   PRIMARY KEY,
    uploads   bigint NOT NULL,
    bytes     bigint NOT NULL,
    first_ms  bigint NOT NULL,   -- when it first lost one, and last
    last_ms   bigint NOT NULL
);

-- shed, and still on disk
CREATE INDEX uploads_clean_shed ON uploads (received_at_ms) WHERE state = 'shed' AND removed_at_ms IS NULL;

CREATE FUNCTION sheds_count() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    now_ms bigint := CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint);
BEGIN
    INSERT INTO sheds AS s (device_id, uploads, bytes, first_ms, last_ms)
    SELECT n.device_id, count(*), sum(n.size_bytes), now_ms, now_ms
    FROM new_rows AS n JOIN old_rows AS o ON o.id = n.id
    WHERE n.state = 'shed' AND o.state <> 'shed' GROUP BY 1 ORDER BY 1
    ON CONFLICT (device_id) DO UPDATE SET
        uploads = s.uploads + excluded.uploads, bytes = s.bytes + excluded.bytes, last_ms = excluded.last_ms;
    RETURN NULL;
END $$;

CREATE TRIGGER sheds_count AFTER UPDATE ON uploads
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION sheds_count();
