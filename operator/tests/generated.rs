//! Files that are generated from the operator's source are committed, and up to date.
//!
//! The plain manifests below `k8s/` are the chart rendered with its defaults. Without `helm` their tests
//! print that they are skipped, and pass unless `TRUSTFORMERS_REQUIRE_HELM=1`.
//! `TRUSTFORMERS_WRITE_GENERATED=1` writes the files instead of comparing them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure here is a failed test")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
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

/// The type of a field, in the words of its schema.
fn type_of(node: &Value) -> String {
    if let Some(words) = node["enum"].as_sequence() {
        let words = words.iter().filter_map(Value::as_str).map(|word| format!("`{word}`"));
        return words.collect::<Vec<_>>().join(", ");
    }
    if node["x-kubernetes-int-or-string"] == true {
        return "quantity".to_owned();
    }
    let kind = node["type"].as_str().unwrap_or_default();
    match kind {
        "array" => format!("list of {}", type_of(&node["items"])),
        "object" if !node["additionalProperties"].is_null() => {
            format!("map to {}", type_of(&node["additionalProperties"]))
        }
        _ => kind.to_owned(),
    }
}

/// The bounds of a field.
fn limits(node: &Value) -> String {
    let number = |key: &str| match &node[key] {
        // The schema has whole numbers as `1.0`.
        Value::Number(number) => Some(number.to_string().trim_end_matches(".0").to_owned()),
        _ => None,
    };
    let mut limits = Vec::new();
    for (least, most, unit) in [
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " entries"),
        ("minProperties", "maxProperties", " entries"),
    ] {
        match (number(least), number(most)) {
            (Some(least), Some(most)) => limits.push(format!("{least} to {most}{unit}")),
            (Some(least), None) => limits.push(format!("at least {least}{unit}")),
            (None, Some(most)) => limits.push(format!("at most {most}{unit}")),
            (None, None) => {}
        }
    }
    limits.join(", ")
}

/// Calls `visit` with the path of every field below a node, the field, and whether it is required.
fn walk(node: &Value, path: &str, visit: &mut dyn FnMut(&str, &Value, bool)) {
    let required: Vec<&str> =
        node["required"].as_sequence().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in node["properties"].as_mapping().into_iter().flatten() {
        let name = name.as_str().unwrap();
        let path = format!("{path}.{name}");
        visit(&path, field, required.contains(&name));
        walk(field, &path, visit);
        walk(&field["items"], &format!("{path}[]"), visit);
    }
}

/// The messages of the rules of a node and of all below it, each one time.
fn rules(node: &Value, found: &mut Vec<String>) {
    for rule in node["x-kubernetes-validations"].as_sequence().into_iter().flatten() {
        let message = rule["message"].as_str().unwrap().to_owned();
        if !found.contains(&message) {
            found.push(message);
        }
    }
    for (_, field) in node["properties"].as_mapping().into_iter().flatten() {
        rules(field, found);
        rules(&field["items"], found);
    }
}

/// A table of the fields below `part` of a schema.
fn table(schema: &Value, part: &str) -> String {
    let mut table = "| field | type | default | limits | meaning |\n|---|---|---|---|---|\n".to_owned();
    walk(&schema["properties"][part], part, &mut |path, field, required| {
        let default = match &field["default"] {
            _ if required => "required".to_owned(),
            Value::Null | Value::Mapping(_) | Value::Sequence(_) => String::new(),
            scalar => format!("`{}`", serde_yaml::to_string(scalar).unwrap().trim()),
        };
        let meaning = field["description"].as_str().unwrap_or_default();
        let meaning = meaning.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
        let (kind, limits) = (type_of(field), limits(field));
        writeln!(table, "| `{path}` | {kind} | {default} | {limits} | {meaning} |").unwrap();
    });
    table
}

