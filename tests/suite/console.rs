//! What the operator is told.

use std::time::Duration;

use forebay::allowance::{Control, Standing};
use forebay::console::{Parts, start_snapshots};
use forebay::drain::steering;
use forebay::pacer::Pacer;
use forebay::status::Condition;
use forebay::units::{Rate, UnixMs};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::support::site::Site;
use crate::support::{PATIENCE, photo};

#[tokio::test]
async fn while_the_drain_is_paused_the_forecast_counts_on_nothing_leaving() {
    // so little that one photo fills it in time, however large the disk is
    let site = Site::start(&[("spool-max", "1MB")]).await;
    let now = UnixMs::now();
    let paused = Condition::Paused { reason: "S3 is away".into(), since: now, until: now };
    let (condition, watched) = watch::channel(paused);
    let control = Control::default();
    let standing = Standing { in_force: site.config.uplink.in_force(now, &control), control };
    let (looking, looks) = watch::channel(steering::look(&site.queue).await);
    let (steered, standing) = watch::channel(standing);
    let stop = CancellationToken::new();
    tokio::spawn(steering::steer(
        None,
        site.queue.clone(),
        site.config.uplink.clone(),
        looking,
        steered,
        stop.clone().cancelled_owned(),
    ));
    let parts = Parts {
        roles: vec!["drain"],
        queue: site.queue.clone(),
        looks,
        spool: site.spool.clone(),
        uplink: site.config.uplink.clone(),
        when_full: site.config.when_full,
        retain: Duration::ZERO,
        standing,
        drain: Some((Pacer::new(Rate(5_000_000)), watched)),
    };
    let mut snapshots = start_snapshots(parts, stop.clone()).await;
    // far below the allowance, so that only the pause makes the backlog grow
    site.accept("cam-1", &photo(1)).await;
    let grows = snapshots
        .wait_for(|status| status.arriving.bytes_per_second > 0.0 && status.forecast.full_in_seconds.is_some());
    let status = tokio::time::timeout(PATIENCE, grows).await.expect("a forecast that grows").unwrap().clone();
    assert!(status.forecast.growth_bytes_per_second > 0.0, "{:?}", status.forecast);
    assert!(status.forecast.remedies.is_empty(), "no share helps against an outage");
    assert_eq!((status.books.accepted.uploads, status.backlog.uploads), (1, 1));
    drop((condition, stop));
}
