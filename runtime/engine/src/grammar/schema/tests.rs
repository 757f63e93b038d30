//! Schemas that are rewritten, with what the compiler gets, and schemas that are refused, with the words.

use super::*;

fn rewritten(text: &str) -> Result<Value, String> {
    let document = Json::parse(text).unwrap();
    let mut schema = rewrite(&document, " ").map_err(|refusal| refusal.to_string())?.schema;
    schema.as_object_mut().unwrap().remove("x-guidance");
    Ok(schema)
}

#[test]
fn keywords_that_the_compiler_lacks_become_ones_that_it_has() {
    for (schema, expected) in [
        (r#"{"type": "array", "uniqueItems": false}"#, r#"{"type": "array"}"#),
        (r#"{"type": "array", "maxItems": 1, "uniqueItems": true}"#, r#"{"type": "array", "maxItems": 1}"#),
        (
            r#"{"$schema": "http://json-schema.org/draft-04/schema#", "const": 1, "title": "t"}"#,
            r#"{"const": 1}"#,
        ),
        (
            r#"{"items": [{"const": 1}], "additionalItems": false}"#,
            r#"{"prefixItems": [{"const": 1}], "items": false}"#,
        ),
        (
            r#"{"type": "integer", "minimum": 1, "exclusiveMinimum": true, "maximum": 2.5}"#,
            r#"{"type": "integer", "minimum": 2, "maximum": 2}"#,
        ),
        (r#"{"required": ["a"], "dependentRequired": {"a": ["b"]}}"#, r#"{"required": ["a", "b"]}"#),
        (r#"{"unevaluatedProperties": false}"#, r#"{"additionalProperties": false}"#),
        (r#"{"propertyNames": {"type": "string"}, "if": {}, "not": false}"#, "{}"),
        (r#"{"minLength": 2.0, "type": ["string", "string"]}"#, r#"{"minLength": 2, "type": ["string"]}"#),
        (r#"{"oneOf": [{"const": 1}, {"const": 2}]}"#, r#"{"anyOf": [{"const": 1}, {"const": 2}]}"#),
        (r#"{"type": "integer", "format": "int64"}"#, r#"{"type": "integer"}"#),
        (
            r##"{"allOf": [{"$ref": "#/a~1b"}], "properties": {"x": {}}, "additionalProperties": false, "a/b": {}}"##,
            r##"{"allOf": [{"$ref": "#/$defs/r0"}], "properties": {"x": {}}, "additionalProperties": false,
                "$defs": {"r0": {}}}"##,
        ),
    ] {
        let expected: Value = serde_json::from_str(expected).unwrap();
        assert_eq!(rewritten(schema).unwrap().to_string(), expected.to_string(), "{schema}");
    }
}

#[test]
fn integers_keep_their_value_or_are_refused() {
    let integer = |bounds: &str| rewritten(&format!(r#"{{"type": "integer", {bounds}}}"#));
    for (bounds, low, high) in [
        (
            r#""minimum": -9223372036854775808, "maximum": 9223372036854775807"#,
            Some(-9223372036854774784),
            Some(i64::MAX),
        ),
        (r#""minimum": 0, "maximum": 18446744073709551615"#, Some(0), Some(i64::MAX)),
        (r#""exclusiveMinimum": 0, "exclusiveMaximum": 9223372036854775808"#, Some(1), Some(i64::MAX)),
        (r#""minimum": 1152921504606846976"#, Some(1152921504606846976), Some(i64::MAX)),
        (r#""minimum": 1e3, "maximum": 1.5e3"#, Some(1000), Some(1500)),
        (r#""maximum": -1e18"#, Some(-9223372036854774784), Some(-1_000_000_000_000_000_000)),
    ] {
        let schema = integer(bounds).unwrap();
        assert_eq!(
            (schema.get("minimum").and_then(Value::as_i64), schema.get("maximum").and_then(Value::as_i64)),
            (low, high),
            "{bounds}"
        );
    }
    for (bounds, words) in [
        (r#""minimum": 9007199254740993"#, r#""minimum" at "/": 9007199254740993"#),
        (r#""exclusiveMaximum": 9007199254740994"#, r#""exclusiveMaximum" at "/": 9007199254740993"#),
        (r#""minimum": 1e19"#, "no 64-bit integer"),
        (r#""maximum": -1e400"#, "no 64-bit integer"),
        (r#""minimum": "1""#, "a number is expected"),
        (r#""multipleOf": 0"#, "above 0"),
        (r#""multipleOf": 9007199254740993"#, r#""multipleOf" at "/": 9007199254740993"#),
        (r#""multipleOf": 1000000000"#, "too many digits"),
    ] {
        let error = integer(bounds).unwrap_err();
        assert!(error.contains(words), "{bounds}: {error}");
    }
}

#[test]
fn constants_keep_their_value_or_are_refused() {
    for value in [
        "9223372036854775807",
        "-9223372036854774784",
        "1152921504606846976",
        "0.1",
        "-2.5e-7",
        "1e22",
        "[{\"a\":1.5}]",
    ] {
        assert!(rewritten(&format!(r#"{{"const": {value}}}"#)).is_ok(), "{value}");
    }
    for value in [
        "-9223372036854775808",
        "-9223372036854775296",
        "9007199254740993",
        "12345678901234567890123",
        "0.1000000000000000055",
        "1e400",
        "1e-400",
        "[[{\"a\": -9223372036854775808}]]",
    ] {
        let error = rewritten(&format!(r#"{{"properties": {{"x": {{"enum": [{value}]}}}}}}"#)).unwrap_err();
        assert!(error.starts_with("\"enum\" at \"/properties/x\": ") && error.contains("string"), "{error}");
    }
}

#[test]
fn numbers_that_combine_are_checked_together() {
    for (schema, words) in [
        (r#"{"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}"#, "open"),
        (r#"{"type": "number", "exclusiveMaximum": -3, "minimum": -3.7}"#, "open"),
        (r#"{"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}"#, "open"),
        (r#"{"allOf": [{"multipleOf": 65536}, {"multipleOf": 65537}]}"#, "too large"),
        (r#"{"type": "number", "minimum": 1e18}"#, "too large a bound"),
        (r#"{"type": "number", "maximum": 0.12345678901234567890}"#, "more digits"),
    ] {
        let error = rewritten(schema).unwrap_err();
        assert!(error.contains(words), "{schema}: {error}");
    }
    for schema in [
        r#"{"type": "number", "exclusiveMinimum": 0, "maximum": 1}"#,
        r#"{"type": "number", "minimum": -3.4028235e38, "maximum": 3.4028235e38}"#,
        r#"{"type": "number", "multipleOf": 0.01, "minimum": -0.0}"#,
        r#"{"allOf": [{"multipleOf": 0.3}, {"multipleOf": 14}]}"#,
    ] {
        rewritten(schema).unwrap();
    }
}

#[test]
fn one_of_is_any_of_where_its_schemas_exclude_each_other() {
    let exclusive = [
        r#"{"enum": [1, 2]}, {"enum": [3, 4.5]}"#,
        r#"{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}"#,
        r#"{"type": "number", "maximum": 3}, {"type": "number", "exclusiveMinimum": 3}"#,
        r#"{"type": "array", "minItems": 1, "prefixItems": [{"const": "a"}]},
           {"type": "array", "minItems": 1, "prefixItems": [{"const": "b"}]}"#,
        r#"{"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2}"#,
        r#"{"type": "object", "required": ["k"], "properties": {"k": {"const": 1}}},
           {"type": "object", "required": ["k"], "properties": {"k": {"const": 2}}}"#,
        r#"{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 3}, {"type": "null"}"#,
        r##"{"$ref": "#/x"}, {"type": ["object", "null"], "properties": {"kind": {"const": 2}}}"##,
        r#"{"anyOf": [{"const": 1}, {"type": "null"}]}, {"anyOf": [{"const": 2}, {"type": "string"}]}"#,
        r#"{"type": "integer"}, {"const": 1.5}"#,
    ];
    for list in exclusive {
        let text = format!(
            r#"{{"oneOf": [{list}], "x": {{"type": "object", "required": ["kind"], "properties": {{"kind": {{"const": 1}}}}}}}}"#
        );
        let schema = rewritten(&text).unwrap();
        assert!(schema.get("anyOf").is_some() && schema.get("oneOf").is_none(), "{list}");
    }
    let overlapping = [
        r#"{"enum": [1, 2]}, {"enum": [2, 3]}"#,
        r#"{"type": "integer", "maximum": 3}, {"type": "number", "minimum": 3}"#,
        r#"{"maximum": 3}, {"minimum": 4}"#,
        r#"{"type": "array", "prefixItems": [{"const": "a"}]}, {"type": "array", "prefixItems": [{"const": "b"}]}"#,
        r#"{"type": "object", "properties": {"k": {"const": 1}}}, {"type": "object", "properties": {"k": {"const": 2}}}"#,
        r#"{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}"#,
        r#"{"const": 1}, {"const": 1.0}"#,
        "{}, {}",
    ];
    for list in overlapping {
        assert!(rewritten(&format!(r#"{{"oneOf": [{list}]}}"#)).unwrap().get("oneOf").is_some(), "{list}");
    }
}

#[test]
fn what_is_not_honoured_is_refused_with_keyword_and_path() {
    let deep_list = |keyword: &str| format!(r#"{{"properties": {{"a/b": {{"items": {{{keyword}}}}}}}}}"#);
    for (keyword, words) in [
        (r#""uniqueItems": true"#, "uniqueItems"),
        (r#""contains": {"const": 1}"#, "contains"),
        (r#""not": {"const": 1}"#, "not"),
        (r#""if": {"const": 1}, "then": {"const": 1}"#, "if"),
        (r#""propertyNames": {"pattern": "^x"}"#, "propertyNames"),
        (r#""dependentRequired": {"a": ["b"]}"#, "dependentRequired"),
        (r#""dependentSchemas": {"a": {}}"#, "dependentSchemas"),
        (r##""$dynamicRef": "#a""##, "$dynamicRef"),
        (r##""$ref": "http://127.0.0.1/x""##, "$ref"),
        (r#""x-guidance": {"lenient": true}"#, "x-guidance"),
        (r#""maxLenght": 3"#, "maxLenght"),
        (r#""format": "colour""#, "format"),
        (r#""format": "unknown""#, "format"),
        (r#""pattern": "(?=a)""#, "pattern"),
        (r#""type": "text""#, "type"),
        (r#""type": []"#, "type"),
        (r#""enum": []"#, "enum"),
        (r#""required": "a""#, "required"),
        (r#""minItems": -1"#, "minItems"),
        (r#""minProperties": 2"#, "minProperties"),
        (r#""anyOf": [], "x": 1"#, "anyOf"),
        (r#""unevaluatedProperties": false, "anyOf": [{}]"#, "unevaluatedProperties"),
    ] {
        let error = rewritten(&deep_list(keyword)).unwrap_err();
        let expected = format!("\"{words}\" at \"/properties/a~1b/items\": ");
        assert!(error.starts_with(&expected) && error.len() < 300, "{keyword}: {error}");
    }
}

#[test]
fn refusals_quote_little_of_what_came_in() {
    let long = "k".repeat(50_000);
    for schema in [
        format!(r#"{{"type": "{long}"}}"#),
        format!(r##"{{"$ref": "#/{long}"}}"##),
        format!(r#"{{"pattern": "{long}("}}"#),
        format!(r#"{{"format": "{long}"}}"#),
        format!(r#"{{"properties": {{"{long}": {{"uniqueItems": true}}}}}}"#),
        format!(r#"{{"const": {}}}"#, "1".repeat(50_000)),
        format!(r#"{{"dependentRequired": {{"{long}": ["a"]}}}}"#),
    ] {
        let error = rewritten(&schema).unwrap_err();
        assert!(error.len() < 400, "{} bytes: {:.100}", error.len(), error);
    }
}

#[test]
fn large_schemas_are_refused_before_they_are_combined() {
    let option = |n: usize| format!(r#"{{"properties": {{"p{n}": {{"const": {n}}}}}}}"#);
    let options = (0..2000).map(option).collect::<Vec<_>>().join(",");
    let text = "x".repeat(50_000);
    let product = format!(r#"{{"anyOf": [{options}], "properties": {{"a": {{"const": "{text}"}}}}}}"#);
    assert!(rewritten(&product).unwrap_err().contains("multiply"));
    let many = format!(r#"{{"allOf": [{}]}}"#, vec!["{}"; 2000].join(","));
    assert!(rewritten(&many).unwrap_err().contains("combined"));
    let flat = vec!["true"; 21_000].join(",");
    assert!(rewritten(&format!(r#"{{"anyOf": [{flat}]}}"#)).unwrap_err().contains("schemas"));
    let patterns = (0..9).map(|n| format!(r#"{{"pattern": "{n}"}}"#)).collect::<Vec<_>>().join(",");
    assert!(rewritten(&format!(r#"{{"allOf": [{patterns}]}}"#)).unwrap_err().contains("patterns hold"));
    let names = (0..65).map(|n| format!(r#""^a{n}": {{}}"#)).collect::<Vec<_>>().join(",");
    assert!(
        rewritten(&format!(r#"{{"patternProperties": {{{names}}}}}"#)).unwrap_err().contains("at most 64")
    );
    let wide = (0..2000).map(|n| format!(r#""p{n}": {{"type": "integer"}}"#)).collect::<Vec<_>>().join(",");
    let optional = rewritten(&format!(r#"{{"type": "object", "properties": {{{wide}}}}}"#)).unwrap_err();
    assert!(optional.contains("2000 are not required"), "{optional}");
    let names = (0..2000).map(|n| format!(r#""p{n}""#)).collect::<Vec<_>>().join(",");
    rewritten(&format!(r#"{{"type": "object", "required": [{names}], "properties": {{{wide}}}}}"#)).unwrap();
}
