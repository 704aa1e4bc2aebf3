//! What the operator is told.

use forebay::console::{Parts, start_snapshots};
use forebay::pacer::Pacer;
use forebay::status::Condition;
use forebay::units::UnixMs;
use tokio_util::sync::CancellationToken;

use crate::support::site::Site;
use crate::support::{PATIENCE, photo};

#[tokio::test]
async fn while_the_drain_is_paused_the_forecast_counts_on_nothing_leaving() {
    let site = Site::start(&[]).await;
    let now = UnixMs::now();
    let paused = Condition::Paused { reason: "S3 is away".into(), since: now, until: now };
    let (condition, watched) = tokio::sync::watch::channel(paused);
    let parts = Parts {
        roles: vec!["drain"],
        queue: site.queue.clone(),
        spool: site.spool.clone(),
        uplink: site.config.uplink,
        when_full: site.config.when_full,
        drain: Some((Pacer::new(site.config.uplink.allowance()), watched)),
    };
    let stop = CancellationToken::new();
    let mut snapshots = start_snapshots(parts, stop.clone()).await;
    // far below the allowance, so that only the pause makes the backlog grow
    site.accept("cam-1", &photo(1)).await;
    let grows = snapshots
        .wait_for(|status| status.arriving.bytes_per_second > 0.0 && status.forecast.full_in_seconds.is_some());
    let status = tokio::time::timeout(PATIENCE, grows).await.expect("a forecast that grows").unwrap().clone();
    assert_eq!(status.forecast.growth_bytes_per_second, status.arriving.bytes_per_second);
    assert_eq!((status.books.accepted.uploads, status.backlog.uploads), (1, 1));
    drop((condition, stop));
}
