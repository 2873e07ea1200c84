//! The learning rate over a run, and the guard's decisions about steps.

use proptest::prelude::*;
use segattn::train::TrainError;
use segattn::train::guard::{Guard, GuardConfig, SkipReason, Verdict};
use segattn::train::schedule::{Schedule, ScheduleKind};

const KINDS: [ScheduleKind; 3] = [
    ScheduleKind::Constant,
    ScheduleKind::Cosine,
    ScheduleKind::Wsd,
];

#[test]
fn warm_up_rises_linearly_and_reaches_the_peak_on_its_last_step() {
    for kind in KINDS {
        let s = Schedule::new(kind, 1.0, 100, 4, Some(10), 0.1).unwrap();
        assert_eq!(
            [0, 1, 2, 3, 4].map(|i| s.lr(i)),
            [0.25, 0.5, 0.75, 1.0, 1.0],
            "{kind:?}"
        );
    }
}

#[test]
fn cosine_is_half_way_in_the_middle_and_at_the_minimum_after_its_fall() {
    let s = Schedule::new(ScheduleKind::Cosine, 2.0, 110, 10, None, 0.5).unwrap();
    assert_eq!(s.lr(10), 2.0);
    assert!((s.lr(60) - 1.5).abs() < 1e-12);
    assert_eq!((s.lr(110), s.lr(u64::MAX)), (1.0, 1.0));
    let short = Schedule::new(ScheduleKind::Cosine, 2.0, 110, 10, Some(20), 0.5).unwrap();
    assert_eq!((short.lr(30), short.lr(109)), (1.0, 1.0));
}

#[test]
fn wsd_is_stable_until_its_last_phase_and_then_falls_with_one_minus_the_root() {
    let s = Schedule::new(ScheduleKind::Wsd, 1.0, 100, 10, Some(16), 0.0).unwrap();
    assert!((9..=84).all(|i| s.lr(i) == 1.0));
    assert!((s.lr(88) - 0.5).abs() < 1e-12);
    assert_eq!(s.lr(100), 0.0);
    let default = Schedule::new(ScheduleKind::Wsd, 1.0, 100, 10, None, 0.0).unwrap();
    assert_eq!(default.lr(80), 1.0);
    assert!(default.lr(81) < 1.0);
}

proptest! {
    #[test]
    fn the_rate_stays_between_minimum_and_peak_and_never_rises_after_the_warm_up(
        kind in prop::sample::select(KINDS.to_vec()),
        steps in 1u64..500,
        warmup in 0u64..500,
        decay in prop::option::of(0u64..500),
        ratio in 0.0f64..=1.0,
    ) {
        match Schedule::new(kind, 3e-4, steps, warmup, decay, ratio) {
            Err(error) => {
                prop_assert!(matches!(error, TrainError::Config { .. }), "{}", error);
                let too_long = decay.is_some_and(|d| warmup + d > steps) && kind != ScheduleKind::Constant;
                prop_assert!(warmup > steps || too_long);
            }
            Ok(s) => {
                let rates: Vec<f64> = (0..steps + 10).map(|i| s.lr(i)).collect();
                prop_assert!(rates.iter().all(|&r| r > 0.0 || ratio == 0.0 || warmup > 0));
                prop_assert!(rates.iter().all(|&r| (0.0..=3e-4).contains(&r)));
                let after = &rates[(warmup as usize).min(rates.len())..];
                prop_assert!(after.windows(2).all(|w| w[1] <= w[0]));
                prop_assert!(after.iter().all(|&r| r >= 3e-4 * ratio * (1.0 - 1e-12)));
            }
        }
    }

    #[test]
    fn a_guard_saved_and_restored_anywhere_decides_as_the_original(
        losses in prop::collection::vec(prop_oneof![8 => 0.0f64..4.0, 1 => 50.0f64..60.0, 1 => Just(f64::NAN)], 1..120),
        cut in 0usize..120,
    ) {
        let config = GuardConfig { z_score: Some(3.0), window: 8, max_skipped: 5, skip_horizon: 30 };
        let mut whole = Guard::new(config.clone()).unwrap();
        let mut resumed = Guard::new(config).unwrap();
        for (i, &loss) in losses.iter().enumerate() {
            if i == cut {
                resumed = serde_json::from_str(&serde_json::to_string(&resumed).unwrap()).unwrap();
            }
            let step = i as u64;
            prop_assert_eq!(whole.decide(step, loss, loss / 3.0), resumed.decide(step, loss, loss / 3.0));
        }
        prop_assert_eq!(whole, resumed);
    }
}

