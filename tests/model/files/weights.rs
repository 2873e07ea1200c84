//! Weights that are written and read: formats, shards, ties, gates, and what does not fit the configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use segattn::device::reference::Reference;
use segattn::device::{Device, Kind};
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::error::{ConfigError, ModelError, WeightsError};
use segattn::model::parameters::{Role, TensorSpec, index, specs};
use segattn::model::session::score;
use segattn::model::weights::{Checkpoint, SaveOptions, initial, load, save};
use serde_json::json;

pub fn config(tied: bool) -> ModelConfig {
    let json = json!({
        "model_type": "llama",
        "vocab_size": 19,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": tied,
        "segment": {
            "segment_len": 8,
            "prior_len": 4,
            "past_len": 4,
            "retrieval": {"block_len": 2, "probe_len": 4, "probe_window": 2, "probe_stride": 2},
            "head_reads": [[["prior"], ["past"]], [["prior"], ["prior"]]],
        },
    });
    ModelConfig::from_json(json).unwrap()
}

/// Multiples of 1/64 below 1: the same in every format.
pub fn value(tensor: usize, i: usize) -> f32 {
    ((tensor * 31 + i * 7) % 64) as f32 / 64.0
}

fn values(config: &ModelConfig, i: usize) -> Vec<f32> {
    let spec = &specs(config)[i];
    match spec.role {
        // The layer without past heads keeps gates of 1, which are left out.
        Role::Gate { len } if i != index::past_gate(0) => vec![1.0; len],
        role => (0..role.len()).map(|j| value(i, j)).collect(),
    }
}

pub fn write(folder: &Path, config: &ModelConfig, options: SaveOptions) {
    let all = |i| Ok::<_, WeightsError>(values(config, i));
    save(folder, config, all, options).unwrap();
}

/// What a file holds by the format's own library.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let copied = |(name, t): (String, TensorView<'_>)| {
        (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))
    };
    file.tensors().into_iter().map(copied).collect()
}

