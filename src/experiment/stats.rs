//! Means over seeds with 95% intervals.
//!
//! *Losses.* Every seed reads the same held-out windows, so there are two sources of error, and the squares of both
//! half widths are added: of documents by a bootstrap (documents are drawn with replacement, each with all its
//! windows, the loss of a window being its mean over seeds), of seeds by Student's t. Without the loss of each window
//! only the second is known, and with one seed only the first.
//!
//! *Shares.* Every seed has prompts of its own. The interval is Wilson's over all samples together; they count as
//! fewer where seeds differ by more than chance (divided by the dispersion, the Pearson chi-squared over its degrees
//! of freedom, where that is above 1).
//!
//! *Differences* are paired. Of losses they are the losses' differences window by window, treated as losses are. Of
//! shares they have Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10) from the two
//! intervals of Wilson and the correlation of the two arms over their prompts. It does not shrink to nothing where all
//! prompts agree.
//!
//! *Means over tasks* have the intervals of their tasks put together in the same way, tasks independent of each other,
//! or the bootstrap over seeds and prompts where that is wider.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::rows::{NATS, Row};
use crate::eval::score::interval;

/// Draws of a bootstrap.
const DRAWS: usize = 4000;
/// The share of an interval that is outside on either side.
const TAIL: f64 = 0.025;
/// Student's t at 97.5%, by degrees of freedom from 1.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

/// A mean over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its 95% interval, where one can be had.
    pub interval: Option<(f64, f64)>,
    /// Seeds.
    pub seeds: usize,
    /// Samples of all seeds together: tokens of losses, prompts of tasks.
    pub samples: u64,
}

/// The mean of rows that differ in their seed only. `None` where no row has a value.
pub fn estimate(rows: &[&Row]) -> Option<Estimate> {
    let rows: Vec<&Row> = rows.iter().copied().filter(|r| r.value.is_some()).collect();
    let values: Vec<f64> = rows.iter().filter_map(|r| r.value).collect();
    let first = rows.first()?;
    let samples = rows.iter().map(|r| r.samples).sum();
    let (mean, interval) = match first.metric == NATS {
        true => {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean, loss_interval(&rows, &values))
        }
        false => share_interval(&rows, samples),
    };
    Some(Estimate {
        mean,
        interval,
        seeds: rows.len(),
        samples,
    })
}

fn loss_interval(rows: &[&Row], values: &[f64]) -> Option<(f64, f64)> {
    let seeds: Option<Vec<Groups>> = rows.iter().map(|row| Groups::of(row)).collect();
    of_losses(values, seeds.as_deref().and_then(Groups::averaged))
}

/// The interval of means of seeds, whose documents have these means over seeds.
fn of_losses(means: &[f64], documents: Option<Groups>) -> Option<(f64, f64)> {
    let mean = means.iter().sum::<f64>() / means.len() as f64;
    let by_documents = documents.map(|groups| middle(|random| redrawn(&groups, random)));
    match (by_documents, student(means)) {
        (Some(a), Some(b)) => Some(added(mean, &[a, b], 1.0)),
        (a, b) => a.or(b),
    }
}

