//! rclone, as new as it is had: what Forebay's way out is measured against.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use forebay::fleet::photo::Camera;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::backlog::PHOTO_BYTES;
use super::process::{find_program, guarded, start};

pub struct Rclone {
    program: PathBuf,
    /// Its name and version.
    pub version: String,
}

impl Rclone {
    pub fn find() -> Rclone {
        let program = find_program("rclone", &[concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/rclone/bin")]);
        let told = std::process::Command::new(&program).arg("version").output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        Rclone { program, version: told.lines().next().unwrap_or("rclone").to_owned() }
    }

    /// Starts copying the files in `folder` to the bucket of these settings, so many at once, at so many bytes per second.
    /// Whatever is not said is as it comes.
    pub fn copy(&self, folder: &Path, settings: &[(String, String)], transfers: u64, rate: Option<u64>) -> Copying {
        let setting = |name: &str| {
            let found = settings.iter().find(|(known, _)| known == name);
            found.map(|(_, text)| text.clone()).unwrap_or_default()
        };
        let mut command = guarded(&self.program, "KILL", None);
        command.args(["copy", "--config=", "--s3-no-check-bucket", &format!("--transfers={transfers}")]);
        // in bytes, as its own units are powers of 1024
        command.args(rate.map(|rate| format!("--bwlimit={rate}B")));
        command.arg(folder).arg(format!("far:{}/", setting("FOREBAY_S3_BUCKET")));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        for (name, text) in [
            ("TYPE", "s3".to_owned()),
            ("PROVIDER", "Other".to_owned()),
            ("ENDPOINT", setting("AWS_ENDPOINT_URL_S3")),
            ("ACCESS_KEY_ID", setting("AWS_ACCESS_KEY_ID")),
            ("SECRET_ACCESS_KEY", setting("AWS_SECRET_ACCESS_KEY")),
            ("REGION", setting("AWS_REGION")),
        ] {
            command.env(format!("RCLONE_CONFIG_FAR_{name}"), text);
        }
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        Copying(start(command))
    }
}

/// A copy under way. Ended when dropped.
pub struct Copying(Child);

impl Copying {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// It has ended; what it has cost is known until [`Copying::ended`] says so too, after which this must not be asked any more.
    pub fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = Pid::from_raw(self.pid() as i32).unwrap();
        waitid(WaitId::Pid(pid), options).unwrap().is_some()
    }

    /// Whether all was copied, once it has ended.
    pub fn ended(&mut self) -> Option<bool> {
        self.0.try_wait().unwrap().map(|status| status.success())
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes so many photos into `folder`.
pub fn write_files(folder: &Path, photos: u64) {
    let camera = Camera::new(PHOTO_BYTES as usize).unwrap();
    for number in 0..photos as usize {
        let photo = camera.photo(number, &format!("file {number}"));
        std::fs::write(folder.join(format!("{number}.jpg")), photo).unwrap();
    }
}
