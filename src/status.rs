//! What the operator sees: one snapshot of everything, the same in JSON, on the terminal and in the metrics.
//!
//! Always: numbers are bytes, uploads and seconds, units last in the name. Never: I/O; whoever has the parts makes it.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::shedding::WhenFull;
use crate::units::{ByteSize, Rate, UnixMs, span};

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub at: UnixMs,
    pub version: String,
    /// The roles of the process that answers.
    pub roles: Vec<String>,
    pub queue: QueueStatus,
    /// What the devices bring, to all replicas, over the last seconds.
    pub arriving: Flow,
    /// What reached S3, from all drains, over the last seconds.
    pub draining: Flow,
    pub drain: DrainStatus,
    pub books: BooksStatus,
    pub backlog: BacklogStatus,
    pub spool: SpoolStatus,
    pub forecast: Forecast,
    pub shed: ShedStatus,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// `SQLite` or `Postgres`.
    pub kind: String,
    pub reachable: bool,
    /// Why it is not reachable.
    pub reason: Option<String>,
}

/// Uploads and bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    pub uploads_per_second: f64,
    pub bytes_per_second: f64,
}

/// The way out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrainStatus {
    pub condition: Condition,
    /// Bytes per second that it may put on the wire now.
    pub allowance_bytes_per_second: u64,
    /// The rule that gives this allowance, in words.
    pub allowance_rule: String,
    /// Bytes that this process put on the wire since it started, heads and repeats included.
    pub sent_bytes: u64,
}

/// What the drain of this process is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Condition {
    /// This process has no drain.
    Elsewhere,
    /// Uploads are on their way.
    Pouring,
    /// There is nothing to send.
    Idle,
    /// Another drain has the lead, or the queue is away and cannot say who has.
    Standby,
    /// The environment is at fault; it tries again at `until`.
    Paused { reason: String, since: UnixMs, until: UnixMs },
    /// The process is stopping.
    Stopping,
}

/// Uploads and bytes in each state, since the appliance was set up: accepted is the sum of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BooksStatus {
    pub accepted: Count,
    pub queued: Count,
    pub uploading: Count,
    pub uploaded: Count,
    pub dead: Count,
    pub shed: Count,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    pub uploads: i64,
    pub bytes: i64,
}

/// What waits to be uploaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BacklogStatus {
    pub uploads: i64,
    pub bytes: i64,
    pub oldest_age_seconds: f64,
}

/// The disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpoolStatus {
    pub held_bytes: u64,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// What may still be accepted before the reserve is reached.
    pub usable_bytes: u64,
    /// Why photos are refused, if they are.
    pub refusing: Option<String>,
}

/// What was given up because the disk was full, since the appliance was set up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShedStatus {
    /// What happens when the disk is full.
    pub policy: WhenFull,
    pub uploads: i64,
    pub bytes: i64,
    /// Devices that lost any.
    pub devices: i64,
    /// Those that lost most.
    pub most: Vec<ShedDevice>,
}

/// What one device lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShedDevice {
    pub device_id: String,
    pub uploads: i64,
    pub bytes: i64,
    pub first_at: UnixMs,
    pub last_at: UnixMs,
}

/// Where it ends if arrivals and allowance stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Arrivals less what may leave; positive when the backlog grows.
    pub growth_bytes_per_second: f64,
    /// Seconds until the disk is full; none when the backlog does not grow.
    pub full_in_seconds: Option<f64>,
    /// Seconds until the backlog is gone; none when it grows or is gone.
    pub clear_in_seconds: Option<f64>,
}

impl Forecast {
    /// From arrivals, what leaves at most, the backlog's bytes and the disk's usable bytes.
    pub fn new(arriving: f64, leaving: f64, backlog_bytes: f64, usable_bytes: f64) -> Forecast {
        let growth = arriving - leaving;
        // a thousandth of the flow is noise, not growth
        let noise = arriving.max(leaving) / 1000.0;
        Forecast {
            growth_bytes_per_second: growth,
            full_in_seconds: (growth > noise).then(|| usable_bytes / growth),
            clear_in_seconds: (growth < -noise && backlog_bytes > 0.0).then(|| backlog_bytes / -growth),
        }
    }

