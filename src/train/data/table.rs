//! Data that others have packed: tables in Parquet files, and files compressed by Zstandard.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use super::error::{data_error, io_error};
use crate::train::error::Result;

/// The column with texts.
const TEXT: &str = "text";

/// The texts of a Parquet file's column `text`, in the order of its rows.
///
/// # Errors
/// [`TrainError::Io`](crate::train::TrainError::Io); [`TrainError::Data`](crate::train::TrainError::Data) for a file
/// that is damaged or has no such column, and for a row without a text.
pub fn table_texts(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).map_err(|e| io_error("read", path, e))?;
    let mut texts = Vec::new();
    rows(path, file, &[TEXT], &[], |row, line| {
        let object: Value = serde_json::from_slice(line).unwrap_or_default();
        match object.get(TEXT).and_then(Value::as_str) {
            Some(text) => texts.push(text.to_owned()),
            None => {
                let (expected, got) = ("a text in the column `text`", &object);
                return Err(data_error(path, Some(row), expected, got));
            }
        }
        Ok(())
    })?;
    Ok(texts)
}

/// The text in a compressed file (`.zst`), of at most `limit` bytes.
///
/// # Errors
/// [`TrainError::Io`](crate::train::TrainError::Io) for what cannot be read, or is no UTF-8;
/// [`TrainError::Data`](crate::train::TrainError::Data) for more bytes.
pub fn compressed_text(path: &Path, limit: u64) -> Result<String> {
    let failed = |e| io_error("read", path, e);
    let mut input = BufReader::new(File::open(path).map_err(failed)?);
    let mut text = String::new();
    let inside = decompressed(path, &mut input)?;
    inside
        .take(limit.saturating_add(1))
        .read_to_string(&mut text)
        .map_err(failed)?;
    match text.len() as u64 > limit {
        true => Err(data_error(
            path,
            None,
            &format!("at most {limit} bytes"),
            "more",
        )),
        false => Ok(text),
    }
}

/// What is in a compressed file.
#[cfg(feature = "datasets")]
pub(super) fn decompressed<'a, R: BufRead>(
    path: &Path,
    input: &'a mut R,
) -> Result<impl BufRead + use<'a, R>> {
    let decoder = zstd::Decoder::with_buffer(input);
    Ok(BufReader::new(
        decoder.map_err(|e| io_error("read", path, e))?,
    ))
}

/// Calls `each` with every row of a table, from 1, as an object of JSON: the columns of `one_of`, of which the table
/// must have one, and those of `more`. Nulls are left out.
#[cfg(feature = "datasets")]
pub(super) fn rows(
    path: &Path,
    file: File,
    one_of: &[&str],
    more: &[&str],
    mut each: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::schema::types::Type;
    // A damaged file makes the library panic at places of its own.
    let failed = |row, error: String| data_error(path, row, "a Parquet file", error);
    let open = || SerializedFileReader::new(file);
    let reader = read_by_library(open).map_err(|e| failed(None, e))?;
    let columns = reader.metadata().file_metadata().schema().get_fields();
    if !columns.iter().any(|column| one_of.contains(&column.name())) {
        let names: Vec<&str> = columns.iter().map(|column| column.name()).collect();
        let expected = format!("a column {}", one_of.join(" or "));
        return Err(data_error(path, None, &expected, names.join(", ")));
    }
    let wanted = |name: &str| one_of.contains(&name) || more.contains(&name);
    let wanted = columns.iter().filter(|column| wanted(column.name()));
    let schema = Type::group_type_builder("schema").with_fields(wanted.cloned().collect());
    let schema = schema.build().map_err(|e| failed(None, e.to_string()))?;
    let rows = read_by_library(|| reader.get_row_iter(Some(schema)));
    let mut rows = rows.map_err(|e| failed(None, e))?;
    let mut next = || {
        let row = rows.next().transpose()?;
        Ok(row.map(|row| row.to_json_value()))
    };
    for number in 1.. {
        let object = read_by_library(&mut next).map_err(|e| failed(Some(number), e))?;
        let Some(mut object) = object else { break };
        if let Some(object) = object.as_object_mut() {
            object.retain(|_, value| !value.is_null());
        }
        each(number, object.to_string().as_bytes())?;
    }
    Ok(())
}

/// A result of the library, or what it says where it fails or panics.
#[cfg(feature = "datasets")]
fn read_by_library<T>(
    call: impl FnOnce() -> parquet::errors::Result<T>,
) -> std::result::Result<T, String> {
    crate::guarded::guarded(call)?.map_err(|error| error.to_string())
}

/// This build reads no such files.
#[cfg(not(feature = "datasets"))]
pub(super) fn decompressed<'a, R: BufRead>(path: &Path, _: &'a mut R) -> Result<&'a mut R> {
    Err(not_built_in(path))
}

/// This build reads no such files.
#[cfg(not(feature = "datasets"))]
pub(super) fn rows(
    path: &Path,
    _: File,
    _: &[&str],
    _: &[&str],
    _: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    Err(not_built_in(path))
}

#[cfg(not(feature = "datasets"))]
fn not_built_in(path: &Path) -> crate::train::TrainError {
    let expected = "a build with the feature `datasets`, which reads .parquet and .zst files";
    data_error(path, None, expected, "one without")
}
