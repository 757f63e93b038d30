//! The cases of jsonschemabench, which measures structured output without a model: schemas of public
//! projects, each with values that it describes and values that it does not.
//!
//! `MASKBENCH` names the folder `maskbench/data` of a copy of that repository; `e2e/clients/suites.sh` sets
//! it. A case passes where its schema compiles, every value that the schema describes is accepted and no
//! other is. The same is measured with llguidance alone, without the checks and rewrites of this module. What
//! is asked of ours: no value is accepted that the schema does not describe, and no fewer cases pass.

use super::*;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::panic_utils::catch_unwind;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{ParserFactory, TokenParser};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use trustformers_model::seeded::SeededModel;

/// The folder of the cases.
const FOLDER: &str = "MASKBENCH";

/// Cases are divided among this many threads.
const THREADS: usize = 2;

/// llguidance recurses along references of a schema, which may be deep.
const STACK_BYTES: usize = 512 * 1024 * 1024;

/// Reasons of refusals that are printed, the most frequent ones.
const PRINTED_REASONS: usize = 30;

#[derive(Deserialize)]
struct Case {
    schema: Box<RawValue>,
    #[serde(default)]
    tests: Vec<Instance>,
}

#[derive(Deserialize)]
struct Instance {
    valid: bool,
    data: Box<RawValue>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum CaseVerdict {
    Passed,
    /// The schema is not honoured.
    Refused(String),
    /// A value is accepted that the schema does not describe.
    WrongAccept,
    /// A value is not accepted that the schema describes.
    WrongRefusal,
}

/// A place in a grammar.
trait Position {
    /// Whether a token may come next.
    fn takes(&mut self, id: u32) -> bool;
    /// Goes on with a token. True where nothing can follow.
    fn accept(&mut self, id: u32) -> Result<bool, String>;
}

impl Position for Constraint {
    fn takes(&mut self, id: u32) -> bool {
        self.validates(id)
    }

    fn accept(&mut self, id: u32) -> Result<bool, String> {
        Self::accept(self, id).map_err(|error| error.to_string())
    }
}

impl Position for TokenParser {
    fn takes(&mut self, id: u32) -> bool {
        self.validate_token(id).unwrap_or(false)
    }

    fn accept(&mut self, id: u32) -> Result<bool, String> {
        self.consume_token(id).map_err(|error| error.to_string())?;
        self.check_stop().map_err(|error| error.to_string())
    }
}

/// Both ways to compile a schema, over one vocabulary.
struct Subjects {
    grammars: Grammars,
    parsers: ParserFactory,
    /// The token of each byte.
    bytes: Vec<u32>,
    end: u32,
}

impl Subjects {
    fn new() -> Self {
        let file = SeededModel::default().gguf();
        let model = Arc::new(Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap());
        let tokenizer = model.tokenizer();
        let ids = 0..u32::try_from(tokenizer.len()).unwrap();
        let token_of = |byte: u8| ids.clone().find(|id| tokenizer.token_bytes(*id) == [byte]).unwrap();
        let bytes = (0..=u8::MAX).map(token_of).collect();
        let end = tokenizer.eos_ids()[0];
        let vocabulary: TokEnv = Arc::new(vocabulary::Vocabulary::new(&model).unwrap());
        let slices = SlicedBiasComputer::general_slices();
        let mut parsers = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &slices).unwrap();
        parsers.quiet();
        // The same bound as ours.
        *parsers.limits_mut() =
            ParserLimits { max_lexer_states: compile::MAX_LEXER_STATES, ..ParserLimits::default() };
        Self { grammars: Grammars::new(model, DEFAULT_GRAMMAR_MEMORY_BYTES), parsers, bytes, end }
    }

    fn ours(&self, schema: &str) -> Result<Constraint, String> {
        self.grammars.start(&Grammar::JsonSchema(schema.to_owned())).map_err(|error| error.to_string())
    }

