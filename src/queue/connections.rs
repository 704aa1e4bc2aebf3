//! Connections to the queue's database, kept between statements.
//!
//! sqlx's pool asks a connection that is given back to it whether it is still there: a round trip more for each statement,
//! to Postgres or to SQLite's thread. Always: a connection that has just answered is lent again as it is, and one that was
//! idle for longer is asked first, with others behind it when it does not answer; a transaction ends before its connection is
//! another's; one that is in use is waited for a moment before another is made. Never: kept after a statement that failed or
//! was cut short, or waited for longer than the pool itself would be.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use sqlx::pool::PoolConnection;
use sqlx::{Connection, Database, Either, Error, Execute, Executor, Pool, Result, SqlStr};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How long one that was idle may take to say that it is still there.
const ASKED_FOR: Duration = Duration::from_secs(1);
/// One that is in use is waited for so long before another is made: it mostly comes back sooner, and another costs more than a
/// statement, to begin with and for as long as its thread or process is called in turn with the others.
const PATIENCE: Duration = Duration::from_millis(10);
/// What was not used for so long the pool has back, as it has one that was used for ten times that: it ends what is idle or old.
const UNUSED_MAX: Duration = Duration::from_secs(60);
const USED_MAX: Duration = Duration::from_secs(600);

/// The connections of one pool. Cheap to clone.
pub(super) struct Connections<DB: Database> {
    inner: Arc<Inner<DB>>,
}

struct Inner<DB: Database> {
    pool: Pool<DB>,
    /// One that was idle for no longer is used without asking whether it is still there.
    trusted_for: Duration,
    /// A place for each that may be lent: whoever waited for the pool would not hear of one that was kept.
    places: Arc<Semaphore>,
    lent_max: usize,
    /// The one used last is at the end.
    kept: Mutex<Vec<Kept<DB>>>,
    /// Told of each that is kept.
    came_back: Notify,
}

struct Kept<DB: Database> {
    connection: PoolConnection<DB>,
    /// When it came from the pool, and when it answered last.
    since: Instant,
    at: Instant,
}

/// A connection in use. Dropped before it has answered, it is closed: what it is in the midst of may never end.
struct Lent<DB: Database> {
    connection: Option<PoolConnection<DB>>,
    since: Instant,
}

impl<DB: Database> Drop for Lent<DB> {
    fn drop(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.close_on_drop();
        }
    }
}

