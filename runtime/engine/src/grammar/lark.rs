//! A caller's Lark grammar: the JSON schemas in it are rewritten as those of a request are, and what no
//! answer of ours can follow is refused.

use super::json::Json;
use super::{JSON_SPACE, schema};

/// Most definitions of one grammar. The compiler recurses from one to the next, at up to 70 KiB of stack
/// each: 140 MiB of its 256.
const MAX_DEFINITIONS: usize = 2048;

/// Most intersections of terminals in one grammar. The compiler's states are all combinations of what is
/// intersected: 28 took minutes.
const MAX_INTERSECTIONS: usize = 8;

/// Our own option beside those of `%llguidance`: bounds the digits of numbers as in answers that are JSON. A
/// grammar may set it where quotation marks stand around whole strings only, as in JSON.
const LIMIT_DIGITS: &str = "limit_digits";

/// A grammar in the compiler's words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RewrittenLark {
    pub(super) text: String,
    /// Whether numbers have at most the digits of those in answers that are JSON.
    pub(super) limit_digits: bool,
}

/// Rewrites the `%json` in a grammar, and takes our own option out of it.
pub(super) fn rewrite(text: &str) -> Result<RewrittenLark, String> {
    let mut out = String::with_capacity(text.len());
    let mut limit_digits = false;
    // What is left without texts, expressions, comments and JSON.
    let mut bare = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '"' => quoted(rest, '"'),
            '/' if rest[1..].starts_with('/') => line(rest),
            '/' => quoted(rest, '/'),
            '#' => line(rest),
            '%' if rest.starts_with("%json") => {
                let (schema, length) = json(&rest["%json".len()..])?;
                let rewritten = schema::rewrite(&schema, JSON_SPACE)
                    .map_err(|refusal| format!("%json: the JSON schema cannot be honoured: {refusal}"))?;
                out.push_str("%json ");
                out.push_str(&rewritten.schema.to_string());
                rest = &rest["%json".len() + length..];
                continue;
            }
            '%' if rest.starts_with("%llguidance") => {
                let (options, length) = json(&rest["%llguidance".len()..])?;
                check_options(&options)?;
                let length = "%llguidance".len() + length;
                if let Some(limits) = own_option(&options)? {
                    limit_digits = limits;
                    rest = &rest[length..];
                    continue;
                }
                length
            }
            '%' if rest.starts_with("%regex") => "%regex".len() + json(&rest["%regex".len()..])?.1,
            c => {
                bare.push(c);
                c.len_utf8()
            }
        };
        let (read, next) = rest.split_at(length);
        out.push_str(read);
        rest = next;
    }
    check_bare(&bare)?;
    Ok(RewrittenLark { text: out, limit_digits })
}

/// The length of a text or an expression with both marks; escapes hide a mark.
fn quoted(text: &str, mark: char) -> usize {
    let mut escaped = false;
    for (index, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == mark => return index + 1,
            // A text ends with its line; the compiler refuses it.
            '\n' if mark == '"' => return index,
            _ => {}
        }
    }
    text.len()
}

fn line(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}

/// The JSON that a text begins with, and its length with the space before it.
fn json(text: &str) -> Result<(Json, usize), String> {
    Json::parse_prefix(text)
        .map_err(|why| format!("JSON is expected after %json, %llguidance and %regex: {why}"))
}

fn check_options(options: &Json) -> Result<(), String> {
    let invalid = options.as_object().and_then(|options| options.get("allow_invalid_utf8"));
    if invalid.is_some_and(|value| *value != Json::Bool(false)) {
        return Err("%llguidance: allow_invalid_utf8 is not supported, since answers are text".to_owned());
    }
    Ok(())
}

/// The value of our own option, which stands alone in its `%llguidance`, where these options are it.
fn own_option(options: &Json) -> Result<Option<bool>, String> {
    let Some(options) = options.as_object() else { return Ok(None) };
    match (options.get(LIMIT_DIGITS), options.iter().count()) {
        (None, _) => Ok(None),
        (Some(Json::Bool(limits)), 1) => Ok(Some(*limits)),
        (Some(_), _) => Err(format!(
            "%llguidance: {LIMIT_DIGITS} is true or false, and stands in an %llguidance of its own"
        )),
    }
}

fn check_bare(bare: &str) -> Result<(), String> {
    let intersections = bare.matches('&').count();
    if intersections > MAX_INTERSECTIONS {
        return Err(format!(
            "it has {intersections} intersections (&); at most {MAX_INTERSECTIONS} are compiled"
        ));
    }
    let definitions = bare.matches(':').count();
    if definitions > MAX_DEFINITIONS {
        return Err(format!("it has {definitions} definitions; at most {MAX_DEFINITIONS} are compiled"));
    }
    let mut uses = bare.match_indices("temperature").map(|(at, name)| &bare[at + name.len()..]);
    if uses.any(|rest| rest.trim_start().starts_with('=')) {
        return Err(
            "the attribute \"temperature\" is not supported; give it as a field of the request".to_owned()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_rewritten_and_all_else_stays() {
        let text =
            "start: a // %json\na: \"%json\\\" {\" /%json {/ | %json {\"const\": 1} b # %json\nb: \"x\"\n";
        let out = rewrite(text).unwrap().text;
        let (before, after) = out.split_once("| %json ").unwrap();
        assert_eq!(before, "start: a // %json\na: \"%json\\\" {\" /%json {/ ");
        assert!(
            after.starts_with("{\"const\":1,\"x-guidance\":") && after.ends_with("} b # %json\nb: \"x\"\n"),
            "{after}"
        );
    }

    #[test]
    fn digits_are_limited_where_the_grammar_says_so() {
        let limited = rewrite("start: \"a\"\n%llguidance {\"limit_digits\": true}\n").unwrap();
        assert_eq!(limited, RewrittenLark { text: "start: \"a\"\n\n".into(), limit_digits: true });
        let other = "%llguidance {\"no_forcing\": true}\nstart: \"a\"";
        assert_eq!(rewrite(other).unwrap(), RewrittenLark { text: other.into(), limit_digits: false });
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let many = "a: b\n".repeat(10_000);
        let anded = format!("start: A\nA: /a/{}", " & /a/".repeat(20));
        for (text, words) in [
            ("start: %json {\"const\": -9223372036854775808}", "\"const\" at \"/\""),
            ("start: %json {\"uniqueItems\": true}", "\"uniqueItems\""),
            ("start: %json {", "JSON is expected"),
            ("%llguidance {\"allow_invalid_utf8\": true}\nstart: \"a\"", "allow_invalid_utf8"),
            ("start[temperature = 0.5]: \"a\"", "temperature"),
            ("%llguidance {\"limit_digits\": 1}\nstart: \"a\"", "limit_digits"),
            ("%llguidance {\"limit_digits\": true, \"no_forcing\": true}\nstart: \"a\"", "of its own"),
            (&*many, "definitions"),
            (&*anded, "intersections"),
        ] {
            let error = rewrite(text).unwrap_err();
            assert!(error.contains(words), "{text:.40}: {error}");
        }
    }
}
