//! The load by which the program that is released is trained: it counts what it does under it, and the compiler lays the next
//! build out by those counts (`release/build`).
//!
//! Always: what a site does, on both queues and in all roles, at its usual pace for most of the photos; each program ends in order,
//! as that is when it writes its counts. Never: anything measured.

use std::time::Duration;

use crate::footprint::at_the_sites_rate;
use crate::load::{self, Bodies, Load};
use crate::support::postgres::Cluster;
use crate::support::program::{Program, s3_settings};
use crate::support::weed;

/// Most of the photos come in these, as a site's devices send them.
const AT_THE_SITES_RATE: Duration = Duration::from_secs(24);
/// Some of each kind of body, faster.
const OF_EACH_KIND: Load = Load { connections: 32, seconds: 2, per_second: Some(100.0) };

/// The parts of a multipart body up to its photo.
const BEFORE_THE_PHOTO: &[u8] = b"--part\r\nContent-Disposition: form-data; name=\"device_id\"\r\n\r\ncam-0001\r\n\
    --part\r\nContent-Disposition: form-data; name=\"image\"; filename=\"photo.jpg\"\r\nContent-Type: image/jpeg\r\n\r\n";

pub async fn run_all(bodies: &Bodies) {
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(200)).await.expect("Postgres starts");
    let store = tokio::task::spawn_blocking(|| weed::Server::start("127.0.0.1", None)).await.expect("weed starts");
    let parts = tempfile::tempdir().expect("a folder for bodies");
    let multipart = vec![parts.path().join("multipart")];
    let photo = std::fs::read(&bodies.raw[0]).expect("a photo");
    std::fs::write(&multipart[0], [BEFORE_THE_PHOTO, &photo, b"\r\n--part--\r\n"].concat()).expect("a body is written");
    for (roles, queue) in [(&["ingest", "drain"][..], Some(cluster.database())), (&["serve"], None)] {
        let kind = if queue.is_some() { "Postgres" } else { "SQLite" };
        println!("training: {} on {kind}", roles.join(" and "));
        let (_, bucket) = store.bucket().await;
        let mut settings = s3_settings(&store.endpoint, &bucket);
        settings.extend(queue.map(|url| ("FOREBAY_QUEUE_URL".to_owned(), url)));
        let folder = tempfile::tempdir().expect("a folder for the data");
        if kind == "Postgres" {
            crate::migrate(&settings, folder.path()).await;
        }
        let mut programs = Vec::new();
        for role in roles {
            programs.push(Program::start(role, &settings, &folder.path().join("data")).await);
        }
        // the counting build is slower, and how fast it is does not matter
        at_the_sites_rate(&programs[0].url, AT_THE_SITES_RATE, &["--no-thresholds"]).await;
        for (kind, files) in [
            ("application/json", &bodies.json),
            ("image/jpeg", &bodies.raw),
            ("multipart/form-data; boundary=part", &multipart),
        ] {
            let seen = load::send("POST", &format!("{}/", programs[0].url), kind, files, OF_EACH_KIND).await;
            assert!(seen.refused + seen.broken == 0, "{seen:?}");
        }
        for program in programs {
            assert!(program.terminate().await, "it ends in order");
        }
        crate::verified(&settings, &folder.path().join("data")).await;
    }
}
