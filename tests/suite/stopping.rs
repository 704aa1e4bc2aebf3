//! Processes that are told to stop in the midst of their work finish it or give it back, and another takes over at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forebay::allowance::End;
use forebay::config::{Endpoint, QueueUrl};
use forebay::crash_points::{Action, Armed, Point};
use forebay::queue::Queue;
use rustix::process::Signal;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::agreement::status;
use crate::support::program::{Program, run, s3_settings};
use crate::support::{eventually, json_upload, photo, postgres, weed};

async fn is(program: &Program, condition: &str) {
    eventually(&format!("a drain to be {condition}"), async || {
        (status(program).await["drain"]["condition"]["is"] == condition).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_stopped_in_mid_upload_gives_back_what_it_has_and_another_pours_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let (bucket, endpoint, name) = weed::bucket().await;
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let mut settings = s3_settings(&endpoint, &name);
    settings.push(("FOREBAY_QUEUE_URL".into(), url.clone()));
    let at_rate = |rate: &str| [&settings[..], &[("FOREBAY_UPLINK_RATE".into(), rate.to_owned())]].concat();

    let ingest = Program::start("ingest", &settings, &data).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for number in 0..12 {
        let body = json_upload("cam-1", None, &[photo(number), vec![0; 40_000]].concat()).to_string();
        let request = client.post(&ingest.url).header("content-type", "application/json").body(body);
        assert_eq!(request.send().await.unwrap().status(), 201);
    }
    // 20 kB a second for the eight that are on their way: none of them is through within the time there is to stop
    let leading = Program::start("drain", &at_rate("800kbit/s"), &data).await;
    is(&leading, "pouring").await;
    let other = Program::start("drain", &at_rate("8Mbit/s"), &data).await;
    is(&other, "standby").await;
    eventually("eight uploads to be on their way", async || {
        (status(&leading).await["books"]["uploading"]["uploads"] == 8).then_some(())
    })
    .await;

    let owner = format!("{}-%", leading.pid());
    let told = Instant::now();
    assert!(leading.terminate().await, "it exits with 0");
    assert!(told.elapsed() < Duration::from_secs(10), "container runtimes kill after ten seconds");
    let stopped = Instant::now();
    let mut queue = PgConnection::connect(&url).await.unwrap();
    let (kept,): (i64,) = sqlx::query_as("SELECT count(*) FROM uploads WHERE lease_owner LIKE $1")
        .bind(owner)
        .fetch_one(&mut queue)
        .await
        .unwrap();
    assert_eq!(kept, 0, "its leases are given back");
    is(&other, "pouring").await;
    assert!(
        stopped.elapsed() < Duration::from_secs(4),
        "the lead is given back, too: it would run out after eight seconds"
    );

    eventually("all to be uploaded", async || {
        (status(&other).await["books"]["uploaded"]["uploads"] == 12).then_some(())
    })
    .await;
    let mut objects = 0;
    bucket.list("", |_| objects += 1).await.unwrap();
    assert_eq!(objects, 12, "each is one object");
    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    let verified = run(&["verify", "--bytes", "--json"], &settings, folder.path()).await;
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert!(verified.status.success() && report["verified"] == 12, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_that_is_stopped_closes_its_door_and_finishes_the_photo_that_is_half_in() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let program = Program::start("ingest", &[("FOREBAY_QUEUE_URL".into(), url)], &data).await;
    let address = program.address();

    let mut kept_alive = TcpStream::connect(&address).await.unwrap();
    let ready = "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n";
    assert!(said(&mut kept_alive, ready).await.starts_with("HTTP/1.1 200 "));

    let body = json_upload("cam-1", None, &photo(1)).to_string();
    let (half, other_half) = body.split_at(body.len() / 2);
    let head = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        body.len()
    );
    let mut device = TcpStream::connect(&address).await.unwrap();
    assert!(said(&mut device, &head).await.starts_with("HTTP/1.1 100 "), "it wants the body");
    device.write_all(half.as_bytes()).await.unwrap();

    program.signal(Signal::TERM);
    eventually("the door to be closed", async || TcpStream::connect(&address).await.err()).await;
    let answer = said(&mut kept_alive, ready).await;
    assert!(answer.is_empty() || answer.contains("urn:forebay:problem:stopping"), "{answer}");
    let answer = said(&mut device, other_half).await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    assert!(program.ends_well().await, "it exits with 0");
    let spool = forebay::spool::Spool::open(&data, crate::support::NO_LIMITS).unwrap();
    let mut photos = Vec::new();
    spool.walk(|_, record| photos.push(record.unwrap().sha256)).unwrap();
    assert_eq!(photos, [forebay::upload::Sha256::of(&photo(1))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_that_is_stopped_finishes_the_photo_whose_device_has_hung_up() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let stall = Armed { point: Point::SpoolStored, action: Action::Stall(Duration::from_secs(1)), at: 1 };
    let settings = [("FOREBAY_QUEUE_URL".into(), url.clone()), ("FOREBAY_CRASH_POINTS".into(), stall.to_string())];
    let program = Program::start("ingest", &settings, &data).await;

    let body = json_upload("cam-1", None, &photo(1)).to_string();
    let head = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut device = TcpStream::connect(&program.address()).await.unwrap();
    device.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let reached = |line: &Value| line["message"] == "crash point reached";
    eventually("the photo to be on disk", async || program.log().iter().any(reached).then_some(())).await;
    drop(device);
    assert!(program.terminate().await, "it exits with 0");
    let mut queue = PgConnection::connect(&url).await.unwrap();
    let (kept,): (i64,) = sqlx::query_as("SELECT count(*) FROM uploads").fetch_one(&mut queue).await.unwrap();
    assert_eq!(kept, 1, "what was begun is in the queue too");
}

/// Sends `text`; what is answered, or nothing when the connection is closed.
async fn said(stream: &mut TcpStream, text: &str) -> String {
    let mut answer = vec![0; 4096];
    let read = match stream.write_all(text.as_bytes()).await {
        Ok(()) => tokio::time::timeout(crate::support::PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap_or(0),
        Err(_) => 0,
    };
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

/// A store that takes what it is sent, never answers, and counts the bytes.
async fn greedy_store() -> (Endpoint, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let endpoint = Endpoint { url, access_key: "a".to_owned(), secret_key: "b".to_owned() };
    let taken = Arc::new(AtomicU64::new(0));
    let counted = taken.clone();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                let mut bytes = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = connection.read(&mut bytes).await {
                    counted.fetch_add(read as u64, Ordering::Relaxed);
                }
            });
        }
    });
    (endpoint, taken)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_stopping_heeds_a_pause() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, taken) = greedy_store().await;
    let mut settings = s3_settings(&endpoint, "photos");
    // 100 kB a second, so that the photo takes longer than there is to stop
    settings.push(("FOREBAY_UPLINK_RATE".into(), "4Mbit/s".into()));
    let mut serve = Program::start("serve", &settings, folder.path()).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json_upload("cam-1", None, &[photo(1), vec![0; 3_000_000]].concat()).to_string();
    let request = client.post(&serve.url).header("content-type", "application/json").body(body);
    assert_eq!(request.send().await.unwrap().status(), 201);
    let taken = || taken.load(Ordering::Relaxed);
    eventually("a photo to be on its way", async || (taken() > 50_000).then_some(())).await;

    serve.signal(Signal::TERM);
    let queue = Queue::open(&QueueUrl::Sqlite(folder.path().join("queue.sqlite"))).unwrap();
    queue.set_pause("anna", End::Never).await.unwrap();
    // until it has ended, or for twice the time that a pause may take to be heard
    let told = Instant::now();
    let (mut bytes, mut last) = (taken(), told);
    while last.elapsed() < Duration::from_secs(2) && serve.ended().is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if taken() != bytes {
            (bytes, last) = (taken(), Instant::now());
        }
    }
    assert!(last - told < Duration::from_secs(6), "bytes left until its time to stop was over");
}
