//! A drain at work in this process.

use std::time::Duration;

use forebay::bucket::Bucket;
use forebay::drain::Drain;
use forebay::keeper::Keeper;
use forebay::pacer::Pacer;
use forebay::queue::Record;
use forebay::status::Condition;
use forebay::units::Rate;
use forebay::upload::State;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::site::Site;
use super::{PATIENCE, eventually};

pub const FAST: Rate = Rate(1_000_000_000);

/// A drain at work; it stops when dropped.
pub struct Pouring {
    pub pacer: Pacer,
    pub condition: tokio::sync::watch::Receiver<Condition>,
    _stop: DropGuard,
}

/// With hardly any rest for uploads that failed.
pub fn pour(site: &Site, bucket: &Bucket, allowance: Rate) -> Pouring {
    pour_resting(site, bucket, allowance, Duration::from_millis(10))
}

pub fn pour_resting(site: &Site, bucket: &Bucket, allowance: Rate, rest: Duration) -> Pouring {
    let pacer = Pacer::new(allowance);
    let drain = Drain::new(site.spool.clone(), site.queue.clone(), bucket.clone(), pacer.clone()).resting(rest);
    let (condition, stop) = (drain.condition(), CancellationToken::new());
    let stopped = stop.clone();
    tokio::spawn(async move { drain.run(stopped, Duration::from_secs(1)).await });
    Pouring { pacer, condition, _stop: stop.drop_guard() }
}

/// A keeper at work; it stops when dropped.
pub fn keep_house(site: &Site) -> DropGuard {
    let stop = CancellationToken::new();
    let (keeper, stopped) = (Keeper::new(&site.config, site.spool.clone(), site.queue.clone()), stop.clone());
    tokio::spawn(async move { keeper.run(stopped).await });
    stop.drop_guard()
}

/// Waits until the drain pauses, and gives why.
pub async fn paused(pouring: &mut Pouring) -> Condition {
    let paused = pouring.condition.wait_for(|condition| matches!(condition, Condition::Paused { .. }));
    let paused = tokio::time::timeout(PATIENCE, paused).await.expect("the drain does not pause");
    paused.unwrap().clone()
}

/// Waits until an upload is in this state.
pub async fn in_state(site: &Site, record: &Record, state: State) -> Record {
    eventually(&format!("an upload to be {state}"), async || {
        site.queue.get(record.upload.id).await.unwrap().filter(|r| r.state == state)
    })
    .await
}
