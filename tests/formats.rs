//! Every format that is read, from files changed at random: a typed error or something that holds, never a panic. The
//! functions are those of the fuzz targets. `SEGATTN_FORMATS=SECONDS` goes on for so long with each format, and
//! `SEGATTN_CORPUS=FOLDER` writes files there to begin fuzzing with.

#![cfg(all(feature = "cli", feature = "serve"))]

#[path = "../fuzz/formats.rs"]
mod formats;
mod samples;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Formats that are written again where they can be read, each file synced.
const SYNCED: [&str; 2] = ["gguf", "state_json"];

/// One to five random changes: a bit, a byte, a piece removed, doubled or put elsewhere, a digit made large.
fn change(bytes: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    for _ in 0..=random.next_u32() % 5 {
        if bytes.is_empty() {
            return;
        }
        let at = random.next_u32() as usize % bytes.len();
        let end = bytes.len().min(at + 1 + random.next_u32() as usize % 16);
        match random.next_u32() % 7 {
            0 => bytes[at] ^= 1 << (random.next_u32() % 8),
            1 => bytes[at] = random.next_u32() as u8,
            2 => drop(bytes.drain(at..end)),
            3 => {
                let piece = bytes[at..end].to_vec();
                let to = random.next_u32() as usize % bytes.len();
                bytes.splice(to..to, piece);
            }
            4 => bytes.truncate(at),
            5 => {
                if let Some(digit) = (at..bytes.len()).find(|i| bytes[*i].is_ascii_digit()) {
                    bytes.splice(digit..=digit, *b"18446744073709551615");
                }
            }
            _ => {
                let piece = [
                    &b"null"[..],
                    b"-1",
                    b"[]",
                    b"{}",
                    b"\"\"",
                    b"1e999",
                    b"\xff",
                ];
                let piece = piece[random.next_u32() as usize % 7];
                bytes.splice(at..end, piece.iter().copied());
            }
        }
    }
}

#[test]
fn changed_files_of_every_format_are_errors_or_hold() {
    let seconds = std::env::var("SEGATTN_FORMATS")
        .ok()
        .map(|s| s.parse().unwrap());
    for (n, (name, read)) in formats::ALL.into_iter().enumerate() {
        let good = samples::of(name);
        let mut random = ChaCha8Rng::seed_from_u64(n as u64);
        let (started, mut count) = (Instant::now(), 0u64);
        let more = |count: u64| match seconds {
            Some(seconds) => started.elapsed() < Duration::from_secs(seconds),
            None => count < if SYNCED.contains(&name) { 50 } else { 300 },
        };
        let folder = tempfile::tempdir().unwrap();
        for good in &good {
            read(good, folder.path());
        }
        while more(count) {
            let mut bytes = good[count as usize % good.len()].clone();
            change(&mut bytes, &mut random);
            read(&bytes, folder.path());
            count += 1;
        }
        eprintln!("{name}: {count} files");
    }
}

/// Fuzzing of formats made of text begins with words of them.
#[test]
fn a_corpus_has_files_of_every_format_and_their_words() {
    let kept = std::env::var_os("SEGATTN_CORPUS");
    let scratch = tempfile::tempdir().unwrap();
    let folder = kept.as_ref().map_or(scratch.path(), Path::new);
    for (name, _) in formats::ALL {
        let of_format = folder.join(name);
        std::fs::create_dir_all(&of_format).unwrap();
        let mut words = BTreeSet::new();
        for (i, sample) in samples::of(name).iter().enumerate() {
            std::fs::write(of_format.join(format!("good-{i}")), sample).unwrap();
            words.extend(words_of(sample));
        }
        let lines: String = words
            .iter()
            .take(400)
            .map(|word| format!("\"{word}\"\n"))
            .collect();
        std::fs::write(folder.join(format!("{name}.dict")), lines).unwrap();
    }
    let keys = std::fs::read_to_string(folder.join("config.dict")).unwrap();
    assert!(keys.contains("\"rope_theta\"\n"), "{keys}");
}

/// Words of letters and underscores, as keys and names of types are.
fn words_of(sample: &[u8]) -> impl Iterator<Item = String> {
    let words = sample.split(|byte| !byte.is_ascii_alphabetic() && *byte != b'_');
    let words = words.filter(|word| (3..40).contains(&word.len()));
    words.map(|word| String::from_utf8_lossy(word).into_owned())
}
