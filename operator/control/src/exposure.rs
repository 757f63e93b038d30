//! What Gateways report of a model's HTTPRoute.

use serde_json::Value;

use crate::causes::Cause;

/// What Gateways report of an HTTPRoute: whether they take its requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteReport {
    /// Why one of them does not; none if all do.
    pub problem: Option<Cause>,
}

impl RouteReport {
    /// Reads the status of an HTTPRoute; none while no Gateway has accepted or refused it.
    #[must_use]
    pub fn of(status: &Value) -> Option<Self> {
        let parents = status["parents"].as_array().into_iter().flatten();
        let conditions = parents.flat_map(|parent| {
            let name = parent["parentRef"]["name"].as_str().unwrap_or_default();
            parent["conditions"].as_array().into_iter().flatten().map(move |one| (name, one))
        });
        let judged: Vec<(&str, &Value)> = conditions.filter(|(_, one)| is_judged(one)).collect();
        if judged.is_empty() {
            return None;
        }
        let refused = judged.into_iter().find(|(_, one)| one["status"] == "False");
        let problem = refused.map(|(name, one)| Cause {
            reason: one["reason"].as_str().unwrap_or("Refused").to_owned(),
            message: format!("Gateway {name}: {}", one["message"].as_str().unwrap_or_default()),
        });
        Some(Self { problem })
    }
}

/// Whether a condition of a Gateway says that requests get to the model.
fn is_judged(one: &Value) -> bool {
    matches!(one["type"].as_str(), Some("Accepted" | "ResolvedRefs"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status(conditions: &Value) -> Value {
        json!({"parents": [{"parentRef": {"name": "public"}, "conditions": conditions}]})
    }

    #[test]
    fn a_route_is_judged_when_a_gateway_has_reported() {
        assert_eq!(RouteReport::of(&json!({})), None);
        assert_eq!(RouteReport::of(&status(&json!([{"type": "Programmed", "status": "False"}]))), None);
        let accepted =
            json!([{"type": "Accepted", "status": "True"}, {"type": "ResolvedRefs", "status": "True"}]);
        assert_eq!(RouteReport::of(&status(&accepted)), Some(RouteReport { problem: None }));
    }

    #[test]
    fn a_refusal_names_the_gateway_and_the_reason() {
        let refused = json!([
            {"type": "Accepted", "status": "True", "reason": "Accepted"},
            {"type": "ResolvedRefs", "status": "False", "reason": "RefNotPermitted", "message": "no grant"}]);
        let problem = RouteReport::of(&status(&refused)).unwrap().problem.unwrap();
        assert_eq!(
            (problem.reason.as_str(), problem.message.as_str()),
            ("RefNotPermitted", "Gateway public: no grant")
        );
    }
}
