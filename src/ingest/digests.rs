//! SHA-256 of photos: as they come, where the processor has instructions for it; else when they are all there, many at once.
//!
//! A digest is one chain of steps, which no vector makes faster; but vectors carry many chains side by side, one in each lane,
//! in about the time of two. Processors with instructions for SHA-256 do without. Always: while the processor has nothing else
//! to do, a photo is digested at once, alone if it is alone; while it is busy, the others' work goes first, for a moment, so
//! that there are more photos to take together. Never: a photo that waits long for others, or for a much larger one.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot};

use crate::http::problem::{Kind, Problem};
use crate::spool::Unfinished;
use crate::upload::Sha256;

/// So many times the bytes of the longest must be there: side by side the lanes go on until the longest is done, and take
/// about so much longer than one chain alone (twice with AVX-512, 2.8 times with AVX2).
const TOGETHER_MIN: usize = 3;
/// A larger photo is digested apart, as the others would wait for it.
const TOGETHER_BYTES_MAX: usize = 1024 * 1024;
/// So little that it is not worth a hand-over to another thread.
const AT_ONCE_BYTES_MAX: usize = 16 * 1024;
/// The longest that a photo waits for others, looked at whenever the processor was given up.
const PATIENCE: Duration = Duration::from_millis(10);
/// Whoever gives the processor up and has it back sooner than this was alone on it.
const ALONE: Duration = Duration::from_micros(20);

/// Where photos are brought to be digested. Cheap to clone; its thread ends with the last of its clones. What waits is in
/// memory and has its room there, so no more can wait than are let in.
#[derive(Clone)]
pub struct Digests {
    /// None where there are no lanes to share.
    waiting: Option<Sender<Waiting>>,
    /// As many are digested apart as there are processors.
    apart: Arc<Semaphore>,
}

struct Waiting {
    photo: Unfinished,
    done: oneshot::Sender<(Unfinished, Sha256)>,
}

impl Digests {
    pub fn start() -> Digests {
        let (waiting, brought) = channel();
        let lanes = lanes();
        let share = move || digest_all(&brought, lanes);
        let shared = lanes > 1 && thread::Builder::new().name("digests".to_owned()).spawn(share).is_ok();
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        Digests { waiting: shared.then_some(waiting), apart: Arc::new(Semaphore::new(processors)) }
    }

    /// A photo's digest is best taken as it comes, while its bytes are at hand.
    pub fn as_they_come(&self) -> bool {
        self.waiting.is_none()
    }

    /// Gives the photo back with its digest.
    pub async fn digest(&self, mut photo: Unfinished) -> Result<(Unfinished, Sha256), Problem> {
        if photo.undigested_bytes() <= AT_ONCE_BYTES_MAX {
            let sha256 = photo.sha256();
            return Ok((photo, sha256));
        }
        let fits = photo.in_memory().is_some_and(|bytes| bytes.len() <= TOGETHER_BYTES_MAX);
        let mut photo = match &self.waiting {
            Some(waiting) if fits => {
                let (done, digested) = oneshot::channel();
                match waiting.send(Waiting { photo, done }) {
                    Ok(()) => return digested.await.map_err(|_| not_digested()),
                    Err(unsent) => unsent.0.photo,
                }
            }
            _ => photo,
        };
        let _place = self.apart.acquire().await.map_err(|_| not_digested())?;
        let digested = tokio::task::spawn_blocking(move || {
            let sha256 = photo.sha256();
            (photo, sha256)
        });
        digested.await.map_err(|_| not_digested())
    }
}

fn not_digested() -> Problem {
    Problem::new(Kind::Internal, "the photo was not kept; send it again")
}

/// How many chains go side by side here: one where the processor has instructions for SHA-256.
fn lanes() -> usize {
    #[cfg(target_arch = "x86_64")]
    let has_instructions = std::arch::is_x86_feature_detected!("sha");
    #[cfg(target_arch = "aarch64")]
    let has_instructions = std::arch::is_aarch64_feature_detected!("sha2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has_instructions = true;
    match has_instructions || !are_right() {
        true => 1,
        false => tape_sha256::lane_width(),
    }
}

/// A digest stands in the record for good, so on this very processor the lanes are held against the digest of one chain.
fn are_right() -> bool {
    let bytes: Vec<u8> = (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let alike: Vec<&[u8]> = (0..33).map(|at| &bytes[at..at + 4000]).collect();
    let unlike: Vec<&[u8]> = (0..33).map(|at| &bytes[at..4096 - 57 * at]).collect();
    let right = [alike, unlike].iter().all(|photos| side_by_side(photos) == one_by_one(photos));
    if !right {
        tracing::error!("vectors give wrong digests on this processor; each photo is digested alone");
    }
    right
}

fn digest_all(brought: &Receiver<Waiting>, lanes: usize) {
    while let Ok(first) = brought.recv() {
        let since = Instant::now();
        let mut together = vec![first];
        loop {
            together.extend(brought.try_iter().take(lanes - together.len()));
            if together.len() == lanes || since.elapsed() > PATIENCE || !others_had_work() {
                break;
            }
        }
        let photos: Option<Vec<&[u8]>> = together.iter().map(|one| one.photo.in_memory()).collect();
        let digests = match photos {
            Some(photos) => sha256_of(&photos),
            None => together.iter_mut().map(|one| one.photo.sha256()).collect(),
        };
        for (one, sha256) in together.into_iter().zip(digests) {
            let _ = one.done.send((one.photo, sha256));
        }
    }
}

/// Gives the processor up to whoever waits for it. False when nobody did.
fn others_had_work() -> bool {
    let before = Instant::now();
    thread::yield_now();
    before.elapsed() > ALONE
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

    #[tokio::test]
    async fn each_photo_comes_back_with_its_own_digest() {
        let digests = Digests::start();
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
        let (_, sha256) = Digests::start().digest(photo).await.unwrap();
        assert_eq!(sha256, Sha256::of(b"some bytes"));
    }
}
