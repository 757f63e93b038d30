//! Splits Rust text, line by line, into code and comments. A rule that looks for a word must not find it in a
//! string or in prose, and a rule that wants a comment must know where one is. Parsing with `syn` loses both.

/// One line of source, taken apart.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Line {
    /// The code on it; the content of strings and character literals is left out, their quotes stay.
    pub code: String,
    /// The text of the comments on it, documentation included.
    pub comment: String,
}

impl Line {
    /// True when something but white space and comments is on the line.
    pub fn has_code(&self) -> bool {
        !self.code.trim().is_empty()
    }
}

/// Where the lexer stands between two characters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    BlockComment { depth: usize },
    Text,
    RawText { hashes: usize },
}

/// Takes a whole file apart. Line `n` of the file is element `n - 1`.
pub fn lines(text: &str) -> Vec<Line> {
    let chars: Vec<char> = text.chars().collect();
    let mut lexer = Lexer { chars: &chars, at: 0, state: State::Code, done: vec![Line::default()] };
    while lexer.at < chars.len() {
        lexer.step();
    }
    lexer.done
}

struct Lexer<'a> {
    chars: &'a [char],
    at: usize,
    state: State,
    done: Vec<Line>,
}

impl Lexer<'_> {
    fn step(&mut self) {
        let here = self.chars[self.at];
        if here == '\n' {
            if self.state == State::LineComment {
                self.state = State::Code;
            }
            self.done.push(Line::default());
            self.at += 1;
            return;
        }
        match self.state {
            State::Code => self.code(here),
            State::LineComment => self.comment(1),
            State::BlockComment { depth } => self.block_comment(depth),
            State::Text => match here {
                '\\' => self.skip_escaped(),
                '"' => self.back_to_code('"'),
                _ => self.at += 1,
            },
            State::RawText { hashes } => {
                if here == '"' && (1..=hashes).all(|ahead| self.peek(ahead) == Some('#')) {
                    self.at += hashes;
                    self.back_to_code('"');
                } else {
                    self.at += 1;
                }
            }
        }
    }

    fn code(&mut self, here: char) {
        match (here, self.peek(1)) {
            ('/', Some('/')) => {
                self.state = State::LineComment;
                self.comment(2);
            }
            ('/', Some('*')) => {
                self.state = State::BlockComment { depth: 1 };
                self.comment(2);
            }
            ('"', _) => {
                self.state = self.raw_hashes().map_or(State::Text, |hashes| State::RawText { hashes });
                self.keep(here);
            }
            ('\'', _) => self.quote(),
            _ => self.keep(here),
        }
    }

    /// How many `#` stand between an `r` and the quote at hand; none for an ordinary string.
    fn raw_hashes(&self) -> Option<usize> {
        let before = &self.chars[..self.at];
        let hashes = before.iter().rev().take_while(|&&c| c == '#').count();
        let prefix: Vec<char> = before[..before.len() - hashes].iter().rev().take(3).copied().collect();
        let word = |c: Option<&char>| c.is_some_and(|c| c.is_alphanumeric() || *c == '_');
        match prefix.first() {
            Some('r') if !word(prefix.get(1)) => Some(hashes),
            Some('r') if matches!(prefix.get(1), Some('b' | 'c')) && !word(prefix.get(2)) => Some(hashes),
            _ => None,
        }
    }

    /// A character literal, or the tick of a lifetime.
    fn quote(&mut self) {
        let literal_end = match (self.peek(1), self.peek(2)) {
            (Some('\\'), _) => (3..12).find(|&ahead| self.peek(ahead) == Some('\'')),
            (Some(_), Some('\'')) => Some(2),
            _ => None,
        };
        self.keep('\'');
        if let Some(end) = literal_end {
            self.at += end;
            self.line().code.push('\'');
        }
    }

    fn block_comment(&mut self, depth: usize) {
        match (self.chars[self.at], self.peek(1)) {
            ('*', Some('/')) => {
                self.state = if depth == 1 { State::Code } else { State::BlockComment { depth: depth - 1 } };
                self.comment(2);
            }
            ('/', Some('*')) => {
                self.state = State::BlockComment { depth: depth + 1 };
                self.comment(2);
            }
            _ => self.comment(1),
        }
    }

    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn line(&mut self) -> &mut Line {
        if self.done.is_empty() {
            self.done.push(Line::default());
        }
        let last = self.done.len() - 1;
        &mut self.done[last]
    }

    fn keep(&mut self, c: char) {
        self.line().code.push(c);
        self.at += 1;
    }

    fn comment(&mut self, count: usize) {
        let end = (self.at + count).min(self.chars.len());
        let piece: String = self.chars[self.at..end].iter().collect();
        self.line().comment.push_str(&piece);
        self.at = end;
    }

    fn back_to_code(&mut self, quote: char) {
        self.state = State::Code;
        self.keep(quote);
    }

    /// Passes over a backslash and what it escapes; an escaped line break still ends the line.
    fn skip_escaped(&mut self) {
        self.at += if self.peek(1) == Some('\n') { 1 } else { 2 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> Vec<String> {
        lines(text).into_iter().map(|line| line.code.trim().to_owned()).collect()
    }

    #[test]
    fn comments_are_not_code() {
        assert_eq!(
            code("let a = 1; // sleep(\n/* b\n c */ let d;\n/// doc"),
            ["let a = 1;", "", "let d;", ""]
        );
        assert_eq!(code("/* a /* b */ c */ d"), ["d"]);
        assert_eq!(lines("x(); // why")[0].comment, "// why");
    }

    #[test]
    fn strings_are_emptied() {
        assert_eq!(code(r#"f("sleep( \" // no comment")"#), [r#"f("")"#]);
        assert_eq!(code("f(r#\"a \" b\"#, br\"c\\\", \"d\")"), ["f(r#\"\", br\"\", \"\")"]);
        assert_eq!(code("let s = \"a\nunsafe {\n\";"), ["let s = \"", "", "\";"]);
        assert_eq!(code("let s = \"a\\\n  b\"; g()"), ["let s = \"", "\"; g()"]);
        assert_eq!(code("for_\"x\""), ["for_\"\""]);
    }

    #[test]
    fn lifetimes_and_characters_are_told_apart() {
        assert_eq!(code("fn a<'b>(c: &'b str) { '\"' }"), ["fn a<'b>(c: &'b str) { '' }"]);
        assert_eq!(code(r"['\'', '\\', '\u{1F600}', '/'] // end"), ["['', '', '', '']"]);
    }
}
