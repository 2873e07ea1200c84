//! Token ids from a JSON file, read as a stream, and breaks beside them.

use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::error::data_error;
use super::store::Writer;
use crate::model::segmentation::{Sequence, Tokens};
use crate::train::error::{Result, TrainError};

/// Token ids with their breaks and rereads in JSON, `{"tokens": [...], "breaks": [...], "rereads": [...]}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listed {
    pub(super) tokens: Vec<u32>,
    /// Strictly ascending: a segment ends after so many of the tokens.
    #[serde(default)]
    pub(super) breaks: Vec<usize>,
    /// Strictly ascending: the segment's tokens up to there are read once more.
    #[serde(default)]
    pub(super) rereads: Vec<usize>,
}

impl Listed {
    /// What is wrong with the positions.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let sequence = Sequence {
            tokens: &self.tokens,
            breaks: &self.breaks,
            rereads: &self.rereads,
        };
        sequence.check().map_err(|error| error.to_string())
    }
}

/// A JSON document of ids: an array of them, or an object `{"tokens": [...], "breaks": [...], "rereads": [...]}` whose
/// breaks and rereads may be left out.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse_ids(json: &str) -> std::result::Result<Tokens, String> {
    let expected = "expected an array of token ids, or an object with `tokens` and `breaks`";
    let failed = |error: serde_json::Error| format!("{expected}: {error}");
    if !json.trim_start().starts_with('{') {
        let ids = serde_json::from_str(json).map_err(failed)?;
        return Ok(Tokens {
            ids,
            ..Tokens::default()
        });
    }
    let listed: Listed = serde_json::from_str(json).map_err(failed)?;
    listed.check()?;
    Ok(Tokens {
        ids: listed.tokens,
        breaks: listed.breaks,
        rereads: listed.rereads,
    })
}

/// A JSON array of ids, one document, or of documents; both at once is an error. A document is an array of ids or an
/// object as in [`parse_ids`], which is read as a whole.
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
            let expected =
                "an array of token ids, an object with `tokens` and `breaks`, or an array of these";
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
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Ids<'_, '_> {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("token ids")
    }
    fn visit_u64<E: Error>(mut self, id: u64) -> std::result::Result<(), E> {
        match self.1 {
            0 => return Err(E::custom("a number alone")),
            1 => self.outer(false)?,
            _ => {}
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
    fn visit_map<A: MapAccess<'de>>(mut self, map: A) -> std::result::Result<(), A::Error> {
        match self.1 {
            0 => {}
            1 => self.outer(true)?,
            _ => return Err(A::Error::custom("an object among ids")),
        }
        let listed = Listed::deserialize(MapAccessDeserializer::new(map))?;
        listed.check().map_err(A::Error::custom)?;
        self.0.writer.push_marked(listed).map_err(|e| {
            self.0.failure = Some(e);
            A::Error::custom("writing failed")
        })?;
        if self.1 == 1 {
            self.0.writer.end_document();
        }
        Ok(())
    }
}
