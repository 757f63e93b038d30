//! Which spec a test runs by: the newest one, or the last one that could be honoured.

use super::super::validate::{TestSpecError, ValidatedTest};
use super::TestFacts;

/// A spec that was read, and what the cluster shows of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The spec.
    pub test: ValidatedTest,
    /// The cluster.
    pub facts: TestFacts,
}

/// Why a newer spec is not followed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// For the condition `Accepted`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Planned {
    /// What keeps samples by this spec from beginning.
    fn obstacle(&self) -> Option<Waiting> {
        if let Some(conflict) = &self.facts.conflict {
            return Some(Waiting { reason: conflict.into(), message: conflict.to_string() });
        }
        let without_pods = self.test.variants.iter().zip(&self.facts.revisions);
        let without_pods = without_pods.filter(|(_, revisions)| revisions.is_empty());
        let names: Vec<&str> = without_pods.map(|(variant, _)| variant.name.as_str()).collect();
        let message = format!("no pod serves {} of the new spec", names.join(", "));
        (!names.is_empty()).then_some(Waiting { reason: "VariantNotServing", message })
    }
}

/// The spec that a test runs by. `wanted` is the newest one, `running` the last one that could be honoured,
/// where samples have begun: it stays in force, with its guardrails, until the newest one can be.
///
/// # Errors
/// The newest spec cannot be honoured, and there is no other.
pub fn plan(
    wanted: Result<Planned, TestSpecError>,
    running: Option<Planned>,
) -> Result<Planned, TestSpecError> {
    let waits = |running: Planned, waiting: Waiting| Planned {
        facts: TestFacts { waiting: Some(waiting), ..running.facts },
        test: running.test,
    };
    match (wanted, running) {
        (Err(error), None) => Err(error),
        (Err(error), Some(running)) => {
            Ok(waits(running, Waiting { reason: "InvalidSpec", message: error.to_string() }))
        }
        (Ok(wanted), Some(running)) if wanted.test.samples_of != running.test.samples_of => {
            Ok(match wanted.obstacle() {
                Some(waiting) => waits(running, waiting),
                None => wanted,
            })
        }
        (Ok(wanted), _) => Ok(wanted),
    }
}
