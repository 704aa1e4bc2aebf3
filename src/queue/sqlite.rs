//! The queue in SQLite, in the data dir: for the single box.
//!
//! Always: write-ahead log with `synchronous=FULL`, since NORMAL can lose a commit that was acknowledged; one writing
//! connection, so that writers wait in order instead of finding the database locked. Never: on a network file system.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use uuid::Uuid;

use super::claims::{by_turn, claims, lease_next, newest_of_class};
use super::connections::Connections;
use super::migrations;
use super::sheds::sheds;
use super::statements::{Row, Said, columns, metadata_json, priority_number, shared_statements};
use super::{Cursor, Filter, Lease, Pick};
use crate::allowance::End;
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::upload::{State, Upload, UploadId};

/// Connections that read at once: SQLite's readers wait for nobody.
const READERS_MAX: u32 = 4;

#[derive(Clone)]
pub(super) struct Sqlite {
    read: Connections<sqlx::Sqlite>,
    write: SqlitePool,
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
        // what is in this very process is trusted for ever
        let read = Connections::new(read, READERS_MAX, Duration::MAX);
        Ok(Sqlite { read, write: pool(1).connect_lazy_with(options) })
    }

    pub(super) async fn migrate(&self) -> std::result::Result<i64, sqlx::migrate::MigrateError> {
        let migrator = migrations::sqlite();
        migrator.run(&self.write).await?;
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
        let mut transaction = self.write.begin_with("BEGIN IMMEDIATE").await?;
        for upload in uploads {
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
            .execute(&mut *transaction)
            .await?;
            if done.rows_affected() == 1 {
                new.push(upload.id);
            }
        }
        crash_points::pass(Point::QueueCommit).await?;
        transaction.commit().await?;
        crash_points::pass(Point::QueueCommitted).await?;
        Ok(new)
    }

    /// Says of those that still hold their lease that they are uploaded, in one transaction; their ids and attempts. One
    /// that was reaped but not claimed again is finished all the same: no other attempt has begun.
    pub(super) async fn finish(&self, held: &[&Lease]) -> sqlx::Result<Vec<(Uuid, i32)>> {
        let mut finished = Vec::with_capacity(held.len());
        let mut transaction = self.write.begin_with("BEGIN IMMEDIATE").await?;
        for lease in held {
            let done = sqlx::query(
                "UPDATE uploads SET state = 'uploaded', reason = NULL, lease_owner = NULL, lease_until_ms = NULL,
                     uploaded_at_ms = CAST(unixepoch('subsec') * 1000 AS INTEGER)
                 WHERE id = $1 AND attempt = $2 AND state IN ('uploading', 'queued')",
            )
            .bind(lease.upload.id.0)
            .bind(lease.attempt)
            .execute(&mut *transaction)
            .await?;
            if done.rows_affected() == 1 {
                finished.push((lease.upload.id.0, lease.attempt));
            }
        }
        transaction.commit().await?;
        Ok(finished)
    }

    pub(super) async fn removed(&self, ids: &[UploadId]) -> sqlx::Result<()> {
        let mut transaction = self.write.begin_with("BEGIN IMMEDIATE").await?;
        for id in ids {
            sqlx::query(
                "UPDATE uploads SET removed_at_ms = CAST(unixepoch('subsec') * 1000 AS INTEGER)
                 WHERE id = $1 AND removed_at_ms IS NULL",
            )
            .bind(id.0)
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await
    }

    /// Sheds those of `ids` that are still queued, in one transaction; which they were.
    pub(super) async fn shed(&self, ids: &[Uuid], reason: &str) -> sqlx::Result<Vec<Row>> {
        let mut shed = Vec::with_capacity(ids.len());
        let mut transaction = self.write.begin_with("BEGIN IMMEDIATE").await?;
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
        transaction.commit().await?;
        Ok(shed)
    }
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