fn rewrite(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        let view = TensorView::new(*dtype, shape.clone(), data).unwrap();
        (name, view)
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The error of loading a folder whose tensors were changed.
fn after(tied: bool, change: impl FnOnce(&mut Tensors)) -> Result<(), WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    write(
        folder.path(),
        &config(tied),
        SaveOptions::new(WeightType::F32),
    );
    let path = folder.path().join("model.safetensors");
    let mut all = tensors(&path);
    change(&mut all);
    rewrite(&path, &all);
    match load(Reference, folder.path(), false) {
        Ok(_) => Ok(()),
        Err(ModelError::Weights(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn every_format_reads_back_what_was_saved_from_one_file_or_many() {
    for tied in [false, true] {
        for dtype in [WeightType::F32, WeightType::F16, WeightType::Bf16] {
            for max_shard_bytes in [1, 1500, 1 << 30] {
                let folder = tempfile::tempdir().unwrap();
                let config = config(tied);
                let options = SaveOptions {
                    dtype,
                    max_shard_bytes,
                };
                write(folder.path(), &config, options);
                let read = ModelConfig::load(folder.path()).unwrap();
                assert_eq!(read.dtype, Some(dtype));
                let checkpoint = Checkpoint::open(folder.path()).unwrap();
                checkpoint.check(&read).unwrap();
                assert_eq!(checkpoint.shards().len() == 1, max_shard_bytes == 1 << 30);
                for (i, spec) in specs(&read).iter().enumerate() {
                    assert_eq!(
                        checkpoint.read(spec).unwrap(),
                        values(&config, i),
                        "{spec:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn saved_files_are_those_of_the_formats_own_library() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(false);
    write(folder.path(), &config, SaveOptions::new(WeightType::Bf16));
    let all = tensors(&folder.path().join("model.safetensors"));
    let (dtype, shape, _) = &all["model.layers.1.self_attn.k_proj.weight"];
    assert_eq!(
        (*dtype, shape.as_slice()),
        (Dtype::BF16, [8, 12].as_slice())
    );
    let (dtype, shape, _) = &all["model.layers.0.self_attn.past_gate"];
    assert_eq!((*dtype, shape.as_slice()), (Dtype::F32, [4].as_slice()));
    assert!(!all.contains_key("model.layers.1.self_attn.past_gate"));
    let (_, _, up) = &all["model.layers.0.mlp.up_proj.weight"];
    let first = value(index::gate_up(0), 10 * 12);
    assert_eq!(up[..2], half::bf16::from_f32(first).to_le_bytes());
    let mut bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    bytes.truncate(8);
    assert_eq!(u64::from_le_bytes(bytes.try_into().unwrap()) % 8, 0);
}

#[test]
fn an_index_names_the_shard_of_every_tensor_and_the_size_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions {
        dtype: WeightType::F32,
        max_shard_bytes: 2000,
    };
    write(folder.path(), &config(false), options);
    let text = std::fs::read(folder.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let (mut total, mut names) = (0, 0);
    for (name, shard) in index["weight_map"].as_object().unwrap() {
        let all = tensors(&folder.path().join(shard.as_str().unwrap()));
        total += all[name].2.len();
        names += 1;
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(names, 1 + 2 * 9 + 1 + 1 + 1);
}

#[test]
fn a_loaded_model_scores_as_the_model_that_was_saved() {
    let (config, folder) = (config(true), tempfile::tempdir().unwrap());
    let values = initial(&config, 3);
    let all = |i| Ok::<_, WeightsError>(values.tensor(i));
    save(
        folder.path(),
        &config,
        all,
        SaveOptions::new(WeightType::F32),
    )
    .unwrap();
    let upload = |i: usize| {
        let mut buffer = Reference.empty(Kind::Exact, values.tensor(i).len())?;
        Reference.write(&mut buffer, 0, &values.tensor(i))?;
        Ok(buffer)
    };
    let saved = segattn::model::decoder::Decoder::new(Reference, config, upload, false).unwrap();
    let loaded = load(Reference, folder.path(), false).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| i * 7 % 19).collect();
    let (a, b) = (
        score(&saved, &tokens, 1).unwrap(),
        score(&loaded, &tokens, 1).unwrap(),
    );
    assert_eq!(a.len(), 29);
    assert_eq!(a, b);
}

#[test]
fn missing_and_unknown_tensors_are_named_together() {
    let error = after(false, |all| {
        all.remove("model.norm.weight");
        let norm = all["model.layers.0.input_layernorm.weight"].clone();
        all.insert("model.layers.0.self_attn.q_proj.bias".into(), norm);
    });
    match error {
        Err(WeightsError::Names {
            missing,
            unexpected,
            ..
        }) => {
            assert_eq!(missing.0, ["model.norm.weight"]);
            assert_eq!(unexpected.0, ["model.layers.0.self_attn.q_proj.bias"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn rotary_frequencies_of_older_models_are_ignored() {
    after(false, |all| {
        let norm = all["model.norm.weight"].clone();
        all.insert("model.layers.1.self_attn.rotary_emb.inv_freq".into(), norm);
    })
    .unwrap();
}

#[test]
fn double_precision_and_names_without_their_beginning_load() {
    let shorter = |tensors: &mut Tensors| {
        let names: Vec<String> = tensors.keys().cloned().collect();
        for name in names {
            let tensor = tensors.remove(&name).unwrap();
            let short = name.strip_prefix("model.").unwrap_or(&name).to_owned();
            tensors.insert(short, tensor);
        }
    };
    after(true, shorter).unwrap();
    after(false, shorter).unwrap();
    let numbers = [1.5f64, -0.1, 1e-300, 3.0];
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F64, vec![4], &bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = safetensors::serialize([("x", view)], None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let spec = TensorSpec {
        role: Role::Norm { len: 4 },
        heads: None,
        factor: 1.0,
        frozen: false,
        parts: vec![("x".to_owned(), vec![4])],
    };
    assert_eq!(checkpoint.read(&spec).unwrap(), numbers.map(|x| x as f32));
}

#[test]
fn weights_of_other_kinds_are_named() {
    for name in ["pytorch_model.bin", "consolidated.safetensors"] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), "x").unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert!(matches!(error, WeightsError::NoWeights { .. }), "{error:?}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// A folder with the shards of a model and no index, and their names in order.
fn shards_without_index() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions {
        max_shard_bytes: 1000,
        ..SaveOptions::new(WeightType::F32)
    };
    write(folder.path(), &config(false), options);
    std::fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    let shards = Checkpoint::open(folder.path()).unwrap().shards().to_vec();
    assert!(shards.len() > 2, "{shards:?}");
    (folder, shards)
}

#[test]
fn a_complete_set_of_shards_loads_without_an_index() {
    let (folder, _) = shards_without_index();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    checkpoint.check(&config(false)).unwrap();
    for (i, spec) in specs(&config(false)).iter().enumerate() {
        assert_eq!(checkpoint.read(spec).unwrap(), values(&config(false), i));
    }
}

#[test]
fn shards_that_are_no_complete_set_are_refused_by_name() {
    let refused = |folder: &Path| match Checkpoint::open(folder).unwrap_err() {
        error @ WeightsError::Shards { .. } => error.to_string(),
        other => panic!("{other:?}"),
    };
    for missing in [0, 1] {
        let (folder, shards) = shards_without_index();
        std::fs::remove_file(&shards[missing]).unwrap();
        let there = shards[1 - missing].file_name().unwrap().to_str().unwrap();
        let error = refused(folder.path());
        assert!(error.contains(there) && error.contains("index"), "{error}");
    }
    let (folder, shards) = shards_without_index();
    let other = folder.path().join("model-00001-of-00002.safetensors");
    std::fs::copy(&shards[0], other).unwrap();
    refused(folder.path());
}

#[test]
fn a_tensor_in_two_shards_is_refused_by_name() {
    let (folder, shards) = shards_without_index();
    std::fs::copy(&shards[0], &shards[1]).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert!(matches!(error, WeightsError::Duplicate { .. }), "{error:?}");
}

#[test]
fn a_fingerprint_is_that_of_all_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let print = |numbers: [f32; 2]| {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![2], &bytes).unwrap();
        let file = safetensors::serialize([("x", view)], None).unwrap();
        std::fs::write(&path, file).unwrap();
        Checkpoint::open(folder.path())
            .unwrap()
            .fingerprint()
            .unwrap()
    };
    assert_eq!(print([1.0, 2.0]), print([1.0, 2.0]));
    assert_ne!(print([1.0, 2.0]), print([1.0, 3.0]));
}

#[test]
fn a_wrong_shape_names_both_shapes() {
    let name = "model.layers.1.mlp.down_proj.weight";
    match after(false, |all| all.get_mut(name).unwrap().1 = vec![10, 12]) {
        Err(WeightsError::Shape {
            name: at,
            expected,
            got,
        }) => {
            assert_eq!(
                (at.as_str(), expected, got),
                (name, vec![12, 10], vec![10, 12])
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_number_format_that_is_not_read_is_named() {
    let name = "model.norm.weight";
    match after(false, |all| {
        let tensor = all.get_mut(name).unwrap();
        tensor.0 = Dtype::I32;
    }) {
        Err(WeightsError::NumberFormat { name: at, got }) => {
            assert_eq!((at.as_str(), got.as_str()), (name, "I32"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_with_their_place() {
    let name = "model.layers.0.self_attn.v_proj.weight";
    for bad in [f32::NAN, f32::INFINITY] {
        match after(false, |all| {
            all.get_mut(name).unwrap().2[20..24].copy_from_slice(&bad.to_le_bytes());
        }) {
            Err(WeightsError::NotFinite {
                name: at, index: 5, ..
            }) => assert_eq!(at, name),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn absent_gates_are_one_and_negative_gates_are_refused() {
    let name = "model.layers.0.self_attn.past_gate";
    let folder = tempfile::tempdir().unwrap();
    write(
        folder.path(),
        &config(false),
        SaveOptions::new(WeightType::F32),
    );
    let path = folder.path().join("model.safetensors");
    let mut all = tensors(&path);
    all.remove(name).unwrap();
    rewrite(&path, &all);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    checkpoint.check(&config(false)).unwrap();
    let spec = &specs(&config(false))[index::past_gate(0)];
    assert_eq!(checkpoint.read(spec).unwrap(), [1.0; 4]);
    match after(false, |all| {
        all.get_mut(name).unwrap().2[4..8].copy_from_slice(&(-0.5f32).to_le_bytes());
    }) {
        Err(WeightsError::Gate { index: 1, got, .. }) => assert_eq!(got, -0.5),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tied_model_loads_from_embedding_head_or_both_if_they_agree() {
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    after(true, |all| {
        let table = all.remove(embedding).unwrap();
        all.insert(head.into(), table);
    })
    .unwrap();
    after(true, |all| {
        let table = all[embedding].clone();
        all.insert(head.into(), table);
    })
    .unwrap();
    let differ = after(true, |all| {
        let mut table = all[embedding].clone();
        *table.2.last_mut().unwrap() ^= 1;
        all.insert(head.into(), table);
    });
    assert!(
        matches!(differ, Err(WeightsError::TiedHead { .. })),
        "{differ:?}"
    );
    let untied = after(false, |all| drop(all.remove(head)));
    assert!(
        matches!(untied, Err(WeightsError::Names { .. })),
        "{untied:?}"
    );
    let untied = after(false, |all| drop(all.remove(embedding)));
    assert!(
        matches!(untied, Err(WeightsError::Names { .. })),
        "{untied:?}"
    );
}

#[test]
fn saving_replaces_no_weights_and_leaves_no_half_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(false);
    let options = SaveOptions {
        dtype: WeightType::F16,
        max_shard_bytes: 2000,
    };
    // Whichever tensor fails, the folder holds no weights to a reader, and a later save succeeds.
    for fails in 0..specs(&config).len() {
        let values = |i: usize| {
            let mut values = values(&config, i);
            if i == fails {
                values[0] = 1e6;
                values[1] = f32::NAN;
            }
            Ok::<_, WeightsError>(values)
        };
        let error = save(folder.path(), &config, values, options);
        let gate = matches!(specs(&config)[fails].role, Role::Gate { .. });
        match error {
            Err(WeightsError::Overflow {
                index: 0,
                dtype: "float16",
                ..
            }) if !gate => {}
            Err(WeightsError::NotFinite { index: 1, .. }) if gate => {}
            other => panic!("{fails}: {other:?}"),
        }
        let opened = Checkpoint::open(folder.path());
        assert!(
            matches!(
                opened,
                Err(WeightsError::NoWeights { .. } | WeightsError::Shards { .. })
            ),
            "{opened:?}"
        );
        let left = std::fs::read_dir(folder.path()).unwrap();
        let left = left.filter(|f| {
            f.as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with('.')
        });
        assert_eq!(left.count(), 0);
    }
    write(folder.path(), &config, options);
    load(Reference, folder.path(), true).unwrap();
    let again = save(folder.path(), &config, |i| Ok(values(&config, i)), options);
    assert!(
        matches!(again, Err(WeightsError::AlreadyThere { .. })),
        "{again:?}"
    );
}

#[test]
fn values_of_the_wrong_length_and_configurations_that_do_not_hold_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions::new(WeightType::F32);
    let config = config(false);
    let short = |i: usize| Ok(values(&config, i)[1..].to_vec());
    match save(folder.path(), &config, short, options) {
        Err(WeightsError::Length { expected, got, .. }) => assert_eq!(got + 1, expected),
        other => panic!("{other:?}"),
    }
    let mut wrong = config.clone();
    wrong.rms_norm_eps = f64::NAN;
    let refused = save(folder.path(), &wrong, |i| Ok(values(&wrong, i)), options);
    let Err(WeightsError::Config(ConfigError::Invalid { key, .. })) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(key, "rms_norm_eps");
}

#[test]
fn initial_values_depend_on_the_seed_and_not_on_the_threads() {
    let mut large = config(false);
    large.vocab_size = 16_001;
    let all = |seed| {
        let initial = initial(&large, seed);
        (0..specs(&large).len())
            .map(|i| initial.tensor(i))
            .collect::<Vec<_>>()
    };
    let pool = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
    };
    let (one, three) = (pool(1).install(|| all(5)), pool(3).install(|| all(5)));
    assert_eq!(one, three);
    assert_ne!(one, all(6));
    assert_ne!(one[index::qkv(0)], one[index::qkv(1)]);
    let deviation =
        |x: &[f32]| (x.iter().map(|x| f64::from(x * x)).sum::<f64>() / x.len() as f64).sqrt();
    assert!((deviation(&one[index::EMBEDDING]) - 0.02).abs() < 2e-4);
    // 120 numbers: within four standard errors.
    assert!((deviation(&one[index::down(1)]) - 0.01).abs() < 0.0026);
    assert!(one[index::attention_norm(1)].iter().all(|x| *x == 1.0));
    assert!(one[index::past_gate(0)].iter().all(|x| *x == 1.0));
}
