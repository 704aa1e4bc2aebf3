//! How little of the machine it takes: idle, at the site's own rate, with a thousand slow devices at once, and with as many
//! that keep their connection.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, Semaphore};

use crate::leftovers::Leftovers;
use crate::load::Bodies;
use crate::machine::{cpu, memory};
use crate::report::{Contestant, Measured, Report, Target};
use crate::support::postgres::Cluster;
use crate::support::process::guarded;
use crate::support::program::{Program, s3_settings};
use crate::support::{agreement, weed};
use crate::{Plan, settle};

const DEVICES: usize = 1000;
/// What a slow device sends in a second.
const SLOW_BYTES: usize = 10_000;
/// How often it sends a piece of that.
const PIECE_EVERY: Duration = Duration::from_millis(500);
/// Devices that send at once, of those that keep their connection.
const AT_ONCE: usize = 32;
const IDLE: Duration = Duration::from_secs(10);

pub async fn run_all(plan: &Plan, bodies: &Bodies, leftovers: &mut Leftovers, report: &mut Report) {
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    idle(plan, &store, report).await;
    // it deletes hundreds of photos, and those after it thousands
    what_a_site_costs(plan, &store, leftovers, report).await;
    slow(plan, &store, bodies, report).await;
    kept_alive(plan, &store, bodies, report).await;
}

async fn serve(store: &weed::Server, more: &[(&str, &str)]) -> (Program, TempDir, Vec<(String, String)>) {
    let (_, bucket) = store.bucket().await;
    let mut settings = s3_settings(&store.endpoint, &bucket);
    settings.extend(more.iter().map(|(name, text)| (name.to_string(), text.to_string())));
    let folder = tempfile::tempdir().expect("a folder for the data");
    let program = Program::start("serve", &settings, &folder.path().join("data")).await;
    (program, folder, settings)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0 / 1024.0
}

fn of_forebay(what: &str, unit: &str, rounds: Vec<f64>, target: Target) -> Measured {
    let contestants = vec![Contestant { name: "forebay".to_owned(), rounds }];
    Measured { what: what.to_owned(), unit: unit.to_owned(), contestants, targets: vec![target] }
}

