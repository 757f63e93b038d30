//! Regular expressions of a caller, checked and rewritten before the compiler sees them.
//!
//! Two syntaxes come in: that of Rust's `regex` crate for a whole answer, and that of ECMA-262 for a schema's
//! strings. What goes out is a form that has one meaning everywhere: no flags, no comments, no classes that
//! depend on a mode.

use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Capture, Hir, HirKind, Look, Repetition};
use std::iter::Peekable;
use std::str::Chars;

/// Deepest nesting of groups and repetitions. What is printed nests up to three times as deep, and the
/// compiler's own limit is 250.
const MAX_NESTING: u32 = 80;

/// Most classes of one expression that are large tables (`\w`, `\p{...}`): 6 KiB each, so 3 MiB.
const MAX_TABLE_CLASSES: usize = 500;

/// The shortest text that matches has at most this many bytes: the compiler walks through what is certain.
const MAX_SHORTEST_BYTES: usize = 1_000_000;

/// White space as ECMA-262 has it, inside a class.
const ECMA_SPACE: &str =
    r"\t\n\x0B\f\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}";

/// An expression in Rust's syntax that has to match a whole text.
pub(super) fn whole(text: &str) -> Result<String, String> {
    checked(text)
}

/// An expression in the syntax of ECMA-262 that has to match somewhere in a text.
pub(super) fn search(text: &str) -> Result<String, String> {
    checked(&ecma(text)?)
}

fn checked(text: &str) -> Result<String, String> {
    let tables = ["\\w", "\\W", "\\p", "\\P", "\\d", "\\D", "\\s", "\\S"];
    if tables.iter().map(|class| text.matches(class).count()).sum::<usize>() > MAX_TABLE_CLASSES {
        return Err(format!("it has more than {MAX_TABLE_CLASSES} classes such as \\w or \\p{{L}}"));
    }
    let hir =
        ParserBuilder::new().nest_limit(MAX_NESTING).build().parse(text).map_err(|error| match &error {
            regex_syntax::Error::Parse(error) => error.kind().to_string(),
            regex_syntax::Error::Translate(error) => error.kind().to_string(),
            _ => error.to_string(),
        })?;
    if hir.properties().look_set().iter().any(|look| !matches!(look, Look::Start | Look::End)) {
        return Err("word boundaries and multi-line anchors are not supported".to_owned());
    }
    if hir.properties().minimum_len().is_some_and(|bytes| bytes > MAX_SHORTEST_BYTES) {
        return Err(format!("it matches nothing shorter than {MAX_SHORTEST_BYTES} bytes"));
    }
    Ok(printed(&grouped(hir)))
}

/// The same expression with a group around each repetition that is repeated: the printer writes `(?:a{2})?`
/// as `a{2}?`, which is another expression.
fn grouped(hir: Hir) -> Hir {
    let all = |subs: Vec<Hir>| subs.into_iter().map(grouped).collect();
    match hir.into_kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Literal(literal) => Hir::literal(literal.0),
        HirKind::Class(class) => Hir::class(class),
        HirKind::Look(look) => Hir::look(look),
        HirKind::Repetition(repetition) => {
            let sub = grouped(*repetition.sub);
            let sub = match sub.kind() {
                HirKind::Repetition(_) => Hir::capture(Capture { index: 1, name: None, sub: Box::new(sub) }),
                _ => sub,
            };
            Hir::repetition(Repetition { sub: Box::new(sub), ..repetition })
        }
        HirKind::Capture(capture) => {
            let sub = Box::new(grouped(*capture.sub));
            Hir::capture(Capture { sub, ..capture })
        }
        HirKind::Concat(subs) => Hir::concat(all(subs)),
        HirKind::Alternation(subs) => Hir::alternation(all(subs)),
    }
}

/// The compiler gives a group of the name `stop` a meaning of its own, so names go.
fn printed(hir: &Hir) -> String {
    hir.to_string().replace("(?P<stop>", "(?:")
}

/// Rewrites an expression of ECMA-262 (with its `u` flag) to Rust's syntax.
fn ecma(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len() * 2);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match escape(&mut chars)? {
                Atom::Char(c) => push_char(&mut out, c),
                Atom::Set { inner, negated } => push_set(&mut out, &inner, negated),
            },
            '[' => class(&mut chars, &mut out)?,
            '.' => out.push_str(r"[^\n\r\x{2028}\x{2029}]"),
            '(' => group(&mut chars, &mut out)?,
            '{' => repetition(&mut chars, &mut out)?,
            '}' | ']' => push_char(&mut out, c),
            '*' | '+' | '?' | '|' | ')' | '^' | '$' => out.push(c),
            c => push_char(&mut out, c),
        }
    }
    Ok(out)
}

/// What an escape or one position of a class stands for.
enum Atom {
    Char(char),
    Set { inner: String, negated: bool },
}

fn push_char(out: &mut String, c: char) {
    if c.is_ascii_alphanumeric() {
        out.push(c);
    } else {
        out.push_str(&format!("\\x{{{:X}}}", u32::from(c)));
    }
}

