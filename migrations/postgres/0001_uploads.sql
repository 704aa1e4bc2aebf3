-- One row an upload. Everything up to received_at_ms is fixed at acceptance and stands in the photo's spool file too;
-- the rest is how far it has come. Moments are milliseconds since 1970 UTC.
CREATE TABLE uploads (
    id              uuid     PRIMARY KEY,
    device_id       text     NOT NULL,
    upload_id       text,                          -- the device's own id; id is derived from it, so id alone keeps it unique
    object_key      text     NOT NULL,
    size_bytes      bigint   NOT NULL,
    sha256          text     NOT NULL,             -- hex, taken at ingest
    content_type    text     NOT NULL,
    filename        text,
    captured_at_ms  bigint,
    priority        smallint NOT NULL DEFAULT 1,   -- 0 low, 1 normal, 2 high
    metadata        text,                          -- flat JSON object of strings
    traceparent     text,
    received_at_ms  bigint   NOT NULL,

    state           text     NOT NULL DEFAULT 'queued'
                    CHECK (state IN ('queued', 'uploading', 'uploaded', 'dead', 'shed')),
    attempt         integer  NOT NULL DEFAULT 0,   -- one more with every claim; the fence of every later write
    failures        integer  NOT NULL DEFAULT 0,   -- failures charged to this upload itself
    not_before_ms   bigint   NOT NULL DEFAULT 0,   -- a failed upload rests until then
    lease_owner     text,
    lease_until_ms  bigint,
    reason          text,                          -- why it failed last, or was set aside
    uploaded_at_ms  bigint,
    removed_at_ms   bigint                         -- when its photo left the disk
) WITH (fillfactor = 75, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0);

-- what the drain claims next
CREATE INDEX uploads_claim ON uploads (priority DESC, received_at_ms, id) WHERE state = 'queued';
-- the lists, newest first
CREATE INDEX uploads_list ON uploads (received_at_ms, id);
CREATE INDEX uploads_list_device ON uploads (device_id, received_at_ms, id);
CREATE INDEX uploads_list_state ON uploads (state, received_at_ms, id);
-- what the cleaner removes next
CREATE INDEX uploads_clean ON uploads (uploaded_at_ms) WHERE state = 'uploaded' AND removed_at_ms IS NULL;

-- The books: how many uploads and bytes stand in each state, kept by triggers in the transaction that changes the rows, so
-- that status costs the same at ten as at ten million. A row of `books` per shard keeps writers out of each other's way;
-- single shards may be negative, their sum is the truth. Purged records stay counted as uploaded.
CREATE TABLE books (
    shard   integer NOT NULL,
    state   text    NOT NULL,
    on_disk boolean NOT NULL,
    uploads bigint  NOT NULL,
    bytes   bigint  NOT NULL,
    PRIMARY KEY (shard, state, on_disk)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE FUNCTION books_accept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO books AS b
    SELECT pg_backend_pid() % 64, state, removed_at_ms IS NULL, count(*), sum(size_bytes)
    FROM new_rows GROUP BY 2, 3 ORDER BY 2, 3
    ON CONFLICT (shard, state, on_disk)
    DO UPDATE SET uploads = b.uploads + excluded.uploads, bytes = b.bytes + excluded.bytes;
    RETURN NULL;
END $$;

CREATE FUNCTION books_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO books AS b
    SELECT pg_backend_pid() % 64, state, on_disk, sum(n), sum(n * size_bytes)
    FROM (
        SELECT state, removed_at_ms IS NULL AS on_disk, 1 AS n, size_bytes FROM new_rows
        UNION ALL
        SELECT state, removed_at_ms IS NULL, -1, size_bytes FROM old_rows
    ) AS moved
    GROUP BY 2, 3 HAVING sum(n) <> 0 OR sum(n * size_bytes) <> 0 ORDER BY 2, 3
    ON CONFLICT (shard, state, on_disk)
    DO UPDATE SET uploads = b.uploads + excluded.uploads, bytes = b.bytes + excluded.bytes;
    RETURN NULL;
END $$;

CREATE TRIGGER books_accept AFTER INSERT ON uploads
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION books_accept();
CREATE TRIGGER books_move AFTER UPDATE ON uploads
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION books_move();

-- Who pours: of all drains, the one whose lease is good. There is at most one row.
CREATE TABLE leader (
    role     text PRIMARY KEY CHECK (role = 'drain'),
    owner    text NOT NULL,
    until_ms bigint NOT NULL
);