    fn llguidance(&self, schema: &str) -> Result<TokenParser, String> {
        let schema: Value = serde_json::from_str(schema).map_err(|error| error.to_string())?;
        let parser = catch_unwind(AssertUnwindSafe(|| {
            let mut parser = self.parsers.create_parser(TopLevelGrammar::from_json_schema(schema))?;
            parser.start_without_prompt();
            parser.compute_mask()?;
            Ok(parser)
        }));
        parser.map_err(|error| plain(&format!("{error:#}")))
    }

    /// Whether a text as a whole is of the grammar.
    fn accepts(&self, position: &mut impl Position, text: &str) -> bool {
        let mut stopped = false;
        for byte in text.bytes() {
            let id = self.bytes[usize::from(byte)];
            if stopped || !position.takes(id) {
                return false;
            }
            let Ok(ended) = position.accept(id) else { return false };
            stopped = ended;
        }
        stopped || position.takes(self.end)
    }

    fn verdict<P: Position>(&self, case: &Case, start: impl Fn(&str) -> Result<P, String>) -> CaseVerdict {
        let mut verdict = CaseVerdict::Passed;
        if let Err(why) = start(case.schema.get()) {
            return CaseVerdict::Refused(why);
        }
        for instance in &case.tests {
            let mut position = match start(case.schema.get()) {
                Ok(position) => position,
                Err(why) => return CaseVerdict::Refused(why),
            };
            let accepted = self.accepts(&mut position, &compact(instance.data.get()));
            match (instance.valid, accepted) {
                (false, true) => return CaseVerdict::WrongAccept,
                (true, false) => verdict = CaseVerdict::WrongRefusal,
                _ => {}
            }
        }
        verdict
    }
}

/// JSON without white space between its parts, its strings with the escapes that JSON demands only, its
/// numbers as they are written.
fn compact(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(first) = rest.chars().next() {
        let length = if first == '"' { string_length(rest) } else { first.len_utf8() };
        let (token, after) = rest.split_at(length);
        if first == '"' {
            let text: String = serde_json::from_str(token).unwrap();
            out.push_str(&serde_json::to_string(&text).unwrap());
        } else if !first.is_ascii_whitespace() {
            out.push_str(token);
        }
        rest = after;
    }
    out
}

/// Bytes of the string that a text begins with, its quotes included.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The collection that a case belongs to, from the name of its file.
fn family(file: &str) -> String {
    let name = file.trim_end_matches(".json");
    let collection = name.split_once("---").map_or(name, |(collection, _)| collection);
    // Names of these collections go on with the number of the case.
    let numbered = ["BFCL", "JME"];
    let found = numbered.into_iter().find(|name| collection.starts_with(name));
    found.unwrap_or(collection).to_owned()
}

/// The words of a refusal without what differs from schema to schema.
fn reason(why: &str) -> String {
    let keyword = why.split('"').nth(1).unwrap_or_default();
    let sentence = why.rsplit(": ").next().unwrap_or(why);
    format!("{keyword}: {}", shortened(sentence, 90))
}

#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    cases: usize,
    passed: usize,
    refused: usize,
    wrong_accepts: usize,
    wrong_refusals: usize,
}

impl Tally {
    fn add(&mut self, verdict: &CaseVerdict) {
        self.cases += 1;
        match verdict {
            CaseVerdict::Passed => self.passed += 1,
            CaseVerdict::Refused(_) => self.refused += 1,
            CaseVerdict::WrongAccept => self.wrong_accepts += 1,
            CaseVerdict::WrongRefusal => self.wrong_refusals += 1,
        }
    }
}

/// How one case went, with ours and with llguidance alone.
struct Comparison {
    file: String,
    ours: CaseVerdict,
    llguidance: CaseVerdict,
}

fn compare(subjects: &Subjects, path: &Path) -> Comparison {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let case: Case =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Comparison {
        file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        ours: subjects.verdict(&case, |schema| subjects.ours(schema)),
        llguidance: subjects.verdict(&case, |schema| subjects.llguidance(schema)),
    }
}