fn push_set(out: &mut String, inner: &str, negated: bool) {
    out.push_str(if negated { "[^" } else { "[" });
    out.push_str(inner);
    out.push(']');
}

/// What follows a backslash.
fn escape(chars: &mut Peekable<Chars<'_>>) -> Result<Atom, String> {
    let c = chars.next().ok_or("it ends in a backslash")?;
    let set = |inner: &str, negated| Ok(Atom::Set { inner: inner.to_owned(), negated });
    match c {
        'd' | 'D' => set("0-9", c == 'D'),
        'w' | 'W' => set("0-9A-Za-z_", c == 'W'),
        's' | 'S' => set(ECMA_SPACE, c == 'S'),
        'p' | 'P' => {
            let name: String = chars.by_ref().take_while(|c| *c != '}').collect();
            let name = name.strip_prefix('{').ok_or("\\p needs a name in braces, such as \\p{L}")?;
            Ok(Atom::Set { inner: format!("\\{c}{{{name}}}"), negated: false })
        }
        'n' => Ok(Atom::Char('\n')),
        'r' => Ok(Atom::Char('\r')),
        't' => Ok(Atom::Char('\t')),
        'f' => Ok(Atom::Char('\x0C')),
        'v' => Ok(Atom::Char('\x0B')),
        '0' if !chars.peek().is_some_and(char::is_ascii_digit) => Ok(Atom::Char('\0')),
        'x' => code(&hex(chars, 2)?).map(Atom::Char),
        'u' => unicode(chars).map(Atom::Char),
        'c' => match chars.next() {
            Some(letter) if letter.is_ascii_alphabetic() => Ok(Atom::Char(char::from(letter as u8 & 31))),
            _ => Err("\\c needs a letter".to_owned()),
        },
        'b' | 'B' => Err("word boundaries (\\b) are not supported".to_owned()),
        'k' | '0'..='9' => Err("back references are not supported".to_owned()),
        c if c.is_ascii_alphanumeric() => Err(format!("\\{c} is not an escape of ECMA-262")),
        c => Ok(Atom::Char(c)),
    }
}

fn hex(chars: &mut Peekable<Chars<'_>>, digits: usize) -> Result<String, String> {
    let text: String = chars.by_ref().take(digits).collect();
    if text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        Ok(text)
    } else {
        Err(format!("an escape needs {digits} hexadecimal digits"))
    }
}

fn code(hex: &str) -> Result<char, String> {
    let code = u32::from_str_radix(hex, 16).ok().and_then(char::from_u32);
    code.ok_or_else(|| "an escape names no character".to_owned())
}

/// `\uXXXX`, a pair of surrogates or `\u{...}`, after the `u`.
fn unicode(chars: &mut Peekable<Chars<'_>>) -> Result<char, String> {
    if chars.next_if_eq(&'{').is_some() {
        let digits: String = chars.by_ref().take_while(|c| *c != '}').collect();
        return code(&digits);
    }
    let high = hex(chars, 4)?;
    let value = u32::from_str_radix(&high, 16).unwrap_or_default();
    if !(0xD800..0xDC00).contains(&value) {
        return code(&high);
    }
    let pair: String = chars.by_ref().take(2).collect();
    let low = hex(chars, 4)?;
    let low = u32::from_str_radix(&low, 16).unwrap_or_default();
    if pair != "\\u" || !(0xDC00..0xE000).contains(&low) {
        return Err("an escape names half a character".to_owned());
    }
    char::from_u32(0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00))
        .ok_or_else(|| "an escape names no character".to_owned())
}

/// A class, after its `[`. Rust gives `[`, `&&`, `--` and `~~` a meaning inside of a class that
/// ECMA-262 lacks.
fn class(chars: &mut Peekable<Chars<'_>>, out: &mut String) -> Result<(), String> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut inner = String::new();
    loop {
        let low = match chars.next() {
            None => return Err("a class is not closed by ]".to_owned()),
            Some(']') => break,
            Some('\\') => class_escape(chars)?,
            Some(c) => Atom::Char(c),
        };
        let low = match low {
            Atom::Set { inner: set, negated } => {
                push_set(&mut inner, &set, negated);
                continue;
            }
            Atom::Char(low) => low,
        };
        push_char(&mut inner, low);
        let mut ahead = chars.clone();
        if ahead.next() != Some('-') || matches!(ahead.peek(), None | Some(']')) {
            continue;
        }
        chars.next();
        let high = match chars.next() {
            Some('\\') => class_escape(chars)?,
            Some(c) => Atom::Char(c),
            None => return Err("a class is not closed by ]".to_owned()),
        };
        let Atom::Char(high) = high else {
            return Err("a range of a class ends in a class".to_owned());
        };
        inner.push('-');
        push_char(&mut inner, high);
    }
    match (inner.is_empty(), negated) {
        (false, negated) => push_set(out, &inner, negated),
        (true, true) => out.push_str("(?s:.)"),
        (true, false) => return Err("the empty class [] matches nothing".to_owned()),
    }
    Ok(())
}

