//! SHA-256 of photos: as they come; and on a processor without instructions for it, while they come by the hundreds a second,
//! side by side when they are all there.
//!
//! A digest is one chain of steps, which no vector makes faster; but vectors carry many chains side by side, one in each lane,
//! in about the time of two or three. So while many photos come, one that is all there waits a moment for others, and whoever fills
//! the lanes, or has waited long enough, digests all that wait. Always: a photo that begins alone is digested on the way, while its
//! bytes are at hand, and waits for nobody. Never: a photo that waits for one of more than half a MiB.

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
/// A larger photo is digested by itself: the others would wait for it, and whatever else its thread has to do for all of them.
const TOGETHER_BYTES_MAX: usize = 512 * 1024;
/// So little that it is not worth a wait.
const AT_ONCE_BYTES_MAX: usize = 16 * 1024;
/// About the longest that a photo waits for others to be there: as long as its own digest would take a few times over.
const PATIENCE: Duration = Duration::from_millis(5);
/// Many come while so many have begun within this time: three or more while one waits, so that lanes are worth it.
const MANY: usize = 8;
const MANY_WITHIN: Duration = Duration::from_millis(13);

/// Where photos are brought to be digested. Cheap to clone. What waits is in memory and has its room there, so no more can wait
/// than are let in.
#[derive(Clone)]
pub struct Digests {
    /// None where lanes bring nothing.
    lanes: Option<Arc<Mutex<Lanes>>>,
    /// As many are digested apart as there are processors.
    apart: Arc<Semaphore>,
}

/// Chains that go side by side, and who waits for them.
struct Lanes {
    count: usize,
    waiting: Vec<Waiting>,
    /// How often those that waited were taken.
    taken: u64,
    /// When the latest photos began to come, one less than [`MANY`].
    begun: VecDeque<Instant>,
}

struct Waiting {
    photo: Unfinished,
    done: oneshot::Sender<(Unfinished, Sha256)>,
}

impl Lanes {
    fn new(count: usize) -> Lanes {
        Lanes { count, waiting: Vec::new(), taken: 0, begun: VecDeque::new() }
    }

    /// Another photo begins to come. Whether it is one of many.
    fn begins(&mut self, now: Instant) -> bool {
        self.begun.push_back(now);
        if self.begun.len() < MANY {
            return false;
        }
        self.begun.pop_front().is_some_and(|first| now.duration_since(first) < MANY_WITHIN)
    }

    /// Another photo is all there. By what it is known that it still waits, and all that wait, if they fill the lanes.
    fn arrives(&mut self, one: Waiting) -> (u64, Vec<Waiting>) {
        self.waiting.push(one);
        let since = self.taken;
        (since, if self.waiting.len() < self.count { Vec::new() } else { self.take(since) })
    }

    /// All that wait, if those that did at `since` have not been taken yet.
    fn take(&mut self, since: u64) -> Vec<Waiting> {
        if self.taken != since {
            return Vec::new();
        }
        self.taken += 1;
        mem::take(&mut self.waiting)
    }
}

impl Digests {
    pub fn of_this_processor() -> Digests {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let lanes = lane_count().map(|count| Arc::new(Mutex::new(Lanes::new(count.get()))));
        Digests { lanes, apart: Arc::new(Semaphore::new(processors)) }
    }

    /// A photo begins to come, in a body of so many bytes, or of 0 if it does not say. Whether its digest is to be taken on the way.
    pub fn on_the_way(&self, body_bytes: u64) -> bool {
        // base64 takes a third more
        let fits = (1..=TOGETHER_BYTES_MAX as u64 / 3 * 4).contains(&body_bytes);
        self.lanes.as_ref().is_none_or(|lanes| !lock(lanes).begins(Instant::now()) || !fits)
    }