async fn idle(plan: &Plan, store: &weed::Server, report: &mut Report) {
    let (mut held, mut used) = (Vec::new(), Vec::new());
    for round in 0..plan.rounds {
        plan.tell(round, "serve has nothing to do");
        let (program, _folder, _) = serve(store, &[]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = cpu(program.pid());
        tokio::time::sleep(IDLE).await;
        held.push(mib(memory(program.pid()).0));
        used.push((cpu(program.pid()) - before).as_secs_f64() * 100.0 / IDLE.as_secs_f64());
    }
    report.add(of_forebay("Memory of serve, idle", "MiB", held, Target::AtMost(40.0)));
    report.add(of_forebay("Processor time of serve, idle", "% of a core", used, Target::AtMost(1.0)));
}

async fn slow(plan: &Plan, store: &weed::Server, bodies: &Bodies, report: &mut Report) {
    let body = Arc::new(std::fs::read(&bodies.json[0]).expect("a body"));
    let mut held = Vec::new();
    for round in 0..plan.rounds {
        plan.tell(round, &format!("{DEVICES} devices send to serve at {} kB/s each", SLOW_BYTES / 1000));
        let (program, folder, settings) = serve(store, &[("FOREBAY_UPLINK_RATE", "10Gbit/s")]).await;
        let begin = Arc::new(Barrier::new(DEVICES));
        let mut devices = tokio::task::JoinSet::new();
        for _ in 0..DEVICES {
            devices.spawn(slow_device(program.address(), body.clone(), begin.clone()));
        }
        let refused: Vec<String> =
            devices.join_all().await.into_iter().filter(|answer| !answer.starts_with("HTTP/1.1 201 ")).collect();
        assert_eq!(refused, [""; 0], "all are acknowledged");
        held.push(mib(memory(program.pid()).1));
        agreement::backlog_gone(&program, &folder.path().join("data")).await;
        drop(program);
        crate::verified(&settings, &folder.path().join("data")).await;
        settle().await;
    }
    let what = format!("Memory of serve at most, {DEVICES} devices at once at 10 kB/s each");
    report.add(of_forebay(&what, "MiB", held, Target::AtMost(128.0)));
}

/// Devices that send a photo as fast as it goes, some at once, and keep their connection.
async fn kept_alive(plan: &Plan, store: &weed::Server, bodies: &Bodies, report: &mut Report) {
    let body = Arc::new(std::fs::read(&bodies.json[0]).expect("a body"));
    let mut held = Vec::new();
    for round in 0..plan.rounds {
        plan.tell(round, &format!("{DEVICES} devices send a photo each, and keep their connection"));
        let (program, folder, settings) = serve(store, &[("FOREBAY_UPLINK_RATE", "10Gbit/s")]).await;
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let mut devices = tokio::task::JoinSet::new();
        for _ in 0..DEVICES {
            let (address, body, places) = (program.address(), body.clone(), places.clone());
            devices.spawn(async move {
                let _place = places.acquire().await.expect("it is never closed");
                let mut stream = TcpStream::connect(&address).await.expect("a connection");
                let answer = send(&mut stream, &address, &body, body.len(), Duration::ZERO).await.expect("an answer");
                assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
                stream
            });
        }
        let connections = devices.join_all().await;
        agreement::backlog_gone(&program, &folder.path().join("data")).await;
        held.push(mib(memory(program.pid()).0));
        drop((connections, program));
        crate::verified(&settings, &folder.path().join("data")).await;
        settle().await;
    }
    let what = format!("Memory of serve, {DEVICES} connections idle after a photo each");
    report.add(of_forebay(&what, "MiB", held, Target::AtMost(128.0)));
}

/// One photo in small pieces; what was answered, or why nothing was.
async fn slow_device(address: String, body: Arc<Vec<u8>>, begin: Arc<Barrier>) -> String {
    let mut stream = TcpStream::connect(&address).await.expect("a connection");
    begin.wait().await;
    let piece_bytes = SLOW_BYTES * PIECE_EVERY.as_millis() as usize / 1000;
    send(&mut stream, &address, &body, piece_bytes, PIECE_EVERY).await.unwrap_or_else(|error| error.to_string())
}

/// Sends a photo, a piece `every` so long; what was answered.
async fn send(
    stream: &mut TcpStream,
    address: &str,
    body: &[u8],
    piece_bytes: usize,
    every: Duration,
) -> std::io::Result<String> {
    let head = format!(
        "POST / HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    let began = Instant::now();
    for (n, piece) in body.chunks(piece_bytes).enumerate() {
        tokio::time::sleep_until((began + every * n as u32).into()).await;
        stream.write_all(piece).await?;
    }
    let mut answer = [0; 1024];
    let read = stream.read(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer[..read]).into_owned())
}

/// A thousand devices with two photos a minute each, by k6, for so long; all are acknowledged. `more` is for k6.
pub async fn at_the_sites_rate(url: &str, span: Duration, more: &[&str]) {
    let mut k6 = guarded(concat!(env!("CARGO_MANIFEST_DIR"), "/loadtest/run"), "TERM", None);
    k6.env("URL", format!("{url}/")).env("DURATION", format!("{}s", span.as_secs())).args(more);
    let done = tokio::task::spawn_blocking(move || k6.output()).await.expect("k6 ends").expect("k6 runs");
    let said = [done.stdout, done.stderr].concat();
    assert!(done.status.success(), "k6: {}", String::from_utf8_lossy(&said));
}

/// Ingest and drain as processes of their own, so that each one's cost is seen, on Postgres; k6 is the fleet.
async fn what_a_site_costs(plan: &Plan, store: &weed::Server, leftovers: &mut Leftovers, report: &mut Report) {
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(200)).await.expect("Postgres starts");
    let seconds = (plan.seconds * 3).max(20);
    let (mut used, mut ingest_ms, mut drain_ms) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..plan.rounds {
        plan.tell(round, &format!("{DEVICES} devices with two photos a minute each, for {seconds} s"));
        let (_, bucket) = store.bucket().await;
        let mut settings = s3_settings(&store.endpoint, &bucket);
        settings.push(("FOREBAY_QUEUE_URL".to_owned(), cluster.database()));
        let folder = tempfile::tempdir().expect("a folder for the data");
        let data = folder.path().join("data");
        crate::migrate(&settings, folder.path()).await;
        let ingest = Program::start("ingest", &settings, &data).await;
        let drain = Program::start("drain", &settings, &data).await;
        let before = [cpu(ingest.pid()), cpu(drain.pid())];
        let began = Instant::now();
        at_the_sites_rate(&ingest.url, Duration::from_secs(seconds), &[]).await;
        let spent = [cpu(ingest.pid()) - before[0], cpu(drain.pid()) - before[1]];
        let took = began.elapsed().as_secs_f64();
        used.push((spent[0] + spent[1]).as_secs_f64() * 100.0 / took);
        ingest_ms.push(spent[0].as_secs_f64() * 1000.0 / took);
        drain_ms.push(spent[1].as_secs_f64() * 1000.0 / took);
        drop((ingest, drain));
        leftovers.keep(folder);
        settle().await;
    }
    leftovers.keep_cluster(cluster);
    let what = "Processor time of ingest and drain at the site's rate: 33.3 photos/s in, 5 MB/s out";
    report.add(of_forebay(what, "% of a core", used, Target::AtMost(5.0)));
    report.add(Measured {
        what: "The same for each of them".to_owned(),
        unit: "ms/s".to_owned(),
        contestants: vec![
            Contestant { name: "forebay ingest".to_owned(), rounds: ingest_ms },
            Contestant { name: "forebay drain".to_owned(), rounds: drain_ms },
        ],
        targets: vec![],
    });
}
