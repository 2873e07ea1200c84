//! Damaged and malicious weight files: a typed error each, never a panic, and no memory for what is not there.

use std::path::Path;

use proptest::prelude::*;
use segattn::device::reference::Reference;
use segattn::model::config::WeightType;
use segattn::model::error::{FileError, WeightsError};
use segattn::model::weights::header::Header;
use segattn::model::weights::index::Index;
use segattn::model::weights::{Checkpoint, SaveOptions, load};

use super::weights::{config, write};

/// A file of this header and that many zero bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Header, WeightsError> {
    Header::parse(bytes, Path::new("x.safetensors"))
}

/// The part at fault in a malformed file.
fn fault(bytes: &[u8]) -> String {
    match parse(bytes) {
        Err(WeightsError::Malformed { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_header_longer_than_the_file_or_the_limit_is_refused_unread() {
    assert_eq!(fault(&[0; 7]), "file");
    assert_eq!(fault(&[0; 8]), "header length");
    for length in [u64::MAX, 1 << 40, 9] {
        let mut bytes = file("{}      ", 0);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert_eq!(fault(&bytes), "header length");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let sparse = std::fs::File::create(&path).unwrap();
    sparse.set_len(1 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &(1u64 << 30).to_le_bytes(), 0).unwrap();
    let error = Checkpoint::open(folder.path());
    assert!(
        matches!(error, Err(WeightsError::Malformed { .. })),
        "{error:?}"
    );
}

#[test]
fn headers_that_are_no_json_object_of_tensors_are_refused() {
    let deep = "[".repeat(1 << 20);
    let nested = format!("{{\"a\":{deep}");
    let unreadable = [
        "[]",
        "{\"a\":1}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1e3],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}} {}",
        "{\"__metadata__\":{\"a\":1}}",
        "{\"__metadata__\":{},\"__metadata__\":{}}",
        &deep,
        &nested,
    ];
    for header in unreadable {
        assert_eq!(
            fault(&file(header, 4)),
            "header",
            "{}",
            &header[..header.len().min(80)]
        );
    }
    let mut not_utf8 = file(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        4,
    );
    not_utf8[10] = 0xff;
    assert_eq!(fault(&not_utf8), "header");
}

#[test]
fn null_metadata_and_further_keys_are_passed_over_and_a_pointer_is_named() {
    let header =
        r#"{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":[1]}}"#;
    assert_eq!(parse(&file(header, 4)).unwrap().tensors.len(), 1);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n";
    assert!(parse(pointer).unwrap_err().to_string().contains("Git LFS"));
}

#[test]
fn tensors_must_fill_the_file_once_and_in_their_own_size() {
    let tensor = |name: &str, dtype: &str, shape: &str, offsets: &str| {
        format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}")
    };
    let two = |a: &str, b: &str| {
        format!(
            "{{{},{}}}",
            tensor("a", "F32", "[2]", a),
            tensor("b", "F32", "[2]", b)
        )
    };
    assert_eq!(
        parse(&file(&two("[8,16]", "[0,8]"), 16)).unwrap().tensors[0].0,
        "b"
    );
    for (header, at) in [
        (two("[0,8]", "[4,12]"), "tensor `b`"),
        (two("[0,8]", "[0,8]"), "tensor `b`"),
        (two("[0,8]", "[9,17]"), "tensor `b`"),
        (two("[0,8]", "[8,24]"), "tensor `b`"),
        (two("[0,8]", "[8,0]"), "tensor `b`"),
        (two("[0,8]", "[18446744073709551615,7]"), "tensor `b`"),
    ] {
        assert_eq!(fault(&file(&header, 16)), at, "{header}");
    }
    assert_eq!(fault(&file(&two("[0,8]", "[8,16]"), 17)), "file");
    for shape in [
        "[4294967296,4294967296]",
        "[0,4294967296,4294967296]",
        "[9223372036854775807]",
        "[1,1,1,1,1,1,1,1,1]",
        "[3]",
        "[0]",
    ] {
        let header = format!("{{{}}}", tensor("a", "F32", shape, "[0,8]"));
        assert_eq!(fault(&file(&header, 8)), "tensor `a`", "{shape}");
    }
    // A product of 0 modulo 2^64 numbers is not the 0 bytes there are.
    let header = format!(
        "{{{}}}",
        tensor("a", "F16", "[9223372036854775808]", "[0,0]")
    );
    assert_eq!(fault(&file(&header, 0)), "tensor `a`");
    let empty = format!("{{{}}}", tensor("a", "F32", "[0,5]", "[0,0]"));
    assert_eq!(parse(&file(&empty, 0)).unwrap().tensors[0].1.shape, [0, 5]);
}

#[test]
fn a_name_that_stands_twice_is_named() {
    let entry = "{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}";
    let header = format!("{{\"a\":{entry},\"b\":{entry},\"\\u0061\":{entry}}}");
    match parse(&file(&header, 0)) {
        Err(WeightsError::Duplicate { name, .. }) => assert_eq!(name, "a"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tensor_in_two_shards_is_named_with_both() {
    let folder = tempfile::tempdir().unwrap();
    let one = file(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        4,
    );
    for name in ["x.safetensors", "y.safetensors"] {
        std::fs::write(folder.path().join(name), &one).unwrap();
    }
    let index = r#"{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    match Checkpoint::open(folder.path()) {
        Err(WeightsError::Duplicate { first, second, .. }) => {
            assert!(first.ends_with("x.safetensors") && second.ends_with("y.safetensors"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_index_stays_in_its_folder_and_fits_its_files() {
    let path = Path::new("index.json");
    for name in [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "a\\\\x.safetensors",
        "C:x.safetensors",
        "x.safetensors/",
        "x.bin",
        ".safetensors",
        "..",
        "",
        "x\\u0000.safetensors",
    ] {
        let text = format!("{{\"weight_map\": {{\"a\": \"{name}\"}}}}");
        let error = Index::parse(text.as_bytes(), path);
        assert!(
            matches!(error, Err(WeightsError::ShardName { .. })),
            "{name}: {error:?}"
        );
    }
    let many: Vec<String> = (0..5000)
        .map(|i| format!("\"t{i}\":\"{i}.safetensors\""))
        .collect();
    let many = format!("{{\"weight_map\":{{{}}}}}", many.join(","));
    let error = Index::parse(many.as_bytes(), path);
    assert!(
        matches!(error, Err(WeightsError::Malformed { .. })),
        "{error:?}"
    );
    let deep = format!("{{\"metadata\":{}", "{\"a\":".repeat(100_000));
    for text in [
        "",
        "{}",
        "[]",
        "{\"weight_map\": {}}",
        "{\"weight_map\": {\"a\": 1}}",
        r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#,
        &deep,
    ] {
        let error = Index::parse(text.as_bytes(), path);
        assert!(
            matches!(error, Err(WeightsError::File(FileError::Json { .. }))),
            "{error:?}"
        );
    }
}

#[test]
fn an_index_that_names_missing_files_or_tensors_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "x.safetensors"}}"#).unwrap();
    let missing = Checkpoint::open(folder.path());
    assert!(
        matches!(missing, Err(WeightsError::File(FileError::Io { .. }))),
        "{missing:?}"
    );
    std::fs::write(folder.path().join("x.safetensors"), file("{}", 0)).unwrap();
    let missing = Checkpoint::open(folder.path());
    assert!(
        matches!(missing, Err(WeightsError::Malformed { .. })),
        "{missing:?}"
    );
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_loops_folders_and_pipes_refused() {
    use std::os::unix::fs::symlink;
    let (real, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(
        real.path(),
        &config(false),
        SaveOptions::new(WeightType::F32),
    );
    let single = folder.path().join("model.safetensors");
    symlink(real.path().join("model.safetensors"), &single).unwrap();
    Checkpoint::open(folder.path())
        .unwrap()
        .check(&config(false))
        .unwrap();
    std::fs::remove_file(&single).unwrap();
    symlink("model.safetensors", &single).unwrap();
    let error = Checkpoint::open(folder.path());
    assert!(
        matches!(error, Err(WeightsError::File(FileError::Io { .. }))),
        "{error:?}"
    );
    std::fs::remove_file(&single).unwrap();
    std::fs::create_dir(&single).unwrap();
    let error = Checkpoint::open(folder.path());
    assert!(
        matches!(error, Err(WeightsError::File(FileError::NotAFile { .. }))),
        "{error:?}"
    );
    std::fs::remove_dir(&single).unwrap();
    symlink("/dev/zero", &single).unwrap();
    let error = Checkpoint::open(folder.path());
    assert!(
        matches!(error, Err(WeightsError::File(FileError::NotAFile { .. }))),
        "{error:?}"
    );
}

#[test]
fn a_file_cut_short_anywhere_is_refused_also_after_it_was_opened() {
    let folder = tempfile::tempdir().unwrap();
    write(
        folder.path(),
        &config(false),
        SaveOptions::new(WeightType::Bf16),
    );
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for len in (0..whole.len()).step_by(13).chain([whole.len() - 1]) {
        assert!(parse(&whole[..len]).is_err(), "{len}");
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let read = |spec| checkpoint.read(spec).map(drop);
    let specs = segattn::model::parameters::specs(&config(false));
    let failed = specs.iter().filter_map(|s| read(s).err());
    let failed: Vec<WeightsError> = failed.collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(matches!(failed[0], WeightsError::Malformed { .. }));
}

/// Changes, cuts and insertions at random places.
fn mutate(bytes: &mut Vec<u8>, edits: &[(usize, u8, u8)]) {
    for (at, kind, byte) in edits {
        if bytes.is_empty() {
            return;
        }
        let at = at % bytes.len();
        match kind % 4 {
            0 => bytes[at] = *byte,
            1 => bytes[at] ^= 1 << (byte % 8),
            2 => drop(bytes.drain(at..(at + usize::from(*byte)).min(bytes.len()))),
            _ => bytes.insert(at, *byte),
        }
    }
}

proptest! {
    #[test]
    fn mutated_weight_files_load_or_fail_without_panic(
        edits in prop::collection::vec((0usize..6000, any::<u8>(), any::<u8>()), 1..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config(false), SaveOptions::new(WeightType::F16));
        let path = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        mutate(&mut bytes, &edits);
        std::fs::write(&path, &bytes).unwrap();
        // Loading what still parses must not panic either; header and file must then agree.
        if load(Reference, folder.path(), false).is_ok() {
            let header = parse(&bytes).unwrap();
            let (_, last) = header.tensors.last().unwrap();
            prop_assert_eq!(last.start + last.bytes, bytes.len() as u64);
        }
    }

    #[test]
    fn mutated_indexes_parse_or_fail_without_panic(
        edits in prop::collection::vec((0usize..400, any::<u8>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = br#"{"metadata": {"total_size": 12}, "weight_map": {
            "model.norm.weight": "model-00001-of-00002.safetensors",
            "lm_head.weight": "model-00002-of-00002.safetensors"}}"#.to_vec();
        mutate(&mut bytes, &edits);
        if let Ok(index) = Index::parse(&bytes, Path::new("index.json")) {
            for shard in index.shards() {
                prop_assert_eq!(Path::new(shard).file_name().unwrap(), shard);
            }
        }
    }
}
