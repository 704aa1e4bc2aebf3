//! SHA-256 of photos: as they come, and while they come by the hundreds a second, side by side when they are all there.
//!
//! A digest is one chain of steps, which no vector makes faster; but vectors carry many chains side by side, one in each lane,
//! in about the time of two, and the instructions for SHA-256 carry four in the time of two. So while many photos come, one that
//! is all there waits a moment for others, and whoever fills the lanes, or has waited long enough, digests all that wait. Always: a
//! photo that comes alone is digested on the way, while its bytes are at hand, and waits for nobody. Never: a photo that waits for
//! a much larger one.

use std::collections::VecDeque;
use std::mem;
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::http::problem::{Kind, Problem};
use crate::spool::Unfinished;
use crate::upload::Sha256;

/// So many times the bytes of the longest must be there: side by side the lanes go on until the longest is done, and take
/// about so much longer than one chain alone (twice with AVX-512, 2.8 times with AVX2).
const TOGETHER_MIN: usize = 3;
/// A larger photo is digested apart, as the others would wait for it.
const TOGETHER_BYTES_MAX: usize = 1024 * 1024;
/// So little that it is not worth a wait.
const AT_ONCE_BYTES_MAX: usize = 16 * 1024;
/// The longest that a photo waits for others where the processor has instructions for SHA-256, and where it has none and
/// there is more to be had.
const PATIENCE: Duration = Duration::from_millis(2);
const PATIENCE_WITHOUT_INSTRUCTIONS: Duration = Duration::from_millis(5);
/// Many come while so many have begun within so many times the patience: some are then there together.
const MANY: usize = 8;
const MANY_WITHIN: u32 = 5;

/// Where photos are brought to be digested. Cheap to clone. What waits is in memory and has its room there, so no more can wait
/// than are let in.
#[derive(Clone)]
pub struct Digests {
    /// None where chains do not go side by side.
    lanes: Option<Arc<Mutex<Lanes>>>,
    patience: Duration,
    /// As many are digested apart as there are processors.
    apart: Arc<Semaphore>,
}

/// Chains that go side by side, and who waits for them.
struct Lanes {
    count: usize,
    waiting: Vec<Waiting>,
    /// When the latest photos began to come, [`MANY`] of them.
    begun: VecDeque<Instant>,
}

struct Waiting {
    photo: Unfinished,
    done: oneshot::Sender<(Unfinished, Sha256)>,
}

impl Lanes {
    fn new(count: usize) -> Lanes {
        Lanes { count, waiting: Vec::new(), begun: VecDeque::new() }
    }

    /// Another photo begins to come. Whether it is one of many that did `within` this time.
    fn begins(&mut self, now: Instant, within: Duration) -> bool {
        self.begun.push_back(now);
        if self.begun.len() < MANY {
            return false;
        }
        self.begun.pop_front().is_some_and(|first| now.duration_since(first) < within)
    }

    /// Another photo is all there. All that wait, if they fill the lanes.
    fn arrives(&mut self, one: Waiting) -> Vec<Waiting> {
        self.waiting.push(one);
        if self.waiting.len() < self.count { Vec::new() } else { mem::take(&mut self.waiting) }
    }
}

impl Digests {
    pub fn of_this_processor() -> Digests {
        let patience = if has_instructions() { PATIENCE } else { PATIENCE_WITHOUT_INSTRUCTIONS };
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let lanes = lane_count().map(|count| Arc::new(Mutex::new(Lanes::new(count.get()))));
        Digests { lanes, patience, apart: Arc::new(Semaphore::new(processors)) }
    }

    /// A photo begins to come. Whether its digest is to be taken on the way.
    pub fn on_the_way(&self) -> bool {
        let within = MANY_WITHIN * self.patience;
        self.lanes.as_ref().is_none_or(|lanes| !lock(lanes).begins(Instant::now(), within))
    }

