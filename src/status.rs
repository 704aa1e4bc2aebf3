//! What the operator sees: one snapshot of everything, the same in JSON, on the terminal and in the metrics.
//!
//! Always: numbers are bytes, uploads and seconds, units last in the name. Never: I/O; whoever has the parts makes it.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::allowance::{Control, Uplink};
use crate::forecast::Forecast;
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
    /// Bytes per second that it may put on the wire now; 0 in an operator's pause.
    pub allowance_bytes_per_second: u64,
    /// The rule that gives this allowance, in words.
    pub allowance_rule: String,
    /// When this rule ends by itself.
    pub allowance_until: Option<UnixMs>,
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
    /// An operator said that nothing may leave; `outage` is what kept the drain from pouring when that was said.
    Held {
        who: String,
        since: UnixMs,
        until: Option<UnixMs>,
        #[serde(default)]
        outage: Option<String>,
    },
    /// The process is stopping.
    Stopping,
}

/// What is allowed, by which rule, and what there is to rule it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RateStatus {
    /// Bytes per second that may be put on the wire now; 0 in an operator's pause.
    pub allowance_bytes_per_second: u64,
    /// The rule that gives this allowance, in words.
    pub rule: String,
    /// When this rule ends by itself.
    pub until: Option<UnixMs>,
    /// A rate that an operator set, in force or behind a pause.
    #[serde(rename = "override")]
    pub set: Option<SetStatus>,
    pub pause: Option<PauseStatus>,
    pub uplink: UplinkStatus,
    /// The configured week in words, a line for each stretch of a day.
    pub timetable: Option<Vec<String>>,
}

/// A rate in place of the configured one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetStatus {
    /// As it was set, such as `100%`.
    pub rate: String,
    pub bytes_per_second: u64,
    pub who: String,
    pub since: UnixMs,
    /// None: until it is cleared.
    pub until: Option<UnixMs>,
}

/// An operator's pause.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PauseStatus {
    pub who: String,
    pub since: UnixMs,
    /// None: until it is resumed.
    pub until: Option<UnixMs>,
}

/// What is configured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UplinkStatus {
    pub bytes_per_second: u64,
    /// In force while there is no timetable.
    pub share: String,
    pub timezone: String,
}

impl RateStatus {
    /// From what is configured and what was said.
    pub fn new(uplink: &Uplink, control: &Control, now: UnixMs) -> RateStatus {
        let in_force = uplink.in_force(now, control);
        let set = control.rate.as_ref().map(|set| SetStatus {
            rate: set.amount.to_string(),
            bytes_per_second: set.amount.of(uplink.rate).0,
            who: set.who.clone(),
            since: set.since,
            until: set.until,
        });
        let pause = control.pause.as_ref();
        let pause = pause.map(|pause| PauseStatus { who: pause.who.clone(), since: pause.since, until: pause.until });
        RateStatus {
            allowance_bytes_per_second: in_force.allowance.map_or(0, |rate| rate.0),
            rule: in_force.rule.to_string(),
            until: in_force.until,
            set,
            pause,
            uplink: UplinkStatus {
                bytes_per_second: uplink.rate.0,
                share: uplink.share.to_string(),
                timezone: uplink.zone.name.clone(),
            },
            timetable: uplink.timetable.as_ref().map(|timetable| timetable.week()),
        }
    }
}

impl fmt::Display for RateStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.allowance_bytes_per_second {
            0 => write!(f, "allowance  nothing, {}", self.rule)?,
            bytes => write!(f, "allowance  {}, {}", Rate(bytes), self.rule)?,
        }
        if let (Some(set), Some(_)) = (&self.set, &self.pause) {
            write!(f, "\nafterwards {}, set by {}", set.rate, set.who)?;
        }
        let UplinkStatus { bytes_per_second, share, timezone } = &self.uplink;
        write!(f, "\nuplink     {}", Rate(*bytes_per_second).in_mbit())?;
        match &self.timetable {
            None => write!(f, ", of which {share}"),
            Some(week) => {
                write!(f, ", by a timetable, in {timezone}:")?;
                week.iter().try_for_each(|line| write!(f, "\n           {line}"))
            }
        }
    }
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

impl Condition {
    /// This process's drain is the one that pours, or would if it could.
    pub fn leads(&self) -> bool {
        !matches!(self, Condition::Elsewhere | Condition::Standby)
    }

    /// In a word or a sentence, at a moment.
    pub fn in_words(&self, now: UnixMs) -> String {
        match self {
            Condition::Elsewhere => "not in this process".to_owned(),
            Condition::Pouring => "pouring".to_owned(),
            Condition::Standby => "standing by: another drain has the lead, or the queue is away".to_owned(),
            Condition::Idle => "idle: nothing waits that may leave".to_owned(),
            Condition::Paused { reason, since, .. } => {
                format!("PAUSED, for {} so far: {reason}", span(now.since(*since)))
            }
            Condition::Held { who, outage, .. } => {
                let outage = outage.as_ref().map(|reason| format!("; before that nothing left either: {reason}"));
                format!("PAUSED by {who}; `forebay resume` ends it{}", outage.unwrap_or_default())
            }
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
        writeln!(f, "draining   {}, {}", self.draining, drain.condition.in_words(self.at))?;
        match drain.allowance_bytes_per_second {
            0 => writeln!(f, "allowance  nothing, {}", drain.allowance_rule)?,
            bytes => writeln!(f, "allowance  {}, {}", Rate(bytes), drain.allowance_rule)?,
        }
        writeln!(
            f,
            "backlog    {} photos, {}, oldest {}; {}",
            backlog.uploads,
            ByteSize(backlog.bytes.max(0) as u64),
            span(Duration::from_secs_f64(backlog.oldest_age_seconds.max(0.0))),
            self.forecast.words
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
