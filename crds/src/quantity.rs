//! An amount of a resource as Kubernetes writes it: `2`, `"500m"`, `"1Gi"`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// An amount of a resource. Users write a number or a string; it is stored as the string that Kubernetes
/// accepts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Integer(i64),
            Text(String),
        }
        Ok(Self(match Written::deserialize(deserializer)? {
            Written::Integer(number) => number.to_string(),
            Written::Text(text) => text,
        }))
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 32,
            "pattern": "^[+]?([0-9]+([.][0-9]*)?|[.][0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][-+]?[0-9]+))?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_strings_are_accepted() {
        assert_eq!(serde_yaml::from_str::<Quantity>("2").unwrap(), Quantity("2".to_owned()));
        assert_eq!(serde_yaml::from_str::<Quantity>("500m").unwrap(), Quantity("500m".to_owned()));
        assert_eq!(serde_json::to_string(&Quantity("1Gi".to_owned())).unwrap(), "\"1Gi\"");
        assert!(serde_yaml::from_str::<Quantity>("{a: 1}").is_err());
    }
}
