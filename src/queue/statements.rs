//! The statements that are one text for SQLite and Postgres, written once and made into methods of both.
//!
//! Always: a placeholder is `$n`, a moment is taken from the database's own clock. Never: a statement made at run time.

use std::sync::Arc;

use sqlx::Row as _;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use tokio::time::Instant;
use uuid::Uuid;

use super::{Books, Look, Record, Tally};
use crate::allowance::{Control, Override, Pause};
use crate::error::Error;
use crate::units::UnixMs;
use crate::upload::{Priority, Upload, UploadId};

/// The struct of a row, and how either database's becomes one: by the columns' names.
macro_rules! row {
    ($(#[$doc:meta])* struct $name:ident { $($column:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        pub(super) struct $name { $($column: $kind,)* }

        row!(@from PgRow, $name, $($column)*);
        row!(@from SqliteRow, $name, $($column)*);
    };
    (@from $row:ty, $name:ident, $($column:ident)*) => {
        impl sqlx::FromRow<'_, $row> for $name {
            fn from_row(row: &$row) -> sqlx::Result<Self> {
                Ok($name { $($column: row.try_get(stringify!($column))?,)* })
            }
        }
    };
}

row! {
    /// A record as both databases give it.
    struct Row {
        id: Uuid,
        device_id: String,
        upload_id: Option<String>,
        object_key: String,
        size_bytes: i64,
        sha256: String,
        content_type: String,
        filename: Option<String>,
        captured_at_ms: Option<i64>,
        priority: i16,
        metadata: Option<String>,
        traceparent: Option<String>,
        received_at_ms: i64,
        state: String,
        attempt: i32,
        failures: i32,
        reason: Option<String>,
        uploaded_at_ms: Option<i64>,
        removed_at_ms: Option<i64>,
    }
}

impl TryFrom<Row> for Record {
    type Error = Error;
    fn try_from(row: Row) -> Result<Record, Error> {
        let wrong = |what: String| Error::Damaged(format!("the record of upload {}: {what}", UploadId(row.id)));
        let metadata = match &row.metadata {
            Some(json) => serde_json::from_str(json).map_err(|e| wrong(e.to_string()))?,
            None => Default::default(),
        };
        let upload = Upload {
            id: UploadId(row.id),
            device_id: row.device_id.parse().map_err(wrong)?,
            upload_id: row.upload_id,
            object_key: row.object_key,
            size_bytes: row.size_bytes as u64,
            sha256: row.sha256.parse().map_err(wrong)?,
            content_type: row.content_type.parse().map_err(wrong)?,
            filename: row.filename,
            captured_at: row.captured_at_ms.map(UnixMs),
            priority: priority_of(row.priority),
            metadata,
            traceparent: row.traceparent,
            received_at: UnixMs(row.received_at_ms),
        };
        Ok(Record {
            upload: Arc::new(upload),
            state: row.state.parse().map_err(wrong)?,
            attempt: row.attempt,
            failures: row.failures,
            reason: row.reason,
            uploaded_at: row.uploaded_at_ms.map(UnixMs),
            removed_at: row.removed_at_ms.map(UnixMs),
        })
    }
}

row! {
    /// The sums of one state and place of the books, or what an operator said: then there is no `on_disk`.
    struct LookRow {
        what: String,
        on_disk: Option<bool>,
        uploads: Option<i64>,
        bytes: Option<i64>,
        oldest_queued_ms: Option<i64>,
        who: Option<String>,
        amount: Option<String>,
        since_ms: Option<i64>,
        until_ms: Option<i64>,
    }
}

/// What the rows of a look at that moment say.
pub(super) fn look(at: Instant, rows: Vec<LookRow>) -> Look {
    let (books, said): (Vec<LookRow>, Vec<LookRow>) = rows.into_iter().partition(|row| row.on_disk.is_some());
    Look { at, books: books_of(books), control: control_of(said) }
}

fn books_of(rows: Vec<LookRow>) -> Result<Books, Error> {
    let mut books = Books::default();
    for row in rows {
        let tally = Tally { uploads: row.uploads.unwrap_or(0), bytes: row.bytes.unwrap_or(0) };
        books.oldest_queued = row.oldest_queued_ms.map(UnixMs);
        books.add(row.what.parse().map_err(Error::Damaged)?, row.on_disk.unwrap_or(false), tally);
    }
    Ok(books)
}

