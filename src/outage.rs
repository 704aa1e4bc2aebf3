//! A row of failures that have one cause: the first is worth a line in the log, the others a count, and the end a line again.
//!
//! Always: cheap where all is well, so that it may stand on the hot path. Never: a line of its own; whoever knows what failed
//! writes it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One thing that works or does not.
#[derive(Debug)]
pub struct Outage {
    failures: AtomicU64,
    /// A success ends the row only when the last failure is so long ago: what works every other time is not over yet.
    calm: Duration,
    /// The first and the last failure of the row.
    span: Mutex<Option<(Instant, Instant)>>,
}

/// A row that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Over {
    pub failures: u64,
    /// From the first failure to the success that ended it.
    pub lasted: Duration,
}

impl Outage {
    /// One that is over with the first success that comes `calm` after the last failure.
    pub const fn ended_by_calm(calm: Duration) -> Outage {
        Outage { failures: AtomicU64::new(0), calm, span: Mutex::new(None) }
    }

    /// One that the next success ends.
    pub const fn new() -> Outage {
        Outage::ended_by_calm(Duration::ZERO)
    }

    /// Notes a failure. True when it is the first of its row.
    pub fn failed(&self) -> bool {
        let now = Instant::now();
        let mut span = self.span.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.failures.fetch_add(1, Ordering::Relaxed);
        let first = span.is_none();
        *span = Some((span.map_or(now, |(first, _)| first), now));
        first
    }

    /// Notes a success. Some when it ends a row.
    pub fn works(&self) -> Option<Over> {
        if self.failures.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut span = self.span.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (first, last) = (*span)?;
        if last.elapsed() < self.calm {
            return None;
        }
        *span = None;
        Some(Over { failures: self.failures.swap(0, Ordering::Relaxed), lasted: first.elapsed() })
    }
}

impl Default for Outage {
    fn default() -> Self {
        Outage::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_of_a_row_is_told_and_its_end_counts_them() {
        let outage = Outage::new();
        assert_eq!(outage.works(), None);
        assert!(outage.failed());
        assert!(!outage.failed() && !outage.failed());
        assert_eq!(outage.works().map(|over| over.failures), Some(3));
        assert_eq!(outage.works(), None);
        assert!(outage.failed(), "a new row");
    }

    #[test]
    fn what_works_every_other_time_is_one_row() {
        let outage = Outage::ended_by_calm(Duration::from_secs(3600));
        assert!(outage.failed());
        assert_eq!(outage.works(), None);
        assert!(!outage.failed());
    }
}