/// The interval of a mean whose errors are those of independent parts with these intervals around it, each divided by
/// `over`.
fn added(mean: f64, parts: &[(f64, f64)], over: f64) -> (f64, f64) {
    let root = |half: &dyn Fn(&(f64, f64)) -> f64| {
        parts
            .iter()
            .map(|part| (half(part) / over).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    (
        mean - root(&|part| mean - part.0),
        mean + root(&|part| part.1 - mean),
    )
}

/// Student's interval of the mean of these values; `None` for a single one.
fn student(values: &[f64]) -> Option<(f64, f64)> {
    let n = values.len();
    let t = T.get(n.checked_sub(2)?).copied().unwrap_or(1.96);
    let mean = values.iter().sum::<f64>() / n as f64;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let half = t * (squares / (n - 1) as f64 / n as f64).sqrt();
    Some((mean - half, mean + half))
}

fn share_interval(rows: &[&Row], samples: u64) -> (f64, Option<(f64, f64)>) {
    let counted = |row: &Row| (row.value.unwrap_or(0.0), row.samples as f64);
    let sum: f64 = rows.iter().map(|r| counted(r)).map(|(p, n)| p * n).sum();
    let mean = sum / samples.max(1) as f64;
    let variance = mean * (1.0 - mean);
    let squares = rows.iter().map(|row| {
        let (share, n) = counted(row);
        n * (share - mean).powi(2)
    });
    let dispersion = match rows.len() {
        n if n > 1 && variance > 0.0 => squares.sum::<f64>() / variance / (n - 1) as f64,
        _ => 1.0,
    };
    let effective = samples as f64 / dispersion.max(1.0);
    (mean, Some(interval(mean, effective.floor() as usize)))
}

/// The difference between two arms, `of` minus `from`. `None` without a seed that both have, and for losses where
/// values of single windows are missing or do not pair.
pub fn difference<'a>(of: &[&'a Row], from: &[&'a Row]) -> Option<Estimate> {
    let pair = |row: &&'a Row| {
        let other = from.iter().find(|other| other.seed == row.seed)?;
        (row.value.is_some() && other.value.is_some()).then_some((*row, *other))
    };
    let (left, right): (Vec<&Row>, Vec<&Row>) = of.iter().filter_map(pair).unzip();
    match left.first()?.metric == NATS {
        true => of_windows(&left, &right),
        false => {
            let correlation = correlation(&left, &right);
            hybrid(&estimate(&left)?, &estimate(&right)?, correlation)
        }
    }
}

fn of_windows(of: &[&Row], from: &[&Row]) -> Option<Estimate> {
    let pairs = of.iter().zip(from);
    let pairs = pairs.map(|(row, other)| Groups::of(row)?.minus(&Groups::of(other)?));
    let pairs: Vec<Groups> = pairs.collect::<Option<_>>()?;
    let means: Vec<f64> = pairs.iter().map(Groups::mean).collect();
    Some(Estimate {
        mean: means.iter().sum::<f64>() / means.len() as f64,
        interval: of_losses(&means, Groups::averaged(&pairs)),
        seeds: pairs.len(),
        samples: of.iter().map(|row| row.samples).sum(),
    })
}

/// The difference of two shares with this correlation, by Newcombe's method 10.
pub fn hybrid(of: &Estimate, from: &Estimate, correlation: f64) -> Option<Estimate> {
    let (low, high) = of.interval?;
    let (from_low, from_high) = from.interval?;
    let half = |a: f64, b: f64| {
        let squares = a * a + b * b - 2.0 * correlation * a * b;
        squares.max(0.0).sqrt()
    };
    let mean = of.mean - from.mean;
    let below = half(of.mean - low, from_high - from.mean);
    let above = half(high - of.mean, from.mean - from_low);
    Some(Estimate {
        mean,
        interval: Some((mean - below, mean + above)),
        ..*of
    })
}

/// The correlation of two arms over the prompts of the same seeds; 0 where it is not known.
fn correlation(of: &[&Row], from: &[&Row]) -> f64 {
    let mut sums = [0.0; 3];
    for (row, other) in of.iter().zip(from) {
        let (Some(a), Some(b)) = (&row.values, &other.values) else {
            return 0.0;
        };
        if a.len() != b.len() {
            return 0.0;
        }
        let mean = |list: &[f64]| list.iter().sum::<f64>() / list.len().max(1) as f64;
        let (mean_a, mean_b) = (mean(a), mean(b));
        for (x, y) in a.iter().zip(b) {
            let (x, y) = (x - mean_a, y - mean_b);
            sums = [sums[0] + x * y, sums[1] + x * x, sums[2] + y * y];
        }
    }
    let [both, left, right] = sums;
    match left > 0.0 && right > 0.0 {
        true => both / (left * right).sqrt(),
        false => 0.0,
    }
}

