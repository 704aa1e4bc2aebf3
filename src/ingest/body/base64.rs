//! Base64 as devices send it, decoded piece by piece straight into the photo.
//!
//! Takes the standard and the URL-safe alphabet, padded or not, with or without line breaks, with or without a `data:`
//! prefix. Always: an error names the place of the offending character. Never: a second copy of the text.

use base64_simd::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

/// Text that holds anything unusual is looked at in blocks of this size, so that one odd character does not slow down the rest.
const BLOCK_CHARS: usize = 4 * 256;
/// `data:image/jpeg;base64,` and its like are never longer.
const PREFIX_CHARS_MAX: usize = 200;

/// Decodes one value; text goes in by [`Decoder::push`] and ends with [`Decoder::finish`].
#[derive(Default)]
pub struct Decoder {
    prefix: Prefix,
    /// Sextets of an unfinished group of four.
    group: u32,
    group_len: u8,
    padding: u8,
    /// There was a line break.
    in_lines: bool,
    /// Characters seen so far, prefix included.
    seen: u64,
}

#[derive(Default)]
enum Prefix {
    /// Too early to tell; these are the characters so far.
    #[default]
    Undecided,
    Partial(Vec<u8>),
    /// After `data:`, before its comma.
    Data(Vec<u8>),
    Over,
}

/// What is wrong with the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Base64Error {
    #[error("the character at position {0} is not base64")]
    Character(u64),
    #[error("there is text behind the padding at position {0}")]
    BehindPadding(u64),
    #[error("it ends in the middle of a group of four characters, or with the wrong padding")]
    CutOff,
    #[error("its data: prefix is not one of base64, such as data:image/jpeg;base64,")]
    Prefix,
}

impl Decoder {
    /// Appends the bytes of `text` to `photo`.
    pub fn push(&mut self, text: &[u8], photo: &mut Vec<u8>) -> Result<(), Base64Error> {
        match &mut self.prefix {
            Prefix::Over => self.body(text, photo),
            _ => self.prefix(text, photo),
        }
    }

    /// Appends what the last characters hold.
    pub fn finish(mut self, photo: &mut Vec<u8>) -> Result<(), Base64Error> {
        match std::mem::replace(&mut self.prefix, Prefix::Over) {
            Prefix::Partial(held) => self.body(&held, photo)?,
            Prefix::Data(_) => return Err(Base64Error::Prefix),
            Prefix::Undecided | Prefix::Over => {}
        }
        let padded_right = self.padding == 0 || self.group_len + self.padding == 4;
        match self.group_len {
            _ if !padded_right => return Err(Base64Error::CutOff),
            0 => {}
            2 => photo.push((self.group >> 4) as u8),
            3 => photo.extend_from_slice(&[(self.group >> 10) as u8, (self.group >> 2) as u8]),
            _ => return Err(Base64Error::CutOff),
        }
        Ok(())
    }

    /// The first few characters decide whether there is a `data:` prefix; they may come in several pieces.
    fn prefix(&mut self, text: &[u8], photo: &mut Vec<u8>) -> Result<(), Base64Error> {
        const DATA: &[u8] = b"data:";
        let mut held = match std::mem::replace(&mut self.prefix, Prefix::Over) {
            Prefix::Undecided => Vec::new(),
            Prefix::Partial(held) => held,
            Prefix::Data(held) => return self.skip_prefix(held, text, photo),
            Prefix::Over => return self.body(text, photo),
        };
        let take = text.len().min(DATA.len() - held.len());
        held.extend_from_slice(&text[..take]);
        if held.eq_ignore_ascii_case(DATA) {
            return self.skip_prefix(held, &text[take..], photo);
        }
        if DATA.len() > held.len() && held.eq_ignore_ascii_case(&DATA[..held.len()]) {
            self.prefix = Prefix::Partial(held);
            return Ok(());
        }
        self.body(&held, photo)?;
        self.body(&text[take..], photo)
    }

    fn skip_prefix(&mut self, mut held: Vec<u8>, text: &[u8], photo: &mut Vec<u8>) -> Result<(), Base64Error> {
        let comma = memchr::memchr(b',', text);
        held.extend_from_slice(&text[..comma.unwrap_or(text.len()).min(PREFIX_CHARS_MAX)]);
        match comma {
            _ if held.len() > PREFIX_CHARS_MAX => Err(Base64Error::Prefix),
            Some(comma) if held.to_ascii_lowercase().ends_with(b";base64") => {
                self.seen += held.len() as u64 + 1;
                self.body(&text[comma + 1..], photo)
            }
            Some(_) => Err(Base64Error::Prefix),
            None => {
                self.prefix = Prefix::Data(held);
                Ok(())
            }
        }
    }

    fn body(&mut self, mut text: &[u8], photo: &mut Vec<u8>) -> Result<(), Base64Error> {
        // the usual case: all that came is of one alphabet, but for the padding at its end
        let mut plain = !self.in_lines;
        while !text.is_empty() {
            let aligned = self.group_len == 0 && self.padding == 0;
            if aligned {
                let run = match plain {
                    true => text.len() - text.iter().rev().take(2).filter(|last| **last == b'=').count(),
                    // what comes before the next line break
                    false => {
                        let block = &text[..text.len().min(BLOCK_CHARS)];
                        memchr::memchr3(b'\n', b'\r', b' ', block).unwrap_or(block.len())
                    }
                } / 4
                    * 4;
                if run > 0 && fast(&text[..run], photo) {
                    self.seen += run as u64;
                    text = &text[run..];
                    continue;
                }
                // never tried twice, or a long text that is odd at its end would be decoded again and again
                if std::mem::take(&mut plain) && run > 0 {
                    continue;
                }
            }
            // one character at a time until the group is whole again, and what is odd is behind
            let (mut done, mut behind) = (0, !aligned);
            for &character in text.iter().take(BLOCK_CHARS) {
                self.character(character, photo)?;
                done += 1;
                behind |= is_break(character);
                if behind && self.group_len == 0 {
                    break;
                }
            }
            text = &text[done..];
        }
        Ok(())
    }

