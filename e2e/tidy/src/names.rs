//! Names: the standard word of the field instead of a private one, and one name for one thing.
//!
//! A banned word is looked for in identifiers of Rust, in the names of files and folders, and in the names of
//! shell functions. Prose and strings are not looked at. Many of the words are also plain English or standard
//! somewhere else, so that each entry of the table says how much of an identifier it means and in which
//! folders it applies.

use crate::Finding;
use crate::rust::Rust;
use crate::tree::File;
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::{self, Visit};

/// How an entry of the table is compared with an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The word is a component: `census` is found in `census`, `CensusTable` and `take_census`. An entry of
    /// several words separated by `_` is a run of components.
    Component,
    /// As [`Match::Component`], but not in identifiers that are sentences (names of tests): the word is plain
    /// English.
    ShortName,
    /// The whole identifier is the word, in any case.
    Whole,
    /// The whole identifier is the word exactly as spelled here: the name of a type.
    Exact,
}

/// One banned word.
#[derive(Debug, Clone, Copy)]
pub struct Banned {
    /// The word.
    pub word: &'static str,
    /// What to write instead.
    pub standard: &'static str,
    /// How it is compared.
    pub matching: Match,
    /// Path prefixes where the entry applies; empty for the whole repository.
    pub only_in: &'static [&'static str],
    /// Path prefixes where the word is the standard one.
    pub except_in: &'static [&'static str],
}

const fn everywhere(word: &'static str, standard: &'static str, matching: Match) -> Banned {
    Banned { word, standard, matching, only_in: &[], except_in: &[] }
}

const fn inside(
    word: &'static str,
    standard: &'static str,
    matching: Match,
    only_in: &'static [&'static str],
) -> Banned {
    Banned { word, standard, matching, only_in, except_in: &[] }
}

/// An identifier of more components than this is a sentence: the name of a test.
const SENTENCE_COMPONENTS: usize = 4;

const ENGINE: &[&str] = &["runtime/engine/"];
const CPU: &[&str] = &["runtime/cpu/"];
const GATEWAY: &[&str] = &["runtime/gateway/"];

