//! Whether everything agrees after the appliance was treated roughly: spool, queue, bucket, and the devices' own ledger.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::program::{Program, run};
use super::site::Answer;
use super::{PATIENCE, eventually};

/// What `/status` of a running program says.
pub async fn status(program: &Program) -> Value {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    Answer::of(client.get(format!("{}/status", program.console)).send().await.unwrap()).await.body
}

/// Puts into the queue what died between the disk and the queue; it would be adopted after a minute. What was said of it.
pub async fn rebuild(settings: &[(String, String)], data: &Path) -> String {
    let rebuilt = run(&["rebuild"], &with_data_dir(settings, data), data).await;
    assert!(rebuilt.status.success(), "{rebuilt:?}");
    String::from_utf8_lossy(&rebuilt.stdout).into_owned()
}

/// Waits until all that was accepted is in the queue, and all that is in the queue is uploaded.
pub async fn backlog_gone(program: &Program, data: &Path) {
    let began = Instant::now();
    loop {
        // first the journal: what is taken in after a look at it would be missed in the books
        let journaled = std::fs::read_dir(data.join("spool/journal")).unwrap().count();
        let status = status(program).await;
        let uploaded = status["books"]["uploaded"]["uploads"].as_u64();
        if journaled == 0 && status["backlog"]["uploads"] == 0 && uploaded > Some(0) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "the backlog is not gone: {journaled} in the journal, {status}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the disk holds no photo any more, as it should when all are uploaded and none is retained.
pub async fn disk_empty(data: &Path) {
    eventually("every photo to leave the disk", async || {
        let folders = (0..=255u8).map(|shard| data.join(format!("spool/{shard:02x}")));
        let photos: usize = folders.map(|folder| std::fs::read_dir(folder).unwrap().count()).sum();
        (photos == 0).then_some(())
    })
    .await;
}

/// Holds everything against everything, every byte of it; gives the report, in which nothing disagrees.
pub async fn everything_agrees(settings: &[(String, String)], data: &Path, ledger: &str) -> Value {
    let report = verify(settings, data, ledger).await;
    assert_eq!(report["disagreements"], 0, "{report}");
    assert_eq!((report["lost"].as_u64(), report["dead"].as_u64()), (Some(0), Some(0)), "{report}");
    assert_eq!(report["other_objects"], 0, "no object that nobody knows: {report}");
    report
}

/// What `forebay verify` says of every byte.
pub async fn verify(settings: &[(String, String)], data: &Path, ledger: &str) -> Value {
    let verify = ["verify", "--bytes", "--json", "--ledger", ledger];
    let verified = run(&verify, &with_data_dir(settings, data), data).await;
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap_or_else(|_| panic!("{verified:?}"));
    assert_eq!(verified.status.success(), report["disagreements"] == 0, "{verified:?}");
    report
}

fn with_data_dir(settings: &[(String, String)], data: &Path) -> Vec<(String, String)> {
    let mut settings = settings.to_vec();
    settings.push(("FOREBAY_DATA_DIR".into(), data.display().to_string()));
    settings
}
