//! Connections to the queue's database, kept between statements.
//!
//! sqlx's pool asks a connection that is given back to it whether it is still there: a round trip more for each statement,
//! to Postgres or to SQLite's thread. Always: a connection that has just answered is lent again as it is, and one that was
//! idle for longer is asked first. Never: kept after a statement that failed or was cut short; that one the pool asks, or
//! closes. No transactions: those take a connection of the pool's.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use sqlx::pool::PoolConnection;
use sqlx::{Connection, Database, Either, Execute, Executor, Pool, SqlStr};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// A connection that was idle for no longer is used without asking whether it is still there.
pub(super) const TRUSTED_FOR: Duration = Duration::from_secs(1);

/// The connections of one pool. Cheap to clone.
pub(super) struct Connections<DB: Database> {
    inner: Arc<Inner<DB>>,
}

struct Inner<DB: Database> {
    pool: Pool<DB>,
    /// One for each that may be lent: whoever waits for the pool would not hear of one that was kept.
    lendable: Semaphore,
    /// The one used last is at the end.
    kept: Mutex<Vec<Kept<DB>>>,
}

struct Kept<DB: Database> {
    connection: PoolConnection<DB>,
    /// When it answered last.
    at: Instant,
}

impl<DB: Database> Connections<DB> {
    /// Up to `lent_max` of the pool's at once; transactions need what the pool has beyond that.
    pub(super) fn new(pool: Pool<DB>, lent_max: u32) -> Connections<DB> {
        let (lendable, kept) = (Semaphore::new(lent_max as usize), Mutex::default());
        Connections { inner: Arc::new(Inner { pool, lendable, kept }) }
    }

    pub(super) fn pool(&self) -> &Pool<DB> {
        &self.inner.pool
    }

    /// Closes them in order.
    pub(super) async fn close(&self) {
        // from here on none is kept any more
        let closed = self.inner.pool.close();
        let kept = std::mem::take(&mut *self.kept());
        drop(kept);
        closed.await;
    }

    async fn lend(&self) -> sqlx::Result<(PoolConnection<DB>, SemaphorePermit<'_>)> {
        let longest = self.inner.pool.options().get_acquire_timeout();
        let lent = timeout(longest, self.inner.lendable.acquire()).await.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let lent = lent.map_err(|_| sqlx::Error::PoolClosed)?;
        loop {
            // the lock is not held while it is asked
            let last = self.kept().pop();
            let Some(Kept { mut connection, at }) = last else { return Ok((self.inner.pool.acquire().await?, lent)) };
            if at.elapsed() <= TRUSTED_FOR || connection.ping().await.is_ok() {
                return Ok((connection, lent));
            }
        }
    }

    /// Keeps one that has just answered, unless the pool waits for it in order to close.
    fn keep(&self, connection: PoolConnection<DB>, lent: SemaphorePermit<'_>) {
        let mut kept = self.kept();
        if !self.inner.pool.is_closed() {
            kept.push(Kept { connection, at: Instant::now() });
        }
        drop(kept);
        drop(lent);
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept<DB>>> {
        self.inner.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<DB: Database> Clone for Connections<DB> {
    fn clone(&self) -> Self {
        Connections { inner: self.inner.clone() }
    }
}

impl<DB: Database> fmt::Debug for Connections<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").field("pool", &self.inner.pool).finish_non_exhaustive()
    }
}

/// Each statement goes over whichever connection is to be had, and has the whole of its answer in memory when the connection
/// is given back: no answer has more than a page.
impl<'c, DB: Database> Executor<'c> for &Connections<DB>
where
    for<'a> &'a mut DB::Connection: Executor<'a, Database = DB>,
{
    type Database = DB;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Either<DB::QueryResult, DB::Row>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        let connections = self.clone();
        let answer = async move {
            let (mut connection, lent) = connections.lend().await?;
            let answer: Vec<_> = connection.fetch_many(query).try_collect().await?;
            connections.keep(connection, lent);
            Ok(stream::iter(answer.into_iter().map(Ok)))
        };
        answer.try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<DB::Row>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        let connections = self.clone();
        async move {
            let (mut connection, lent) = connections.lend().await?;
            let row = connection.fetch_optional(query).await?;
            connections.keep(connection, lent);
            Ok(row)
        }
        .boxed()
    }

    fn prepare_with<'e>(self, sql: SqlStr, types: &'e [DB::TypeInfo]) -> BoxFuture<'e, sqlx::Result<DB::Statement>>
    where
        'c: 'e,
    {
        let connections = self.clone();
        async move {
            let (mut connection, lent) = connections.lend().await?;
            let statement = connection.prepare_with(sql, types).await?;
            connections.keep(connection, lent);
            Ok(statement)
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::try_join_all;
    use sqlx::Sqlite;
    use sqlx::sqlite::SqlitePoolOptions;

    use super::*;

    fn connections(lent_max: u32) -> Connections<Sqlite> {
        let pool = SqlitePoolOptions::new()
            .max_connections(lent_max)
            .acquire_timeout(Duration::from_secs(20))
            .connect_lazy("sqlite::memory:");
        Connections::new(pool.unwrap(), lent_max)
    }

    async fn ask(connections: &Connections<Sqlite>) -> sqlx::Result<i64> {
        sqlx::query_scalar("SELECT 1").fetch_one(connections).await
    }

    #[tokio::test]
    async fn a_connection_that_has_answered_is_lent_again() {
        let connections = connections(4);
        for _ in 0..10 {
            ask(&connections).await.unwrap();
        }
        assert_eq!((connections.kept().len(), connections.pool().size()), (1, 1));
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_one_that_was_kept() {
        let connections = connections(2);
        try_join_all((0..100).map(|_| ask(&connections))).await.unwrap();
        assert_eq!(connections.kept().len(), 2);
    }

    #[tokio::test]
    async fn one_whose_statement_was_cut_short_or_failed_is_not_kept() {
        let connections = connections(1);
        let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000000) SELECT i FROM n";
        let cut_short = timeout(Duration::from_millis(1), sqlx::query(endless).fetch_all(&connections)).await;
        assert!(cut_short.is_err() && connections.kept().is_empty());
        assert!(sqlx::query("nonsense").execute(&connections).await.is_err() && connections.kept().is_empty());
        assert_eq!(ask(&connections).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn none_is_kept_once_it_closes() {
        let connections = connections(2);
        let (connection, lent) = connections.lend().await.unwrap();
        let closing = connections.clone();
        let closed = tokio::spawn(async move { closing.close().await });
        while !connections.pool().is_closed() {
            tokio::task::yield_now().await;
        }
        connections.keep(connection, lent);
        closed.await.unwrap();
        assert!(connections.kept().is_empty() && ask(&connections).await.is_err());
    }
}