/// The words that this repository does not use, each with the standard word.
pub const BANNED: &[Banned] = &[
    // Preemption.
    everywhere("contest", "preemption", Match::Component),
    everywhere("gives_way", "select_victim", Match::Component),
    everywhere("give_way", "preempt", Match::Component),
    everywhere("gave_way", "preempted", Match::Component),
    everywhere("given_way", "preempted", Match::Component),
    everywhere("lack", "Shortage", Match::Component),
    everywhere("Runs", "Candidate", Match::Exact),
    inside("runs", "candidates", Match::Whole, ENGINE),
    // Admission.
    everywhere("census", "admission counts", Match::Component),
    everywhere("enrol", "register", Match::Component),
    everywhere("enrolled", "InflightGuard", Match::Component),
    // Queues.
    everywhere("Place", "QueueKey", Match::Exact),
    everywhere("Placed", "HasQueueKey", Match::Exact),
    everywhere("Turn", "next", Match::Exact),
    inside("place", "QueueKey, position, slot", Match::ShortName, ENGINE),
    inside("placed", "HasQueueKey", Match::ShortName, ENGINE),
    inside(
        "turn",
        "next (queue), rotate (rope)",
        Match::ShortName,
        &["runtime/engine/", "runtime/cpu/", "runtime/model/"],
    ),
    inside("due", "aged", Match::ShortName, ENGINE),
    everywhere("passed_over", "bypass_count", Match::Component),
    inside("behind", "underserved", Match::ShortName, ENGINE),
    // Prefix cache.
    inside("known", "cached", Match::ShortName, ENGINE),
    everywhere("learn", "register", Match::Component),
    inside("kept", "evictable", Match::ShortName, ENGINE),
    inside("hold", "acquire", Match::ShortName, ENGINE),
    everywhere("give_back", "release", Match::Component),
    // Speculation.
    everywhere("guesser", "Proposer", Match::Component),
    everywhere("guesses", "DraftTokens", Match::Component),
    inside("worth", "draft_len", Match::ShortName, ENGINE),
    inside("right", "accepted", Match::ShortName, ENGINE),
    // Steps of the engine.
    everywhere("said", "emitted, reported", Match::ShortName),
    everywhere("tell", "send, run", Match::ShortName),
    everywhere("After", "StepOutcome", Match::Exact),
    // Operator.
    everywhere("world", "Context", Match::Component),
    everywhere("awaken", "start", Match::Component),
    everywhere("Seen", "Observed", Match::Exact),
    everywhere("heard", "record_report", Match::ShortName),
    everywhere("happening", "EventNote", Match::Component),
    everywhere("doorkeeper", "FeedAuthenticator", Match::Component),
    everywhere("judge", "verify", Match::Component),
    everywhere("hub", "FeedState", Match::Component),
    // Gateway.
    everywhere("intake", "request body", Match::Component),
    everywhere("Taken", "BufferedBody", Match::Exact),
    inside("taken", "buffered", Match::ShortName, GATEWAY),
    everywhere("Begun", "RequestContext", Match::Exact),
    everywhere("begun", "started", Match::ShortName),
    everywhere("Page", "LocalEndpoint", Match::Exact),
    inside("page", "LocalEndpoint", Match::ShortName, GATEWAY),
    everywhere("dice", "rng", Match::Component),
    everywhere("roll", "next_u64", Match::Component),
    everywhere("ticket", "sequence (of a split), permit", Match::Component),
    // Pod.
    everywhere("board", "status", Match::Component),
    inside("Slot", "ManagedModel", Match::Exact, &["runtime/pod/"]),
    everywhere("activity", "inflight", Match::Component),
    // Conformance.
    everywhere("story", "harness (conformance), scenario (e2e)", Match::Component),
    everywhere("stories", "scenarios", Match::Component),
    everywhere("company", "batch invariance", Match::Component),
    everywhere("social", "BatchDependent", Match::Component),
    // Tests on a cluster.
    everywhere("Ask", "Request", Match::Exact),
    inside("ask", "Request", Match::ShortName, &["e2e/"]),
    everywhere("door", "Endpoint", Match::Component),
    everywhere("Odd", "Malformed", Match::Exact),
    inside("odd", "Malformed", Match::ShortName, &["e2e/"]),
    // Kernels.
    everywhere("Me", "ThreadContext", Match::Exact),
    inside("me", "ThreadContext", Match::ShortName, CPU),
    inside("passes", "swiglu", Match::Whole, CPU),
    // Small things.
    everywhere("brief", "truncate", Match::Component),
    inside("span", "duration", Match::ShortName, &["operator/", "crds/"]),
    inside("once", "one_shot", Match::Whole, &["runtime/serve/"]),
    inside("OnceError", "OneShotError", Match::Exact, &["runtime/serve/"]),
    Banned {
        // A field of the custom resource is called `topologySpread`, as in a pod.
        except_in: &["runtime/serve/src/inference_model.rs"],
        ..inside("spread", "percentiles", Match::ShortName, &["runtime/serve/src/bench/"])
    },
    everywhere("rung", "stage", Match::Component),
    everywhere("rungs", "stages", Match::Component),
    everywhere("bars", "objectives", Match::Component),
];

/// Words that shell functions do not use; the others of [`BANNED`] apply to them as well.
const BANNED_IN_SHELL: &[Banned] = &[everywhere("part", "step", Match::Whole)];

impl Banned {
    fn applies_to(&self, path: &str) -> bool {
        let under = |prefixes: &[&str]| prefixes.iter().any(|prefix| path.starts_with(prefix));
        (self.only_in.is_empty() || under(self.only_in)) && !under(self.except_in)
    }

    /// True when the entry means this identifier, given with its components.
    fn is_in(&self, identifier: &str, components: &[String]) -> bool {
        let has_run = || {
            let length = self.word.split('_').count();
            components.windows(length).any(|run| run.iter().map(String::as_str).eq(self.word.split('_')))
        };
        match self.matching {
            Match::Exact => identifier == self.word,
            Match::Whole => identifier.eq_ignore_ascii_case(self.word),
            Match::Component => has_run(),
            Match::ShortName => components.len() <= SENTENCE_COMPONENTS && has_run(),
        }
    }

    fn message(&self, name: &str) -> String {
        format!("`{name}`: the standard word for `{}` is: {}", self.word, self.standard)
    }
}

