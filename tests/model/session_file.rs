//! A saved session goes on as if it had never been saved, and no file makes restoring panic.

use crate::common::{config, config_of, model, model_on, random, values};
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::config::{HeadReads, ModelConfig};
use segattn::model::decoder::Decoder;
use segattn::model::files::OutputFile;
use segattn::model::session::{Feed, Session};
use segattn::model::session_file::{Origin, SavedSequence, StateFile, StateFileError, save};
use std::path::Path;

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut next = random(seed);
    (0..len).map(|_| ((next() + 0.5) * 11.0) as u32).collect()
}

/// The past is read in the second layer only: in the first, equal tokens have equal keys, and ties
/// between a rounded key and one that is not break the wrong way on an f64 device.
fn segmented() -> ModelConfig {
    let mut config = config(true);
    if let Some(segment) = &mut config.segment {
        segment.head_reads[0] = vec![HeadReads::PRIOR; 4];
        segment.head_reads[1][1] = HeadReads {
            prior: false,
            past: true,
        };
    }
    config
}

/// The same with pools that drop tokens.
fn bounded() -> ModelConfig {
    let mut config = segmented();
    config.segment.as_mut().unwrap().pool_len = 10;
    config.validate().unwrap();
    config
}

fn plain() -> ModelConfig {
    let mut config = config(true);
    config.segment = None;
    config
}

/// Reads tokens `[from, to)` of every sequence; log-probabilities of the token after each.
fn read(
    session: &mut Session<'_, Reference>,
    sequences: &[Vec<u32>],
    from: usize,
    to: usize,
) -> Vec<Vec<f32>> {
    let feeds: Vec<Feed<'_>> = sequences
        .iter()
        .enumerate()
        .map(|(sequence, s)| Feed {
            sequence,
            tokens: &s[from.min(s.len() - 1)..to.min(s.len() - 1)],
            targets: &s[(from + 1).min(s.len())..(to + 1).min(s.len())],
            breaks: &[],
            rereads: &[],
        })
        .collect();
    session.feed(&feeds).unwrap()
}

fn assert_close(got: &[Vec<f32>], expected: &[Vec<f32>]) {
    // The file is f32, the device f64; on an f32 device the bits are equal.
    for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
        assert!((got - expected).abs() < 1e-5, "{got} for {expected}");
    }
}

#[test]
fn a_restored_session_goes_on_wherever_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let (path, again) = (dir.path().join("state"), dir.path().join("again"));
    for config in [segmented(), bounded(), plain()] {
        let model = model(&config, &values(&config, 4));
        let sequences = [tokens(1, 40), tokens(2, 40)];
        // Around a segment's end (8), in its middle, among the probes, and before anything is read.
        for cut in [0, 1, 4, 7, 8, 9, 15, 16, 21, 24, 39] {
            let mut session = Session::new(&model, 2, 39, 2).unwrap();
            read(&mut session, &sequences, 0, cut);
            save(
                &session,
                Origin::default(),
                &OutputFile::open(&path).unwrap(),
            )
            .unwrap();
            let expected = read(&mut session, &sequences, cut, 39);
            let mut file = StateFile::open(&path).unwrap();
            assert_eq!(file.positions(), [cut, cut]);
            let mut session = Session::new(&model, 2, 39, 1).unwrap();
            // What was there before is gone.
            read(&mut session, &[tokens(8, 40), tokens(9, 40)], 0, 19);
            file.restore(&mut session, "").unwrap();
            assert_eq!((session.position(0), session.position(1)), (cut, cut));
            save(
                &session,
                Origin::default(),
                &OutputFile::open(&again).unwrap(),
            )
            .unwrap();
            assert_eq!(
                std::fs::read(&path).unwrap(),
                std::fs::read(&again).unwrap()
            );
            assert_close(&read(&mut session, &sequences, cut, 39), &expected);
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_other_weights_or_tokens_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let config = segmented();
    let model = model(&config, &values(&config, 4));
    let sequence = tokens(1, 22);
    let mut session = Session::new(&model, 1, 39, 1).unwrap();
    read(&mut session, std::slice::from_ref(&sequence), 0, 21);
    let read = vec![sequence[..21].to_vec()];
    let origin = Origin {
        tokens: &read,
        weights: "these",
        ..Origin::default()
    };
    let place = OutputFile::open(&path).unwrap();
    save(&session, origin, &place).unwrap();
    let mut file = StateFile::open(&path).unwrap();
    assert_eq!(file.tokens(0).unwrap(), read[0]);
    file.restore(&mut session, "these").unwrap();
    let other = file.restore(&mut session, "others");
    assert!(
        matches!(other, Err(StateFileError::Mismatch { .. })),
        "{other:?}"
    );
    let fewer = [sequence[..20].to_vec()];
    let wrong = save(
        &session,
        Origin {
            tokens: &fewer,
            weights: "",
            ..Origin::default()
        },
        &place,
    );
    assert!(
        matches!(
            wrong,
            Err(StateFileError::Origin {
                expected: 21,
                got: 20,
                ..
            })
        ),
        "{wrong:?}"
    );
    let good = std::fs::read(&path).unwrap();
    // Every bit of the ends, and one of every 97th byte between.
    let places = (0..good.len()).filter(|i| *i < 64 || *i + 64 > good.len() || i % 97 == 0);
    for at in places {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, bad).unwrap();
        assert!(StateFile::open(&path).is_err(), "byte {at}");
    }
}

