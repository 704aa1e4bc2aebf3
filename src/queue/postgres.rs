//! The queue in Postgres: for ingest replicas and drains in processes or machines of their own.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sqlx::Connection as _;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use uuid::Uuid;

use super::claims::{by_turn, claims, lease_next, newest_of_class};
use super::migrations;
use super::sheds::sheds;
use super::statements::{Row, Said, columns, metadata_json, priority_number, shared_statements};
use super::{Cursor, Filter, Lease, Pick};
use crate::allowance::End;
use crate::crash_points::{self, Point};
use crate::error::{Error, Result};
use crate::upload::{State, Upload, UploadId};

/// Connections of one process. Group commit keeps ingest to one or two at a time.
const CONNECTIONS_MAX: u32 = 8;
/// A queue that is away must be noticed while the device still waits for its answer.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection that was idle for no longer is used without asking whether it is still there.
const TRUSTED_FOR: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) struct Postgres {
    read: PgPool,
    write: PgPool,
    /// Given back to the pool after each commit, it would be asked each time whether it is still there, which is a round trip
    /// more.
    kept: Arc<Mutex<Option<Kept>>>,
}

/// The connection that committed last.
struct Kept {
    connection: PoolConnection<sqlx::Postgres>,
    /// When that was.
    at: Instant,
}

