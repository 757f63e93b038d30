//! Differences between a stored object and the desired one, over JSON.
//!
//! Server-side apply keeps what other field managers set. So a stored object may have more list items and
//! more fields than the operator applied. [`covers`] finds what is missing or has another value: an apply
//! repairs that. [`foreign_fields`] finds what others added inside the part that belongs to the operator
//! alone, such as an environment variable of its container: only a patch that removes it repairs that.

use std::cmp::Ordering;

use serde_json::{Value, json};

use crate::kinds::ChildKind;
use crate::names;

/// A list whose items server-side apply merges by key. All other lists are replaced as a whole.
struct KeyedList {
    /// The kinds that have it; empty: every kind.
    kinds: &'static [&'static str],
    /// Where it is: names of fields, `*` for an item of a list above it.
    path: &'static str,
    keys: &'static [&'static str],
}

/// The kinds with a template of pods in `spec.template`.
const WITH_PODS: &[&str] = &["DaemonSet", "Deployment", "Job", "ReplicaSet", "StatefulSet"];

const fn of_pods(path: &'static str, keys: &'static [&'static str]) -> KeyedList {
    KeyedList { kinds: WITH_PODS, path, keys }
}

/// Every keyed list of the kinds that the operator makes, as the API's `x-kubernetes-list-map-keys` say. One
/// field name means different lists: `ports` of a container has other keys than that of a Service, and
/// `imagePullSecrets` of a ServiceAccount is replaced as a whole.
const KEYED_LISTS: &[KeyedList] = &[
    KeyedList { kinds: &[], path: "metadata/ownerReferences", keys: &["uid"] },
    KeyedList { kinds: &["Service"], path: "spec/ports", keys: &["port", "protocol"] },
    of_pods("spec/template/spec/imagePullSecrets", &["name"]),
    of_pods("spec/template/spec/topologySpreadConstraints", &["topologyKey", "whenUnsatisfiable"]),
    of_pods("spec/template/spec/volumes", &["name"]),
    of_pods("spec/template/spec/containers", &["name"]),
    of_pods("spec/template/spec/containers/*/env", &["name"]),
    of_pods("spec/template/spec/containers/*/ports", &["containerPort", "protocol"]),
    of_pods("spec/template/spec/containers/*/volumeMounts", &["mountPath"]),
    of_pods("spec/template/spec/initContainers", &["name"]),
    of_pods("spec/template/spec/initContainers/*/env", &["name"]),
    of_pods("spec/template/spec/initContainers/*/ports", &["containerPort", "protocol"]),
    of_pods("spec/template/spec/initContainers/*/volumeMounts", &["mountPath"]),
];

/// Where in an object of a kind two values are compared.
struct Comparison<'a> {
    kind: &'a str,
    path: Vec<&'a str>,
}

/// Whether the stored object has everything that the desired object sets. It may have more: defaults of the
/// API server, and list items of other field managers.
///
/// A field that is no longer desired is not found here. The hash in the annotation, which is part of the
/// desired object, changes with it.
#[must_use]
pub fn covers(kind: &ChildKind, stored: &Value, desired: &Value) -> bool {
    Comparison { kind: kind.kind, path: Vec::new() }.covers(stored, desired)
}

impl<'a> Comparison<'a> {
    fn covers(&mut self, stored: &'a Value, desired: &'a Value) -> bool {
        match (stored, desired) {
            (Value::Object(stored), Value::Object(desired)) => {
                desired.iter().all(|(key, value)| match stored.get(key) {
                    Some(stored) => self.covers_below(key, stored, value),
                    None => is_empty(value),
                })
            }
            (Value::Array(stored), Value::Array(desired)) => self.covers_list(stored, desired),
            (Value::String(stored), Value::String(desired)) => {
                stored == desired
                    || quantity(stored)
                        .zip(quantity(desired))
                        .is_some_and(|(one, other)| same_amount(one, other))
            }
            _ => stored == desired,
        }
    }

