//! Grammars on a small vocabulary: what they allow, how they end, what is cached and what is refused.

use super::*;
use std::path::Path;
use trustformers_model::seeded::SeededModel;

fn grammars() -> Grammars {
    let file = SeededModel::default().gguf();
    let model = Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap();
    Grammars::new(Arc::new(model), DEFAULT_GRAMMAR_MEMORY_BYTES)
}

/// Ids that the mask allows.
fn allowed(constraint: &mut Constraint, vocabulary: usize) -> Vec<u32> {
    let words = constraint.mask().unwrap().words().to_vec();
    let allows = |id: usize| words.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
    (0..).zip(0..vocabulary + 70).filter(|(_, index)| allows(*index)).map(|(id, _)| id).collect()
}

/// Whether a grammar takes a text as a whole answer, byte for byte.
fn accepts(grammars: &Grammars, grammar: &Grammar, text: &str) -> bool {
    let mut constraint = grammars.start(grammar).unwrap_or_else(|error| panic!("{grammar:?}: {error}"));
    let tokenizer = grammars.model.tokenizer();
    let bytes = |byte: u8| {
        let ids = 0..u32::try_from(tokenizer.len()).unwrap();
        ids.into_iter().find(|id| tokenizer.token_bytes(*id) == [byte]).unwrap()
    };
    let mut stopped = false;
    for byte in text.bytes() {
        let id = bytes(byte);
        if stopped || !allowed_by_parser(&mut constraint, id) {
            return false;
        }
        stopped = constraint.accept(id).unwrap();
    }
    stopped || allowed_by_parser(&mut constraint, tokenizer.eos_ids()[0])
}

/// Whether the grammar takes the token at all, though the mask may prefer a longer one.
fn allowed_by_parser(constraint: &mut Constraint, id: u32) -> bool {
    constraint.validates(id)
}

fn json(text: &str) -> Grammar {
    Grammar::JsonSchema(text.into())
}

#[test]
fn a_mask_leaves_what_the_grammar_allows_and_its_end() {
    let grammars = grammars();
    let tokenizer = grammars.model.tokenizer();
    let id = |text: &str| tokenizer.encode(text).unwrap()[0];
    let mut constraint = grammars.start(&Grammar::Regex("x[yz]*".into())).unwrap();
    assert_eq!(allowed(&mut constraint, tokenizer.len()), [id("x")]);
    assert!(!constraint.accept(id("x")).unwrap());
    let mut expected = vec![id("y"), id("z"), tokenizer.eos_ids()[0]];
    expected.sort_unstable();
    assert_eq!(allowed(&mut constraint, tokenizer.len()), expected);
    assert!(constraint.accept(tokenizer.eos_ids()[0]).unwrap(), "nothing follows the end token");
}

#[test]
fn a_grammar_that_nothing_can_follow_ends_with_its_last_token() {
    let grammars = grammars();
    let id = |text: &str| grammars.model.tokenizer().encode(text).unwrap()[0];
    let mut constraint = grammars.start(&Grammar::Regex("xy".into())).unwrap();
    assert!(!constraint.accept(id("x")).unwrap());
    assert!(constraint.accept(id("y")).unwrap());
}

#[test]
fn requests_with_one_grammar_share_only_the_compiled_form() {
    let grammars = grammars();
    let id = |text: &str| grammars.model.tokenizer().encode(text).unwrap()[0];
    let grammar = Grammar::Regex("xy|zz".into());
    let mut first = grammars.start(&grammar).unwrap();
    first.accept(id("x")).unwrap();
    let mut second = grammars.start(&grammar).unwrap();
    assert_eq!(grammars.cached.lock().unwrap().len(), 1);
    let vocabulary = grammars.model.tokenizer().len();
    assert_eq!(allowed(&mut second, vocabulary).len(), 2);
    assert_eq!(allowed(&mut first, vocabulary), [id("y")]);
}

