//! Keeps the pacer at the allowance in force: by the clock, and by what operators said in whichever process.
//!
//! Always: a change takes effect within a second where the queue answers soon, and is logged once; while the queue is away, what
//! was said last holds, and nothing leaves before it was heard for the first time.
//! Never: waits for the queue to look at the clock.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::allowance::{Control, Standing, Uplink};
use crate::pacer::Pacer;
use crate::queue::Queue;
use crate::units::UnixMs;

/// How often to look at the clock and at the queue.
const LOOK: Duration = Duration::from_millis(800);
/// Longer than this, and the queue counts as away.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// What is in force to begin with, as far as is known.
pub async fn standing(queue: &Queue, uplink: &Uplink) -> Standing {
    let control = match timeout(ASK_TIMEOUT, queue.control()).await {
        Ok(Ok(control)) => control,
        _ => {
            tracing::warn!("the queue does not say what operators set; until it does, nothing leaves");
            Control::default()
        }
    };
    Standing { in_force: uplink.in_force(UnixMs::now(), &control), control }
}

/// Keeps `standing` up to date, and with it the pacer of a process that pours, until `stop` is cancelled.
pub async fn steer(
    pacer: Option<Pacer>,
    queue: Queue,
    uplink: Uplink,
    standing: watch::Sender<Standing>,
    stop: CancellationToken,
) {
    let said = watch::Sender::new(None);
    tokio::select! {
        () = listen(&queue, &said) => {}
        () = apply(pacer.as_ref(), &uplink, said.subscribe(), &standing) => {}
        () = stop.cancelled() => {}
    }
}

/// Hears from the queue what operators said. A queue that is away is told of by whoever needs it more.
async fn listen(queue: &Queue, said: &watch::Sender<Option<Control>>) {
    loop {
        if let Ok(Ok(control)) = timeout(ASK_TIMEOUT, queue.control()).await {
            said.send_if_modified(|known| known.replace(control) != *known);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn apply(
    pacer: Option<&Pacer>,
    uplink: &Uplink,
    mut said: watch::Receiver<Option<Control>>,
    standing: &watch::Sender<Standing>,
) {
    loop {
        let heard = said.borrow_and_update().clone();
        let Some(control) = heard else {
            // it may be a pause; the pacer lets nothing out until that is known
            let _ = said.changed().await;
            continue;
        };
        let in_force = uplink.in_force(UnixMs::now(), &control);
        if let Some(pacer) = pacer.filter(|pacer| pacer.allowance() != in_force.allowance) {
            pacer.set_allowance(in_force.allowance);
        }
        if standing.borrow().in_force.rule != in_force.rule && pacer.is_some() {
            let allowance = in_force.allowance.map_or("nothing".to_owned(), |rate| rate.to_string());
            tracing::info!(%allowance, rule = %in_force.rule, "another allowance is in force");
        }
        standing.send_replace(Standing { in_force, control });
        tokio::select! {
            _ = said.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}
