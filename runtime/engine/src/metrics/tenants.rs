//! The series of the tokens that each tenant was served.
//!
//! A tenant's name comes with its requests, and each new label value is memory for ever. So only the first
//! names get series of their own.

use super::FamilyRegistrar;
use prometheus::{IntCounter, IntCounterVec};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Tenants with a series of their own. A name has at most 256 bytes, so that the names of one model take at
/// most 16 KiB of a scrape.
const MAX_TENANTS: usize = 64;

/// The label of all other tenants.
const OTHERS: &str = "(others)";

/// The family, by the labels `model` and `tenant`, and the names that are in use.
#[derive(Clone)]
pub(super) struct TenantFamilies {
    tokens: IntCounterVec,
    names: Arc<Mutex<HashSet<String>>>,
}

/// The series of one model.
#[derive(Clone)]
pub(crate) struct TenantMetrics {
    families: TenantFamilies,
    label: Arc<str>,
}

impl std::fmt::Debug for TenantMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TenantMetrics")
    }
}

impl TenantFamilies {
    pub(super) fn register(registrar: &FamilyRegistrar<'_>) -> Result<Self, prometheus::Error> {
        let tokens = registrar.counter(
            "trustformers_tenant_served_tokens_total",
            "Tokens that were computed for a tenant's requests: of prompts, and produced ones. Requests that \
             name no tenant have an empty label; the 65th tenant and all later ones share one.",
            &["model", "tenant"],
        )?;
        Ok(Self { tokens, names: Arc::default() })
    }

    pub(super) fn for_model(&self, label: &str) -> TenantMetrics {
        TenantMetrics { families: self.clone(), label: label.into() }
    }
}

impl TenantMetrics {
    /// The counter of a tenant, resolved once for each request.
    pub(crate) fn served_tokens(&self, tenant: &str) -> IntCounter {
        let mut names = self.families.names.lock().unwrap_or_else(PoisonError::into_inner);
        let own = tenant.is_empty() || names.contains(tenant) || {
            let room = names.len() < MAX_TENANTS;
            room && names.insert(tenant.to_owned())
        };
        drop(names);
        self.families.tokens.with_label_values(&[&*self.label, if own { tenant } else { OTHERS }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Registry;

    #[test]
    fn only_the_first_tenants_have_series_of_their_own() {
        let registry = Registry::new();
        let families = TenantFamilies::register(&FamilyRegistrar(&registry)).unwrap();
        let (one, two) = (families.for_model("one"), families.for_model("two"));
        for number in 0..200 {
            one.served_tokens(&format!("tenant-{number}")).inc_by(2);
        }
        one.served_tokens("").inc();
        two.served_tokens("tenant-3").inc_by(5);
        two.served_tokens("tenant-150").inc_by(7);
        let value = |model: &str, tenant: &str| {
            let families = registry.gather();
            let all = families[0].get_metric().iter();
            let found = all.filter(|metric| {
                let label = |name: &str, value: &str| {
                    metric.get_label().iter().any(|pair| pair.name() == name && pair.value() == value)
                };
                label("model", model) && label("tenant", tenant)
            });
            found.map(|metric| metric.get_counter().get_value()).sum::<f64>()
        };
        assert_eq!(registry.gather()[0].get_metric().len(), MAX_TENANTS + 2 + 2);
        assert_eq!((value("one", "tenant-63"), value("one", OTHERS)), (2.0, 136.0 * 2.0));
        assert_eq!((value("two", "tenant-3"), value("two", OTHERS), value("one", "")), (5.0, 7.0, 1.0));
    }
}
