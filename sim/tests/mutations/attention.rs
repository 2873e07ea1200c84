//! The attention kernels with one bug at a time, on problems small enough to run hundreds of them.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use segattn::attention::cuda::{Dtype, Phase};
use segattn::cuda::kernels::File;
use segattn_sim::mutate::{self, Mutant, Rule};
use segattn_sim::{Kernels, Source};

use super::attention_cases::gpu::Options;
use super::attention_cases::{Arrangement, Shape, Values, bits, suite};
use super::attention_rules::{SURVIVORS, TARGETS, Target};
use super::hopper_rules;
use super::simulated::{Simulated, folder, only};

/// One mutant in so many is planted by the quick test.
const QUICK: usize = 14;
/// The same of the prefill for Hopper.
const QUICK_HOPPER: usize = 40;

/// Kernels of one instance from a folder of their own, in which `file` has another text.
fn kernels(target: &Target, mutant: Option<&Mutant>, name: &str) -> Kernels {
    let to = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("mutants")
        .join(name);
    std::fs::create_dir_all(&to).expect("a folder");
    for entry in std::fs::read_dir(folder()).expect("kernels") {
        let path = entry.expect("an entry").path();
        let file = path.file_name().unwrap_or_default();
        let text = match mutant {
            Some(mutant) if file == target.file => mutant.text.clone(),
            _ => std::fs::read_to_string(&path).expect("a kernel file"),
        };
        std::fs::write(to.join(file), only(&text, target.instance)).expect("a copy");
    }
    let kernels = Kernels::from_sources(|file| {
        Source::new(to.join(file.stem()).with_extension("cu")).optimization(1)
    });
    match target.files() {
        [File::AttentionForwardHopper | File::AttentionBackwardHopper] => kernels.hopper(),
        _ => kernels,
    }
}

/// Lengths around a tile's, roles that differ, padding in every tensor: forward and backward.
fn lengths(head_dim: usize) -> Shape {
    Shape {
        segment_len: vec![129, 0, 35],
        prior_len: vec![40, 6, 65],
        past_len: vec![66, 9, 0, 3, 31, 64],
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
        past_gate: vec![2.0],
        ..Shape::plain(1, 1, head_dim, [0; 3])
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
    if !forward {
        // So many queries and keys that a ring of four stages turns within an item, a gate's gradient from several
        // tiles, and a last query that is a tile's first key.
        check(&Shape::plain(1, 3, head_dim, [257, 20, 40]), None, options);
        let options = Options {
            read_only_prior: true,
            ..options
        };
        return check(&Shape::plain(1, 2, head_dim, [40, 9, 0]), None, options);
    }
    check(&split(head_dim), Some(vec![1, 0]), phase(Phase::Decode));
    check(
        &lengths(head_dim),
        Some(vec![126, 0, 34]),
        phase(Phase::Decode),
    );
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
    // Beside short entries, which have fewer items than there are numbers for.
    let split = Shape {
        segment_len: vec![3, 1, 2, 1, 1],
        prior_len: vec![0, 5, 0, 1, 0],
        past_len: vec![8192 + 1030, 7, 0, 3, 0],
        ..split(head_dim)
    };
    check(&split, vec![0; 5]);
}

thread_local! {
    /// A planted bug is running: its panic is no news.
    static PLANTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the suite fails.
fn is_caught(kernels: &Kernels, target: &Target) -> bool {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !PLANTED.get() {
                tell(info);
            }
        }));
    });
    let head_dim = target.head_dim();
    let caught = |suite: &dyn Fn()| {
        PLANTED.set(true);
        let result = catch_unwind(AssertUnwindSafe(suite));
        PLANTED.set(false);
        result.is_err()
    };
    if target.hopper_prefill {
        return caught(&|| hopper_suite(kernels, head_dim));
    }
    let is_backward = |file: &File| {
        matches!(
            file,
            File::AttentionBackward | File::AttentionBackwardHopper
        )
    };
    let files = target.files();
    (!files.iter().all(is_backward) && caught(&|| suite(kernels, head_dim, true)))
        || (files.iter().any(is_backward) && caught(&|| suite(kernels, head_dim, false)))
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

