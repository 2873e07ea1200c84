//! All that the program prints: results to standard output, notes to standard error.
//!
//! The standard library's own macros panic where nobody reads or the disk is full. Here a result that cannot be
//! written is an error, and a note that cannot be written is let go.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};

/// Prints a line of results.
macro_rules! out {
    ($($arg:tt)*) => {
        $crate::cli::out::write(format_args!($($arg)*), "\n")
    };
}
pub(crate) use out;

/// Prints results without a line's end.
macro_rules! out_part {
    ($($arg:tt)*) => {
        $crate::cli::out::write(format_args!($($arg)*), "")
    };
}
pub(crate) use out_part;

/// Says something on standard error, where somebody may read it.
macro_rules! note {
    ($($arg:tt)*) => {
        $crate::cli::out::say(format_args!($($arg)*))
    };
}
pub(crate) use note;

/// # Errors
/// What standard output says.
pub fn write(text: fmt::Arguments<'_>, end: &str) -> io::Result<()> {
    let text = text.to_string();
    let mut out = io::stdout().lock();
    write!(out, "{}{end}", harmless(&text))?;
    out.flush()
}

pub fn say(text: fmt::Arguments<'_>) {
    // Nobody may be there to read it.
    let _ = writeln!(io::stderr(), "{}", harmless(&text.to_string()));
}

/// The text without what would move a terminal's cursor, change its colours, or worse. Names of files, tensors and
/// keys come from whoever made the model.
pub fn harmless(text: &str) -> Cow<'_, str> {
    let harmful = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(harmful) {
        text.replace(harmful, "\u{fffd}").into()
    } else {
        text.into()
    }
}
