//! The sums of a test in a ConfigMap that the test owns: they outlive gateways and operators.
//!
//! A ConfigMap takes 1 MiB. A bucket of users has some 60 to 120 bytes, and 20 more where scores came
//! twice, so 256 of them make at most 36 KB for each variant, epoch and gateway process: two variants, one
//! epoch and three gateways take 216 KB. Scored answers take 8 bytes each, and at most 131 KB. What is left
//! has first-seen users, of 8 bytes each.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource};
use trustformers_control::ab_test::sample::StoredSums;
use trustformers_control::ab_test::status::stored_variants;
use trustformers_control::ab_test::validate::ValidatedTest;
use trustformers_control::names;
use trustformers_crds::{ABTest, ABTestStatus};

use super::ABTestError;
use crate::context::Context;

/// Bytes of sums in a ConfigMap; names and metadata are the rest of the 1 MiB that it takes.
const LIMIT_BYTES: usize = 900_000;

fn api(context: &Context, test: &ValidatedTest) -> Api<ConfigMap> {
    Api::namespaced(context.client.clone(), &test.key.0)
}

fn is_owned(map: &ConfigMap, test: &ValidatedTest) -> bool {
    map.metadata.owner_references.iter().flatten().any(|owner| owner.uid == test.uid)
}

/// Reads what was stored. Returns why sums cannot be stored, if another object has the name.
///
/// # Errors
/// When the API server does not answer.
pub async fn restore(
    context: &Context,
    test: &ValidatedTest,
    status: &ABTestStatus,
) -> Result<Option<String>, ABTestError> {
    let name = names::ab_test_samples(&test.key.1);
    let found = api(context, test).get_opt(&name).await;
    let Some(map) = found.map_err(|error| ABTestError::Restore(Box::new(error)))? else { return Ok(None) };
    if !is_owned(&map, test) {
        return Ok(Some(not_ours(&name)));
    }
    let stored: StoredSums =
        map.binary_data.unwrap_or_default().into_iter().map(|(process, bytes)| (process, bytes.0)).collect();
    let known = stored_variants(&test.uid, status);
    let unreadable = context.samples.with(|samples| samples.restore(&stored, &known));
    if !unreadable.is_empty() {
        tracing::warn!(test = test.key.1, ?unreadable, "stored sums cannot be read and are left out");
    }
    Ok(None)
}

fn not_ours(name: &str) -> String {
    format!("the ConfigMap {name} exists and does not belong to this test: delete it")
}

/// Stores the sums, if they changed. Returns why they could not be stored.
pub async fn store(context: &Context, test: &ValidatedTest, stored: &mut StoredSums) -> Option<String> {
    let sums = match context.samples.with(|samples| samples.checkpoint(&test.uid, LIMIT_BYTES)) {
        Ok(sums) => sums,
        Err(error) => return Some(error.to_string()),
    };
    if sums == *stored {
        return None;
    }
    let name = names::ab_test_samples(&test.key.1);
    let api = api(context, test);
    // The first write must not take over an object of somebody else.
    if stored.is_empty() {
        match api.get_opt(&name).await {
            Ok(Some(map)) if !is_owned(&map, test) => return Some(not_ours(&name)),
            Ok(_) => {}
            Err(error) => return Some(format!("the ConfigMap {name} could not be read: {error}")),
        }
    }
    let params = PatchParams::apply(names::MANAGER).force();
    match api.patch(&name, &params, &Patch::Apply(config_map(&name, test, &sums))).await {
        Ok(_) => {
            context.metrics.count_write("ConfigMap");
            *stored = sums;
            None
        }
        Err(error) => Some(format!("the ConfigMap {name} could not be written: {error}")),
    }
}

fn config_map(name: &str, test: &ValidatedTest, sums: &StoredSums) -> ConfigMap {
    let owner = OwnerReference {
        api_version: ABTest::api_version(&()).into_owned(),
        kind: ABTest::kind(&()).into_owned(),
        name: test.key.1.clone(),
        uid: test.uid.clone(),
        controller: Some(true),
        block_owner_deletion: None,
    };
    let bytes = |(process, sums): (&String, &Vec<u8>)| (process.clone(), ByteString(sums.clone()));
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        binary_data: Some(sums.iter().map(bytes).collect()),
        ..ConfigMap::default()
    }
}