#[test]
fn one_saved_sequence_begins_many() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let config = segmented();
    let model = model(&config, &values(&config, 4));
    let sequence = tokens(1, 40);
    let mut session = Session::new(&model, 1, 39, 1).unwrap();
    read(&mut session, std::slice::from_ref(&sequence), 0, 21);
    save(
        &session,
        Origin::default(),
        &OutputFile::open(&path).unwrap(),
    )
    .unwrap();
    let expected = read(&mut session, std::slice::from_ref(&sequence), 21, 39);
    let mut session = Session::new(&model, 3, 39, 1).unwrap();
    StateFile::open(&path)
        .unwrap()
        .restore(&mut session, "")
        .unwrap();
    let all = vec![sequence; 3];
    for got in read(&mut session, &all, 21, 39) {
        assert_close(&[got], &expected);
    }
}

fn saved(path: &Path, model: &Decoder<Reference>, sequences: usize, len: usize) {
    let mut session = Session::new(model, sequences, 40, 1).unwrap();
    let all: Vec<Vec<u32>> = (0..sequences).map(|s| tokens(s as u64 + 1, 60)).collect();
    read(&mut session, &all, 0, len);
    save(
        &session,
        Origin::default(),
        &OutputFile::open(path).unwrap(),
    )
    .unwrap();
}

#[test]
fn files_of_another_model_or_size_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let config = config(true);
    let trained = model(&config, &values(&config, 4));
    let refused = |model: &Decoder<Reference>, sequences, longest| {
        let mut session = Session::new(model, sequences, longest, 1).unwrap();
        match StateFile::open(&path).unwrap().restore(&mut session, "") {
            Err(StateFileError::Mismatch { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    };
    saved(&path, &trained, 2, 21);
    assert_eq!(
        refused(&model(&config, &values(&config, 5)), 2, 40),
        "the model"
    );
    let mut shorter = config.clone();
    shorter.segment.as_mut().unwrap().prior_len = 2;
    assert_eq!(
        refused(&model(&shorter, &values(&shorter, 4)), 2, 40),
        "the model"
    );
    assert_eq!(refused(&trained, 3, 40), "sequences");
    assert_eq!(refused(&trained, 2, 6), "tokens of a sequence");
    let plain = plain();
    let plain = model(&plain, &values(&plain, 4));
    saved(&path, &plain, 1, 21);
    assert_eq!(refused(&plain, 1, 20), "tokens of a sequence");
}

/// The bytes with a checksum that holds, so that what it covers is looked at.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    let mut sealed = bytes.to_vec();
    if let Some(before) = bytes.len().checked_sub(32) {
        sealed.truncate(before);
        let sum = Sha256::digest(&sealed);
        sealed.extend_from_slice(&sum);
    }
    sealed
}

#[test]
fn damaged_files_are_errors_and_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let config = config(true);
    let model = model(&config, &values(&config, 4));
    saved(&path, &model, 1, 21);
    let whole = std::fs::read(&path).unwrap();
    let restore = |bytes: &[u8]| {
        std::fs::write(&path, sealed(bytes)).unwrap();
        let mut session = Session::new(&model, 1, 40, 1).unwrap();
        let mut file = StateFile::open(&path)?;
        file.restore(&mut session, "")?;
        let next = tokens(7, 12);
        read(&mut session, &[next], 0, 11);
        Ok::<(), StateFileError>(())
    };
    restore(&whole).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    for len in (0..header).step_by(37).chain([header, whole.len() - 1]) {
        assert!(restore(&whole[..len]).is_err(), "cut to {len} bytes");
    }
    let mut next = random(3);
    for _ in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..3 {
            let at = ((next() + 0.5) * header as f64) as usize;
            bytes[at] = ((next() + 0.5) * 256.0) as u8;
        }
        // Some changes are harmless; what matters is that nothing panics or takes all memory.
        let _ = restore(&bytes);
    }
    let text = String::from_utf8_lossy(&whole[8..header]).into_owned();
    for (from, to) in [
        ("[21]", "[22]"),
        ("[21]", "[13]"),
        ("[21]", "[99999999999]"),
        ("[21]", "[]"),
        ("session 5", "session 4"),
        ("\"rows\"", "\"row\""),
        ("[5]", "[8]"),
        ("[5]", "[22]"),
        ("[5]", "[5, 5]"),
        ("\"positions\"", "\"position\""),
        ("0.0.prior", "0.9.prior"),
    ] {
        assert!(text.contains(from), "{from} in {text}");
        let changed = text.replace(from, to);
        let mut bytes = (changed.len() as u64).to_le_bytes().to_vec();
        bytes.extend(changed.bytes());
        bytes.extend(&whole[header..]);
        assert!(restore(&bytes).is_err(), "{from} became {to}");
    }
    // Selected tokens outside the pool, whose 16 tokens are complete.
    let selected = text.split("\"0.0.selected.0\":").nth(1).unwrap();
    let offsets = selected.split("\"data_offsets\":[").nth(1).unwrap();
    let first: usize = offsets.split(',').next().unwrap().parse().unwrap();
    for bad in [-1i64, 16, i64::MAX] {
        let mut bytes = whole.clone();
        bytes[header + first..header + first + 8].copy_from_slice(&bad.to_le_bytes());
        assert!(restore(&bytes).is_err(), "selected {bad}");
    }
}

