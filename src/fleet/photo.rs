//! Photos as a simulated camera takes them: real JPEGs of a wanted size, no two with the same bytes.
//!
//! A few scenes are encoded once; each photo is one of them with a comment segment of its own, and padded by further comment
//! segments to the wanted size, so that a thousand devices cost next to no time. Any decoder opens them.

use jpeg_encoder::{ColorType, Encoder, EncodingError};

/// The smallest photo that can be made.
pub const PHOTO_BYTES_MIN: usize = 2_000;
/// Different scenes.
const SCENES: usize = 8;
/// The most that one comment segment carries: its length field counts itself.
const COMMENT_BYTES_MAX: usize = 65_533;

/// Makes photos of one size.
pub struct Camera {
    scenes: Vec<Vec<u8>>,
    photo_bytes: usize,
}

impl Camera {
    /// Encodes the scenes. Takes a moment.
    pub fn new(photo_bytes: usize) -> Result<Camera, String> {
        if photo_bytes < PHOTO_BYTES_MIN {
            return Err(format!("a photo has at least {PHOTO_BYTES_MIN} bytes, not {photo_bytes}"));
        }
        let quality = best_quality(photo_bytes).map_err(|e| e.to_string())?;
        let scenes = (0..SCENES).map(|scene| encode(scene, photo_bytes, quality)).collect::<Result<Vec<_>, _>>();
        Ok(Camera { scenes: scenes.map_err(|e| e.to_string())?, photo_bytes })
    }

    /// A photo with `caption` in it. Another caption makes another photo.
    pub fn photo(&self, number: usize, caption: &str) -> Vec<u8> {
        let scene = &self.scenes[number % self.scenes.len()];
        let mut photo = Vec::with_capacity(self.photo_bytes + caption.len());
        photo.extend_from_slice(&scene[..2]); // start of image
        comment(&mut photo, caption.as_bytes());
        let mut missing = self.photo_bytes.saturating_sub(photo.len() + scene.len() - 2);
        while missing >= 4 {
            let bytes = (missing - 4).min(COMMENT_BYTES_MAX);
            comment(&mut photo, &vec![b'.'; bytes]);
            missing -= bytes + 4;
        }
        photo.extend_from_slice(&scene[2..]);
        photo
    }
}

fn comment(photo: &mut Vec<u8>, text: &[u8]) {
    let text = &text[..text.len().min(COMMENT_BYTES_MAX)];
    photo.extend_from_slice(&[0xff, 0xfe]);
    photo.extend_from_slice(&(text.len() as u16 + 2).to_be_bytes());
    photo.extend_from_slice(text);
}

/// The highest quality at which the scene with the most detail stays below the wanted size, a caption's length included.
fn best_quality(photo_bytes: usize) -> Result<u8, EncodingError> {
    let (mut fits, mut too_large) = (1, 96);
    while too_large - fits > 1 {
        let quality = (fits + too_large) / 2;
        if encode(0, photo_bytes, quality)?.len() + 200 <= photo_bytes * 97 / 100 {
            fits = quality
        } else {
            too_large = quality
        }
    }
    Ok(fits)
}

/// A landscape with hills and grain, of about five pixels a byte.
fn encode(scene: usize, photo_bytes: usize, quality: u8) -> Result<Vec<u8>, EncodingError> {
    let width = ((photo_bytes as f64 * 5.0 * 4.0 / 3.0).sqrt() as usize / 16 * 16).clamp(16, 8192);
    let height = (width * 3 / 4 / 8 * 8).max(8);
    let mut pixels = Vec::with_capacity(width * height * 3);
    let mut grain = 0x9e37_79b9_u32.wrapping_mul(scene as u32 + 1);
    for y in 0..height {
        for x in 0..width {
            grain ^= grain << 13;
            grain ^= grain >> 17;
            grain ^= grain << 5;
            let horizon = height as f32 * (0.5 + 0.1 * ((x as f32 / width as f32) * (5.0 + scene as f32)).sin());
            let noise = (grain & 15) as f32;
            let shade = y as f32 / height as f32;
            let (r, g, b) = match (y as f32) < horizon {
                true => (110.0 + 60.0 * shade, 150.0 + 50.0 * shade, 225.0),
                false => (70.0 + 40.0 * shade, 105.0 + 50.0 * shade, 50.0 + 10.0 * scene as f32),
            };
            pixels.extend([r + noise, g + noise, b + noise].map(|c| c.clamp(0.0, 255.0) as u8));
        }
    }
    let mut jpeg = Vec::with_capacity(photo_bytes);
    Encoder::new(&mut jpeg, quality).encode(&pixels, width as u16, height as u16, ColorType::Rgb)?;
    Ok(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upload::{ImageType, Sha256};

    #[test]
    fn photos_have_the_wanted_size_and_are_distinct_jpegs() {
        for size in [PHOTO_BYTES_MIN, 20_000, 250_000] {
            let camera = Camera::new(size).unwrap();
            let (a, b) = (camera.photo(0, "cam-1 1"), camera.photo(0, "cam-1 2"));
            assert_eq!(ImageType::sniff(&a), Some(ImageType::Jpeg));
            assert!(a.ends_with(&[0xff, 0xd9]), "ends as a JPEG");
            assert_ne!(Sha256::of(&a), Sha256::of(&b));
            assert!((size - 4..=size).contains(&a.len()), "{} for {size}", a.len());
        }
    }

    #[test]
    fn most_of_a_photo_is_picture() {
        let camera = Camera::new(250_000).unwrap();
        assert!(camera.scenes.iter().all(|scene| scene.len() > 200_000), "{:?}", camera.scenes.iter().map(Vec::len));
    }
}