/// The mean over several tasks of one arm: rows of any seed and task. `None` unless every task has the same seeds, with
/// values.
pub fn mean_of_tasks(rows: &[&Row]) -> Option<Estimate> {
    let distinct = |mut list: Vec<String>| {
        list.sort_unstable();
        list.dedup();
        list
    };
    let seeds = distinct(rows.iter().map(|row| row.seed.to_string()).collect());
    let tasks = distinct(rows.iter().map(|row| row.task.clone()).collect());
    if rows.is_empty() || rows.len() != seeds.len() * tasks.len() {
        return None;
    }
    let of_task = |task: &String| {
        let rows: Vec<&Row> = rows
            .iter()
            .copied()
            .filter(|row| row.task == *task)
            .collect();
        estimate(&rows)
    };
    let each: Vec<Estimate> = tasks.iter().map(of_task).collect::<Option<_>>()?;
    let count = each.len() as f64;
    let mean = each.iter().map(|e| e.mean).sum::<f64>() / count;
    // Each task's interval, moved to the mean of all.
    let moved = |e: &Estimate| {
        let (low, high) = e.interval?;
        Some((low - e.mean + mean, high - e.mean + mean))
    };
    let parts: Vec<_> = each.iter().map(moved).collect::<Option<_>>()?;
    let (mut low, mut high) = added(mean, &parts, count);
    let of_seed = |seed: &String| -> Option<Vec<Groups>> {
        let rows = rows.iter().filter(|row| row.seed.to_string() == *seed);
        rows.map(|row| Groups::of(row)).collect()
    };
    if let Some(strata) = seeds.iter().map(of_seed).collect::<Option<Vec<_>>>() {
        let drawn = stratified(&strata);
        (low, high) = (low.min(drawn.0), high.max(drawn.1));
    }
    Some(Estimate {
        mean,
        interval: Some((low, high)),
        seeds: seeds.len(),
        samples: rows.iter().map(|row| row.samples).sum(),
    })
}

/// Windows of one seed by document: sums of weighted values, and weights.
#[derive(Clone, Debug)]
struct Groups(Vec<(f64, f64)>);

impl Groups {
    fn of(row: &Row) -> Option<Self> {
        let values = row.values.as_ref().filter(|values| values.len() > 1)?;
        let fits = |len: Option<usize>| len.is_none_or(|len| len == values.len());
        let (weights, groups) = (row.weights.as_ref(), row.groups.as_ref());
        if !fits(weights.map(Vec::len)) || !fits(groups.map(Vec::len)) {
            return None;
        }
        let distinct = groups.map(|groups| {
            let mut list = groups.clone();
            list.sort_unstable();
            list.dedup();
            list
        });
        // A single document says nothing about how documents differ: then its windows are drawn.
        let distinct = distinct.filter(|list| list.len() > 1);
        let mut sums = vec![(0.0, 0.0); distinct.as_ref().map_or(values.len(), Vec::len)];
        for (i, value) in values.iter().enumerate() {
            let weight = weights.map_or(1.0, |weights| weights[i]);
            let at = match (&distinct, groups) {
                (Some(list), Some(groups)) => list.binary_search(&groups[i]).ok()?,
                _ => i,
            };
            sums[at].0 += weight * value;
            sums[at].1 += weight;
        }
        Some(Self(sums))
    }

    fn minus(&self, other: &Self) -> Option<Self> {
        let same = self.0.len() == other.0.len();
        let pairs = self.0.iter().zip(&other.0);
        let same = same && pairs.clone().all(|(a, b)| a.1 == b.1);
        same.then(|| Self(pairs.map(|(a, b)| (a.0 - b.0, a.1)).collect()))
    }

    /// Means over seeds; `None` where these do not have the same groups.
    fn averaged(seeds: &[Self]) -> Option<Self> {
        let mut sum = seeds.first()?.clone();
        for seed in &seeds[1..] {
            let same = sum.0.len() == seed.0.len();
            let pairs = sum.0.iter().zip(&seed.0);
            if !same || pairs.clone().any(|(a, b)| a.1 != b.1) {
                return None;
            }
            sum = Self(pairs.map(|(a, b)| (a.0 + b.0, a.1)).collect());
        }
        sum.0
            .iter_mut()
            .for_each(|group| group.0 /= seeds.len() as f64);
        Some(sum)
    }

    fn mean(&self) -> f64 {
        self.mean_of(0..self.0.len())
    }