    fn covers_below(&mut self, segment: &'a str, stored: &'a Value, desired: &'a Value) -> bool {
        self.path.push(segment);
        let covers = self.covers(stored, desired);
        self.path.pop();
        covers
    }

    fn covers_list(&mut self, stored: &'a [Value], desired: &'a [Value]) -> bool {
        let Some(keys) = self.keys() else {
            return stored.len() == desired.len()
                && stored.iter().zip(desired).all(|(one, other)| self.covers_below("*", one, other));
        };
        let same_item = |one: &Value, other: &Value| keys.iter().all(|key| same_key(one, other, key));
        desired.iter().all(|item| {
            stored
                .iter()
                .any(|candidate| same_item(candidate, item) && self.covers_below("*", candidate, item))
        })
    }

    /// The keys of the list at the present path, if it has any.
    fn keys(&self) -> Option<&'static [&'static str]> {
        let is_here = |list: &&KeyedList| {
            (list.kinds.is_empty() || list.kinds.contains(&self.kind))
                && list.path.split('/').eq(self.path.iter().copied())
        };
        KEYED_LISTS.iter().find(is_here).map(|list| list.keys)
    }
}

/// Whether two items have the same value of a key. The API server takes a port without a protocol as TCP.
fn same_key(one: &Value, other: &Value, key: &str) -> bool {
    let is_tcp = |item: &Value| item.get(key).is_none_or(|protocol| protocol == "TCP");
    one.get(key) == other.get(key) || (key == "protocol" && is_tcp(one) && is_tcp(other))
}

/// What the API server omits from what it stores.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Whether two amounts are equal except for rounding in a product such as 300 × 0.001. The finest step of a
/// quantity is 1e-9 of a unit, and amounts that are compared here are far less than a factor of 1e6 apart.
fn same_amount(one: f64, other: f64) -> bool {
    (one - other).abs() <= 1e-12 * one.abs().max(other.abs())
}

/// The amount that a quantity stands for: the API server writes `1000m` as `1`.
fn quantity(text: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let (digits, unit) = UNITS
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
        .unwrap_or((text, 1.0));
    digits.starts_with(|c: char| c.is_ascii_digit() || c == '.' || c == '+').then_some(())?;
    digits.parse::<f64>().ok().map(|number| number * unit)
}

/// A path below an object: names of fields and indexes of list items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldPath(Vec<String>);

impl FieldPath {
    fn join(&self, segment: &str) -> Self {
        Self(self.0.iter().cloned().chain([segment.to_owned()]).collect())
    }

    /// The JSON pointer.
    #[must_use]
    pub fn pointer(&self) -> String {
        self.0.iter().map(|one| format!("/{}", one.replace('~', "~0").replace('/', "~1"))).collect()
    }

    /// Indexes compare as numbers, so that the last item of a list comes last.
    fn compare(&self, other: &Self) -> Ordering {
        let key = |segment: &String| (segment.parse::<usize>().ok(), segment.clone());
        self.0.iter().map(key).cmp(other.0.iter().map(key))
    }
}

/// One part of a stored object, and where it is.
#[derive(Debug, Clone)]
struct Location<'a> {
    path: FieldPath,
    value: &'a Value,
}

impl<'a> Location<'a> {
    /// The part of `object` at `path`.
    fn locate(object: &'a Value, path: &[&str]) -> Option<Self> {
        path.iter().try_fold(Self { path: FieldPath(Vec::new()), value: object }, |at, segment| {
            match at.value.as_array() {
                Some(items) => at.item(items.iter().position(|item| item["name"] == *segment)?),
                None => at.field(segment),
            }
        })
    }

    fn field(&self, name: &str) -> Option<Self> {
        Some(Self { path: self.path.join(name), value: self.value.get(name)? })
    }

    fn item(&self, index: usize) -> Option<Self> {
        Some(Self { path: self.path.join(&index.to_string()), value: self.value.get(index)? })
    }

