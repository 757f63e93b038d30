//! What the operator may do: the permissions that the chart's roles grant.
//!
//! Those for children follow from `kinds::CHILDREN`. A test fails when the chart grants more or less, and the
//! mock API server of the tests refuses every request that is not permitted here. Nothing here touches
//! Secrets.

use trustformers_control::kinds::CHILDREN;

/// The permitted verbs for some resource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Permission {
    /// API group; empty is the core group.
    pub group: &'static str,
    /// Resource, or resource and subresource.
    pub resource: &'static str,
    /// Verbs, sorted.
    pub verbs: Vec<&'static str>,
}

fn permission(group: &'static str, resource: &'static str, verbs: &[&'static str]) -> Permission {
    Permission { group, resource, verbs: verbs.to_vec() }
}

/// Permissions in every namespace.
#[must_use]
pub fn everywhere() -> Vec<Permission> {
    let children = CHILDREN.iter().map(|kind| {
        // `get`: who owns an object that has the name of a child.
        let verbs: &[&str] = match kind.prune {
            true => &["create", "delete", "get", "list", "patch", "watch"],
            false => &["create", "get", "list", "patch", "watch"],
        };
        permission(kind.group, kind.plural, verbs)
    });
    let others = [
        // watchers, reconcile::status
        permission("serving.trustformers.dev", "inferencemodels", &["list", "watch"]),
        permission("serving.trustformers.dev", "inferencemodels/status", &["patch"]),
        // ab_tests; their sums are in ConfigMaps
        permission("serving.trustformers.dev", "abtests", &["list", "watch"]),
        permission("serving.trustformers.dev", "abtests/status", &["patch"]),
        // watchers, feed::gates, feed::gateways, reconcile::ending
        permission("", "pods", &["list", "watch"]),
        permission("", "pods/status", &["patch"]),
        // nodes: pods of a node that is lost are not routed
        permission("", "nodes", &["list", "watch"]),
        // definitions: which optional kinds there are
        permission("apiextensions.k8s.io", "customresourcedefinitions", &["list", "watch"]),
        // recorder; watchers: a volume that cannot be mounted is reported by Events only
        permission("", "events", &["create", "get", "list", "patch", "watch"]),
        // feed::identity
        permission("authentication.k8s.io", "tokenreviews", &["create"]),
    ];
    children.chain(others).collect()
}

/// Permissions in the operator's own namespace.
#[must_use]
pub fn at_home() -> Vec<Permission> {
    vec![
        // election
        permission("coordination.k8s.io", "leases", &["create", "get", "update"]),
        // leader: the label of the leader's pod
        permission("", "pods", &["patch"]),
        // pod_tokens: tokens of the operator's own account; the chart's rule names it
        permission("", "serviceaccounts/token", &["create"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use http::{Method, StatusCode};
    use kube::Client;
    use serde_json::{Value, json};
    use tokio::task::JoinSet;
    use tonic::metadata::MetadataMap;
    use trustformers_control::events::EventNote;
    use trustformers_crds::InferenceModel;

    use crate::children::Child;
    use crate::context::tests::{identity, metrics, settings};
    use crate::context::{Context, NewContext};
    use crate::election::Candidate;
    use crate::feed::gates;
    use crate::feed::identity::FeedAuthenticator;
    use crate::reconcile::reconcile;
    use crate::testing::{MockRequest, mock_client, needed};
    use crate::{ab_tests, leader, recorder, watchers};

    /// An API server that stores nothing, and the permissions that its requests needed.
    fn recording_client() -> (Client, Arc<Mutex<BTreeSet<String>>>) {
        let used = Arc::new(Mutex::new(BTreeSet::new()));
        let record = Arc::clone(&used);
        let versions = Arc::new(AtomicU64::new(10));
        let client = mock_client(move |request| {
            let mut used = record.lock().unwrap();
            let repeated = used.contains("/events create");
            let needed = needed(&request);
            // Each first POST of a child conflicts, so that the operator looks for the owner of the object.
            let conflicts = needed.iter().any(|one| {
                let is_child = CHILDREN.iter().any(|kind| one.contains(&format!("/{} ", kind.plural)));
                let get = one.replace(" create", " get");
                is_child && get != *one && !used.contains(&get)
            });
            used.extend(needed);
            let version = versions.fetch_add(10, Ordering::Relaxed);
            if conflicts { failure(409, "Conflict") } else { answer(&request, repeated, version) }
        });
        (client, used)
    }

    fn failure(code: u16, reason: &str) -> (StatusCode, Value) {
        let body =
            json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": ""});
        (StatusCode::from_u16(code).unwrap(), body)
    }

    fn answer(request: &MockRequest, repeated: bool, version: u64) -> (StatusCode, Value) {
        let path = request.uri.path();
        let is_watch = request.uri.query().is_some_and(|query| query.contains("watch=true"));
        let is_event = path.contains("/events/") || path.ends_with("/events");
        match request.method {
            Method::GET if is_watch => (StatusCode::OK, Value::Null),
            // The cluster has every optional kind.
            Method::GET if path.ends_with("/customresourcedefinitions") => {
                let optional = CHILDREN.iter().filter(|kind| kind.needs_definition);
                let items = optional.map(|kind| json!({"metadata": {"name": kind.definition()}}));
                let items: Vec<Value> = items.collect();
                (
                    StatusCode::OK,
                    json!({"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}),
                )
            }
            Method::GET if !path.contains("/namespaces/") => {
                (StatusCode::OK, json!({"kind": "List", "metadata": {"resourceVersion": "1"}, "items": []}))
            }
            Method::GET if is_event => (StatusCode::OK, json!({"metadata": {}, "involvedObject": {}})),
            Method::GET => failure(404, "NotFound"),
            Method::POST if is_event && repeated => failure(409, "AlreadyExists"),
            Method::DELETE => (StatusCode::OK, json!({"kind": "Status", "status": "Success"})),
            _ => {
                let mut stored = request.body.clone();
                stored["metadata"]["uid"] = json!("u");
                stored["metadata"]["resourceVersion"] = json!(version.to_string());
                stored["metadata"]["namespace"] = json!("team");
                stored["metadata"]["name"] = stored["metadata"]["name"].as_str().unwrap_or("chat").into();
                if stored["kind"] == "Deployment" {
                    stored["status"] = json!({"replicas": 0, "updatedReplicas": 0});
                }
                (StatusCode::OK, stored)
            }
        }
    }

    fn model(generation: i64, spec: &str) -> Arc<InferenceModel> {
        let text = format!(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: chat, namespace: team, uid: u1, generation: {generation}}}\nspec: {spec}\n"
        );
        Arc::new(serde_yaml::from_str(&text).unwrap())
    }

    /// Somebody removes the annotations of every child.
    fn drift(context: &Context) {
        for child in context.children.of_owner("u1") {
            let mut object = child.object();
            object["metadata"]["annotations"] = json!({});
            let version: u64 = child.version.parse().unwrap();
            object["metadata"]["resourceVersion"] = json!((version + 1).to_string());
            context.children.insert(Child::of(child.kind, serde_json::from_value(object).unwrap()).unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn every_permission_is_used() {
        let (client, used) = recording_client();
        let NewContext { context, writers, queue: _queue } =
            Context::create(client.clone(), settings(), metrics());
        // Lists and watches of all kinds.
        let mut tasks = JoinSet::new();
        watchers::spawn(&context, writers, &mut tasks);
        context.complete().await.unwrap();
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        tasks.shutdown().await;
        // Children are created, corrected, and deleted when they are no longer needed: the pool of the first
        // revision has no pod.
        let first = "{source: {uri: 'oci://localhost/m:1'}, disruption: {maxUnavailable: 0}, \
            runtime: {resources: {requests: {cpu: 1}}}, scaling: {maxReplicas: 2, metrics: [{cpu: 70}]}, \
            networkPolicy: {enabled: true}, monitoring: {serviceMonitor: true, podMonitor: true}, \
            route: {hostnames: [a.example.com], parentRefs: [{name: g}]}}";
        reconcile(model(1, first), Arc::clone(&context)).await.unwrap();
        drift(&context);
        reconcile(model(1, first), Arc::clone(&context)).await.unwrap();
        let stopped = "{source: {uri: 'oci://localhost/m:1'}, scaling: {replicas: 0}}";
        reconcile(model(2, stopped), Arc::clone(&context)).await.unwrap();
        let other = "{source: {uri: 'oci://localhost/m:3'}, scaling: {replicas: 0}, pod: {serviceAccountName: puller}}";
        reconcile(model(3, other), Arc::clone(&context)).await.unwrap();
        // An Event, and one that was published by another leader.
        let note =
            |reason: &str| EventNote { warning: true, reason: reason.to_owned(), note: "text".to_owned() };
        let about = recorder::about(&("team".to_owned(), "chat".to_owned()), "u1");
        recorder::publish(&context, &about, &[note("Test"), note("Other")]).await;
        gates::tests::write_one(&context).await;
        let token = context.pod_tokens.header(&context.client, &identity(), "team").await;
        assert!(token.is_err(), "the answer has no token");
        ab_tests::tests::write_one(&context).await;
        let authenticator = FeedAuthenticator::for_account(client.clone(), "sys", "gateway");
        let mut headers = MetadataMap::new();
        headers.insert("authorization", "Bearer token".parse().unwrap());
        assert!(authenticator.verify(&headers).await.is_err(), "the review has no result");
        let mut candidate = Candidate::new(client, "trustformers-system", "one".to_owned());
        candidate.lead(|| {}).await;
        candidate.release().await;
        leader::unlabel(&context).await;

        let declared = everywhere().into_iter().chain(at_home());
        let declared: BTreeSet<String> = declared
            .flat_map(|one| {
                one.verbs
                    .iter()
                    .map(move |verb| format!("{}/{} {verb}", one.group, one.resource))
                    .collect::<Vec<_>>()
            })
            .collect();
        let used = used.lock().unwrap().clone();
        let unused: Vec<_> = declared.difference(&used).collect();
        assert!(unused.is_empty(), "these permissions are declared and not used: {unused:?}");
    }
}