    /// Gives the photo back with its digest.
    pub async fn digest(&self, mut photo: Unfinished) -> Result<(Unfinished, Sha256), Problem> {
        if photo.undigested_bytes() <= AT_ONCE_BYTES_MAX {
            let sha256 = photo.sha256();
            return Ok((photo, sha256));
        }
        let fits = photo.in_memory().is_some_and(|bytes| bytes.len() <= TOGETHER_BYTES_MAX);
        let digested = match &self.lanes {
            Some(lanes) if fits => self.together(lanes, photo).await,
            _ => self.apart(photo).await,
        };
        digested.ok_or_else(|| Problem::new(Kind::Internal, "the photo was not kept; send it again"))
    }

    /// None when whoever digested it did not come to its end.
    async fn together(&self, lanes: &Mutex<Lanes>, photo: Unfinished) -> Option<(Unfinished, Sha256)> {
        let (done, mut digested) = oneshot::channel();
        let full = lock(lanes).arrives(Waiting { photo, done });
        digest_all(full);
        if let Ok(digested) = timeout(self.patience, &mut digested).await {
            return digested.ok();
        }
        let all = mem::take(&mut lock(lanes).waiting);
        digest_all(all);
        digested.await.ok()
    }

    async fn apart(&self, mut photo: Unfinished) -> Option<(Unfinished, Sha256)> {
        let _place = self.apart.acquire().await.ok()?;
        let digested = tokio::task::spawn_blocking(move || {
            let sha256 = photo.sha256();
            (photo, sha256)
        });
        digested.await.ok()
    }
}

/// It is held for moments only, and nothing in it is left half done.
fn lock(lanes: &Mutex<Lanes>) -> MutexGuard<'_, Lanes> {
    lanes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The processor has instructions for SHA-256.
fn has_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("sha");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("sha2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// How many chains go side by side here, if more than one does, to any good that is known of.
fn lane_count() -> Option<NonZero<usize>> {
    let known = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));
    let count = tape_sha256::lane_width();
    if known && count > 1 && are_right() { NonZero::new(count) } else { None }
}