    /// The child that a key of managed fields means: `f:` a field, `k:` a list item by its keys, `v:` one by
    /// its value.
    fn child(&self, key: &str) -> Option<Self> {
        let (step, name) = key.split_once(':')?;
        if step == "f" {
            return self.field(name);
        }
        let wanted: Value = serde_json::from_str(name).ok()?;
        let matches = |item: &Value| match &wanted {
            Value::Object(keys) if step == "k" => {
                keys.iter().all(|(key, value)| item.get(key) == Some(value))
            }
            wanted => item == wanted,
        };
        self.item(self.value.as_array()?.iter().position(matches)?)
    }
}

/// The fields that other field managers set inside the exclusive part of a stored object, from its managed
/// fields.
#[must_use]
pub fn foreign_fields(object: &Value, kind: &ChildKind) -> Vec<FieldPath> {
    let Some(start) = Location::locate(object, kind.exclusive) else { return Vec::new() };
    let managers = object.pointer("/metadata/managedFields").and_then(Value::as_array);
    // What a subresource sets (status, scale) is not part of the desired object.
    let (own, others): (Vec<&Value>, Vec<&Value>) = managers
        .into_iter()
        .flatten()
        .filter(|entry| entry.get("subresource").is_none_or(|name| name == ""))
        .partition(|entry| entry["manager"] == names::MANAGER);
    let own: Vec<&Value> = own.into_iter().filter_map(|entry| managed_fields(entry, kind)).collect();
    let mut found = Vec::new();
    for fields in others.into_iter().filter_map(|entry| managed_fields(entry, kind)) {
        collect(fields, &own, &start, &mut found);
    }
    found.sort_by(FieldPath::compare);
    found.dedup();
    found
}

/// The managed fields of an entry in the exclusive part.
fn managed_fields<'a>(entry: &'a Value, kind: &ChildKind) -> Option<&'a Value> {
    kind.exclusive.iter().try_fold(&entry["fieldsV1"], |fields, segment| {
        let item = format!("k:{}", json!({"name": segment}));
        fields.get(format!("f:{segment}")).or_else(|| fields.get(item))
    })
}

/// Adds what is in `fields` and in none of `own`, if it is still in the object.
fn collect(fields: &Value, own: &[&Value], at: &Location<'_>, found: &mut Vec<FieldPath>) {
    for (key, below) in fields.as_object().into_iter().flatten() {
        let Some(child) = at.child(key) else { continue };
        let own_below: Vec<&Value> = own.iter().filter_map(|fields| fields.get(key)).collect();
        if own_below.is_empty() {
            found.push(child.path);
        } else {
            collect(below, &own_below, &child, found);
        }
    }
}

