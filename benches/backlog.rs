//! A big backlog: what a claim, a list, a start and a status cost while millions of uploads wait, beside ten thousand; and
//! what is left of a claim's speed after the queue was turned over again and again.
//!
//! Always: tables that the migrations made, and the product's own claims, commits and answers. Never: photos on disk; the
//! rows are written in bulk, books and lines counted from them, so that the queue is as ten million acceptances leave it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay::allowance::End;
use forebay::config::QueueUrl;
use forebay::queue::{Pick, Queue};
use forebay::units::UnixMs;
use forebay::upload::{DeviceId, Priority, Upload, UploadId};
use futures_util::future::join_all;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};
use tempfile::TempDir;

use crate::report::{Contestant, Measured, Report, Target};
use crate::support::postgres::Cluster;
use crate::support::program::{Program, s3_settings};
use crate::support::{eventually, upload_of, weed};
use crate::{Plan, quantile, settle};

/// What the many are held against.
const FEW: u64 = 10_000;
/// Rows written in one transaction.
const ROWS_AT_ONCE: u64 = 500_000;
const CLAIMS: usize = 400;
const LEASE: Duration = Duration::from_secs(600);
/// Pages followed through the list.
const PAGES: usize = 1000;
/// Questions asked of each kind, so that one late answer is not taken for all.
const QUESTIONS: usize = 50;
/// Uploads that pass through a queue of [`FEW`] to wear it: a site's day brings fewer of its backlog than this.
const TURNED_OVER: u64 = 10 * FEW;
const BATCH: u64 = 250;

/// A queue with so many uploads in it.
struct Filled {
    url: QueueUrl,
    queue: Queue,
    settings: Vec<(String, String)>,
    folder: TempDir,
}

/// What was seen of one queue, a figure for each round.
#[derive(Default)]
struct Seen {
    claim_p50_ms: Vec<f64>,
    claim_p99_ms: Vec<f64>,
    first_page_ms: Vec<f64>,
    last_page_ms: Vec<f64>,
    ready_seconds: Vec<f64>,
    status_ms: Vec<f64>,
}

pub async fn run_all(plan: &Plan, report: &mut Report) {
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(200)).await.expect("Postgres starts");
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    for kind in ["SQLite", "Postgres"] {
        let cluster = (kind == "Postgres").then_some(&cluster);
        one_kind(plan, kind, cluster, &store, report).await;
        worn(plan, kind, cluster, &store, report).await;
    }
}

async fn one_kind(plan: &Plan, kind: &str, cluster: Option<&Cluster>, store: &weed::Server, report: &mut Report) {
    let few = Filled::with(FEW, cluster, store).await;
    let many = Filled::with(plan.uploads, cluster, store).await;
    let (mut of_few, mut of_many) = (Seen::default(), Seen::default());
    settle().await;
    for round in 0..plan.rounds {
        for (uploads, filled, seen) in [(FEW, &few, &mut of_few), (plan.uploads, &many, &mut of_many)] {
            plan.tell(round, &format!("{kind} with {uploads} queued"));
            filled.look(seen).await;
            settle().await;
        }
    }
    let names = [plan.uploads, FEW].map(|uploads| format!("{kind}, {uploads} queued"));
    let mut add = |what: &str, unit: &str, figure: fn(&Seen) -> &Vec<f64>, targets: Vec<Target>| {
        let of = |name: &str, seen: &Seen| Contestant { name: name.to_owned(), rounds: figure(seen).clone() };
        let contestants = vec![of(&names[0], &of_many), of(&names[1], &of_few)];
        report.add(Measured { what: what.to_owned(), unit: unit.to_owned(), contestants, targets });
    };
    let twice = Target::TimesAtMost(2.0);
    add("A claim of one upload, committed, p99", "ms", |s| &s.claim_p99_ms, vec![Target::AtMost(5.0), twice]);
    add("A claim of one upload, committed, median", "ms", |s| &s.claim_p50_ms, vec![]);
    add("The list's first page, the slowest of 50", "ms", |s| &s.first_page_ms, vec![Target::AtMost(10.0)]);
    add(
        "The list's thousandth page, or the last, the slowest of the 50 up to it",
        "ms",
        |s| &s.last_page_ms,
        vec![Target::AtMost(10.0)],
    );
    add("From its start to ready, serve", "s", |s| &s.ready_seconds, vec![Target::AtMost(2.0)]);
    add("Its status, the slowest of 50", "ms", |s| &s.status_ms, vec![Target::AtMost(50.0)]);
}

