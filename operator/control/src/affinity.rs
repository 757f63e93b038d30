//! Rules about nodes and other pods: the schema lets everything through below three names, so that they are
//! read here.

use k8s_openapi::api::core::v1::Affinity;
use serde_json::Value;

/// Longest text of the rules: they are part of each pod.
const MAX_BYTES: usize = 16 * 1024;

/// Why rules about nodes and pods cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AffinityError {
    /// A field has another type, or is missing.
    #[error("spec.pod.affinity: {0}; write it as in a pod")]
    Malformed(String),
    /// Kubernetes has no such field.
    #[error("spec.pod.affinity: Kubernetes does not know {0}; see kubectl explain pod.spec.affinity")]
    Unknown(String),
    /// The rules are too long.
    #[error("spec.pod.affinity: has {0} bytes as JSON; give at most {MAX_BYTES}")]
    TooLong(usize),
}

/// Reads the rules as Kubernetes does.
///
/// # Errors
/// The first thing that Kubernetes would refuse, or drop.
pub fn parse(written: &Value) -> Result<Affinity, AffinityError> {
    let bytes = written.to_string().len();
    if bytes > MAX_BYTES {
        return Err(AffinityError::TooLong(bytes));
    }
    let malformed = |error: serde_json::Error| AffinityError::Malformed(error.to_string());
    let affinity: Affinity = serde_json::from_value(written.clone()).map_err(malformed)?;
    let read = serde_json::to_value(&affinity).map_err(malformed)?;
    match dropped(written, &read, "") {
        Some(path) => Err(AffinityError::Unknown(path)),
        None => Ok(affinity),
    }
}

/// The path of the first field that was written and not read.
fn dropped(written: &Value, read: &Value, path: &str) -> Option<String> {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => written.iter().find_map(|(name, value)| {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match read.get(name) {
                Some(read) => dropped(value, read, &path),
                None => (!value.is_null()).then_some(path),
            }
        }),
        (Value::Array(written), Value::Array(read)) => {
            let mut pairs = written.iter().zip(read).enumerate();
            pairs.find_map(|(index, (one, other))| dropped(one, other, &format!("{path}[{index}]")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_are_read_as_in_a_pod() {
        let term = json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]});
        let rules = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [term]}}});
        let affinity = parse(&rules).unwrap();
        assert_eq!(serde_json::to_value(affinity).unwrap(), rules);
    }

    #[test]
    fn what_kubernetes_would_refuse_or_drop_is_named() {
        let error = |rules| parse(&rules).unwrap_err().to_string();
        let unknown = error(json!({"nodeAffinity": {"required": {"nodeSelectorTerms": []}}}));
        assert!(unknown.contains("does not know nodeAffinity.required;"), "{unknown}");
        let below = error(json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            [{"topologyKey": "zone", "labels": {}}]}}));
        assert!(below.contains("Execution[0].labels;"), "{below}");
        let malformed = error(json!({"nodeAffinity": 5}));
        assert!(malformed.starts_with("spec.pod.affinity: ") && malformed.ends_with("as in a pod"));
        let long = error(json!({"podAffinity": {"x": "a".repeat(MAX_BYTES)}}));
        assert!(long.contains("give at most"), "{long}");
    }
}