fn class_escape(chars: &mut Peekable<Chars<'_>>) -> Result<Atom, String> {
    if chars.next_if_eq(&'b').is_some() {
        return Ok(Atom::Char('\x08'));
    }
    escape(chars)
}

/// A group, after its `(`.
fn group(chars: &mut Peekable<Chars<'_>>, out: &mut String) -> Result<(), String> {
    if chars.next_if_eq(&'?').is_none() {
        out.push_str("(?:");
        return Ok(());
    }
    let mut ahead = chars.clone();
    let start: String = ahead.by_ref().take(2).collect();
    match start.as_bytes() {
        [b':', ..] => {
            chars.next();
        }
        [b'=' | b'!', ..] | b"<=" | b"<!" => return Err("look-around is not supported".to_owned()),
        [b'<', ..] | b"P<" => {
            if !chars.by_ref().any(|c| c == '>') {
                return Err("the name of a group is not closed by >".to_owned());
            }
        }
        b"i)" | b"i:" => {
            chars.next();
            chars.next();
            out.push_str("(?");
            out.push_str(&start);
            return Ok(());
        }
        _ => return Err("a group begins with ?, which is none of ?: and ?<name>".to_owned()),
    }
    out.push_str("(?:");
    Ok(())
}

/// A count, after its `{`.
fn repetition(chars: &mut Peekable<Chars<'_>>, out: &mut String) -> Result<(), String> {
    let count: String = chars.by_ref().take_while(|c| *c != '}').collect();
    let (low, high) = count.split_once(',').unwrap_or((&count, "0"));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if low.is_empty() || !digits(low) || !digits(high) {
        return Err("a brace that is no count is written \\{".to_owned());
    }
    out.push_str(&format!("{{{count}}}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_patterns_mean_what_ecma_means() {
        for (ecma, rust) in [
            (r"^[[ab]]$", r"^[\[ab]\]$"),
            (r"[a&&b]", r"[ab\&]"),
            (r"\d\w", r"[0-9][0-9A-Za-z_]"),
            (r"(?<stop>a)\/", r"(?:a)/"),
            (r"[+--]", r"[+-\-]"),
            (r"\u0041\ud83d\ude00", "A😀"),
            (r"[^]", "(?s:.)"),
            (r"\!\-\_", "!-_"),
        ] {
            assert_eq!(search(ecma), whole(rust), "{ecma}");
            assert!(search(ecma).is_ok(), "{ecma}");
        }
    }

    #[test]
    fn a_repetition_that_is_repeated_stays_one() {
        for (ecma, rust) in [
            ("(a{2})?b", "(?:(a{2})?b)"),
            ("([a-z]+)?", "([a-z]+)?"),
            ("(?:a*){2,3}", "(a*){2,3}"),
            ("((a?)*|b)+", "(?:(?:(a?)*|b))+"),
        ] {
            let printed = search(ecma).unwrap();
            let parsed = |text: &str| ParserBuilder::new().build().parse(text).unwrap();
            let (found, wanted) = (grouped(parsed(&printed)), grouped(parsed(rust)));
            assert_eq!(found.to_string(), wanted.to_string(), "{ecma}: {printed}");
            assert_eq!(found.properties().minimum_len(), parsed(ecma).properties().minimum_len(), "{ecma}");
        }
    }

    #[test]
    fn a_dot_stops_at_every_line_end_of_ecma() {
        let dot = search(".").unwrap();
        assert!(dot.contains('\u{2027}') && dot.contains('\u{202A}'), "{dot}");
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_with_a_reason() {
        let deep = format!("{}a{}", "(".repeat(200), ")".repeat(200));
        let many = r"\p{L}".repeat(600);
        let cases = [
            (r"a\", "backslash"),
            (r"(?=a)a", "look-around"),
            (r"(?<!a)b", "look-around"),
            (r"\ba", "boundaries"),
            (r"(a)\1", "back references"),
            (r"\z", "not an escape"),
            (r"[]a]", "empty class"),
            (r"a{,3}", "brace"),
            (r"(?x) a", "group begins"),
            (r"[z-a]", "invalid character class range"),
            (&*deep, "nest"),
            (&*many, "more than 500"),
        ];
        for (text, words) in cases {
            let error = search(text).unwrap_err();
            assert!(error.contains(words), "{text:.20}: {error}");
        }
    }

    #[test]
    fn whole_expressions_lose_flags_comments_and_names() {
        assert_eq!(whole("(?x) a b # c\n d").unwrap(), "(?:abd)");
        assert_eq!(whole("(?P<stop>a)b").unwrap(), "(?:(?:a)b)");
        for (text, words) in
            [("\\", "escape"), ("(?m)^a$", "anchors"), (r"a\b", "boundaries"), ("(", "unclosed")]
        {
            let error = whole(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
