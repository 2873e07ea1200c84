//! Private characters that go through a template with the messages and come out at the places that they mark.

use std::collections::BTreeSet;

use super::Rendered;
use super::controls::Controls;

/// The last plane's private characters, which no text has but by intent.
const PRIVATE: std::ops::RangeInclusive<char> = '\u{100000}'..='\u{10fffd}';

/// Three characters that neither the messages nor the template have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    /// Before and after what stands in `{% generation %}`.
    generation: [char; 2],
    /// After the first character of a control token's spelling in a message.
    control: char,
}

/// The private characters of some texts.
#[derive(Debug, Clone, Default)]
pub(super) struct Taken(BTreeSet<char>);

impl Taken {
    pub(super) fn by(&mut self, text: &str) {
        self.0.extend(text.chars().filter(|c| PRIVATE.contains(c)));
    }

    /// Characters that none of the texts has, as many as asked for.
    pub(super) fn free<const N: usize>(&self) -> [char; N] {
        let mut free = PRIVATE.rev().filter(|c| !self.0.contains(c));
        std::array::from_fn(|_| free.next().unwrap_or(*PRIVATE.end()))
    }
}

impl Marks {
    pub(super) fn free_of(taken: &Taken) -> Self {
        let [open, close, control] = taken.free();
        Self {
            generation: [open, close],
            control,
        }
    }

    pub(super) fn of_generation(&self) -> String {
        self.generation.iter().collect()
    }

    /// A message's text with its spellings of control tokens marked; `None` where it has none.
    pub(super) fn mark(&self, text: &str, controls: &Controls) -> Option<String> {
        let mut marked = String::new();
        let mut done = 0;
        for found in controls.find(text) {
            let first = text[found.start..].chars().next().map_or(0, char::len_utf8);
            marked.push_str(&text[done..found.start + first]);
            marked.push(self.control);
            done = found.start + first;
        }
        (done > 0).then(|| marked + &text[done..])
    }

    /// Takes the marks out of a template's text.
    pub(super) fn take(&self, marked: &str, controls: &Controls) -> Rendered {
        let mut out = Rendered::default();
        let (mut open, mut starts) = (Vec::new(), Vec::new());
        let mut last = 0;
        for c in marked.chars() {
            if c == self.generation[0] {
                open.push(out.text.len());
            } else if c == self.generation[1] {
                // A body inside another counts with the outer one.
                let start = open.pop().filter(|_| open.is_empty());
                out.generated
                    .extend(start.map(|start| start..out.text.len()));
            } else if c == self.control {
                starts.push(last);
            } else {
                last = out.text.len();
                out.text.push(c);
            }
        }
        let spelled = starts.into_iter().filter_map(|start| {
            let len = controls.longest_at(&out.text[start..])?;
            Some(start..start + len)
        });
        out.plain = spelled.collect();
        out
    }
}
