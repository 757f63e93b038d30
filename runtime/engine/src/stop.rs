//! Stop strings: text is held back for as long as it may be the beginning of one, so that no part of a stop string is
//! ever given out, wherever tokens and characters are cut.
//!
//! Each stop string is followed by its own automaton (Knuth, Morris and Pratt): a byte costs a few steps, whatever was
//! held back before, and the longest state is what has to be held.

/// One stop string and how much of it the latest text matches.
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

    /// Follows one more byte; true where the stop string is complete.
    fn follow(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.wanted[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.wanted[self.matched] == byte);
        self.matched == self.wanted.len()
    }
}

/// The stop strings of one sequence, and the text that they hold back.
#[derive(Debug, Default)]
pub(crate) struct StopText {
    automata: Vec<Automaton>,
    held: String,
}

/// What became of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// What may be given out.
    pub(crate) text: String,
    /// Which stop string is complete; nothing may follow then.
    pub(crate) stop: Option<usize>,
}

impl StopText {
    /// None of `stops` is empty.
    pub(crate) fn new(stops: &[String]) -> Self {
        Self { automata: stops.iter().map(|stop| Automaton::new(stop)).collect(), held: String::new() }
    }

    /// Adds a piece of text; not after one has stopped. Where two stop strings end at the same place, the longer one counts.
    pub(crate) fn push(&mut self, piece: String) -> Passed {
        if self.automata.is_empty() {
            return Passed { text: piece, stop: None };
        }
        let before = self.held.len();
        self.held.push_str(&piece);
        for end in before..self.held.len() {
            let byte = self.held.as_bytes()[end];
            // Every one follows, whatever the others found: one that missed a byte would be wrong.
            let complete = self.automata.iter_mut().fold(false, |any, one| one.follow(byte) | any);
            if complete {
                return self.stopped(end + 1);
            }
        }
        let kept = self.automata.iter().map(|automaton| automaton.matched).max().unwrap_or(0);
        // A stop string starts with a whole character, so this is where one begins.
        let rest = self.held.split_off(self.held.len() - kept);
        Passed { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The longest stop string that ends at `end` cuts the text.
    fn stopped(&mut self, end: usize) -> Passed {
        let upto = &self.held.as_bytes()[..end];
        let longest = (self.automata.iter().enumerate())
            .filter(|(_, automaton)| upto.ends_with(&automaton.wanted))
            .max_by_key(|(index, automaton)| (automaton.wanted.len(), usize::MAX - index));
        let (stop, length) = longest.map_or((None, 0), |(index, found)| (Some(index), found.wanted.len()));
        self.held.truncate(end - length);
        Passed { text: std::mem::take(&mut self.held), stop }
    }

    /// The end came otherwise: what was held back is text.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes the pieces until one stops; gives each piece's text, and the stop string or what was left.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Result<usize, String>) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut gate = StopText::new(&stops);
        let mut texts = Vec::new();
        for piece in pieces {
            let passed = gate.push((*piece).to_owned());
            texts.push(passed.text);
            if let Some(stop) = passed.stop {
                return (texts, Ok(stop));
            }
        }
        (texts, Err(gate.finish()))
    }

    #[test]
    fn a_stop_string_is_cut_out_however_it_comes() {
        for pieces in [vec!["abENDc"], vec!["ab", "END", "c"], vec!["a", "bE", "N", "Dc"]] {
            let (texts, stop) = run(&["END"], &pieces);
            assert_eq!((texts.concat().as_str(), stop), ("ab", Ok(0)), "{pieces:?}");
        }
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let (texts, left) = run(&["END", "E!"], &["xE", "N", "Ex", "EEN"]);
        assert_eq!((texts, left), (["x", "", "ENEx", "E"].map(str::to_owned).to_vec(), Err("EN".into())));
    }

    #[test]
    fn a_match_that_fails_goes_back_to_the_one_inside_it() {
        assert_eq!(run(&["aab"], &["aa", "ab"]).1, Ok(0));
        assert_eq!(run(&["aab"], &["aaab"]), (vec!["a".to_owned()], Ok(0)));
        assert_eq!(run(&["abcabd"], &["abcabcabd"]), (vec!["abc".to_owned()], Ok(0)));
    }

    #[test]
    fn of_two_that_end_together_the_longer_counts_and_of_two_others_the_earlier() {
        assert_eq!(run(&["b", "ab"], &["xab"]), (vec!["x".to_owned()], Ok(1)));
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".to_owned()], Ok(1)));
        assert_eq!(run(&["z", "z"], &["z"]).1, Ok(0));
    }

    #[test]
    fn characters_stay_whole() {
        let (texts, stop) = run(&["🦀é"], &["x🦀", "🦀", "é"]);
        assert_eq!((texts, stop), (["x", "🦀", ""].map(str::to_owned).to_vec(), Ok(0)));
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".to_owned(), "b".to_owned()], Err(String::new())));
    }

    #[test]
    fn any_cuts_give_what_a_search_of_the_whole_gives() {
        let stops = ["aba", "bb", "abcab"];
        // All words of six letters over three.
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
