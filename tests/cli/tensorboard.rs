//! Files of events that a run writes for TensorBoard, read back.

use crate::cli_model::segattn;
use std::collections::BTreeMap;
use std::path::Path;

/// CRC-32C, bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

fn masked(bytes: &[u8]) -> u32 {
    let crc = crc(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Takes so many bytes off the front.
fn take<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (front, back) = rest.split_at(count);
    *rest = back;
    front
}

fn number(rest: &mut &[u8]) -> u64 {
    let mut number = 0;
    for shift in (0..).step_by(7) {
        let byte = take(rest, 1)[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    number
}

/// Fields of a message: number and bytes, of numbers their eight bytes.
fn fields(mut rest: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = number(&mut rest);
        let value = match key & 7 {
            0 => number(&mut rest).to_le_bytes().to_vec(),
            1 => take(&mut rest, 8).to_vec(),
            5 => take(&mut rest, 4).to_vec(),
            2 => {
                let count = number(&mut rest) as usize;
                take(&mut rest, count).to_vec()
            }
            kind => panic!("kind {kind}"),
        };
        found.push((key >> 3, value));
    }
    found
}

/// Scalars by step and tag, and the steps at which sessions begin.
#[derive(Default)]
struct Scalars {
    values: BTreeMap<(u64, String), f32>,
    sessions: Vec<u64>,
}

fn read(path: &Path, scalars: &mut Scalars) {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut first = true;
    while !rest.is_empty() {
        let length = take(&mut rest, 8);
        let sum = u32::from_le_bytes(take(&mut rest, 4).try_into().unwrap());
        assert_eq!(sum, masked(length));
        let count = u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let event = take(&mut rest, count);
        let sum = u32::from_le_bytes(take(&mut rest, 4).try_into().unwrap());
        assert_eq!(sum, masked(event));
        let (mut step, mut time) = (0, 0.0);
        for (field, value) in fields(event) {
            match field {
                1 => time = f64::from_le_bytes(value.try_into().unwrap()),
                2 => step = u64::from_le_bytes(value.try_into().unwrap()),
                3 => assert!(first && value == b"brain.Event:2"),
                5 => {
                    for (_, value) in fields(&value) {
                        let [(1, tag), (2, number)] = &fields(&value)[..] else {
                            panic!("{value:?}")
                        };
                        let tag = String::from_utf8(tag.clone()).unwrap();
                        let number = f32::from_le_bytes(number[..].try_into().unwrap());
                        scalars.values.insert((step, tag), number);
                    }
                }
                7 => scalars.sessions.push(step),
                field => panic!("field {field}"),
            }
        }
        assert!(time > 1.7e9);
        first = false;
    }
}

#[test]
fn the_checksum_is_crc_32c() {
    // RFC 3720, B.4.
    assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc(&[0xff; 32]), 0x62a8_ab43);
}

#[test]
fn events_are_the_lines_of_the_metrics_and_each_start_has_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    std::fs::write(dir.join("text.txt"), "Some text to learn. ".repeat(200)).unwrap();
    std::fs::write(dir.join("run.toml"), SETTINGS).unwrap();
    let run = |args: &[&str]| {
        let output = segattn(dir, args);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    run(&["train", "run.toml", "-q"]);
    run(&["resume", "run", "--training.steps", "5", "-q"]);
    let mut scalars = Scalars::default();
    let mut files: Vec<_> = std::fs::read_dir(dir.join("run"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.retain(|path| {
        path.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("events.out.tfevents.")
    });
    assert_eq!(files.len(), 2);
    files.iter().for_each(|path| read(path, &mut scalars));
    scalars.sessions.sort_unstable();
    assert_eq!(scalars.sessions, [1, 4]);
    let metrics = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    let mut expected = BTreeMap::new();
    for line in metrics.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let step = line["step"].as_u64().unwrap();
        for (key, tag) in [
            ("loss", "train/loss"),
            ("lr", "train/lr"),
            ("grad_norm", "train/grad_norm"),
            ("validation_loss", "validation/loss"),
        ] {
            if let Some(value) = line[key].as_f64() {
                expected.insert((step, tag.to_owned()), value as f32);
            }
        }
    }
    assert!(expected.len() >= 15, "{expected:?}");
    scalars
        .values
        .retain(|(_, tag), _| tag != "train/tokens_per_second");
    assert_eq!(scalars.values, expected);
    // Without them where they are not wanted.
    run(&[
        "train",
        "run.toml",
        "-q",
        "--training.output",
        "other",
        "--log.tensorboard",
        "false",
    ]);
    let names = std::fs::read_dir(dir.join("other"))
        .unwrap()
        .map(|e| e.unwrap().file_name());
    assert!(
        names
            .into_iter()
            .all(|name| !name.to_str().unwrap().starts_with("events"))
    );
}

const SETTINGS: &str = r#"
[model.shape]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
[model.segment]
segment_len = 32
prior_len = 8
past_len = 0
[data]
train = ["text.txt"]
[training]
output = "run"
steps = 3
batch = 2
sequence_len = 64
validate_every = 2
"#;
