//! The appliance is killed outright, again and again, under a fleet that keeps its own ledger: whatever was acknowledged is
//! there, once, with the bytes that were sent.

use std::time::Duration;

use crate::support::agreement::rebuild;
use crate::support::fleet::Fleet;
use crate::support::program::{Program, s3_settings};
use crate::support::{free_port, postgres, weed};

/// Kills `serve` six times while devices send, then holds their ledger against everything.
async fn nothing_acknowledged_is_lost_by_kills(queue: Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (_bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    settings.extend(queue.map(|url| ("FOREBAY_QUEUE_URL".to_owned(), url)));
    let address = format!("127.0.0.1:{}", free_port());
    settings.push(("FOREBAY_LISTEN".into(), address.clone()));
    let data = folder.path().join("data");
    let fleet = Fleet {
        url: format!("http://{address}/"),
        devices: 40,
        per_minute: 120,
        seconds: 10,
        photo_bytes: 20_000,
        ledger: folder.path().join("devices.ledger"),
    };

    let mut program = Program::start("serve", &settings, &data).await;
    let killing = async {
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(rand::random_range(500..1500))).await;
            drop(program); // SIGKILL
            program = Program::start("serve", &settings, &data).await;
        }
        program
    };
    let (_, program) = tokio::join!(fleet.send(), killing);
    rebuild(&settings, &data).await;
    fleet.agrees_with(&program, &settings, &data).await;
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
