//! Token ids from a JSON file, read as a stream.

use std::io::Read;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::corpus::{Scratch, data_error};
use crate::train::error::{Result, TrainError};

/// A JSON array of ids, one document, or of arrays of ids, a document each; read as a stream. Returns where
/// inner arrays end in the scratch file.
pub(super) fn read_ids(path: &Path, input: impl Read, scratch: &mut Scratch) -> Result<Vec<u64>> {
    let mut failure = None;
    let mut ends = Vec::new();
    let sink = Ids {
        scratch,
        ends: &mut ends,
        failure: &mut failure,
        depth: 0,
    };
    let mut json = serde_json::Deserializer::from_reader(input);
    let result = sink.deserialize(&mut json).and_then(|()| json.end());
    match (failure, result) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(ends),
        (None, Err(e)) => Err(data_error(
            path,
            Some(e.line()),
            "an array of token ids, or of such arrays",
            e,
        )),
    }
}

struct Ids<'a> {
    scratch: &'a mut Scratch,
    ends: &'a mut Vec<u64>,
    failure: &'a mut Option<TrainError>,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Ids<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> std::result::Result<(), D::Error> {
        match self.depth {
            0 => input.deserialize_seq(self),
            _ => input.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Ids<'_> {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("token ids")
    }
    fn visit_u64<E: serde::de::Error>(self, id: u64) -> std::result::Result<(), E> {
        let id = u32::try_from(id).map_err(|_| E::custom("an id beyond 32 bits"))?;
        self.scratch.push(&[id]).map_err(|e| {
            *self.failure = Some(e);
            E::custom("writing failed")
        })
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        if self.depth > 1 {
            return Err(serde::de::Error::custom(
                "arrays nested deeper than documents",
            ));
        }
        loop {
            let inner = Ids {
                scratch: &mut *self.scratch,
                ends: &mut *self.ends,
                failure: &mut *self.failure,
                depth: self.depth + 1,
            };
            if list.next_element_seed(inner)?.is_none() {
                break;
            }
        }
        if self.depth == 1 {
            self.ends.push(self.scratch.len);
        }
        Ok(())
    }
}