#[test]
fn the_cache_is_bounded_and_drops_the_oldest() {
    let grammars = grammars();
    let grammar = |n: usize| Grammar::Regex(format!("x{{{}}}", n + 1));
    for n in 0..=MAX_CACHED {
        grammars.start(&grammar(n)).unwrap();
        grammars.start(&grammar(0)).unwrap();
    }
    let cached = grammars.cached.lock().unwrap();
    assert_eq!(cached.len(), MAX_CACHED);
    assert!(cached.iter().any(|entry| entry.grammar == grammar(0)));
    assert!(!cached.iter().any(|entry| entry.grammar == grammar(1)));
}

#[test]
fn what_cannot_be_compiled_says_why_in_one_sentence() {
    let grammars = grammars();
    let long = "k".repeat(100_000);
    let cases = [
        (Grammar::Regex("(".into()), "the regular expression cannot be compiled: "),
        (Grammar::Regex("(?=x)y".into()), "look-around"),
        (Grammar::Regex("ab\\".into()), "escape"),
        (Grammar::Regex(format!("{long}(")), "unclosed"),
        (Grammar::Lark("start: missing".into()), "missing"),
        (Grammar::Lark(format!("start: {long}")), "the grammar cannot be compiled: "),
        (Grammar::Lark("start: %json {\"const\": -9223372036854775808}".into()), "\"const\" at \"/\""),
        (json("{"), "the JSON schema is not JSON: "),
        (json(r#"{"type": "strin"}"#), "strin"),
        (json(r#"{"$ref": "http://a/b"}"#), "http://a/b"),
        (json("false"), "no answer satisfies"),
        (json(r#"{"type": "integer", "minimum": 9, "maximum": 5}"#), "minimum"),
        (json(r#"{"type": "string", "minLength": 5, "maxLength": 3}"#), "minLength"),
        (json(r#"{"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}"#), "\"oneOf\""),
    ];
    for (grammar, text) in cases {
        let error = grammars.start(&grammar).err().unwrap().to_string();
        assert!(error.starts_with("response_format: ") && error.contains(text), "{grammar:.60?}: {error}");
        assert!(!error.contains("backtrace") && !error.contains("panic") && !error.contains('<'), "{error}");
        assert!(error.chars().count() < 400, "{error}");
    }
    assert!(grammars.cached.lock().unwrap().is_empty());
}

#[test]
fn numbers_that_overflow_the_compiler_end_no_process() {
    let grammars = grammars();
    let templates = [
        r#"{"const": N}"#,
        r#"{"enum": [0, [{"a": N}]]}"#,
        r#"{"type": "integer", "minimum": N, "maximum": N}"#,
        r#"{"type": "integer", "exclusiveMinimum": N}"#,
        r#"{"type": "integer", "maximum": N}"#,
        r#"{"minimum": N}"#,
        r#"{"maximum": N}"#,
        r#"{"multipleOf": N}"#,
        r#"{"allOf": [{"const": N}, {"type": "integer"}]}"#,
        r#"{"properties": {"x": {"anyOf": [{"const": N}, {"maximum": N}]}}}"#,
    ];
    let numbers = [
        "-9223372036854775808",
        "-9223372036854775807",
        "-9223372036854775296",
        "-9223372036854775809",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-1e400",
        "1e400",
        "1e-400",
        "-0.0",
        "5e-324",
        "1.7976931348623157e308",
        "-9.223372036854775808e18",
        "1e18446744073709551616",
    ];
    for template in templates {
        for number in numbers {
            let schema = template.replace('N', number);
            for grammar in [json(&schema), Grammar::Lark(format!("start: %json {schema}"))] {
                if let Err(error) = grammars.start(&grammar) {
                    let error = error.to_string();
                    assert!(!error.contains("panic") && error.chars().count() < 400, "{schema}: {error}");
                }
            }
        }
    }
}

#[test]
fn deep_and_large_formats_are_refused_or_compiled_but_end_nothing() {
    let grammars = grammars();
    let deep =
        |open: &str, close: &str, levels: usize| format!("{}x{}", open.repeat(levels), close.repeat(levels));
    let chain: String = (0..5000).map(|n| format!("r{n}: r{}\n", n + 1)).collect();
    let references: String =
        (0..1500).map(|n| format!("\"d{n}\": {{\"$ref\": \"#/$defs/d{}\"}},", n + 1)).collect();
    let patterns = (0..900).map(|n| format!("{{\"pattern\": \"{n}\"}}")).collect::<Vec<_>>().join(",");
    let cases = [
        Grammar::Regex(deep("(", ")", 100_000)),
        Grammar::Regex("((a{1000}){1000}){10}".into()),
        Grammar::Regex("(.{0,500}x){0,500}y".into()),
        Grammar::Regex("\\w".repeat(100_000)),
        Grammar::Lark(format!("start: {}", deep("(", ")", 100_000).replace('x', "\"x\""))),
        Grammar::Lark(format!("start: r0\n{chain}r5000: \"a\"\n")),
        Grammar::Lark("start: start".into()),
        Grammar::Lark("start: \"a\"~0..2147483647".into()),
        Grammar::Lark("start: %lark { start: %lark { start: \"a\" } }".into()),
        json(&deep("{\"items\":", "}", 20_000)),
        json(&deep("{\"items\":", "}", 60).replace('x', "{}")),
        json(r#"{"type": "string", "minLength": 18446744073709551615}"#),
        json(r#"{"type": "array", "minItems": 1e30}"#),
        json(&format!("{{\"$ref\": \"#/$defs/d0\", \"$defs\": {{{references} \"d1500\": {{}}}}}}")),
        json(&format!("{{\"type\": \"string\", \"allOf\": [{patterns}]}}")),
        json(r##"{"$ref": "#"}"##),
        json(r##"{"allOf": [{"$ref": "#"}, {"type": "integer"}]}"##),
        json(r##"{"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}"##),
    ];
    for grammar in cases {
        let outcome = grammars.start(&grammar).map(|mut constraint| constraint.mask().map(|_| ()));
        if let Err(error) = outcome {
            assert!(error.to_string().chars().count() < 400, "{error}");
        }
    }
}

/// A schema, answers that it describes, and answers that it does not.
type SchemaAnswers = (&'static str, &'static [&'static str], &'static [&'static str]);

const SCHEMAS: &[SchemaAnswers] = &[
    (
        r#"{"const": 9223372036854775807}"#,
        &["9223372036854775807"],
        &["9223372036854775806", "9223372036854775808"],
    ),
    (
        r#"{"type": "integer", "minimum": -9223372036854775808, "maximum": 9223372036854775807}"#,
        &["9223372036854775807", "-9223372036854774784", "0"],
        &["9223372036854775808", "-9223372036854775809", "1.5"],
    ),
    (
        r#"{"type": "array", "items": {"const": 1}, "uniqueItems": false, "maxItems": 2}"#,
        &["[1,1]", "[]"],
        &["[1,1,1]"],
    ),
    (r##"{"$defs": {"a/b~c é": {"const": 1}}, "$ref": "#/$defs/a~1b~0c%20%C3%A9"}"##, &["1"], &["2"]),
    (r##"{"$defs": {"a": {"$anchor": "here", "const": 1}}, "$ref": "#here"}"##, &["1"], &["2"]),
    (r#"{"$id": "http://a/b", "$defs": {"a": {"$id": "c", "const": 1}}, "$ref": "c"}"#, &["1"], &["2"]),
    (
        r#"{"oneOf": [{"const": 1}, {"const": 2}, {"type": "integer", "minimum": 5, "maximum": 7}]}"#,
        &["1", "6"],
        &["3"],
    ),
    (
        r#"{"oneOf": [{"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "minItems": 2, "items": false},
            {"type": "array", "prefixItems": [{"const": 3}, {"const": 4}], "minItems": 2, "items": false}]}"#,
        &["[1,2]", "[3,4]"],
        &["[1,4]", "[1]"],
    ),
    (
        r#"{"patternProperties": {"^x": {"const": 1}}, "anyOf": [{"type": "object"}], "additionalProperties": false}"#,
        &[r#"{"x1":1}"#, "{}"],
        &[r#"{"y":1}"#, r#"{"x1":2}"#],
    ),
    (
        r#"{"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}}"#,
        &[r#"{"a":1,"b":2}"#],
        &[r#"{"a":2}"#, r#"{"a":1,"\u0061":2}"#],
    ),
    (
        r#"{"type": "string", "format": "date"}"#,
        &["\"2024-02-29\"", "\"2000-02-29\""],
        &["\"2023-02-29\"", "\"1900-02-29\""],
    ),
    (r#"{"type": "string", "format": "time"}"#, &["\"23:59:59Z\""], &["\"23:59:60Z\"", "\"24:00:00Z\""]),
    (
        r#"{"type": "string", "format": "hostname"}"#,
        &["\"a\"", "\"a-b.c-d--e.org\"", "\"ab\"", "\"a--b\""],
        &["\"xn--a\"", "\"-a\"", "\"a-\"", "\"a..b\"", "\"a-.b\""],
    ),
    (r#"{"type": "string", "pattern": "^\\cC$"}"#, &["\"\\u0003\""], &["\"a\""]),
    (r#"{"type": "string", "pattern": "^[[ab]]$"}"#, &["\"a]\"", "\"[]\""], &["\"a\""]),
    (r#"{"type": "string", "pattern": "^(?<stop>ab)c$"}"#, &["\"abc\""], &["\"ab\""]),
    (
        r#"{"type": "string", "pattern": "^#[0-9a-f]{6}([0-9a-f]{2})?$"}"#,
        &["\"#ff0000\"", "\"#ff000080\""],
        &["\"#ff00008\"", "\"#ff0000ff00\""],
    ),
    (r#"{"type": "string", "_format": "date", "maxLength": 1}"#, &["\"a\""], &["\"ab\""]),
    (r#"{"type": "string", "pattern": "^.$"}"#, &["\"a\""], &["\"\\r\"", "\"\\n\""]),
    (r#"{"type": "number", "exclusiveMinimum": 0, "maximum": 1}"#, &["0.5", "1"], &["0", "0.0", "1.5"]),
    (r#"{"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 1}"#, &["0.25", "0.75"], &["0.3"]),
    (r#"{"const": "a\u0001b"}"#, &["\"a\\u0001b\""], &["\"ab\""]),
    ("true", &["null", "[1.5e3]"], &["nul"]),
];

#[test]
fn schemas_take_their_answers_and_no_others() {
    let grammars = grammars();
    for (schema, valid, invalid) in SCHEMAS {
        for answer in *valid {
            assert!(accepts(&grammars, &json(schema), answer), "{schema} should take {answer}");
        }
        for answer in *invalid {
            assert!(!accepts(&grammars, &json(schema), answer), "{schema} should not take {answer}");
        }
    }
}

#[test]
fn regular_expressions_match_whole_answers() {
    let grammars = grammars();
    for (expression, valid, invalid) in [
        ("(?x) a b # c", "ab", "a b"),
        ("(?P<stop>a)b", "ab", "a"),
        ("(?i)yes", "YeS", "no"),
        ("^[0-9]{3}$", "123", "1234"),
        ("a/b", "a/b", "ab"),
        ("a\\nb", "a\nb", "anb"),
        ("a|", "", "b"),
    ] {
        let grammar = Grammar::Regex(expression.into());
        assert!(accepts(&grammars, &grammar, valid), "{expression} {valid}");
        assert!(!accepts(&grammars, &grammar, invalid), "{expression} {invalid}");
    }
}

#[test]
fn numbers_end_though_their_grammar_does_not() {
    let grammars = grammars();
    let tokenizer = grammars.model.tokenizer();
    let nine =
        (0..u32::try_from(tokenizer.len()).unwrap()).find(|id| tokenizer.token_bytes(*id) == b"9").unwrap();
    for schema in [
        "{}",
        r#"{"type": "integer"}"#,
        r#"{"type": "number"}"#,
        r#"{"type": "array", "items": {"type": "number"}}"#,
        "start: %json {\"type\": \"number\"}\n%llguidance {\"limit_digits\": true}\n",
    ] {
        let lark = schema.starts_with("start");
        let grammar = if lark { Grammar::Lark(schema.into()) } else { json(schema) };
        let mut constraint = grammars.start(&grammar).unwrap();
        let mut digits = 0;
        while digits < 100 {
            let ids = allowed(&mut constraint, tokenizer.len());
            let next = if ids.contains(&nine) {
                nine
            } else if digits == 0 {
                *ids.iter().find(|id| [b"[".as_slice()].contains(&tokenizer.token_bytes(**id))).unwrap()
            } else {
                break;
            };
            digits += usize::from(next == nine);
            constraint.accept(next).unwrap();
        }
        assert_eq!(digits, 20, "{schema}");
    }
    // Where only digits can follow, they follow.
    let long = json(r#"{"const": 1e30}"#);
    assert!(accepts(&grammars, &long, &format!("1{}", "0".repeat(30))));
}

#[test]
fn grammars_beyond_the_memory_are_refused_and_drop_the_cache_first() {
    let all = grammars();
    let grammar = |n: usize| Grammar::Regex(format!("[a-z]{{{n}}}"));
    let one = constraint::bytes(&all.compiler.compile(&grammar(5)).unwrap().parser);
    let grammars = Grammars { budget: MemoryBudget::new(one * 5 / 2), ..all };
    let running = grammars.start(&grammar(5)).unwrap();
    assert_eq!(grammars.cached.lock().unwrap().len(), 1);
    let other = grammars.start(&grammar(6)).unwrap();
    assert!(grammars.cached.lock().unwrap().is_empty(), "running requests come before the cache");
    assert!(matches!(grammars.start(&grammar(7)), Err(SubmitError::Busy { .. })));
    drop((running, other));
    grammars.start(&grammar(7)).unwrap();
    let small = Grammars { budget: MemoryBudget::new(one / 2), ..grammars };
    assert!(matches!(small.start(&grammar(5)), Err(SubmitError::Invalid { .. })));
}

#[test]
fn messages_lose_their_marks() {
    assert_eq!(plain("bad\n<non-verbose/>"), "bad");
    assert_eq!(plain("panic: x\n<backtrace>\n0: y\n</backtrace>"), "panic: x");
    assert_eq!(plain("fine"), "fine");
    assert_eq!(shortened("éàü", 2), "éà...");
}

#[test]
fn a_running_request_of_an_ordinary_schema_takes_2_mib() {
    let grammars = grammars();
    let schema = json(
        r#"{"type": "object", "required": ["name", "price", "tags"], "additionalProperties": false, "properties": {
            "name": {"type": "string"}, "price": {"type": "number"},
            "tags": {"type": "array", "items": {"enum": ["red", "green"]}}}}"#,
    );
    let mut constraint = grammars.start(&schema).unwrap();
    let vocabulary = grammars.model.tokenizer().len();
    for step in 0..200 {
        let ids = allowed(&mut constraint, vocabulary);
        if constraint.accept(ids[(step * 7919) % ids.len()]).unwrap() {
            break;
        }
    }
    let used = grammars.budget.used();
    println!("{used} bytes");
    assert!(used < 2 * 2 * 1024 * 1024, "{used} bytes with the cached grammar");
}