/// The page about all fields.
fn page() -> String {
    let mut page = "# Fields of the custom resources\n\nGenerated from the types in `crds/`; change those. \
                    Defaults are in the stored object. `kubectl explain` shows the same.\n"
        .to_owned();
    for text in [crd::text().unwrap(), crd::ab_test_text().unwrap()] {
        let definition: Value = serde_yaml::from_str(&text).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let kind = definition["spec"]["names"]["kind"].as_str().unwrap();
        let mut messages = Vec::new();
        rules(schema, &mut messages);
        let messages: String = messages.iter().map(|message| format!("- {message}\n")).collect();
        let (spec, status) = (table(schema, "spec"), table(schema, "status"));
        write!(
            page,
            "\n## {kind}\n\n{spec}\nThe API server refuses a spec that breaks one of these rules:\n\n\
             {messages}\n### Status of {kind}\n\n{status}"
        )
        .unwrap();
    }
    page
}

#[test]
fn the_page_of_the_fields_is_up_to_date() {
    assert_up_to_date("docs/crds.md", &page());
}

/// Fields that the fullest example cannot have beside those that it has, or that depend on a cluster.
const NOT_IN_THE_FULLEST_EXAMPLE: &[&str] = &[
    "spec.source.sha256",
    "spec.source.oci",
    "spec.runtime.adapters",
    "spec.source.cache.pvc",
    "spec.scaling.replicas",
    "spec.rollout.analysis.goldenPrompts",
    "spec.pod.priorityClassName",
    "spec.pod.runtimeClassName",
    "spec.pod.tolerations[].value",
    "spec.pod.tolerations[].tolerationSeconds",
];

#[test]
fn the_fullest_example_has_every_field() {
    let text = std::fs::read_to_string(root().join("examples/every-setting.yaml")).unwrap();
    let example: Value = serde_yaml::from_str(&text).unwrap();
    let definition: Value = serde_yaml::from_str(&crd::text().unwrap()).unwrap();
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut missing = Vec::new();
    walk(&schema["properties"]["spec"], "spec", &mut |path, _, _| {
        let mut found = vec![&example];
        for segment in path.split('.') {
            let (name, is_list) = segment.strip_suffix("[]").map_or((segment, false), |name| (name, true));
            found = found.into_iter().map(|value| &value[name]).filter(|value| !value.is_null()).collect();
            if is_list {
                found =
                    found.into_iter().flat_map(|value| value.as_sequence().into_iter().flatten()).collect();
            }
        }
        let is_left_out = |left_out: &&str| path.starts_with(*left_out);
        if found.is_empty() && !NOT_IN_THE_FULLEST_EXAMPLE.iter().any(is_left_out) {
            missing.push(path.to_owned());
        }
    });
    assert!(missing.is_empty(), "add to examples/every-setting.yaml: {missing:#?}");
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
fn routes_of_models_in_named_namespaces_may_lead_to_the_gateways() {
    let name = "ReferenceGrant/trustformers-gateway";
    let Some(usual) = rendered(&[]) else { return };
    assert!(!objects(&usual).contains_key(name), "the cluster may have no definition of it");
    let Some(text) = rendered(&["--set", "gateway.routesFrom={team-a,team-b}"]) else { return };
    let objects = objects(&text);
    let spec = &objects[name]["spec"];
    let from = spec["from"].as_sequence().unwrap();
    let namespaces: Vec<&str> = from.iter().filter_map(|one| one["namespace"].as_str()).collect();
    assert_eq!(namespaces, ["team-a", "team-b"]);
    assert!(from.iter().all(|one| one["kind"] == "HTTPRoute"));
    assert_eq!(spec["to"][0]["name"], Value::from("trustformers-gateway"));
    assert!(objects.contains_key("Service/trustformers-gateway"), "the operator leads routes there");
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
    // It may ask for tokens of its own account, and of no other.
    let rules = objects["Role/trustformers-operator"]["rules"].as_sequence().unwrap();
    let of_tokens = rules.iter().find(|rule| rule["resources"][0] == "serviceaccounts/token");
    assert_eq!(of_tokens.unwrap()["resourceNames"][0], Value::from("trustformers-operator"));
    let all = everywhere().into_iter().chain(at_home());
    assert!(all.into_iter().all(|one| !one.resource.starts_with("secret")));
    assert!(
        !objects.keys().any(|name| name.contains("RoleBinding/trustformers-gateway")),
        "the gateway has no permissions"
    );
}
