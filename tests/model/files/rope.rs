//! Rotary tables against the formulas of the published implementations, written here a second time.

use std::f64::consts::PI;
use std::path::Path;

use segattn::model::config::{ModelConfig, RopeScaling};
use segattn::model::rope::Rope;
use serde_json::json;

fn config(head_dim: usize, theta: f64, scaling: RopeScaling) -> ModelConfig {
    let mut config = ModelConfig::new(16, 2 * head_dim, 8, 1, 2, 2).unwrap();
    config.rope_theta = theta;
    config.rope_scaling = scaling;
    config.validate().unwrap();
    config
}

/// Frequencies as the Llama 3.1 reference decides them: by wavelength, in three branches.
fn llama3_by_wavelength(plain: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / plain;
    if wavelength < original / high {
        plain
    } else if wavelength > original / low {
        plain / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * plain / factor + smooth * plain
    }
}

fn close(got: f64, want: f64) {
    assert!(
        (got - want).abs() <= 1e-13 * want.abs(),
        "{got} against {want}"
    );
}

#[test]
fn llama3_frequencies_follow_the_three_branches() {
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let rope = Rope::new(&config(64, 500_000.0, scaling));
    let mut branches = [0; 3];
    for (pair, &got) in rope.inv_freq().iter().enumerate() {
        let plain = 1.0 / 500_000f64.powf((2 * pair) as f64 / 64.0);
        let want = llama3_by_wavelength(plain, 32.0, 1.0, 4.0, 8192.0);
        close(got, want);
        branches[if want == plain {
            0
        } else if want == plain / 32.0 {
            1
        } else {
            2
        }] += 1;
    }
    assert!(branches.iter().all(|&count| count > 0), "{branches:?}");
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let rope = Rope::new(&config(8, 10_000.0, RopeScaling::Linear { factor: 4.0 }));
    for (&got, want) in rope.inv_freq().iter().zip([0.25, 0.025, 0.0025, 0.00025]) {
        close(got, want);
    }
}

#[test]
fn tables_hold_cosine_and_sine_of_position_times_frequency() {
    let rope = Rope::new(&config(4, 10_000.0, RopeScaling::Default));
    let tables = rope.tables(-3..5);
    assert_eq!(
        (
            tables.rows,
            tables.half_dim,
            tables.cos.len(),
            tables.sin_f32.len()
        ),
        (8, 2, 16, 16)
    );
    for (row, position) in (-3..5).enumerate() {
        assert_eq!(tables.row_of(position), Some(row));
        for (pair, frequency) in [1.0, 0.01].into_iter().enumerate() {
            let at = row * 2 + pair;
            let angle = position as f64 * frequency;
            assert!((tables.cos[at] - angle.cos()).abs() < 1e-15);
            assert!((tables.sin[at] - angle.sin()).abs() < 1e-15);
            assert_eq!(tables.cos_f32[at], tables.cos[at] as f32);
            assert_eq!(tables.sin_f32[at], tables.sin[at] as f32);
        }
    }
    assert_eq!(
        (tables.row_of(-4), tables.row_of(5), tables.row_of(i64::MIN)),
        (None, None, None)
    );
}

#[test]
fn a_row_depends_on_its_position_only() {
    let rope = Rope::new(&config(64, 500_000.0, RopeScaling::Default));
    let (long, short) = (rope.tables(-100..4000), rope.tables(77..79));
    let row = long.row_of(77).unwrap() * 32;
    let bits = |values: &[f64]| {
        values
            .iter()
            .map(|value| value.to_bits())
            .collect::<Vec<_>>()
    };
    assert_eq!(bits(&long.cos[row..row + 64]), bits(&short.cos));
    assert_eq!(bits(&long.sin[row..row + 64]), bits(&short.sin));
}

#[test]
fn empty_and_reversed_ranges_give_empty_tables() {
    let rope = Rope::new(&config(4, 10_000.0, RopeScaling::Default));
    #[expect(clippy::reversed_empty_ranges)]
    for range in [3..3, 5..2, i64::MAX..i64::MIN] {
        let tables = rope.tables(range);
        assert_eq!((tables.rows, tables.cos.len()), (0, 0));
    }
}

#[test]
fn scaling_takes_the_place_of_what_was_there() {
    let object = |value: serde_json::Value| value.as_object().unwrap().clone();
    let linear = RopeScaling::Linear { factor: 4.0 };
    let mut config = config(8, 20_000.0, linear.clone());
    let before = config.clone();
    let wrong = config.scale_positions(object(json!({"rope_type": "linear", "factor": 0.5})));
    let said = wrong.unwrap_err().to_string();
    assert!(said.contains("rope_scaling.factor"), "{said}");
    assert_eq!(config, before);
    config
        .scale_positions(object(json!({"rope_type": "default"})))
        .unwrap();
    assert_eq!(
        (config.rope_theta, &config.rope_scaling),
        (20_000.0, &RopeScaling::Default)
    );
    let scaling = json!({"type": "linear", "factor": 4, "rope_theta": 5e5});
    config.scale_positions(object(scaling)).unwrap();
    assert_eq!((config.rope_theta, &config.rope_scaling), (5e5, &linear));
    let again = ModelConfig::from_json(config.to_json()).unwrap();
    assert_eq!((again.rope_theta, again.rope_scaling), (5e5, linear));
}

/// In the newer layout, of a family of which a part of a head rotates.
#[test]
fn scaling_leaves_what_rotates() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families/phi3_long");
    let mut config = ModelConfig::load(&path).unwrap();
    let rotated = |config: &ModelConfig| {
        let rope = Rope::new(config);
        rope.inv_freq().iter().filter(|x| **x > 0.0).count()
    };
    let before = rotated(&config);
    assert!(2 * before < config.head_dim);
    let divisors = [1.5; 6];
    let scaling =
        json!({"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors});
    config
        .scale_positions(scaling.as_object().unwrap().clone())
        .unwrap();
    assert_eq!(rotated(&config), before);
    let again = ModelConfig::from_json(config.to_json()).unwrap();
    assert_eq!(rotated(&again), before);
    assert_eq!(again.rope_scaling, config.rope_scaling);
}