/// A digest stands in the record for good, so on this very processor the lanes are held against the digest of one chain.
fn are_right() -> bool {
    let bytes: Vec<u8> = (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let alike: Vec<&[u8]> = (0..33).map(|at| &bytes[at..at + 4000]).collect();
    let unlike: Vec<&[u8]> = (0..33).map(|at| &bytes[at..4096 - 57 * at]).collect();
    let right = [alike, unlike].iter().all(|photos| side_by_side(photos) == one_by_one(photos));
    if !right {
        tracing::error!("digests taken side by side are wrong on this processor; each photo is digested alone");
    }
    right
}

fn digest_all(mut together: Vec<Waiting>) {
    let photos: Option<Vec<&[u8]>> = together.iter().map(|one| one.photo.in_memory()).collect();
    let digests = match photos {
        Some(photos) => sha256_of(&photos),
        None => together.iter_mut().map(|one| one.photo.sha256()).collect(),
    };
    for (one, sha256) in together.into_iter().zip(digests) {
        // whoever is gone needs none
        let _ = one.done.send((one.photo, sha256));
    }
}

/// The digests of all, in their order.
pub fn sha256_of(photos: &[&[u8]]) -> Vec<Sha256> {
    let bytes: usize = photos.iter().map(|photo| photo.len()).sum();
    let longest = photos.iter().map(|photo| photo.len()).max().unwrap_or(0);
    match bytes >= TOGETHER_MIN * longest {
        true => side_by_side(photos),
        false => one_by_one(photos),
    }
}

fn side_by_side(photos: &[&[u8]]) -> Vec<Sha256> {
    let mut digests = vec![[0; 32]; photos.len()];
    tape_sha256::hash_many(photos, &mut digests);
    digests.into_iter().map(Sha256).collect()
}

fn one_by_one(photos: &[&[u8]]) -> Vec<Sha256> {
    photos.iter().map(|photo| Sha256::of(photo)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::config::SpoolLimits;
    use crate::spool::Spool;
    use crate::units::{ByteSize, Reserve};

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn photos_of_any_sizes_have_the_same_digests_together_as_alone(
            photos in vec(vec(any::<u8>(), 0..2_000), 0..40)
        ) {
            let photos: Vec<&[u8]> = photos.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(side_by_side(&photos), one_by_one(&photos));
            prop_assert_eq!(sha256_of(&photos), one_by_one(&photos));
        }

        #[test]
        fn photos_of_one_size_have_the_same_digests_together_as_alone(
            bytes in vec(any::<u8>(), 400), size in 0..300usize, many in 0..40usize
        ) {
            let photos: Vec<&[u8]> = (0..many).map(|at| &bytes[at..at + size]).collect();
            prop_assert_eq!(side_by_side(&photos), one_by_one(&photos));
        }
    }

    /// On a processor on which four go side by side.
    fn four_lanes(patience: Duration) -> Digests {
        Digests { lanes: Some(Arc::new(Mutex::new(Lanes::new(4)))), patience, ..Digests::of_this_processor() }
    }

    #[test]
    fn photos_are_digested_on_the_way_until_many_have_begun_within_a_moment() {
        let (mut lanes, mut now) = (Lanes::new(4), Instant::now());
        let moment = Duration::from_millis(10);
        let mut begin = |after: Duration| {
            now += after;
            lanes.begins(now, moment)
        };
        assert!((0..100).all(|_| !begin(moment)), "one by one");
        let together: Vec<bool> = (0..MANY).map(|_| begin(Duration::from_micros(10))).collect();
        assert_eq!(together, [false, false, false, false, false, false, true, true]);
        assert!(!begin(moment), "and not after that");
    }

    #[tokio::test]
    async fn who_fills_the_lanes_digests_all_that_wait() {
        let digests = four_lanes(Duration::from_secs(3600));
        let photos = [[1; 20_000], [2; 20_000], [3; 20_000], [4; 20_000]];
        let brought = photos.iter().map(|photo| digests.digest(photo.to_vec().into()));
        for (photo, digested) in photos.iter().zip(futures_util::future::join_all(brought).await) {
            assert_eq!(digested.unwrap().1, Sha256::of(photo));
        }
    }

    #[tokio::test]
    async fn a_photo_does_not_wait_for_others_that_do_not_come() {
        let digests = four_lanes(Duration::from_millis(1));
        let (_, sha256) = digests.digest(vec![1; 20_000].into()).await.unwrap();
        assert_eq!(sha256, Sha256::of(&[1; 20_000]));
    }

    #[tokio::test]
    async fn each_photo_comes_back_with_its_own_digest() {
        let digests = Digests::of_this_processor();
        let photos: Vec<Vec<u8>> =
            (0..50).map(|n: u8| vec![n; 100 * usize::from(n)]).chain([vec![7; 3 << 20]]).collect();
        let brought = photos.iter().map(|photo| digests.digest(photo.clone().into()));
        for (photo, digested) in photos.iter().zip(futures_util::future::join_all(brought).await) {
            let (back, sha256) = digested.unwrap();
            assert_eq!((back.in_memory(), sha256), (Some(photo.as_slice()), Sha256::of(photo)));
        }
    }

    #[tokio::test]
    async fn a_photo_that_was_begun_on_disk_has_the_digest_of_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let limits = SpoolLimits { reserve: Reserve::Bytes(ByteSize(0)), max: None };
        let spool = Spool::open(folder.path(), limits).unwrap();
        let mut photo = Unfinished::from(b"some ".to_vec());
        photo = spool.write_out(photo).await.unwrap();
        photo.rest().appended_to().extend_from_slice(b"bytes");
        let (_, sha256) = Digests::of_this_processor().digest(photo).await.unwrap();
        assert_eq!(sha256, Sha256::of(b"some bytes"));
    }
}
