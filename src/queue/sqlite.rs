//! The queue in SQLite, in the data dir: for the single box.
//!
//! Always: write-ahead log with `synchronous=FULL`, since NORMAL can lose a commit that was acknowledged; one writing
//! connection, so that writers wait in order instead of finding the database locked. Never: on a network file system.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use uuid::Uuid;

use super::claims::{by_turn, claims, lease_next, newest_of_class};
use super::connections::Connections;
use super::migrations;
use super::sheds::sheds;
use super::statements::{LookRow, Row, columns, metadata_json, priority_number, shared_statements};
use super::{Cursor, Filter, Lease, Pick};
use crate::allowance::End;
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::upload::{State, Upload, UploadId};

/// Connections that read at once: SQLite's readers wait for nobody.
const READERS_MAX: u32 = 4;

/// Of leases as pairs of id and attempt; `+` as by itself SQLite would look at all that waits, by its state.
const FINISH: &str = "UPDATE uploads SET state = 'uploaded', reason = NULL, lease_owner = NULL, lease_until_ms = NULL,
         uploaded_at_ms = CAST(unixepoch('subsec') * 1000 AS INTEGER)
     FROM (SELECT unhex(value ->> 0, '-') AS id, value ->> 1 AS attempt FROM json_each($1)) AS held
     WHERE uploads.id = held.id AND uploads.attempt = held.attempt AND +state IN ('uploading', 'queued')";
/// Of such pairs, those that are.
const FINISHED: &str = "SELECT uploads.id, uploads.attempt
     FROM (SELECT unhex(value ->> 0, '-') AS id, value ->> 1 AS attempt FROM json_each($1)) AS held
         JOIN uploads ON uploads.id = held.id AND uploads.attempt = held.attempt AND +state = 'uploaded'";
/// Of ids.
const REMOVED: &str = "UPDATE uploads SET removed_at_ms = CAST(unixepoch('subsec') * 1000 AS INTEGER)
     WHERE id IN (SELECT unhex(value, '-') FROM json_each($1)) AND removed_at_ms IS NULL";

#[derive(Clone)]
pub(super) struct Sqlite {
    read: Connections<sqlx::Sqlite>,
    write: Connections<sqlx::Sqlite>,
}

impl Sqlite {
    pub(super) fn open(path: &Path) -> Result<Sqlite> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|e| Error::unavailable(format_args!("cannot make {}", folder.display()), e))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            // another process, such as `forebay list`, may hold the file for a moment
            .busy_timeout(Duration::from_secs(5))
            .foreign_keys(false)
            .pragma("journal_size_limit", "67108864")
            // the log comes back to its start after a megabyte, so that a full disk needs little to be drained
            .pragma("wal_autocheckpoint", "256");
        let pool = |connections| {
            SqlitePoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(Duration::from_secs(10))
                // it is in this very process
                .test_before_acquire(false)
                // a disk that is full ends SQLite's transaction by itself; sqlx then believes in it for ever, and would begin
                // no other one on this connection
                .after_release(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
        };
        let read = pool(READERS_MAX).connect_lazy_with(options.clone());
        let write = pool(1).connect_lazy_with(options);
        // what is in this very process is trusted for ever
        Ok(Sqlite {
            read: Connections::new(read, READERS_MAX, Duration::MAX),
            write: Connections::new(write, 1, Duration::MAX),
        })
    }

    pub(super) async fn migrate(&self) -> std::result::Result<i64, sqlx::migrate::MigrateError> {
        let migrator = migrations::sqlite();
        self.write.with(async |connection| Ok(migrator.run_direct(None, connection, false).await)).await??;
        Ok(migrator.iter().map(|m| m.version).max().unwrap_or(0))
    }

    /// Closes its connections in order.
    pub(super) async fn close(&self) {
        self.write.close().await;
        self.read.close().await;
    }

    /// Inserts all that are not there yet, in one transaction; the ids of the new ones.
    pub(super) async fn insert(&self, uploads: &[Arc<Upload>]) -> sqlx::Result<Vec<UploadId>> {
        let mut new = Vec::with_capacity(uploads.len());
        let insert = async |upload: &Upload, connection: &mut SqliteConnection| {
            let done = sqlx::query(
                "INSERT INTO uploads (id, device_id, upload_id, object_key, size_bytes, sha256, content_type, filename,
                     captured_at_ms, priority, metadata, traceparent, received_at_ms)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT (id) DO NOTHING",
            )
            .bind(upload.id.0)
            .bind(upload.device_id.as_str())
            .bind(upload.upload_id.as_deref())
            .bind(&upload.object_key)
            .bind(upload.size_bytes as i64)
            .bind(upload.sha256.to_string())
            .bind(upload.content_type.as_str())
            .bind(upload.filename.as_deref())
            .bind(upload.captured_at.map(|t| t.0))
            .bind(priority_number(upload.priority))
            .bind(metadata_json(upload))
            .bind(upload.traceparent.as_deref())
            .bind(upload.received_at.0)
            .execute(connection)
            .await?;
            Ok::<_, sqlx::Error>(done.rows_affected() == 1)
        };
        self.write
            .with(async |connection| {
                // one by itself is a transaction by itself
                if let [upload] = uploads {
                    crash_points::pass(Point::QueueCommit).await?;
                    if insert(upload, connection).await? {
                        new.push(upload.id);
                    }
                    return Ok(());
                }
                let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
                for upload in uploads {
                    if insert(upload, &mut transaction).await? {
                        new.push(upload.id);
                    }
                }
                crash_points::pass(Point::QueueCommit).await?;
                transaction.commit().await
            })
            .await?;
        crash_points::pass(Point::QueueCommitted).await?;
        Ok(new)
    }

    /// Says of those that still hold their lease that they are uploaded, in one statement and so in one commit; the ids and
    /// attempts of those that are, by this or by an earlier call. One that was reaped but not claimed again is finished all the
    /// same: no other attempt has begun.
    pub(super) async fn finish(&self, held: &[&Lease]) -> sqlx::Result<Vec<(Uuid, i32)>> {
        let leases: Vec<(Uuid, i32)> = held.iter().map(|lease| (lease.upload.id.0, lease.attempt)).collect();
        // how many tells of all of them as a rule; rows that come back would each wake whoever waits
        let done = sqlx::query(FINISH).bind(json(&leases)).execute(&self.write).await?;
        if done.rows_affected() == leases.len() as u64 {
            return Ok(leases);
        }
        sqlx::query_as(FINISHED).bind(json(&leases)).fetch_all(&self.write).await
    }

    pub(super) async fn removed(&self, ids: &[UploadId]) -> sqlx::Result<()> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        sqlx::query(REMOVED).bind(json(&ids)).execute(&self.write).await.map(drop)
    }

    /// Sheds those of `ids` that are still queued, in one transaction; which they were.
    pub(super) async fn shed(&self, ids: &[Uuid], reason: &str) -> sqlx::Result<Vec<Row>> {
        let mut shed = Vec::with_capacity(ids.len());
        self.write
            .with(async |connection| {
                let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
                for id in ids {
                    let row = sqlx::query_as(concat!(
                        "UPDATE uploads SET state = 'shed', reason = $2 WHERE id = $1 AND state = 'queued' RETURNING ",
                        columns!()
                    ))
                    .bind(id)
                    .bind(reason)
                    .fetch_optional(&mut *transaction)
                    .await?;
                    shed.extend(row);
                }
                transaction.commit().await
            })
            .await?;
        Ok(shed)
    }
}

