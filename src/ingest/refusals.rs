//! What the log hears of refused photos.
//!
//! Always: a photo refused for its own sake has a line; a refusal that is the appliance's state (full, busy, a disk or a queue
//! that fails) has one line when it begins, is counted in the metrics, and has one line with the count when it is over.
//! Never: a line a request while a thousand devices knock at a full disk.

use std::time::Duration;

use crate::http::problem::{Kind, Problem};
use crate::outage::Outage;

/// So long nothing may have been refused before photos are said to be taken again.
const CALM: Duration = Duration::from_secs(5);

/// The states in which one process refuses.
#[derive(Debug)]
pub struct Refusals {
    full: Outage,
    busy: Outage,
    failing: Outage,
}

impl Refusals {
    pub fn new() -> Refusals {
        let outage = || Outage::ended_by_calm(CALM);
        Refusals { full: outage(), busy: outage(), failing: outage() }
    }

    /// A device was answered with `problem`.
    pub fn refused(&self, problem: &Problem) {
        let (status, detail) = (problem.status().as_u16(), &problem.detail);
        let outage = match problem.kind {
            Kind::SpoolFull => &self.full,
            Kind::Busy => &self.busy,
            Kind::Unavailable => &self.failing,
            Kind::Internal => return tracing::error!(status, detail, "refused"),
            _ => return tracing::info!(status, detail, "refused"),
        };
        if outage.failed() {
            let cause = problem.cause.as_deref().unwrap_or(detail);
            tracing::error!(status, cause, "photos are refused; more of the same is counted, not logged");
        }
    }

    /// A photo was taken.
    pub fn taken(&self) {
        for outage in [&self.full, &self.busy, &self.failing] {
            if let Some(over) = outage.works() {
                let seconds = over.lasted.as_secs();
                tracing::info!(refused = over.failures, seconds, "photos are taken again");
            }
        }
    }
}