/// The components of an identifier in lower case: `HTTPPart_of2` is `http`, `part`, `of2`.
fn components(identifier: &str) -> Vec<String> {
    let chars: Vec<char> = identifier.chars().collect();
    let mut found = vec![String::new()];
    for (at, &c) in chars.iter().enumerate() {
        let before = at.checked_sub(1).map(|before| chars[before]);
        let starts_word = c.is_uppercase()
            && (before.is_some_and(|before| !before.is_uppercase())
                || chars.get(at + 1).is_some_and(|next| next.is_lowercase()));
        if c == '_' || c == '-' || starts_word {
            found.push(String::new());
        }
        if let (true, Some(last)) = (c.is_alphanumeric(), found.last_mut()) {
            last.extend(c.to_lowercase());
        }
    }
    found.retain(|component| !component.is_empty());
    found
}

/// Banned words in the identifiers of a Rust file: one finding for each identifier, at its first line.
pub fn banned_identifiers(rust: &Rust<'_>) -> Vec<Finding> {
    let entries: Vec<&Banned> = BANNED.iter().filter(|entry| entry.applies_to(&rust.file.path)).collect();
    let mut lines_of: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (number, line) in rust.numbered() {
        let words = line.code.split(|c: char| !c.is_alphanumeric() && c != '_');
        for word in words.filter(|word| word.starts_with(|c: char| c.is_alphabetic() || c == '_')) {
            lines_of.entry(word).or_insert((number, 0)).1 += 1;
        }
    }
    let found = lines_of.into_iter().filter_map(|(identifier, (line, uses))| {
        let components = components(identifier);
        let entry = entries.iter().find(|entry| entry.is_in(identifier, &components))?;
        let what = format!("{} ({uses} uses in this file)", entry.message(identifier));
        Some(Finding::at(&rust.file.path, line, what))
    });
    found.collect()
}

/// Banned words in the names of files and folders, and in the names of shell functions.
pub fn banned_file_names(file: &File) -> Vec<Finding> {
    let banned = |name: &str, tables: &[&[Banned]]| {
        let components = components(name);
        let mut entries = tables.iter().copied().flatten().filter(|entry| entry.applies_to(&file.path));
        entries.find(|entry| entry.is_in(name, &components)).map(|entry| entry.message(name))
    };
    let stems = file.path.split('/').map(|name| name.split('.').next().unwrap_or(name));
    let mut findings: Vec<Finding> = stems
        .filter_map(|stem| banned(stem, &[BANNED]))
        .map(|what| Finding::whole(&file.path, what))
        .collect();
    if file.path.ends_with(".sh") {
        let functions = file.lines().filter_map(|(number, line)| {
            let (name, _) = line.split_once("()").filter(|(name, _)| !name.contains([' ', '"', '$']))?;
            Some(Finding::at(&file.path, number, banned(name, &[BANNED, BANNED_IN_SHELL])?))
        });
        findings.extend(functions);
    }
    findings
}

/// A type that a package defines: its name, its file and its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeName {
    name: String,
    path: String,
    line: usize,
}

/// The names of the types and traits that a file defines; those for one platform only are left out, because
/// another file may define the same type for another platform.
pub fn types_of(rust: &Rust<'_>) -> Vec<TypeName> {
    let mut finder = TypeFinder { path: &rust.file.path, found: Vec::new() };
    finder.visit_file(&rust.tree);
    finder.found
}

/// Type names that one package defines more than once: a finding at each place after the first.
pub fn shared_type_names(types: &[TypeName]) -> Vec<Finding> {
    let mut locations: BTreeMap<&str, BTreeSet<(&str, usize)>> = BTreeMap::new();
    for defined in types {
        locations.entry(&defined.name).or_default().insert((&defined.path, defined.line));
    }
    let mut findings = Vec::new();
    for (name, locations) in locations {
        let mut locations = locations.into_iter();
        let Some((first, first_line)) = locations.next() else { continue };
        findings.extend(locations.map(|(path, line)| {
            Finding::at(path, line, format!("`{name}` is also the name of a type at {first}:{first_line}"))
        }));
    }
    findings
}

struct TypeFinder<'a> {
    path: &'a str,
    found: Vec<TypeName>,
}

