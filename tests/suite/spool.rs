//! The spool: what is stored is there, whole, with its record; what is not, leaves nothing behind.

use std::collections::BTreeMap;
use std::fs::{File, FileTimes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use forebay::config::SpoolLimits;
use forebay::error::Error;
use forebay::spool::{Spool, Stored};
use forebay::units::{ByteSize, Reserve};
use forebay::upload::{METADATA_BYTES_MAX, Upload};

use crate::support::{NO_LIMITS, photo, upload_of};

fn open(folder: &tempfile::TempDir) -> Spool {
    Spool::open(folder.path(), NO_LIMITS).unwrap()
}

fn only_file(spool: &Spool) -> PathBuf {
    let mut files = Vec::new();
    spool.walk(|path, _| files.push(path.to_owned())).unwrap();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

fn flip_byte(path: &Path, place: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[place] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_spool_with_a_file_in_the_place_of_a_folder_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(&folder));
    let place = folder.path().join("spool/7f");
    std::fs::remove_dir(&place).unwrap();
    std::fs::write(&place, "not a folder").unwrap();
    let why = Spool::open(folder.path(), NO_LIMITS).err().expect("photos could not be stored").to_string();
    assert!(why.contains("cannot open the spool") && why.contains("Not a directory"), "{why}");
}

#[tokio::test]
async fn a_spool_over_which_another_was_mounted_takes_no_more_photos() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    spool.store(upload_of(&photo, "before"), photo.clone()).await.unwrap();
    std::fs::rename(folder.path().join("spool"), folder.path().join("under the mount")).unwrap();
    let mounted = open(&folder);
    // of the first, what is under the mount has the name too
    for upload_id in ["before", "after"] {
        let refused = spool.store(upload_of(&photo, upload_id), photo.clone()).await.unwrap_err();
        assert!(matches!(&refused, Error::Unavailable(why) if why.contains("restart")), "{refused:?}");
    }
    assert!(spool.check_fault().is_err());
    assert_eq!(mounted.store(upload_of(&photo, "restarted"), photo).await.unwrap(), Stored::New);
}

#[tokio::test]
async fn a_stored_photo_is_read_back_with_its_record() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    assert_eq!(spool.store(upload.clone(), photo.clone()).await.unwrap(), Stored::New);
    assert_eq!(spool.read(upload.clone()).await.unwrap(), photo);
    let mut found = Vec::new();
    spool.walk(|_, record| found.push(record.unwrap())).unwrap();
    assert_eq!(found, [(*upload).clone()]);
    assert_eq!(spool.incoming_count().unwrap(), 0);
}

#[tokio::test]
async fn a_record_with_as_much_metadata_as_there_may_be_is_read_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    // each of these is two bytes in the record
    let metadata = BTreeMap::from([("k".to_owned(), "\"".repeat(METADATA_BYTES_MAX - 1))]);
    let upload = Arc::new(Upload { metadata, ..(*upload_of(&photo, "1")).clone() });
    spool.store(upload.clone(), photo.clone()).await.unwrap();
    assert_eq!(spool.read(upload.clone()).await.unwrap(), photo);
    spool.walk(|_, record| assert_eq!(record.unwrap(), *upload)).unwrap();
}

#[tokio::test]
async fn reading_a_photo_does_not_note_when_it_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    spool.store(upload.clone(), photo).await.unwrap();
    let file = File::open(spool.path(upload.id)).unwrap();
    // before it was written, as what is noted at most once a day would be noted then
    let long_ago = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    file.set_times(FileTimes::new().set_accessed(long_ago)).unwrap();
    spool.read(upload).await.unwrap();
    assert_eq!(file.metadata().unwrap().accessed().unwrap(), long_ago);
}

#[tokio::test]
async fn a_stored_photo_opens_as_an_image_where_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    spool.store(upload_of(&photo, "1"), photo.clone()).await.unwrap();
    assert!(std::fs::read(only_file(&spool)).unwrap().starts_with(&photo));
}

