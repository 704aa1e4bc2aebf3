//! What is left of rounds that are over: photos are emptied at once, and files removed when all is measured.
//!
//! ext4 without a journal gives no inode out again for some minutes after its file was deleted, and whoever makes a file there
//! passes over all of those, one by one. If a round's files were deleted, the next contestant would pay for it.

use std::fs::{self, File};
use std::path::Path;

use tempfile::TempDir;

use crate::support::postgres::Cluster;

/// The folders of rounds that are over.
#[derive(Default)]
pub struct Leftovers {
    folders: Vec<TempDir>,
    clusters: Vec<Cluster>,
}

impl Leftovers {
    /// Takes the bytes of all its files back, and keeps their inodes.
    pub fn keep(&mut self, folder: TempDir) {
        empty(folder.path());
        self.folders.push(folder);
    }

    /// Stops it, and keeps its files, of which each database has some three hundred, with their bytes: some hundreds of MB.
    pub fn keep_cluster(&mut self, cluster: Cluster) {
        cluster.stop();
        self.clusters.push(cluster);
    }
}

fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).expect("a folder of an ended round").flatten() {
        match entry.file_type().expect("the kind of an entry") {
            kind if kind.is_dir() => empty(&entry.path()),
            kind if kind.is_file() => drop(File::create(entry.path()).expect("a file is emptied")),
            _ => {}
        }
    }
}