    fn character(&mut self, character: u8, photo: &mut Vec<u8>) -> Result<(), Base64Error> {
        let place = self.seen;
        self.seen += 1;
        if is_break(character) {
            self.in_lines = true;
            return Ok(());
        }
        if character == b'=' {
            self.padding += 1;
            return if self.padding > 2 { Err(Base64Error::Character(place)) } else { Ok(()) };
        }
        if self.padding > 0 {
            return Err(Base64Error::BehindPadding(place));
        }
        let sextet = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return Err(Base64Error::Character(place)),
        };
        self.group = self.group << 6 | u32::from(sextet);
        self.group_len += 1;
        if self.group_len == 4 {
            photo.extend_from_slice(&self.group.to_be_bytes()[1..]);
            (self.group, self.group_len) = (0, 0);
        }
        Ok(())
    }
}

fn is_break(character: u8) -> bool {
    matches!(character, b'\n' | b'\r' | b' ' | b'\t')
}

/// Appends whole groups of one alphabet at the processor's full width; false, and nothing appended, if there is anything
/// else among them.
fn fast(text: &[u8], photo: &mut Vec<u8>) -> bool {
    let start = photo.len();
    for alphabet in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
        // the alphabets differ in two characters, so a text without them is decided by the first
        if alphabet.decode_append(text, photo).is_ok() {
            return true;
        }
        photo.truncate(start);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(text: &[u8], piece: usize) -> Result<Vec<u8>, Base64Error> {
        let (mut decoder, mut photo) = (Decoder::default(), Vec::new());
        for piece in text.chunks(piece.max(1)) {
            decoder.push(piece, &mut photo)?;
        }
        decoder.finish(&mut photo)?;
        Ok(photo)
    }

    fn broken_into_lines(text: &str, width: usize, end: &str) -> String {
        text.as_bytes().chunks(width).map(|line| std::str::from_utf8(line).unwrap().to_owned() + end).collect()
    }

    proptest! {
        #[test]
        fn every_form_in_any_pieces_gives_the_same_bytes(
            photo in proptest::collection::vec(any::<u8>(), 0..3000),
            piece in 1usize..500,
            form in 0usize..7,
        ) {
            let text = match form {
                0 => base64_simd::STANDARD.encode_to_string(&photo),
                1 => base64_simd::STANDARD_NO_PAD.encode_to_string(&photo),
                2 => base64_simd::URL_SAFE.encode_to_string(&photo),
                3 => base64_simd::URL_SAFE_NO_PAD.encode_to_string(&photo),
                4 => broken_into_lines(&base64_simd::STANDARD.encode_to_string(&photo), 76, "\r\n"),
                5 => broken_into_lines(&base64_simd::STANDARD.encode_to_string(&photo), 61, "\n"),
                _ => format!("data:image/jpeg;base64,{}", base64_simd::STANDARD.encode_to_string(&photo)),
            };
            prop_assert_eq!(decode(text.as_bytes(), piece), Ok(photo));
        }

        #[test]
        fn a_bad_character_is_named_by_its_place(
            photo in proptest::collection::vec(any::<u8>(), 300..3000),
            piece in 1usize..500,
            place in any::<proptest::sample::Index>(),
        ) {
            let mut text = base64_simd::STANDARD_NO_PAD.encode_to_string(&photo).into_bytes();
            let place = place.index(text.len());
            text[place] = b'!';
            prop_assert_eq!(decode(&text, piece), Err(Base64Error::Character(place as u64)));
        }

        #[test]
        fn no_text_makes_it_panic(text in proptest::collection::vec(any::<u8>(), 0..200), piece in 1usize..50) {
            let _ = decode(&text, piece);
        }
    }

    #[test]
    fn text_that_ends_early_or_goes_on_behind_its_padding_is_refused() {
        assert_eq!(decode(b"QUJDR", 9), Err(Base64Error::CutOff));
        assert_eq!(decode(b"QUI=QUJD", 9), Err(Base64Error::BehindPadding(4)));
        assert_eq!(decode(b"QQ=", 9), Err(Base64Error::CutOff));
        assert_eq!(decode(b"QUJD=", 9), Err(Base64Error::CutOff));
        assert_eq!(decode(b"QQ===", 9), Err(Base64Error::Character(4)));
    }

    #[test]
    fn a_data_prefix_must_say_base64() {
        assert_eq!(decode(b"data:image/jpeg,%ff%d8", 3), Err(Base64Error::Prefix));
        assert_eq!(decode(b"data:image/jpeg;base64", 3), Err(Base64Error::Prefix));
        assert_eq!(decode(b"DATA:image/jpeg;base64,QUJD", 3), Ok(b"ABC".to_vec()));
        assert_eq!(decode(b"data", 1), Ok(vec![0x75, 0xab, 0x5a]), "four letters of base64 that look like a prefix");
    }
}