impl Postgres {
    pub(super) fn open(url: &str) -> Result<Postgres> {
        let options: PgConnectOptions = url
            .parse()
            // the error's text could repeat the URL, and with it the password
            .map_err(|_| Error::Unavailable("FOREBAY_QUEUE_URL is not a valid Postgres URL".to_owned()))?;
        let options = options.application_name("forebay").options([
            ("statement_timeout", "30s"),
            ("idle_in_transaction_session_timeout", "10s"),
            ("synchronous_commit", "on"),
        ]);
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS_MAX)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // one that was just used is as good as asked whether it is there
            .test_before_acquire(false)
            .before_acquire(|connection, idle| {
                Box::pin(async move {
                    if idle.idle_for > TRUSTED_FOR {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(options);
        Ok(Postgres { read: pool.clone(), write: pool, kept: Arc::default() })
    }

    pub(super) async fn migrate(&self) -> std::result::Result<i64, sqlx::migrate::MigrateError> {
        let migrator = migrations::postgres();
        migrator.run(&self.write).await?;
        Ok(migrator.iter().map(|m| m.version).max().unwrap_or(0))
    }

    /// Inserts all that are not there yet, in one statement and so in one commit; the ids of the new ones.
    pub(super) async fn insert(&self, uploads: &[Arc<Upload>]) -> sqlx::Result<Vec<UploadId>> {
        macro_rules! column {
            ($of:expr) => {
                uploads.iter().map($of).collect::<Vec<_>>()
            };
        }
        crash_points::pass(Point::QueueCommit).await?;
        let mut connection = self.to_write().await?;
        let ids: Vec<(Uuid,)> = sqlx::query_as(
            "INSERT INTO uploads (id, device_id, upload_id, object_key, size_bytes, sha256, content_type, filename,
                 captured_at_ms, priority, metadata, traceparent, received_at_ms)
             SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[],
                 $8::text[], $9::bigint[], $10::smallint[], $11::text[], $12::text[], $13::bigint[])
             ON CONFLICT (id) DO NOTHING RETURNING id",
        )
        .bind(column!(|u| u.id.0))
        .bind(column!(|u| u.device_id.as_str()))
        .bind(column!(|u| u.upload_id.as_deref()))
        .bind(column!(|u| u.object_key.as_str()))
        .bind(column!(|u| u.size_bytes as i64))
        .bind(column!(|u| u.sha256.to_string()))
        .bind(column!(|u| u.content_type.as_str()))
        .bind(column!(|u| u.filename.as_deref()))
        .bind(column!(|u| u.captured_at.map(|t| t.0)))
        .bind(column!(|u| priority_number(u.priority)))
        .bind(column!(|u| metadata_json(u)))
        .bind(column!(|u| u.traceparent.as_deref()))
        .bind(column!(|u| u.received_at.0))
        .fetch_all(&mut *connection)
        .await?;
        self.keep(connection);
        crash_points::pass(Point::QueueCommitted).await?;
        Ok(ids.into_iter().map(|(id,)| UploadId(id)).collect())
    }

    /// The connection that committed last, if it is still there; a statement that fails or is cut short leaves it to the pool.
    async fn to_write(&self) -> sqlx::Result<PoolConnection<sqlx::Postgres>> {
        let last = self.kept().take();
        if let Some(Kept { mut connection, at }) = last
            && (at.elapsed() <= TRUSTED_FOR || connection.ping().await.is_ok())
        {
            return Ok(connection);
        }
        self.write.acquire().await
    }

    /// Keeps the connection for the next that commits, unless the pool waits for it in order to close.
    fn keep(&self, connection: PoolConnection<sqlx::Postgres>) {
        let mut kept = self.kept();
        if !self.write.is_closed() {
            *kept = Some(Kept { connection, at: Instant::now() });
        }
    }

    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Closes its connections in order.
    pub(super) async fn close(&self) {
        // from here on none is kept any more
        let closed = self.write.close();
        drop(self.kept().take());
        closed.await;
    }

    /// Says of those that still hold their lease that they are uploaded, in one statement and so in one commit; their ids and
    /// attempts. One that was reaped but not claimed again is finished all the same: no other attempt has begun.
    pub(super) async fn finish(&self, held: &[&Lease]) -> sqlx::Result<Vec<(Uuid, i32)>> {
        let mut connection = self.to_write().await?;
        let finished = sqlx::query_as(
            "UPDATE uploads AS u SET state = 'uploaded', reason = NULL, lease_owner = NULL, lease_until_ms = NULL,
                 uploaded_at_ms = CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)
             FROM unnest($1::uuid[], $2::int[]) AS held (id, attempt)
             WHERE u.id = held.id AND u.attempt = held.attempt AND u.state IN ('uploading', 'queued')
             RETURNING u.id, u.attempt",
        )
        .bind(held.iter().map(|lease| lease.upload.id.0).collect::<Vec<_>>())
        .bind(held.iter().map(|lease| lease.attempt).collect::<Vec<_>>())
        .fetch_all(&mut *connection)
        .await?;
        self.keep(connection);
        Ok(finished)
    }

    pub(super) async fn removed(&self, ids: &[UploadId]) -> sqlx::Result<()> {
        sqlx::query(
            "UPDATE uploads SET removed_at_ms = CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)
             WHERE id = ANY($1) AND removed_at_ms IS NULL",
        )
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .execute(&self.write)
        .await
        .map(drop)
    }

    /// Sheds those of `ids` that are still queued, in one statement and so in one commit; which they were.
    pub(super) async fn shed(&self, ids: &[Uuid], reason: &str) -> sqlx::Result<Vec<Row>> {
        sqlx::query_as(concat!(
            "UPDATE uploads SET state = 'shed', reason = $2 WHERE id = ANY($1) AND state = 'queued' RETURNING ",
            columns!()
        ))
        .bind(ids)
        .bind(reason)
        .fetch_all(&self.write)
        .await
    }
}

shared_statements!(
    Postgres,
    now = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)",
    skip_locked = "FOR UPDATE SKIP LOCKED"
);

claims!(
    Postgres,
    now = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)",
    skip_locked = "FOR UPDATE SKIP LOCKED",
    by_age = "",
    // what another claim took meanwhile is queued no more
    hold = "SELECT id FROM uploads WHERE state = 'queued' AND id IN (SELECT id FROM chosen) FOR UPDATE SKIP LOCKED",
    newest_of_line = "LATERAL (
        SELECT id, size_bytes, received_at_ms FROM uploads
        WHERE state = 'queued' AND device_id = a.device_id AND priority = a.priority
            AND not_before_ms <= CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)
        ORDER BY received_at_ms DESC, id DESC LIMIT +$1
    ) AS u",
    oldest_of_line = "LATERAL (
        SELECT id, size_bytes, received_at_ms FROM uploads
        WHERE state = 'queued' AND device_id = a.device_id AND priority = a.priority
            AND not_before_ms <= CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)
        ORDER BY received_at_ms, id LIMIT +$1
    ) AS u"
);

sheds!(Postgres, now = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)", by_age = "", by_line = "");