    /// In words: `growing by 3.33 MB/s (288 GB/day), the disk is full in 3d 12h`.
    pub fn in_words(&self) -> String {
        let per_second = Rate(self.growth_bytes_per_second.abs() as u64);
        match (self.full_in_seconds, self.clear_in_seconds) {
            (Some(full), _) => format!(
                "growing by {per_second} ({}/day), the disk is full in {}",
                ByteSize((self.growth_bytes_per_second * 86_400.0) as u64),
                span(Duration::from_secs_f64(full.min(1e10)))
            ),
            (None, Some(clear)) => {
                format!("shrinking by {per_second}, gone in {}", span(Duration::from_secs_f64(clear.min(1e10))))
            }
            (None, None) => "steady".to_owned(),
        }
    }
}

impl Condition {
    /// This process's drain is the one that pours, or would if it could.
    pub fn leads(&self) -> bool {
        !matches!(self, Condition::Elsewhere | Condition::Standby)
    }

    /// In a word or a sentence.
    pub fn in_words(&self) -> String {
        match self {
            Condition::Elsewhere => "not in this process".to_owned(),
            Condition::Pouring => "pouring".to_owned(),
            Condition::Standby => "standing by: another drain has the lead, or the queue is away".to_owned(),
            Condition::Idle => "idle, nothing to send".to_owned(),
            Condition::Paused { reason, since, .. } => format!("PAUSED since {since}: {reason}"),
            Condition::Stopping => "stopping".to_owned(),
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} photos/s, {}", self.uploads_per_second, Rate(self.bytes_per_second as u64))
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.uploads, ByteSize(self.bytes.max(0) as u64))
    }
}

impl fmt::Display for ShedStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = Count { uploads: self.uploads, bytes: self.bytes };
        let most: Vec<String> = self.most.iter().map(|d| format!("{} {}", d.device_id, d.uploads)).collect();
        write!(f, "{lost} of {} devices ({}); most: {}", self.devices, self.policy, most.join(", "))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { books, backlog, spool, drain, .. } = self;
        writeln!(f, "forebay {} ({}), {}", self.version, self.roles.join(", "), self.at)?;
        match &self.queue.reason {
            None => writeln!(f, "queue      {}", self.queue.kind)?,
            Some(reason) => writeln!(f, "queue      {} UNREACHABLE: {reason}", self.queue.kind)?,
        }
        writeln!(f, "arriving   {}", self.arriving)?;
        writeln!(f, "draining   {}, {}", self.draining, drain.condition.in_words())?;
        writeln!(f, "allowance  {}, {}", Rate(drain.allowance_bytes_per_second), drain.allowance_rule)?;
        writeln!(
            f,
            "backlog    {} photos, {}, oldest {}; {}",
            backlog.uploads,
            ByteSize(backlog.bytes.max(0) as u64),
            span(Duration::from_secs_f64(backlog.oldest_age_seconds.max(0.0))),
            self.forecast.in_words()
        )?;
        writeln!(
            f,
            "spool      {} held, {} free of {}, {} usable{}",
            ByteSize(spool.held_bytes),
            ByteSize(spool.free_bytes),
            ByteSize(spool.total_bytes),
            ByteSize(spool.usable_bytes),
            spool.refusing.as_ref().map(|why| format!(", REFUSING: {why}")).unwrap_or_default()
        )?;
        if self.shed.uploads > 0 {
            writeln!(f, "shed       {}", self.shed)?;
        }
        write!(
            f,
            "books      accepted {} = queued {} + uploading {} + uploaded {} + dead {} + shed {}",
            books.accepted, books.queued, books.uploading, books.uploaded, books.dead, books.shed
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deficit_of_a_full_site_fills_a_terabyte_in_three_and_a_half_days() {
        let forecast = Forecast::new(8_333_333.0, 5_000_000.0, 0.0, 1e12);
        assert_eq!(forecast.in_words(), "growing by 3.33 MB/s (288 GB/day), the disk is full in 3d 11h");
    }

    #[test]
    fn a_backlog_that_shrinks_has_an_end() {
        let forecast = Forecast::new(1e6, 5e6, 40e6, 1e12);
        assert_eq!(forecast.clear_in_seconds, Some(10.0));
        assert_eq!(forecast.full_in_seconds, None);
    }

    #[test]
    fn noise_is_not_growth() {
        assert_eq!(Forecast::new(5_000_100.0, 5_000_000.0, 1e6, 1e12).in_words(), "steady");
    }
}