impl<DB: Database> Connections<DB> {
    /// Up to `lent_max` of the pool's at once; others who share the pool need what it has beyond that.
    pub(super) fn new(pool: Pool<DB>, lent_max: u32, trusted_for: Duration) -> Connections<DB> {
        let lent_max = lent_max as usize;
        let (places, kept, came_back) = (Arc::new(Semaphore::new(lent_max)), Mutex::default(), Notify::new());
        Connections { inner: Arc::new(Inner { pool, trusted_for, places, lent_max, kept, came_back }) }
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

    /// Does `work` with a connection, and keeps it if it answered. A transaction that was begun in it ends in it.
    pub(super) async fn with<T>(&self, work: impl AsyncFnOnce(&mut DB::Connection) -> Result<T>) -> Result<T> {
        let longest = self.inner.pool.options().get_acquire_timeout();
        let (mut lent, place) = timeout(longest, self.lend()).await.map_err(|_| Error::PoolTimedOut)??;
        let Some(connection) = &mut lent.connection else { return Err(Error::PoolClosed) };
        let answer = work(connection).await;
        match &answer {
            Ok(_) => self.keep(&mut lent),
            // it is sound, and the pool sees to what it was in the midst of
            Err(Error::Database(_)) => drop(lent.connection.take()),
            // the others may have ended with it
            Err(_) => self.forget_kept(),
        }
        drop(place);
        answer
    }

    async fn lend(&self) -> Result<(Lent<DB>, OwnedSemaphorePermit)> {
        let place = self.inner.places.clone().acquire_owned().await.map_err(|_| Error::PoolClosed)?;
        let mut last = self.kept().pop();
        // whoever has another place has a connection in use, or makes one
        if last.is_none() && self.inner.places.available_permits() + 1 < self.inner.lent_max {
            last = timeout(PATIENCE, self.one_that_comes_back()).await.ok();
        }
        if let Some(Kept { connection, since, at }) = last {
            let mut lent = Lent { connection: Some(connection), since };
            if at.elapsed() <= self.inner.trusted_for || lent.is_there().await {
                return Ok((lent, place));
            }
            // the others are idle for longer
            self.forget_kept();
        }
        let connection = Some(self.inner.pool.acquire().await?);
        Ok((Lent { connection, since: Instant::now() }, place))
    }

    async fn one_that_comes_back(&self) -> Kept<DB> {
        loop {
            if let Some(last) = self.kept().pop() {
                return last;
            }
            self.inner.came_back.notified().await;
        }
    }

    /// Keeps one that has just answered, unless the pool waits for it in order to close.
    fn keep(&self, lent: &mut Lent<DB>) {
        let (now, since) = (Instant::now(), lent.since);
        let Some(connection) = lent.connection.take() else { return };
        let mut kept = self.kept();
        if self.inner.pool.is_closed() || now - since > USED_MAX {
            return;
        }
        kept.retain(|kept| now - kept.at <= UNUSED_MAX);
        kept.push(Kept { connection, since, at: now });
        drop(kept);
        self.inner.came_back.notify_one();
    }

    fn forget_kept(&self) {
        let kept = std::mem::take(&mut *self.kept());
        for mut kept in kept {
            kept.connection.close_on_drop();
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept<DB>>> {
        self.inner.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<DB: Database> Lent<DB> {
    async fn is_there(&mut self) -> bool {
        match &mut self.connection {
            Some(connection) => matches!(timeout(ASKED_FOR, connection.ping()).await, Ok(Ok(()))),
            None => false,
        }
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

/// Each statement goes over whichever connection is to be had. The whole of its answer is in memory when it is given on, as the
/// connection is for the next by then.
impl<'c, DB: Database> Executor<'c> for &Connections<DB>
where
    for<'a> &'a mut DB::Connection: Executor<'a, Database = DB>,
{
    type Database = DB;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<DB::QueryResult, DB::Row>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        let connections = self.clone();
        let answer = async move {
            let answer =
                connections.with(async |connection| connection.fetch_many(query).try_collect::<Vec<_>>().await);
            Ok(stream::iter(answer.await?.into_iter().map(Ok)))
        };
        answer.try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<DB::Row>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        let connections = self.clone();
        async move { connections.with(async |connection| connection.fetch_optional(query).await).await }.boxed()
    }

    fn prepare_with<'e>(self, sql: SqlStr, types: &'e [DB::TypeInfo]) -> BoxFuture<'e, Result<DB::Statement>>
    where
        'c: 'e,
    {
        let connections = self.clone();
        async move { connections.with(async |connection| connection.prepare_with(sql, types).await).await }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::future::try_join_all;
    use sqlx::Sqlite;
    use sqlx::sqlite::SqlitePoolOptions;

    use super::*;

    fn connections(lent_max: u32, trusted_for: Duration) -> Connections<Sqlite> {
        let pool = SqlitePoolOptions::new()
            .max_connections(lent_max)
            .acquire_timeout(Duration::from_secs(20))
            .connect_lazy("sqlite::memory:");
        Connections::new(pool.unwrap(), lent_max, trusted_for)
    }

    async fn ask(connections: &Connections<Sqlite>) -> Result<i64> {
        sqlx::query_scalar("SELECT 1").fetch_one(connections).await
    }

    /// Keeps `many` that were all in use at once.
    async fn keep(connections: &Connections<Sqlite>, many: u32) {
        let mut lent = try_join_all((0..many).map(|_| connections.lend())).await.unwrap();
        lent.iter_mut().for_each(|(lent, _)| connections.keep(lent));
    }

    #[tokio::test]
    async fn a_connection_that_has_answered_is_lent_again_asked_first_or_not() {
        for trusted_for in [Duration::MAX, Duration::ZERO] {
            let connections = connections(4, trusted_for);
            for _ in 0..10 {
                ask(&connections).await.unwrap();
            }
            assert_eq!((connections.kept().len(), connections.pool().size()), (1, 1));
        }
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_one_that_was_kept_though_another_may_be_made() {
        for lent_max in [1, 2] {
            let connections = connections(lent_max, Duration::MAX);
            let (mut lent, place) = connections.lend().await.unwrap();
            let mut waiting = pin!(ask(&connections));
            assert!(waiting.as_mut().now_or_never().is_none());
            connections.keep(&mut lent);
            drop(place);
            assert_eq!(waiting.await.unwrap(), 1);
            assert_eq!((connections.kept().len(), connections.pool().size()), (1, 1));
        }
    }

    #[tokio::test]
    async fn one_that_stays_in_use_is_not_waited_for_for_long() {
        let connections = connections(2, Duration::MAX);
        let _in_use = connections.lend().await.unwrap();
        assert_eq!(ask(&connections).await.unwrap(), 1);
        assert_eq!(connections.pool().size(), 2);
    }

    #[tokio::test]
    async fn one_whose_statement_failed_is_not_kept() {
        let connections = connections(1, Duration::MAX);
        ask(&connections).await.unwrap();
        assert!(sqlx::query("nonsense").execute(&connections).await.is_err() && connections.kept().is_empty());
        assert_eq!(ask(&connections).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn one_whose_statement_is_cut_short_is_closed_and_its_place_free() {
        let connections = connections(1, Duration::MAX);
        // only this one knows it
        sqlx::query("CREATE TEMP TABLE mark (n INT)").execute(&connections).await.unwrap();
        let marked = async || sqlx::query("SELECT n FROM mark").fetch_all(&connections).await.is_ok();
        assert!(marked().await);
        let never = connections.with(async |_| std::future::pending::<Result<()>>().await);
        assert!(timeout(Duration::from_millis(10), never).await.is_err());
        assert!(!marked().await, "it was given back to the pool");
        assert_eq!(ask(&connections).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn when_one_breaks_the_others_that_are_kept_are_closed() {
        let connections = connections(3, Duration::MAX);
        keep(&connections, 3).await;
        // only the one that is lent next knows it
        sqlx::query("CREATE TEMP TABLE mark (n INT)").execute(&connections).await.unwrap();
        connections.kept().rotate_right(1);
        assert_eq!(connections.kept().len(), 3);
        let broken = connections.with(async |_| Err::<(), _>(Error::Protocol("broken".to_owned()))).await;
        assert!(broken.is_err() && connections.kept().is_empty());
        let mut lent = try_join_all((0..3).map(|_| connections.lend())).await.unwrap();
        for (lent, _) in &mut lent {
            let connection = lent.connection.as_deref_mut().unwrap();
            assert!(
                sqlx::query("SELECT n FROM mark").fetch_all(connection).await.is_err(),
                "it was given back to the pool"
            );
        }
    }

    #[tokio::test]
    async fn none_is_kept_once_it_closes() {
        let connections = connections(2, Duration::MAX);
        keep(&connections, 2).await;
        let (mut lent, place) = connections.lend().await.unwrap();
        let closing = connections.clone();
        let closed = tokio::spawn(async move { closing.close().await });
        while !connections.pool().is_closed() {
            tokio::task::yield_now().await;
        }
        connections.keep(&mut lent);
        drop((lent, place));
        timeout(Duration::from_secs(20), closed).await.expect("the pool waits for none that is kept").unwrap();
        assert!(connections.kept().is_empty() && ask(&connections).await.is_err());
    }
}
