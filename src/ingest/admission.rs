//! Who may come in: bytes of photos in memory, and room on the disk.
//!
//! Always: refused before the body is read where the head tells enough, and room is given back when its holder is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::http::problem::{Kind, Problem};
use crate::spool::Spool;

/// Bytes of photos that one process holds in memory at most.
const IN_FLIGHT_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// The gate of one process.
#[derive(Clone)]
pub struct Admission {
    spool: Spool,
    in_flight_bytes: Arc<AtomicU64>,
}

/// Memory taken by one photo on its way to the disk.
pub struct Room {
    in_flight_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Admission {
    pub fn new(spool: Spool) -> Self {
        Admission { spool, in_flight_bytes: Arc::default() }
    }

    /// Lets a request in whose photo may have about `declared_bytes`.
    pub fn admit(&self, declared_bytes: u64) -> Result<Room, Problem> {
        let in_flight_bytes = self.in_flight_bytes.load(Ordering::Relaxed);
        // what is in memory is not on the disk yet, and will be
        self.spool.admit(in_flight_bytes + declared_bytes).map_err(|error| match error {
            Error::Full(why) => Problem::new(Kind::SpoolFull, why),
            other => Problem::new(Kind::Unavailable, "photos cannot be made durable now; send it again").because(other),
        })?;
        if in_flight_bytes + declared_bytes > IN_FLIGHT_BYTES_MAX {
            return Err(busy());
        }
        Ok(Room { in_flight_bytes: self.in_flight_bytes.clone(), bytes: 0 })
    }
}

impl Room {
    /// Takes room for `more` bytes.
    pub fn grow(&mut self, more: usize) -> Result<(), Problem> {
        self.bytes += more as u64;
        let total = self.in_flight_bytes.fetch_add(more as u64, Ordering::Relaxed) + more as u64;
        if total > IN_FLIGHT_BYTES_MAX { Err(busy()) } else { Ok(()) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.in_flight_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn busy() -> Problem {
    Problem::new(Kind::Busy, "too many photos are arriving at once; send it again")
}