fn control_of(rows: Vec<LookRow>) -> Result<Control, Error> {
    let mut control = Control::default();
    for row in rows {
        let who = row.who.unwrap_or_default();
        let (since, until) = (UnixMs(row.since_ms.unwrap_or(0)), row.until_ms.map(UnixMs));
        match (row.what.as_str(), row.amount) {
            ("rate", Some(amount)) => {
                let wrong = |wrong| Error::Damaged(format!("the rate that was set: {wrong}"));
                let amount = amount.parse().map_err(wrong)?;
                control.rate = Some(Override { amount, who, since, until });
            }
            ("pause", _) => control.pause = Some(Pause { who, since, until }),
            (kind, _) => return Err(Error::Damaged(format!("operators cannot say {kind}"))),
        }
    }
    Ok(control)
}

/// Priorities are numbers in the database, so that they sort.
pub(super) fn priority_number(priority: Priority) -> i16 {
    match priority {
        Priority::Low => 0,
        Priority::Normal => 1,
        Priority::High => 2,
    }
}

pub(super) fn priority_of(number: i16) -> Priority {
    match number {
        ..=0 => Priority::Low,
        1 => Priority::Normal,
        2.. => Priority::High,
    }
}

/// Metadata as it is kept: JSON, or NULL when there is none.
pub(super) fn metadata_json(upload: &Upload) -> Option<String> {
    (!upload.metadata.is_empty()).then(|| serde_json::to_string(&upload.metadata).unwrap_or_default())
}

macro_rules! columns {
    () => {
        "id, device_id, upload_id, object_key, size_bytes, sha256, content_type, filename, captured_at_ms, priority, \
         metadata, traceparent, received_at_ms, state, attempt, failures, reason, uploaded_at_ms, removed_at_ms"
    };
}
pub(super) use columns;

