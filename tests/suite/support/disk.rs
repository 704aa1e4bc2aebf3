//! Disks that can be hurt: a real file system on a loop device, whose power can be cut and which can fail a write.
//!
//! What such a disk holds is in memory, and nothing of it outlives the test run but the mount of a run that was killed; the
//! next run removes that.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::ioctl::{Setter, opcode};

use super::PATIENCE;
use super::process::{find_program, is_root};

const FOLDERS: &str = "forebay-test-disk-";

/// A mounted file system of its own. Unmounted and gone when dropped.
pub struct Disk {
    /// What the loop device stands on: a file in memory.
    image: File,
    /// The loop device lives for as long as this is open or it is mounted.
    _open: File,
    device: PathBuf,
    folder: PathBuf,
}

impl Disk {
    /// A new ext4 that says it has `bytes`.
    pub fn ext4(bytes: u64) -> Disk {
        Disk::made(bytes, "mkfs.ext4", EXT4)
    }

    /// A new ext4 for so many files, some of which it takes for itself.
    pub fn ext4_of_inodes(bytes: u64, inodes: u32) -> Disk {
        let inodes = inodes.to_string();
        Disk::made(bytes, "mkfs.ext4", &[EXT4, &["-N", &inodes]].concat())
    }

    /// A new XFS that says it has `bytes`, 300 MB at least.
    pub fn xfs(bytes: u64) -> Disk {
        Disk::made(bytes, "mkfs.xfs", &["-q", "-K"])
    }

    fn made(bytes: u64, mkfs: &str, arguments: &[&str]) -> Disk {
        let folder = mount_point();
        let image = rustix::fs::memfd_create("disk", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        let image = File::from(image);
        image.set_len(bytes).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
        let device = PathBuf::from(done(Command::new("losetup").args(["--find", "--show", &path])));
        let open = File::open(&device).unwrap();
        // it is in use, so it goes when it no longer is
        done(Command::new("losetup").arg("--detach").arg(&device));
        done(Command::new(find_program(mkfs, &["/sbin"])).args(arguments).arg(&device));
        let disk = Disk { image, _open: open, device, folder };
        disk.mount();
        disk
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Cuts its power: what was not synced is lost, and all that is asked of it fails until it is mounted again.
    pub fn shut_down(&self) {
        /// Both file systems know it by this number. The journal in memory is not written.
        const SHUT_DOWN: u32 = opcode::read::<u32>(b'X', 125);
        const WITHOUT_JOURNAL: u32 = 2;
        let root = File::open(&self.folder).unwrap();
        // SAFETY: the call takes a pointer to a u32, reads it, and gives nothing back
        unsafe { rustix::ioctl::ioctl(root, Setter::<SHUT_DOWN, u32>::new(WITHOUT_JOURNAL)) }.unwrap();
    }

    /// Unmounts it, waiting for those who still have files open, and mounts it again: what is read then is what it holds.
    pub fn remount(&self) {
        let began = Instant::now();
        while !unmount(&self.folder, &[]) {
            assert!(began.elapsed() < PATIENCE, "{} is in use", self.folder.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.mount();
    }

    /// From now on it is smaller than it says: beyond what is in use it has about `room` bytes, and what is written behind
    /// them is an I/O error. Its own tables lie before.
    pub fn ends_after(&self, room: u64) {
        // page by page, as a write that the device can do in part only is none that it fails
        let queue = Path::new("/sys/block").join(self.device.file_name().unwrap()).join("queue/max_sectors_kb");
        std::fs::write(queue, "4").unwrap();
        rustix::fs::syncfs(File::open(&self.folder).unwrap()).unwrap();
        done(Command::new("fstrim").arg(&self.folder));
        let mut end = 0;
        while let Ok(data) = rustix::fs::seek(&self.image, SeekFrom::Data(end)) {
            end = rustix::fs::seek(&self.image, SeekFrom::Hole(data)).unwrap();
        }
        self.image.set_len(end + room / 4096 * 4096).unwrap();
        rustix::fs::fcntl_add_seals(&self.image, SealFlags::GROW).unwrap();
    }

    fn mount(&self) {
        done(Command::new("mount").arg(&self.device).arg(&self.folder));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // a file that is still open keeps it a little longer
        unmount(&self.folder, &["--lazy"]);
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// A mounted file system that takes everything by way of the page cache and nothing past it. Gone when dropped.
pub struct CachedDisk {
    folder: PathBuf,
}

impl CachedDisk {
    pub fn new() -> CachedDisk {
        let folder = mount_point();
        done(Command::new("mount").args(["-t", "ramfs", "ramfs"]).arg(&folder));
        CachedDisk { folder }
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for CachedDisk {
    fn drop(&mut self) {
        unmount(&self.folder, &["--lazy"]);
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// A new folder to mount a file system on.
fn mount_point() -> PathBuf {
    assert!(is_root(), "this test mounts a file system, which needs root; run the tests as root");
    static SWEPT: Once = Once::new();
    SWEPT.call_once(sweep);
    static DISKS: AtomicU32 = AtomicU32::new(0);
    let number = DISKS.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("{FOLDERS}{}-{number}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// All of its tables are written at once, not in the background, and root has no more room than others.
const EXT4: &[&str] = &["-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"];

fn done(command: &mut Command) -> String {
    let done = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

fn unmount(folder: &Path, how: &[&str]) -> bool {
    Command::new("umount").args(how).arg(folder).output().is_ok_and(|done| done.status.success())
}

/// Removes what test runs left that were killed.
fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(process) = name.strip_prefix(FOLDERS).and_then(|rest| rest.split('-').next()) else { continue };
        if !Path::new("/proc").join(process).exists() {
            unmount(&entry.path(), &["--lazy"]);
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}
