//! Grammars on a small vocabulary: what they leave, how they end, what is kept and what is refused.

use super::*;
use std::path::Path;
use trustformers_model::seeded::SeededModel;

fn grammars() -> Grammars {
    let file = SeededModel::default().gguf();
    Grammars::new(Arc::new(Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap()))
}

/// Ids that the mask allows.
fn allowed(constraint: &mut Constraint, vocabulary: usize) -> Vec<u32> {
    let mut row = vec![0.0; vocabulary + 70];
    constraint.mask().unwrap().apply(&mut row);
    (0..).zip(row).filter(|(_, logit)| *logit == 0.0).map(|(id, _)| id).collect()
}

#[test]
fn only_what_the_grammar_allows_is_left_and_the_end_token_only_where_it_may_end() {
    let grammars = grammars();
    let tokenizer = grammars.model.tokenizer();
    let id = |text: &str| tokenizer.encode(text).unwrap()[0];
    let mut constraint = grammars.start(&Grammar::Regex("x[yz]*".into())).unwrap();
    assert_eq!(allowed(&mut constraint, tokenizer.len()), [id("x")]);
    assert!(!constraint.accept(id("x")).unwrap());
    let mut wanted = vec![id("y"), id("z"), tokenizer.eos_ids()[0]];
    wanted.sort_unstable();
    assert_eq!(allowed(&mut constraint, tokenizer.len()), wanted);
    assert!(constraint.accept(tokenizer.eos_ids()[0]).unwrap(), "nothing follows the end token");
}

#[test]
fn a_grammar_without_room_is_complete_with_its_last_token() {
    let grammars = grammars();
    let id = |text: &str| grammars.model.tokenizer().encode(text).unwrap()[0];
    let mut constraint = grammars.start(&Grammar::Regex("xy".into())).unwrap();
    assert!(!constraint.accept(id("x")).unwrap());
    assert!(constraint.accept(id("y")).unwrap());
}

#[test]
fn requests_of_one_grammar_share_the_compiled_form_and_nothing_else() {
    let grammars = grammars();
    let id = |text: &str| grammars.model.tokenizer().encode(text).unwrap()[0];
    let grammar = Grammar::Regex("xy|zz".into());
    let mut first = grammars.start(&grammar).unwrap();
    first.accept(id("x")).unwrap();
    let mut second = grammars.start(&grammar).unwrap();
    assert_eq!(grammars.compiled.lock().unwrap().len(), 1);
    let vocabulary = grammars.model.tokenizer().len();
    assert_eq!(allowed(&mut second, vocabulary).len(), 2);
    assert_eq!(allowed(&mut first, vocabulary), [id("y")]);
}

#[test]
fn the_number_of_kept_grammars_is_bounded_and_the_latest_stay() {
    let grammars = grammars();
    let grammar = |n: usize| Grammar::Regex(format!("x{{{}}}", n + 1));
    for n in 0..=KEPT_GRAMMARS {
        grammars.start(&grammar(n)).unwrap();
        grammars.start(&grammar(0)).unwrap();
    }
    let compiled = grammars.compiled.lock().unwrap();
    assert_eq!(compiled.len(), KEPT_GRAMMARS);
    assert!(compiled.iter().any(|(kept, _)| *kept == grammar(0)));
    assert!(!compiled.iter().any(|(kept, _)| *kept == grammar(1)));
}

#[test]
fn what_cannot_be_compiled_says_why_in_one_sentence() {
    let grammars = grammars();
    let cases = [
        (Grammar::Regex("(".into()), "the regular expression cannot be compiled: "),
        (Grammar::Regex("(?=x)y".into()), "the regular expression cannot be compiled: "),
        (Grammar::Lark("start: missing".into()), "missing"),
        (Grammar::JsonSchema("{".into()), "the JSON schema is not JSON: "),
        (Grammar::JsonSchema(r#"{"type": "strin"}"#.into()), "strin"),
        (Grammar::JsonSchema(r#"{"$ref": "http://a/b"}"#.into()), "http://a/b"),
    ];
    for (grammar, text) in cases {
        let error = grammars.start(&grammar).err().unwrap().to_string();
        assert!(error.starts_with("response_format: ") && error.contains(text), "{grammar:?}: {error}");
        assert!(!error.contains("backtrace") && !error.contains('<'), "{error}");
    }
    assert!(grammars.compiled.lock().unwrap().is_empty());
}

#[test]
fn deep_nesting_is_refused_or_compiled_but_ends_nothing() {
    let grammars = grammars();
    let deep =
        |open: &str, close: &str, levels: usize| format!("{}x{}", open.repeat(levels), close.repeat(levels));
    let cases = [
        Grammar::Regex(deep("(", ")", 100_000)),
        Grammar::Lark(format!("start: {}", deep("(", ")", 100_000).replace('x', "\"x\""))),
        Grammar::JsonSchema(deep("{\"items\":", "}", 20_000)),
        Grammar::JsonSchema(deep("{\"items\":", "}", 60).replace('x', "{}")),
    ];
    for grammar in cases {
        let _outcome = grammars.start(&grammar).map(|mut constraint| constraint.mask().map(|_| ()));
    }
}

#[test]
fn messages_lose_their_marks() {
    assert_eq!(plain("bad\n<non-verbose/>"), "bad");
    assert_eq!(plain("panic: x\n<backtrace>\n0: y\n</backtrace>"), "panic: x");
    assert_eq!(plain("fine"), "fine");
}
