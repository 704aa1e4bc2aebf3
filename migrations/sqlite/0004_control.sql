-- The same table, with the same meaning, as migrations/postgres/0004_control.sql; the comments are there.
CREATE TABLE control (
    kind     TEXT    PRIMARY KEY CHECK (kind IN ('rate', 'pause')),
    amount   TEXT    CHECK ((kind = 'rate') = (amount IS NOT NULL)),
    who      TEXT    NOT NULL,
    since_ms INTEGER NOT NULL,
    until_ms INTEGER
);
