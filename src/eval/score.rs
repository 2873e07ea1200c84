//! Scoring as RULER does it, and the interval of a mean.

/// What RULER does to a prediction before scoring: control characters become line breaks, and
/// space at both ends goes.
pub fn clean(prediction: &str) -> String {
    let visible: String = prediction
        .trim()
        .chars()
        .map(|c| if c < ' ' { '\n' } else { c })
        .collect();
    visible.trim().to_owned()
}

fn contained<'a>(
    prediction: &str,
    references: &'a [String],
) -> impl Iterator<Item = bool> + use<'a> {
    let prediction = clean(prediction).to_lowercase();
    references
        .iter()
        .map(move |r| prediction.contains(&r.to_lowercase()))
}

/// Share (0 to 1) of the references that the prediction contains, whatever the case; 0 without
/// references. RULER's measure for all its tasks but question answering.
pub fn string_match_all(prediction: &str, references: &[String]) -> f64 {
    if references.is_empty() {
        return 0.0;
    }
    let found = contained(prediction, references).filter(|f| *f).count();
    found as f64 / references.len() as f64
}

/// 1 if the prediction contains any of the references, whatever the case, else 0. RULER's measure
/// where one of several answers is enough.
pub fn string_match_part(prediction: &str, references: &[String]) -> f64 {
    f64::from(u8::from(contained(prediction, references).any(|f| f)))
}

/// 1 if the prediction's first word is one of the references exactly, else 0.
pub fn first_word_match(prediction: &str, references: &[String]) -> f64 {
    let words = prediction.split(|c: char| !c.is_alphanumeric());
    let first = words.into_iter().find(|word| !word.is_empty());
    let found = first.is_some_and(|word| references.iter().any(|r| r == word));
    f64::from(u8::from(found))
}

/// The 95% Wilson score interval of a mean of `n` scores in 0..=1.
///
/// Exact scores are shares of a few references, whose variance is at most that of a yes/no score
/// with the same mean, so the interval errs on the wide side. Unlike one from the sample's variance
/// it does not shrink to nothing when all scores are equal. (0, 1) without scores.
pub fn interval(mean: f64, n: usize) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    if n == 0 {
        return (0.0, 1.0);
    }
    let n = n as f64;
    let scale = 1.0 + Z * Z / n;
    let centre = (mean + Z * Z / (2.0 * n)) / scale;
    let half = Z
        * (mean * (1.0 - mean) / n + Z * Z / (4.0 * n * n))
            .max(0.0)
            .sqrt()
        / scale;
    // At the ends rounding would leave the range or the mean itself out.
    (
        (centre - half).max(0.0).min(mean),
        (centre + half).min(1.0).max(mean),
    )
}
