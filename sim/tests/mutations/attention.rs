//! The attention kernels with one bug at a time, on problems small enough to run hundreds of them.

use std::path::Path;
use std::process::Command;

use segattn::attention::cuda::{Dtype, Phase};
use segattn::cuda::kernels::File;
use segattn_sim::mutate::campaign::{self, Row};
use segattn_sim::mutate::target::{self, Prepared};
use segattn_sim::mutate::trial::{Allowance, Outcome};
use segattn_sim::mutate::{self, Mutant, Rule};
use segattn_sim::{Kernels, Source};

use super::attention_cases::gpu::Options;
use super::attention_cases::{Arrangement, Shape, Values, bits, suite};
use super::attention_rules::{SURVIVORS, TARGETS, Target};
use super::hopper_rules;
use super::simulated::{Simulated, folder, only};

/// One mutant in so many is planted by the quick test.
const QUICK: usize = 42;
/// The same of the prefill for Hopper.
const QUICK_HOPPER: usize = 120;

/// Names a folder whose kernels are run instead of the real ones, and the number of the target that they belong to.
const PLANTED: [&str; 2] = ["SEGATTN_PLANTED_KERNELS", "SEGATTN_PLANTED_TARGET"];

/// The test that runs everything a bug could show in.
const EVERY_PROBLEM: &str = "attention::without_a_bug_every_problem_passes";

fn targets() -> impl Iterator<Item = &'static Target> {
    TARGETS.iter().chain(&hopper_rules::TARGETS)
}

/// The kernels of a folder.
fn kernels(target: &Target, folder: &Path) -> Kernels {
    let kernels = Kernels::from_sources(|file| source(folder, file));
    match target.files() {
        [File::AttentionForwardHopper | File::AttentionBackwardHopper] => kernels.hopper(),
        _ => kernels,
    }
}

fn source(folder: &Path, file: File) -> Source {
    Source::new(folder.join(file.stem()).with_extension("cu")).optimization(1)
}

/// Does something with how the target's bugs are tried: on kernels of one instance.
fn with<R>(target: &Target, action: impl FnOnce(&Prepared) -> R) -> R {
    let number = targets().position(|other| std::ptr::eq(other, target));
    let number = number.expect("one of the targets").to_string();
    action(&Prepared::new(target::Target {
        kernels: &folder(),
        file: target.file,
        scratch: &Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants"),
        adapt: &|text| only(text, target.instance),
        sources: &|folder| {
            target
                .files()
                .iter()
                .map(|&file| source(folder, file))
                .collect()
        },
        tests: &|folder| {
            let mut tests = Command::new(std::env::current_exe().expect("this program"));
            tests
                .args(["--exact", EVERY_PROBLEM])
                .env(PLANTED[0], folder)
                .env(PLANTED[1], &number);
            tests
        },
        allowance: Allowance::default(),
    }))
}

/// Lengths around a tile's, roles that differ, padding in every tensor: forward and backward.
fn lengths(head_dim: usize) -> Shape {
    Shape {
        segment_len: vec![129, 0, 35],
        prior_len: vec![40, 6, 65],
        past_len: vec![66, 9, 0, 3, 31, 64],
        sink_len: vec![3, 9, 0, 2, 31, 33],
        past_gate: vec![0.25, 0.0, 1.0, 3.0],
        prior_heads: vec![true, true, false, true],
        spare_rows: 2,
        arrangement: Arrangement::Offsets8,
        ..Shape::plain(2, 2, head_dim, [0; 3])
    }
}

/// A past of several items: one past section and a chunk.
fn split(head_dim: usize) -> Shape {
    Shape {
        segment_len: vec![3, 1],
        prior_len: vec![0, 5],
        past_len: vec![8192 + 1030, 7],
        sink_len: vec![4, 1],
        past_gate: vec![2.0],
        ..Shape::plain(1, 1, head_dim, [0; 3])
    }
}

/// The same without padding. The lengths need not be those of a tile.
fn ragged(shape: Shape) -> Shape {
    Shape {
        arrangement: Arrangement::Ragged,
        spare_rows: 0,
        ..shape
    }
}

/// More sinks than a key tile has, and a head that reads no other past rows.
fn closed_gate(head_dim: usize) -> Shape {
    Shape {
        sink_len: vec![150],
        past_gate: vec![0.0, 1.0],
        ..Shape::plain(1, 2, head_dim, [3, 0, 160])
    }
}

