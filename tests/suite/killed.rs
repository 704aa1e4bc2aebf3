//! The appliance is killed outright, again and again, under a fleet that keeps its own ledger: whatever was acknowledged is
//! there, once, with the bytes that were sent.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::program::{Program, run, s3_settings};
use crate::support::site::Answer;
use crate::support::{eventually, free_port, postgres, weed};

/// Kills `serve` six times while devices send, then holds their ledger against everything.
async fn nothing_acknowledged_is_lost_by_kills(queue: Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.extend(queue.map(|url| ("FOREBAY_QUEUE_URL".to_owned(), url)));
    let address = format!("127.0.0.1:{}", free_port());
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
    everything_agrees(program, &settings, &data, &ledger).await;
}

async fn everything_agrees(program: Program, settings: &[(String, String)], data: &Path, ledger: &str) {
    let mut settings = settings.to_vec();
    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    // what died between the disk and the queue would be adopted after a minute
    let rebuilt = run(&["rebuild"], &settings, data).await;
    assert!(rebuilt.status.success(), "{rebuilt:?}");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    eventually("the backlog to be gone", async || {
        let status = Answer::of(client.get(format!("{}/status", program.console)).send().await.unwrap()).await.body;
        (status["backlog"]["uploads"] == 0 && status["books"]["uploaded"]["uploads"].as_u64() > Some(0)).then_some(())
    })
    .await;
    let verified = run(&["verify", "--bytes", "--json", "--ledger", ledger], &settings, data).await;
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert!(verified.status.success(), "{report}");
    assert_eq!((report["lost"].as_u64(), report["dead"].as_u64()), (Some(0), Some(0)), "{report}");
    assert!(report["acknowledged"].as_u64() >= Some(400), "{report}");
    assert_eq!(report["other_objects"], 0, "no object that nobody knows: {report}");
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
