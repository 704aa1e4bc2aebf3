//! The appliance is killed outright, again and again, under a fleet that keeps its own ledger: whatever was acknowledged is
//! there, once, with the bytes that were sent.

use std::time::Duration;

use crate::support::agreement::{backlog_gone, everything_agrees, rebuild};
use crate::support::program::{Program, run, s3_settings};
use crate::support::{lasting_port, postgres, weed};

/// Kills `serve` six times while devices send, then holds their ledger against everything.
async fn nothing_acknowledged_is_lost_by_kills(queue: Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.extend(queue.map(|url| ("FOREBAY_QUEUE_URL".to_owned(), url)));
    let address = format!("127.0.0.1:{}", lasting_port());
    settings.push(("FOREBAY_LISTEN".into(), address.clone()));
    let data = folder.path().join("data");
    let ledger = folder.path().join("devices.ledger").display().to_string();
    let url = format!("http://{address}/");
    let fleet = [
        "simulate",
        "--url",
        &url,
        "--devices",
        "40",
        "--per-minute",
        "120",
        "--for",
        "10s",
        "--photo-bytes",
        "20kB",
        "--ledger",
        &ledger,
    ];

    let mut program = Program::start("serve", &settings, &data).await;
    let killing = async {
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(rand::random_range(500..1500))).await;
            drop(program); // SIGKILL
            program = Program::start("serve", &settings, &data).await;
        }
        program
    };
    let (simulated, program) = tokio::join!(run(&fleet, &[], folder.path()), killing);
    let said = String::from_utf8_lossy(&simulated.stdout).into_owned();
    assert!(simulated.status.success(), "every photo is acknowledged in the end: {said}");
    rebuild(&settings, &data).await;
    backlog_gone(&program, &data).await;
    let report = everything_agrees(&settings, &data, &ledger).await;
    assert!(report["acknowledged"].as_u64() >= Some(400), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_serve_is_killed_on_sqlite() {
    nothing_acknowledged_is_lost_by_kills(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_serve_is_killed_on_postgres() {
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    nothing_acknowledged_is_lost_by_kills(Some(url)).await;
}
