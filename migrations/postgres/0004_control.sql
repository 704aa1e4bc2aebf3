-- What operators said: a rate in place of the configured one, and a pause. One row each while it is said; it is over when
-- until_ms is reached, and is then as good as gone. Moments are milliseconds since 1970 UTC, by this database's clock.
CREATE TABLE control (
    kind     text   PRIMARY KEY CHECK (kind IN ('rate', 'pause')),
    amount   text   CHECK ((kind = 'rate') = (amount IS NOT NULL)),  -- a share or bytes per second, such as 100% or 5000000B/s
    who      text   NOT NULL,
    since_ms bigint NOT NULL,
    until_ms bigint                                                  -- none: until it is taken back
);
