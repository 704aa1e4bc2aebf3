//! What the queue is asked for and what it answers: records, leases, lines, books.
//!
//! Always: values; both databases give the same. Never: a query.

use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;

use crate::allowance::Control;
use crate::error::Result;
use crate::units::UnixMs;
use crate::upload::{DeviceId, Priority, State, Upload, UploadId};

/// An upload and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub upload: Arc<Upload>,
    pub state: State,
    /// How often it was claimed.
    pub attempt: i32,
    /// How many failures were charged to it.
    pub failures: i32,
    /// Why it failed last, or was set aside.
    pub reason: Option<String>,
    pub uploaded_at: Option<UnixMs>,
    /// When its photo left the disk.
    pub removed_at: Option<UnixMs>,
}

impl Record {
    /// The record of an upload that was just accepted.
    pub fn queued(upload: Arc<Upload>) -> Record {
        Record {
            upload,
            state: State::Queued,
            attempt: 0,
            failures: 0,
            reason: None,
            uploaded_at: None,
            removed_at: None,
        }
    }
}

/// What became of an upload handed to [`Queue::accept`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub record: Record,
    /// False when a record with this id was there already; then `record` is that one.
    pub new: bool,
}

/// The right to send one upload, for a limited time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub upload: Arc<Upload>,
    /// The fence: what this lease writes counts only while no later attempt was claimed.
    pub attempt: i32,
    /// Failures charged to the upload before this attempt.
    pub failures: i32,
}

/// Which uploads a claim takes. Higher priority goes first in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// The oldest of all devices.
    Oldest,
    /// The newest of all devices.
    Newest,
    /// The newest of the devices whose turn it is.
    Fresh,
    /// The oldest of the devices whose turn it is.
    Backlog,
}

impl Pick {
    /// Devices take turns, by the bytes that each had.
    pub(super) fn by_turn(self) -> bool {
        matches!(self, Pick::Fresh | Pick::Backlog)
    }
}

/// What one device has queued in one priority class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub device_id: DeviceId,
    pub priority: Priority,
    pub queued: Tally,
}

/// What a device lost to shedding since the appliance was set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shed {
    pub device_id: DeviceId,
    pub lost: Tally,
    pub first_at: UnixMs,
    pub last_at: UnixMs,
}

/// Which records a list shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub device_id: Option<DeviceId>,
    pub state: Option<State>,
}

/// A place in a list: everything older comes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub received_at: UnixMs,
    pub id: UploadId,
}

impl Cursor {
    /// Before the newest record.
    pub const START: Cursor = Cursor { received_at: UnixMs(i64::MAX), id: UploadId(Uuid::max()) };
}

/// Uploads and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub uploads: i64,
    pub bytes: i64,
}

impl std::ops::Add for Tally {
    type Output = Tally;
    fn add(self, other: Tally) -> Tally {
        Tally { uploads: self.uploads + other.uploads, bytes: self.bytes + other.bytes }
    }
}

/// How many uploads stand where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Books {
    pub queued: Tally,
    pub uploading: Tally,
    pub uploaded: Tally,
    pub dead: Tally,
    pub shed: Tally,
    /// Of all of them, those whose photo is on disk.
    pub on_disk: Tally,
    /// When the oldest upload that is still queued was received.
    pub oldest_queued: Option<UnixMs>,
}

/// How the whole site stands. What cannot be read of one part leaves the other as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Look {
    /// When the queue was asked.
    pub at: Instant,
    pub books: Result<Books>,
    /// What operators said that was not over then.
    pub control: Result<Control>,
}

impl Books {
    /// Everything that was ever acknowledged.
    pub fn accepted(&self) -> Tally {
        self.queued + self.uploading + self.uploaded + self.dead + self.shed
    }

    /// What has not been uploaded yet and will be.
    pub fn backlog(&self) -> Tally {
        self.queued + self.uploading
    }

    pub(super) fn add(&mut self, state: State, on_disk: bool, tally: Tally) {
        let of_state = match state {
            State::Queued => &mut self.queued,
            State::Uploading => &mut self.uploading,
            State::Uploaded => &mut self.uploaded,
            State::Dead => &mut self.dead,
            State::Shed => &mut self.shed,
        };
        *of_state = *of_state + tally;
        if on_disk {
            self.on_disk = self.on_disk + tally;
        }
    }
}