#[tokio::test]
async fn the_same_id_again_keeps_the_first_photo_and_says_whose_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(&folder);
    let (first, second) = (photo(1), photo(2));
    spool.store(upload_of(&first, "1"), first.clone()).await.unwrap();
    let again = spool.store(upload_of(&second, "1"), second).await.unwrap();
    assert_eq!(again, Stored::Held(Box::new((*upload_of(&first, "1")).clone())));
    assert_eq!(spool.read(upload_of(&first, "1")).await.unwrap(), first);
    assert_eq!(spool.incoming_count().unwrap(), 0);
}

#[tokio::test]
async fn of_one_photo_stored_fifty_times_at_once_one_is_new() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let all = (0..50).map(|_| spool.store(upload_of(&photo, "1"), photo.clone()));
    let stored = futures_util::future::join_all(all).await;
    assert_eq!(stored.iter().filter(|s| s.as_ref().unwrap() == &Stored::New).count(), 1);
    only_file(&spool);
}

/// A photo damaged at `place` is replaced when its device sends it again.
async fn a_photo_damaged_at_is_replaced(place: usize) {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    spool.store(upload_of(&photo, "1"), photo.clone()).await.unwrap();
    flip_byte(&only_file(&spool), place);
    assert_eq!(spool.store(upload_of(&photo, "1"), photo.clone()).await.unwrap(), Stored::Replaced);
    assert_eq!(spool.read(upload_of(&photo, "1")).await.unwrap(), photo);
    assert_eq!(std::fs::read_dir(folder.path().join("spool/damaged")).unwrap().count(), 1, "for people to look at");
    assert_eq!(spool.incoming_count().unwrap(), 0);
}

#[tokio::test]
async fn a_photo_that_was_damaged_on_disk_is_replaced_when_it_is_sent_again() {
    a_photo_damaged_at_is_replaced(5_000).await;
}

#[tokio::test]
async fn a_photo_whose_record_was_damaged_on_disk_is_replaced_when_it_is_sent_again() {
    a_photo_damaged_at_is_replaced(photo(1).len() + 20).await;
}

#[tokio::test]
async fn a_damaged_photo_is_not_replaced_by_another_that_has_its_id() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, first, second) = (open(&folder), photo(1), photo(2));
    spool.store(upload_of(&first, "1"), first.clone()).await.unwrap();
    flip_byte(&only_file(&spool), 5_000);
    let damaged = std::fs::read(only_file(&spool)).unwrap();
    let stored = spool.store(upload_of(&second, "1"), second.clone()).await.unwrap();
    assert_eq!(stored, Stored::Held(Box::new((*upload_of(&first, "1")).clone())));
    flip_byte(&only_file(&spool), first.len() + 20);
    assert!(spool.store(upload_of(&second, "1"), second).await.is_err(), "whose it was cannot be told");
    assert!(std::fs::read(only_file(&spool)).unwrap()[..first.len()] == damaged[..first.len()]);
}

#[tokio::test]
async fn a_byte_that_changed_on_disk_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    spool.store(upload.clone(), photo.clone()).await.unwrap();
    flip_byte(&only_file(&spool), photo.len() / 2);
    assert!(matches!(spool.read(upload).await, Err(Error::Damaged(_))));
}

#[tokio::test]
async fn a_record_that_changed_on_disk_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    spool.store(upload_of(&photo, "1"), photo.clone()).await.unwrap();
    flip_byte(&only_file(&spool), photo.len() + 20);
    spool.walk(|_, record| assert!(matches!(record, Err(Error::Damaged(_))), "{record:?}")).unwrap();
}

#[tokio::test]
async fn a_photo_that_was_cut_off_on_disk_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    spool.store(upload.clone(), photo.clone()).await.unwrap();
    let path = only_file(&spool);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(photo.len() as u64 / 2).unwrap();
    assert!(matches!(spool.read(upload).await, Err(Error::Damaged(_))));
    spool.walk(|_, record| assert!(matches!(record, Err(Error::Damaged(_))))).unwrap();
}