fn mutants_of(target: &Target) -> Vec<Mutant> {
    let text = std::fs::read_to_string(folder().join(target.file)).expect("a kernel file");
    mutate::mutants(&text, target.rules)
}

/// Whether a rule has a mutant that is known to survive.
fn may_survive(target: &Target, mutant: &Mutant) -> bool {
    let same = |[file, find, _]: &[&str; 3]| (*file, *find) == (target.file, mutant.find);
    SURVIVORS.iter().any(same)
}

/// Plants every `stride`th bug, or all, those included that are known to survive; names of those that were planted and
/// those that were not caught.
fn plant(targets: &[Target], stride: usize) -> (usize, Vec<String>) {
    let of = |target| {
        let mutants = mutants_of(target).into_iter();
        mutants.map(move |mutant| (target, mutant))
    };
    let mut all: Vec<(&Target, Mutant)> = targets.iter().flat_map(of).collect();
    all.retain(|(target, mutant)| stride == 1 || !may_survive(target, mutant));
    let planted: Vec<(&Target, Mutant)> = all.into_iter().step_by(stride).collect();
    let is_caught = |target: &&Target, mutant: &Mutant, index: usize| {
        let (file, line, find) = (target.file, mutant.line, mutant.find);
        let name = format!("{file}-{}-{index}", target.instance);
        let kernels = kernels(target, Some(mutant), &name);
        assert!(
            target.files().iter().all(|&file| kernels.compiles(file)),
            "{file}:{line}: {find:?} does not compile"
        );
        is_caught(&kernels, target)
    };
    let survivors = mutate::plant(&planted, |target| target.file, is_caught);
    (planted.len(), survivors)
}

#[test]
fn without_a_bug_every_problem_passes() {
    for instance in ["bf16_d32", "bf16_d96", "bf16_d64"] {
        let target = TARGETS.iter().find(|target| target.instance == instance);
        let target = target.expect("a target");
        let kernels = kernels(target, None, instance);
        suite(&kernels, target.head_dim(), true);
        suite(&kernels, target.head_dim(), false);
    }
    for target in &hopper_rules::TARGETS[..2] {
        let kernels = kernels(target, None, &format!("hopper_{}", target.instance));
        hopper_suite(&kernels, target.head_dim());
    }
}

#[test]
fn a_few_planted_bugs_are_all_caught() {
    for (targets, stride) in [
        (&TARGETS[..], QUICK),
        (&hopper_rules::TARGETS, QUICK_HOPPER),
    ] {
        let (_, survivors) = plant(targets, stride);
        assert!(survivors.is_empty(), "{survivors:#?}");
    }
}

#[test]
fn every_rule_finds_its_text() {
    let mut nowhere = Vec::new();
    for target in TARGETS.iter().chain(&hopper_rules::TARGETS) {
        let all = mutants_of(target);
        let is_missing = |rule: &&Rule| !all.iter().any(|mutant| mutant.find == rule.find);
        let missing = target.rules.iter().filter(is_missing);
        nowhere.extend(missing.map(|rule| (target.file, rule.find)));
    }
    for [file, find, _] in SURVIVORS {
        let mut targets = TARGETS.iter().chain(&hopper_rules::TARGETS);
        if !targets
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

fn assert_nearly_all_are_caught(targets: &[Target], at_least: usize) {
    let (planted, survivors) = plant(targets, 1);
    assert!(planted >= at_least, "only {planted} bugs");
    assert!(
        survivors.len() * 20 <= planted,
        "{} of {planted} survived:\n{survivors:#?}",
        survivors.len()
    );
}

/// Takes about ten minutes on two cores.
#[test]
#[ignore = "minutes; run with --ignored"]
fn at_least_95_percent_of_all_planted_bugs_are_caught() {
    assert_nearly_all_are_caught(&TARGETS, 60);
}

/// Takes about ten minutes on two cores.
#[test]
#[ignore = "minutes; run with --ignored"]
fn at_least_95_percent_of_the_bugs_planted_for_hopper_are_caught() {
    assert_nearly_all_are_caught(&hopper_rules::TARGETS, 100);
}
