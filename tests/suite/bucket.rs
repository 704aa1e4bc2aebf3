//! Photos in a bucket of a real store: what was put is what is read back, whatever its key.

use bytes::Bytes;
use forebay::bucket::{Held, Object};
use forebay::pacer::Turn;
use forebay::upload::{ImageType, Sha256};

use crate::support::{photo, weed};

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_is_read_back_by_the_key_it_was_put_under() {
    let (bucket, _, _) = weed::bucket().await;
    let photo = Bytes::from(photo(1));
    let (sha256, turn) = (Sha256::of(&photo), Turn::default());
    for key in ["plain.jpg", "a b/c+d/e%2Ff.jpg", "ü/日本/ß.jpg", "all/~!@#$&*()_-=,.;:'[]{}^|?.jpg"] {
        let object = Object { key, content_type: ImageType::Jpeg, sha256, photo: &photo, turn: &turn };
        bucket.put(&object).await.unwrap();
        assert_eq!(bucket.confirmed(&object).await.unwrap(), Held::Yes, "{key}");
        assert_eq!(bucket.read_back(key).await.unwrap(), Some((photo.len() as u64, sha256)), "{key}");
    }
    let mut keys = 0;
    bucket.list("", |_| keys += 1).await.unwrap();
    assert_eq!(keys, 4);
}
