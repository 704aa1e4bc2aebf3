//! The claims: which uploads leave next, by age or by the lines of the devices.
//!
//! Always: higher classes first; what a claim reads is bounded by what it may take, whatever the backlog, but for uploads
//! that rest at the front of a line; a claim of many takes what as many claims of one would have. Never: a claim that finds
//! nothing while something may leave.
//!
//! `LIMIT +$1` and not `LIMIT $1`: SQLite looks at a bare parameter there to plan by its value, and so prepares the statement
//! anew for each value that is bound, triggers included. So it is wherever a statement is run every second.

/// Gives `$backend` the claims. Beyond what `shared_statements!` takes: `$by_age` names the index for a database that would not
/// take it by itself, `$hold` makes ids that were chosen rows that nobody else has, and `$newest_of_line` and
/// `$oldest_of_line` join each line `a` with its first `$1` uploads `u` that do not rest.
macro_rules! claims {
    ($backend:ident, now = $now:literal, skip_locked = $skip_locked:literal,
     by_age = $by_age:literal, hold = $hold:literal,
     newest_of_line = $newest_of_line:literal, oldest_of_line = $oldest_of_line:literal) => {
        impl $backend {
            const CLAIM_OLDEST: &str = concat!(
                "WITH next AS MATERIALIZED (
                     SELECT id FROM uploads ",
                $by_age,
                " WHERE state = 'queued' AND not_before_ms <= ",
                $now,
                " ORDER BY priority DESC, received_at_ms, id LIMIT +$1 ",
                $skip_locked,
                ") ",
                lease_next!($now)
            );

            // the claim's index is by class and then oldest first, so each class is read backwards for itself
            const CLAIM_NEWEST: &str = concat!(
                "WITH waiting AS (",
                newest_of_class!("2", $by_age, $now),
                " UNION ALL ",
                newest_of_class!("1", $by_age, $now),
                " UNION ALL ",
                newest_of_class!("0", $by_age, $now),
                "
                 ), chosen AS (
                     SELECT id FROM waiting ORDER BY priority DESC, received_at_ms DESC, id DESC LIMIT +$1
                 ), next AS MATERIALIZED (",
                $hold,
                ") ",
                lease_next!($now)
            );

            const CLAIM_FRESH: &str = by_turn!($newest_of_line, "DESC", $now, $hold);
            const CLAIM_BACKLOG: &str = by_turn!($oldest_of_line, "", $now, $hold);

            /// The text of a claim.
            pub(super) fn claim_statement(&self, pick: Pick) -> &'static str {
                match pick {
                    Pick::Oldest => Self::CLAIM_OLDEST,
                    Pick::Newest => Self::CLAIM_NEWEST,
                    Pick::Fresh => Self::CLAIM_FRESH,
                    Pick::Backlog => Self::CLAIM_BACKLOG,
                }
            }

            /// By turn, at most `lines` lines are looked at.
            pub(super) async fn claim(
                &self,
                owner: &str,
                limit: u32,
                lease: Duration,
                pick: Pick,
                lines: i64,
            ) -> sqlx::Result<Vec<Row>> {
                let claim = sqlx::query_as(self.claim_statement(pick))
                    .bind(i64::from(limit))
                    .bind(owner)
                    .bind(lease.as_millis() as i64);
                match pick.by_turn() {
                    true => claim.bind(lines).fetch_all(&self.write).await,
                    false => claim.fetch_all(&self.write).await,
                }
            }

            pub(super) async fn claim_probe(&self, owner: &str, lease: Duration) -> sqlx::Result<Vec<Row>> {
                // the claim's own index, backwards
                sqlx::query_as(concat!(
                    "WITH next AS MATERIALIZED (
                         SELECT id FROM uploads ",
                    $by_age,
                    " WHERE state = 'queued' AND not_before_ms <= ",
                    $now,
                    "
                         ORDER BY priority, received_at_ms DESC, id DESC LIMIT +$1 ",
                    $skip_locked,
                    ") ",
                    lease_next!($now)
                ))
                .bind(1i64)
                .bind(owner)
                .bind(lease.as_millis() as i64)
                .fetch_all(&self.write)
                .await
            }

            /// Brings lines that could not be served up to their class's clock, and deletes those that say nothing any more;
            /// how many of both. What another transaction holds is left for the next time.
            pub(super) async fn tend_lines(&self, limit: u32) -> sqlx::Result<u64> {
                let late = sqlx::query(concat!(
                    "UPDATE lines SET turn = (SELECT c.turn FROM line_clocks AS c WHERE c.priority = lines.priority)
                     WHERE (priority, device_id) IN (
                         SELECT l.priority, l.device_id FROM lines AS l
                         WHERE l.waits AND l.turn < (SELECT c.turn FROM line_clocks AS c WHERE c.priority = l.priority)
                         LIMIT +$1 ",
                    $skip_locked,
                    ")"
                ))
                .bind(i64::from(limit))
                .execute(&self.write)
                .await?;
                let empty = sqlx::query(concat!(
                    "DELETE FROM lines WHERE queued = 0 AND (priority, device_id) IN (
                         SELECT l.priority, l.device_id FROM lines AS l
                         WHERE l.queued = 0 AND l.turn <= (SELECT c.turn FROM line_clocks AS c WHERE c.priority = l.priority)
                         LIMIT +$1 ",
                    $skip_locked,
                    ")"
                ))
                .bind(i64::from(limit))
                .execute(&self.write)
                .await?;
                Ok(late.rows_affected() + empty.rows_affected())
            }

            pub(super) async fn lines(&self) -> sqlx::Result<Vec<(String, i16, i64, i64)>> {
                sqlx::query_as("SELECT device_id, priority, queued, queued_bytes FROM lines WHERE waits ORDER BY 1, 2")
                    .fetch_all(&self.read)
                    .await
            }

            pub(super) async fn count_lines(&self) -> sqlx::Result<Vec<(String, i16, i64, i64)>> {
                sqlx::query_as(
                    "SELECT device_id, priority, count(*), CAST(sum(size_bytes) AS bigint)
                     FROM uploads WHERE state = 'queued' GROUP BY 1, 2 ORDER BY 1, 2",
                )
                .fetch_all(&self.read)
                .await
            }
        }
    };
}
pub(super) use claims;

