-- The same tables, with the same meaning, as migrations/postgres/0001_uploads.sql; the comments are there.
CREATE TABLE uploads (
    id              BLOB    PRIMARY KEY,
    device_id       TEXT    NOT NULL,
    upload_id       TEXT,
    object_key      TEXT    NOT NULL,
    size_bytes      INTEGER NOT NULL,
    sha256          TEXT    NOT NULL,
    content_type    TEXT    NOT NULL,
    filename        TEXT,
    captured_at_ms  INTEGER,
    priority        INTEGER NOT NULL DEFAULT 1,
    metadata        TEXT,
    traceparent     TEXT,
    received_at_ms  INTEGER NOT NULL,

    state           TEXT    NOT NULL DEFAULT 'queued'
                    CHECK (state IN ('queued', 'uploading', 'uploaded', 'dead', 'shed')),
    attempt         INTEGER NOT NULL DEFAULT 0,
    failures        INTEGER NOT NULL DEFAULT 0,
    not_before_ms   INTEGER NOT NULL DEFAULT 0,
    lease_owner     TEXT,
    lease_until_ms  INTEGER,
    reason          TEXT,
    uploaded_at_ms  INTEGER,
    removed_at_ms   INTEGER
);

CREATE INDEX uploads_claim ON uploads (priority DESC, received_at_ms, id) WHERE state = 'queued';
CREATE INDEX uploads_list ON uploads (received_at_ms, id);
CREATE INDEX uploads_list_device ON uploads (device_id, received_at_ms, id);
CREATE INDEX uploads_list_state ON uploads (state, received_at_ms, id);
CREATE INDEX uploads_clean ON uploads (uploaded_at_ms) WHERE state = 'uploaded' AND removed_at_ms IS NULL;

-- SQLite has one writer at a time, so one shard is enough.
CREATE TABLE books (
    state   TEXT    NOT NULL,
    on_disk BOOLEAN NOT NULL,
    uploads INTEGER NOT NULL,
    bytes   INTEGER NOT NULL,
    PRIMARY KEY (state, on_disk)
) WITHOUT ROWID;

CREATE TRIGGER books_accept AFTER INSERT ON uploads BEGIN
    INSERT INTO books VALUES (NEW.state, NEW.removed_at_ms IS NULL, 1, NEW.size_bytes)
    ON CONFLICT (state, on_disk) DO UPDATE SET uploads = uploads + 1, bytes = bytes + excluded.bytes;
END;

CREATE TRIGGER books_move AFTER UPDATE OF state, removed_at_ms ON uploads BEGIN
    INSERT INTO books VALUES (OLD.state, OLD.removed_at_ms IS NULL, -1, -OLD.size_bytes)
    ON CONFLICT (state, on_disk) DO UPDATE SET uploads = uploads - 1, bytes = bytes + excluded.bytes;
    INSERT INTO books VALUES (NEW.state, NEW.removed_at_ms IS NULL, 1, NEW.size_bytes)
    ON CONFLICT (state, on_disk) DO UPDATE SET uploads = uploads + 1, bytes = bytes + excluded.bytes;
END;

-- Who pours: of all drains, the one whose lease is good. There is at most one row.
CREATE TABLE leader (
    role     TEXT PRIMARY KEY CHECK (role = 'drain'),
    owner    TEXT NOT NULL,
    until_ms INTEGER NOT NULL
);