/// A JSON patch that removes these fields from the version of the object in which they were found.
#[must_use]
pub fn removal(resource_version: &str, fields: &[FieldPath]) -> Value {
    let guard = json!({"op": "test", "path": "/metadata/resourceVersion", "value": resource_version});
    // The last item of a list goes first: removing it does not move the others.
    let mut fields: Vec<&FieldPath> = fields.iter().collect();
    fields.sort_by(|one, other| other.compare(one));
    let removals = fields.iter().map(|field| json!({"op": "remove", "path": field.pointer()}));
    std::iter::once(guard).chain(removals).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{CONFIG_MAP, DEPLOYMENT, SERVICE, SERVICE_ACCOUNT};

    /// A Deployment with these fields of its pods.
    fn deployment(pods: &Value) -> Value {
        json!({"spec": {"template": {"spec": pods}}})
    }

    fn pods_cover(stored: &Value, desired: &Value) -> bool {
        covers(&DEPLOYMENT, &deployment(stored), &deployment(desired))
    }

    #[test]
    fn additions_of_the_api_server_are_no_drift() {
        let container = |env: Value| json!({"containers": [{"name": "runtime", "env": env}]});
        let stored = container(json!([{"name": "a", "more": 1}]));
        assert!(pods_cover(&stored, &container(json!([{"name": "a", "value": ""}]))));
        assert!(!pods_cover(&stored, &container(json!([{"name": "a"}, {"name": "b"}]))));
        let stored = json!({"spec": {"replicas": 1, "paused": false}});
        assert!(covers(&DEPLOYMENT, &stored, &json!({"spec": {"replicas": 1}})));
        assert!(!covers(&DEPLOYMENT, &stored, &json!({"spec": {"replicas": 2}})));
        assert!(!covers(&DEPLOYMENT, &stored, &json!({"spec": {"other": true}})));
    }

    #[test]
    fn list_items_of_other_managers_are_no_drift() {
        let desired = json!({"containers": [{"name": "runtime", "image": "i"}]});
        let injected = json!({"containers": [{"name": "proxy"}, {"name": "runtime", "image": "i"}]});
        assert!(pods_cover(&injected, &desired));
        let changed = json!({"containers": [{"name": "proxy"}, {"name": "runtime", "image": "other"}]});
        assert!(!pods_cover(&changed, &desired));
        assert!(!pods_cover(&json!({"containers": [{"name": "proxy"}]}), &desired));
    }

    #[test]
    fn lists_without_keys_are_compared_as_a_whole() {
        let desired =
            json!({"tolerations": [{"key": "gpu"}], "containers": [{"name": "r", "args": ["--config"]}]});
        assert!(pods_cover(&desired, &desired));
        let longer =
            json!({"tolerations": [{"key": "gpu"}, {"key": "b"}], "containers": desired["containers"]});
        assert!(!pods_cover(&longer, &desired));
        let args = json!({"tolerations": [{"key": "gpu"}], "containers": [{"name": "r", "args": ["--config", "x"]}]});
        assert!(!pods_cover(&args, &desired));
    }

    /// The same name of a field means a keyed list in one kind and at one path, and another list elsewhere.
    #[test]
    fn the_keys_of_a_list_depend_on_its_kind_and_path() {
        let (own, more) = (json!([{"name": "a"}]), json!([{"name": "a"}, {"name": "b"}]));
        let at = |pointer: &[&str], list: &Value| {
            pointer.iter().rev().fold(list.clone(), |below, field| json!({*field: below}))
        };
        let pods = ["spec", "template", "spec"];
        for (kind, path, is_keyed) in [
            (&DEPLOYMENT, &[&pods[..], &["imagePullSecrets"]].concat()[..], true),
            (&SERVICE_ACCOUNT, &["imagePullSecrets"], false),
            (&DEPLOYMENT, &[&pods[..], &["volumes"]].concat(), true),
            (&CONFIG_MAP, &[&pods[..], &["volumes"]].concat(), false),
            (&DEPLOYMENT, &["spec", "env"], false),
        ] {
            let covered = covers(kind, &at(path, &more), &at(path, &own));
            assert_eq!(covered, is_keyed, "{} {path:?}", kind.kind);
        }
        // Two ports of a Service may have one target; two of a container differ in the port or the protocol.
        let ports = |list: Value| json!({"spec": {"ports": list}});
        let (desired, other) = (json!({"port": 80, "name": "http"}), json!({"port": 80, "protocol": "UDP"}));
        let stored = json!({"port": 80, "protocol": "TCP", "name": "http", "nodePort": 3});
        assert!(covers(&SERVICE, &ports(json!([other, stored])), &ports(json!([desired]))));
        assert!(!covers(&SERVICE, &ports(json!([other])), &ports(json!([desired]))));
        let container = |list: Value| json!({"containers": [{"name": "r", "ports": list}]});
        let (own, injected) = (json!({"containerPort": 1, "name": "a"}), json!({"containerPort": 2}));
        assert!(pods_cover(&container(json!([injected, own])), &container(json!([own]))));
    }

    #[test]
    fn quantities_are_equal_by_amount() {
        let same = |one: &str, other: &str| covers(&CONFIG_MAP, &json!(one), &json!(other));
        for (one, other) in
            [("1", "1000m"), ("1Gi", "1024Mi"), ("1k", "1000"), ("+2", "2"), ("1e3", "1k"), ("0.3", "300m")]
        {
            assert!(same(one, other), "{one} {other}");
        }
        assert!(!same("1", "2"));
        assert!(!same("one", "two"));
    }

    /// A Deployment after `kubectl set env A=B C=D`, with a sidecar that another manager injected.
    fn changed_by_others(own_env: bool) -> Value {
        let mut own = json!({"f:image": {}});
        if own_env {
            own["f:env"] = json!({"k:{\"name\":\"OURS\"}": {".": {}, "f:name": {}, "f:value": {}}});
        }
        let container = |fields: Value| json!({"f:spec": {"f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"runtime\"}": fields}}}}});
        let set_env = container(json!({"f:env": {".": {},
            "k:{\"name\":\"A\"}": {".": {}, "f:name": {}, "f:value": {}},
            "k:{\"name\":\"C\"}": {".": {}, "f:name": {}, "f:value": {}}}}));
        let sidecar = json!({"f:spec": {"f:template": {"f:spec": {"f:containers":
            {"k:{\"name\":\"proxy\"}": {".": {}, "f:name": {}, "f:image": {}}}}}}});
        let status = json!({"f:status": {"f:replicas": {}}});
        let env =
            json!([{"name": "OURS", "value": "1"}, {"name": "A", "value": "B"}, {"name": "C", "value": "D"}]);
        json!({
            "metadata": {"managedFields": [
                {"manager": "trustformers-operator", "operation": "Apply", "fieldsV1": container(own)},
                {"manager": "kubectl-set", "operation": "Update", "fieldsV1": set_env},
                {"manager": "injector", "operation": "Update", "fieldsV1": sidecar},
                {"manager": "kube-controller-manager", "operation": "Update", "subresource": "status", "fieldsV1": status},
            ]},
            "spec": {"template": {"spec": {"containers": [
                {"name": "proxy", "image": "p"}, {"name": "runtime", "image": "i", "env": env}]}}},
        })
    }

    fn pointers(object: &Value, kind: &ChildKind) -> Vec<String> {
        foreign_fields(object, kind).iter().map(FieldPath::pointer).collect()
    }

    #[test]
    fn foreign_fields_are_found_in_our_container_only() {
        let at = "/spec/template/spec/containers/1/env";
        let both = vec![format!("{at}/1"), format!("{at}/2")];
        assert_eq!(pointers(&changed_by_others(true), &DEPLOYMENT), both);
        // Without an environment of our own, the whole list belongs to the other manager.
        assert_eq!(pointers(&changed_by_others(false), &DEPLOYMENT), vec![at.to_owned()]);
    }

    #[test]
    fn a_removal_takes_the_last_item_first_and_names_the_version() {
        let fields = foreign_fields(&changed_by_others(true), &DEPLOYMENT);
        let at = "/spec/template/spec/containers/1/env";
        assert_eq!(
            removal("7", &fields),
            json!([
                {"op": "test", "path": "/metadata/resourceVersion", "value": "7"},
                {"op": "remove", "path": format!("{at}/2")},
                {"op": "remove", "path": format!("{at}/1")},
            ])
        );
    }

    #[test]
    fn a_foreign_entry_of_a_service_selector_is_found() {
        let own = json!({"f:spec": {"f:selector": {"f:a": {}}}});
        let other = json!({"f:spec": {"f:selector": {"f:b/c": {}}}});
        let service = json!({
            "metadata": {"managedFields": [
                {"manager": "trustformers-operator", "operation": "Apply", "fieldsV1": own},
                {"manager": "kubectl-patch", "operation": "Update", "fieldsV1": other},
            ]},
            "spec": {"selector": {"a": "1", "b/c": "2"}},
        });
        assert_eq!(pointers(&service, &SERVICE), ["/spec/selector/b~1c"]);
    }
}