/// Several values as the one that a statement takes: one by one, each would be a call of SQLite's thread.
fn json(values: &impl Serialize) -> String {
    serde_json::to_string(values).unwrap_or_default()
}

shared_statements!(Sqlite, now = "CAST(unixepoch('subsec') * 1000 AS INTEGER)", skip_locked = "");

// without LATERAL; `u` is looked up by the ids that the inner select gives for each line
claims!(
    Sqlite,
    now = "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
    skip_locked = "",
    // by itself it would take an index by state, and sort all that waits
    by_age = "INDEXED BY uploads_claim",
    hold = "SELECT id FROM chosen",
    newest_of_line = "uploads AS u ON u.id IN (
        SELECT v.id FROM uploads AS v INDEXED BY uploads_line
        WHERE v.state = 'queued' AND v.device_id = a.device_id AND v.priority = a.priority
            AND v.not_before_ms <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
        ORDER BY v.received_at_ms DESC, v.id DESC LIMIT +$1
    )",
    oldest_of_line = "uploads AS u ON u.id IN (
        SELECT v.id FROM uploads AS v INDEXED BY uploads_line
        WHERE v.state = 'queued' AND v.device_id = a.device_id AND v.priority = a.priority
            AND v.not_before_ms <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
        ORDER BY v.received_at_ms, v.id LIMIT +$1
    )"
);

sheds!(
    Sqlite,
    now = "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
    by_age = "INDEXED BY uploads_claim",
    by_line = "INDEXED BY uploads_line"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_compiled_as_the_repository_says() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Sqlite::open(&folder.path().join("queue.sqlite")).unwrap();
        let options: Vec<(String,)> = sqlx::query_as("PRAGMA compile_options").fetch_all(&queue.read).await.unwrap();
        let is = |name: &str| options.iter().any(|(option,)| option == name);
        // see .cargo/config.toml, which a LIBSQLITE3_FLAGS of the environment takes the place of
        assert!(is("DEFAULT_MEMSTATUS=0") && !is("ENABLE_MEMORY_MANAGEMENT") && !is("ENABLE_API_ARMOR"), "{options:?}");
    }

    #[tokio::test]
    async fn what_is_told_or_asked_of_several_looks_at_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Sqlite::open(&folder.path().join("queue.sqlite")).unwrap();
        queue.migrate().await.unwrap();
        for statement in [FINISH, FINISHED, REMOVED] {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let plan: Vec<(i64, i64, i64, String)> = sqlx::query_as(explain).fetch_all(&queue.read).await.unwrap();
            let of_uploads: Vec<&str> =
                plan.iter().map(|(.., step)| step.as_str()).filter(|step| step.contains("uploads")).collect();
            assert_eq!(of_uploads, ["SEARCH uploads USING INDEX sqlite_autoindex_uploads_1 (id=?)"]);
        }
    }
}
