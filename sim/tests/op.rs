//! The command `op`: its file of results against the reference on the same, rounded, numbers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use segattn::attention::{Lengths, Problem, View, ViewMut, reference};

const Q: [usize; 4] = [2, 5, 4, 32];
const KV: [usize; 4] = [2, 5, 2, 32];
const PRIOR: [usize; 4] = [2, 3, 2, 32];
const PAST: [usize; 4] = [2, 0, 2, 32];

/// Numbers that bf16 holds.
fn values(shape: [usize; 4], salt: usize) -> Vec<f32> {
    let count: usize = shape.iter().product();
    let value =
        |i: usize| bf16::from_f32(((i * 7919 + salt * 131) % 61) as f32 / 30.0 - 1.0).to_f32();
    (0..count).map(value).collect()
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn op(case: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segattn-sim"));
    command
        .arg("op")
        .arg("--case")
        .arg(case)
        .arg("--out")
        .arg(out)
        .args(more);
    command.output().expect("the command runs")
}

/// Writes a case without past rows.
fn write_case(path: &Path) {
    let shapes = [
        ("q", Q),
        ("k", KV),
        ("v", KV),
        ("prior_k", PRIOR),
        ("prior_v", PRIOR),
        ("past_k", PAST),
        ("past_v", PAST),
        ("d_out", Q),
    ];
    let floats: Vec<Vec<f32>> = shapes
        .iter()
        .enumerate()
        .map(|(i, (_, shape))| values(*shape, i))
        .collect();
    let gates = [1.0f32, 0.0, 0.5, 2.0];
    let lens = [[5i32, 3], [3, 0], [0, 0]];
    let mut views = Vec::new();
    for ((name, shape), data) in shapes.iter().zip(&floats) {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytemuck::cast_slice(data));
        views.push((*name, view.expect("a view")));
    }
    let small = [
        (
            "past_gate",
            Dtype::F32,
            vec![4],
            bytemuck::cast_slice(&gates),
        ),
        ("prior_heads", Dtype::U8, vec![4], &[1u8, 1, 0, 1][..]),
        (
            "segment_len",
            Dtype::I32,
            vec![2],
            bytemuck::cast_slice(&lens[0]),
        ),
        (
            "prior_len",
            Dtype::I32,
            vec![2],
            bytemuck::cast_slice(&lens[1]),
        ),
        (
            "past_len",
            Dtype::I32,
            vec![2],
            bytemuck::cast_slice(&lens[2]),
        ),
    ];
    for (name, dtype, shape, data) in small {
        views.push((name, TensorView::new(dtype, shape, data).expect("a view")));
    }
    let bytes = safetensors::serialize(views, None).expect("a file");
    std::fs::write(path, bytes).expect("written");
}

/// out and lse of the reference.
fn expected() -> (Vec<f64>, Vec<f64>) {
    let wide =
        |shape, salt| -> Vec<f64> { values(shape, salt).iter().map(|&x| f64::from(x)).collect() };
    let (q, k, v) = (wide(Q, 0), wide(KV, 1), wide(KV, 2));
    let (prior_k, prior_v) = (wide(PRIOR, 3), wide(PRIOR, 4));
    let (prior_k, prior_v) = (View::packed(&prior_k, PRIOR), View::packed(&prior_v, PRIOR));
    let (k, v) = (View::packed(&k, KV), View::packed(&v, KV));
    let problem = Problem::causal(View::packed(&q, Q), k, v)
        .prior(prior_k, prior_v, &[true, true, false, true])
        .lengths(Lengths::segment(&[5, 3]).prior(&[3, 0]));
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 2 * 4 * 5]);
    reference::forward(&problem, ViewMut::packed(&mut out, Q), &mut lse).expect("a valid case");
    (out, lse)
}

fn read(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file
        .tensor(name)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    bytemuck::allocation::pod_collect_to_vec(tensor.data())
}

#[test]
fn the_results_are_the_reference_s_within_bf16() {
    let folder = folder("op");
    let (case, out) = (
        folder.join("case.safetensors"),
        folder.join("out.safetensors"),
    );
    write_case(&case);
    let ran = op(&case, &out, &["--seed", "3"]);
    assert!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    let bytes = std::fs::read(&out).expect("results");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let (expected_out, expected_lse) = expected();
    for (got, expected) in read(&file, "out").iter().zip(expected_out) {
        assert!(
            (f64::from(*got) - expected).abs() < 0.01,
            "out: {got}, {expected}"
        );
    }
    for (got, expected) in read(&file, "lse").iter().zip(expected_lse) {
        let same = f64::from(*got) == expected || (f64::from(*got) - expected).abs() < 1e-4;
        assert!(same, "lse: {got}, {expected}");
    }
    let shapes = [
        ("d_q", &Q[..]),
        ("d_k", &KV),
        ("d_v", &KV),
        ("d_prior_k", &PRIOR),
        ("d_prior_v", &PRIOR),
        ("d_past_gate", &[4]),
    ];
    for (name, shape) in shapes {
        assert_eq!(file.tensor(name).expect(name).shape(), shape, "{name}");
        let all = read(&file, name);
        assert!(
            all.iter().all(|x| x.is_finite())
                && (name == "d_past_gate" || all.iter().any(|&x| x != 0.0)),
            "{name}"
        );
    }
    let again = folder.join("again.safetensors");
    assert!(op(&case, &again, &["--seed", "4"]).status.success());
    assert_eq!(
        std::fs::read(&again).expect("results"),
        bytes,
        "another seed, other bits"
    );
}

#[test]
fn a_case_that_does_not_fit_is_refused_with_its_tensor() {
    let folder = folder("op-refused");
    let (case, out) = (
        folder.join("case.safetensors"),
        folder.join("out.safetensors"),
    );
    write_case(&case);
    let ran = op(&case, &out, &["--dtype", "f32"]);
    assert!(!ran.status.success());
    assert!(String::from_utf8_lossy(&ran.stderr).contains("expected bf16 or f16"));
    let bytes = safetensors::serialize(
        [(
            "q",
            TensorView::new(Dtype::F32, vec![0, 0, 0, 0], &[]).expect("a view"),
        )],
        None,
    );
    std::fs::write(&case, bytes.expect("a file")).expect("written");
    let ran = op(&case, &out, &[]);
    assert!(!ran.status.success());
    assert!(
        String::from_utf8_lossy(&ran.stderr)
            .contains("tensor `q`: expected head_dim of at least 1"),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
}