/// The end of every claim: `$2` leases what `next` holds for `$3` milliseconds.
macro_rules! lease_next {
    ($now:literal) => {
        concat!(
            "UPDATE uploads SET state = 'uploading', attempt = attempt + 1, lease_owner = $2,
                 lease_until_ms = ",
            $now,
            " + $3
             WHERE id IN (SELECT id FROM next) RETURNING ",
            columns!()
        )
    };
}
pub(super) use lease_next;

/// The newest `$1` uploads of one priority class.
macro_rules! newest_of_class {
    ($priority:literal, $by_age:literal, $now:literal) => {
        concat!(
            "SELECT * FROM (SELECT id, priority, received_at_ms FROM uploads ",
            $by_age,
            " WHERE state = 'queued' AND priority = ",
            $priority,
            " AND not_before_ms <= ",
            $now,
            " ORDER BY received_at_ms DESC, id DESC LIMIT +$1) AS class_",
            $priority
        )
    };
}
pub(super) use newest_of_class;

/// Of the `$4` lines whose turn is next the first `$1` uploads, each at its line's turn plus the bytes that leave that line
/// before it.
macro_rules! by_turn {
    ($of_line:literal, $direction:literal, $now:literal, $hold:literal) => {
        concat!(
            "WITH ahead AS MATERIALIZED (
                 SELECT priority, device_id, turn FROM lines WHERE waits
                 ORDER BY priority DESC, turn, device_id LIMIT +$4
             ), waiting AS (
                 SELECT u.id, a.priority, a.device_id, a.turn - u.size_bytes + sum(u.size_bytes) OVER (
                     PARTITION BY a.priority, a.device_id
                     ORDER BY u.received_at_ms ",
            $direction,
            ", u.id ",
            $direction,
            " ROWS UNBOUNDED PRECEDING
                 ) AS turn
                 FROM ahead AS a CROSS JOIN ",
            $of_line,
            "
             ), chosen AS (
                 SELECT id FROM waiting ORDER BY priority DESC, turn, device_id LIMIT +$1
             ), next AS MATERIALIZED (",
            $hold,
            ") ",
            lease_next!($now)
        )
    };
}
pub(super) use by_turn;