/// Runs everything that a bug could show in; panics where one does.
fn suite(kernels: &Kernels, head_dim: usize, forward: bool) {
    let gpu = || Simulated::of(3, kernels);
    let options = Options {
        with_d_lse: true,
        ..Options::new(Dtype::Bf16)
    };
    let check = |shape: &Shape, start: Option<Vec<i32>>, options| {
        drop(suite::check(&mut gpu(), shape, start, options))
    };
    // A start of zeros leaves the backward pass out.
    let start = |shape: &Shape| forward.then(|| vec![0; shape.batch()]);
    let phase = |phase| Options {
        phase: Some(phase),
        ..options
    };
    let shape = lengths(head_dim);
    check(&shape, start(&shape), phase(Phase::Prefill));
    let shape = Shape {
        scale: Some(-0.4),
        values: Values::HeavyTails,
        ..Shape::plain(1, 2, head_dim, [70, 0, 33])
    };
    check(&shape, start(&shape), options);
    let shape = split(head_dim);
    check(&shape, start(&shape), phase(Phase::Prefill));
    let shape = closed_gate(head_dim);
    check(&shape, start(&shape), phase(Phase::Prefill));
    for shape in [lengths(head_dim), split(head_dim)] {
        let shape = ragged(shape);
        check(&shape, start(&shape), phase(Phase::Prefill));
    }
    if !forward {
        suite::gates_keep_their_bound(&mut gpu(), Dtype::Bf16, head_dim);
        // So many queries and keys that a ring of four stages turns within an item, a gate's gradient from several
        // tiles, and a last query that is a tile's first key.
        check(&Shape::plain(1, 3, head_dim, [257, 20, 40]), None, options);
        // One query, whose own key has half of the weight and is the first of its tile.
        check(&Shape::plain(1, 1, head_dim, [1, 1, 0]), None, options);
        let options = Options {
            read_only_prior: true,
            ..options
        };
        return check(&Shape::plain(1, 2, head_dim, [40, 9, 0]), None, options);
    }
    check(&split(head_dim), Some(vec![1, 0]), phase(Phase::Decode));
    for shape in [lengths(head_dim), ragged(lengths(head_dim))] {
        check(&shape, Some(vec![126, 0, 34]), phase(Phase::Decode));
    }
    let shape = Shape {
        past_gate: vec![0.25, 1.0, 3.0],
        scale: Some(-0.4),
        ..Shape::plain(1, 3, head_dim, [20, 9, 9])
    };
    check(&shape, Some(vec![15]), phase(Phase::Decode));
    let shape = Shape {
        scale: Some(0.0),
        ..Shape::plain(1, 3, head_dim, [20, 3, 0])
    };
    check(&shape, Some(vec![0]), phase(Phase::Prefill));
    bits::rows_stand_alone(&mut gpu(), Dtype::Bf16, head_dim);
}

/// Everything that a bug in the prefill of Hopper could show in: items of which some warpgroups see less than others or
/// nothing, more steps than the ring has stages, chunks, sections, a negative scale; the bits of the other kernels.
fn hopper_suite(kernels: &Kernels, head_dim: usize) {
    let check = |shape: &Shape, start: Vec<i32>| {
        let gpu = &mut Simulated::of(3, kernels);
        let options = Options {
            phase: Some(Phase::Prefill),
            ..Options::new(Dtype::Bf16)
        };
        drop(suite::check(gpu, shape, Some(start), options))
    };
    check(&lengths(head_dim), vec![0; 3]);
    check(&ragged(lengths(head_dim)), vec![0; 3]);
    let negative = Shape {
        scale: Some(-0.4),
        values: Values::HeavyTails,
        ..Shape::plain(1, 2, head_dim, [400, 0, 33])
    };
    check(&negative, vec![0]);
    let even = Shape {
        scale: Some(0.0),
        ..Shape::plain(1, 1, head_dim, [20, 3, 0])
    };
    check(&even, vec![0]);
    // The first row sees all keys of a tile but one.
    check(&Shape::plain(1, 1, head_dim, [70, 0, 0]), vec![62]);
    bits::rows_stand_alone(&mut Simulated::of(3, kernels), Dtype::Bf16, head_dim);
    // Values that no tensor map describes, and keys that one does.
    let shared = Shape {
        arrangement: Arrangement::SharedValues,
        ..Shape::plain(2, 1, head_dim, [130, 66, 0])
    };
    check(&shared, vec![0]);
    // Beside short entries, which have fewer items than there are numbers for.
    let split = Shape {
        segment_len: vec![3, 1, 2, 1, 1],
        prior_len: vec![0, 5, 0, 1, 0],
        past_len: vec![8192 + 1030, 7, 0, 3, 0],
        sink_len: vec![66, 0, 0, 2, 0],
        ..split(head_dim)
    };
    check(&split, vec![0; 5]);
}

/// Runs everything that a bug in the target could show in; panics where one does.
fn every_problem(target: &Target, kernels: &Kernels) {
    let head_dim = target.head_dim();
    if target.hopper_prefill {
        return hopper_suite(kernels, head_dim);
    }
    let is_backward = |file: &File| {
        matches!(
            file,
            File::AttentionBackward | File::AttentionBackwardHopper
        )
    };
    let files = target.files();
    if !files.iter().all(is_backward) {
        suite(kernels, head_dim, true);
    }
    if files.iter().any(is_backward) {
        suite(kernels, head_dim, false);
    }
}

