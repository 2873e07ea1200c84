//! The template language: Jinja as Transformers runs it for chat templates, by minijinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::json::tojson;
use super::marks::Marks;
use crate::model::error::ChatError;

/// The only template of an engine.
const NAME: &str = "chat template";
/// What the word in `{% generation %}` becomes: a call whose body is what stands up to `{% endgeneration %}`.
const CALL: &str = "call segattn_generation(segattn_marks)";
/// Work of a rendering beside that in proportion to the messages, in instructions and 64ths of bytes of strings. A
/// template from elsewhere can neither run for ever nor fill the memory.
const WORK: u64 = 10_000_000;

/// A compiled template.
#[derive(Debug)]
pub(super) struct Engine(Environment<'static>);

impl Engine {
    /// # Errors
    /// [`ChatError::Template`] for a text that is no template.
    pub(super) fn new(source: &str) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(said)?);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_function("segattn_generation", generation);
        environment
            .add_template_owned(NAME, generation_as_call(source))
            .map_err(said)?;
        Ok(Self(environment))
    }

    /// The template's text on `context`, with `marks` around what stands in `{% generation %}`. `bytes`: size of the
    /// messages.
    ///
    /// # Errors
    /// [`ChatError::Template`] with what the template or its engine says.
    pub(super) fn render(
        &self,
        mut context: Vec<(String, Value)>,
        marks: &Marks,
        bytes: usize,
    ) -> Result<String, ChatError> {
        context.push(("segattn_marks".into(), marks.of_generation().into()));
        let mut environment = self.0.clone();
        environment.set_fuel(Some(WORK + bytes as u64));
        let template = environment.get_template(NAME).map_err(said)?;
        template.render(Value::from_pairs(context)).map_err(said)
    }
}

/// The error's text with its causes.
fn said(error: Error) -> ChatError {
    let mut message = match (error.kind(), error.detail()) {
        // What `raise_exception` was given says all.
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        _ => error.to_string(),
    };
    if let Some(line) = error.line() {
        message = format!("{message} (line {line})");
    }
    ChatError::Template { message }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time, written as `format` says.
fn strftime_now(format: &str) -> Result<String, Error> {
    let written = jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now());
    written.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// The body of `{% generation %}` between the two marks.
fn generation(state: &mut State<'_, '_>, marks: &str, named: Kwargs) -> Result<Value, Error> {
    let body: Value = named.get("caller")?;
    let text = body.call(state, &[])?.to_string();
    let mut marks = marks.chars();
    let (open, close) = (marks.next(), marks.next());
    let marked = open.into_iter().chain(text.chars()).chain(close);
    Ok(Value::from_safe_string(marked.collect()))
}

/// The template with `{% generation %}` and `{% endgeneration %}` as a call and its end, which the engine knows. The
/// signs that trim white space stay.
fn generation_as_call(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(at) = rest.find("{%") {
        let tag = &rest[at + 2..];
        let inner = tag.strip_prefix(['-', '+']).unwrap_or(tag).trim_start();
        let word = inner
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .map_or(inner, |end| &inner[..end]);
        let after = inner[word.len()..].trim_start();
        let ends = after
            .strip_prefix(['-', '+'])
            .unwrap_or(after)
            .starts_with("%}");
        let call = match word {
            "generation" if ends => CALL,
            "endgeneration" if ends => "endcall",
            _ => {
                out.push_str(&rest[..at + 2]);
                rest = tag;
                continue;
            }
        };
        out.push_str(&rest[..rest.len() - inner.len()]);
        out.push_str(call);
        rest = &inner[word.len()..];
    }
    out + rest
}

/// All strings of a value and of what it holds, keys among them.
pub(super) fn strings(value: &Value, each: &mut impl FnMut(&str)) {
    match value.kind() {
        ValueKind::String => each(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Map => {
            let map = value.kind() == ValueKind::Map;
            for item in value.try_iter().into_iter().flatten() {
                if map {
                    strings(&value.get_item(&item).unwrap_or_default(), each);
                }
                strings(&item, each);
            }
        }
        _ => {}
    }
}

/// The value with its strings changed, keys left as they are.
pub(super) fn with_strings(value: &Value, change: &impl Fn(&str) -> Option<String>) -> Value {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::String => {
            let changed = value.as_str().and_then(change);
            changed.map_or_else(|| value.clone(), Value::from)
        }
        ValueKind::Seq => items().map(|item| with_strings(&item, change)).collect(),
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                (key, with_strings(&item, change))
            };
            Value::from_pairs(items().map(pair))
        }
        _ => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_becomes_a_call_and_nothing_else_changes() {
        let source = "{%- generation -%}a{% endgeneration +%}{% generations %}{%generation%}{% if generation %}{%";
        let expected = format!(
            "{{%- {CALL} -%}}a{{% endcall +%}}{{% generations %}}{{%{CALL}%}}{{% if generation %}}{{%"
        );
        assert_eq!(generation_as_call(source), expected);
    }

    #[test]
    fn the_time_is_written_as_python_writes_it() {
        let time: jiff::ZonedDateTime = "2026-02-03T04:05:06+00:00[UTC]".parse().unwrap();
        let written = jiff::fmt::strtime::format("%d %b %Y, %A %H:%M:%S %j", &time).unwrap();
        assert_eq!(written, "03 Feb 2026, Tuesday 04:05:06 034");
    }
}