impl Filled {
    async fn with(uploads: u64, cluster: Option<&Cluster>, store: &weed::Server) -> Filled {
        let folder = tempfile::tempdir().expect("a folder for the data");
        let (_, bucket) = store.bucket().await;
        let mut settings = s3_settings(&store.endpoint, &bucket);
        let url = match cluster {
            Some(cluster) => QueueUrl::Postgres(cluster.database()),
            None => QueueUrl::Sqlite(folder.path().join("data/queue.sqlite")),
        };
        if let QueueUrl::Postgres(url) = &url {
            settings.push(("FOREBAY_QUEUE_URL".to_owned(), url.clone()));
        }
        let queue = Queue::open(&url).expect("a queue");
        queue.migrate().await.expect("its tables");
        let began = Instant::now();
        fill(&url, uploads).await.expect("rows are written");
        println!("{uploads} uploads written to {} in {:.0} s", queue.kind(), began.elapsed().as_secs_f64());
        // nothing is to leave while it is looked at
        queue.set_pause("bench", End::Never).await.expect("a pause");
        let books = queue.books().await.expect("books");
        assert_eq!(books.queued.uploads as u64, uploads, "all are in the books");
        Filled { url, queue, settings, folder }
    }

    async fn claims(&self) -> Vec<f64> {
        let mut took = Vec::with_capacity(CLAIMS);
        for claim in 0..CLAIMS {
            let pick = if claim % 2 == 0 { Pick::Fresh } else { Pick::Backlog };
            let began = Instant::now();
            let leases = self.queue.claim("bench", 1, LEASE, pick).await.expect("a claim");
            took.push(began.elapsed().as_secs_f64() * 1000.0);
            assert_eq!(leases.len(), 1, "there is always one to claim");
        }
        took
    }

    async fn look(&self, seen: &mut Seen) {
        let claims = self.claims().await;
        seen.claim_p50_ms.push(quantile(&claims, 0.5));
        seen.claim_p99_ms.push(quantile(&claims, 0.99));

        let began = Instant::now();
        let serve = Program::start("serve", &self.settings, &self.folder.path().join("data")).await;
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let ask = async |address: String| -> (Value, f64) {
            let began = Instant::now();
            let answer = client.get(&address).send().await.expect("an answer");
            assert!(answer.status().is_success(), "{address}: {}", answer.status());
            let text = answer.bytes().await.expect("all of an answer");
            let took = began.elapsed().as_secs_f64() * 1000.0;
            (serde_json::from_slice(&text).unwrap_or_default(), took)
        };
        ask(format!("{}/readyz", serve.url)).await;
        seen.ready_seconds.push(began.elapsed().as_secs_f64());

        let mut statuses = Vec::new();
        for _ in 0..QUESTIONS {
            statuses.push(ask(format!("{}/status", serve.console)).await.1);
        }
        seen.status_ms.push(quantile(&statuses, 1.0));

        let list = format!("{}/list", serve.url);
        let (mut first, mut last, mut cursor) = (Vec::new(), Vec::new(), None::<String>);
        for _ in 0..QUESTIONS {
            first.push(ask(list.clone()).await.1);
        }
        for _ in 0..PAGES {
            let address = cursor.as_ref().map_or(list.clone(), |cursor| format!("{list}?cursor={cursor}"));
            let (page, took) = ask(address).await;
            last.push(took);
            cursor = page["next_cursor"].as_str().map(str::to_owned);
            if cursor.is_none() {
                break;
            }
        }
        seen.first_page_ms.push(quantile(&first, 1.0));
        seen.last_page_ms.push(quantile(&last[last.len().saturating_sub(QUESTIONS)..], 1.0));
        assert!(serve.terminate().await, "serve stops in order");
    }
}

