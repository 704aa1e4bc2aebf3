//! How long a device waits for its acknowledgement, at the site's rate and at ten times that, beside the bare cost of what an
//! acknowledgement stands for: a photo written and synced, its folder synced, a row committed to Postgres.
//!
//! Always: the bare cost is taken at the site's rate too, on the same disk and the same Postgres, one after another with what
//! it is held against. Never: a photo decoded, checked or hashed in the bare cost.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use sqlx::postgres::PgPoolOptions;

use crate::leftovers::Leftovers;
use crate::load::{self, Bodies, PHOTO_BYTES};
use crate::report::{Contestant, Measured, Report, Target};
use crate::support::postgres::Cluster;
use crate::support::weed;
use crate::throughput::Site;
use crate::{Plan, quantile, settle};

/// A thousand devices with two photos a minute each.
const SITE_PER_SECOND: f64 = 1000.0 * 2.0 / 60.0;
const CONNECTIONS: u32 = 64;
/// Seconds of load for each that was asked for: at the site's rate there are few photos in one.
const TIMES_AS_LONG: u64 = 4;

pub async fn run_all(plan: &Plan, bodies: &Bodies, leftovers: &mut Leftovers, report: &mut Report) {
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(200)).await.expect("Postgres starts");
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    let (mut bare, mut ours, mut ours_at_ten) = (Times::default(), Times::default(), Times::default());
    let seconds = plan.seconds * TIMES_AS_LONG;
    for round in 0..plan.rounds {
        plan.tell(round, "the bare cost of a synced file, a synced folder and a commit");
        let took = bare_ms(&cluster, seconds, leftovers).await;
        bare.push(quantile(&took, 0.5), quantile(&took, 0.99));
        settle().await;
        for (times, seen_at) in [(1.0, &mut ours), (10.0, &mut ours_at_ten)] {
            let rate = SITE_PER_SECOND * times;
            plan.tell(round, &format!("forebay takes {rate:.0} photos/s"));
            let site = Site::start(1, &cluster, &store).await;
            let url = format!("{}/", site.replicas[0].url);
            let load = load::Load { connections: CONNECTIONS, seconds, per_second: Some(rate) };
            let seen = load::send("POST", &url, "application/json", &bodies.json, load).await;
            assert!(seen.refused + seen.broken == 0, "{seen:?}");
            assert!(seen.per_second() > rate * 0.9, "{:.0} a second came, not {rate:.0}", seen.per_second());
            seen_at.push(seen.p50 as f64 / 1000.0, seen.p99 as f64 / 1000.0);
            leftovers.keep(site.agrees(&[&seen]).await);
            settle().await;
        }
    }
    leftovers.keep_cluster(cluster);
    for (times, ours, target) in [(1.0, ours, 3.0), (10.0, ours_at_ten, 6.0)] {
        let rate = SITE_PER_SECOND * times;
        for (which, ours, bare, targets) in
            [("median", ours.p50, &bare.p50, vec![]), ("p99", ours.p99, &bare.p99, vec![Target::TimesAtMost(target)])]
        {
            let of = |name: &str, rounds| Contestant { name: name.to_owned(), rounds };
            report.add(Measured {
                what: format!("Time to an acknowledgement, {which}, at {rate:.0} photos/s"),
                unit: "ms".to_owned(),
                contestants: vec![
                    of("forebay ingest: JSON, SHA-256, fsync, Postgres", ours),
                    of("write, fdatasync, rename, fsync, COMMIT, at 33/s", bare.clone()),
                ],
                targets,
            });
        }
    }
}

/// Milliseconds, a figure for each round.
#[derive(Default)]
struct Times {
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Times {
    fn push(&mut self, p50: f64, p99: f64) {
        self.p50.push(p50);
        self.p99.push(p99);
    }
}

/// Photos are written and rows committed at the site's rate, each for itself, as an appliance would that did nothing else.
async fn bare_ms(cluster: &Cluster, seconds: u64, leftovers: &mut Leftovers) -> Vec<f64> {
    let database = cluster.database();
    // as the product's own, and none is opened while it is timed
    let pool = PgPoolOptions::new().min_connections(8).max_connections(8).test_before_acquire(false);
    let pool = pool.connect(&database).await.expect("a connection");
    sqlx::query("CREATE TABLE bare (number bigint PRIMARY KEY, digest text NOT NULL)")
        .execute(&pool)
        .await
        .expect("a table");
    let warm = (0..8).map(|n| sqlx::query("INSERT INTO bare VALUES ($1, '')").bind(-1 - i64::from(n)).execute(&pool));
    try_join_all(warm).await.expect("each connection knows the statement");
    let folder = tempfile::tempdir().expect("a folder for photos");
    let photo = Arc::new(vec![7; PHOTO_BYTES]);
    let (began, mut writing) = (Instant::now(), tokio::task::JoinSet::new());
    for number in 0..(seconds as f64 * SITE_PER_SECOND) as u32 {
        tokio::time::sleep_until((began + Duration::from_secs_f64(f64::from(number) / SITE_PER_SECOND)).into()).await;
        let (pool, photo, folder) = (pool.clone(), photo.clone(), folder.path().to_owned());
        writing.spawn(async move {
            let began = Instant::now();
            let written = tokio::task::spawn_blocking(move || write_durably(folder, number, &photo));
            written.await.expect("a writer").expect("a photo is written");
            sqlx::query("INSERT INTO bare VALUES ($1, $2)")
                .bind(i64::from(number))
                .bind("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
                .execute(&pool)
                .await
                .expect("a row is committed");
            began.elapsed().as_secs_f64() * 1000.0
        });
    }
    let took = writing.join_all().await;
    leftovers.keep(folder);
    took
}

fn write_durably(folder: PathBuf, number: u32, photo: &[u8]) -> std::io::Result<()> {
    let (part, path) = (folder.join(format!("{number}.part")), folder.join(number.to_string()));
    let mut file = File::create(&part)?;
    file.write_all(photo)?;
    file.sync_data()?;
    std::fs::rename(part, path)?;
    File::open(folder)?.sync_all()
}
