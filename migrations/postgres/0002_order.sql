-- The order in which uploads leave. A line is what one device has queued in one priority class. Its turn is a virtual time
-- in bytes (start-time fair queueing): what leaves moves its line's turn on by its bytes, the line with the least turn is
-- next, and a line that was empty joins no earlier than its class's clock, so that nobody is owed anything for having been
-- idle. Like the books, the lines are kept by triggers in the transaction that changes the rows.
CREATE TABLE lines (
    priority     smallint NOT NULL,
    device_id    text     NOT NULL,
    queued       bigint   NOT NULL,
    queued_bytes bigint   NOT NULL,
    turn         bigint   NOT NULL,
    -- in the index instead of `queued`, so that one more upload in a line is no change to an index
    waits        boolean  NOT NULL GENERATED ALWAYS AS (queued > 0) STORED,
    PRIMARY KEY (priority, device_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- whose turn it is
CREATE INDEX lines_turn ON lines (priority DESC, turn, device_id) WHERE waits;
-- what waits in a line
CREATE INDEX uploads_line ON uploads (device_id, priority, received_at_ms, id) WHERE state = 'queued';
-- the claims' plans depend on how much is queued, which may change within minutes while the table stays as large as it is
ALTER TABLE uploads SET (autovacuum_analyze_scale_factor = 0.01);

-- The virtual time now, of each class: the turn of what left last.
CREATE TABLE line_clocks (
    priority smallint PRIMARY KEY,
    turn     bigint   NOT NULL
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
INSERT INTO line_clocks VALUES (0, 0), (1, 0), (2, 0);

INSERT INTO lines (priority, device_id, queued, queued_bytes, turn)
SELECT priority, device_id, count(*), sum(size_bytes), 0 FROM uploads WHERE state = 'queued' GROUP BY 1, 2;

-- Lines are always locked in the order of their key, and after the rows and the books, so that transactions cannot wait for
-- each other in a circle.
CREATE FUNCTION lines_join() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO lines AS l (priority, device_id, queued, queued_bytes, turn)
    SELECT n.priority, n.device_id, n.uploads, n.bytes, coalesce(c.turn, 0)
    FROM (
        SELECT priority, device_id, count(*) AS uploads, sum(size_bytes) AS bytes
        FROM new_rows WHERE state = 'queued' GROUP BY 1, 2
    ) AS n LEFT JOIN line_clocks AS c USING (priority)
    ORDER BY n.priority, n.device_id
    ON CONFLICT (priority, device_id) DO UPDATE SET
        queued = l.queued + excluded.queued, queued_bytes = l.queued_bytes + excluded.queued_bytes,
        turn = CASE WHEN l.queued = 0 THEN greatest(l.turn, excluded.turn) ELSE l.turn END;
    RETURN NULL;
END $$;

CREATE FUNCTION lines_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO lines AS l (priority, device_id, queued, queued_bytes, turn)
    SELECT m.priority, m.device_id, m.uploads, m.bytes, coalesce(c.turn, 0)
    FROM (
        SELECT priority, device_id, sum(n) AS uploads, sum(n * size_bytes) AS bytes
        FROM (
            SELECT priority, device_id, 1 AS n, size_bytes FROM new_rows WHERE state = 'queued'
            UNION ALL
            SELECT priority, device_id, -1, size_bytes FROM old_rows WHERE state = 'queued'
        ) AS moved
        GROUP BY 1, 2 HAVING sum(n) <> 0
    ) AS m LEFT JOIN line_clocks AS c USING (priority)
    ORDER BY m.priority, m.device_id
    ON CONFLICT (priority, device_id) DO UPDATE SET
        queued = l.queued + excluded.queued, queued_bytes = l.queued_bytes + excluded.queued_bytes,
        turn = CASE WHEN l.queued = 0 THEN greatest(l.turn, excluded.turn) ELSE l.turn END;

    -- of those that left a line, only what is on its way now is counted against it
    WITH served AS (
        SELECT o.priority, o.device_id, sum(o.size_bytes) AS bytes, max(o.size_bytes) AS largest
        FROM old_rows AS o JOIN new_rows AS n ON n.id = o.id
        WHERE o.state = 'queued' AND n.state = 'uploading' GROUP BY 1, 2
    ), passed AS (
        UPDATE lines AS l SET turn = l.turn + s.bytes FROM served AS s
        WHERE l.priority = s.priority AND l.device_id = s.device_id
        RETURNING l.priority, l.turn - s.largest AS turn
    )
    UPDATE line_clocks AS c SET turn = p.turn
    FROM (SELECT priority, max(turn) AS turn FROM passed GROUP BY 1) AS p
    WHERE c.priority = p.priority AND c.turn < p.turn;
    RETURN NULL;
END $$;

CREATE TRIGGER lines_join AFTER INSERT ON uploads
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lines_join();
CREATE TRIGGER lines_move AFTER UPDATE ON uploads
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lines_move();