impl Target {
    /// The compiled files that hold it.
    fn files(&self) -> &'static [File] {
        if self.hopper_prefill {
            return &[File::AttentionForwardHopper];
        }
        match self.file {
            "attention_forward.cu" => &[File::AttentionForward],
            "attention_decode.cu" => &[File::AttentionDecode],
            "attention_rows.cuh" => &[File::AttentionForward, File::AttentionDecode],
            "attention_gradients.cuh"
            | "attention_prepare.cuh"
            | "query_grad.cuh"
            | "key_grad.cuh" => &[File::AttentionBackward],
            "query_grad_hopper.cuh"
            | "key_grad_hopper.cuh"
            | "warp_specialization.cuh"
            | "ring.cuh"
            | "warpgroups.cuh" => &[File::AttentionBackwardHopper],
            _ => &[
                File::AttentionForward,
                File::AttentionDecode,
                File::AttentionBackward,
            ],
        }
    }

    fn head_dim(&self) -> usize {
        let dim = self.instance.rsplit('d').next();
        dim.and_then(|dim| dim.parse().ok()).expect("a head size")
    }
}

/// Why a bug survives, if that is known.
fn reason(target: &Target, mutant: &Mutant) -> Option<&'static str> {
    let same = |[file, find, _]: &&[&str; 3]| (*file, *find) == (target.file, mutant.find);
    SURVIVORS.iter().find(same).map(|[_, _, reason]| *reason)
}

fn plant(target: &Target, bugs: &[Mutant]) -> Row {
    with(target, |how| {
        let attempt = |bug: &Mutant, index| {
            let name = format!("{}-{}-{index}", target.file, target.instance);
            how.attempt(Some(bug), &name)
        };
        campaign::plant(target.file, bugs, attempt, |bug| reason(target, bug))
    })
}

#[test]
fn without_a_bug_every_problem_passes() {
    if let Some(folder) = std::env::var_os(PLANTED[0]) {
        let number = std::env::var(PLANTED[1]).expect("the number of a target");
        let number: usize = number.parse().expect("a number");
        let target = targets().nth(number).expect("a target");
        return every_problem(target, &kernels(target, Path::new(&folder)));
    }
    // Of each instance the target with the most kernels.
    let instances = ["bf16_d32", "bf16_d96", "bf16_d64"].into_iter();
    let most = instances.filter_map(|name| {
        let of_instance = TARGETS.iter().filter(|target| target.instance == name);
        of_instance.max_by_key(|target| target.files().len())
    });
    for target in most.chain(&hopper_rules::TARGETS[..2]) {
        let outcome = with(target, |how| how.attempt(None, target.instance));
        assert_eq!(outcome, Outcome::Survived, "{}", target.instance);
    }
}

#[test]
fn a_few_planted_bugs_are_all_caught() {
    for (targets, stride) in [
        (&TARGETS[..], QUICK),
        (&hopper_rules::TARGETS, QUICK_HOPPER),
    ] {
        let mut count = 0;
        for target in targets {
            let mut bugs = with(target, |how| how.mutants(target.rules));
            bugs.retain(|bug| reason(target, bug).is_none());
            bugs.retain(|_| {
                count += 1;
                count % stride == 1
            });
            let row = plant(target, &bugs);
            assert!(row.survivors.is_empty(), "{row}");
        }
    }
}

#[test]
fn every_rule_finds_its_text() {
    let mut nowhere = Vec::new();
    for target in targets() {
        let text = std::fs::read_to_string(folder().join(target.file)).expect("a kernel file");
        let all = mutate::mutants(&text, target.rules);
        let is_missing = |rule: &&Rule| !all.iter().any(|mutant| mutant.find == rule.find);
        let missing = target.rules.iter().filter(is_missing);
        nowhere.extend(missing.map(|rule| (target.file, rule.find)));
    }
    for [file, find, _] in SURVIVORS {
        if !targets()
            .any(|target| target.file == file && target.rules.iter().any(|rule| rule.find == find))
        {
            nowhere.push((file, find));
        }
    }
    assert!(
        nowhere.is_empty(),
        "bring these rules up to date: {nowhere:#?}"
    );
}

/// `sim/planted` runs it and says how long that takes.
#[test]
#[ignore = "many minutes; run by sim/planted"]
fn at_least_95_percent_of_all_planted_bugs_are_caught() {
    let wanted = targets().filter(|target| campaign::is_wanted(target.file));
    let rows = wanted.map(|target| plant(target, &with(target, |how| how.mutants(target.rules))));
    campaign::assert_nearly_all_caught(&rows.collect::<Vec<_>>());
}