/// Gives `$backend`, which has `read` and `write` to send statements to, the methods that need no dialect beyond `$now`, the
/// present in milliseconds as SQL, and `$skip_locked`, what makes a claim pass over rows that another claim holds.
macro_rules! shared_statements {
    ($backend:ident, now = $now:literal, skip_locked = $skip_locked:literal) => {
        impl $backend {
            pub(super) async fn get(&self, id: UploadId) -> sqlx::Result<Option<Row>> {
                sqlx::query_as(concat!("SELECT ", columns!(), " FROM uploads WHERE id = $1"))
                    .bind(id.0)
                    .fetch_optional(&self.read)
                    .await
            }

            pub(super) async fn list(&self, filter: &Filter, after: Cursor, limit: u32) -> sqlx::Result<Vec<Row>> {
                // one text for each filter, so that each has its own plan and its own index
                macro_rules! page {
                    ($condition:literal) => {
                        sqlx::query_as(concat!(
                            "SELECT ",
                            columns!(),
                            " FROM uploads WHERE (received_at_ms, id) < ($1, $2) ",
                            $condition,
                            " ORDER BY received_at_ms DESC, id DESC LIMIT $3"
                        ))
                        .bind(after.received_at.0)
                        .bind(after.id.0)
                        .bind(i64::from(limit))
                    };
                }
                let page = match (&filter.device_id, filter.state) {
                    (None, None) => page!(""),
                    (Some(device), None) => page!("AND device_id = $4").bind(device.as_str()),
                    (None, Some(state)) => page!("AND state = $4").bind(state.as_str()),
                    (Some(device), Some(state)) => {
                        page!("AND device_id = $4 AND state = $5").bind(device.as_str()).bind(state.as_str())
                    }
                };
                page.fetch_all(&self.read).await
            }

            pub(super) async fn lead(&self, owner: &str, lease: Duration) -> sqlx::Result<bool> {
                sqlx::query_scalar(concat!(
                    "INSERT INTO leader (role, owner, until_ms) VALUES ('drain', $1, ",
                    $now,
                    " + $2)
                     ON CONFLICT (role) DO UPDATE SET until_ms = excluded.until_ms, owner = CASE
                         WHEN leader.until_ms > ",
                    $now,
                    // nobody was given it for so long: the clock went back. It begins anew, for whoever had it
                    " + 2 * $2 THEN leader.owner ELSE excluded.owner END
                     WHERE leader.owner = excluded.owner OR leader.until_ms < ",
                    $now,
                    " OR leader.until_ms > ",
                    $now,
                    " + 2 * $2
                     RETURNING owner"
                ))
                .bind(owner)
                .bind(lease.as_millis() as i64)
                // to its end, which is when SQLite commits
                .fetch_all(&self.write)
                .await
                .map(|leader: Vec<String>| leader.iter().any(|leader| leader == owner))
            }

            pub(super) async fn resign(&self, owner: &str) -> sqlx::Result<()> {
                sqlx::query("DELETE FROM leader WHERE owner = $1").bind(owner).execute(&self.write).await.map(drop)
            }

            pub(super) async fn revive(&self, upload: &Upload) -> sqlx::Result<bool> {
                sqlx::query(
                    "UPDATE uploads SET state = 'queued', failures = 0, not_before_ms = 0, reason = NULL
                     WHERE id = $1 AND sha256 = $2 AND state = 'dead'",
                )
                .bind(upload.id.0)
                .bind(upload.sha256.to_string())
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected() == 1)
            }

            pub(super) async fn renew(&self, held: &Lease, lease: Duration) -> sqlx::Result<bool> {
                sqlx::query(concat!(
                    "UPDATE uploads SET lease_until_ms = ",
                    $now,
                    " + $3
                     WHERE id = $1 AND attempt = $2 AND state = 'uploading'"
                ))
                .bind(held.upload.id.0)
                .bind(held.attempt)
                .bind(lease.as_millis() as i64)
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected() == 1)
            }

            pub(super) async fn release(&self, held: &Lease, rest: Duration) -> sqlx::Result<bool> {
                sqlx::query(concat!(
                    "UPDATE uploads SET state = 'queued', lease_owner = NULL, lease_until_ms = NULL,
                         not_before_ms = CASE $3 WHEN 0 THEN 0 ELSE ",
                    $now,
                    " + $3 END
                     WHERE id = $1 AND attempt = $2 AND state = 'uploading'"
                ))
                .bind(held.upload.id.0)
                .bind(held.attempt)
                .bind(rest.as_millis() as i64)
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected() == 1)
            }

            pub(super) async fn charge(
                &self,
                held: &Lease,
                reason: &str,
                rest: Option<Duration>,
            ) -> sqlx::Result<bool> {
                sqlx::query(concat!(
                    "UPDATE uploads SET state = $3, failures = failures + 1, reason = $4,
                         not_before_ms = ",
                    $now,
                    " + $5, lease_owner = NULL, lease_until_ms = NULL
                     WHERE id = $1 AND attempt = $2 AND state = 'uploading'"
                ))
                .bind(held.upload.id.0)
                .bind(held.attempt)
                .bind(if rest.is_some() { State::Queued } else { State::Dead }.as_str())
                .bind(reason)
                .bind(rest.unwrap_or_default().as_millis() as i64)
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected() == 1)
            }

            pub(super) async fn reap(&self, lease_max: Duration) -> sqlx::Result<u64> {
                sqlx::query(concat!(
                    "UPDATE uploads SET state = 'queued', lease_owner = NULL, lease_until_ms = NULL
                     WHERE id IN (SELECT id FROM uploads WHERE state = 'uploading' AND (lease_until_ms < ",
                    $now,
                    " OR lease_until_ms > ",
                    $now,
                    // what is being finished in this moment is not waited for, each for the other
                    " + $1) ",
                    $skip_locked,
                    ")"
                ))
                .bind(lease_max.as_millis() as i64)
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected())
            }

            pub(super) async fn removable(&self, retain: Duration, limit: u32) -> sqlx::Result<Vec<Row>> {
                sqlx::query_as(concat!(
                    "SELECT ",
                    columns!(),
                    " FROM uploads
                     WHERE state = 'uploaded' AND removed_at_ms IS NULL AND uploaded_at_ms <= ",
                    $now,
                    " - $1
                     ORDER BY uploaded_at_ms LIMIT +$2"
                ))
                .bind(retain.as_millis() as i64)
                .bind(i64::from(limit))
                .fetch_all(&self.read)
                .await
            }

            pub(super) async fn purge(&self, retain: Duration, limit: u32) -> sqlx::Result<u64> {
                sqlx::query(concat!(
                    "DELETE FROM uploads WHERE id IN (
                         SELECT id FROM uploads
                         WHERE state = 'uploaded' AND received_at_ms <= ",
                    $now,
                    " - $1
                             AND removed_at_ms <= ",
                    $now,
                    " - $1 AND uploaded_at_ms <= ",
                    $now,
                    " - $1
                         ORDER BY received_at_ms LIMIT $2
                     )"
                ))
                .bind(retain.as_millis() as i64)
                .bind(i64::from(limit))
                .execute(&self.write)
                .await
                .map(|done| done.rows_affected())
            }

            pub(super) async fn set_control(
                &self,
                kind: &str,
                amount: Option<String>,
                who: &str,
                end: End,
            ) -> sqlx::Result<()> {
                let (at, after) = match end {
                    End::Never => (None, None),
                    End::At(at) => (Some(at.0), None),
                    End::After(span) => (None, Some(span.as_millis() as i64)),
                };
                sqlx::query(concat!(
                    // the clock is read once, so that a span is exact
                    "INSERT INTO control (kind, amount, who, since_ms, until_ms)
                     SELECT $1, $2, $3, clock.at_ms, COALESCE($4, clock.at_ms + $5) FROM (SELECT ",
                    $now,
                    " AS at_ms) AS clock WHERE true
                     ON CONFLICT (kind) DO UPDATE SET amount = excluded.amount, who = excluded.who,
                         since_ms = excluded.since_ms, until_ms = excluded.until_ms"
                ))
                .bind(kind)
                .bind(amount)
                .bind(who)
                .bind(at)
                .bind(after)
                .execute(&self.write)
                .await
                .map(drop)
            }

            pub(super) async fn clear_control(&self, kind: &str) -> sqlx::Result<()> {
                sqlx::query("DELETE FROM control WHERE kind = $1").bind(kind).execute(&self.write).await.map(drop)
            }

            pub(super) async fn look(&self) -> sqlx::Result<Vec<LookRow>> {
                sqlx::query_as(concat!(
                    "SELECT state AS what, on_disk, CAST(sum(uploads) AS bigint) AS uploads,
                         CAST(sum(bytes) AS bigint) AS bytes,
                         (SELECT min(received_at_ms) FROM uploads WHERE state = 'queued') AS oldest_queued_ms,
                         NULL AS who, NULL AS amount, NULL AS since_ms, NULL AS until_ms
                     FROM books GROUP BY state, on_disk
                     UNION ALL
                     SELECT kind, NULL, NULL, NULL, NULL, who, amount, since_ms, until_ms
                     FROM control WHERE until_ms IS NULL OR until_ms > ",
                    $now
                ))
                .fetch_all(&self.read)
                .await
            }

            pub(super) async fn count(&self) -> sqlx::Result<Vec<(String, bool, i64, i64)>> {
                sqlx::query_as(
                    "SELECT state, removed_at_ms IS NULL, count(*), CAST(sum(size_bytes) AS bigint)
                     FROM uploads GROUP BY 1, 2",
                )
                .fetch_all(&self.read)
                .await
            }
        }
    };
}
pub(super) use shared_statements;

#[cfg(test)]
mod tests {
    use super::*;

    fn row(what: &str, on_disk: Option<bool>) -> LookRow {
        LookRow {
            what: what.to_owned(),
            on_disk,
            uploads: on_disk.and(Some(3)),
            bytes: on_disk.and(Some(3_000)),
            oldest_queued_ms: None,
            who: Some("anna".to_owned()),
            amount: None,
            since_ms: Some(1),
            until_ms: None,
        }
    }

    #[test]
    fn what_cannot_be_read_of_one_part_of_a_look_leaves_the_other() {
        let now = Instant::now();
        let odd_word = look(now, vec![row("queued", Some(true)), row("faster", None)]);
        assert_eq!(odd_word.books.unwrap().queued, Tally { uploads: 3, bytes: 3_000 });
        assert!(odd_word.control.is_err());
        let odd_state = look(now, vec![row("half sent", Some(true)), row("pause", None)]);
        assert_eq!(odd_state.control.unwrap().pause.unwrap().who, "anna");
        assert!(odd_state.books.is_err());
    }
}
