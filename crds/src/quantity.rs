//! An amount of a resource as Kubernetes writes it: `2`, `"500m"`, `"1Gi"`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// An amount of a resource. Users write a number or a string; it is stored as the string that Kubernetes
/// accepts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

impl Quantity {
    /// The amount as bytes, where it is a whole number with or without a suffix; none for fractions,
    /// exponents and what does not fit.
    #[must_use]
    pub fn whole_bytes(&self) -> Option<u64> {
        let text = self.0.trim_start_matches('+');
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = text.split_at(digits);
        let unit: u64 = match suffix {
            "" => 1,
            "k" => 1000,
            "M" => 1000_u64.pow(2),
            "G" => 1000_u64.pow(3),
            "T" => 1000_u64.pow(4),
            "P" => 1000_u64.pow(5),
            "E" => 1000_u64.pow(6),
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            "Pi" => 1 << 50,
            "Ei" => 1 << 60,
            _ => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(unit)
    }
}

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
    fn whole_amounts_are_bytes_and_others_are_none() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("+7", Some(7)),
            ("3k", Some(3000)),
            ("16Mi", Some(16 << 20)),
            ("20Gi", Some(20 << 30)),
            ("2E", Some(2_000_000_000_000_000_000)),
            ("99Ei", None),
            ("1.5Gi", None),
            ("1e3", None),
            ("500m", None),
            ("Gi", None),
            ("", None),
        ] {
            assert_eq!(Quantity(text.to_owned()).whole_bytes(), bytes, "{text}");
        }
    }

    #[test]
    fn numbers_and_strings_are_accepted() {
        assert_eq!(serde_yaml::from_str::<Quantity>("2").unwrap(), Quantity("2".to_owned()));
        assert_eq!(serde_yaml::from_str::<Quantity>("500m").unwrap(), Quantity("500m".to_owned()));
        assert_eq!(serde_json::to_string(&Quantity("1Gi".to_owned())).unwrap(), "\"1Gi\"");
        assert!(serde_yaml::from_str::<Quantity>("{a: 1}").is_err());
    }
}
