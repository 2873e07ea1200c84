//! What the engine and the HTTP side both know: limits, the model's sizes, and counts.

use crate::model::config::PromptBreak;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

/// Limits of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run side by side.
    pub running: usize,
    /// Sequences that wait for a place.
    pub waiting: usize,
    /// Most tokens of a sequence, its prompt and its new tokens.
    pub longest: usize,
    /// Most tokens of prompts that are read between two steps of the sequences that generate.
    pub read_at_once: usize,
    /// Bytes of host memory for the states of prompts.
    pub cache_bytes: usize,
}

impl Limits {
    /// Most sequences that run or wait.
    pub fn places(&self) -> usize {
        self.running
            .saturating_add(self.waiting)
            .min(Semaphore::MAX_PERMITS)
    }
}

/// What both sides know.
#[derive(Debug)]
pub struct Shared {
    /// The limits.
    pub limits: Limits,
    /// The vocabulary's size.
    pub vocab_size: usize,
    /// Where prompts have their break.
    pub prompt_break: PromptBreak,
    /// A permit for each sequence that may run or wait.
    pub(super) places: Arc<Semaphore>,
    /// Counts.
    pub metrics: Metrics,
}

impl Shared {
    /// Of a server of one model.
    pub fn new(limits: Limits, vocab_size: usize, prompt_break: PromptBreak) -> Self {
        Self {
            limits,
            vocab_size,
            prompt_break,
            places: Arc::new(Semaphore::new(limits.places())),
            metrics: Metrics::default(),
        }
    }
}

/// Counts since the start, and what is so now.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Answers of a status from 200 to 299, 400 to 499, and 500 on.
    pub answers: [AtomicU64; 3],
    /// Tokens of prompts.
    pub prompt_tokens: AtomicU64,
    /// Those of them that had been read for another request.
    pub cached_tokens: AtomicU64,
    /// New tokens.
    pub new_tokens: AtomicU64,
    /// Sequences that have ended by themselves, that nobody waited for any more, and that failed.
    pub ended: [AtomicU64; 3],
    /// Steps that chose tokens.
    pub steps: AtomicU64,
    /// Sequences that run.
    pub running: AtomicUsize,
    /// Sequences that wait.
    pub waiting: AtomicUsize,
    /// Bytes and number of the states that are kept.
    pub cache: [AtomicUsize; 2],
    /// From a sequence's arrival to its first token.
    pub first_token: Histogram,
    /// From one token of a sequence to the next.
    pub next_token: Histogram,
    /// From a sequence's arrival to its end.
    pub whole: Histogram,
}

/// Upper bounds of a histogram's classes, in seconds.
const BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0,
];

/// Times in classes.
#[derive(Debug, Default)]
pub struct Histogram {
    classes: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Histogram {
    pub(super) fn add(&self, time: Duration) {
        if let Some(class) = BOUNDS.iter().position(|b| time.as_secs_f64() <= *b) {
            self.classes[class].fetch_add(1, Ordering::Relaxed);
        }
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn write(&self, name: &str, help: &str, text: &mut String) {
        let (mut up_to, load) = (0, |x: &AtomicU64| x.load(Ordering::Relaxed));
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} histogram\n"));
        for (bound, class) in BOUNDS.iter().zip(&self.classes) {
            up_to += load(class);
            text.push_str(&format!("{name}_bucket{{le=\"{bound}\"}} {up_to}\n"));
        }
        // A count read later than the classes may be larger than their sum; never smaller.
        let (count, sum) = (load(&self.count), load(&self.nanoseconds) as f64 * 1e-9);
        text.push_str(&format!(
            "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}\n"
        ));
    }
}

impl Metrics {
    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let load = |x: &AtomicU64| x.load(Ordering::Relaxed);
        let now = |x: &AtomicUsize| x.load(Ordering::Relaxed) as u64;
        let mut one = |name: &str, kind: &str, help: &str, values: &[(&str, u64)]| {
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
            for (label, value) in values {
                text.push_str(&format!("{name}{label} {value}\n"));
            }
        };
        let [ok, wrong, failed] = self.answers.each_ref().map(load);
        let answers = [
            ("{code=\"2xx\"}", ok),
            ("{code=\"4xx\"}", wrong),
            ("{code=\"5xx\"}", failed),
        ];
        one(
            "segattn_http_responses_total",
            "counter",
            "Answers by status.",
            &answers,
        );
        let [ended, left, failed] = self.ended.each_ref().map(load);
        let how = [
            ("{how=\"ended\"}", ended),
            ("{how=\"cancelled\"}", left),
            ("{how=\"failed\"}", failed),
        ];
        one(
            "segattn_sequences_total",
            "counter",
            "Sequences by how they ended.",
            &how,
        );
        for (name, help, value) in [
            (
                "segattn_prompt_tokens_total",
                "Tokens of prompts.",
                &self.prompt_tokens,
            ),
            (
                "segattn_cached_tokens_total",
                "Tokens of prompts that had been read before.",
                &self.cached_tokens,
            ),
            ("segattn_new_tokens_total", "New tokens.", &self.new_tokens),
            (
                "segattn_steps_total",
                "Steps that chose tokens.",
                &self.steps,
            ),
        ] {
            one(name, "counter", help, &[("", load(value))]);
        }
        for (name, help, value) in [
            ("segattn_running", "Sequences that run.", &self.running),
            ("segattn_waiting", "Sequences that wait.", &self.waiting),
            (
                "segattn_cache_bytes",
                "Bytes of the states that are kept.",
                &self.cache[0],
            ),
            (
                "segattn_cache_states",
                "States that are kept.",
                &self.cache[1],
            ),
        ] {
            one(name, "gauge", help, &[("", now(value))]);
        }
        for (name, help, times) in [
            (
                "segattn_first_token_seconds",
                "From arrival to the first token.",
                &self.first_token,
            ),
            (
                "segattn_next_token_seconds",
                "From one token to the next.",
                &self.next_token,
            ),
            (
                "segattn_sequence_seconds",
                "From arrival to the end.",
                &self.whole,
            ),
        ] {
            times.write(name, help, &mut text);
        }
        text
    }
}
