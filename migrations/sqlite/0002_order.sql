-- The same tables, with the same meaning, as migrations/postgres/0002_order.sql; the comments are there.
CREATE TABLE lines (
    priority     INTEGER NOT NULL,
    device_id    TEXT    NOT NULL,
    queued       INTEGER NOT NULL,
    queued_bytes INTEGER NOT NULL,
    turn         INTEGER NOT NULL,
    waits        BOOLEAN NOT NULL GENERATED ALWAYS AS (queued > 0) STORED,
    PRIMARY KEY (priority, device_id)
) WITHOUT ROWID;

CREATE INDEX lines_turn ON lines (priority DESC, turn, device_id) WHERE waits;
CREATE INDEX uploads_line ON uploads (device_id, priority, received_at_ms, id) WHERE state = 'queued';

CREATE TABLE line_clocks (
    priority INTEGER PRIMARY KEY,
    turn     INTEGER NOT NULL
);
INSERT INTO line_clocks VALUES (0, 0), (1, 0), (2, 0);

INSERT INTO lines (priority, device_id, queued, queued_bytes, turn)
SELECT priority, device_id, count(*), sum(size_bytes), 0 FROM uploads WHERE state = 'queued' GROUP BY 1, 2;

CREATE TRIGGER lines_join AFTER INSERT ON uploads WHEN NEW.state = 'queued' BEGIN
    INSERT INTO lines (priority, device_id, queued, queued_bytes, turn)
    VALUES (NEW.priority, NEW.device_id, 1, NEW.size_bytes,
        coalesce((SELECT turn FROM line_clocks WHERE priority = NEW.priority), 0))
    ON CONFLICT (priority, device_id) DO UPDATE SET
        queued = queued + 1, queued_bytes = queued_bytes + excluded.queued_bytes,
        turn = CASE WHEN queued = 0 THEN max(turn, excluded.turn) ELSE turn END;
END;

CREATE TRIGGER lines_rejoin AFTER UPDATE OF state ON uploads WHEN OLD.state <> 'queued' AND NEW.state = 'queued' BEGIN
    INSERT INTO lines (priority, device_id, queued, queued_bytes, turn)
    VALUES (NEW.priority, NEW.device_id, 1, NEW.size_bytes,
        coalesce((SELECT turn FROM line_clocks WHERE priority = NEW.priority), 0))
    ON CONFLICT (priority, device_id) DO UPDATE SET
        queued = queued + 1, queued_bytes = queued_bytes + excluded.queued_bytes,
        turn = CASE WHEN queued = 0 THEN max(turn, excluded.turn) ELSE turn END;
END;

-- only what is on its way now is counted against its line
CREATE TRIGGER lines_leave AFTER UPDATE OF state ON uploads WHEN OLD.state = 'queued' AND NEW.state <> 'queued' BEGIN
    UPDATE line_clocks SET turn = max(line_clocks.turn, l.turn) FROM lines AS l
    WHERE NEW.state = 'uploading' AND line_clocks.priority = OLD.priority
        AND l.priority = OLD.priority AND l.device_id = OLD.device_id;
    UPDATE lines SET queued = queued - 1, queued_bytes = queued_bytes - OLD.size_bytes,
        turn = turn + iif(NEW.state = 'uploading', OLD.size_bytes, 0)
    WHERE priority = OLD.priority AND device_id = OLD.device_id;
END;
