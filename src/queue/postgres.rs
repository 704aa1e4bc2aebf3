//! The queue in Postgres: for ingest replicas and drains in processes or machines of their own.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Connection as _;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
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

/// Connections for statements that read, and for those that write, which no reader holds up. Group commit keeps ingest to one
/// or two at a time.
const READING_MAX: u32 = 4;
const WRITING_MAX: u32 = 6;
/// Connections of one process: a migration finds one, whoever has the others.
const CONNECTIONS_MAX: u32 = READING_MAX + WRITING_MAX + 1;
/// A queue that is away must be noticed while the device still waits for its answer.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that was idle for no longer is used without asking whether it is still there.
const TRUSTED_FOR: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) struct Postgres {
    read: Connections<sqlx::Postgres>,
    write: Connections<sqlx::Postgres>,
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
        Ok(Postgres {
            read: Connections::new(pool.clone(), READING_MAX, TRUSTED_FOR),
            write: Connections::new(pool, WRITING_MAX, TRUSTED_FOR),
        })
    }

    pub(super) async fn migrate(&self) -> std::result::Result<i64, sqlx::migrate::MigrateError> {
        let migrator = migrations::postgres();
        // where a step fails, the migrator keeps its lock for as long as the connection is there, and others wait for it
        let mut connection = self.write.pool().acquire().await?;
        connection.close_on_drop();
        // what `run` does with a connection that it acquires; of a borrowed one the compiler takes no `Acquire` in a task
        migrator.run_direct(None, &mut *connection, false).await?;
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
        .fetch_all(&self.write)
        .await?;
        crash_points::pass(Point::QueueCommitted).await?;
        Ok(ids.into_iter().map(|(id,)| UploadId(id)).collect())
    }

    /// Closes its connections in order.
    pub(super) async fn close(&self) {
        // each for what it keeps of their pool
        tokio::join!(self.read.close(), self.write.close());
    }

    /// Says of those that still hold their lease that they are uploaded, in one statement and so in one commit; their ids and
    /// attempts. One that was reaped but not claimed again is finished all the same: no other attempt has begun.
    pub(super) async fn finish(&self, held: &[&Lease]) -> sqlx::Result<Vec<(Uuid, i32)>> {
        sqlx::query_as(
            "UPDATE uploads AS u SET state = 'uploaded', reason = NULL, lease_owner = NULL, lease_until_ms = NULL,
                 uploaded_at_ms = CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)
             FROM unnest($1::uuid[], $2::int[]) AS held (id, attempt)
             WHERE u.id = held.id AND u.attempt = held.attempt AND u.state IN ('uploading', 'queued')
             RETURNING u.id, u.attempt",
        )
        .bind(held.iter().map(|lease| lease.upload.id.0).collect::<Vec<_>>())
        .bind(held.iter().map(|lease| lease.attempt).collect::<Vec<_>>())
        .fetch_all(&self.write)
        .await
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