fn compare_all(files: &[PathBuf]) -> Vec<Comparison> {
    let subjects = Subjects::new();
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let work = || {
                while let Some(path) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let comparison = compare(&subjects, path);
                    found.lock().unwrap().push(comparison);
                }
            };
            std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work).unwrap();
        }
    });
    found.into_inner().unwrap()
}

/// Prints a row for each collection, and why schemas are refused. The last row is the sum.
fn print(comparisons: &[Comparison]) -> [Tally; 2] {
    let mut rows: BTreeMap<String, [Tally; 2]> = BTreeMap::new();
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = [Tally::default(); 2];
    for Comparison { file, ours, llguidance } in comparisons {
        let row = rows.entry(family(file)).or_default();
        for (at, verdict) in [ours, llguidance].into_iter().enumerate() {
            row[at].add(verdict);
            all[at].add(verdict);
        }
        if let CaseVerdict::Refused(why) = ours {
            *reasons.entry(reason(why)).or_default() += 1;
        }
        if *ours != CaseVerdict::Passed && *llguidance == CaseVerdict::Passed {
            println!("llguidance alone passes {file}: {ours:?}");
        }
        if *ours == CaseVerdict::WrongAccept {
            println!("wrong: {file}");
        }
    }
    println!(
        "| schemas | cases | passed | refused | wrong accepts | wrong refusals | llguidance: passed | wrong accepts |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    rows.insert("sum".to_owned(), all);
    for (name, [ours, alone]) in &rows {
        let Tally { cases, passed, refused, wrong_accepts, wrong_refusals } = ours;
        println!(
            "| {name} | {cases} | {passed} | {refused} | {wrong_accepts} | {wrong_refusals} | {} | {} |",
            alone.passed, alone.wrong_accepts
        );
    }
    let mut reasons: Vec<(usize, String)> = reasons.into_iter().map(|(why, count)| (count, why)).collect();
    reasons.sort_unstable_by(|a, b| b.cmp(a));
    for (count, why) in reasons.iter().take(PRINTED_REASONS) {
        println!("{count:5} refused: {why}");
    }
    all
}

#[test]
fn the_cases_of_jsonschemabench_are_accepted_or_refused_and_never_wrong() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        println!("skipped: {FOLDER} is not set; e2e/clients/suites.sh says how to get the cases");
        return;
    };
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no case", folder.display());
    let [ours, alone] = print(&compare_all(&files));
    assert_eq!(ours.wrong_accepts, 0, "a value was accepted that its schema does not describe");
    assert!(
        ours.passed >= alone.passed,
        "llguidance alone passes more: {} and {}",
        alone.passed,
        ours.passed
    );
}

#[test]
fn verdicts_tell_wrong_answers_from_refusals() {
    let subjects = Subjects::new();
    let case = |schema: &str, tests: &str| -> Case {
        serde_json::from_str(&format!("{{\"schema\": {schema}, \"tests\": {tests}}}")).unwrap()
    };
    let verdict = |case: &Case| subjects.verdict(case, |schema| subjects.ours(schema));
    let integer = r#"{"type": "integer"}"#;
    let values = r#"[{"valid": true, "data": 12}, {"valid": false, "data": "\u0061"}]"#;
    assert_eq!(verdict(&case(integer, values)), CaseVerdict::Passed);
    assert_eq!(verdict(&case(integer, r#"[{"valid": false, "data": 12}]"#)), CaseVerdict::WrongAccept);
    assert_eq!(verdict(&case(integer, r#"[{"valid": true, "data": "a"}]"#)), CaseVerdict::WrongRefusal);
    let refused = verdict(&case(r#"{"type": "strin"}"#, "[]"));
    assert!(matches!(&refused, CaseVerdict::Refused(why) if why.contains("strin")), "{refused:?}");
    assert_eq!(compact("{ \"a b\" : [ 1.50, \"\\u00e9\\n\" ] }"), "{\"a b\":[1.50,\"é\\n\"]}");
    assert_eq!(family("Github_easy---o1.json"), "Github_easy");
    assert_eq!(family("BFCL_simple_0.json"), "BFCL");
}
