//! The kinds of objects that the operator makes for a model.
//!
//! This is the only list of them. The operator's caches, watches, permissions and pruning follow from it, and
//! `build` can make an object only of a kind that is listed here.

/// One kind of child object.
#[derive(Debug, PartialEq, Eq)]
pub struct ChildKind {
    /// API group; empty is the core group.
    pub group: &'static str,
    /// Version of the API group.
    pub version: &'static str,
    /// The kind.
    pub kind: &'static str,
    /// Plural in lower case, as URLs and RBAC rules spell it.
    pub plural: &'static str,
    /// Whether an object that is no longer desired is deleted.
    pub prune: bool,
    /// Whether it is written in one go with the Deployment, because pods need it. The rest of a new model may
    /// wait for the Deployments of other new models.
    pub with_pods: bool,
    /// Whether it is no part of Kubernetes: it is watched and made while the cluster has its definition.
    pub needs_definition: bool,
    /// Path of the part in which fields of other field managers are removed. A segment below a list is the
    /// `name` of an item. Outside this part, fields of other managers (injected containers, annotations)
    /// stay.
    pub exclusive: &'static [&'static str],
}

/// Identity of the pods.
pub const SERVICE_ACCOUNT: ChildKind = ChildKind {
    group: "",
    version: "v1",
    kind: "ServiceAccount",
    plural: "serviceaccounts",
    prune: true,
    with_pods: true,
    needs_definition: false,
    exclusive: &["automountServiceAccountToken"],
};

/// `pod.yaml`.
pub const CONFIG_MAP: ChildKind = ChildKind {
    group: "",
    version: "v1",
    kind: "ConfigMap",
    plural: "configmaps",
    prune: true,
    with_pods: true,
    needs_definition: false,
    exclusive: &["data"],
};

/// Who reaches the pods. It is written with the pods, so that none runs without it.
pub const NETWORK_POLICY: ChildKind = ChildKind {
    group: "networking.k8s.io",
    version: "v1",
    kind: "NetworkPolicy",
    plural: "networkpolicies",
    prune: true,
    with_pods: true,
    needs_definition: false,
    exclusive: &["spec"],
};

/// The headless Service.
pub const SERVICE: ChildKind = ChildKind {
    group: "",
    version: "v1",
    kind: "Service",
    plural: "services",
    prune: false,
    with_pods: false,
    needs_definition: false,
    exclusive: &["spec"],
};

/// The disruption budget.
pub const DISRUPTION_BUDGET: ChildKind = ChildKind {
    group: "policy",
    version: "v1",
    kind: "PodDisruptionBudget",
    plural: "poddisruptionbudgets",
    // A model whose pods may all be evicted at once needs none.
    prune: true,
    with_pods: false,
    needs_definition: false,
    exclusive: &["spec"],
};

/// The pods.
pub const DEPLOYMENT: ChildKind = ChildKind {
    group: "apps",
    version: "v1",
    kind: "Deployment",
    plural: "deployments",
    prune: true,
    with_pods: true,
    needs_definition: false,
    exclusive: &["spec", "template", "spec", "containers", crate::names::CONTAINER],
};

/// The autoscaler.
pub const AUTOSCALER: ChildKind = ChildKind {
    group: "autoscaling",
    version: "v2",
    kind: "HorizontalPodAutoscaler",
    plural: "horizontalpodautoscalers",
    prune: true,
    with_pods: false,
    needs_definition: false,
    exclusive: &["spec"],
};

/// Where a Prometheus finds the metrics.
pub const SERVICE_MONITOR: ChildKind = ChildKind {
    group: "monitoring.coreos.com",
    version: "v1",
    kind: "ServiceMonitor",
    plural: "servicemonitors",
    prune: true,
    with_pods: false,
    needs_definition: true,
    exclusive: &["spec"],
};

/// Where a Prometheus finds the metrics of the pods, those that do not serve included.
pub const POD_MONITOR: ChildKind = ChildKind {
    group: "monitoring.coreos.com",
    version: "v1",
    kind: "PodMonitor",
    plural: "podmonitors",
    prune: true,
    with_pods: false,
    needs_definition: true,
    exclusive: &["spec"],
};

/// By which host names callers outside of the cluster reach the model.
pub const HTTP_ROUTE: ChildKind = ChildKind {
    group: "gateway.networking.k8s.io",
    version: "v1",
    kind: "HTTPRoute",
    plural: "httproutes",
    prune: true,
    with_pods: false,
    needs_definition: true,
    exclusive: &["spec"],
};

/// Every kind of child, in the order in which children are applied: what pods need comes before the pods.
pub const CHILDREN: &[&ChildKind] = &[
    &SERVICE_ACCOUNT,
    &CONFIG_MAP,
    &NETWORK_POLICY,
    &SERVICE,
    &DISRUPTION_BUDGET,
    &AUTOSCALER,
    &SERVICE_MONITOR,
    &POD_MONITOR,
    &HTTP_ROUTE,
    &DEPLOYMENT,
];

impl ChildKind {
    /// Name of its definition, if it needs one.
    #[must_use]
    pub fn definition(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }

    /// `apiVersion` of its objects.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}
