//! Uploads that fail by what looks like the environment's fault while others pass: in the end it is the upload after all.
//!
//! Always: counted only while the way to the bucket is sound, so that no upload is charged for having been a probe, and
//! forgotten when it passes or by a restart. Never: more than a bounded number of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::upload::UploadId;

/// So many attempts an upload may fail while others pass, before it is charged.
const ATTEMPTS_MAX: u32 = 10;
/// With more suspects than this none of them is one.
const SUSPECTS_MAX: usize = 10_000;

/// The suspects of one drain. Cheap to clone.
#[derive(Clone, Default)]
pub struct Suspects(Arc<Mutex<HashMap<UploadId, u32>>>);

impl Suspects {
    /// An upload failed while the way is sound. True when that is its own fault by now.
    pub fn failed(&self, id: UploadId) -> bool {
        let mut suspects = self.all();
        if suspects.len() >= SUSPECTS_MAX {
            suspects.clear();
        }
        let attempts = suspects.entry(id).or_default();
        *attempts += 1;
        *attempts >= ATTEMPTS_MAX
    }

    /// An upload has passed, or is set aside.
    pub fn forget(&self, id: UploadId) {
        self.all().remove(&id);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<UploadId, u32>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_is_at_fault_after_ten_attempts_while_others_pass() {
        let (suspects, id) = (Suspects::default(), UploadId::new());
        assert!((1..10).all(|_| !suspects.failed(id)));
        assert!(suspects.failed(id));
        suspects.forget(id);
        assert!(!suspects.failed(id));
    }
}