#[test]
fn non_finite_steps_are_skipped_counted_and_too_many_stop_the_run() {
    let config = GuardConfig {
        max_skipped: 2,
        skip_horizon: 10,
        ..GuardConfig::default()
    };
    let mut guard = Guard::new(config).unwrap();
    assert_eq!(
        guard.decide(0, f64::NAN, 1.0),
        Verdict::Skip(SkipReason::NonFiniteLoss)
    );
    assert_eq!(
        guard.decide(1, 1.0, f64::INFINITY),
        Verdict::Skip(SkipReason::NonFiniteGradient)
    );
    assert_eq!(guard.decide(2, 1.0, 1.0), Verdict::Apply);
    assert_eq!(
        guard.decide(10, 1.0, 1e19),
        Verdict::Skip(SkipReason::NonFiniteGradient)
    );
    assert_eq!(
        guard.decide(11, 1.0, f64::NAN),
        Verdict::Skip(SkipReason::NonFiniteGradient)
    );
    assert_eq!(
        guard.decide(12, f64::INFINITY, 1.0),
        Verdict::Stop(SkipReason::NonFiniteLoss)
    );
    assert_eq!(guard.skipped_total(), 5);
}

#[test]
fn a_spike_is_skipped_only_if_asked_and_only_once_the_window_is_full() {
    let noisy = |i: u64| 2.0 + 0.1 * ((i % 5) as f64 - 2.0);
    let mut off = Guard::new(GuardConfig::default()).unwrap();
    let config = GuardConfig {
        z_score: Some(4.0),
        window: 16,
        ..GuardConfig::default()
    };
    let mut on = Guard::new(config).unwrap();
    assert_eq!(
        on.decide(0, 100.0, 1.0),
        Verdict::Apply,
        "nothing to compare with yet"
    );
    for i in 1..40 {
        assert_eq!(on.decide(i, noisy(i), noisy(i)), Verdict::Apply);
        assert_eq!(off.decide(i, noisy(i), noisy(i)), Verdict::Apply);
    }
    assert_eq!(off.decide(40, 9.0, 9.0), Verdict::Apply);
    assert!(
        matches!(on.decide(40, 9.0, 2.0), Verdict::Skip(SkipReason::LossSpike { z }) if z > 4.0)
    );
    assert!(
        matches!(on.decide(41, 2.0, 9.0), Verdict::Skip(SkipReason::GradientSpike { z }) if z > 4.0)
    );
    assert_eq!(
        on.decide(42, -9.0, 2.0),
        Verdict::Apply,
        "a fall is no spike"
    );
}

#[test]
fn a_skipped_spike_does_not_widen_what_counts_as_normal() {
    let config = GuardConfig {
        z_score: Some(4.0),
        window: 8,
        max_skipped: 100,
        ..GuardConfig::default()
    };
    let mut guard = Guard::new(config).unwrap();
    for i in 0..8 {
        guard.decide(i, 1.0 + 0.01 * (i % 2) as f64, 1.0);
    }
    for i in 8..60 {
        assert!(matches!(
            guard.decide(i, 5.0, 1.0),
            Verdict::Skip(SkipReason::LossSpike { .. })
        ));
    }
}

#[test]
fn a_loss_that_is_constant_up_to_rounding_is_no_spike() {
    let config = GuardConfig {
        z_score: Some(3.0),
        window: 4,
        ..GuardConfig::default()
    };
    let mut guard = Guard::new(config).unwrap();
    for i in 0..20 {
        assert_eq!(
            guard.decide(i, 1.0 + 1e-9 * (i % 3) as f64, 0.0),
            Verdict::Apply
        );
    }
}

#[test]
fn guard_settings_out_of_range_name_their_key() {
    let base = GuardConfig::default();
    for (config, key) in [
        (
            GuardConfig {
                z_score: Some(0.0),
                ..base.clone()
            },
            "guard.z_score",
        ),
        (
            GuardConfig {
                window: 1,
                ..base.clone()
            },
            "guard.window",
        ),
        (
            GuardConfig {
                skip_horizon: 0,
                ..base
            },
            "guard.skip_horizon",
        ),
    ] {
        let error = Guard::new(config).unwrap_err();
        assert!(
            matches!(&error, TrainError::Config { key: k, .. } if k == key),
            "{error}"
        );
    }
}
