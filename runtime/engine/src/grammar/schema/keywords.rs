//! The words of JSON Schema: which constrain an answer, which only describe it.

use strsim::damerau_levenshtein;

/// Keywords that are honoured.
pub(super) const HONOURED: &[&str] = &[
    "$ref",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "dependentRequired",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "required",
    "type",
];

/// Keywords that constrain an answer and are honoured only where they change nothing.
pub(super) const LIMITED: &[&str] = &[
    "contains",
    "dependencies",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
];

/// Constraints of other drafts and vocabularies, and settings of the grammar compiler: always refused.
pub(super) const REFUSED: &[&str] = &[
    "$dynamicRef",
    "$recursiveRef",
    "disallow",
    "divisibleBy",
    "extends",
    "formatExclusiveMaximum",
    "formatExclusiveMinimum",
    "formatMaximum",
    "formatMinimum",
    "x-guidance",
];

/// Annotations, and keywords that only name a schema. They change nothing in an answer.
const ANNOTATIONS: &[&str] = &[
    "$anchor",
    "$comment",
    "$defs",
    "$dynamicAnchor",
    "$id",
    "$recursiveAnchor",
    "$schema",
    "$vocabulary",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "discriminator",
    "example",
    "examples",
    "externalDocs",
    "id",
    "nullable",
    "readOnly",
    "title",
    "writeOnly",
    "xml",
];

/// Shorter names than this are too close to many others to be called misspelt.
const MISSPELT_MIN_CHARS: usize = 6;

/// Longer names than this are no misspelt keyword; the comparison takes their length squared.
const MISSPELT_MAX_CHARS: usize = 40;

/// The constraint that an unsupported keyword probably means. JSON Schema takes every unsupported keyword as
/// an annotation, so that `maxLenght` would silently constrain nothing. A name such as `_format` is no slip:
/// so authors switch a keyword off.
pub(super) fn misspelt(name: &str) -> Option<&'static str> {
    let own = name.starts_with("x-") || name.starts_with('_');
    if ANNOTATIONS.contains(&name) || own || name.len() > MISSPELT_MAX_CHARS {
        return None;
    }
    let long = name.len() >= MISSPELT_MIN_CHARS;
    HONOURED.iter().chain(LIMITED).copied().find(|keyword| {
        keyword.eq_ignore_ascii_case(name)
            || (long && keyword.len() >= MISSPELT_MIN_CHARS && damerau_levenshtein(name, keyword) <= 2)
            || (long && keyword.starts_with(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_constraints_are_found_and_annotations_are_not() {
        for (name, keyword) in [
            ("maxLenght", "maxLength"),
            ("exclusiveMin", "exclusiveMaximum"),
            ("MINIMUM", "minimum"),
            ("requires", "required"),
        ] {
            assert!(misspelt(name).is_some(), "{name} {keyword}");
        }
        for name in [
            "title",
            "x-order",
            "_format",
            "propertyOrder",
            "enumNames",
            "markdownDescription",
            "examples",
            "tsType",
        ] {
            assert_eq!(misspelt(name), None, "{name}");
        }
    }
}
