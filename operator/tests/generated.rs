//! Files that are generated from the operator's source are committed, and up to date.
//!
//! The plain manifests below `k8s/` are the chart rendered with its defaults. Without `helm` their tests
//! print that they are skipped, and pass unless `TRUSTFORMERS_REQUIRE_HELM=1`.
//! `TRUSTFORMERS_WRITE_GENERATED=1` writes the files instead of comparing them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure here is a failed test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_yaml::Value;
use trustformers_operator::crd;
use trustformers_operator::permissions::{Permission, at_home, everywhere};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Compares a committed file with its generated content, or writes it.
fn assert_up_to_date(path: &str, generated: &str) {
    let file = root().join(path);
    if std::env::var_os("TRUSTFORMERS_WRITE_GENERATED").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, generated).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == generated,
        "{path} is not up to date: run TRUSTFORMERS_WRITE_GENERATED=1 cargo test --profile ci -p trustformers-operator --test generated"
    );
}

/// `helm` from the path, or from the cache of the cluster's scripts.
fn helm() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?
        .join("trustformers/bin");
    let cached =
        std::fs::read_dir(cache).into_iter().flatten().flatten().map(|entry| entry.path().join("helm"));
    let on_path = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).map(|folder| folder.join("helm")).collect::<Vec<_>>());
    on_path.into_iter().flatten().chain(cached).find(|file| file.is_file())
}

/// The chart rendered with these flags; `None` without `helm`, with a note on stderr.
fn rendered(flags: &[&str]) -> Option<String> {
    let Some(helm) = helm() else {
        assert!(
            std::env::var_os("TRUSTFORMERS_REQUIRE_HELM").is_none(),
            "helm is required and was not found"
        );
        eprintln!("skipped: helm is neither on the PATH nor in the cache of the cluster's scripts");
        return None;
    };
    let output = Command::new(helm)
        .args(["template", "trustformers", "charts/trustformers", "--namespace", "trustformers-system"])
        .args(flags)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The objects of a rendered chart, by kind and name.
fn objects(text: &str) -> BTreeMap<String, Value> {
    use serde::Deserialize;
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|object| !object.is_null())
        .map(|object| {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            (format!("{}/{name}", object["kind"].as_str().unwrap_or_default()), object)
        })
        .collect()
}

#[test]
fn the_definitions_in_the_chart_are_up_to_date() {
    assert_up_to_date("charts/trustformers/files/inferencemodels.yaml", &crd::text().unwrap());
    assert_up_to_date("charts/trustformers/files/abtests.yaml", &crd::ab_test_text().unwrap());
}

#[test]
fn the_plain_manifests_are_up_to_date() {
    let Some(all) = rendered(&[]) else { return };
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: trustformers-system\n  labels:\n    \
                     pod-security.kubernetes.io/enforce: restricted\n";
    let heading = "# Rendered from charts/trustformers with its default values; a test compares it.\n";
    let is_definition = |document: &&str| document.contains("\nkind: CustomResourceDefinition\n");
    let (definitions, rest): (Vec<&str>, Vec<&str>) =
        all.split("---\n").filter(|document| !document.trim().is_empty()).partition(is_definition);
    let definition = |plural: &str| {
        let name = format!("name: {plural}.serving.trustformers.dev\n");
        definitions.iter().filter(|document| document.contains(&name)).copied().collect::<String>()
    };
    let rest = rest.join("---\n");
    assert_up_to_date("k8s/00-namespace.yaml", namespace);
    for (file, plural) in [("10-inferencemodels", "inferencemodels"), ("11-abtests", "abtests")] {
        let definition = definition(plural);
        assert!(!definition.is_empty(), "the chart has no definition of {plural}");
        assert_up_to_date(&format!("k8s/{file}.yaml"), &format!("{heading}{definition}"));
    }
    assert_up_to_date("k8s/20-trustformers.yaml", &format!("{heading}{rest}"));
    assert!(definitions.len() == 2 && rest.matches("\nkind: Deployment\n").count() == 2);
}

#[test]
fn defaults_of_the_chart_reach_the_definition() {
    let flags =
        ["--set", "image.tag=v0.1.0", "--set", "replicas=3", "--set", r"resources.limits.nvidia\.com/gpu=1"];
    let Some(text) = rendered(&flags) else { return };
    let objects = objects(&text);
    let definition = &objects["CustomResourceDefinition/inferencemodels.serving.trustformers.dev"];
    let spec =
        &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    assert_eq!(spec["scaling"]["properties"]["replicas"]["default"], Value::from(3));
    assert_eq!(spec["scaling"]["default"]["replicas"], Value::from(3));
    assert_eq!(
        spec["runtime"]["properties"]["resources"]["default"]["limits"]["nvidia.com/gpu"],
        Value::from(1)
    );
    assert_eq!(spec["runtime"]["default"]["resources"]["limits"]["nvidia.com/gpu"], Value::from(1));
    assert_eq!(spec["runtime"]["default"]["numerics"], Value::from("fast"), "other defaults stay");
}

#[test]
fn every_pod_of_the_chart_is_restricted() {
    let Some(text) = rendered(&[]) else { return };
    let objects = objects(&text);
    let mut pods = 0;
    for (name, object) in objects.iter().filter(|(name, _)| name.starts_with("Deployment/")) {
        let pod = &object["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], Value::from(true), "{name}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], Value::from("RuntimeDefault"), "{name}");
        for container in pod["containers"].as_sequence().unwrap() {
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], Value::from(true), "{name}");
            assert_eq!(security["allowPrivilegeEscalation"], Value::from(false), "{name}");
            assert_eq!(security["capabilities"]["drop"][0], Value::from("ALL"), "{name}");
            pods += 1;
        }
    }
    assert_eq!(pods, 2);
}

#[test]
fn the_charts_roles_grant_the_declared_permissions() {
    let Some(text) = rendered(&[]) else { return };
    let objects = objects(&text);
    let granted = |role: &str| -> BTreeMap<(String, String), Vec<String>> {
        let texts = |value: &Value| -> Vec<String> {
            value.as_sequence().into_iter().flatten().map(|one| one.as_str().unwrap().to_owned()).collect()
        };
        let mut permissions = BTreeMap::new();
        for rule in objects[role]["rules"].as_sequence().unwrap() {
            for (group, resource) in texts(&rule["apiGroups"])
                .iter()
                .flat_map(|group| texts(&rule["resources"]).into_iter().map(move |one| (group.clone(), one)))
            {
                let mut verbs = texts(&rule["verbs"]);
                verbs.sort();
                let twice = permissions.insert((group, resource), verbs);
                assert!(twice.is_none(), "{role} names a resource twice");
            }
        }
        permissions
    };
    let declared = |permissions: Vec<Permission>| -> BTreeMap<(String, String), Vec<String>> {
        let texts = |verbs: &[&str]| verbs.iter().map(|&verb| verb.to_owned()).collect();
        permissions
            .iter()
            .map(|one| ((one.group.to_owned(), one.resource.to_owned()), texts(&one.verbs)))
            .collect()
    };
    assert_eq!(granted("ClusterRole/trustformers-operator"), declared(everywhere()));
    assert_eq!(granted("Role/trustformers-operator"), declared(at_home()));
    let all = everywhere().into_iter().chain(at_home());
    assert!(all.into_iter().all(|one| !one.resource.starts_with("secret")));
    assert!(
        !objects.keys().any(|name| name.contains("RoleBinding/trustformers-gateway")),
        "the gateway has no permissions"
    );
}
