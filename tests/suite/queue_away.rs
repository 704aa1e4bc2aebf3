//! The queue may be away: photos are acknowledged durably all the same, and each is in the queue once when it is back. And the
//! queue may be lost: it is made anew from the spool.

use std::fs::File;
use std::time::{Duration, Instant, SystemTime};

use forebay::config::QueueUrl;
use forebay::keeper::adopt;
use forebay::queue::Queue;
use futures_util::future::{join, join_all, try_join_all};
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

use crate::support::fleet::Fleet;
use crate::support::postgres::Cluster;
use crate::support::program::{Program, run, s3_settings};
use crate::support::proxy::{Link, Proxy};
use crate::support::site::{Answer, Site};
use crate::support::{eventually, json_upload, photo, postgres, upload_of, weed};

/// The URL of a new database, by way of a proxy.
async fn database_behind_a_proxy() -> (String, Proxy) {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let port: u16 = url.split(':').next_back().unwrap().split('/').next().unwrap().parse().unwrap();
    let proxy = Proxy::start(port).await;
    (url.replace(&format!(":{port}/"), &format!(":{}/", proxy.port)), proxy)
}

/// A `serve` whose queue is hurt.
struct Appliance {
    program: Program,
    client: reqwest::Client,
}

impl Appliance {
    fn has_said(&self, message: &str) -> usize {
        self.program.log().iter().filter(|line| line["message"] == message).count()
    }

    fn times_away(&self) -> usize {
        self.has_said("the queue is away; what is accepted waits in the spool's journal")
    }

    fn knows_its_queue_is_away(&self) -> bool {
        self.times_away() > self.has_said("the queue is back")
    }

    async fn post(&self, body: &str) -> Answer {
        let request = self.client.post(&self.program.url).header("content-type", "application/json");
        Answer::of(request.body(body.to_owned()).send().await.unwrap()).await
    }

    /// Waits until it knows that its queue is away, and sees that it does its work all the same.
    async fn takes_photos_without_its_queue(&self) {
        eventually("the queue to be known as away", async || self.knows_its_queue_is_away().then_some(())).await;
        let ready = self.client.get(format!("{}/readyz", self.program.url));
        let answer = Answer::of(ready.send().await.unwrap()).await;
        assert_eq!((answer.status, answer.body["status"].as_str()), (200, Some("degraded")));
        let upload_id = format!("away {}", self.times_away());
        let body = json_upload("cam-away", Some(&upload_id), &photo(1)).to_string();
        let began = Instant::now();
        let first = self.post(&body).await;
        assert_eq!(first.status, 201, "{first:?}");
        for _ in 0..5 {
            let again = self.post(&body).await;
            assert_eq!((again.status, &again.body), (200, &first.body), "a retry meets the first in the spool");
        }
        // each of the six would wait for two seconds
        assert!(began.elapsed() < Duration::from_secs(12), "once it is known to be away, nobody waits for the queue");
    }

    async fn has_its_queue_back(&self) {
        eventually("the queue to be back", async || (!self.knows_its_queue_is_away()).then_some(())).await;
    }
}

/// Photos are sent for some seconds, in the midst of which the queue at `url` is hurt and made well again: all are acknowledged
/// at once, all are uploaded, none is lost.
async fn photos_are_acknowledged_while(url: String, seconds: u32, hurt: impl AsyncFnOnce(&Appliance)) {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.push(("FOREBAY_QUEUE_URL".into(), url));
    let data = folder.path().join("data");
    let program = Program::start("serve", &settings, &data).await;
    let fleet = Fleet {
        url: program.url.clone(),
        devices: 20,
        per_minute: 60,
        seconds,
        photo_bytes: 5_000,
        ledger: folder.path().join("devices.ledger"),
    };
    let appliance = Appliance { program, client: reqwest::Client::builder().no_proxy().build().unwrap() };
    let hurting = async {
        eventually("photos to be acknowledged", async || (fleet.acknowledged() > 20).then_some(())).await;
        hurt(&appliance).await;
    };
    let (said, ()) = tokio::join!(fleet.send(), hurting);
    assert!(said.contains(" 0 tries repeated, 0 refused, 0 unanswered"), "{said}");
    fleet.agrees_with(&appliance.program, &settings, &data).await;
}

