//! Changes to a template's source before it is compiled: marks that only other programs use are dropped, and
//! values that are set in a namespace pass through this crate's own namespaces.
//!
//! `{% set ns.x = E %}` becomes `{% do ns.SET('x', (E)) %}`, and the form with a body sets a variable first.
//! A form that is not recognised here fails when the template runs, because no other namespace exists.

use super::namespace::SET;

/// Marks of the assistant's part, and tags without an effect that replace them; the text is the same without
/// them.
const MARKS: [(&str, &str); 2] = [("generation", "if true"), ("endgeneration", "endif")];

/// The variable that holds the body of `{% set ns.x %}...{% endset %}`.
const BODY: &str = "__body";

/// One piece of a template's source.
enum Piece<'s> {
    /// Text, comments and expressions, which stay as they are.
    Other(&'s str),
    /// What stands between `{%` and `%}`.
    Tag(&'s str),
}

/// The template that is compiled.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    // For each open `set` with a body, the assignment that follows its end.
    let mut open: Vec<Option<String>> = Vec::new();
    let pieces = Pieces { rest: source, raw: false };
    for piece in pieces {
        match piece {
            Piece::Other(text) => out.push_str(text),
            Piece::Tag(tag) => rewrite_tag(tag, &mut open, &mut out),
        }
    }
    out
}

fn rewrite_tag(tag: &str, open: &mut Vec<Option<String>>, out: &mut String) {
    let (left, word, right) = parts(tag);
    let mut put = |content: &str| {
        for piece in ["{%", left, " ", content, " ", right, "%}"] {
            out.push_str(piece);
        }
    };
    if let Some((_, meaning)) = MARKS.iter().find(|(mark, _)| *mark == word.trim()) {
        return put(meaning);
    }
    match Set::parse(word) {
        Some(Set { target: Some((object, name)), rest: Rest::Value(value) }) => {
            put(&format!("do {object}.{SET}('{name}', ({value}))"));
        }
        Some(Set { target: Some((object, name)), rest: Rest::Body(filters) }) => {
            open.push(Some(format!("{{% do {object}.{SET}('{name}', {BODY}) {right}%}}")));
            put(&format!("set {BODY} {filters}"));
        }
        Some(Set { target: None, rest: Rest::Body(_) }) => {
            open.push(None);
            put_unchanged(tag, out);
        }
        _ if word.trim() == "endset" => match open.pop().flatten() {
            Some(assignment) => {
                // The mark that strips white space behind the end moves to the assignment that follows.
                out.push_str(&format!("{{%{left} endset %}}"));
                out.push_str(&assignment_end(&assignment, right));
            }
            None => put_unchanged(tag, out),
        },
        _ => put_unchanged(tag, out),
    }
}

fn put_unchanged(tag: &str, out: &mut String) {
    for piece in ["{%", tag, "%}"] {
        out.push_str(piece);
    }
}

/// Bytes of the longest tag or expression.
pub(super) fn longest_tag(source: &str) -> usize {
    let pieces = Pieces { rest: source, raw: false };
    let len = |piece| match piece {
        Piece::Tag(tag) => tag.len(),
        Piece::Other(text) if text.starts_with("{{") => other_len(text),
        Piece::Other(_) => 0,
    };
    pieces.map(len).max().unwrap_or(0)
}

/// The assignment with the end tag's own mark instead of the start tag's.
fn assignment_end(assignment: &str, right: &str) -> String {
    let body = assignment.trim_end_matches("%}").trim_end_matches(['-', '+']);
    format!("{body}{right}%}}")
}

/// A tag's left mark, content and right mark.
fn parts(tag: &str) -> (&str, &str, &str) {
    let marked = |c: char| c == '-' || c == '+';
    let left = if tag.starts_with(marked) { &tag[..1] } else { "" };
    let rest = &tag[left.len()..];
    let right = if rest.ends_with(marked) { &rest[rest.len() - 1..] } else { "" };
    (left, &rest[..rest.len() - right.len()], right)
}

/// A `set` tag.
struct Set<'t> {
    /// The object and the name of `object.name`; `None` for a variable.
    target: Option<(&'t str, &'t str)>,
    rest: Rest<'t>,
}

