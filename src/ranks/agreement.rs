//! Whether the ranks are of one run: each says what it has, and all must have the same.

use super::error::{RankError, Result};
use super::mesh::Mesh;

/// Longest part of a value that an error shows, in characters.
const SHOWN: usize = 60;

/// What a rank has, by name, in an order that all ranks keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreement(Vec<(String, String)>);

impl Agreement {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a value on which all ranks must agree.
    pub fn on(mut self, what: impl Into<String>, value: impl ToString) -> Self {
        self.0.push((what.into(), value.to_string()));
        self
    }

    /// Compares with the other ranks.
    ///
    /// # Errors
    /// [`RankError::Differs`] for the first value that differs, on every rank; else as [`Mesh::gather`].
    pub fn check(&self, mesh: &Mesh) -> Result<()> {
        let doing = "the ranks compare what they run";
        let mine = serde_json::to_vec(&self.0).expect("texts");
        let all = mesh.gather(&mine, doing)?;
        let parse = |(rank, text): (usize, &Vec<u8>)| {
            serde_json::from_slice(text).map_err(|error| RankError::Message {
                rank,
                doing,
                expected: "a list of names and values".into(),
                got: error.to_string(),
            })
        };
        let all: Vec<Vec<(String, String)>> =
            all.iter().enumerate().map(parse).collect::<Result<_>>()?;
        for (rank, other) in all.iter().enumerate() {
            if let Some(error) = difference(&all[0], rank, other) {
                mesh.end(&error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }
}

/// The first value of a rank that is not that of rank 0.
fn difference(
    first: &[(String, String)],
    rank: usize,
    other: &[(String, String)],
) -> Option<RankError> {
    (0..first.len().max(other.len())).find_map(|i| {
        let [expected, got] = [first, other].map(|list| list.get(i));
        let (what, _) = expected.or(got)?;
        let value = |of: Option<&(String, String)>| match of {
            Some((name, value)) if name == what => shortened(value),
            _ => "nothing".to_owned(),
        };
        (expected != got).then(|| RankError::Differs {
            rank,
            what: what.clone(),
            expected: value(expected),
            got: value(got),
        })
    })
}

fn shortened(value: &str) -> String {
    match value.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", value[..end].escape_debug()),
        None => value.escape_debug().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Agreement, difference};

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let a = Agreement::new().on("version", "1").on("batch", 8);
        assert!(difference(&a.0, 1, &a.0).is_none());
        let b = Agreement::new().on("version", "1").on("batch", 4);
        let said = difference(&a.0, 3, &b.0).unwrap().to_string();
        assert_eq!(said, "rank 3: batch: expected 8 as on rank 0, got 4");
        let c = Agreement::new().on("version", "1");
        let said = difference(&a.0, 1, &c.0).unwrap().to_string();
        assert_eq!(said, "rank 1: batch: expected 8 as on rank 0, got nothing");
        let said = difference(&c.0, 1, &a.0).unwrap().to_string();
        assert_eq!(said, "rank 1: batch: expected nothing as on rank 0, got 8");
    }
}