    fn mean_of(&self, drawn: impl Iterator<Item = usize>) -> f64 {
        let add = |sums: (f64, f64), i: usize| (sums.0 + self.0[i].0, sums.1 + self.0[i].1);
        let (sum, weight) = drawn.fold((0.0, 0.0), add);
        sum / weight
    }
}

/// Numbers from 0 to below `n`.
fn below(random: &mut ChaCha8Rng, n: usize) -> usize {
    // The bias is below n / 2^64.
    ((u128::from(random.next_u64()) * n as u128) >> 64) as usize
}

/// The middle 95% of the mean over seeds and tasks: seeds are drawn, and the samples of each task by themselves.
fn stratified(seeds: &[Vec<Groups>]) -> (f64, f64) {
    middle(|random| {
        let mut sum = 0.0;
        for _ in seeds {
            let tasks = &seeds[below(random, seeds.len())];
            let all = tasks.iter().map(|task| redrawn(task, random)).sum::<f64>();
            sum += all / tasks.len() as f64;
        }
        sum / seeds.len() as f64
    })
}

/// The mean of as many groups, drawn with replacement.
fn redrawn(groups: &Groups, random: &mut ChaCha8Rng) -> f64 {
    let n = groups.0.len();
    groups.mean_of((0..n).map(|_| below(random, n)))
}

/// The middle 95% of draws, which are the same for the same data.
fn middle(draw: impl Fn(&mut ChaCha8Rng) -> f64) -> (f64, f64) {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut means: Vec<f64> = (0..DRAWS).map(|_| draw(&mut random)).collect();
    means.sort_unstable_by(f64::total_cmp);
    let outside = (TAIL * DRAWS as f64) as usize;
    (means[outside], means[DRAWS - 1 - outside])
}

#[cfg(test)]
mod tests {
    use super::super::rows::SCORE;
    use super::*;

    fn row(seed: u64, metric: &str, value: f64, samples: u64) -> Row {
        Row {
            seed,
            metric: metric.into(),
            value: Some(value),
            samples,
            ..Row::default()
        }
    }

    fn loss(seed: u64, values: Vec<f64>, groups: Option<Vec<u64>>) -> Row {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Row {
            values: Some(values),
            groups,
            ..row(seed, NATS, mean, 100)
        }
    }

    fn near(a: (f64, f64), b: (f64, f64), most: f64) {
        assert!(
            (a.0 - b.0).abs() < most && (a.1 - b.1).abs() < most,
            "{a:?} {b:?}"
        );
    }

    /// Noise with the variance 1/12.
    fn noise(seed: u64, n: usize) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let unit = |_| (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        (0..n).map(unit).collect()
    }

    #[test]
    fn a_loss_without_windows_has_students_interval_and_one_seed_has_none() {
        let [a, b] = [row(1, NATS, 1.0, 10), row(2, NATS, 1.2, 10)];
        let one = estimate(&[&a]).unwrap();
        assert_eq!((one.mean, one.interval), (1.0, None));
        // sd = 0.1414, over the root of two 0.1, times 12.706.
        let two = estimate(&[&a, &b]).unwrap();
        near(two.interval.unwrap(), (1.1 - 1.2706, 1.1 + 1.2706), 1e-9);
    }

    #[test]
    fn a_bootstrap_over_windows_is_about_the_normal_interval() {
        let values: Vec<f64> = noise(3, 400).iter().map(|x| 2.0 + x).collect();
        let row = loss(1, values, None);
        let found = estimate(&[&row]).unwrap();
        let half = 1.96 * (1.0f64 / 12.0 / 400.0).sqrt();
        near(
            found.interval.unwrap(),
            (found.mean - half, found.mean + half),
            0.1 * half,
        );
    }

