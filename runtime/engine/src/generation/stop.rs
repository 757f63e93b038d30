//! Stop texts: text is held back as long as it may be the beginning of a stop text, so that no piece of a
//! stop text is ever emitted, however the text is divided into tokens.
//!
//! Each stop text has its own automaton (Knuth, Morris and Pratt): a byte costs a few steps, and the longest
//! match of all automata is the text that has to be held back.

/// One stop text, and how much of it the latest text matches.
#[derive(Debug)]
struct Automaton {
    wanted: Box<[u8]>,
    /// For each matched length: the longest shorter prefix that is also its suffix.
    fallback: Box<[usize]>,
    matched: usize,
}

impl Automaton {
    fn new(text: &str) -> Self {
        let wanted: Box<[u8]> = text.as_bytes().into();
        let mut fallback = vec![0; wanted.len() + 1].into_boxed_slice();
        let mut length = 0;
        for index in 1..wanted.len() {
            while length > 0 && wanted[index] != wanted[length] {
                length = fallback[length];
            }
            length += usize::from(wanted[index] == wanted[length]);
            fallback[index + 1] = length;
        }
        Self { wanted, fallback, matched: 0 }
    }

    /// Processes one more byte; true where the stop text is complete.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.wanted[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.wanted[self.matched] == byte);
        self.matched == self.wanted.len()
    }
}

/// The stop texts of one sequence, and the text that they hold back.
#[derive(Debug, Default)]
pub(crate) struct StopText {
    automata: Vec<Automaton>,
    pending: String,
}

/// The result of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StopCheck {
    /// Text that may be emitted.
    pub(crate) text: String,
    /// The index of the stop text that is complete; nothing may follow then.
    pub(crate) stop: Option<usize>,
}

impl StopText {
    /// None of `stops` is empty.
    pub(crate) fn new(stops: &[String]) -> Self {
        Self { automata: stops.iter().map(|stop| Automaton::new(stop)).collect(), pending: String::new() }
    }

    /// Adds a piece of text; not after a stop. Where two stop texts end at the same byte, the longer one
    /// counts.
    pub(crate) fn push(&mut self, piece: String) -> StopCheck {
        if self.automata.is_empty() {
            return StopCheck { text: piece, stop: None };
        }
        let before = self.pending.len();
        self.pending.push_str(&piece);
        for end in before..self.pending.len() {
            let byte = self.pending.as_bytes()[end];
            // All automata process every byte, because one that misses a byte is wrong.
            let complete = self.automata.iter_mut().fold(false, |any, one| one.advance(byte) | any);
            if complete {
                return self.stopped(end + 1);
            }
        }
        let matched = self.automata.iter().map(|automaton| automaton.matched).max().unwrap_or(0);
        // A stop text starts with a whole character, so this is a boundary of characters.
        let rest = self.pending.split_off(self.pending.len() - matched);
        StopCheck { text: std::mem::replace(&mut self.pending, rest), stop: None }
    }

    /// Cuts the text at the longest stop text that ends at `end`.
    fn stopped(&mut self, end: usize) -> StopCheck {
        let upto = &self.pending.as_bytes()[..end];
        let longest = (self.automata.iter().enumerate())
            .filter(|(_, automaton)| upto.ends_with(&automaton.wanted))
            .max_by_key(|(index, automaton)| (automaton.wanted.len(), usize::MAX - index));
        let (stop, length) = longest.map_or((None, 0), |(index, found)| (Some(index), found.wanted.len()));
        self.pending.truncate(end - length);
        StopCheck { text: std::mem::take(&mut self.pending), stop }
    }

    /// Ends without a stop text: the pending text is final.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes the pieces until one stops; gives each piece's text, and the stop text or the pending text.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Result<usize, String>) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut checker = StopText::new(&stops);
        let mut texts = Vec::new();
        for piece in pieces {
            let passed = checker.push((*piece).to_owned());
            texts.push(passed.text);
            if let Some(stop) = passed.stop {
                return (texts, Ok(stop));
            }
        }
        (texts, Err(checker.finish()))
    }

    #[test]
    fn a_stop_text_is_removed_however_it_is_divided() {
        for pieces in [vec!["abENDc"], vec!["ab", "END", "c"], vec!["a", "bE", "N", "Dc"]] {
            let (texts, stop) = run(&["END"], &pieces);
            assert_eq!((texts.concat().as_str(), stop), ("ab", Ok(0)), "{pieces:?}");
        }
    }

    #[test]
    fn only_a_possible_stop_text_is_held_back() {
        let (texts, left) = run(&["END", "E!"], &["xE", "N", "Ex", "EEN"]);
        assert_eq!((texts, left), (["x", "", "ENEx", "E"].map(str::to_owned).to_vec(), Err("EN".into())));
    }

    #[test]
    fn a_failed_match_continues_with_the_match_inside_it() {
        assert_eq!(run(&["aab"], &["aa", "ab"]).1, Ok(0));
        assert_eq!(run(&["aab"], &["aaab"]), (vec!["a".to_owned()], Ok(0)));
        assert_eq!(run(&["abcabd"], &["abcabcabd"]), (vec!["abc".to_owned()], Ok(0)));
    }

    #[test]
    fn the_earliest_and_then_the_longest_stop_text_counts() {
        assert_eq!(run(&["b", "ab"], &["xab"]), (vec!["x".to_owned()], Ok(1)));
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".to_owned()], Ok(1)));
        assert_eq!(run(&["z", "z"], &["z"]).1, Ok(0));
    }

    #[test]
    fn characters_are_never_divided() {
        let (texts, stop) = run(&["🦀é"], &["x🦀", "🦀", "é"]);
        assert_eq!((texts, stop), (["x", "🦀", ""].map(str::to_owned).to_vec(), Ok(0)));
    }

    #[test]
    fn without_stop_texts_nothing_is_held_back() {
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".to_owned(), "b".to_owned()], Err(String::new())));
    }

    #[test]
    fn any_division_gives_the_result_of_the_whole_text() {
        let stops = ["aba", "bb", "abcab"];
        // All words of six letters from an alphabet of three.
        for word in 0..3_usize.pow(6) {
            let text: String = (0..6).map(|i| char::from(b'a' + (word / 3_usize.pow(i) % 3) as u8)).collect();
            let ends = stops.iter().enumerate().filter_map(|(i, s)| Some((text.find(s)? + s.len(), i)));
            let first = ends.min_by_key(|(end, i)| (*end, usize::MAX - stops[*i].len()));
            let wanted = first.map(|(end, i)| (text[..end - stops[i].len()].to_owned(), i));
            for cut in 1..4 {
                let pieces: Vec<&str> =
                    text.as_bytes().chunks(cut).map(|c| std::str::from_utf8(c).unwrap()).collect();
                let (texts, end) = run(&stops, &pieces);
                match (&wanted, end) {
                    (Some((before, stop)), Ok(found)) => {
                        assert_eq!((&texts.concat(), &found), (before, stop));
                    }
                    (None, Err(left)) => assert_eq!(texts.concat() + &left, text),
                    (wanted, end) => panic!("{text}: {wanted:?} {end:?}"),
                }
            }
        }
    }
}