impl TypeFinder<'_> {
    fn add(&mut self, attributes: &[syn::Attribute], name: &syn::Ident) {
        if !attributes.iter().any(|attribute| attribute.path().is_ident("cfg")) {
            let line = name.span().start().line;
            self.found.push(TypeName { name: name.to_string(), path: self.path.to_owned(), line });
        }
    }
}

impl<'ast> Visit<'ast> for TypeFinder<'_> {
    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.add(&item.attrs, &item.ident);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.add(&item.attrs, &item.ident);
        visit::visit_item_enum(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.add(&item.attrs, &item.ident);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        self.add(&item.attrs, &item.ident);
        visit::visit_item_type(self, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let file = File::from_text(path, text);
        let findings = banned_identifiers(&Rust::parse(&file).unwrap());
        findings
            .into_iter()
            .map(|finding| finding.what.split('`').nth(1).unwrap_or_default().to_owned())
            .collect()
    }

    #[test]
    fn identifiers_split_into_components() {
        for (identifier, expected) in [
            ("take_census", vec!["take", "census"]),
            ("CensusTable", vec!["census", "table"]),
            ("HTTPDoor", vec!["http", "door"]),
            ("KEPT_OUT", vec!["kept", "out"]),
            ("_", vec![]),
        ] {
            assert_eq!(components(identifier), expected, "{identifier}");
        }
    }

    #[test]
    fn every_banned_word_is_found() {
        for entry in BANNED {
            let path = format!("{}src/lib.rs", entry.only_in.first().copied().unwrap_or("a/"));
            let text = format!("struct {};\n", entry.word);
            assert_eq!(found(&path, &text), [entry.word], "{} in {path}", entry.word);
        }
    }

    #[test]
    fn banned_words_are_found_as_components() {
        let text = "fn take_census(a: CensusTable) { gives_way_to(a, passed_over_most); }\n";
        assert_eq!(
            found("a/src/lib.rs", text),
            ["CensusTable", "gives_way_to", "passed_over_most", "take_census"]
        );
    }

    #[test]
    fn standard_uses_are_not_found() {
        let text =
            "fn known(a: Sequence) { std::iter::once(a); x.split_once(y); retry_after(placed, right); }\n";
        assert_eq!(found("runtime/api/src/lib.rs", text), [""; 0]);
        let text =
            "// census in prose\nfn a() { log(\"census\"); }\nfn the_cache_is_right_after_a_step() {}\n";
        assert_eq!(found("runtime/engine/src/lib.rs", text), [""; 0]);
    }

    #[test]
    fn the_message_names_the_standard_word() {
        let file = File::from_text("a/src/lib.rs", "struct Doorkeeper;\nfn a(b: Doorkeeper) {}\n");
        let findings = banned_identifiers(&Rust::parse(&file).unwrap());
        assert_eq!(findings[0].line, Some(1));
        assert!(findings[0].what.contains("FeedAuthenticator (2 uses"), "{}", findings[0].what);
    }

    #[test]
    fn file_and_function_names_are_checked() {
        for (path, text, expected) in [
            ("e2e/tasks/rungs.sh", "", 1),
            ("e2e/tests/stories/main.rs", "", 1),
            ("runtime/engine/src/known.rs", "", 1),
            ("runtime/api/src/known.rs", "", 0),
            ("e2e/a.sh", "rung() { echo; }\npart() {\n}\nprint_parts() {\n}\necho \"$(part)\"\n", 2),
        ] {
            assert_eq!(banned_file_names(&File::from_text(path, text)).len(), expected, "{path}");
        }
    }

    #[test]
    fn one_name_for_two_types_is_found() {
        let one = File::from_text("a/src/one.rs", "struct Answer;\nimpl A for B { type Error = (); }\n");
        let two = File::from_text(
            "a/src/two.rs",
            "mod tests { enum Answer { A } }\ntype Error = ();\n#[cfg(unix)]\nstruct B;\n#[cfg(windows)]\nstruct B;\n",
        );
        let types: Vec<_> =
            [&one, &two].into_iter().flat_map(|file| types_of(&Rust::parse(file).unwrap())).collect();
        let what = "`Answer` is also the name of a type at a/src/one.rs:1";
        assert_eq!(shared_type_names(&types), [Finding::at("a/src/two.rs", 1, what)]);
    }
}
