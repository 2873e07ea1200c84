//! Token ids from a JSON file, read as a stream.

use std::io::Read;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};

use super::error::data_error;
use super::store::Writer;
use crate::train::error::{Result, TrainError};

/// A JSON array of ids, one document, or of arrays of ids, a document each; both at once is an error.
pub(super) fn read_ids(path: &Path, input: impl Read, writer: &mut Writer) -> Result<()> {
    let mut file = IdFile {
        writer,
        failure: None,
        nested: None,
    };
    let mut json = serde_json::Deserializer::from_reader(input);
    let result = Ids(&mut file, 0).deserialize(&mut json);
    let result = result.and_then(|()| json.end());
    match (file.failure, result) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => {
            writer.end_document();
            Ok(())
        }
        (None, Err(e)) => {
            let expected = "an array of token ids, or of such arrays";
            Err(data_error(path, Some(e.line()), expected, e))
        }
    }
}

/// A file that is read.
struct IdFile<'a> {
    writer: &'a mut Writer,
    /// Why writing failed.
    failure: Option<TrainError>,
    /// Whether the outer array holds arrays, once that is known.
    nested: Option<bool>,
}

/// What stands this many arrays deep.
struct Ids<'a, 'b>(&'a mut IdFile<'b>, usize);

impl Ids<'_, '_> {
    /// Notes what the outer array holds.
    fn outer<E: Error>(&mut self, nested: bool) -> std::result::Result<(), E> {
        match self.0.nested.replace(nested) {
            Some(before) if before != nested => {
                Err(E::custom("ids and arrays of ids beside each other"))
            }
            _ => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Ids<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> std::result::Result<(), D::Error> {
        match self.1 {
            0 => input.deserialize_seq(self),
            _ => input.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Ids<'_, '_> {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("token ids")
    }
    fn visit_u64<E: Error>(mut self, id: u64) -> std::result::Result<(), E> {
        if self.1 == 1 {
            self.outer(false)?;
        }
        let id = u32::try_from(id).map_err(|_| E::custom("an id beyond 32 bits"))?;
        self.0.writer.push(&[id]).map_err(|e| {
            self.0.failure = Some(e);
            E::custom("writing failed")
        })
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> std::result::Result<(), A::Error> {
        match self.1 {
            0 => {}
            1 => self.outer(true)?,
            _ => return Err(A::Error::custom("arrays nested deeper than documents")),
        }
        while list
            .next_element_seed(Ids(&mut *self.0, self.1 + 1))?
            .is_some()
        {}
        if self.1 == 1 {
            self.0.writer.end_document();
        }
        Ok(())
    }
}