    /// Gives the photo back with its digest.
    pub async fn digest(&self, mut photo: Unfinished) -> Result<(Unfinished, Sha256), Problem> {
        if photo.undigested_bytes() <= AT_ONCE_BYTES_MAX {
            let sha256 = photo.sha256();
            return Ok((photo, sha256));
        }
        let fits = photo.in_memory().is_some_and(|bytes| bytes.len() <= TOGETHER_BYTES_MAX);
        let digested = match &self.lanes {
            Some(lanes) if fits => together(lanes, photo).await,
            _ => self.apart(photo).await,
        };
        digested.ok_or_else(|| Problem::new(Kind::Internal, "the photo was not kept; send it again"))
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

/// None when whoever digested it did not come to its end.
async fn together(lanes: &Mutex<Lanes>, photo: Unfinished) -> Option<(Unfinished, Sha256)> {
    let (done, mut digested) = oneshot::channel();
    let (since, full) = lock(lanes).arrives(Waiting { photo, done });
    digest_all(full);
    if let Ok(digested) = timeout(PATIENCE, &mut digested).await {
        return digested.ok();
    }
    let there = lock(lanes).take(since);
    digest_all(there);
    digested.await.ok()
}

/// It is held for moments only, and nothing in it is left half done.
fn lock(lanes: &Mutex<Lanes>) -> MutexGuard<'_, Lanes> {
    lanes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many chains go side by side here, if they are worth anything.
fn lane_count() -> Option<NonZero<usize>> {
    #[cfg(target_arch = "x86_64")]
    let has_instructions = std::arch::is_x86_feature_detected!("sha");
    #[cfg(target_arch = "aarch64")]
    let has_instructions = std::arch::is_aarch64_feature_detected!("sha2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has_instructions = true; // it is not known
    let count = tape_sha256::lane_width();
    if !has_instructions && count > 1 && are_right(count) { NonZero::new(count) } else { None }
}

/// A digest stands in the record for good, so on this very processor the lanes are held against the digest of one chain.
fn are_right(count: usize) -> bool {
    let bytes: Vec<u8> = (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let right = (1..=count + 1).all(|many| {
        let alike: Vec<&[u8]> = (0..many).map(|at| &bytes[at..at + 1000]).collect();
        let unlike: Vec<&[u8]> = (0..many).map(|at| &bytes[at..4096 - 57 * at]).collect();
        [alike, unlike].iter().all(|photos| side_by_side(photos) == one_by_one(photos))
    });
    if !right {
        tracing::error!("digests taken side by side are wrong on this processor; each photo is digested alone");
    }
    right
}

fn digest_all(mut together: Vec<Waiting>) {
    let in_memory: Option<Vec<&[u8]>> = together.iter().map(|one| one.photo.in_memory()).collect();
    let digests = match in_memory {
        Some(photos) => sha256_of(&photos),
        // none is brought that is not; what it says of a photo would still be right
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

    /// A processor on which four go side by side.
    fn four_lanes() -> Digests {
        Digests { lanes: Some(Arc::new(Mutex::new(Lanes::new(4)))), ..Digests::of_this_processor() }
    }

    /// Brings all at the same moment. They must come back, each with its own digest.
    async fn digest(digests: &Digests, photos: &[Vec<u8>]) {
        let brought = photos.iter().map(|photo| digests.digest(photo.clone().into()));
        for (photo, digested) in photos.iter().zip(futures_util::future::join_all(brought).await) {
            let (back, sha256) = digested.unwrap();
            assert_eq!((back.in_memory(), sha256), (Some(photo.as_slice()), Sha256::of(photo)));
        }
    }

    #[test]
    fn what_goes_side_by_side_on_this_processor_is_right() {
        assert!(are_right(tape_sha256::lane_width()));
    }

    #[test]
    fn photos_are_digested_on_the_way_until_many_have_begun_within_a_moment() {
        let (mut lanes, mut now) = (Lanes::new(4), Instant::now());
        let mut begin = |after: Duration| {
            now += after;
            lanes.begins(now)
        };
        assert!((0..100).all(|_| !begin(MANY_WITHIN)), "one by one");
        let together: Vec<bool> = (0..MANY).map(|_| begin(Duration::from_micros(10))).collect();
        assert_eq!(together, [false, false, false, false, false, false, true, true]);
        assert!(!begin(MANY_WITHIN), "and not after that");
    }

    #[test]
    fn a_photo_that_others_would_wait_for_or_may_is_digested_on_the_way_however_many_come() {
        // many have begun, and do not cease to have
        let begun = VecDeque::from([Instant::now() + Duration::from_secs(3600); MANY - 1]);
        let lanes = Lanes { begun, ..Lanes::new(4) };
        let digests = Digests { lanes: Some(Arc::new(Mutex::new(lanes))), ..four_lanes() };
        assert!(!digests.on_the_way(200_000));
        assert!(digests.on_the_way(2_000_000) && digests.on_the_way(0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_fills_the_lanes_digests_all_that_wait() {
        let began = tokio::time::Instant::now();
        digest(&four_lanes(), &[vec![1; 40_000], vec![2; 40_000], vec![3; 45_000], vec![4; 50_000]]).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn photos_do_not_wait_for_others_that_do_not_come() {
        let began = tokio::time::Instant::now();
        digest(&four_lanes(), &[vec![1; 20_000], vec![2; 20_000], vec![3; 20_000]]).await;
        assert!((PATIENCE..2 * PATIENCE).contains(&began.elapsed()), "{:?}", began.elapsed());
    }

    #[test]
    fn whose_photo_was_taken_leaves_those_that_came_after_it_alone() {
        let mut lanes = Lanes::new(2);
        let waiting = || Waiting { photo: vec![1; 20_000].into(), done: oneshot::channel().0 };
        let (first, full) = lanes.arrives(waiting());
        assert!(full.is_empty());
        assert_eq!(lanes.arrives(waiting()).1.len(), 2);
        let (third, _) = lanes.arrives(waiting());
        assert!(lanes.take(first).is_empty());
        assert_eq!(lanes.take(third).len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn each_photo_comes_back_with_its_own_digest() {
        let sizes = (0..50).map(|n| 1_000 + 997 * n).chain([TOGETHER_BYTES_MAX, TOGETHER_BYTES_MAX + 1, 3 << 20]);
        let photos: Vec<Vec<u8>> = sizes.enumerate().map(|(n, size)| vec![n as u8; size]).collect();
        digest(&four_lanes(), &photos).await;
        digest(&Digests::of_this_processor(), &photos).await;
    }

    #[tokio::test]
    async fn a_photo_that_was_begun_on_disk_has_the_digest_of_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let limits = SpoolLimits { reserve: Reserve::Bytes(ByteSize(0)), max: None };
        let spool = Spool::open(folder.path(), limits).unwrap();
        let mut photo = Unfinished::from(vec![1; 20_000]);
        photo = spool.write_out(photo).await.unwrap();
        photo.rest().appended_to().extend_from_slice(&[2; 20_000]);
        let (_, sha256) = four_lanes().digest(photo).await.unwrap();
        assert_eq!(sha256, Sha256::of(&[[1; 20_000], [2; 20_000]].concat()));
    }
}
