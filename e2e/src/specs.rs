//! Specs that the API server must refuse, from one table, `e2e/tests/scenarios/specs/refused.yaml`.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

/// Where the table is, below the repository.
const TABLE: &str = "e2e/tests/scenarios/specs/refused.yaml";
/// Where the whole messages are, below the repository.
pub const MESSAGES: &str = "e2e/tests/scenarios/specs/refused.txt";

/// One spec that must be refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusedSpec {
    /// Its name in the table.
    pub case: String,
    /// `InferenceModel` or `ABTest`.
    #[serde(default = "model")]
    pub kind: String,
    /// Name of the object.
    #[serde(default = "some_name")]
    pub name: String,
    /// What differs from the base of its kind; null removes a field.
    set: Value,
    /// What the message must contain: the field, and what to do or what is allowed.
    pub says: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    bases: BTreeMap<String, Value>,
    cases: Vec<RefusedSpec>,
}

fn model() -> String {
    "InferenceModel".to_owned()
}

fn some_name() -> String {
    "refused".to_owned()
}

/// A case with its whole object.
#[derive(Debug)]
pub struct RefusedObject {
    /// The case.
    pub spec: RefusedSpec,
    /// The object.
    pub object: Value,
}

/// Reads the table.
///
/// # Errors
/// When it cannot be read, or a case has a kind without a base.
pub fn refused(repository: &Path) -> Result<Vec<RefusedObject>> {
    let text = std::fs::read_to_string(repository.join(TABLE)).context(TABLE)?;
    let Table { bases, cases } = serde_yaml::from_str(&text).context(TABLE)?;
    let object = |spec: RefusedSpec| {
        let base = bases.get(&spec.kind);
        let mut whole = base.with_context(|| format!("{TABLE}: no base for {}", spec.kind))?.clone();
        merge(&mut whole, &spec.set);
        let object = json!({
            "apiVersion": "serving.trustformers.dev/v1alpha1", "kind": spec.kind,
            "metadata": {"name": spec.name}, "spec": whole,
        });
        anyhow::Ok(RefusedObject { spec, object })
    };
    cases.into_iter().map(object).collect()
}

/// Merges objects as a JSON merge patch does.
fn merge(target: &mut Value, change: &Value) {
    let Some(fields) = change.as_object() else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Some(object) = target.as_object_mut() else { return };
    for (name, value) in fields {
        if value.is_null() {
            object.remove(name);
        } else {
            merge(object.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn repository() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
    }

    /// The messages of all rules below a node of a definition.
    fn messages(node: &Value, found: &mut BTreeSet<String>) {
        for rule in node["x-kubernetes-validations"].as_array().into_iter().flatten() {
            found.insert(rule["message"].as_str().unwrap().to_owned());
        }
        let children: Vec<&Value> = match node {
            Value::Object(fields) => fields.values().collect(),
            Value::Array(items) => items.iter().collect(),
            _ => Vec::new(),
        };
        for child in children {
            messages(child, found);
        }
    }

    #[test]
    fn every_rule_of_the_definitions_has_a_case() {
        let mut rules = BTreeSet::new();
        for file in ["inferencemodels", "abtests"] {
            let path = repository().join(format!("charts/trustformers/files/{file}.yaml"));
            let definition: Value = serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            messages(&definition, &mut rules);
        }
        let cases = refused(repository()).unwrap();
        let is_shown = |rule: &&String| {
            // The field alone is the beginning of several messages.
            let mut says = cases.iter().flat_map(|case| &case.spec.says).filter(|text| text.len() > 24);
            says.any(|text| rule.contains(text.as_str()))
        };
        let missing: Vec<&String> = rules.iter().filter(|rule| !is_shown(rule)).collect();
        assert!(!rules.is_empty() && missing.is_empty(), "add cases to {TABLE} for: {missing:#?}");
    }

    #[test]
    fn there_are_enough_cases_and_each_has_its_own_name() {
        let cases = refused(repository()).unwrap();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.spec.case.as_str()).collect();
        assert!(
            cases.len() >= 60 && names.len() == cases.len(),
            "{} cases, {} names",
            cases.len(),
            names.len()
        );
        assert!(cases.iter().all(|case| !case.spec.says.is_empty()));
    }

    #[test]
    fn a_change_replaces_lists_and_removes_what_is_null() {
        let mut base = json!({"a": {"b": 1, "c": [1, 2]}, "d": 2});
        merge(&mut base, &json!({"a": {"c": [3], "e": {"f": 1}}, "d": null}));
        assert_eq!(base, json!({"a": {"b": 1, "c": [3], "e": {"f": 1}}}));
    }
}
