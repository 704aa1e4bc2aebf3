//! The ledger: what the devices sent and what they were answered, written down outside the appliance, so that the
//! appliance can be held to it.
//!
//! One JSON object a line. Always: a send is written before its first byte leaves, an answer as soon as it is read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::units::UnixMs;
use crate::upload::{Sha256, UploadId};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Entry {
    /// A photo leaves the device, for the `try_number`th time.
    Sent { at: UnixMs, device_id: String, upload_id: String, size_bytes: u64, sha256: Sha256, try_number: u32 },
    /// The appliance answered.
    Answered { at: UnixMs, device_id: String, upload_id: String, status: u16, ack: Option<Ack> },
    /// There was no answer.
    Failed { at: UnixMs, device_id: String, upload_id: String, error: String },
}

/// What a 200 or 201 promised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub id: UploadId,
    pub object_key: String,
    pub size_bytes: u64,
    pub sha256: Sha256,
}

/// A ledger that is being written.
pub struct Ledger {
    file: Mutex<File>,
}

impl Ledger {
    /// Starts a new one at `path`; one that is there is written over.
    pub fn create(path: &Path) -> io::Result<Ledger> {
        Ok(Ledger { file: Mutex::new(File::create(path)?) })
    }

    /// Adds a line.
    pub fn write(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        match self.file.lock() {
            // one write a line, so that a line is never half there
            Ok(mut file) => file.write_all(&line),
            Err(_) => Err(io::Error::other("the ledger's writer panicked")),
        }
    }
}

/// Calls `found` with every line of the ledger at `path`. A last line that was cut off is passed over.
pub fn read(path: &Path, mut found: impl FnMut(Entry)) -> io::Result<()> {
    let mut lines = BufReader::new(File::open(path)?).lines().enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        match serde_json::from_str(&line?) {
            Ok(entry) => found(entry),
            Err(_) if lines.peek().is_none() => {}
            Err(error) => return Err(io::Error::other(format!("line {} is not a ledger's: {error}", number + 1))),
        }
    }
    Ok(())
}
