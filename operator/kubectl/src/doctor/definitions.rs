//! Whether the CustomResourceDefinitions of a cluster are those of this version, by the fields that they
//! have.
//!
//! Defaults are not compared, because an installation chooses some of them.

use std::collections::BTreeSet;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use trustformers_crds::VERSION;

/// Fields that a message names; the rest is a number.
const NAMED_FIELDS: usize = 4;

/// A definition of this version, and the one that is installed.
#[derive(Debug, Clone)]
pub struct DefinitionFacts {
    /// Its name.
    pub name: String,
    /// The definition of this version.
    pub own: Box<CustomResourceDefinition>,
    /// The definition that is installed, if it can be read.
    pub installed: Result<Option<Box<CustomResourceDefinition>>, String>,
}

/// How an installed definition differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// It is the one of this version.
    None,
    /// It does not serve the version of the API.
    NotServed,
    /// It lacks fields of this version.
    Older(String),
    /// It has fields that this version does not have.
    Newer(String),
}

/// Compares the fields of two definitions.
#[must_use]
pub fn difference(own: &CustomResourceDefinition, installed: &CustomResourceDefinition) -> Difference {
    let Some(of_installed) = fields_of(installed) else { return Difference::NotServed };
    let of_own = fields_of(own).unwrap_or_default();
    let missing: Vec<&String> = of_own.difference(&of_installed).collect();
    let unknown: Vec<&String> = of_installed.difference(&of_own).collect();
    match (missing.is_empty(), unknown.is_empty()) {
        (true, true) => Difference::None,
        (false, _) => Difference::Older(named(&missing)),
        (true, false) => Difference::Newer(named(&unknown)),
    }
}

fn named(fields: &[&String]) -> String {
    let shown: Vec<&str> = fields.iter().take(NAMED_FIELDS).map(|field| field.as_str()).collect();
    match fields.len().saturating_sub(NAMED_FIELDS) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The paths of all fields of the version that is served; none if it is not served.
fn fields_of(definition: &CustomResourceDefinition) -> Option<BTreeSet<String>> {
    let version = definition.spec.versions.iter().find(|one| one.name == VERSION && one.served)?;
    let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
    let mut fields = BTreeSet::new();
    if let Some(schema) = schema {
        walk(schema, "", &mut fields);
    }
    // Those of every object; an API server may leave them out.
    fields.retain(|field| !matches!(field.as_str(), "apiVersion" | "kind" | "metadata"));
    Some(fields)
}

fn walk(schema: &JSONSchemaProps, path: &str, fields: &mut BTreeSet<String>) {
    for (name, property) in schema.properties.iter().flatten() {
        let field = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        walk(property, &field, fields);
        fields.insert(field);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        walk(items, &format!("{path}[]"), fields);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        walk(values, &format!("{path}{{}}"), fields);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::CustomResourceExt;
    use trustformers_crds::InferenceModel;

    /// The definition with one field of `spec.source` renamed.
    fn renamed(from: &str, to: Option<&str>) -> CustomResourceDefinition {
        let mut definition = InferenceModel::crd();
        let version = definition.spec.versions.first_mut().unwrap();
        let schema = version.schema.as_mut().unwrap().open_api_v3_schema.as_mut().unwrap();
        let spec = schema.properties.as_mut().unwrap().get_mut("spec").unwrap();
        let source = spec.properties.as_mut().unwrap().get_mut("source").unwrap();
        let properties = source.properties.as_mut().unwrap();
        let value = properties.get(from).unwrap().clone();
        match to {
            Some(to) => properties.insert(to.to_owned(), value),
            None => properties.remove(from),
        };
        definition
    }

    #[test]
    fn definitions_are_compared_by_their_fields() {
        let own = InferenceModel::crd();
        assert_eq!(difference(&own, &own), Difference::None);
        let older = Difference::Older("spec.source.sha256".to_owned());
        assert_eq!(difference(&own, &renamed("sha256", None)), older);
        let newer = Difference::Newer("spec.source.signature".to_owned());
        assert_eq!(difference(&own, &renamed("sha256", Some("signature"))), newer);
    }

    #[test]
    fn fields_of_lists_are_compared_too() {
        let fields = fields_of(&InferenceModel::crd()).unwrap();
        assert!(fields.contains("spec.rollout.steps[].weight"), "{fields:?}");
        assert!(fields.contains("status.conditions[].reason"));
    }

    #[test]
    fn a_definition_that_does_not_serve_the_version_is_named() {
        let mut other = InferenceModel::crd();
        other.spec.versions.first_mut().unwrap().name = "v2".to_owned();
        assert_eq!(difference(&InferenceModel::crd(), &other), Difference::NotServed);
    }

    #[test]
    fn of_many_fields_the_first_are_named() {
        let fields: Vec<String> = (0..6).map(|field| format!("f{field}")).collect();
        assert_eq!(named(&fields.iter().collect::<Vec<_>>()), "f0, f1, f2, f3 and 2 more");
    }
}
