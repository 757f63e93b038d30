//! What the operator may do, and why: the one list that the chart's roles are checked against.
//!
//! Nothing here touches Secrets. A right that is not in this list is not asked for, and a test fails when the chart
//! grants more or less.

/// A right: the verbs on some resources of one API group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// API group; empty is the core group.
    pub group: &'static str,
    /// Resource, or resource and subresource.
    pub resource: &'static str,
    /// Verbs, sorted.
    pub verbs: &'static [&'static str],
}

const fn right(group: &'static str, resource: &'static str, verbs: &'static [&'static str]) -> Right {
    Right { group, resource, verbs }
}

/// Rights in every namespace. `create` beside `patch`: server-side apply makes what is not there.
pub const EVERYWHERE: &[Right] = &[
    // watch::watch_models; reconcile::status
    right("serving.trustformers.dev", "inferencemodels", &["list", "watch"]),
    right("serving.trustformers.dev", "inferencemodels/status", &["patch"]),
    // watch::watch_children; reconcile::apply
    right("", "serviceaccounts", &["create", "list", "patch", "watch"]),
    right("", "services", &["create", "list", "patch", "watch"]),
    right("", "configmaps", &["create", "delete", "list", "patch", "watch"]),
    right("apps", "deployments", &["create", "list", "patch", "watch"]),
    right("policy", "poddisruptionbudgets", &["create", "list", "patch", "watch"]),
    // watch::watch_pods; feed::gates
    right("", "pods", &["list", "watch"]),
    right("", "pods/status", &["patch"]),
    // recorder
    right("events.k8s.io", "events", &["create", "get", "patch"]),
    // feed::identity
    right("authentication.k8s.io", "tokenreviews", &["create"]),
];

/// Rights in the operator's own namespace.
pub const AT_HOME: &[Right] = &[
    // election
    right("coordination.k8s.io", "leases", &["create", "get", "update"]),
    // leader::label; it lists by the right above
    right("", "pods", &["patch"]),
];
