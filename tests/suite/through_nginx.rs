//! The production shape: devices, nginx with the repository's own configuration, three ingest replicas, one drain, Postgres, a
//! real S3 server.

use serde_json::Value;

use crate::support::nginx::Nginx;
use crate::support::program::{Program, run, s3_settings};
use crate::support::site::Answer;
use crate::support::{eventually, json_upload, photo, postgres, weed};

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_through_nginx_ends_in_the_bucket_and_its_ledger_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let mut settings = s3_settings(&endpoint, &name);
    settings.push(("FOREBAY_QUEUE_URL".into(), url));
    let data = folder.path().join("data");
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(Program::start("ingest", &settings, &data).await);
    }
    let drain = Program::start("drain", &settings, &data).await;
    let nginx = Nginx::start(&replicas.iter().map(Program::address).collect::<Vec<_>>()).await;

    let ledger = folder.path().join("devices.ledger").display().to_string();
    let simulated = run(
        &[
            "simulate",
            "--url",
            &nginx.url,
            "--devices",
            "50",
            "--per-minute",
            "60",
            "--for",
            "4s",
            "--photo-bytes",
            "20kB",
            "--ledger",
            &ledger,
        ],
        &[],
        folder.path(),
    )
    .await;
    assert!(simulated.status.success(), "{simulated:?}");
    eventually("the backlog to be gone", async || {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let status = Answer::of(client.get(format!("{}/status", drain.console)).send().await.unwrap()).await.body;
        (status["backlog"]["uploads"] == 0 && status["books"]["uploaded"]["uploads"].as_u64() >= Some(200))
            .then_some(())
    })
    .await;
    for replica in &replicas {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let metrics = client.get(format!("{}/metrics", replica.console)).send().await.unwrap().text().await.unwrap();
        assert!(metrics.contains("forebay_ingest_answers_total{status=\"201\"}"), "a replica got nothing");
    }

    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    let verified = run(&["verify", "--bytes", "--json", "--ledger", &ledger], &settings, folder.path()).await;
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert!(verified.status.success(), "{report}");
    assert_eq!(report["acknowledged"], report["verified"], "{report}");
    assert!(report["acknowledged"].as_u64() >= Some(200), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answers_of_ingest_come_through_as_they_are_and_nginx_makes_problems_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let url = tokio::task::spawn_blocking(postgres::database).await.unwrap();
    let replica = Program::start("ingest", &[("FOREBAY_QUEUE_URL".into(), url)], &folder.path().join("data")).await;
    let nginx = Nginx::start(&[replica.address()]).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = async |body: String| {
        let request = client.post(&nginx.url).header("content-type", "application/json").body(body);
        Answer::of(request.send().await.unwrap()).await
    };
    let accepted = post(json_upload("cam-1", None, &photo(1)).to_string()).await;
    assert_eq!(accepted.status, 201);
    assert!(accepted.location.unwrap().starts_with("/v1/uploads/"));
    let refused = post("no json".to_owned()).await;
    assert_eq!((refused.status, refused.problem()), (400, "malformed-body"));
    let beyond = post("x".repeat(17 * 1024 * 1024)).await;
    assert_eq!((beyond.status, beyond.problem()), (413, "too-large"));

    assert!(replica.terminate().await);
    let away = post(json_upload("cam-1", None, &photo(2)).to_string()).await;
    assert_eq!((away.status, away.problem()), (503, "unavailable"));
    assert!(away.retry_after.is_some());
}
