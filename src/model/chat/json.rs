//! The filter `tojson` as chat templates expect it: JSON in the form of Python's `json.dumps`, without HTML escapes.

use std::io::{self, Read, Write};

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

/// Most bytes that a call writes: a template says how far lines are indented and what separates items.
const MOST: usize = 1 << 28;

/// `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn tojson(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let argument = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match given.get(place) {
            Some(value) => Some(value.clone()),
            None => named.get(name)?,
        };
        Ok(value.filter(|value| !value.is_none()))
    };
    let mut layout = Layout {
        ascii: argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true()),
        indent: argument(1, "indent")?.map(usize::try_from).transpose()?,
        separators: [", ".to_owned(), ": ".to_owned()],
        depth: 0,
        filled: false,
    };
    if layout.indent.is_some() {
        layout.separators[0] = ",".to_owned();
    }
    if let Some(pair) = argument(2, "separators")? {
        for (i, separator) in layout.separators.iter_mut().enumerate() {
            *separator = pair.get_item_by_index(i)?.to_string();
        }
    }
    let sorted = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    named.assert_all_used()?;
    let mut json = Bounded(Vec::new());
    let written = match sorted {
        true => sort_keys(value)?.serialize(&mut Serializer::with_formatter(&mut json, layout)),
        false => value.serialize(&mut Serializer::with_formatter(&mut json, layout)),
    };
    let failed = |error: String| Error::new(ErrorKind::InvalidOperation, error);
    written.map_err(|error| failed(error.to_string()))?;
    let json = String::from_utf8(json.0).map_err(|error| failed(error.to_string()))?;
    Ok(Value::from_safe_string(json))
}

/// Bytes up to a bound.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MOST - self.0.len() {
            let error = format!("tojson: expected at most {MOST} bytes of JSON, got more");
            return Err(io::Error::other(error));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn sort_keys(value: &Value) -> Result<Value, Error> {
    use minijinja::value::ValueKind;
    match value.kind() {
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            keys.sort();
            let mut pairs = Vec::with_capacity(keys.len());
            for key in keys {
                let item = sort_keys(&value.get_item(&key)?)?;
                pairs.push((key, item));
            }
            Ok(Value::from_pairs(pairs))
        }
        ValueKind::Seq => value.try_iter()?.map(|item| sort_keys(&item)).collect(),
        _ => Ok(value.clone()),
    }
}

/// How the JSON is written.
struct Layout {
    /// Whether only ASCII is written.
    ascii: bool,
    /// Spaces of each level, each item on a line of its own.
    indent: Option<usize>,
    /// Between items, and between key and value.
    separators: [String; 2],
    depth: usize,
    /// Whether the array or object that ends now has items.
    filled: bool,
}

impl Layout {
    fn new_line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => {
                out.write_all(b"\n")?;
                let spaces = indent.saturating_mul(self.depth) as u64;
                io::copy(&mut io::repeat(b' ').take(spaces), out).map(drop)
            }
            None => Ok(()),
        }
    }

    fn begin<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn end<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.new_line(out)?;
        }
        self.filled = true;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.separators[0].as_bytes())?;
        }
        self.filled = true;
        self.new_line(out)
    }
}

impl Formatter for Layout {
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(number(value).as_bytes())
    }
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.begin(out, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.end(out, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.begin(out, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.end(out, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.separators[1].as_bytes())
    }
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        text: &str,
    ) -> io::Result<()> {
        if !self.ascii {
            return out.write_all(text.as_bytes());
        }
        for unit in text.encode_utf16() {
            match u8::try_from(unit)
                .ok()
                .filter(|byte| (b' '..=b'~').contains(byte))
            {
                Some(byte) => out.write_all(&[byte])?,
                None => write!(out, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }
    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => out.write_all(b"\\\""),
            CharEscape::ReverseSolidus => out.write_all(b"\\\\"),
            CharEscape::Solidus => out.write_all(b"/"),
            CharEscape::Backspace => out.write_all(b"\\b"),
            CharEscape::FormFeed => out.write_all(b"\\f"),
            CharEscape::LineFeed => out.write_all(b"\\n"),
            CharEscape::CarriageReturn => out.write_all(b"\\r"),
            CharEscape::Tab => out.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(out, "\\u{byte:04x}"),
        }
    }
}

/// A finite number as Python writes it: plain from 1e-4 to below 1e16, else with an exponent of two digits or more.
fn number(value: f64) -> String {
    let shortest = format!("{value:e}");
    let Some((digits, exponent)) = shortest.split_once('e') else {
        return shortest;
    };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_those_of_python() {
        // As printed by `repr` of Python 3.13.
        for (value, expected) in [
            (0.0, "0.0"),
            (-1.5, "-1.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e-7, "1.25e-07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e300, "1e+300"),
        ] {
            assert_eq!(super::number(value), expected);
        }
    }
}