    #[test]
    fn windows_of_a_document_are_drawn_together_and_seeds_count() {
        // Ten documents of forty equal windows: only ten values.
        let ten = noise(4, 10);
        let values: Vec<f64> = (0..400).map(|i| ten[i / 40]).collect();
        let groups = Some((0..400).map(|i| i / 40).collect());
        let apart = loss(1, values.clone(), groups);
        let (low, high) = estimate(&[&apart]).unwrap().interval.unwrap();
        let single = loss(1, values.clone(), None);
        let (l, h) = estimate(&[&single]).unwrap().interval.unwrap();
        assert!(high - low > 4.0 * (h - l), "{low} {high} {l} {h}");
        // Two seeds that differ by 1: Student's half width, 12.706 x 0.5, and documents add little to it.
        let other = loss(2, values.iter().map(|x| x + 1.0).collect(), None);
        let found = estimate(&[&single, &other]).unwrap();
        near(
            found.interval.unwrap(),
            (found.mean - 6.353, found.mean + 6.353),
            1e-3,
        );
    }

    #[test]
    fn shares_have_wilsons_interval_and_seeds_that_differ_widen_it() {
        let [a, b] = [row(1, SCORE, 0.9, 50), row(2, SCORE, 0.9, 50)];
        let found = estimate(&[&a, &b]).unwrap();
        assert_eq!(found.interval, Some(interval(0.9, 100)));
        let [a, b] = [row(1, SCORE, 0.8, 50), row(2, SCORE, 1.0, 50)];
        let wider = estimate(&[&a, &b]).unwrap();
        // Dispersion: 50 (0.01 + 0.01) / 0.09 = 11.1.
        assert_eq!(wider.interval, Some(interval(wider.mean, 9)));
        let none = estimate(&[&row(1, SCORE, 1.0, 8)]).unwrap();
        assert_eq!(none.interval, Some(interval(1.0, 8)));
    }

    #[test]
    fn differences_are_paired() {
        let values = noise(5, 50);
        let from = loss(1, values.clone(), None);
        let of = loss(1, values.iter().map(|x| x + 0.25).collect(), None);
        let found = difference(&[&of], &[&from]).unwrap();
        near(found.interval.unwrap(), (0.25, 0.25), 1e-9);
        // Other seeds, or windows that do not pair, give no difference.
        assert_eq!(
            difference(&[&loss(2, values.clone(), None)], &[&from]),
            None
        );
        assert_eq!(difference(&[&loss(1, noise(5, 49), None)], &[&from]), None);
    }

    fn prompts(seed: u64, values: Vec<f64>) -> Row {
        let (mean, n) = (
            values.iter().sum::<f64>() / values.len() as f64,
            values.len() as u64,
        );
        Row {
            values: Some(values),
            ..row(seed, SCORE, mean, n)
        }
    }

    #[test]
    fn differences_of_shares_have_newcombes_interval() {
        // Both right 36, only the first 12, only the second 2, of 50; Newcombe's table II (a).
        let of = [vec![1.0; 48], vec![0.0; 2]].concat();
        let from = [vec![1.0; 36], vec![0.0; 12], vec![1.0; 2]].concat();
        let (of, from) = (prompts(1, of), prompts(1, from));
        let found = difference(&[&of], &[&from]).unwrap();
        assert!((found.mean - 0.2).abs() < 1e-12);
        near(found.interval.unwrap(), (0.0569, 0.3404), 0.0003);
        // Where all prompts agree there is still doubt.
        let same = prompts(1, vec![1.0; 10]);
        let (low, high) = difference(&[&same], &[&same]).unwrap().interval.unwrap();
        assert!(low < -0.2 && high > 0.2, "{low} {high}");
    }

    #[test]
    fn the_mean_of_tasks_needs_all_of_them() {
        let task = |name: &str, values: Vec<f64>| Row {
            task: name.into(),
            metric: SCORE.into(),
            ..loss(1, values, None)
        };
        let (a, b) = (task("a", vec![1.0; 40]), task("b", [0.0, 1.0].repeat(20)));
        let found = mean_of_tasks(&[&a, &b]).unwrap();
        assert_eq!((found.mean, found.samples), (0.75, 200));
        // Half of the binomial's: sd of b 0.079, of the mean 0.0395.
        near(
            found.interval.unwrap(),
            (0.75 - 0.0775, 0.75 + 0.0775),
            0.012,
        );
        let other = Row {
            seed: 2,
            ..a.clone()
        };
        assert_eq!(mean_of_tasks(&[&a, &b, &other]), None);
    }
}
