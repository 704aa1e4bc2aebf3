//! The leases claimed ahead of free places: a claim is a commit, which is much of what an upload costs.
//!
//! Always: no more than leave within [`AHEAD`] at the pace of now, so that a photo that is more urgent waits behind them for no
//! longer; where the pace falls, what is still here after [`KEPT_MAX`], long before its lease ends, goes back to the queue. Never: a
//! photo in memory.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use crate::queue::{Lease, Queue};

/// What leaves in this time is claimed at once.
const AHEAD: Duration = Duration::from_secs(1);
/// Where the pace has fallen meanwhile, what is left is kept for so long.
const KEPT_MAX: Duration = Duration::from_secs(3);
/// The longest that the queue is waited for when leases are given back; the lead must be renewed meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// What one drain has claimed and not begun, the first to begin in front.
#[derive(Default)]
pub struct Ahead {
    leases: VecDeque<Lease>,
    /// When the last of them was claimed.
    claimed_at: Option<Instant>,
}

/// How many to claim beyond those that begin now, when so many land in a second.
pub fn how_many(pace: f64) -> usize {
    (pace * AHEAD.as_secs_f64()) as usize
}

impl Ahead {
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Takes what was claimed then.
    pub fn add(&mut self, leases: Vec<Lease>, claimed_at: Instant) {
        self.leases.extend(leases);
        self.claimed_at = Some(claimed_at);
    }

    /// The next to begin.
    pub fn next(&mut self) -> Option<Lease> {
        self.leases.pop_front()
    }

    /// What is here was claimed too long ago.
    pub fn is_stale(&self, now: Instant) -> bool {
        !self.is_empty() && self.claimed_at.is_some_and(|at| now - at > KEPT_MAX)
    }

    /// Gives all back to the queue. What it does not hear, the leases' end says in its stead.
    pub async fn give_back(&mut self, queue: &Queue) {
        if self.is_empty() {
            return;
        }
        tracing::debug!(uploads = self.leases.len(), "what was claimed ahead goes back to the queue");
        let released = self.leases.iter().map(|lease| queue.release(lease, Duration::ZERO));
        let _ = timeout(ANSWER_TIMEOUT, join_all(released)).await;
        self.leases.clear();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn what_has_not_begun_soon_after_its_claim_is_stale() {
        let now = Instant::now();
        let mut ahead = Ahead::default();
        ahead.add(vec![lease()], now);
        assert!(!ahead.is_stale(now + KEPT_MAX) && ahead.is_stale(now + KEPT_MAX + Duration::from_millis(1)));
        assert_eq!(ahead.next(), Some(lease()));
        assert!(!ahead.is_stale(now + 2 * KEPT_MAX), "nothing is there");
    }

    /// Of a photo that is on no disk.
    pub(in crate::drain) fn lease() -> Lease {
        let upload = serde_json::json!({
            "id": "0190a5f0-0000-7000-8000-000000000000", "device_id": "cam-1", "object_key": "cam-1/1.jpg",
            "size_bytes": 1, "sha256": "0".repeat(64), "content_type": "image/jpeg", "received_at": "2026-01-01T00:00:00Z",
        });
        Lease { upload: serde_json::from_value(upload).unwrap(), attempt: 1, failures: 0 }
    }
}
