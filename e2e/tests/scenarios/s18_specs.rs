//! What the API server refuses, and what it accepts twice without a change.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde_json::Value;
use trustformers_e2e::{
    scenario::{Scenario, run},
    specs::{MESSAGES, RefusedObject, refused},
};

/// Set, the messages are written instead of compared.
const WRITE: &str = "TRUSTFORMERS_WRITE_GENERATED";

#[tokio::test]
async fn every_bad_spec_is_refused_with_its_field_and_what_to_do() -> Result<()> {
    run("specs", async |scenario| {
        // Given: more than a hundred specs with one mistake each. When: each is applied, as a dry run.
        let repository = &scenario.cluster.settings.repository;
        let (mut messages, mut faults) = (String::new(), Vec::new());
        for RefusedObject { spec, object } in refused(repository)? {
            // Then: the API server refuses it, and its message names the field and what to do.
            match dry_run(scenario, &spec.kind, &spec.name, &object).await? {
                None => faults.push(format!("{}: accepted", spec.case)),
                Some(message) => {
                    for text in spec.says.iter().filter(|text| !message.contains(text.as_str())) {
                        faults.push(format!("{}: {text:?} is not in {message:?}", spec.case));
                    }
                    let message = message.replace(&scenario.namespace, "NAMESPACE");
                    writeln!(messages, "{}: {}", spec.case, message.replace('\n', " "))?;
                }
            }
        }
        assert!(faults.is_empty(), "{faults:#?}");
        let golden = repository.join(MESSAGES);
        if std::env::var_os(WRITE).is_some() {
            return Ok(std::fs::write(golden, messages)?);
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        assert!(messages == expected, "{MESSAGES} differs: review what {WRITE}=1 writes there:\n{messages}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn examples_are_accepted_and_applied_twice_change_nothing() -> Result<()> {
    run("examples", async |scenario| {
        // Given: a namespace without room for a pod, so that none has to start and end.
        kubectl(scenario, &["create", "quota", "no-pods", "--hard=pods=0"]).await?;
        let folder = scenario.cluster.settings.repository.join("examples");
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                files.push(path.to_str().context("the checkout's path is not UTF-8")?.to_owned());
            }
        }
        assert!(files.len() >= 6, "{files:?}");
        files.sort_unstable();
        for file in files {
            // When: an example is applied twice. Then: the second time nothing changes.
            kubectl(scenario, &["apply", "--filename", &file]).await?;
            let again = kubectl(scenario, &["apply", "--filename", &file]).await?;
            assert!(again.lines().all(|line| line.ends_with(" unchanged")), "{file}: {again}");
            kubectl(scenario, &["delete", "--filename", &file]).await?;
        }
        Ok(())
    })
    .await
}

/// The message with which the API server refuses an object; none if it accepts it.
async fn dry_run(scenario: &Scenario, kind: &str, name: &str, object: &Value) -> Result<Option<String>> {
    let resource =
        ApiResource::from_gvk(&GroupVersionKind::gvk("serving.trustformers.dev", "v1alpha1", kind));
    let client = scenario.cluster.client.clone();
    let api: Api<DynamicObject> = Api::namespaced_with(client, &scenario.namespace, &resource);
    let params = PatchParams::apply("scenarios").dry_run().validation_strict();
    match api.patch(name, &params, &Patch::Apply(object)).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) => Ok(Some(status.message)),
        Err(error) => Err(error).with_context(|| format!("{kind} {name}")),
    }
}

async fn kubectl(scenario: &Scenario, arguments: &[&str]) -> Result<String> {
    let all = [&["--namespace", scenario.namespace.as_str()][..], arguments].concat();
    scenario.cluster.kubectl(&all).stdout().await
}
