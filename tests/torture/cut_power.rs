//! The spool's disk loses its power again and again, right after acknowledgements: what was not synced is lost.

use std::time::{Duration, Instant};

use crate::Plan;
use crate::findings::Findings;
use crate::support::agreement::{backlog_gone, rebuild};
use crate::support::disk::Disk;
use crate::support::program::{Program, s3_settings};
use crate::support::{free_port, postgres, weed};

const DISK_BYTES: u64 = 600_000_000;

/// Half of the time on ext4, half on XFS; true when everything is as it must be.
pub async fn run(plan: &Plan) -> bool {
    let mut sound = true;
    for (name, disk) in [("ext4", Disk::ext4(DISK_BYTES)), ("XFS", Disk::xfs(DISK_BYTES))] {
        println!("torture: the power of an {name} is cut for {:?}", plan.duration / 2);
        sound &= on(disk, plan).await;
    }
    sound
}

async fn on(disk: Disk, plan: &Plan) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let (bucket, endpoint, name) = weed::bucket().await;
    let mut settings = s3_settings(&endpoint, &name);
    // the queue is elsewhere: its own syncs would make the spool's durable, too
    settings.push(("FOREBAY_QUEUE_URL".into(), tokio::task::spawn_blocking(postgres::database).await.unwrap()));
    settings.push(("FOREBAY_LISTEN".into(), format!("127.0.0.1:{}", free_port())));
    settings.push(("FOREBAY_UPLINK_RATE".into(), "1Gbit/s".into()));
    let data = disk.folder().join("data");
    let mut program = Program::start("serve", &settings, &data).await;
    let mut fleet = plan.fleet(&format!("{}/", program.url), folder.path());
    fleet.seconds /= 2;
    let ledger = fleet.ledger.clone();
    let sending = tokio::spawn(async move { String::from_utf8_lossy(&fleet.run().await.stdout).into_owned() });

    let mut findings = Findings::default();
    let began = Instant::now();
    while began.elapsed() < plan.duration / 2 {
        tokio::time::sleep(Duration::from_millis(rand::random_range(500..2500))).await;
        disk.shut_down();
        program.kill();
        let cut = Instant::now();
        disk.remount();
        program = Program::start("serve", &settings, &data).await;
        findings.kills.push(("power", cut.elapsed()));
    }
    findings.seconds = began.elapsed().as_secs();
    findings.fleet = sending.await.unwrap();
    rebuild(&settings, &data).await;
    backlog_gone(&program, &data).await;
    findings.hold(&ledger, &bucket, &settings, &data).await;
    drop(program);
    findings.are_sound()
}