enum Rest<'t> {
    /// The expression behind `=`.
    Value(&'t str),
    /// Nothing, or filters: a body follows.
    Body(&'t str),
}

impl<'t> Set<'t> {
    fn parse(word: &'t str) -> Option<Self> {
        let rest = word.trim_start().strip_prefix("set")?;
        let target_start = rest.trim_start();
        if target_start.len() == rest.len() {
            return None;
        }
        let in_target = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        let end = target_start.find(|c| !in_target(c)).unwrap_or(target_start.len());
        let (target, rest) = target_start.split_at(end);
        let rest = rest.trim();
        let rest = match rest.strip_prefix('=') {
            Some(value) => Rest::Value(value.trim()),
            None if rest.is_empty() || rest.starts_with('|') => Rest::Body(rest),
            None => return None,
        };
        Some(Self { target: target.rsplit_once('.'), rest })
    }
}

/// Splits a source into tags and everything else. Strings are skipped as a whole, so that a tag's end within
/// one does not end the tag.
struct Pieces<'s> {
    rest: &'s str,
    /// Whether `{% raw %}` is open.
    raw: bool,
}

impl<'s> Iterator for Pieces<'s> {
    type Item = Piece<'s>;

    fn next(&mut self) -> Option<Piece<'s>> {
        if self.rest.is_empty() {
            return None;
        }
        let tag_len = tag_len(self.rest);
        if let Some(len) = tag_len {
            let tag = &self.rest[2..len - 2];
            let word = parts(tag).1.trim();
            if !self.raw || word == "endraw" {
                self.raw = word == "raw";
                self.rest = &self.rest[len..];
                return Some(Piece::Tag(tag));
            }
        }
        let len = if self.raw { first_len(self.rest) } else { other_len(self.rest) };
        // What is skipped ends before the next brace, which begins a character.
        let next = self.rest[len..].find('{').map_or(self.rest.len(), |at| len + at);
        let (other, rest) = self.rest.split_at(next);
        self.rest = rest;
        Some(Piece::Other(other))
    }
}

/// Bytes of the whole tag at the beginning; `None` where there is none, or none that ends.
fn tag_len(source: &str) -> Option<usize> {
    source.strip_prefix("{%").and_then(|inner| end_of(inner, "%}")).map(|len| len + 2)
}

/// Bytes of the comment or expression at the beginning, or of its first character.
fn other_len(source: &str) -> usize {
    let comment = source.strip_prefix("{#").and_then(|inner| inner.find("#}")).map(|at| at + 4);
    let expression = || source.strip_prefix("{{").and_then(|inner| end_of(inner, "}}")).map(|len| len + 2);
    comment.or_else(expression).unwrap_or_else(|| first_len(source))
}

/// Bytes of the first character.
fn first_len(source: &str) -> usize {
    source.chars().next().map_or(0, char::len_utf8)
}

/// Bytes up to and with `end`, strings skipped.
fn end_of(source: &str, end: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (at, byte) in source.bytes().enumerate() {
        match (quote, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(open), _) if open == byte => quote = None,
            (Some(_), _) => {}
            (None, b'\'' | b'"') => quote = Some(byte),
            (None, _) if source.as_bytes()[at..].starts_with(end.as_bytes()) => return Some(at + end.len()),
            (None, _) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_the_assistants_part_are_dropped() {
        let text = "a{%- generation -%} b {%generation%}c{% endgeneration %}{%-endgeneration-%} d{% raw";
        let wanted = "a{%- if true -%} b {% if true %}c{% endif %}{%- endif -%} d{% raw";
        assert_eq!(rewrite(text), wanted);
        assert_eq!(rewrite("{{ generation }}"), "{{ generation }}");
    }

    #[test]
    fn values_set_in_namespaces_pass_through_a_method() {
        let cases = [
            ("{% set ns.x = [1, 2] %}", "{% do ns.SET('x', ([1, 2])) %}"),
            ("{%- set  a.b.c=ns.x -%}", "{%- do a.b.SET('c', (ns.x)) -%}"),
            ("{% set x = ns.x %}", "{% set x = ns.x %}"),
            ("{% set ns.x = '%}' ~ \"\\\"%}\" %}", "{% do ns.SET('x', ('%}' ~ \"\\\"%}\")) %}"),
            ("{# {% set ns.x = 1 %} #}", "{# {% set ns.x = 1 %} #}"),
            ("{{ '{% set ns.x = 1 %}' }}", "{{ '{% set ns.x = 1 %}' }}"),
            ("{% raw %}{% set ns.x = 1 %}{% endraw %}", "{% raw %}{% set ns.x = 1 %}{% endraw %}"),
            ("{% raw %}ž{% set ns.x = 1 %}{% endraw %}", "{% raw %}ž{% set ns.x = 1 %}{% endraw %}"),
            ("{% set x %}a{% endset %}", "{% set x %}a{% endset %}"),
            (
                "{%- set ns.x | trim -%}a{%- endset -%} b",
                "{%- set __body | trim -%}a{%- endset %}{% do ns.SET('x', __body) -%} b",
            ),
            ("žluť {% settle %} {", "žluť {% settle %} {"),
        ];
        for (from, wanted) in cases {
            assert_eq!(rewrite(from), wanted.replace("SET", SET), "{from}");
        }
    }
}