async fn photos_are_acknowledged_while_the_link_is(broken: Link) {
    let (url, proxy) = database_behind_a_proxy().await;
    photos_are_acknowledged_while(url, 8, async |appliance| {
        proxy.set(broken);
        appliance.takes_photos_without_its_queue().await;
        proxy.set(Link::Up);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_acknowledged_while_the_link_to_postgres_is_cut() {
    photos_are_acknowledged_while_the_link_is(Link::Cut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_acknowledged_while_the_link_to_postgres_is_silent() {
    photos_are_acknowledged_while_the_link_is(Link::Silent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_died_without_a_word_are_replaced() {
    let (url, proxy) = database_behind_a_proxy().await;
    let queue = Queue::open(&QueueUrl::Postgres(url)).unwrap();
    queue.migrate().await.unwrap();
    let all_at_once = || try_join_all((0..50).map(|_| queue.books()));
    all_at_once().await.unwrap();
    proxy.forget_connections();
    eventually("a connection that works", async || timeout(Duration::from_secs(3), queue.books()).await.ok()?.ok())
        .await;
    // none of the dead holds a place
    timeout(Duration::from_secs(20), all_at_once()).await.expect("in time").unwrap();
}

/// A cluster that a test may hurt, and the URL of a database in it.
async fn cluster(connections: u32) -> (Cluster, String) {
    let made = tokio::task::spawn_blocking(move || {
        let cluster = Cluster::start(connections);
        let url = cluster.database();
        (cluster, url)
    });
    made.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_acknowledged_while_postgres_is_killed_twice() {
    let (cluster, url) = cluster(50).await;
    photos_are_acknowledged_while(url, 12, async |appliance| {
        for _ in 0..2 {
            cluster.kill();
            appliance.takes_photos_without_its_queue().await;
            cluster.start_again();
            appliance.has_its_queue_back().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_acknowledged_while_postgres_is_restarted() {
    let (cluster, url) = cluster(50).await;
    photos_are_acknowledged_while(url, 8, async |appliance| {
        // once so quickly that it need not be noticed, and once not
        cluster.stop();
        cluster.start_again();
        appliance.has_its_queue_back().await;
        cluster.stop();
        appliance.takes_photos_without_its_queue().await;
        cluster.start_again();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_acknowledged_while_postgres_is_read_only() {
    let (cluster, url) = cluster(50).await;
    photos_are_acknowledged_while(url, 8, async |appliance| {
        cluster.psql("ALTER SYSTEM SET default_transaction_read_only = on").unwrap();
        cluster.psql("SELECT pg_reload_conf()").unwrap();
        appliance.takes_photos_without_its_queue().await;
        cluster.psql("ALTER SYSTEM RESET default_transaction_read_only").unwrap();
        cluster.psql("SELECT pg_reload_conf()").unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_acknowledged_while_postgres_has_no_connection_to_spare() {
    const CONNECTIONS: usize = 20;
    let (_cluster, url) = cluster(CONNECTIONS as u32).await;
    photos_are_acknowledged_while(url.clone(), 8, async |appliance| {
        let mut taken = vec![PgConnection::connect(&url).await.unwrap()];
        while taken.len() < CONNECTIONS {
            let theirs = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'forebay'";
            sqlx::query(theirs).execute(&mut taken[0]).await.unwrap();
            while let Ok(another) = PgConnection::connect(&url).await {
                taken.push(another);
            }
        }
        appliance.takes_photos_without_its_queue().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_whose_postgres_is_away_from_the_start_takes_photos() {
    let folder = tempfile::tempdir().unwrap();
    let (url, proxy) = database_behind_a_proxy().await;
    proxy.set(Link::Cut);
    let program = Program::start("ingest", &[("FOREBAY_QUEUE_URL".into(), url)], &folder.path().join("data")).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(&program.url).header("content-type", "application/json");
    let body = json_upload("cam-1", None, &photo(1)).to_string();
    assert_eq!(request.body(body).send().await.unwrap().status(), 201);
    proxy.set(Link::Up);
    eventually("the schema to follow", async || {
        program.log().into_iter().find(|line| line["message"] == "the queue is there and its schema is up to date")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_misspelt_parameter_of_the_queues_url_holds_is_not_logged() {
    let folder = tempfile::tempdir().unwrap();
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap() + "?pasword=s3cret";
    let program = Program::start("ingest", &[("FOREBAY_QUEUE_URL".into(), url)], &folder.path().join("data")).await;
    let log = program.log();
    assert!(log.iter().any(|line| line["message"] == "forebay is up"), "{log:?}");
    assert!(!format!("{log:?}").contains("s3cret"), "{log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_could_not_be_brought_up_to_date_keeps_nobody_else_from_it() {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let mut operator = PgConnection::connect(&url).await.unwrap();
    let database = url.rsplit('/').next().unwrap();
    let mut alter = async |how: &str| {
        let statement = sqlx::AssertSqlSafe(format!("ALTER DATABASE {database} {how}"));
        sqlx::query(statement).execute(&mut operator).await.unwrap();
    };
    let [first, second] = [(); 2].map(|()| Queue::open(&QueueUrl::Postgres(url.clone())).unwrap());
    alter("SET default_transaction_read_only = on").await;
    first.migrate().await.unwrap_err();
    alter("RESET default_transaction_read_only").await;
    let migrated = timeout(Duration::from_secs(10), second.migrate()).await;
    migrated.expect("nobody holds the migrations' lock").unwrap();
    first.migrate().await.unwrap();
}

#[tokio::test]
async fn a_queue_that_goes_away_while_each_of_a_batch_is_tried_by_itself_is_waited_for_once() {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let queue = Queue::open(&QueueUrl::Postgres(url.clone())).unwrap();
    queue.migrate().await.unwrap();
    let of_batch = |number| upload_of(&photo(number), &format!("of a batch {number}"));
    queue.accept(of_batch(100)).await.unwrap();
    let mut operator = PgConnection::connect(&url).await.unwrap();
    // several together are refused, as if one was to blame; the first is taken by itself, and then nothing is answered any more
    let hurt = "CREATE FUNCTION hurt() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF (SELECT count(*) FROM come) > 1 THEN RAISE EXCEPTION 'one is to blame' USING ERRCODE = '22000'; END IF;
            IF NOT EXISTS (SELECT FROM come WHERE upload_id = 'of a batch 0') THEN PERFORM pg_sleep(60); END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER hurt AFTER INSERT ON uploads REFERENCING NEW TABLE AS come
            FOR EACH STATEMENT EXECUTE FUNCTION hurt()";
    sqlx::raw_sql(hurt).execute(&mut operator).await.unwrap();
    let first = async {
        let first = queue.accept(of_batch(0)).await.unwrap();
        (first.new, queue.check().await.is_ok())
    };
    let (first, others) = join(first, join_all((1..20).map(|number| queue.accept(of_batch(number))))).await;
    assert_eq!(first, (true, true), "the first is told of its commit before the next are tried");
    let others: Vec<String> = others.into_iter().map(|answer| answer.unwrap_err().to_string()).collect();
    let waited = others.iter().filter(|answer| answer.contains("did not commit within 2 s")).count();
    let told = others.iter().filter(|answer| answer.contains("is away")).count();
    assert_eq!((waited, told), (1, 18), "{others:?}");
}

#[tokio::test]
async fn a_photo_that_the_queue_does_not_know_is_adopted_once() {
    let site = Site::start(&[]).await;
    let known = site.accept("cam-1", &photo(1)).await.upload;
    let mut orphan = (*known).clone();
    orphan.id = forebay::upload::UploadId::new();
    site.spool.store(std::sync::Arc::new(orphan.clone()), photo(1)).await.unwrap();
    let first = adopt(&site.spool, &site.queue, None, |_| {}).await.unwrap();
    assert_eq!((first.photos, first.adopted, first.damaged), (2, 1, 0));
    assert_eq!(*site.queue.get(orphan.id).await.unwrap().unwrap().upload, orphan);
    assert_eq!(adopt(&site.spool, &site.queue, None, |_| {}).await.unwrap().adopted, 0);
}

#[tokio::test]
async fn a_look_for_orphans_opens_only_photos_that_were_written_in_its_time() {
    let site = Site::start(&[]).await;
    let hours_ago = |hours: u64| SystemTime::now() - Duration::from_secs(hours * 3600);
    let written_then = upload_of(&photo(1), "then");
    site.spool.store(written_then.clone(), photo(1)).await.unwrap();
    let file = File::options().write(true).open(site.spool.path(written_then.id)).unwrap();
    file.set_modified(hours_ago(2)).unwrap();
    // whoever opens it to read waits for a writer
    let written_now = site.spool.path(upload_of(&photo(2), "now").id);
    mkfifoat(CWD, &written_now, Mode::RUSR | Mode::WUSR).unwrap();
    let look = adopt(&site.spool, &site.queue, Some((hours_ago(3), hours_ago(1))), |_| {});
    let looked = timeout(Duration::from_secs(20), look).await;
    // lets go of who waits, so that the test ends
    let _both = File::options().read(true).write(true).open(&written_now).unwrap();
    let looked = looked.expect("nobody opens what was written now").unwrap();
    assert_eq!((looked.photos, looked.adopted, looked.damaged), (1, 1, 0));
}

/// The queue of a stopped appliance is lost, and made anew.
async fn a_lost_queue_is_rebuilt(postgres: bool) {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    // nothing leaves while the queue is lost
    settings.push(("FOREBAY_UPLINK_RATE".into(), "8kbit/s".into()));
    let new_queue = async |settings: &mut Vec<(String, String)>| {
        if postgres {
            settings.retain(|(name, _)| name != "FOREBAY_QUEUE_URL");
            let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
            settings.push(("FOREBAY_QUEUE_URL".into(), url));
        }
    };
    new_queue(&mut settings).await;
    let data = folder.path().join("data");
    let program = Program::start("serve", &settings, &data).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for n in 0..5 {
        let mut body = json_upload("cam-1", Some(&n.to_string()), &photo(n));
        body["metadata"] = serde_json::json!({"number": n.to_string()});
        body["priority"] = "high".into();
        let request = client.post(&program.url).header("content-type", "application/json").body(body.to_string());
        assert_eq!(request.send().await.unwrap().status(), 201);
    }
    assert!(program.terminate().await);
    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    let list = async |settings: &[(String, String)]| {
        let listed = run(&["list", "--json"], settings, folder.path()).await;
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["upload"].clone()).collect::<Vec<_>>()
    };
    let before = list(&settings).await;
    assert_eq!(before.len(), 5);

    new_queue(&mut settings).await;
    for file in ["queue.sqlite", "queue.sqlite-wal", "queue.sqlite-shm"] {
        let _ = std::fs::remove_file(data.join(file));
    }
    let rebuilt = run(&["rebuild"], &settings, folder.path()).await;
    let said = String::from_utf8_lossy(&rebuilt.stdout).into_owned();
    assert!(rebuilt.status.success() && said.starts_with("5 photos on disk, 5 of them"), "{said}");
    assert_eq!(list(&settings).await, before, "every field of every record");
    let verified = run(&["verify", "--bytes"], &settings, folder.path()).await;
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_sqlite_queue_is_rebuilt_from_the_spool() {
    a_lost_queue_is_rebuilt(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_postgres_queue_is_rebuilt_from_the_spool() {
    a_lost_queue_is_rebuilt(true).await;
}

#[tokio::test]
async fn a_journaled_retry_of_an_upload_that_was_uploaded_and_removed_leaves_no_photo_behind() {
    let site = Site::start(&[]).await;
    let upload = site.accept("cam-1", &photo(1)).await.upload;
    let lease =
        site.queue.claim("drain", 1, Duration::from_secs(60), forebay::queue::Pick::Oldest).await.unwrap().remove(0);
    site.queue.finish(&lease).await.unwrap();
    site.spool.remove(upload.clone()).await.unwrap();
    site.queue.removed(&[upload.id]).await.unwrap();
    // the retry, while the queue is away
    site.spool.store(upload.clone(), photo(1)).await.unwrap();
    site.spool.journal(upload.clone()).await.unwrap();
    assert!(!forebay::keeper::take_in(&site.spool, &site.queue, upload).await.unwrap());
    assert_eq!((site.files().await, site.spool.journaled(10).await.unwrap().len()), ((0, 0), 0));
    assert_eq!(site.records().await.len(), 1);
}

#[tokio::test]
async fn an_acknowledged_photo_is_not_removed_for_another_that_had_its_upload_id() {
    let site = Site::start(&[]).await;
    assert_eq!(site.post_json(json_upload("cam-1", Some("42"), &photo(1)).to_string()).await.status, 201);
    let first = site.records().await.remove(0).upload;
    let lease =
        site.queue.claim("drain", 1, Duration::from_secs(60), forebay::queue::Pick::Oldest).await.unwrap().remove(0);
    site.queue.finish(&lease).await.unwrap();
    site.spool.remove(first.clone()).await.unwrap(); // and then the keeper died, before its record said so
    let mut other = (*first).clone();
    (other.sha256, other.size_bytes) = (forebay::upload::Sha256::of(&photo(2)), photo(2).len() as u64);
    let other = std::sync::Arc::new(other);
    site.spool.store(other.clone(), photo(2)).await.unwrap();
    site.spool.journal(other.clone()).await.unwrap();

    let stop = tokio_util::sync::CancellationToken::new();
    let keeper = forebay::keeper::Keeper::new(&site.config, site.spool.clone(), site.queue.clone());
    let stopped = stop.clone();
    let kept = tokio::spawn(async move { keeper.run(stopped).await });
    eventually("the journal to be empty", async || site.spool.journaled(10).await.unwrap().is_empty().then_some(()))
        .await;
    stop.cancel();
    kept.await.unwrap();
    let digests: Vec<_> = site.records().await.iter().map(|r| r.upload.sha256).collect();
    assert!(digests.contains(&first.sha256) && digests.contains(&other.sha256), "{digests:?}");
    assert_eq!(site.files().await, (1, 0));
}

#[tokio::test]
async fn two_acknowledged_photos_under_one_upload_id_are_both_kept() {
    let site = Site::start(&[]).await;
    let answer = site.post_json(json_upload("cam-1", Some("42"), &photo(1)).to_string()).await;
    let first = site.records().await.remove(0).upload;
    assert_eq!(answer.status, 201);
    site.spool.remove(first.clone()).await.unwrap(); // uploaded and removed, so that the spool cannot tell
    let mut other = (*first).clone();
    (other.sha256, other.size_bytes) = (forebay::upload::Sha256::of(&photo(2)), photo(2).len() as u64);
    let other = std::sync::Arc::new(other);
    site.spool.store(other.clone(), photo(2)).await.unwrap();
    forebay::keeper::take_in(&site.spool, &site.queue, other.clone()).await.unwrap();
    // a crash before the journal was told: the same once more makes no third
    site.spool.store(other.clone(), photo(2)).await.unwrap();
    forebay::keeper::take_in(&site.spool, &site.queue, other.clone()).await.unwrap();
    assert_eq!(site.records().await.len(), 2);
    let digests: Vec<_> = site.records().await.iter().map(|r| r.upload.sha256).collect();
    assert!(digests.contains(&first.sha256) && digests.contains(&other.sha256), "{digests:?}");
    assert_eq!(site.files().await, (1, 0));
    // the same crash, and what was renamed was uploaded and removed before the journal was looked at again
    let leases = site.queue.claim("drain", 2, Duration::from_secs(60), forebay::queue::Pick::Oldest).await.unwrap();
    let renamed = leases.iter().find(|lease| lease.upload.sha256 == other.sha256).unwrap();
    site.queue.finish(renamed).await.unwrap();
    site.spool.remove(renamed.upload.clone()).await.unwrap();
    site.queue.removed(&[renamed.upload.id]).await.unwrap();
    site.spool.store(other.clone(), photo(2)).await.unwrap();
    forebay::keeper::take_in(&site.spool, &site.queue, other).await.unwrap();
    assert_eq!((site.records().await.len(), site.files().await), (2, (0, 0)));
}
