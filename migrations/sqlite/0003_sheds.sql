-- The same table, with the same meaning, as migrations/postgres/0003_sheds.sql; the comments are there.
CREATE TABLE sheds (
    device_id TEXT    PRIMARY KEY,
    uploads   INTEGER NOT NULL,
    bytes     INTEGER NOT NULL,
    first_ms  INTEGER NOT NULL,
    last_ms   INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX uploads_clean_shed ON uploads (received_at_ms) WHERE state = 'shed' AND removed_at_ms IS NULL;

CREATE TRIGGER sheds_count AFTER UPDATE OF state ON uploads WHEN OLD.state <> 'shed' AND NEW.state = 'shed' BEGIN
    INSERT INTO sheds (device_id, uploads, bytes, first_ms, last_ms)
    VALUES (NEW.device_id, 1, NEW.size_bytes,
        CAST(unixepoch('subsec') * 1000 AS INTEGER), CAST(unixepoch('subsec') * 1000 AS INTEGER))
    ON CONFLICT (device_id) DO UPDATE SET
        uploads = uploads + 1, bytes = bytes + excluded.bytes, last_ms = excluded.last_ms;
END;