/// A claim's median on a queue through which uploads have passed that are many times its backlog, and on a new one, in turns.
async fn worn(plan: &Plan, kind: &str, cluster: Option<&Cluster>, store: &weed::Server, report: &mut Report) {
    let filled = Filled::with(FEW, cluster, store).await;
    let (mut new, mut worn) = (Vec::new(), Vec::new());
    if let Some(cluster) = cluster {
        // what passes through here in a second takes a site a minute, and as much more often autovacuum is to come round
        cluster.psql("ALTER SYSTEM SET autovacuum_naptime = '1s'").expect("a setting");
        cluster.psql("SELECT pg_reload_conf()").expect("a setting");
    }
    plan.tell(0, &format!("{kind}: {TURNED_OVER} uploads pass through a backlog of {FEW}"));
    for batch in 0..TURNED_OVER / BATCH {
        pass_through(&filled.queue, batch * BATCH).await;
    }
    settle().await;
    if let QueueUrl::Postgres(url) = &filled.url {
        vacuumed(url).await.expect("Postgres says what it has vacuumed");
    }
    let fresh = Filled::with(FEW, cluster, store).await;
    settle().await;
    for _ in 0..plan.rounds {
        new.push(quantile(&fresh.claims().await, 0.5));
        worn.push(quantile(&filled.claims().await, 0.5));
    }
    let of = |name: &str, rounds: Vec<f64>| Contestant { name: format!("{kind}, {name}"), rounds };
    report.add(Measured {
        what: format!("A claim's median once {TURNED_OVER} uploads were taken in, sent, removed and purged"),
        unit: "ms".to_owned(),
        contestants: vec![of("after that", worn), of("a new one of as many", new)],
        targets: vec![Target::TimesAtMost(1.1)],
    });
}

/// Waits until autovacuum has come round once more, and has left no more than the tables' settings allow.
async fn vacuumed(url: &str) -> sqlx::Result<()> {
    let mut postgres = PgConnection::connect(url).await?;
    let (ended,): (f64,) =
        sqlx::query_as("SELECT extract(epoch FROM clock_timestamp())::float8").fetch_one(&mut postgres).await?;
    eventually("autovacuum to come round", async || {
        let (done,): (bool,) = sqlx::query_as(
            // one that was never vacuumed has no last time, which is not late enough
            "SELECT bool_and(coalesce(extract(epoch FROM last_autovacuum) > $1, false) OR n_dead_tup <= CASE relname
                 WHEN 'uploads' THEN 50 + 0.01 * n_live_tup WHEN 'line_clocks' THEN 500 ELSE 2000 END)
             FROM pg_stat_user_tables WHERE relname IN ('uploads', 'lines', 'line_clocks', 'books')",
        )
        .bind(ended)
        .fetch_one(&mut postgres)
        .await
        .expect("an answer");
        done.then_some(())
    })
    .await;
    postgres.close().await
}

/// As many uploads as a batch has are accepted, and as many of those that wait are claimed, uploaded, removed and purged.
async fn pass_through(queue: &Queue, first: u64) {
    let accepting = (first..first + BATCH).map(|number| queue.accept(passing(number)));
    join_all(accepting).await.into_iter().for_each(|accepted| assert!(accepted.expect("accepted").new));
    let mut leases = Vec::new();
    while (leases.len() as u64) < BATCH {
        leases.extend(queue.claim("bench", 10, LEASE, Pick::Backlog).await.expect("a claim"));
    }
    let finished = join_all(leases.iter().map(|lease| queue.finish(lease))).await;
    finished.into_iter().for_each(|finished| assert!(finished.expect("finished")));
    let ids: Vec<UploadId> = leases.iter().map(|lease| lease.upload.id).collect();
    queue.removed(&ids).await.expect("removed");
    queue.purge(Duration::ZERO, BATCH as u32).await.expect("purged");
}

fn passing(number: u64) -> Arc<Upload> {
    let device_id: DeviceId = format!("cam-{:04}", number % 1000 + 1).parse().expect("a device");
    let upload_id = format!("passing-{number}");
    let mut upload = Arc::unwrap_or_clone(upload_of(&[], &upload_id));
    upload.id = UploadId::of_device(&device_id, &upload_id);
    upload.object_key = format!("{device_id}/2026/11/{upload_id}.jpg");
    upload.device_id = device_id;
    upload.size_bytes = 250_000;
    upload.priority = Priority::Normal;
    upload.received_at = UnixMs::now();
    Arc::new(upload)
}

/// What is counted from the rows, as the triggers would have counted it.
const LINES: &str = "INSERT INTO lines (priority, device_id, queued, queued_bytes, turn)
    SELECT priority, device_id, count(*), sum(size_bytes), 0 FROM uploads WHERE state = 'queued' GROUP BY 1, 2";

/// Writes `uploads` rows of a thousand devices, one every 30 ms until now.
async fn fill(url: &QueueUrl, uploads: u64) -> sqlx::Result<()> {
    match url {
        QueueUrl::Sqlite(path) => fill_sqlite(path, uploads).await,
        QueueUrl::Postgres(url) => fill_postgres(url, uploads).await,
    }
}

