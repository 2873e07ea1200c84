//! The names in a run's folder.

use std::path::Path;

/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// One line a step and a validation.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// How the names of files of events begin, which TensorBoard reads.
pub const EVENTS_PREFIX: &str = "events.out.tfevents";
/// The picture of the loss.
pub const PICTURE_FILE: &str = "loss.svg";
/// The file that is locked.
pub const LOCK_FILE: &str = "run.lock";

/// Whether `path` is something that a run writes in its own folder, which is no training data. By name alone only in
/// a folder that shows it is a run's: by a lock file, or by metrics beside checkpoints.
pub fn is_output(path: &Path) -> bool {
    let names = [CHECKPOINTS, METRICS_FILE, PICTURE_FILE, LOCK_FILE];
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return false;
    };
    let has = |name: &str| folder.join(name).exists();
    let events = name
        .as_encoded_bytes()
        .starts_with(EVENTS_PREFIX.as_bytes());
    (names.iter().any(|own| name == *own) || events)
        && (has(LOCK_FILE) || (has(METRICS_FILE) && has(CHECKPOINTS)))
}

#[cfg(test)]
mod tests {
    use super::is_output;

    #[test]
    fn only_a_runs_folder_makes_names_a_runs_own() {
        let folder = tempfile::tempdir().unwrap();
        let metrics = folder.path().join("metrics.jsonl");
        std::fs::write(&metrics, "").unwrap();
        assert!(!is_output(&metrics));
        std::fs::create_dir(folder.path().join("checkpoints")).unwrap();
        assert!(is_output(&metrics) && !is_output(&folder.path().join("text.jsonl")));
    }
}
