//! Who may come in: bytes of photos in memory, and room on the disk.
//!
//! Always: refused before the body is read where the head tells enough, and room is given back when its holder is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::http::problem::{Kind, Problem};
use crate::spool::{Spool, Unfinished};

/// Bytes of photos that one process holds in memory at most.
const IN_FLIGHT_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// From here on photos are written out as they come: what is faster than the disk is still taken, and a thousand devices that
/// are slow need no more than this and what each has in hand.
const SHORT_BYTES: u64 = 24 * 1024 * 1024;

/// The gate of one process.
#[derive(Clone)]
pub struct Admission {
    spool: Spool,
    in_flight_bytes: Arc<AtomicU64>,
}

/// Memory taken by one photo on its way to the disk.
pub struct Room {
    spool: Spool,
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
        self.spool.admit(in_flight_bytes + declared_bytes).map_err(not_admitted)?;
        if in_flight_bytes + declared_bytes > IN_FLIGHT_BYTES_MAX {
            return Err(busy());
        }
        Ok(Room { spool: self.spool.clone(), in_flight_bytes: self.in_flight_bytes.clone(), bytes: 0 })
    }
}

impl Room {
    /// Takes room for `more` bytes.
    pub fn grow(&mut self, more: usize) -> Result<(), Problem> {
        self.bytes += more as u64;
        let total = self.in_flight_bytes.fetch_add(more as u64, Ordering::Relaxed) + more as u64;
        if total > IN_FLIGHT_BYTES_MAX { Err(busy()) } else { Ok(()) }
    }

    /// True while all photos together take so much that those that come slowly should not wait in memory.
    pub fn is_short(&self) -> bool {
        self.in_flight_bytes.load(Ordering::Relaxed) > SHORT_BYTES
    }

    /// Writes out what of `photo` is in memory, and gives its room back.
    pub async fn write_out(&mut self, photo: Unfinished) -> Result<Unfinished, Problem> {
        let photo = self.spool.write_out(photo).await.map_err(not_admitted)?;
        self.give_back();
        Ok(photo)
    }

    fn give_back(&mut self) {
        self.in_flight_bytes.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.give_back();
    }
}

fn not_admitted(error: Error) -> Problem {
    match error {
        Error::Full(why) => Problem::new(Kind::SpoolFull, why),
        other => Problem::new(Kind::Unavailable, "photos cannot be made durable now; send it again").because(other),
    }
}

fn busy() -> Problem {
    Problem::new(Kind::Busy, "too many photos are arriving at once; send it again")
}