async fn fill_sqlite(path: &Path, uploads: u64) -> sqlx::Result<()> {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut sqlite = SqliteConnection::connect_with(&options).await?;
    let run = async |sqlite: &mut SqliteConnection, text: String| -> sqlx::Result<()> {
        sqlx::raw_sql(AssertSqlSafe(text)).execute(sqlite).await.map(drop)
    };
    run(&mut sqlite, "PRAGMA synchronous = OFF; PRAGMA cache_size = -2000000".to_owned()).await?;
    let kept: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT type, name, sql FROM sqlite_master
         WHERE tbl_name = 'uploads' AND type IN ('index', 'trigger') AND sql IS NOT NULL",
    )
    .fetch_all(&mut sqlite)
    .await?;
    for (kind, name, _) in &kept {
        run(&mut sqlite, format!("DROP {kind} {name}")).await?;
    }
    let now = UnixMs::now().0;
    for first in (0..uploads).step_by(ROWS_AT_ONCE as usize) {
        let last = (first + ROWS_AT_ONCE).min(uploads);
        let rows = format!(
            "INSERT INTO uploads (id, device_id, upload_id, object_key, size_bytes, sha256, content_type, received_at_ms)
             WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {last})
             SELECT randomblob(16), printf('cam-%04d', i % 1000 + 1), i,
                 printf('cam-%04d/2026/11/22/%d.jpg', i % 1000 + 1, i), 250000, lower(hex(randomblob(32))), 'image/jpeg',
                 {now} - ({uploads} - i) * 30 FROM n"
        );
        run(&mut sqlite, rows).await?;
    }
    for (_, _, text) in kept {
        run(&mut sqlite, text).await?;
    }
    let books = "INSERT INTO books SELECT state, removed_at_ms IS NULL, count(*), sum(size_bytes)
        FROM uploads GROUP BY 1, 2";
    run(&mut sqlite, format!("{books}; {LINES}; PRAGMA wal_checkpoint(TRUNCATE)")).await?;
    sqlite.close().await
}

async fn fill_postgres(url: &str, uploads: u64) -> sqlx::Result<()> {
    let mut postgres = PgConnection::connect(url).await?;
    let run = async |postgres: &mut PgConnection, text: String| -> sqlx::Result<()> {
        sqlx::raw_sql(AssertSqlSafe(text)).execute(postgres).await.map(drop)
    };
    run(&mut postgres, "SET synchronous_commit = off; SET maintenance_work_mem = '1GB'".to_owned()).await?;
    let kept: Vec<(String, String)> = sqlx::query_as(
        "SELECT indexname::text, indexdef FROM pg_indexes WHERE tablename = 'uploads' AND indexname <> 'uploads_pkey'",
    )
    .fetch_all(&mut postgres)
    .await?;
    for (name, _) in &kept {
        run(&mut postgres, format!("DROP INDEX {name}")).await?;
    }
    run(&mut postgres, "ALTER TABLE uploads DISABLE TRIGGER USER".to_owned()).await?;
    let now = UnixMs::now().0;
    for first in (0..uploads).step_by(ROWS_AT_ONCE as usize) {
        let last = (first + ROWS_AT_ONCE).min(uploads) - 1;
        let rows = format!(
            "INSERT INTO uploads (id, device_id, upload_id, object_key, size_bytes, sha256, content_type, received_at_ms)
             SELECT gen_random_uuid(), device, i::text, device || '/2026/11/22/' || i || '.jpg', 250000,
                 md5(i::text) || md5((-i)::text), 'image/jpeg', {now} - ({uploads} - i) * 30
             FROM generate_series({first}, {last}) AS i,
                 LATERAL (SELECT 'cam-' || lpad((i % 1000 + 1)::text, 4, '0') AS device) AS d"
        );
        run(&mut postgres, rows).await?;
    }
    for (_, text) in kept {
        run(&mut postgres, text).await?;
    }
    let books = "INSERT INTO books SELECT 0, state, removed_at_ms IS NULL, count(*), sum(size_bytes)
        FROM uploads GROUP BY 2, 3";
    run(&mut postgres, format!("ALTER TABLE uploads ENABLE TRIGGER USER; {books}; {LINES}")).await?;
    // as autovacuum does within a minute
    run(&mut postgres, "VACUUM ANALYZE uploads".to_owned()).await?;
    run(&mut postgres, "VACUUM ANALYZE lines".to_owned()).await?;
    postgres.close().await
}
