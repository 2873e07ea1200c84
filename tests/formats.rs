//! Every format that is read, from files changed at random: a typed error or something that holds, never a panic. The
//! functions are those of the fuzz targets. `SEGATTN_FORMATS=SECONDS` goes on for so long with each format.

#![cfg(feature = "cli")]

#[path = "../fuzz/formats.rs"]
mod formats;

use std::path::Path;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use segattn::model::config::ModelConfig;
use segattn::model::session::Session;
use segattn::model::session_file::{Origin, save};
use segattn::model::weights::{Checkpoint, SaveOptions, initial};

/// A good file of the format.
fn sample(name: &str) -> Vec<u8> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read(data.join(path)).unwrap();
    match name {
        "safetensors" => {
            let header = br#"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#;
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(header);
            file.extend([0; 8]);
            file
        }
        "index" => br#"{"metadata":{"total_size":12},"weight_map":{"a":"model-1.safetensors","b":"m.safetensors"}}"#
            .to_vec(),
        "config" => {
            let mut config = ModelConfig::new(300, 16, 16, 2, 4, 2).unwrap();
            config.bos_token_id = vec![1];
            config.eos_token_id = vec![2, 3];
            config.to_json().to_string().into_bytes()
        }
        "tokenizer" => read("tests/model_files/data/tokenizer.json"),
        "generation" => br#"{"do_sample":true,"temperature":0.6,"top_p":0.9,"top_k":5,"eos_token_id":[1,2],"min_p":0}"#
            .to_vec(),
        "state_file" => state(),
        "manifest" => {
            br#"{"version":1,"files":{"state.json":{"bytes":12,"sha256":"00","tensors":{"a":"00"}}}}"#.to_vec()
        }
        "run" => read("configs/train.toml"),
        "op_case" => op_case(),
        "token_ids" => br#"[[1, 2, 3], [], {"tokens": [4, 299, 5], "breaks": [1, 3]}]"#.to_vec(),
        "jsonl" => b"{\"text\": \"one\", \"x\": 1}\n\n{\"text\": [1, 2]}\n".to_vec(),
        "gguf" => read("tests/golden/gguf/tiny.gguf"),
        "state_json" => {
            let files = formats::checkpoint_files();
            let state = files.iter().find(|(name, _)| name == "state.json");
            state.unwrap().1.clone()
        }
        other => panic!("no sample of {other}"),
    }
}

/// A case of the operation: one row of each source, one head of 8.
fn op_case() -> Vec<u8> {
    use safetensors::tensor::{Dtype, TensorView};
    let row: Vec<u8> = (1..=8u8).flat_map(|x| f32::from(x).to_le_bytes()).collect();
    let one = 1i32.to_le_bytes();
    let gate = 0.5f32.to_le_bytes();
    let rows = [
        "q", "k", "v", "prior_k", "prior_v", "past_k", "past_v", "d_out",
    ];
    let rows = rows.map(|name| (name, Dtype::F32, vec![1, 1, 1, 8], &row[..]));
    let lengths = ["segment_len", "prior_len", "past_len"];
    let lengths = lengths.map(|name| (name, Dtype::I32, vec![1], &one[..]));
    let roles = [
        ("past_gate", Dtype::F32, vec![1], &gate[..]),
        ("prior_heads", Dtype::U8, vec![1], &[1u8][..]),
    ];
    let all = rows.into_iter().chain(lengths).chain(roles);
    let views =
        all.map(|(name, dtype, shape, data)| (name, TensorView::new(dtype, shape, data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// The state file of a small model.
fn state() -> Vec<u8> {
    use segattn::device::cpu::Cpu;
    use segattn::model::files::OutputFile;
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::new(16, 16, 8, 1, 2, 1).unwrap();
    let values = |i: usize| -> Result<Vec<f32>, segattn::model::error::WeightsError> {
        Ok(initial(&config, 1).tensor(i))
    };
    segattn::model::weights::save(
        folder.path(),
        &config,
        values,
        SaveOptions::new(segattn::model::config::WeightType::F32),
    )
    .unwrap();
    let model = Checkpoint::open(folder.path())
        .unwrap()
        .load(Cpu, config, false)
        .unwrap();
    let mut session = Session::new(&model, 1, 8, 1).unwrap();
    let tokens = vec![vec![1, 2, 3]];
    let feed = segattn::model::session::Feed {
        sequence: 0,
        tokens: &tokens[0],
        targets: &[],
        breaks: &[],
    };
    session.feed(&[feed]).unwrap();
    let path = folder.path().join("state");
    let origin = Origin {
        tokens: &tokens,
        weights: "",
        ..Origin::default()
    };
    save(&session, origin, &OutputFile::open(&path).unwrap()).unwrap();
    std::fs::read(path).unwrap()
}

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
        let good = sample(name);
        let mut random = ChaCha8Rng::seed_from_u64(n as u64);
        let (started, mut count) = (Instant::now(), 0u64);
        let more = |count: u64| match seconds {
            Some(seconds) => started.elapsed() < Duration::from_secs(seconds),
            None => count < 300,
        };
        let folder = tempfile::tempdir().unwrap();
        read(&good, folder.path());
        while more(count) {
            let mut bytes = good.clone();
            change(&mut bytes, &mut random);
            read(&bytes, folder.path());
            count += 1;
        }
        eprintln!("{name}: {count} files");
    }
}