/// States kept in memory one after the other, each of which shares what it can with the one before: a session goes on
/// from any of them to the bits of one that was never interrupted.
#[test]
fn states_in_memory_go_on_whether_their_pools_have_dropped_tokens_or_not() {
    for (pool_len, shares) in [(0, true), (10, false), (16, true)] {
        let mut config = config_of(true, 16);
        config.segment.as_mut().unwrap().pool_len = pool_len;
        config.validate().unwrap();
        let model = model_on(Cpu, &config, &values(&config, 4));
        let all = tokens(1, 60);
        let feed = |session: &mut Session<'_, Cpu>, from: usize, to: usize| {
            let feed = Feed {
                sequence: 0,
                tokens: &all[from..to],
                targets: &all[from + 1..to + 1],
                breaks: &[],
                rereads: &[],
            };
            session.feed(&[feed]).unwrap().concat()
        };
        let expected = feed(&mut Session::new(&model, 1, 60, 1).unwrap(), 0, 59);
        let mut session = Session::new(&model, 1, 60, 2).unwrap();
        let (mut known, mut at, mut shared): (Option<SavedSequence>, _, _) = (None, 0, 0);
        for end in [3, 8, 9, 17, 19, 24, 40, 41, 50] {
            feed(&mut session, at, end);
            let state = SavedSequence::new(&session, 0, known.as_ref()).unwrap();
            let mut again = Session::new(&model, 1, 60, 3).unwrap();
            feed(&mut again, 20, 31);
            state.restore(&mut again, 0, end).unwrap();
            let got = feed(&mut again, end, 59);
            assert!(got == expected[end..], "pool_len {pool_len}, {end} tokens");
            let blocks = known.iter().flat_map(SavedSequence::blocks);
            let known_blocks: Vec<_> = blocks.collect();
            shared += state
                .blocks()
                .filter(|b| b.1 > 0 && known_blocks.contains(b))
                .count();
            (known, at) = (Some(state), end);
        }
        assert!(!shares || shared > 0, "pool_len {pool_len}");
    }
}

/// A file whose pools hold other numbers of tokens than `pool_len` says.
#[test]
fn pools_of_another_length_and_tokens_that_were_dropped_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let config = bounded();
    let model = model(&config, &values(&config, 4));
    saved(&path, &model, 1, 21);
    let whole = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    let restore = |bytes: &[u8]| {
        std::fs::write(&path, sealed(bytes)).unwrap();
        let mut session = Session::new(&model, 1, 40, 1).unwrap();
        StateFile::open(&path)?.restore(&mut session, "")
    };
    restore(&whole).unwrap();
    let text = String::from_utf8_lossy(&whole[8..header]).into_owned();
    // 16 tokens are complete and 10 of them are held, in parts of 8.
    for (from, to) in [
        ("[2,2,3,4]", "[2,3,2,4]"),
        ("0.1.pool.1", "0.1.pool.2"),
        ("0.1.pool.0", "0.1.pool.9"),
        ("[5]", "[3]"),
    ] {
        assert!(text.contains(from), "{from} in {text}");
        let changed = text.replace(from, to);
        let mut bytes = (changed.len() as u64).to_le_bytes().to_vec();
        bytes.extend(changed.bytes());
        bytes.extend(&whole[header..]);
        assert!(restore(&bytes).is_err(), "{from} became {to}");
    }
    let selected = text.split("\"0.1.selected.0\":").nth(1).unwrap();
    let offsets = selected.split("\"data_offsets\":[").nth(1).unwrap();
    let first: usize = offsets.split(',').next().unwrap().parse().unwrap();
    // The last block.
    let at = header + first + 16;
    for (token, fits) in [(8i64, true), (10, false), (14, false)] {
        let mut bytes = whole.clone();
        for (i, place) in [at, at + 8].into_iter().enumerate() {
            bytes[place..place + 8].copy_from_slice(&(token + i as i64).to_le_bytes());
        }
        assert_eq!(restore(&bytes).is_ok(), fits, "selected {token}");
    }
}
