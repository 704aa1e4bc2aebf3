//! Looks at how the site stands, and keeps the pacer at the allowance in force: by the clock, and by what operators said in
//! whichever process.
//!
//! Always: a change takes effect within a second where the queue answers soon, and is logged once; while the queue is away, what
//! was said last holds, and nothing leaves before it was heard for the first time.
//! Never: waits for the queue to look at the clock.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::allowance::{Control, Standing, Uplink};
use crate::error::{Error, Result};
use crate::outage::Outage;
use crate::pacer::Pacer;
use crate::queue::{Look, Queue};
use crate::units::UnixMs;

/// How often to look at the queue, whose answer is also when to look at the clock.
const LOOK: Duration = Duration::from_millis(900);
/// How often to look at the clock while the queue does not answer.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(1);
/// Longer than this, and the queue counts as away.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// How the site stands, by the queue.
pub async fn look(queue: &Queue) -> Result<Look> {
    let late = || Error::Unavailable(format!("the queue did not answer within {} s", ASK_TIMEOUT.as_secs()));
    timeout(ASK_TIMEOUT, queue.look()).await.unwrap_or_else(|_| Err(late()))
}

/// What is in force by the first look, as far as is known.
pub fn standing(look: &Result<Look>, uplink: &Uplink) -> Standing {
    let control = match look {
        Ok(Look { control: Ok(control), .. }) => control.clone(),
        _ => {
            tracing::warn!("the queue does not say what operators set; until it does, nothing leaves");
            Control::default()
        }
    };
    Standing { in_force: uplink.in_force(UnixMs::now(), &control), control }
}

/// Keeps `standing` and the pacer of a process that pours up to date, and then `looks`, which has the first already, until it is
/// `over`.
pub async fn steer(
    pacer: Option<Pacer>,
    queue: Queue,
    uplink: Uplink,
    looks: watch::Sender<Result<Look>>,
    standing: watch::Sender<Standing>,
    over: impl Future<Output = ()>,
) {
    let heard = watch::Sender::new(looks.borrow().clone());
    tokio::select! {
        () = look_again(&queue, &heard) => {}
        () = apply(pacer.as_ref(), &uplink, heard.subscribe(), &standing, &looks) => {}
        () = over => {}
    }
}

/// A queue that is away is told of by whoever needs it more.
async fn look_again(queue: &Queue, heard: &watch::Sender<Result<Look>>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let looked = look(queue).await;
        heard.send_modify(|last| *last = looked);
    }
}

async fn apply(
    pacer: Option<&Pacer>,
    uplink: &Uplink,
    mut heard: watch::Receiver<Result<Look>>,
    standing: &watch::Sender<Standing>,
    looks: &watch::Sender<Result<Look>>,
) {
    let (mut said, mut is_news, unreadable) = (None, false, Outage::new());
    loop {
        let look = heard.borrow().clone();
        if let Ok(Look { control: Ok(control), .. }) = &look {
            said = Some(control.clone());
        }
        // it may be a pause; the pacer lets nothing out until that is known
        if let Some(control) = said.clone() {
            let in_force = uplink.in_force(UnixMs::now(), &control);
            if let Some(pacer) = pacer.filter(|pacer| pacer.allowance() != in_force.allowance) {
                pacer.set_allowance(in_force.allowance);
            }
            if standing.borrow().in_force.rule != in_force.rule && pacer.is_some() {
                let allowance = in_force.allowance.map_or("nothing".to_owned(), |rate| rate.to_string());
                tracing::info!(%allowance, rule = %in_force.rule, "another allowance is in force");
            }
            standing.send_replace(Standing { in_force, control });
        }
        if is_news {
            match &look {
                Ok(Look { control: Ok(_), .. }) => drop(unreadable.works()),
                Ok(Look { control: Err(error), .. }) if unreadable.failed() => {
                    tracing::error!(%error, "what operators said cannot be read; what was heard last holds");
                }
                _ => {}
            }
            looks.send_modify(|last| *last = look);
        }
        is_news = tokio::select! {
            biased;
            _ = heard.changed() => true,
            () = tokio::time::sleep(LOOK_AT_CLOCK) => false,
        };
    }
}