#[tokio::test]
async fn a_photo_that_is_gone_is_missing_and_removing_it_again_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    spool.store(upload.clone(), photo).await.unwrap();
    spool.remove(upload.clone()).await.unwrap();
    spool.remove(upload.clone()).await.unwrap();
    assert!(matches!(spool.read(upload).await, Err(Error::Missing(_))));
}

/// By other uploads under the same id, one after another, as after a removal that the queue never heard of.
async fn the_photo_that_took_its_place_stays(read_before: bool) {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(&folder);
    let (gone, new) = (upload_of(&photo(1), "1"), upload_of(&photo(2), "1"));
    spool.store(gone.clone(), photo(1)).await.unwrap();
    if read_before {
        spool.read(gone.clone()).await.unwrap();
    }
    std::fs::remove_file(only_file(&spool)).unwrap();
    spool.store(new.clone(), photo(2)).await.unwrap();
    spool.remove(gone).await.unwrap();
    assert_eq!(spool.read(new.clone()).await.unwrap(), photo(2));
    spool.remove(new.clone()).await.unwrap();
    assert!(matches!(spool.read(new).await, Err(Error::Missing(_))));
}

#[tokio::test]
async fn removing_a_photo_leaves_another_that_took_its_place() {
    the_photo_that_took_its_place_stays(false).await;
}

#[tokio::test]
async fn removing_a_photo_that_was_read_leaves_another_that_took_its_place() {
    the_photo_that_took_its_place_stays(true).await;
}

#[tokio::test]
async fn the_journal_gives_back_what_was_marked_until_the_mark_is_taken_off() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    spool.store(upload.clone(), photo).await.unwrap();
    spool.journal(upload.clone()).await.unwrap();
    assert_eq!(open(&folder).journaled(10).await.unwrap(), [(*upload).clone()], "also after a restart");
    spool.unjournal(&upload).await.unwrap();
    assert_eq!(spool.journaled(10).await.unwrap(), []);
}

#[tokio::test]
async fn a_mark_whose_photo_is_gone_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, photo) = (open(&folder), photo(1));
    let upload = upload_of(&photo, "1");
    spool.store(upload.clone(), photo).await.unwrap();
    spool.journal(upload.clone()).await.unwrap();
    spool.remove(upload).await.unwrap();
    assert_eq!(spool.journaled(10).await.unwrap(), []);
    assert_eq!(std::fs::read_dir(folder.path().join("spool/journal")).unwrap().count(), 0);
}

#[test]
fn what_a_dead_writer_left_is_swept_once_it_is_old() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(&folder);
    std::fs::write(folder.path().join("spool/incoming/dead.part"), b"half a photo").unwrap();
    assert_eq!(spool.sweep_incoming(Duration::from_secs(3600)).unwrap(), 0, "its writer may live");
    assert_eq!(spool.sweep_incoming(Duration::ZERO).unwrap(), 1);
}

#[test]
fn a_photo_that_would_eat_into_the_reserve_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let free = open(&folder).space().unwrap().free_bytes;
    let limits = SpoolLimits { reserve: Reserve::Bytes(ByteSize(free + (1 << 40))), max: None };
    let spool = Spool::open(folder.path(), limits).unwrap();
    assert!(matches!(spool.admit(1), Err(Error::Full(_))));
}

#[tokio::test]
async fn a_spool_at_its_own_limit_refuses_until_it_holds_less() {
    let folder = tempfile::tempdir().unwrap();
    let limits = SpoolLimits { reserve: Reserve::Bytes(ByteSize(0)), max: Some(ByteSize(30_000)) };
    let (spool, photo) = (Spool::open(folder.path(), limits).unwrap(), photo(1));
    spool.admit(20_000).unwrap();
    spool.store(upload_of(&photo, "1"), photo).await.unwrap();
    assert!(matches!(spool.admit(20_000), Err(Error::Full(_))));
    spool.set_held_bytes(0);
    spool.admit(20_000).unwrap();
}
