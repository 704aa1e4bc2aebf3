//! A fleet of simulated devices that keeps a ledger, and the ledger held against everything.

use std::path::{Path, PathBuf};
use std::process::Output;

use forebay::ledger::{self, Entry};

use super::agreement::{backlog_gone, everything_agrees};
use super::program::{Program, run};

/// Devices that send to one URL.
pub struct Fleet {
    pub url: String,
    pub devices: u32,
    pub per_minute: u32,
    pub seconds: u32,
    pub photo_bytes: u32,
    pub ledger: PathBuf,
}

impl Fleet {
    /// Sends; in the end every photo must be acknowledged. What the fleet said of it.
    pub async fn send(&self) -> String {
        let done = self.run().await;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "every photo is acknowledged in the end: {said} {done:?}");
        said
    }

    /// Sends, whatever becomes of it.
    pub async fn run(&self) -> Output {
        let number = |number: u32| number.to_string();
        let (devices, per_minute, photo_bytes) =
            (number(self.devices), number(self.per_minute), number(self.photo_bytes));
        let (span, ledger) = (format!("{}s", self.seconds), self.ledger.display().to_string());
        let arguments = ["simulate", "--url", &self.url, "--devices", &devices, "--per-minute", &per_minute];
        let more = ["--for", &span, "--photo-bytes", &photo_bytes, "--ledger", &ledger];
        run(&[&arguments[..], &more].concat(), &[], Path::new("/")).await
    }

    /// Acknowledgements so far.
    pub fn acknowledged(&self) -> u64 {
        let mut acknowledged = 0;
        let _ = ledger::read(&self.ledger, |entry| {
            acknowledged += u64::from(matches!(entry, Entry::Answered { ack: Some(_), .. }));
        });
        acknowledged
    }

    /// Waits until everything that was acknowledged has been uploaded by `drain`, a program with a drain, and holds the
    /// ledger against queue, spool and bucket.
    pub async fn agrees_with(&self, drain: &Program, settings: &[(String, String)], data: &Path) {
        let acknowledged = self.acknowledged();
        // fewer than planned, as a device does not take another photo before the last one is acknowledged
        assert!(acknowledged * 120 >= u64::from(self.devices * self.per_minute * self.seconds), "{acknowledged}");
        backlog_gone(drain, data).await;
        let report = everything_agrees(settings, data, &self.ledger.display().to_string()).await;
        assert_eq!(report["acknowledged"], acknowledged, "{report}");
    }
}
